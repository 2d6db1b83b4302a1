"""Encodings made of parts: what a model sees of them, and what their parameters are called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.composed import Composed
from seqpe_jax.training.trainer import Trainer
from tests.tiny import random_params, tiny_config

ALONE = {"encoding__qk": "multi", "encoding__feature_width": 3, "encoding__position_heads": 1, "model__layers": 2}
BESIDE = {"encoding__rotary_pairs": 4, "encoding__rotary_heads": 1, "encoding__log_scaling": True}


@functools.cache
def run_of(*fields):
    off = {"objective__contrastive__weight": 0.0, "objective__distillation__weight": 0.0}
    return Trainer.of(tiny_config(**off, **ALONE, **dict(fields)), jax.devices()[:1])


def shapes(run):
    return jax.tree.map(lambda leaf: leaf.shape, run.shapes.params)


def test_parts_leave_the_parameters_of_the_first_as_they_are():
    """A checkpoint does not tell whether its encoding stood alone."""
    alone, composed = run_of(), run_of(*BESIDE.items())
    assert isinstance(composed.architecture.encoding, Composed) and not isinstance(alone.architecture.encoding, Composed)
    assert shapes(alone) == shapes(composed)
    params = random_params(alone, 0.3)
    one, other = (run.programs.signal(params, (20,)) for run in (alone, composed))
    for found, expected in zip(other.features, one.features, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert one.rotation is None and other.rotation[0].shape == (1, 20, 2, 4), "of 6 pairs, in 2 heads"
    assert (other.rotation[0][:, :, 1] == 1).all() and (other.rotation[1][:, :, 1] == 0).all()
    assert one.factors is None and other.factors[0].shape == (1, 20, 1, 1)
    assert other.stacked == ("features",)


@pytest.mark.parametrize("kind", ["learned", "rotary_mixed", "alibi", "sinusoidal", "none"])
def test_scaling_leaves_the_parameters_of_a_baseline_as_they_are(kind):
    plain, scaled = (
        Trainer.of(tiny_config(variant=kind, encoding__log_scaling=on), jax.devices()[:1]) for on in (False, True)
    )
    assert shapes(plain) == shapes(scaled)
    params = random_params(plain, 0.3)
    one, other = (run.programs.signal(params, (20,)) for run in (plain, scaled))
    assert other.factors is not None
    jax.tree.map(np.testing.assert_array_equal, one, other.replace(factors=None))


@pytest.mark.parametrize("kind", ["rotary", "rotary_axial", "rotary_mixed", "alibi"])
def test_a_baseline_reaches_the_first_heads_alone(kind):
    fields = {"variant": kind, "model__heads": 4, "encoding__position_heads": 3}
    run = Trainer.of(tiny_config(**fields), jax.devices()[:1])
    signal = run.programs.signal(random_params(run, 0.3), (20,))
    field, neutral = (signal.features, (0, 0)) if kind == "alibi" else (signal.rotation, (1, 0))
    for part, value in zip(field, neutral, strict=True):
        assert part.shape[-2] == 4 and (part[..., 3, :] == value).all() and (part[..., :3, :] != value).any()


def test_scaled_queries_change_what_is_longer_than_in_training_alone():
    scaled, plain = run_of(*BESIDE.items()), run_of(*(BESIDE | {"encoding__log_scaling": False}).items())
    params = random_params(plain, 0.3)
    tokens_BL = jax.random.randint(jax.random.PRNGKey(1), (2, 32), 0, 256)

    @jax.jit
    def logits(signal):
        return plain.architecture.network.apply({"params": params["model"]}, tokens_BL, signal)

    with_scaling, without = (run.programs.signal(params, (32,)) for run in (scaled, plain))
    found = logits(with_scaling)
    seen = np.arange(1, 33)
    factors = np.maximum(1.0, np.log(seen) / np.log(16))[None, :, None, None]
    by_hand = without.replace(factors=(jnp.asarray(factors, jnp.float32), jnp.ones((1, 32, 1, 1))))
    np.testing.assert_allclose(found, logits(by_hand), atol=1e-5)
    difference = np.abs(found - logits(without)).max(axis=(0, 2))
    assert difference[:16].max() < 1e-5 and difference[20:].min() > 1e-4
