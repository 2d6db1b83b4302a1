"""Mixup and cutmix: labels are shared as the pixels are."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.losses.image_mixing import mix_images
from seqpe_jax.losses.task import ClassificationLoss

LABELS_B = jnp.array([0, 1, 2, 3])
KEYS = jax.random.split(jax.random.PRNGKey(0), 40)


def images(sides):
    """Each image is its label in every pixel."""
    return jnp.broadcast_to(LABELS_B.reshape(-1, *[1] * (len(sides) + 1)), (4, *sides, 1)).astype(jnp.float32)


def shares(mixed, partner_B):
    """Each pixel's share of its own image."""
    own, other = (
        jnp.asarray(label, jnp.float32).reshape(-1, *[1] * (mixed.ndim - 1)) for label in (LABELS_B, partner_B)
    )
    return np.asarray((mixed - other) / (own - other))


@pytest.mark.parametrize("sides", [(8, 12), (4, 6, 6)])
def test_mixup_shares_every_pixel_alike(sides):
    step = jax.jit(lambda key: mix_images(key, images(sides), LABELS_B, mixup=0.8, cutmix=0.0, switch=0.5))
    seen = []
    for key in KEYS:
        mixed, partner_B, share = step(key)
        np.testing.assert_array_equal(partner_B, LABELS_B[::-1])
        np.testing.assert_allclose(shares(mixed, partner_B), float(share), atol=1e-5)
        seen.append(float(share))
    assert min(seen) < 0.3 and max(seen) > 0.7  # Beta(.8, .8) reaches both ends


@pytest.mark.parametrize("sides", [(8, 12), (4, 6, 6)])
def test_cutmix_shares_a_box(sides):
    step = jax.jit(lambda key: mix_images(key, images(sides), LABELS_B, mixup=0.0, cutmix=1.0, switch=0.5))
    boxes = 0
    for key in KEYS:
        mixed, partner_B, share = step(key)
        own = shares(mixed, partner_B)
        assert np.isin(own.round(5), (0.0, 1.0)).all()
        np.testing.assert_allclose(own.mean(axis=tuple(range(1, own.ndim))), float(share), atol=1e-5)
        np.testing.assert_array_equal(own, np.broadcast_to(own[:1], own.shape))
        places = np.argwhere(own[0, ..., 0] == 0)
        if len(places):  # what was replaced fills its bounding box
            assert len(places) == np.prod(places.max(0) - places.min(0) + 1)
            boxes += len(places) < own[0].size
    assert boxes > 20


def test_switch_says_how_often_boxes_are_cut():
    step = jax.jit(
        lambda key, switch: mix_images(key, images((6, 6)), LABELS_B, mixup=1.0, cutmix=1.0, switch=switch)[:2]
    )

    def cuts(switch):
        found = [shares(*step(key, switch)) for key in KEYS]
        return sum(np.ptp(own) > 0.5 for own in found)

    assert cuts(0.0) == 0 and cuts(1.0) > 25 and 5 < cuts(0.5) < 32


def test_the_loss_is_shared_as_the_pixels_are():
    settings = types.SimpleNamespace(mixup=0.8, cutmix=0.0, switch=0.5)
    table = jax.random.normal(KEYS[0], (4, 4))
    batch = {"images": images((4, 4)), "labels": LABELS_B}
    given = []

    def apply(mixed):
        given.append(mixed)
        return table

    loss, metrics = ClassificationLoss(0.1, settings).loss(apply, batch, KEYS[1])
    share = shares(given[0], LABELS_B[::-1]).mean()
    target = np.full((4, 4), 0.1 / 4) + 0.9 * (share * np.eye(4) + (1 - share) * np.eye(4)[::-1])
    expected = -(target * np.asarray(jax.nn.log_softmax(table))).sum(-1).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5) and metrics == {}


def test_without_mixing_right_answers_are_counted():
    plain = ClassificationLoss(0.0, types.SimpleNamespace(mixup=0.0, cutmix=0.0, switch=0.5))
    logits = 5.0 * jnp.eye(4)[jnp.array([0, 1, 2, 0])]
    loss, metrics = plain.loss(lambda images: logits, {"images": images((4, 4)), "labels": LABELS_B}, KEYS[0])
    assert float(metrics["accuracy"]) == 0.75
    assert float(loss) == pytest.approx(-float(jax.nn.log_softmax(logits)[jnp.arange(4), LABELS_B].mean()))
