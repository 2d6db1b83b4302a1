"""Augmentation of images, operation by operation."""

import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from seqpe_jax.data import augment

# No level, or a shift, which a pattern that repeats does not measure.
UNGRADED = {"autocontrast", "equalize", "invert", "translate_x", "translate_y"}
FILL = {1: (124,), 3: (124, 116, 104)}


def rng(seed=0):
    return np.random.default_rng(seed)


def sample_image(channels=3, height=24, width=32):
    """Returns a picture with dark and bright parts, edges and colours, none of it at the ends of the range."""
    rows, columns = np.mgrid[:height, :width]
    planes = [60 + 4 * columns, 60 + 5 * rows, np.where((rows // 6 + columns // 6) % 2, 70, 190)]
    pixels = np.stack(planes, axis=-1).astype(np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 2] // 2 + pixels[..., 0] // 2)


def test_crop_box_follows_its_settings():
    height, width, shares, aspects = 400, 400, [], []
    for seed in range(400):
        left, top, right, bottom = augment.crop_box(height, width, (0.1, 0.5), (0.5, 2.0), rng(seed))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        shares.append((right - left) * (bottom - top) / (height * width))
        aspects.append((right - left) / (bottom - top))
    assert 0.095 < min(shares) < 0.12 and 0.45 < max(shares) < 0.505 and np.mean(shares) == pytest.approx(0.3, abs=0.02)
    assert 0.49 < min(aspects) < 0.55 and 1.8 < max(aspects) < 2.05
    assert np.mean(np.log(aspects)) == pytest.approx(0, abs=0.06), "wide and high ones alike"


def test_crop_boxes_lie_everywhere():
    boxes = np.array([augment.crop_box(100, 100, (0.25, 0.25), (1.0, 1.0), rng(seed)) for seed in range(400)])
    assert boxes[:, :2].min() < 3 and boxes[:, 2:].max() > 97
    np.testing.assert_allclose(boxes[:, :2].mean(axis=0), 25, atol=3)


def test_crop_box_of_the_whole_and_where_none_fits():
    assert augment.crop_box(30, 80, (1.0, 1.0), (3 / 4, 4 / 3), rng()) == (0, 0, 80, 30)
    assert augment.crop_box(30, 80, (0.99, 1.0), (3 / 4, 4 / 3), rng()) == (20, 0, 60, 30)
    assert augment.crop_box(80, 30, (0.99, 1.0), (3 / 4, 4 / 3), rng()) == (0, 20, 30, 60)
    assert augment.crop_box(1, 500, (0.99, 1.0), (3 / 4, 4 / 3), rng()) == (249, 0, 250, 1)


def test_translate_moves_by_whole_pixels_and_fills_with_zeros():
    for shape in ((6, 9, 1), (4, 6, 9, 3)):
        pixels = rng().integers(1, 256, shape, dtype=np.uint8)
        height, width = shape[-3:-1]
        padded = np.zeros((*shape[:-3], height + 4, width + 4, shape[-1]), np.uint8)
        padded[..., 2:-2, 2:-2, :] = pixels
        windows = {
            (down, right): padded[..., 4 - down : 4 - down + height, 4 - right : 4 - right + width, :].tobytes()
            for down in range(5)
            for right in range(5)
        }
        moved = [augment.translate(pixels, 2, rng(seed)).tobytes() for seed in range(200)]
        assert set(moved) == set(windows.values()) and len(set(windows.values())) == 25


def test_translate_out_of_the_image():
    pixels = np.ones((2, 2, 1), np.uint8)
    sums = {int(augment.translate(pixels, 5, rng(seed)).sum()) for seed in range(100)}
    assert sums == {0, 1, 2, 4}


def test_color_jitter():
    for channels in (1, 3):
        image = sample_image(channels)
        before = np.asarray(image).copy()
        jittered = [np.asarray(augment.color_jitter(image, 0.4, rng(seed))) for seed in range(200)]
        assert all(one.shape == before.shape and one.dtype == np.uint8 for one in jittered)
        assert not any(np.array_equal(one, before) for one in jittered)
        means = np.array([one.mean() for one in jittered]) / before.mean()
        assert means.min() == pytest.approx(0.6, abs=0.1) and means.max() == pytest.approx(1.4, abs=0.1)
        np.testing.assert_array_equal(np.asarray(image), before)
        np.testing.assert_array_equal(np.asarray(augment.color_jitter(image, 0.0, rng())), before)


def test_color_jitter_changes_saturation():
    spread = [
        np.ptp(np.asarray(augment.color_jitter(sample_image(), 0.4, rng(seed))).astype(int), axis=-1).mean()
        for seed in range(99)
    ]
    plain = np.ptp(np.asarray(sample_image()).astype(int), axis=-1).mean()
    assert min(spread) < 0.6 * plain and max(spread) > 1.4 * plain


def test_erased_boxes():
    boxes = [augment.erased_box(64, 48, rng(seed)) for seed in range(600)]
    assert all(0 <= top and top + high <= 64 and 0 <= left and left + wide <= 48 for top, left, high, wide in boxes)
    shares = [high * wide / (64 * 48) for _, _, high, wide in boxes]
    ratios = [math.log(wide / high) for _, _, high, wide in boxes]
    assert 0.015 < min(shares) < 0.04 and 0.3 < max(shares) < 0.35
    assert abs(np.mean(ratios)) < 0.15 and 1.0 < max(ratios) < 1.3
    assert augment.erased_box(1, 1, rng()) == (0, 0, 0, 0), "too small for a box"


def test_operations_change_the_image_and_keep_its_mode():
    for name, operation in augment.OPERATIONS.items():
        for channels in (1, 3):
            image = sample_image(channels)
            before = np.asarray(image).copy()
            for seed in range(6):
                after = operation(image, 0.9, FILL[channels], rng(seed))
                assert (after.size, after.mode) == (image.size, image.mode), name
                if not (name == "color" and channels == 1):  # grey has no colour to change
                    assert not np.array_equal(np.asarray(after), before), name
            np.testing.assert_array_equal(np.asarray(image), before)


def test_operations_do_more_at_a_higher_level():
    image = sample_image()
    before = np.asarray(image).astype(int)
    for name in [name for name in augment.OPERATIONS if name not in UNGRADED]:

        def change(level, seed, operation=augment.OPERATIONS[name]):
            return np.abs(np.asarray(operation(image, level, FILL[3], rng(seed))).astype(int) - before).mean()

        for seed in range(4):
            changes = [change(level, seed) for level in (0.0, 0.3, 0.6, 1.0)]
            assert changes == sorted(changes) and changes[-1] > changes[1] > -1 and changes[-1] > changes[0], name
        # At level 0 nothing happens, but posterize leaves 4 bits.
        assert change(0.0, 0) < (9 if name == "posterize" else 1e-9), name


def test_ranges_of_operations():
    image = sample_image()
    level = 1.0
    pixels = np.asarray(image)
    np.testing.assert_array_equal(
        np.asarray(augment.OPERATIONS["solarize"](image, level, FILL[3], rng())), 255 - pixels
    )
    added = np.asarray(augment.OPERATIONS["solarize_add"](image, level, FILL[3], rng()))
    np.testing.assert_array_equal(added, np.where(pixels < 128, np.minimum(255, pixels.astype(int) + 110), pixels))
    assert set(np.unique(augment.OPERATIONS["posterize"](image, level, FILL[3], rng()))) <= {0, 128}
    assert set(np.unique(augment.OPERATIONS["posterize"](image, 0.5, FILL[3], rng()))) <= {0, 64, 128, 192}
    brightness = {
        round(np.mean(augment.OPERATIONS["brightness"](image, level, FILL[3], rng(s))) / pixels.mean(), 1)
        for s in range(9)
    }
    assert len(brightness) == 2 and min(brightness) == 0.1 and max(brightness) > 1.5
    moved = {
        np.asarray(augment.OPERATIONS["translate_x"](image, level, FILL[3], rng(s)))[:, 1].tobytes() for s in range(9)
    }
    assert len(moved) == 2, "to the left or to the right"
    for level, rows in ((1.0, 10), (0.5, 5), (0.0, 0)):
        shifted = np.asarray(augment.OPERATIONS["translate_y"](image, level, FILL[3], rng()))
        came_in = (shifted == FILL[3]).all(axis=(1, 2))
        assert came_in.sum() in (rows, rows + 1 if rows else 0), "0.45 of 24 rows, in the mean colour"
        assert not rows or came_in[0] != came_in[-1]


def test_rand_augment_draws_layers_and_skips_half(monkeypatch):
    calls = []
    operations = {
        str(number): lambda image, level, fill, generator, n=number: (calls.append((n, level)), image)[1]
        for number in range(15)
    }
    assert len(augment.OPERATIONS) == len(operations)
    monkeypatch.setattr(augment, "OPERATIONS", operations)
    for seed in range(2000):
        augment.rand_augment(sample_image(), 2, 9.0, 0.5, FILL[3], rng(seed))
    assert len(calls) == pytest.approx(2000, abs=150)
    counts = np.bincount([number for number, _ in calls], minlength=15)
    assert counts.min() > 90 and counts.max() < 190
    levels = np.array([level for _, level in calls])
    assert (
        levels.max() == 1.0
        and levels.mean() == pytest.approx(0.9, abs=0.01)
        and levels.std() == pytest.approx(0.05, abs=0.01)
    )


def test_rand_augment_is_a_function_of_its_generator():
    image = sample_image()
    drawn = [np.asarray(augment.rand_augment(image, 4, 9.0, 0.5, FILL[3], rng(seed))) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert augment.rand_augment(image, 0, 9.0, 0.5, FILL[3], rng()) is image


def test_equalize_autocontrast_and_invert_are_pillows():
    image = sample_image()
    for name, expected in (
        ("equalize", ImageOps.equalize),
        ("autocontrast", ImageOps.autocontrast),
        ("invert", ImageOps.invert),
    ):
        np.testing.assert_array_equal(
            np.asarray(augment.OPERATIONS[name](image, 0.5, FILL[3], rng())), np.asarray(expected(image))
        )


def test_angles_of_rotation_and_shear():
    pixels = np.zeros((65, 65), np.uint8)
    pixels[31:34, 51:54] = 255  # 20 to the right of the middle
    rows, columns = np.mgrid[:65, :65] - 32

    def goes(name, level):
        """Returns the places (down, right of the middle) to which the blob goes."""
        drawn = [
            np.asarray(augment.OPERATIONS[name](Image.fromarray(pixels), level, (0,), rng(seed))) for seed in range(12)
        ]
        return {(round(np.average(rows, weights=one), 1), round(np.average(columns, weights=one), 1)) for one in drawn}

    for level in (1.0, 0.5):
        angle = math.radians(30 * level)
        expected = [(sign * 20 * math.sin(angle), 20 * math.cos(angle)) for sign in (-1, 1)]
        np.testing.assert_allclose(sorted(goes("rotate", level)), expected, atol=0.3)
        # From the corner, where row and column are 0: the blob's column is 52, its row 32.
        np.testing.assert_allclose(
            sorted(goes("shear_y", level)), [(s * 0.3 * level * 52, 20) for s in (-1, 1)], atol=0.5
        )
        left, right = sorted(column for _, column in goes("shear_x", level))
        assert left == pytest.approx(20 - 0.3 * level * 32, abs=0.5)
        assert right == pytest.approx(20 + 0.3 * level * 32, abs=0.5)
