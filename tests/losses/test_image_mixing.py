"""Mixup, cutmix and random crops: proportions of labels and pixels, and positions of crops."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from seqpe_jax.losses.image_mixing import crop_and_resize, mix_images
from seqpe_jax.losses.task import ClassificationLoss
from seqpe_jax.positions import sampling
from seqpe_jax.positions.grids import PositionGrid
from seqpe_jax.training.trainer import Trainer
from tests.inference.test_export import vit_config
from tests.tiny import random_params

LABELS_B = jnp.array([0, 1, 2, 3])
KEYS = jax.random.split(jax.random.PRNGKey(0), 40)


def images(sides):
    """Each image is its label in every pixel."""
    return jnp.broadcast_to(LABELS_B.reshape(-1, *[1] * (len(sides) + 1)), (4, *sides, 1)).astype(jnp.float32)


def proportions(mixed, partner_B):
    """Proportion of the own image in each pixel."""
    own, other = (
        jnp.asarray(label, jnp.float32).reshape(-1, *[1] * (mixed.ndim - 1)) for label in (LABELS_B, partner_B)
    )
    return np.asarray((mixed - other) / (own - other))


@pytest.mark.parametrize("sides", [(8, 12), (4, 6, 6)])
def test_mixup_has_one_proportion_for_all_pixels(sides):
    step = jax.jit(lambda key: mix_images(key, images(sides), LABELS_B, mixup=0.8, cutmix=0.0, switch=0.5))
    seen = []
    for key in KEYS:
        mixed, partner_B, share = step(key)
        np.testing.assert_array_equal(partner_B, LABELS_B[::-1])
        np.testing.assert_allclose(proportions(mixed, partner_B), float(share), atol=1e-5)
        seen.append(float(share))
    assert min(seen) < 0.3 and max(seen) > 0.7  # Beta(.8, .8) reaches both ends


@pytest.mark.parametrize("sides", [(8, 12), (4, 6, 6)])
def test_cutmix_replaces_a_box(sides):
    step = jax.jit(lambda key: mix_images(key, images(sides), LABELS_B, mixup=0.0, cutmix=1.0, switch=0.5))
    boxes = 0
    for key in KEYS:
        mixed, partner_B, share = step(key)
        own = proportions(mixed, partner_B)
        assert np.isin(own.round(5), (0.0, 1.0)).all()
        np.testing.assert_allclose(own.mean(axis=tuple(range(1, own.ndim))), float(share), atol=1e-5)
        np.testing.assert_array_equal(own, np.broadcast_to(own[:1], own.shape))
        places = np.argwhere(own[0, ..., 0] == 0)
        if len(places):  # what was replaced fills its bounding box
            assert len(places) == np.prod(places.max(0) - places.min(0) + 1)
            boxes += len(places) < own[0].size
    assert boxes > 20


def test_switch_is_the_probability_of_cutmix():
    step = jax.jit(
        lambda key, switch: mix_images(key, images((6, 6)), LABELS_B, mixup=1.0, cutmix=1.0, switch=switch)[:2]
    )

    def cuts(switch):
        found = [proportions(*step(key, switch)) for key in KEYS]
        return sum(np.ptp(own) > 0.5 for own in found)

    assert cuts(0.0) == 0 and cuts(1.0) > 25 and 5 < cuts(0.5) < 32


@pytest.mark.slow
def test_the_loss_has_the_proportions_of_the_pixels():
    settings = types.SimpleNamespace(mixup=0.8, cutmix=0.0, switch=0.5)
    table = jax.random.normal(KEYS[0], (4, 4))
    batch = {"images": images((4, 4)), "labels": LABELS_B}
    given = []

    def apply(mixed):
        given.append(mixed)
        return table

    loss, metrics = ClassificationLoss(0.1, settings).loss(apply, batch, KEYS[1])
    share = proportions(given[0], LABELS_B[::-1]).mean()
    target = np.full((4, 4), 0.1 / 4) + 0.9 * (share * np.eye(4) + (1 - share) * np.eye(4)[::-1])
    expected = -(target * np.asarray(jax.nn.log_softmax(table))).sum(-1).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-5) and metrics == {}


def test_accuracy_without_mixing():
    plain = ClassificationLoss(0.0, types.SimpleNamespace(mixup=0.0, cutmix=0.0, switch=0.5))
    logits = 5.0 * jnp.eye(4)[jnp.array([0, 1, 2, 0])]
    loss, metrics = plain.loss(lambda images: logits, {"images": images((4, 4)), "labels": LABELS_B}, KEYS[0])
    assert float(metrics["accuracy"]) == 0.75
    assert float(loss) == pytest.approx(-float(jax.nn.log_softmax(logits)[jnp.arange(4), LABELS_B].mean()))


COMPLETE = [[0.0, 1.0], [0.0, 1.0]]
BOXES = np.array([[[0.2, 0.5], [0.45, 0.5]], [[0.0, 0.75], [0.25, 0.75]], COMPLETE], np.float32)
IMAGES = np.random.default_rng(0).normal(size=(6, 16, 12, 2)).astype(np.float32)


def test_a_crop_is_enlarged_as_pillow_does():
    """Sample i shows box i mod 3; pixels beyond a box are read where the kernel reaches there."""
    found = np.asarray(jax.jit(crop_and_resize)(IMAGES, BOXES))
    for index, channel in np.ndindex(6, 2):
        (top, tall), (left, wide) = BOXES[index % 3].astype(float)
        box = (12 * left, 16 * top, 12 * (left + wide), 16 * (top + tall))
        picture = Image.fromarray(IMAGES[index, ..., channel])
        expected = np.asarray(picture.resize((12, 16), Image.Resampling.BICUBIC, box=box))
        np.testing.assert_allclose(found[index, 1:-1, 1:-1, channel], expected[1:-1, 1:-1], atol=1e-2)
        assert np.abs(expected - IMAGES[index, ..., channel]).max() > 0.1 or index % 3 == 2


def test_a_crop_of_the_complete_image_is_the_image():
    np.testing.assert_allclose(jax.jit(crop_and_resize)(IMAGES, np.array([COMPLETE], np.float32)), IMAGES, atol=1e-5)


@pytest.mark.slow
def test_a_crop_of_a_video_has_all_its_frames():
    videos = np.random.default_rng(1).normal(size=(2, 3, 8, 8, 1)).astype(np.float32)
    box = [[0.25, 0.5], [0.5, 0.5]]
    found = crop_and_resize(videos, np.array([[[0.0, 1.0], *box]], np.float32))
    expected = crop_and_resize(videos.reshape(6, 8, 8, 1), np.array([box], np.float32)).reshape(videos.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


WITH_CROPS = {
    "objective__zoom__rate": 1.0,
    "objective__shift__sets": 2,
    "objective__contrastive__weight": 0.0,
    "objective__distillation__weight": 0.0,
}


@functools.cache
def crop_trainer():
    settings = vit_config(**WITH_CROPS)
    assert (settings.encoding.position_resolution, settings.encoding.resize, settings.grid) == (
        10,
        "interpolate",
        (4, 4),
    )
    return Trainer.of(settings, jax.devices()[:1])


def test_positions_of_a_crop_are_those_of_its_box():
    sampled = jax.jit(crop_trainer().train_loss.sample)(jax.random.PRNGKey(0), 3)
    assert bool(sampled.perturbed) and sampled.crop_boxes_PA2.shape == (2, 2, 2)
    assert len(np.unique(sampled.crop_boxes_PA2[..., 0])) == 4, "each set and axis begins at another position"
    for box_A2, found_LA in zip(
        np.asarray(sampled.crop_boxes_PA2, np.float64), np.asarray(sampled.positions_PLA), strict=True
    ):
        for place, (row, column) in enumerate(np.ndindex(4, 4)):
            for axis, at in enumerate((row, column)):
                first, length = box_A2[axis]
                middle = (first + (at + 0.5) / 4 * length) * 4 * 10  # of a patch of the part, in tenths of a whole one
                assert abs(found_LA[place, axis] - (middle - 0.5)) <= 0.5 + 1e-3


@pytest.mark.slow
def test_crops_keep_the_positions_of_frames():
    crop_boxes_PA2 = sampling.crop_boxes(jax.random.PRNGKey(0), num_sets=3, axes=3, smallest=0.3)
    position_grid, shape = PositionGrid(10, (0, 4, 4)), (3, 4, 4)
    found, whole = position_grid.crop_positions(shape, crop_boxes_PA2), position_grid.positions(shape)
    assert (crop_boxes_PA2[:, 0] == jnp.array([0.0, 1.0])).all()
    np.testing.assert_array_equal(found[..., 0], np.broadcast_to(whole[:, 0], found.shape[:2]))
    frame = PositionGrid(10, (4, 4)).crop_positions((4, 4), crop_boxes_PA2[:, 1:])
    np.testing.assert_array_equal(found[..., 1:].reshape(3, 3, 16, 2), np.stack([frame] * 3, axis=1))


@pytest.mark.slow
def test_a_step_with_random_crops_reads_the_crops():
    run = crop_trainer()
    train_loss, key = run.train_loss, jax.random.PRNGKey(0)
    draw = np.random.default_rng(0)
    batch = {"images": jnp.asarray(draw.normal(size=(4, 8, 8, 1)), jnp.float32), "labels": jnp.arange(4)}
    loss = jax.jit(lambda params, batch: train_loss.loss(params, batch, key, jnp.int32(3))[0])
    params, sampled = random_params(run, 0.3), jax.jit(train_loss.sample)(key, 3)
    enlarged = batch | {
        "images": crop_and_resize(batch["images"], sampled.crop_boxes_PA2),
        "sampled_positions": sampled._replace(crop_boxes_PA2=None),
    }
    expected = float(loss(params, enlarged))
    assert float(loss(params, batch)) == pytest.approx(expected, abs=1e-5)
    assert abs(float(loss(params, enlarged | {"images": batch["images"]})) - expected) > 1e-3
