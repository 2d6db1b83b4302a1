"""Contrastive sampling: rules in one to three dimensions, and the statistics of the reference's sampler."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.positions import contrastive_sampling
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
        contrastive_sampling.sample_contrastive_positions,
        batch=draws,
        candidates=candidates,
        mixture=mixture,
        **dict(settings),
        **dict(options),
    )
    return jax.device_get(jax.jit(make)(KEY, jnp.int32(0)))


def draw(settings, mixture, candidates, **options):
    return many(tuple(settings.items()), mixture, candidates, **options)


def distances(sampled):
    distance = sampled.candidates_BCA - sampled.anchors_BA[:, None]
    return np.sqrt(np.square(distance.astype(np.float64)).sum(-1))


@pytest.mark.slow
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
    distance = np.square(found - anchors[:, None]).sum(-1)
    np.testing.assert_array_equal(labels, distance.argmin(axis=1))


def test_hard_candidates_are_farther_than_uniform_ones():
    settings = {"max_position": 400, "axes": 1, "base": 10, "hard_fraction": 1.0, "window": 8}
    anchors, found, _ = draw(settings, (0.0, 1.0, 0.0), 1, draws=2000)
    uniform = draw(settings, (1.0, 0.0, 0.0), 1, draws=2000)
    assert np.abs(found[:, 0] - anchors).mean() > 1.1 * np.abs(uniform.candidates_BCA[:, 0] - uniform.anchors_BA).mean()


def test_distances_are_exact_on_the_largest_grid():
    far = jnp.array([[32767, 32767], [32767, 32766], [32766, 32767]])
    distance = np.asarray(contrastive_sampling._distance(far, jnp.zeros(2, jnp.int32)))
    np.testing.assert_array_equal(distance, [2 * 32767**2, 32767**2 + 32766**2, 32767**2 + 32766**2])


def test_each_edit_has_every_result_and_no_other():
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


def test_every_position_is_an_anchor_once_per_epoch():
    make = jax.jit(
        functools.partial(
            contrastive_sampling.sample_contrastive_positions,
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
def test_causal_only_candidates_are_before_the_anchor(mixture):
    anchors, found, _ = draw(TEXT | {"max_position": 500}, mixture, 16, draws=400, causal_only=True, around_anchor=True)
    assert (found[..., 0] < anchors).all() and anchors.min() == 16


@pytest.mark.parametrize("around", [False, True])
def test_causal_only_with_just_enough_earlier_positions(around):
    anchors, found, _ = draw(
        TEXT | {"max_position": 8, "window": 3}, (0.2, 0.4, 0.4), 4, draws=60, causal_only=True, around_anchor=around
    )
    assert set(anchors[:, 0]) == {4, 5, 6, 7} and (found[..., 0] < anchors).all()
    assert all(len(set(row)) == 4 for row in found[..., 0])


def test_around_anchor():
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
                ("text_1d_n32_hard negatives", 32, TEXT),
                ("text_1d_n32_distributional", 32, TEXT),
                ("image_2d_n32_random only", 32, IMAGE),
                ("image_2d_n32_hard negatives", 32, IMAGE),
                ("image_2d_n32_intended mix .5/.3/.2", 32, IMAGE),
            )
        ),
    ],
)
def test_candidates_match_the_reference(goldens, name, candidates, settings):
    expected = json.loads((goldens / "sampler_stats.json").read_text())["contrastive"][name]
    mode = name.split("_", 3)[3]
    sampled = draw(settings, MIXTURES[mode], candidates)
    nearest = distances(sampled).min(axis=1)
    count = len(nearest)
    # The reference edits both coordinates' digits as one string, ours one coordinate: with hard candidates alone the
    # label's index moves by .008 (160,000 samples of ours).
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
        check(sampled.labels_B, index, quantile, known)
    for first, share in expected["label_in_first_n"].items():
        check(sampled.labels_B, int(first) - 0.5, share, known)


@pytest.mark.slow
def test_as_many_hard_candidates_are_valid_as_in_the_reference(goldens):
    expected = json.loads((goldens / "sampler_stats.json").read_text())["contrastive"]["text_1d_n32_hard negatives"]
    anchors = permute(KEY, jnp.arange(4000), 20000)[:, None]
    uniform = jax.random.randint(KEY, (4000, 25, 1), 0, 20000)
    hard = functools.partial(contrastive_sampling._hard_candidates, max_position=20000, base=10, causal_only=False)
    made = np.asarray(jax.jit(hard)(jax.random.bits(KEY, (4000, 8)), anchors, uniform))
    valid = made >= 0
    assert valid.shape[1] == expected["hard"]["requested"]
    assert valid.sum(axis=1).mean() == pytest.approx(expected["hard"]["survive_distance_filter_mean"], abs=0.1)
    assert valid.mean() == pytest.approx(expected["hard"]["survive_frac"], abs=0.012)
    assert (~valid).all(axis=1).mean() == pytest.approx(expected["hard"]["P_zero_survive"], abs=0.006)
    unique = np.mean([len(set(row[row >= 0])) for row in made])
    assert unique == pytest.approx(expected["hard"]["unique_mean"], abs=0.12)
    distance = np.abs(made - np.asarray(anchors))[valid]
    assert np.quantile(distance, 0.5) == pytest.approx(expected["hard"]["surviving_distance"]["q50"], rel=0.08)


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="candidates=30"):
        many(tuple((TEXT | {"max_position": 30}).items()), (1.0, 0.0, 0.0), 30, draws=2)
    with pytest.raises(InputError, match="positions"):
        many(tuple((TEXT | {"axes": 3}).items()), (1.0, 0.0, 0.0), 30, draws=2)
    with pytest.raises(InputError, match="mixture"):
        many(tuple(TEXT.items()), (0.0, 0.0, 0.0), 30, draws=2)
