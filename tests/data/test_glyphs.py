"""Drawn letters and digits: the same shape at every size, families of fonts in one split each."""

import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.data import images
from seqpe_jax.data.datasets import glyphs
from seqpe_jax.errors import InputError
from seqpe_jax.tasks import ImageClassification
from tests.tiny import ROOT


def source(split="test", size=(32, 32)):
    return images.image_source("glyphs", split=split, size=size)


def test_a_drawing_is_one_shape_at_every_size():
    """Mean brightness, centre and extent are equal as shares of the side: what was drawn at 128 is no resized image."""
    for index in (0, 77, 400, 1511):
        large, small = (source(size=(side, side))[index]["image"][..., 0] / 255.0 for side in (128, 32))
        blocks = large.reshape(32, 4, 32, 4).mean(axis=(1, 3))  # antialiasing is the mean over a pixel
        assert np.abs(blocks - small).mean() < 0.01 and np.abs(blocks - small).max() < 0.3
        sharp = ((large > 0.02) & (large < 0.98)).mean() / ((small > 0.02) & (small < 0.98)).mean()
        assert (
            0.1 < sharp < 0.5
        )  # edges are a pixel wide at both sizes: a quarter of the area, where resizing blurs all
    wide = source(size=(32, 64))[77]["image"][..., 0]
    square = source(size=(32, 32))[77]["image"][..., 0]
    np.testing.assert_array_equal(wide[:, 16:48], square)  # not distorted
    assert not wide[:, :12].any()


def test_drawings_are_functions_of_their_number_and_all_different():
    own = source("train")
    assert len(own) == 13 * 36 * 60 and own.classes == 36 and own.class_names[10] == "A"
    np.testing.assert_array_equal(own[5]["image"], source("train")[5]["image"])
    assert own[5]["image"].shape == (32, 32, 1) and own[5]["label"] == 5
    assert len({own[36 * 13 * number + 7]["image"].tobytes() for number in range(12)}) == 12
    labels = [source("test")[index]["label"] for index in range(0, 1512, 7)]
    assert np.bincount(labels, minlength=36).min() > 0
    margins = [
        max(image[0].max(), image[-1].max(), image[:, 0].max(), image[:, -1].max())
        for image in (own[index]["image"][..., 0] for index in range(0, len(own), 211))
    ]
    assert np.mean(np.array(margins) > 0) < 0.02  # hardly any character is cut off


def test_no_family_is_in_two_splits():
    families = [family for faces in glyphs.FACES.values() for family in faces]
    assert len(families) == len(set(families)) == 7
    names = {face: glyphs._font(face).family_name for split in glyphs.FACES for face in glyphs._faces(split)}
    splits = {}
    for split in glyphs.FACES:
        for face in glyphs._faces(split):
            splits.setdefault(names[face].removesuffix(" Mono"), set()).add(split)
    assert all(len(found) == 1 for found in splits.values()), splits
    assert len({source(split).fingerprint for split in glyphs.FACES}) == 3


def test_evaluation_draws_at_its_own_size():
    settings = config.load(f"{ROOT}/configs/glyphs_vit.py:learned")
    task = ImageClassification(settings)
    assert task.source("test", (64, 64))[3]["image"].shape == (64, 64, 1)
    _, pixels = task.sample_images((48, 96), "test", 2)
    expected = [source(size=(48, 96))[index]["image"] / 255 for index in (0, 1511)]
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    mean = np.mean([task.source("train")[index]["image"] for index in range(0, 28080, 97)]) / 255
    assert abs(mean - task.data_spec.mean[0]) < 0.005
    with pytest.raises(InputError, match="'glyphs' takes no data.paths"):
        config.load(f"{ROOT}/configs/glyphs_vit.py", {"data.paths": ("x",)})
