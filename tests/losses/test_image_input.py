"""Images on the device: normalized as on the host, flipped and erased where the host says so."""

import jax
import numpy as np
import pytest

from seqpe_jax.data.images import normalize_pixels
from seqpe_jax.losses.image_input import model_images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch():
    draw = np.random.default_rng(0)
    return {"images": draw.integers(0, 256, (4, 24, 20, 3), np.uint8), "labels": np.arange(4)}


@pytest.fixture(scope="module")
def normalized(batch):
    return normalize_pixels(batch["images"], MEAN, STD)


def test_pixels_are_normalized_as_on_the_host(batch, normalized):
    found = jax.jit(lambda batch: model_images(batch, MEAN, STD))(batch)
    np.testing.assert_allclose(found["images"], normalized, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found["labels"], batch["labels"])
    again = model_images({"images": normalized}, MEAN, STD, KEY)["images"]
    assert again is normalized, "images that are floats are normalized already"


def test_flips_and_boxes_are_those_of_each_image(batch, normalized):
    boxes = np.array([[0, 0, 0, 0], [2, 3, 5, 7], [0, 0, 24, 20], [20, 18, 4, 2]], np.int32)
    flips = np.array([True, False, False, True])
    found = np.asarray(model_images(batch | {"flip": flips, "erase": boxes}, MEAN, STD, KEY)["images"])
    expected = np.where(flips[:, None, None, None], normalized[:, :, ::-1], normalized)
    inside = np.zeros(found.shape[:3], bool)
    for image, (top, left, high, wide) in enumerate(boxes):
        inside[image, top : top + high, left : left + wide] = True
    np.testing.assert_allclose(found[~inside], expected[~inside], rtol=1e-6, atol=1e-6)
    noise = found[inside]
    assert len(noise) == 35 + 480 + 8 and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.15, "each channel of each pixel on its own"
    evaluated = model_images(batch | {"flip": flips, "erase": boxes}, MEAN, STD)["images"]
    np.testing.assert_allclose(evaluated, normalized, rtol=1e-6, atol=1e-6)


def test_all_frames_of_a_video_are_changed_alike():
    video = np.broadcast_to(np.arange(30, dtype=np.uint8).reshape(1, 1, 6, 5, 1), (2, 3, 6, 5, 1))
    boxes = np.array([[1, 1, 2, 3], [0, 0, 0, 0]], np.int32)
    batch = {"images": video, "flip": np.array([False, True]), "erase": boxes}
    found = np.asarray(model_images(batch, (0.0,), (1.0,), KEY)["images"]) * 255
    changed = np.abs(found[0] - video[0]) > 1e-3
    assert changed.sum() == 3 * 6 and (changed == changed[:1]).all()
    assert not np.array_equal(found[0, 0][changed[0]], found[0, 1][changed[1]])
    np.testing.assert_allclose(found[1], video[1, :, :, ::-1], atol=1e-3)
