"""Sampling of positions: permutations, random offsets, PoSE skips, distillation windows, in one to three dimensions."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.positions import contrastive_sampling, sampling
from seqpe_jax.positions.sampling import permute

KEY = jax.random.PRNGKey(0)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 1000, 4097])
def test_permute_is_a_bijection(n):
    orders = [np.asarray(permute(jax.random.PRNGKey(seed), jnp.arange(n), n)) for seed in range(2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert n < 10 or (orders[0] != orders[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10, 17])
def test_permute_is_uniform(n):
    keys = jax.random.split(KEY, 20000)
    first = np.asarray(jax.vmap(lambda key: permute(key, jnp.arange(2), n))(keys))
    counts = np.zeros((n, n))
    np.add.at(counts, (first[:, 0], first[:, 1]), 1)
    assert (np.diag(counts) == 0).all()
    pairs = n * (n - 1)
    off = counts[~np.eye(n, dtype=bool)]
    assert ((off - 20000 / pairs) ** 2 / (20000 / pairs)).sum() < pairs - 1 + 5 * np.sqrt(2 * (pairs - 1))


@pytest.mark.slow
def test_sampling_under_vmap_equals_sampling_of_each_key():
    axes = 2
    draws = {
        "contrastive": lambda key: contrastive_sampling.sample_contrastive_positions(
            key,
            3,
            batch=4,
            candidates=4,
            max_position=50,
            axes=axes,
            base=10,
            mixture=(0.2, 0.4, 0.4),
            hard_fraction=0.5,
            window=6,
        ),
        "distillation": lambda key: sampling.distillation_positions(
            key, batch=4, offsets=3, shape=(5,) * axes, max_position=50
        ),
        "shift": lambda key: sampling.random_offsets(
            key, num_sets=4, shape=(5,) * axes, max_position=50, num_start_positions=7, subset_key=KEY
        ),
        "skip": lambda key: sampling.pose_skip(
            key, num_sets=4, shape=(5,) * axes, max_position=50, num_chunks=3, position_range=50
        ),
        "random": lambda key: sampling.random_positions(
            key, num_sets=4, shape=(5,) * axes, max_position=50, position_range=50
        ),
    }
    keys = jax.random.split(KEY, 3)
    every = jax.jit(lambda keys: jax.vmap(lambda key: {name: make(key) for name, make in draws.items()})(keys))(keys)
    alone = jax.jit(lambda key: {name: make(key) for name, make in draws.items()})(keys[1])
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(every))
    jax.tree.map(lambda many, one: np.testing.assert_array_equal(many[1], one), every, alone)


@pytest.mark.parametrize("shape", [(6,), (4, 3), (3, 2, 4)])
def test_distillation_windows_are_out_of_range(shape):
    make = jax.jit(
        functools.partial(sampling.distillation_positions, batch=500, offsets=5, shape=shape, max_position=20)
    )
    indices, positions = jax.device_get(make(KEY))
    assert all(len(set(row)) == 5 for row in indices)
    origin = np.stack(np.unravel_index(indices, shape), axis=-1)
    starts = positions - origin
    assert (starts == starts[:, :1]).all() and positions.min() >= 0 and positions.max() < 20
    starts = starts[:, 0]
    if len(shape) == 1:  # a quarter of the window is 1.5
        assert starts.min() == 1 and starts.max() == 14
    else:
        assert (starts >= np.array(shape)).any(axis=1).all()
        assert (starts.max(axis=0) == 20 - np.array(shape)).all()


@pytest.mark.parametrize("shape,limit", [((4,), 9), ((4, 3), 6), ((5, 2), 6), ((2, 2, 2), 4)])
def test_distillation_windows_start_uniformly_out_of_range(shape, limit):
    make = functools.partial(sampling.distillation_positions, batch=8000, offsets=1, shape=shape, max_position=limit)
    indices, positions = jax.device_get(jax.jit(make)(KEY))
    starts = positions[:, 0] - np.stack(np.unravel_index(indices[:, 0], shape), axis=-1)
    every = np.stack(np.meshgrid(*(np.arange(limit - side + 1) for side in shape), indexing="ij"), -1)
    every = every.reshape(-1, len(shape))
    allowed = every[(every >= (1 if len(shape) == 1 else np.array(shape))).any(axis=1)]
    found, counts = np.unique(starts, axis=0, return_counts=True)
    np.testing.assert_array_equal(found, allowed)
    assert np.abs(counts - 8000 / len(allowed)).max() < 5 * np.sqrt(8000 / len(allowed))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6,), (4, 3), (3, 2, 4)])
def test_random_offsets_reach_every_start_and_a_subset_only_its_own(shape):
    starts = np.asarray(sampling.random_offsets(KEY, num_sets=4000, shape=shape, max_position=8))
    assert starts.min() == 0 and (starts.max(axis=0) == 8 - np.array(shape)).all()
    room = np.prod(8 - np.array(shape) + 1)
    assert len({tuple(row) for row in starts}) == room
    subset = [
        {
            tuple(map(int, row))
            for row in sampling.random_offsets(
                jax.random.PRNGKey(n), num_sets=200, shape=shape, max_position=8, num_start_positions=2, subset_key=KEY
            )
        }
        for n in range(2)
    ]
    assert subset[0] == subset[1] and len(subset[0]) == 2


@pytest.mark.parametrize(
    "shape,limit,base,resolution,grid_start,levels",
    [
        ((64,), 5000, 10, 1, 0, [100, 1000]),
        ((9,), 100, 2, 1, 0, [16, 32, 64]),  # 8 lies in every window of nine
        ((4, 1), 500, 10, 10, 5, [100]),  # tenths, cell centers; one row straddles nothing
    ],
)
def test_windows_across_carries(shape, limit, base, resolution, grid_start, levels):
    """With a share of 1 each window has a multiple of a power above its extent, each power about as often, all in range."""
    draw = functools.partial(
        sampling.random_offsets,
        num_sets=6000,
        shape=shape,
        max_position=limit - grid_start,
        position_resolution=resolution,
        base=base,
        grid_start_A=grid_start,
    )
    first = np.asarray(jax.jit(functools.partial(draw, carry_share=1.0))(KEY)) + grid_start
    last = first + (np.array(shape) - 1) * resolution
    assert first.min() >= grid_start and last.max() < limit
    over = [(last[:, 0] // level > first[:, 0] // level).mean() for level in levels]
    chance = np.asarray(jax.jit(draw)(KEY))[:, 0] + grid_start
    extent = (shape[0] - 1) * resolution
    by_chance = [((chance + extent) // level > chance // level).mean() for level in levels]
    assert over[0] == 1.0 and by_chance[0] < 1.0
    for number, (share, least) in enumerate(zip(over[1:], by_chance[1:], strict=True), 1):
        assert share > (len(levels) - number) / len(levels) - 0.03 > least
    half = np.asarray(jax.jit(functools.partial(draw, carry_share=0.5))(KEY))[:, 0] + grid_start
    share = ((half + extent) // levels[0] > half // levels[0]).mean()
    assert abs(share - (1 + by_chance[0]) / 2) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("shape,chunks", [((10,), 2), ((10,), 4), ((4, 6), 2)])
def test_pose_skip_increases_strictly_within_its_range(shape, chunks):
    found = np.asarray(
        sampling.pose_skip(KEY, num_sets=300, shape=shape, max_position=50, num_chunks=chunks, position_range=40)
    )
    grids = found.reshape(300, *shape, len(shape))
    for axis in range(len(shape)):
        side = np.moveaxis(grids[..., axis], axis + 1, 1).reshape(300, shape[axis], -1)
        assert (side == side[:, :, :1]).all()
        rise = np.diff(side[:, :, 0], axis=1)
        assert (rise > 0).all() and ((rise > 1).sum(axis=1) <= chunks - 1).all() and (rise > 1).any()
    assert found.max() < 40 and found.max() > 30 and (found[:, 0] == 0).all()


def test_random_positions_are_all_subsets_of_their_range():
    """Each of the 20 subsets of 3 of 6 multiples of 10 about as often, in rising order; the last and the first move too."""
    draw = jax.jit(
        lambda key: sampling.random_positions(
            key, num_sets=4000, shape=(3,), max_position=90, position_range=60, position_resolution=10
        )
    )
    found = np.asarray(draw(KEY))[..., 0]
    subsets, counts = np.unique(found, axis=0, return_counts=True)
    assert subsets.tolist() == [list(one) for one in itertools.combinations(range(0, 60, 10), 3)]
    assert 140 < counts.min() and counts.max() < 260


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="encoding.max_position=8"):
        sampling.random_offsets(KEY, num_sets=1, shape=(9,), max_position=8)
    with pytest.raises(InputError, match="out of range"):
        sampling.distillation_positions(KEY, batch=2, offsets=2, shape=(16,), max_position=19)
    with pytest.raises(InputError, match="skip.range=60"):
        sampling.pose_skip(KEY, num_sets=1, shape=(9,), max_position=50, num_chunks=2, position_range=60)
    with pytest.raises(InputError, match="skip.range=60"):
        sampling.random_positions(KEY, num_sets=1, shape=(9,), max_position=50, position_range=60)
    with pytest.raises(InputError, match="offsets=17"):
        sampling.distillation_positions(KEY, batch=2, offsets=17, shape=(16,), max_position=50)
