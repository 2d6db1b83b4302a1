"""The draws: shapes and rules in one to three dimensions, and the statistics of the reference's samplers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.positions import contrastive_sampling, sampling
from seqpe_jax.positions.sampling import permute

KEY = jax.random.PRNGKey(0)
TEXT = {"max_position": 20000, "axes": 1, "base": 10, "hard_fraction": 0.25, "window": 256}
IMAGE = {"max_position": 100, "axes": 2, "base": 10, "hard_fraction": 0.2, "window": 14}
MIXTURES = {
    "hard negatives": (0.0, 1.0, 0.0),
    "distributional": (0.0, 0.0, 1.0),
    "as shipped mix .4/.6": (0.0, 0.4, 0.6),
    "intended mix .5/.3/.2": (0.5, 0.3, 0.2),
    "random only": (1.0, 0.0, 0.0),
}


@functools.cache
def many(settings, mixture, candidates, draws=8000, **options):
    make = functools.partial(
        contrastive_sampling.contrastive_positions,
        batch=draws,
        candidates=candidates,
        mixture=mixture,
        **dict(settings),
        **dict(options),
    )
    return jax.device_get(jax.jit(make)(KEY, jnp.int32(0)))


def draw(settings, mixture, candidates, **options):
    return many(tuple(settings.items()), mixture, candidates, **options)


def distances(drawn):
    apart = drawn.candidates_BCA - drawn.anchors_BA[:, None]
    return np.sqrt(np.square(apart.astype(np.float64)).sum(-1))


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 1000, 4097])
def test_permute_is_a_bijection(n):
    orders = [np.asarray(permute(jax.random.PRNGKey(seed), jnp.arange(n), n)) for seed in range(2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    assert n < 10 or (orders[0] != orders[1]).any()


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


@pytest.mark.parametrize(
    "axes,limit,candidates",
    [
        (1, 400, 1),
        (1, 400, 2),
        (1, 33, 32),
        (2, 30, 3),
        (3, 12, 4),
    ],
)
def test_candidates_are_distinct_in_range_and_labelled(axes, limit, candidates):
    settings = {"max_position": limit, "axes": axes, "base": 10, "hard_fraction": 0.25, "window": 8}
    anchors, found, labels = draw(settings, (0.2, 0.4, 0.4), candidates, draws=300)
    assert found.shape == (300, candidates, axes) and found.min() >= 0 and found.max() < limit
    flat = np.ravel_multi_index(np.moveaxis(found, -1, 0), (limit,) * axes)
    own = np.ravel_multi_index(np.moveaxis(anchors, -1, 0), (limit,) * axes)
    assert all(len(set(row)) == candidates and anchor not in row for row, anchor in zip(flat, own, strict=True))
    apart = np.square(found - anchors[:, None]).sum(-1)
    np.testing.assert_array_equal(labels, apart.argmin(axis=1))


def test_one_hard_candidate_is_farther_than_a_uniform_one():
    settings = {"max_position": 400, "axes": 1, "base": 10, "hard_fraction": 1.0, "window": 8}
    anchors, found, _ = draw(settings, (0.0, 1.0, 0.0), 1, draws=2000)
    uniform = draw(settings, (1.0, 0.0, 0.0), 1, draws=2000)
    assert np.abs(found[:, 0] - anchors).mean() > 1.1 * np.abs(uniform.candidates_BCA[:, 0] - uniform.anchors_BA).mean()


def test_distances_are_exact_on_the_largest_grid():
    far = jnp.array([[32767, 32767], [32767, 32766], [32766, 32767]])
    apart = np.asarray(contrastive_sampling._distance(far, jnp.zeros(2, jnp.int32)))
    np.testing.assert_array_equal(apart, [2 * 32767**2, 32767**2 + 32766**2, 32767**2 + 32766**2])


@pytest.mark.slow
def test_draws_under_vmap_are_those_of_each_key():
    axes = 2
    draws = {
        "contrastive": lambda key: contrastive_sampling.contrastive_positions(
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
    }
    keys = jax.random.split(KEY, 3)
    every = jax.jit(lambda keys: jax.vmap(lambda key: {name: make(key) for name, make in draws.items()})(keys))(keys)
    alone = jax.jit(lambda key: {name: make(key) for name, make in draws.items()})(keys[1])
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(every))
    jax.tree.map(lambda many, one: np.testing.assert_array_equal(many[1], one), every, alone)


def test_each_edit_makes_every_result_and_no_other():
    text, count = "120", 5000
    wanted = [
        {text[:at] + digit + text[at:] for at in range(4) for digit in "0123456789"},
        {text[:at] + text[at + 1 :] for at in range(3)},
        {"210", "021", "102"},
        {text[:at] + digit + text[at + 1 :] for at in range(3) for digit in "0123456789"} - {text},
    ]
    digits = jnp.repeat(jnp.array([[0], [2], [1], [0]]), count, axis=1)  # units first
    edit = jax.jit(functools.partial(contrastive_sampling.edit_once, base=10))
    for kind, results in enumerate(wanted):
        bits = (
            jax.random.bits(jax.random.PRNGKey(kind), (contrastive_sampling.EDIT_WORDS - 1, count))
            .at[0]
            .set(kind << 30)
        )
        edited, allowed = jax.device_get(edit(bits, digits))
        made = {int(n) for n in (edited[:, allowed] * 10 ** np.arange(4)[:, None]).sum(axis=0)}
        assert made == {int(result) for result in results if result[0] != "0"}, kind


@pytest.mark.parametrize("base", [2, 36])
def test_hard_candidates_in_other_bases(base):
    settings = {"max_position": 300, "axes": 2, "base": base, "hard_fraction": 0.5, "window": 8}
    _, found, _ = draw(settings, (0.0, 1.0, 0.0), 8, draws=200)
    assert found.min() >= 0 and found.max() < 300


def test_every_position_is_a_pivot_once_per_epoch():
    make = jax.jit(
        functools.partial(
            contrastive_sampling.contrastive_positions,
            batch=25,
            candidates=4,
            mixture=(1.0, 0.0, 0.0),
            max_position=10,
            axes=2,
            base=10,
            hard_fraction=0.25,
            window=4,
        )
    )
    anchors = np.concatenate([make(KEY, jnp.int32(step)).anchors_BA for step in range(8)])
    flat = anchors[:, 0] * 10 + anchors[:, 1]
    for epoch in (flat[:100], flat[100:]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(100))
    assert (flat[:100] != flat[100:]).any()


def test_a_batch_may_span_many_epochs():
    settings = {"max_position": 7, "axes": 1, "base": 10, "hard_fraction": 0.25, "window": 4}
    anchors = draw(settings, (1.0, 0.0, 0.0), 2, draws=28).anchors_BA[:, 0].reshape(4, 7)
    np.testing.assert_array_equal(np.sort(anchors, axis=1), np.broadcast_to(np.arange(7), (4, 7)))
    assert len({tuple(row) for row in anchors}) == 4


@pytest.mark.parametrize("mixture", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_causal_only_candidates_lie_before_the_pivot(mixture):
    anchors, found, _ = draw(TEXT | {"max_position": 500}, mixture, 16, draws=400, causal_only=True, around_anchor=True)
    assert (found[..., 0] < anchors).all() and anchors.min() == 16


@pytest.mark.parametrize("around", [False, True])
def test_causal_only_works_where_the_past_is_just_enough(around):
    anchors, found, _ = draw(
        TEXT | {"max_position": 8, "window": 3}, (0.2, 0.4, 0.4), 4, draws=60, causal_only=True, around_anchor=around
    )
    assert set(anchors[:, 0]) == {4, 5, 6, 7} and (found[..., 0] < anchors).all()
    assert all(len(set(row)) == 4 for row in found[..., 0])


def test_a_box_around_the_pivot():
    anchors, found, _ = draw(TEXT | {"window": 100}, (0.0, 0.0, 1.0), 16, draws=400, around_anchor=True)
    assert np.abs(found[..., 0] - anchors).max() <= 100
    assert np.abs(found[200:, :, 0] - anchors[200:]).mean() < 40


@pytest.mark.parametrize(
    "name,candidates,settings",
    [
        ("text_1d_n16_as shipped mix .4/.6", 16, TEXT),
        ("image_2d_n32_distributional", 32, IMAGE),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((f"text_1d_n16_{mode}", 16, TEXT) for mode in ("hard negatives", "distributional")),
                *(
                    (f"text_1d_n32_{mode}", 32, TEXT)
                    for mode in ("hard negatives", "distributional", "as shipped mix .4/.6")
                ),
                *(
                    (f"image_2d_n32_{mode}", 32, IMAGE)
                    for mode in ("random only", "hard negatives", "intended mix .5/.3/.2")
                ),
            )
        ),
    ],
)
def test_candidates_match_the_reference(goldens, name, candidates, settings):
    expected = json.loads((goldens / "sampler_stats.json").read_text())["contrastive"][name]
    mode = name.split("_", 3)[3]
    drawn = draw(settings, MIXTURES[mode], candidates)
    nearest = distances(drawn).min(axis=1)
    count = len(nearest)
    # The reference edits both coordinates' digits as one string, ours one coordinate: with hard candidates alone the
    # label's index moves by .008 (160 000 draws of ours).
    known = 0.01 if name == "image_2d_n32_hard negatives" else 0.0

    def check(values, limit, share, allowed=0.0):
        """The share of values up to a limit is the expected one; where many are equal to it, anything between."""
        error = 4.5 * np.sqrt(share * (1 - share) * (1 / count + 1 / expected["draws"])) + 1e-3 + allowed
        assert (values <= limit).mean() > share - error and (values < limit).mean() < share + error, (name, limit)

    for limit, share in expected["P_min_dist_le"].items():
        check(nearest, float(limit) + 1e-3, share)
    for quantile, index in zip((0.25, 0.5, 0.75), expected["label_index_quartiles"], strict=True):
        distance = expected["min_dist"][f"q{100 * quantile:02.0f}"]
        check(np.round(nearest, 3), distance, quantile)
        check(drawn.labels_B, index, quantile, known)
    for first, share in expected["label_in_first_n"].items():
        check(drawn.labels_B, int(first) - 0.5, share, known)


def test_hard_candidates_survive_as_often_as_the_references(goldens):
    expected = json.loads((goldens / "sampler_stats.json").read_text())["contrastive"]["text_1d_n32_hard negatives"]
    anchors = permute(KEY, jnp.arange(4000), 20000)[:, None]
    uniform = jax.random.randint(KEY, (4000, 25, 1), 0, 20000)
    hard = functools.partial(contrastive_sampling._hard_candidates, max_position=20000, base=10, causal_only=False)
    made = np.asarray(jax.jit(hard)(jax.random.bits(KEY, (4000, 8)), anchors, uniform))
    kept = made >= 0
    assert kept.shape[1] == expected["hard"]["requested"]
    assert kept.sum(axis=1).mean() == pytest.approx(expected["hard"]["survive_distance_filter_mean"], abs=0.1)
    assert kept.mean() == pytest.approx(expected["hard"]["survive_frac"], abs=0.012)
    assert (~kept).all(axis=1).mean() == pytest.approx(expected["hard"]["P_zero_survive"], abs=0.006)
    unique = np.mean([len(set(row[row >= 0])) for row in made])
    assert unique == pytest.approx(expected["hard"]["unique_mean"], abs=0.12)
    apart = np.abs(made - np.asarray(anchors))[kept]
    assert np.quantile(apart, 0.5) == pytest.approx(expected["hard"]["surviving_distance"]["q50"], rel=0.08)


@pytest.mark.parametrize("shape", [(6,), (4, 3), (3, 2, 4)])
def test_distillation_pairs_offsets_with_a_far_window(shape):
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
def test_distillation_starts_are_uniform_outside_the_origin_grid(shape, limit):
    make = functools.partial(sampling.distillation_positions, batch=8000, offsets=1, shape=shape, max_position=limit)
    indices, positions = jax.device_get(jax.jit(make)(KEY))
    starts = positions[:, 0] - np.stack(np.unravel_index(indices[:, 0], shape), axis=-1)
    every = np.stack(np.meshgrid(*(np.arange(limit - side + 1) for side in shape), indexing="ij"), -1)
    every = every.reshape(-1, len(shape))
    allowed = every[(every >= (1 if len(shape) == 1 else np.array(shape))).any(axis=1)]
    found, counts = np.unique(starts, axis=0, return_counts=True)
    np.testing.assert_array_equal(found, allowed)
    assert np.abs(counts - 8000 / len(allowed)).max() < 5 * np.sqrt(8000 / len(allowed))


@pytest.mark.parametrize("shape", [(6,), (4, 3), (3, 2, 4)])
def test_shift_reaches_every_start_and_a_subset_only_its_own(shape):
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


@pytest.mark.parametrize("shape,chunks", [((10,), 2), ((10,), 4), ((4, 6), 2)])
def test_skip_rises_strictly_and_stays_in_range(shape, chunks):
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


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="encoding.max_position=8"):
        sampling.random_offsets(KEY, num_sets=1, shape=(9,), max_position=8)
    with pytest.raises(InputError, match="candidates=30"):
        many(tuple((TEXT | {"max_position": 30}).items()), (1.0, 0.0, 0.0), 30, draws=2)
    with pytest.raises(InputError, match="out of range"):
        sampling.distillation_positions(KEY, batch=2, offsets=2, shape=(16,), max_position=19)
    with pytest.raises(InputError, match="positions"):
        many(tuple((TEXT | {"axes": 3}).items()), (1.0, 0.0, 0.0), 30, draws=2)
    with pytest.raises(InputError, match="mixture"):
        many(tuple(TEXT.items()), (0.0, 0.0, 0.0), 30, draws=2)
    with pytest.raises(InputError, match="skip.range=60"):
        sampling.pose_skip(KEY, num_sets=1, shape=(9,), max_position=50, num_chunks=2, position_range=60)
    with pytest.raises(InputError, match="offsets=17"):
        sampling.distillation_positions(KEY, batch=2, offsets=17, shape=(16,), max_position=50)
