"""Training and evaluation examples of images and videos, as the host makes them."""

import itertools
import types

import numpy as np
import pytest
from PIL import Image

from seqpe_jax.data import augment, images
from seqpe_jax.errors import InputError

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}  # normalised pixels are value / 255
GREY = {"mean": (0.0,), "std": (1.0,)}


def settings(**changes):
    nothing = {
        "crop_scale": (1.0, 1.0),
        "crop_aspect": (3 / 4, 4 / 3),
        "flip": 0.0,
        "translate": 0,
        "randaugment_layers": 0,
        "randaugment_magnitude": 9.0,
        "randaugment_std": 0.5,
        "color_jitter": 0.0,
        "erasing": 0.0,
    }
    return types.SimpleNamespace(**(nothing | changes))


EVERYTHING = settings(crop_scale=(0.2, 1.0), flip=0.5, translate=2, randaugment_layers=2, color_jitter=0.4, erasing=0.5)


def finished(example, mean, std, rng=None):
    """Returns an example as the network reads it: what `losses.image_input` does on the device, by NumPy."""
    assert example["images"].dtype == np.uint8
    pixels = images.normalize_pixels(example["images"], mean, std)
    if example.get("flip"):
        pixels = pixels[..., ::-1, :]
    if "erase" in example:
        top, left, high, wide = example["erase"]
        pixels = pixels.copy()
        box = pixels[..., top : top + high, left : left + wide, :]
        box[...] = rng.normal(size=box.shape)
    return {"images": pixels, "labels": example["labels"]}


def train_example(record, size, augment, rng, *, mean, std):
    return finished(images.train_example(record, size, augment, rng, mean=mean), mean, std, rng)


def eval_example(record, size, crop_ratio=1.0, *, mean, std):
    return finished(images.eval_example(record, size, crop_ratio), mean, std)


def photo(height, width, channels=3, seed=0):
    """Returns smooth colours, so that resizing keeps them about the same."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)
        for plane in np.moveaxis(corners, -1, 0)
    ]
    return {"image": np.stack(planes, axis=-1), "label": 3}


def clip(frames=4, height=10, width=12, seed=0):
    return {"image": np.stack([photo(height, width, 1, seed + i)["image"] for i in range(frames)]), "label": 1}


def rng(seed=0):
    return np.random.default_rng(seed)


# --- examples


def test_training_examples_have_the_requested_size():
    for size, changes in itertools.product([(16, 16), (12, 20), (20, 8)], [settings(), EVERYTHING]):
        for seed, (height, width, channels) in enumerate([(30, 40, 3), (8, 8, 1), (7, 60, 3)]):
            constants = PLAIN if channels == 3 else GREY
            example = train_example(photo(height, width, channels), size, changes, rng(seed), **constants)
            assert example["images"].shape == (*size, channels) and example["images"].dtype == np.float32
            assert example["labels"].dtype == np.int32 and example["labels"].shape == () and example["labels"] == 3
            assert np.isfinite(example["images"]).all()


def test_an_example_is_a_function_of_its_generator():
    record = photo(30, 40)
    before = record["image"].copy()
    drawn = [train_example(record, (16, 16), EVERYTHING, rng(seed), **PLAIN)["images"] for seed in (1, 1, 2, 3)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(drawn[1:], 2))
    np.testing.assert_array_equal(record["image"], before)


def test_without_augmentation_the_whole_image_is_resized_and_normalised():
    record = photo(16, 16)
    same = train_example(record, (16, 16), settings(), rng(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))["images"]
    np.testing.assert_allclose(same, (record["image"] / 255 - (0.5, 0.4, 0.3)) / (0.2, 0.3, 0.4), atol=1e-6)
    wide = train_example(photo(16, 48), (8, 24), settings(), rng(), **PLAIN)["images"]
    expected = Image.fromarray(photo(16, 48)["image"]).resize((24, 8), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(wide, np.asarray(expected) / 255, atol=1e-6)


def test_each_setting_changes_the_image():
    record = photo(24, 24)
    plain = train_example(record, (24, 24), settings(), rng(), **PLAIN)["images"]
    strengths = {"crop_scale": (0.2, 0.6), "flip": 1.0, "translate": 4, "randaugment_layers": 12, "color_jitter": 0.4}
    for name, value in (strengths | {"erasing": 1.0}).items():
        augment = settings(**{name: value})
        changed = [train_example(record, (24, 24), augment, rng(seed), **PLAIN)["images"] for seed in range(4)]
        assert not any(np.array_equal(plain, one) for one in changed), name
        assert all(one.shape == plain.shape for one in changed)
        if name != "erasing":
            assert min(one.min() for one in changed) >= 0 and max(one.max() for one in changed) <= 1


def test_flip():
    record = photo(6, 8)
    flipped = train_example(record, (6, 8), settings(flip=1.0), rng(), **PLAIN)["images"]
    np.testing.assert_allclose(flipped, record["image"][:, ::-1] / 255, atol=1e-6)
    count = sum(
        not np.allclose(
            train_example(record, (6, 8), settings(flip=0.25), rng(seed), **PLAIN)["images"], record["image"] / 255
        )
        for seed in range(400)
    )
    assert 60 < count < 140


def test_a_flip_comes_before_a_translation():
    """The device flips last; the host moves the image to the other side instead."""
    record = photo(8, 8)
    for seed in range(4):
        found = train_example(record, (8, 8), settings(flip=1.0, translate=3), rng(seed), **PLAIN)["images"]
        draw = rng(seed)
        draw.random()  # decides on the flip
        moved = augment.translate(record["image"][:, ::-1], 3, draw)
        np.testing.assert_allclose(found, moved / 255, atol=1e-6)


def test_translated_pixels_are_black_before_they_are_normalised():
    white = {"image": np.full((8, 8, 1), 255, np.uint8), "label": 0}
    seen = set()
    for seed in range(40):
        moved = train_example(white, (8, 8), settings(translate=2), rng(seed), mean=(0.5,), std=(0.25,))["images"]
        assert set(np.unique(moved)) <= {-2.0, 2.0}
        seen.add(int((moved == 2.0).sum()))
    assert len(seen) > 3 and min(seen) >= 36


def test_evaluation_takes_the_centre():
    shapes = ((40, 30), (30, 40), (10, 10), (16, 90))
    for size, shape, ratio in itertools.product(((16, 16), (12, 24), (24, 12)), shapes, (1.0, 0.875)):
        record = photo(*shape)
        found = eval_example(record, size, ratio, **PLAIN)["images"]
        assert found.shape == (*size, 3) and found.dtype == np.float32
        # The same part of the image, by nearest neighbours in the coordinates of the original.
        scale = max(size[0] / ratio / shape[0], size[1] / ratio / shape[1])
        rows = (np.arange(size[0]) + 0.5 - size[0] / 2) / scale + shape[0] / 2 - 0.5
        columns = (np.arange(size[1]) + 0.5 - size[1] / 2) / scale + shape[1] / 2 - 0.5
        rows, columns = (
            np.clip(np.rint(at), 0, end - 1).astype(int) for at, end in ((rows, shape[0]), (columns, shape[1]))
        )
        np.testing.assert_allclose(found, record["image"][rows][:, columns] / 255, atol=0.12)


def test_shorter_side_is_resized_to_size_over_ratio():
    record = photo(50, 100)
    whole = Image.fromarray(record["image"]).resize((64, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[2:30, 18:46] / 255
    np.testing.assert_allclose(eval_example(record, (28, 28), 0.875, **PLAIN)["images"], expected, atol=1e-6)
    unchanged = eval_example(photo(9, 7), (9, 7), **PLAIN)["images"]
    np.testing.assert_allclose(unchanged, photo(9, 7)["image"] / 255, atol=1e-6)


def test_no_image_is_resized_to_more_than_its_example(monkeypatch):
    """The whole of a strip at the scale of its shorter side would take gigabytes; its middle alone is made."""
    asked, resize = [], Image.Image.resize

    def recorded(image, size, *rest, **options):
        asked.append(size)
        return resize(image, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    for shape in ((2, 20_000), (20_000, 2)):
        strip = np.zeros((*shape, 3), np.uint8)
        strip.reshape(-1, 3)[20_000 // 2 * 2 :] = 255
        found = eval_example({"image": strip, "label": 0}, (32, 32), **PLAIN)["images"]
        assert found.shape == (32, 32, 3) and 0 < found.mean() < 1
        train_example({"image": strip, "label": 0}, (32, 32), settings(crop_scale=(0.1, 1.0)), rng(), **PLAIN)
    assert set(asked) == {(32, 32)}


# --- videos


def test_videos_change_alike_in_all_frames():
    still = {"image": np.repeat(photo(20, 20, 1)["image"][None], 5, axis=0), "label": 1}
    augment = settings(crop_scale=(0.2, 0.8), flip=0.5, translate=3)
    for seed in range(8):
        frames = train_example(still, (5, 16, 16), augment, rng(seed), **GREY)["images"]
        assert frames.shape == (5, 16, 16, 1)
        np.testing.assert_array_equal(frames, np.repeat(frames[:1], 5, axis=0))
    erased = train_example(still, (5, 16, 16), settings(erasing=1.0), rng(), **GREY)["images"]
    plain = train_example(still, (5, 16, 16), settings(), rng(), **GREY)["images"]
    where = erased != plain
    assert where[0].any() and (where == where[:1]).all() and not np.array_equal(erased[0], erased[1])


def test_videos_are_cut_and_resized():
    record = clip(frames=8)
    middle = eval_example(record, (4, 10, 12), **GREY)["images"]
    np.testing.assert_allclose(middle, record["image"][2:6] / 255, atol=1e-6)
    assert eval_example(record, (8, 5, 9), 0.9, **GREY)["images"].shape == (8, 5, 9, 1)


def test_training_reads_frames_in_a_row_from_anywhere():
    record, found = clip(frames=8), []
    for seed in range(40):
        frames = train_example(record, (6, 10, 12), settings(), rng(seed), **GREY)["images"]
        starts = [
            first for first in range(3) if np.allclose(frames, record["image"][first : first + 6] / 255, atol=1e-6)
        ]
        found += starts
    assert len(found) == 40 and set(found) == {0, 1, 2}
    whole = train_example(record, (8, 10, 12), settings(flip=0.5), rng(3), **GREY)["images"]
    flat = train_example({"image": record["image"][0], "label": 0}, (10, 12), settings(flip=0.5), rng(3), **GREY)[
        "images"
    ]
    np.testing.assert_array_equal(whole[0], flat)  # nothing is drawn where there is no choice


def test_what_videos_and_sizes_refuse():
    for change in ({"randaugment_layers": 1}, {"color_jitter": 0.1}):
        with pytest.raises(
            InputError, match="videos cannot be recoloured: set randaugment_layers=0 and color_jitter=0"
        ):
            train_example(clip(), (4, 8, 8), settings(**change), rng(), **GREY)
    with pytest.raises(InputError, match="the videos have 4 frames, but the size has 5"):
        train_example(clip(), (5, 8, 8), settings(), rng(), **GREY)
    with pytest.raises(InputError, match=r"holds videos, so the size must be \(frames, height, width\), got \(8, 8\)"):
        eval_example(clip(), (8, 8), **GREY)
    with pytest.raises(InputError, match=r"holds images, so the size must be \(height, width\), got \(4, 8, 8\)"):
        eval_example(photo(8, 8), (4, 8, 8), **PLAIN)
    with pytest.raises(InputError, match="crop_ratio must be above 0 and at most 1, got 1.5"):
        eval_example(photo(8, 8), (8, 8), 1.5, **PLAIN)
