"""The draws: shapes and rules in one to three dimensions, and the statistics of the reference's samplers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.positions import sampling
from seqpe_jax.positions.permutation import permute

KEY = jax.random.PRNGKey(0)
TEXT = {"max_position": 20000, "axes": 1, "base": 10, "hard_fraction": 0.25, "window": 256}
IMAGE = {"max_position": 100, "axes": 2, "base": 10, "hard_fraction": 0.2, "window": 14}
MIXTURES = {
    "hard negatives": (0.0, 1.0, 0.0), "distributional": (0.0, 0.0, 1.0), "as shipped mix .4/.6": (0.0, 0.4, 0.6),
    "intended mix .5/.3/.2": (0.5, 0.3, 0.2), "random only": (1.0, 0.0, 0.0),
}  # fmt: skip


@functools.cache
def many(settings, mixture, candidates, draws=16000, **options):
    make = functools.partial(
        sampling.contrastive, batch=draws, candidates=candidates, mixture=mixture, **dict(settings), **dict(options)
    )
    return jax.device_get(jax.jit(make)(KEY, jnp.int32(0)))


def draw(settings, mixture, candidates, **options):
    return many(tuple(settings.items()), mixture, candidates, **options)


def distances(drawn):
    apart = drawn.candidates_BCA - drawn.pivots_BA[:, None]
    return np.sqrt(np.square(apart.astype(np.float64)).sum(-1))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 1000, 4097])
def test_permute_is_a_bijection(n):
    orders = [np.asarray(permute(jax.random.PRNGKey(seed), jnp.arange(n), n)) for seed in range(2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert n < 10 or (orders[0] != orders[1]).any()


def test_permute_is_uniform():
    keys = jax.random.split(KEY, 20000)
    first = np.asarray(jax.vmap(lambda key: permute(key, jnp.arange(2), 10))(keys))
    counts = np.zeros((10, 10))
    np.add.at(counts, (first[:, 0], first[:, 1]), 1)
    assert (np.diag(counts) == 0).all()
    expected = 20000 / 90
    off = counts[~np.eye(10, dtype=bool)]
    assert ((off - expected) ** 2 / expected).sum() < 89 + 5 * np.sqrt(2 * 89)


@pytest.mark.parametrize("axes,limit,candidates", [(1, 400, 1), (1, 400, 3), (1, 400, 32), (2, 30, 4), (3, 12, 8)])
def test_candidates_are_distinct_in_range_and_labelled(axes, limit, candidates):
    settings = {"max_position": limit, "axes": axes, "base": 10, "hard_fraction": 0.25, "window": 8}
    pivots, found, labels = draw(settings, (0.2, 0.4, 0.4), candidates, draws=300)
    assert found.shape == (300, candidates, axes) and found.min() >= 0 and found.max() < limit
    flat = np.ravel_multi_index(np.moveaxis(found, -1, 0), (limit,) * axes)
    own = np.ravel_multi_index(np.moveaxis(pivots, -1, 0), (limit,) * axes)
    assert all(len(set(row)) == candidates and pivot not in row for row, pivot in zip(flat, own, strict=True))
    apart = np.square(found - pivots[:, None]).sum(-1)
    np.testing.assert_array_equal(labels, apart.argmin(axis=1))


@pytest.mark.parametrize("base", [2, 36])
def test_hard_candidates_in_other_bases(base):
    settings = {"max_position": 300, "axes": 2, "base": base, "hard_fraction": 0.5, "window": 8}
    _, found, _ = draw(settings, (0.0, 1.0, 0.0), 8, draws=200)
    assert found.min() >= 0 and found.max() < 300


def test_every_position_is_a_pivot_once_per_epoch():
    make = jax.jit(functools.partial(
        sampling.contrastive, batch=25, candidates=4, mixture=(1.0, 0.0, 0.0), max_position=10, axes=2, base=10,
        hard_fraction=0.25, window=4,
    ))  # fmt: skip
    pivots = np.concatenate([make(KEY, jnp.int32(step)).pivots_BA for step in range(8)])
    flat = pivots[:, 0] * 10 + pivots[:, 1]
    for epoch in (flat[:100], flat[100:]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(100))
    assert (flat[:100] != flat[100:]).any()


@pytest.mark.parametrize("mixture", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_past_only_candidates_lie_before_the_pivot(mixture):
    pivots, found, _ = draw(TEXT | {"max_position": 500}, mixture, 16, draws=400, past_only=True, around_pivot=True)
    assert (found[..., 0] < pivots).all() and pivots.min() > 16


def test_a_box_around_the_pivot():
    pivots, found, _ = draw(TEXT | {"window": 100}, (0.0, 0.0, 1.0), 16, draws=400, around_pivot=True)
    assert np.abs(found[..., 0] - pivots).max() <= 100
    assert np.abs(found[200:, :, 0] - pivots[200:]).mean() < 40


@pytest.mark.parametrize("name,candidates,settings", [
    (f"text_1d_n{n}_{mode}", n, TEXT) for n in (16, 32)
    for mode in ("hard negatives", "distributional", "as shipped mix .4/.6")
] + [("image_2d_n32_random only", 32, IMAGE), ("image_2d_n32_distributional", 32, IMAGE)])  # fmt: skip
def test_candidates_match_the_reference(goldens, name, candidates, settings):
    expected = json.loads((goldens / "sampler_stats.json").read_text())["contrastive"][name]
    mode = name.split("_", 3)[3]
    drawn = draw(settings, MIXTURES[mode], candidates)
    nearest = distances(drawn).min(axis=1)
    count = len(nearest)
    for limit, share in expected["P_min_dist_le"].items():
        error = np.sqrt(share * (1 - share) * (1 / count + 1 / expected["draws"])) + 1e-3
        assert abs((nearest <= float(limit)).mean() - share) < 4.5 * error, (name, limit)
    quantiles = np.quantile(nearest, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, [expected["min_dist"][f"q{q}"] for q in (25, 50, 75)], rtol=0.06, atol=1)
    np.testing.assert_allclose(np.quantile(drawn.labels_B, [0.25, 0.5, 0.75]), expected["label_index_quartiles"], atol=1)
    for first, share in expected["label_in_first_n"].items():
        assert abs((drawn.labels_B < int(first)).mean() - share) < 0.015, (name, first)


def test_hard_candidates_survive_as_often_as_the_references(goldens):
    expected = json.loads((goldens / "sampler_stats.json").read_text())["contrastive"]["text_1d_n32_hard negatives"]
    keys = jax.random.split(KEY, 4000)
    pivots = permute(KEY, jnp.arange(4000), 20000)[:, None]
    uniform = jax.vmap(lambda key: permute(key, jnp.arange(33), 20000))(keys)[..., None]
    made = np.asarray(sampling._hard(
        KEY, pivots, uniform, candidates=32, max_position=20000, base=10, hard_fraction=0.25, past_only=False,
    ))  # fmt: skip
    kept = made >= 0
    assert kept.shape[1] == expected["hard"]["requested"]
    assert kept.sum(axis=1).mean() == pytest.approx(expected["hard"]["survive_distance_filter_mean"], abs=0.1)
    unique = np.mean([len(set(row[row >= 0])) for row in made])
    assert unique == pytest.approx(expected["hard"]["unique_mean"], abs=0.12)
    apart = np.abs(made - np.asarray(pivots))[kept]
    assert np.quantile(apart, 0.5) == pytest.approx(expected["hard"]["surviving_distance"]["q50"], rel=0.08)


@pytest.mark.parametrize("shape", [(6,), (4, 3), (3, 2, 4)])
def test_distillation_pairs_offsets_with_a_far_window(shape):
    make = jax.jit(functools.partial(sampling.distillation, batch=500, offsets=5, shape=shape, max_position=20))
    indices, positions = jax.device_get(make(KEY))
    assert all(len(set(row)) == 5 for row in indices)
    origin = np.stack(np.unravel_index(indices, shape), axis=-1)
    starts = positions - origin
    assert (starts == starts[:, :1]).all() and positions.min() >= 0 and positions.max() < 20
    starts = starts[:, 0]
    if len(shape) == 1:
        assert starts.min() == 1 and starts.max() == 14
    else:
        assert (starts >= np.array(shape)).any(axis=1).all()
        assert (starts.max(axis=0) == 20 - np.array(shape)).all()


@pytest.mark.parametrize("shape", [(6,), (4, 3), (3, 2, 4)])
def test_shift_reaches_every_start_and_a_subset_only_its_own(shape):
    starts = np.asarray(sampling.shift(KEY, sets=4000, shape=shape, max_position=8))
    assert starts.min() == 0 and (starts.max(axis=0) == 8 - np.array(shape)).all()
    room = np.prod(8 - np.array(shape) + 1)
    assert len({tuple(row) for row in starts}) == room
    subset = [
        {tuple(map(int, row)) for row in sampling.shift(
            jax.random.PRNGKey(n), sets=200, shape=shape, max_position=8, starts=2, subset_key=KEY)}
        for n in range(2)
    ]  # fmt: skip
    assert subset[0] == subset[1] and len(subset[0]) == 2


@pytest.mark.parametrize("shape,chunks", [((10,), 2), ((10,), 4), ((4, 6), 2)])
def test_skip_rises_strictly_and_stays_in_range(shape, chunks):
    found = np.asarray(sampling.skip(KEY, sets=300, shape=shape, max_position=50, chunks=chunks, range=40))
    grids = found.reshape(300, *shape, len(shape))
    for axis in range(len(shape)):
        side = np.moveaxis(grids[..., axis], axis + 1, 1).reshape(300, shape[axis], -1)
        assert (side == side[:, :, :1]).all()
        rise = np.diff(side[:, :, 0], axis=1)
        assert (rise > 0).all() and ((rise > 1).sum(axis=1) <= chunks - 1).all() and (rise > 1).any()
    assert found.max() < 40 and found.max() > 30 and (found[:, 0] == 0).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="encoding.max_position=8"):
        sampling.shift(KEY, sets=1, shape=(9,), max_position=8)
    with pytest.raises(InputError, match="candidates=30"):
        many(tuple((TEXT | {"max_position": 30}).items()), (1.0, 0.0, 0.0), 30, draws=2)
    with pytest.raises(InputError, match="shifted window"):
        sampling.distillation(KEY, batch=2, offsets=2, shape=(16,), max_position=19)
    with pytest.raises(InputError, match="positions"):
        many(tuple((TEXT | {"axes": 3}).items()), (1.0, 0.0, 0.0), 30, draws=2)
