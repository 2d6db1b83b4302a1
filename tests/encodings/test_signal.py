"""Signals that some heads, some pairs or some layers alone get, and signals that are put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.models.attention import attend, rotate_pairs

BATCH, LENGTH, HEADS, WIDTH, LAYERS = 2, 5, 4, 6, 3
KEY = jax.random.PRNGKey(0)


def random(name, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, name), shape)


QKV = tuple(random(side, BATCH, LENGTH, HEADS, WIDTH) for side in range(3))


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_the_first_pairs_turn_and_no_other_column(pairs):
    array, angles = np.asarray(QKV[0]), np.asarray(random(4, 1, LENGTH, HEADS, pairs))
    expected = array.copy()
    for sample, token_index, head, pair in np.ndindex(BATCH, LENGTH, HEADS, pairs):
        cos, sin = (function(angles[0, token_index, head, pair]) for function in (np.cos, np.sin))
        even, odd = array[sample, token_index, head, 2 * pair : 2 * pair + 2]
        expected[sample, token_index, head, 2 * pair : 2 * pair + 2] = even * cos - odd * sin, even * sin + odd * cos
    found = np.asarray(rotate_pairs(QKV[0], np.cos(angles), np.sin(angles)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[..., 2 * pairs :], array[..., 2 * pairs :])


def field(name, held, per_layer_fields):
    """A signal with one field, of so many heads."""
    lead = (LAYERS,) if per_layer_fields else ()
    width = {"rotation": 2, "position_query_key": 3}.get(name, WIDTH)
    pair = tuple(random(10 + side, *lead, 1, LENGTH, held, width) for side in (0, 1))
    if name == "rotation":
        pair = jnp.cos(pair[0]), jnp.sin(pair[0])
    return PositionSignal(**{name: pair}, per_layer_fields=(name,) if per_layer_fields else ())


@pytest.mark.slow
@pytest.mark.parametrize("held, per_layer_fields", [(1, True), (2, False), (HEADS, False)])
@pytest.mark.parametrize("name", ["position_query_key", "multiplicative", "additive", "rotation"])
def test_heads_without_a_position_see_none(name, held, per_layer_fields):
    full = field(name, held, per_layer_fields)
    part = full.for_heads(2, HEADS)
    assert part.per_layer_fields == full.per_layer_fields
    if held == 2:  # what the other heads would get was never computed
        full = field(name, held, per_layer_fields).replace(
            **{name: tuple(jnp.concatenate([side, side], axis=-2) for side in getattr(full, name))}
        )
    full, part = (signal.at_layer(1) for signal in (full, part))
    found, with_all, with_none = (attend(*QKV, signal) for signal in (part, full, PositionSignal()))
    assert np.abs(with_all - with_none).max(axis=(0, 1, 3)).min() > 1e-2
    np.testing.assert_allclose(found[:, :, :2], with_all[:, :, :2], atol=1e-6)
    np.testing.assert_allclose(found[:, :, 2:], with_none[:, :, 2:], atol=1e-6)


def test_signals_of_all_heads_cannot_be_limited_to_some():
    for signal in (PositionSignal(input_embedding=jnp.ones((1, 2, 3))), PositionSignal(bias=jnp.ones((1, 2, 2)))):
        assert signal.for_heads(2, 2) is signal
        with pytest.raises(ValueError, match="reaches all heads"):
            signal.for_heads(1, 2)


def test_signals_are_joined_field_by_field():
    joined = (
        field("position_query_key", 1, True)
        .joined(field("rotation", 1, False))
        .joined(field("multiplicative", 1, True))
    )
    assert set(joined.per_layer_fields) == {"position_query_key", "multiplicative"}
    shared, own = joined.split_by_layer()
    assert shared.rotation is not None and (shared.position_query_key, shared.multiplicative, own.rotation) == (
        None,
        None,
        None,
    )
    layer = joined.at_layer(2)
    assert layer.per_layer_fields == ()
    np.testing.assert_array_equal(layer.position_query_key[1], joined.position_query_key[1][2])
    np.testing.assert_array_equal(layer.rotation[0], joined.rotation[0])
    with pytest.raises(ValueError, match="both fill 'position_query_key'"):
        joined.joined(field("position_query_key", 1, False))
