"""Numbers keep their types where JAX's defaults are 64 bits wide."""

import jax
import jax.numpy as jnp
import pytest

from seqpe_jax.training.trainer import Trainer
from tests.tiny import random_state, tiny_config, tokens


def test_a_step_and_an_evaluation_stay_in_32_bits():
    settings = tiny_config(
        objective__shift__rate=0.3,
        objective__skip__rate=0.2,
        objective__contrastive__mixture=(0.2, 0.4, 0.4),
        model__attention_dropout=0.1,
    )
    parts = Trainer.of(settings, jax.devices()[:1])
    batch, draw = tokens(settings), jax.jit(parts.train_loss.sample)
    expected = [leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(draw, jax.random.PRNGKey(0), jnp.int32(1)))]
    with jax.enable_x64(True):
        drawn = jax.eval_shape(draw, jax.random.PRNGKey(0), jnp.int32(1))
        assert [leaf.dtype for leaf in jax.tree.leaves(drawn)] == expected
        state = random_state(parts, 0.2)
        after, metrics = jax.eval_shape(parts.jit_train_step(), state, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
        assert metrics["loss"].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["seqpe", "learned", "sinusoidal", "rotary", "rotary_mixed", "alibi", "fire", "pope"]
)
def test_parameters_and_signals_are_float32(variant):
    parts = Trainer.of(tiny_config(variant=variant), jax.devices()[:1])
    with jax.enable_x64(True):
        params = jax.eval_shape(parts.model_spec.init, jax.random.PRNGKey(0))
        positions_PLA = parts.model_spec.position_grid.positions((16,))[None]
        signal = jax.eval_shape(lambda params: parts.model_spec.signal(params, positions_PLA, (16,)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, signal))} == {jnp.dtype("float32")}
