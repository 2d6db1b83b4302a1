"""Prefix trie: nodes, ancestors, and upper bounds of its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.positions import sampling
from seqpe_jax.positions.digits import to_digits
from seqpe_jax.positions.grids import PositionGrid
from seqpe_jax.positions.prefix_trie import PositionStructure, build_trie, max_nodes_per_level


def test_ancestors_spell_every_string():
    digits_RN = np.random.default_rng(0).integers(0, 3, (40, 4)).astype(np.int32)
    sizes = [len(np.unique(digits_RN[:, : level + 1], axis=0)) for level in range(4)]
    for more in (0, 3):  # more nodes than needed
        found = jax.jit(lambda digits_RN, more=more: build_trie(digits_RN, 3, [size + more for size in sizes]))(
            digits_RN
        )
        last = sum(sizes) + 4 * more - (sizes[-1] + more)
        ancestors_RN = np.asarray(found.ancestors_TN)[last + np.asarray(found.leaf_R)]
        np.testing.assert_array_equal(np.asarray(found.digits_T)[ancestors_RN], digits_RN)
        assert len(np.unique(ancestors_RN)) == sum(sizes)  # each prefix has one node


def prefixes(positions_RA, base, digits):
    strings = np.asarray(to_digits(jnp.asarray(positions_RA, jnp.int32), base=base, digits=digits))
    return [len(np.unique(strings[:, : level + 1], axis=0)) for level in range(strings.shape[1])]


@pytest.mark.parametrize("base,digits", [(10, 3), (2, 8), (7, 4)])
@pytest.mark.parametrize("shape", [(29,), (1,), (6, 9), (2, 5, 3)])
def test_bounds_of_windows_and_their_chunks(shape, base, digits):
    axes, limit = len(shape), 200
    draw = np.random.default_rng(0)
    bounds = {
        pieces: max_nodes_per_level(
            [PositionStructure(1, shape, pieces)], axes=axes, base=base, digits=digits, max_position=limit
        )
        for pieces in (1, 3)
    }
    most = np.zeros(axes * digits)
    for _ in range(60):
        start = draw.integers(0, limit - max(shape), axes)
        found = prefixes((start + np.asarray(PositionGrid().positions(shape))).reshape(-1, axes), base, digits)
        assert (np.array(found) <= bounds[1]).all()
        most = np.maximum(most, found)
    assert most[-1] == bounds[1][-1] == np.prod(shape)
    if min(shape) >= 3:
        skip = jax.jit(
            lambda key: sampling.pose_skip(
                key, num_sets=40, shape=shape, max_position=limit, num_chunks=3, position_range=limit
            )
        )
        for cut in np.asarray(skip(jax.random.PRNGKey(0))):
            assert (np.array(prefixes(cut, base, digits)) <= bounds[3]).all()


@pytest.mark.parametrize("shape", [(29,), (6, 9)])
def test_bounds_of_strided_and_jittered_windows(shape):
    axes, limit, unit, reach = len(shape), 400, 10, 4
    spans = tuple((side - 1) * unit + 2 * reach for side in shape)
    strided = max_nodes_per_level(
        [PositionStructure(1, shape, spans=spans)], axes=axes, base=10, digits=3, max_position=limit
    )
    jittered = max_nodes_per_level(
        [PositionStructure(1, shape, spans=spans, independent_axes=True)],
        axes=axes,
        base=10,
        digits=3,
        max_position=limit,
    )
    draw, most = np.random.default_rng(0), np.zeros(axes * 3)
    for _ in range(40):
        start = draw.integers(reach, limit - max(spans), axes)
        window = unit * np.asarray(PositionGrid().positions(shape)) + start
        assert (np.array(prefixes(window, 10, 3)) <= strided).all()
        found = prefixes(window + draw.integers(-reach, reach + 1, window.shape), 10, 3)
        assert (np.array(found) <= jittered).all()
        most = np.maximum(most, found)
    assert most[-1] == jittered[-1] == np.prod(shape)


def test_bounds_of_several_groups():
    sizes = max_nodes_per_level(
        [PositionStructure(1, (30,)), PositionStructure(500), PositionStructure(4, (30,), max_rows=5)],
        axes=1,
        base=10,
        digits=3,
        max_position=200,
    )
    assert sizes == (2, 20, 200)
    assert max_nodes_per_level(
        [PositionStructure(1, (30,)), PositionStructure(4, (30,), max_rows=5)],
        axes=1,
        base=10,
        digits=3,
        max_position=1000,
    ) == (
        10,
        4 + 4 * 4,
        30 + 4 * 5,
    )
