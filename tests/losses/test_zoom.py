"""Zoomed steps: parts of images as Pillow enlarges them, at the positions that they have in the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from seqpe_jax.losses.image_mixing import crop_and_resize
from seqpe_jax.positions import sampling
from seqpe_jax.positions.grids import PositionGrid
from seqpe_jax.training.trainer import Trainer
from tests.inference.test_export import vit_config
from tests.tiny import random_params

WHOLE = [[0.0, 1.0], [0.0, 1.0]]
BOXES = np.array([[[0.2, 0.5], [0.45, 0.5]], [[0.0, 0.75], [0.25, 0.75]], WHOLE], np.float32)
IMAGES = np.random.default_rng(0).normal(size=(6, 16, 12, 2)).astype(np.float32)


def test_a_part_is_enlarged_as_pillow_does():
    """Sample i shows box i mod 3; pixels beyond a box are read where the kernel reaches there."""
    found = np.asarray(jax.jit(crop_and_resize)(IMAGES, BOXES))
    for index, channel in np.ndindex(6, 2):
        (top, tall), (left, wide) = BOXES[index % 3].astype(float)
        box = (12 * left, 16 * top, 12 * (left + wide), 16 * (top + tall))
        picture = Image.fromarray(IMAGES[index, ..., channel])
        expected = np.asarray(picture.resize((12, 16), Image.Resampling.BICUBIC, box=box))
        np.testing.assert_allclose(found[index, 1:-1, 1:-1, channel], expected[1:-1, 1:-1], atol=1e-2)
        assert np.abs(expected - IMAGES[index, ..., channel]).max() > 0.1 or index % 3 == 2


def test_the_whole_of_an_image_is_the_image():
    np.testing.assert_allclose(jax.jit(crop_and_resize)(IMAGES, np.array([WHOLE], np.float32)), IMAGES, atol=1e-5)


def test_a_part_of_a_clip_has_all_its_frames():
    clips = np.random.default_rng(1).normal(size=(2, 3, 8, 8, 1)).astype(np.float32)
    box = [[0.25, 0.5], [0.5, 0.5]]
    found = crop_and_resize(clips, np.array([[[0.0, 1.0], *box]], np.float32))
    expected = crop_and_resize(clips.reshape(6, 8, 8, 1), np.array([box], np.float32)).reshape(clips.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


ZOOMED = {
    "objective__zoom__rate": 1.0,
    "objective__shift__sets": 2,
    "objective__contrastive__weight": 0.0,
    "objective__distillation__weight": 0.0,
}


@functools.cache
def zoomed():
    settings = vit_config(**ZOOMED)
    assert (settings.encoding.unit, settings.encoding.resize, settings.grid) == (10, "interpolate", (4, 4))
    return Trainer.of(settings, jax.devices()[:1])


def test_the_positions_of_a_zoomed_step_are_those_of_its_boxes():
    sampled = jax.jit(zoomed().train_loss.sample)(jax.random.PRNGKey(0), 3)
    assert bool(sampled.perturbed) and sampled.crop_boxes_PA2.shape == (2, 2, 2)
    assert len(np.unique(sampled.crop_boxes_PA2[..., 0])) == 4, "each set and axis begins elsewhere"
    for box_A2, found_LA in zip(
        np.asarray(sampled.crop_boxes_PA2, np.float64), np.asarray(sampled.positions_PLA), strict=True
    ):
        for place, (row, column) in enumerate(np.ndindex(4, 4)):
            for axis, at in enumerate((row, column)):
                first, length = box_A2[axis]
                middle = (first + (at + 0.5) / 4 * length) * 4 * 10  # of a patch of the part, in tenths of a whole one
                assert abs(found_LA[place, axis] - (middle - 0.5)) <= 0.5 + 1e-3


def test_the_frames_of_a_zoomed_clip_stand_where_they_do():
    crop_boxes_PA2 = sampling.crop_boxes(jax.random.PRNGKey(0), num_sets=3, axes=3, smallest=0.3)
    position_grid, shape = PositionGrid(10, (0, 4, 4)), (3, 4, 4)
    found, whole = position_grid.crop_positions(shape, crop_boxes_PA2), position_grid.positions(shape)
    assert (crop_boxes_PA2[:, 0] == jnp.array([0.0, 1.0])).all()
    np.testing.assert_array_equal(found[..., 0], np.broadcast_to(whole[:, 0], found.shape[:2]))
    frame = PositionGrid(10, (4, 4)).crop_positions((4, 4), crop_boxes_PA2[:, 1:])
    np.testing.assert_array_equal(found[..., 1:].reshape(3, 3, 16, 2), np.stack([frame] * 3, axis=1))


@pytest.mark.slow
def test_a_zoomed_step_reads_the_parts_of_its_images():
    run = zoomed()
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
