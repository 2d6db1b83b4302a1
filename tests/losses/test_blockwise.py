"""Cross-entropy from hidden states: values and gradients of the plain loss, on any mesh, without the logits of all tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import NoPositionConfig
from seqpe_jax.config.encodings import ModelDims
from seqpe_jax.distributed.sharding import abstract_state_with_shardings, make_mesh
from seqpe_jax.inference.compiled import with_mesh
from seqpe_jax.losses import blockwise
from seqpe_jax.losses.task import Z_TERM, NetworkCall, NextTokenLoss
from seqpe_jax.models.decoder import Decoder
from seqpe_jax.models.transformer import TransformerConfig
from seqpe_jax.profiling.collectives import collectives
from seqpe_jax.profiling.hlo import HloModule
from tests.jaxprs import has_array_of_size

BATCH, LENGTH, WIDTH, VOCABULARY = 4, 10, 8, 37  # no size divides over all meshes, nor into blocks
SIGNAL = NoPositionConfig().make_module(ModelDims(1, WIDTH, 2, (LENGTH,)))
MESHES = {
    "one device": None,
    "all axes": (1, 2, 2, 2),
    "fsdp": (2, 4, 1, 1),
}


@functools.cache
def example(tied: bool = True, **fields):
    """(network, variables, signal, batch) of one layer; fields: of the network."""
    positions_PLA = jnp.arange(LENGTH, dtype=jnp.int32)[None, :, None]
    signal = SIGNAL.apply(
        SIGNAL.init(jax.random.PRNGKey(0), positions_PLA, shape=(LENGTH,)), positions_PLA, shape=(LENGTH,)
    )
    network = Decoder(TransformerConfig(layers=1, width=WIDTH, heads=4, init_std=0.5, **fields), VOCABULARY, tied)
    draw = np.random.default_rng(1)
    tokens = jnp.asarray(draw.integers(0, VOCABULARY, (BATCH, LENGTH + 1)), jnp.int32)
    batch = {"tokens": tokens, "weights": jnp.asarray(draw.integers(0, 3, (BATCH, LENGTH)), jnp.float32)}
    variables = jax.jit(network.init)(jax.random.PRNGKey(1), tokens[:, :-1], signal)
    return network, variables, signal, batch


def loss_and_gradients(tied: bool = True, weighted: bool = True, mesh=None, z_loss=0.0, **fields):
    """The jitted training loss of parameters and its metrics, with their gradients."""
    network, _, signal, batch = example(tied, **fields)
    batch = batch if weighted else {"tokens": batch["tokens"]}

    def loss(params):
        value, metrics = NextTokenLoss(z_loss=z_loss).loss(
            NetworkCall(network, {"params": params}, signal), batch, None
        )
        return value + z_loss * metrics.get(Z_TERM, 0.0), (value, metrics)

    return jax.jit(jax.value_and_grad(loss if mesh is None else with_mesh(mesh, loss), has_aux=True))


def count_calls(name, monkeypatch):
    """A list that grows with each call of a function of `blockwise`."""
    calls, function = [], getattr(blockwise, name)
    monkeypatch.setattr(blockwise, name, lambda *arguments: (calls.append(1), function(*arguments))[1])
    return calls


def close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name, tied, weighted", [(name, name != "fsdp", name != "one device") for name in MESHES])
def test_blocks_have_the_loss_and_gradients_of_all_logits(name, tied, weighted, monkeypatch):
    has_z_loss = name != "one device"
    fields = {"logit_multiplier": 3.0, "logit_cap": 2.0} if name == "fsdp" else {}  # about the size of the logits
    params = example(tied, **fields)[1]["params"]
    fields |= {"z_loss": 0.3} if has_z_loss else {}
    expected = loss_and_gradients(tied, weighted, **fields)(params)
    assert bool(expected[0][1][1]) == has_z_loss
    mesh = MESHES[name] and make_mesh(*MESHES[name])
    if mesh is not None:
        shapes = abstract_state_with_shardings(mesh, {"params": {"model": params}})[0]["params"]["model"]
        params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, shapes))
    monkeypatch.setattr(blockwise, "LOGITS_PER_BLOCK", 100)
    calls = count_calls("weighted_loss", monkeypatch)
    compiled = loss_and_gradients(tied, weighted, mesh, **fields).lower(params).compile()
    close(compiled(params), expected)
    assert calls
    if mesh is not None:  # gradients of states are added up while they travel: a TPU would wait for a sum of all
        sent = collectives(HloModule(compiled.as_text())).by_kind
        assert "reduce-scatter" not in sent and sent["collective-permute"]["count"] > 0


@pytest.mark.slow
def test_evaluation_has_the_same_losses(monkeypatch):
    network, variables, signal, batch = example()
    expected = NextTokenLoss().eval_step(network, variables, signal, batch)["loss"]
    monkeypatch.setattr(blockwise, "LOGITS_PER_BLOCK", 100)
    calls = count_calls("token_losses", monkeypatch)
    step = jax.jit(with_mesh(make_mesh(1, 2, 2, 2), NextTokenLoss().eval_step), static_argnums=0)
    np.testing.assert_allclose(step(network, variables, signal, batch)["loss"], expected, rtol=1e-5, atol=1e-6)
    assert calls


def test_the_logits_of_all_tokens_are_never_in_memory(monkeypatch):
    hidden_BLD, table_VD = jnp.zeros((BATCH, LENGTH, WIDTH)), jnp.zeros((VOCABULARY, WIDTH))
    tokens_BL, size = jnp.zeros((BATCH, LENGTH), jnp.int32), BATCH * LENGTH * VOCABULARY

    def holds_all():  # one function for each trace, which JAX keeps
        gradients = jax.grad(lambda *of: blockwise.weighted_loss(*of, tokens_BL, jnp.ones(tokens_BL.shape))[0], (0, 1))
        return has_array_of_size(jax.make_jaxpr(gradients)(hidden_BLD, table_VD).jaxpr, size // 2)

    assert holds_all()
    monkeypatch.setattr(blockwise, "LOGITS_PER_BLOCK", size // 3)
    assert not holds_all()


@pytest.mark.slow
def test_logits_in_bfloat16_have_float32_losses(monkeypatch):
    hidden_BLD = jax.random.normal(jax.random.PRNGKey(2), (2, 6, WIDTH), jnp.bfloat16)
    table_VD = jax.random.normal(jax.random.PRNGKey(3), (VOCABULARY, WIDTH))
    targets_BL = jnp.arange(12).reshape(2, 6)
    weights_BL = jnp.full((2, 6), 1 / 12)
    monkeypatch.setattr(blockwise, "LOGITS_PER_BLOCK", 100)
    gradient = jax.value_and_grad(blockwise.weighted_loss, (0, 1), has_aux=True)
    (value, _), gradients = gradient(hidden_BLD, table_VD, targets_BL, weights_BL)
    logits_BLV = jnp.einsum(
        "bld,vd->blv", hidden_BLD.astype(jnp.float32), table_VD.astype(jnp.bfloat16).astype(jnp.float32)
    )
    log_probs_BL = jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), targets_BL[..., None], -1)[..., 0]
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, -log_probs_BL.mean(), rtol=1e-6)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
