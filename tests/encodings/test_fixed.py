"""Encodings without a transformer: angles at far positions, slopes, stretched tables, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.fixed import ALiBi, Rotary, Sinusoidal, alibi_slopes, unit_circle
from seqpe_jax.encodings.learned import Learned
from seqpe_jax.encodings.registry import ENCODINGS
from seqpe_jax.errors import InputError


def test_angles_are_exact_far_out():
    positions = np.array([0, 1, 63, 64, 9999, 1_000_003, 64**4 - 1])
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    cos, sin = jax.jit(lambda at: unit_circle(at, frequencies))(jnp.asarray(positions, jnp.int32))
    angles = positions[:, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def test_alibi_falls_by_slope_times_distance():
    positions_PLA = jnp.array([[[2], [5], [9]]], jnp.int32)
    query, key = ALiBi(width_model=16, heads_model=4).apply({}, positions_PLA, shape=(3,)).features
    logits = np.einsum("plhf,pshf->phls", query, key)[0]
    for head, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256]):
        np.testing.assert_allclose(logits[head, 2], [-7 * slope, -4 * slope, 0], atol=1e-6)
    scaled = ALiBi(width_model=16, heads_model=4, reference_scaling=True).apply({}, positions_PLA, shape=(3,)).features
    np.testing.assert_allclose(np.einsum("plhf,pshf->phls", *scaled)[0], logits / 2, atol=1e-6)


def test_slopes_beside_powers_of_two():
    np.testing.assert_allclose(alibi_slopes(3), [2**-4, 2**-8, 2**-2])
    assert len(set(alibi_slopes(12))) == 12


def test_sinusoidal_columns_and_amplitude():
    signal = Sinusoidal(width_model=5, amplitude=0.5).apply({}, jnp.array([[[3]]], jnp.int32), shape=(1,))
    angles = 3 * 10000.0 ** (-np.array([0, 0, 2, 2, 4]) / 5)
    waves = [np.sin, np.cos, np.sin, np.cos, np.sin]
    expected = [0.5 * wave(angle) for wave, angle in zip(waves, angles, strict=True)]
    np.testing.assert_allclose(signal.added[0, 0], expected, atol=1e-6)


def test_a_longer_window_stretches_the_table():
    table, length = np.array([[0.0], [1.0], [3.0]]), 8
    positions_PLA = jnp.arange(length, dtype=jnp.int32)[None, :, None]
    encoding, variables = Learned(width_model=1, table_shape=(3,)), {"params": {"table": jnp.asarray(table)}}
    found = encoding.apply(variables, positions_PLA, shape=(length,)).added[0, :, 0]
    at = np.clip((np.arange(length) + 0.5) * 3 / length - 0.5, 0, 2)  # half-pixel centres
    np.testing.assert_allclose(found, np.interp(at, np.arange(3), table[:, 0]), atol=1e-6)
    short = encoding.apply(variables, positions_PLA[:, :2], shape=(2,)).added[0, :, 0]
    np.testing.assert_allclose(short, table[:2, 0])


@pytest.mark.parametrize("kind", ["learned", "alibi"])
def test_two_coordinates_are_refused(kind):
    offered = {"width_model": 8, "heads_model": 2, "table_shape": (4,)}
    fields = {name: value for name, value in offered.items() if name in ENCODINGS[kind].__dataclass_fields__}
    with pytest.raises(InputError, match=f"encoding.kind='{kind}'"):
        ENCODINGS[kind](**fields).init(jax.random.PRNGKey(0), jnp.zeros((1, 4, 2), jnp.int32), shape=(2, 2))


def test_rotary_refuses_an_odd_head_width():
    with pytest.raises(InputError, match=r"model.width / model.heads = 3 must be even"):
        Rotary(width_model=6, heads_model=2).init(jax.random.PRNGKey(0), jnp.zeros((1, 4, 1), jnp.int32), shape=(4,))
