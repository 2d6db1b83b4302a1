"""What blocks keep for the backward pass: results of attention kernels, and states split along the sequence."""

import jax
import jax.numpy as jnp
import pytest

from seqpe_jax.distributed.sharding import make_mesh
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.inference.compiled import with_mesh
from seqpe_jax.models import attention_tpu
from seqpe_jax.models.attention_blockwise import blockwise_attention
from seqpe_jax.models.attention_inputs import AttentionInputs
from seqpe_jax.models.decoder import Decoder
from seqpe_jax.models.transformer import REMAT_POLICIES, TransformerConfig
from tests.jaxprs import subprograms


def count(jaxpr, primitive: str) -> int:
    """How often an operation whose result is used occurs in a program and those that it calls; XLA removes the others."""
    total, used = 0, set(map(id, jaxpr.outvars))
    for equation in reversed(jaxpr.eqns):
        if not used.isdisjoint(map(id, equation.outvars)):
            used |= set(map(id, equation.invars))
            total += equation.primitive.name == primitive
            total += sum(count(program, primitive) for program in subprograms(equation.params))
    return total


@pytest.mark.parametrize("remat, forward_runs", [("full", 2), ("dots", 1), ("offload", 1)])
def test_a_saved_attention_result_is_not_computed_again(remat, forward_runs):
    array = jax.ShapeDtypeStruct((1, 8, 1, 4), jnp.float32)

    def runs(attention, primitive):
        def loss(query, weight):
            out = attention(AttentionInputs(query @ weight, query, query, causal_offset=jnp.zeros(1, jnp.int32)))
            return (out @ weight).sum()

        recomputed = jax.checkpoint(loss, policy=REMAT_POLICIES[remat], prevent_cse=False)
        weight = jax.ShapeDtypeStruct((4, 4), jnp.float32)
        return count(jax.make_jaxpr(jax.value_and_grad(recomputed, (0, 1)))(array, weight).jaxpr, primitive)

    # Two kernels compute gradients; in plain JAX, the forward pass has two exponentials, the backward pass one.
    assert runs(lambda inputs: attention_tpu.flash(inputs, interpret=True), "pallas_call") == forward_runs + 2
    assert runs(lambda inputs: blockwise_attention(inputs, block=4), "exp") == 2 * forward_runs + 1


@pytest.mark.parametrize("length, stored", [(16, 4), (18, 18)])
def test_states_between_blocks_are_split_along_the_sequence(length, stored):
    """Under the mesh axis tensor, where it divides the length."""
    layers, batch, width = 3, 2, 8
    config = TransformerConfig(layers=layers, width=width, heads=4, mlp_width=16, scan=True, remat="full")
    model, signal = Decoder(config, 11), PositionSignal()
    tokens_BL = jnp.zeros((batch, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens_BL, signal)

    def loss(params):
        return model.apply(params, tokens_BL, signal, method="hidden").sum()

    text = jax.jit(jax.grad(with_mesh(make_mesh(2, 1, 1, 4), loss))).lower(params).compile().as_text()
    states = {size for size in (4, 16, 18) if f"f32[{layers},{batch // 2},{size},{width}]" in text}
    assert states == {stored}
