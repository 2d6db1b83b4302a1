"""Digits, moving digits and ImageNet: pinned content, preparation, missing and damaged archives."""

import hashlib
import io
import json
import pathlib
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from seqpe_jax.data.datasets import digits as digit_images
from seqpe_jax.data.datasets.base import SPLITS
from seqpe_jax.data.datasets.digits import DIRECTIONS, make_video
from seqpe_jax.data.images import image_source
from seqpe_jax.errors import InputError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def sources(name, cache, **options):
    return {split: image_source(name, split=split, cache_dir=cache, progress=False, **options) for split in SPLITS}


def pixels(source):
    return np.stack([source[place]["image"] for place in range(len(source))])


def labels(source):
    return np.array([source[place]["label"] for place in range(len(source))])


def test_digit_images(cache):
    found = sources("digit_images", cache)
    assert {split: len(source) for split, source in found.items()} == {"train": 1259, "validation": 269, "test": 269}
    values = {split: pixels(source) for split, source in found.items()}
    everything = [image.tobytes() for images in values.values() for image in images]
    assert len(set(everything)) == 1797, "no image is in two splits"
    for source in found.values():
        shares = np.bincount(labels(source)) / len(source)
        assert len(shares) == 10 and abs(shares - 0.1).max() < 0.005
    train = found["train"]
    assert train[0]["image"].shape == (8, 8, 1) and train[0]["image"].dtype == np.uint8 and train.channels == 1
    assert type(train[0]["label"]) is int and train.class_names == tuple("0123456789") and train.classes == 10
    assert (values["train"].min(), values["train"].max()) == (0, 255)
    np.testing.assert_allclose(
        [values["train"].mean() / 255, values["train"].std() / 255], train.mean + train.std, atol=1e-4
    )


@pytest.mark.slow
def test_splits_stay_for_ever(cache):
    places = digit_images.split_indices()
    assert [places[split][:5] for split in SPLITS] == [[1, 2, 3, 4, 5], [0, 6, 15, 49, 51], [14, 17, 26, 28, 29]]
    assert [source.fingerprint for source in sources("digit_images", cache).values()] == [
        "d8d4dc7c6d0aa91ed0fa522193ab0340",
        "1d918cc8e316cb0c09c066e873af0fac",
        "61fdc98a0ad80e950dcfff985de6d3f6",
    ]
    content = {
        name: hashlib.sha256(pixels(image_source(name, split="test", cache_dir=cache)).tobytes()).hexdigest()[:16]
        for name in ("digit_images", "moving_digits")
    }
    assert content == {"digit_images": "5ff9bccc54a862fc", "moving_digits": "a06bbbd09a78ce86"}


def test_another_version_of_the_digits_is_refused(monkeypatch):
    monkeypatch.setattr(digit_images, "CONTENT", "0" * 64)
    digit_images.load_digit_arrays.cache_clear()
    with pytest.raises(InputError, match="gives other images than the 1797 known ones"):
        digit_images.load_digit_arrays()


def motion(frames):
    """Returns (down, right): how far the bright pixels' centre goes from frame to frame."""
    weights = frames[..., 0].astype(float)
    rows, columns = np.mgrid[: weights.shape[1], : weights.shape[2]]
    centres = [(np.average(rows, weights=frame), np.average(columns, weights=frame)) for frame in weights]
    return np.diff(centres, axis=0)


def test_moving_digits(cache):
    found = sources("moving_digits", cache)
    digits = sources("digit_images", cache)
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for split, source in found.items():
        assert len(source) == 4 * len(digits[split]) and source.classes == 40
        for place in range(0, len(source), 97):
            record = source[place]
            assert record["image"].shape == (8, 16, 16, 1) and record["image"].dtype == np.uint8
            digit, direction = source.class_names[record["label"]].split()
            assert record["label"] == 4 * int(digit) + DIRECTIONS.index(direction)
            np.testing.assert_allclose(motion(record["image"]), [steps[direction]] * 7, atol=1e-9)
            shown, kind = digits[split][place // 4]["image"], digits[split][place // 4]["label"]
            assert int(digit) == kind and record["image"][0].sum(dtype=int) == shown.sum(dtype=int), (
                "the split's own digit"
            )
    train = found["train"]
    values = pixels(train)
    np.testing.assert_allclose([values.mean() / 255, values.std() / 255], train.mean + train.std, atol=1e-4)
    shares = np.bincount(labels(train)).reshape(10, 4)
    assert (shares == shares[:, :1]).all() and shares.min() > 100, "each digit moves as often in each direction"


def test_frames_without_order_do_not_tell_the_direction():
    dot = np.full((8, 8, 1), 9, np.uint8)
    for one, other in (("left", "right"), ("up", "down")):
        paths = {
            direction: {
                frozenset(tuple(np.argwhere(frame)[0]) for frame in make_video(dot, direction, str(name)))
                for name in range(200)
            }
            for direction in (one, other)
        }
        assert paths[one] == paths[other] and len(paths[one]) == 18
    starts = {tuple(np.argwhere(make_video(dot, "left", str(name))[0])[0][:2]) for name in range(400)}
    assert starts == {(row, column) for row in range(9) for column in (7, 8)}


def archive(files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as written:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            written.addfile(member, io.BytesIO(body))
    return content.getvalue()


def jpeg(color, mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, (20, 12), color).save(content, "JPEG", quality=95)
    return content.getvalue()


@pytest.fixture
def imagenet(tmp_path) -> pathlib.Path:
    """A folder with the two archives, of five photos."""
    folder = tmp_path / "by hand"
    folder.mkdir()
    goldfish = {"n01443537_1.JPEG": jpeg(100, "L")}
    tench = {"n01440764_1.JPEG": jpeg((255, 0, 0)), "n01440764_2.JPEG": jpeg((0, 255, 255, 0), "CMYK")}
    train = {"n01440764.tar": archive(tench), "n01443537.tar": archive(goldfish)}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(archive(train))
    held_out = {"ILSVRC2012_val_00000002.JPEG": jpeg((0, 0, 255)), "ILSVRC2012_val_00000001.JPEG": jpeg((0, 255, 0))}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(archive(held_out))
    return folder


def test_imagenet2012(imagenet, tmp_path):
    options = {"paths": str(imagenet), "data_dir": tmp_path / "sets"}
    found = sources("imagenet2012", tmp_path / "c", **options)
    train = found["train"]
    names = [train.class_names[label] for label in labels(train)]
    assert names == ["n01440764", "n01440764", "n01443537"] and train.classes == 1000 and train.channels == 3
    colors = pixels(train)[:, 6, 10]
    np.testing.assert_allclose(colors, [(255, 0, 0), (255, 0, 0), (100, 100, 100)], atol=3)
    assert train[0]["image"].shape == (12, 20, 3) and train.mean == (0.485, 0.456, 0.406)
    # In the archive's order, with the official labels of images 2 and 1.
    assert [found["test"].class_names[label] for label in labels(found["test"])] == ["n09193705", "n01751748"]
    np.testing.assert_array_equal(pixels(found["test"]), pixels(found["validation"]))
    for file in imagenet.iterdir():
        file.unlink()
    assert sources("imagenet2012", tmp_path / "c", **options)["train"].fingerprint == train.fingerprint


def test_tfds_reads_what_we_prepare(imagenet, tmp_path):
    import tensorflow_datasets as tfds

    sources("imagenet2012", tmp_path / "c", paths=str(imagenet), data_dir=tmp_path / "sets")
    builder = tfds.builder("imagenet2012", data_dir=tmp_path / "sets", file_format="array_record")
    rows = builder.as_data_source(split="validation", decoders={"image": tfds.decode.SkipDecoding()})
    assert [row["file_name"] for row in rows] == [b"ILSVRC2012_val_00000002.JPEG", b"ILSVRC2012_val_00000001.JPEG"]


def test_imagenet2012_without_its_files(imagenet, tmp_path):
    with pytest.raises(InputError) as caught:
        image_source("imagenet2012", split="train", data_dir=tmp_path / "sets", cache_dir=tmp_path)
    folder = tmp_path / "sets" / "downloads" / "manual"
    both = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
    assert f"'{folder}' lacks {both}" in str(caught.value) and f"put {both} into '{folder}'" in str(caught.value)
    (imagenet / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(InputError, match="by hand' lacks ILSVRC2012_img_val.tar: get it from image-net.org"):
        image_source("imagenet2012", split="train", paths=str(imagenet), data_dir=tmp_path / "sets")
    with pytest.raises(InputError, match="takes one folder, got 2"):
        image_source("imagenet2012", split="train", paths=("a", "b"), data_dir=tmp_path / "sets")


def test_damaged_imagenet2012(imagenet, tmp_path):
    options = {"paths": str(imagenet), "data_dir": tmp_path / "sets", "progress": False}
    (imagenet / "ILSVRC2012_img_val.tar").write_bytes(b"no archive")
    with pytest.raises(InputError, match="ILSVRC2012_img_val.tar' is not a complete tar archive"):
        image_source("imagenet2012", split="train", **options)
    whole = archive({f"ILSVRC2012_val_0000000{number}.JPEG": jpeg((0, 0, 255)) for number in (1, 2)})
    for size in (1700, 2200):  # within the second file's header, and within the file
        (imagenet / "ILSVRC2012_img_val.tar").write_bytes(whole[:size])
        with pytest.raises(InputError, match="ILSVRC2012_img_val.tar' is not a complete tar archive"):
            image_source("imagenet2012", split="train", **options)
    (imagenet / "ILSVRC2012_img_val.tar").write_bytes(archive({"n01440764.tar": b""}))
    with pytest.raises(InputError, match="'n01440764.tar', which is no validation image"):
        image_source("imagenet2012", split="train", **options)
    (imagenet / "ILSVRC2012_img_train.tar").write_bytes(archive({"ILSVRC2012_val_00000002.JPEG": b""}))
    with pytest.raises(InputError, match="'ILSVRC2012_val_00000002.JPEG', which is no class"):
        image_source("imagenet2012", split="train", **options)


def test_data_not_for_random_access(imagenet, tmp_path):
    options = {"paths": str(imagenet), "data_dir": tmp_path / "sets", "progress": False}
    image_source("imagenet2012", split="train", **options)
    description = tmp_path / "sets" / "imagenet2012" / "5.1.0" / "dataset_info.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match="is not in a format for random access: prepare it again"):
        image_source("imagenet2012", split="train", **options)


def test_imagenet_resized(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    for part, rows in (("train", slice(0, 3)), ("val", slice(3, 5))):
        flat, arrays = drawn[rows].transpose(0, 3, 1, 2).reshape(-1, 192), io.BytesIO()
        np.savez(arrays, data=flat, labels=np.arange(1, 6)[rows])
        with zipfile.ZipFile(tmp_path / f"Imagenet8_{part}_npz.zip", "w") as written:
            written.writestr(f"Imagenet8_{part}_npz/data.npz", arrays.getvalue())
    found = sources("imagenet_resized", tmp_path / "c", paths=("8x8", str(tmp_path)))
    np.testing.assert_array_equal(pixels(found["train"]), drawn[:3])
    np.testing.assert_array_equal(pixels(found["test"]), drawn[3:])
    assert labels(found["train"]).tolist() == [0, 1, 2] and labels(found["validation"]).tolist() == [3, 4]


def test_imagenet_resized_needs_a_size_and_its_files(tmp_path):
    with pytest.raises(InputError, match=r"needs data.paths=\('SIZE',\) .*Known: 16x16, 32x32, 64x64, 8x8"):
        image_source("imagenet_resized", split="train", cache_dir=tmp_path)
    with pytest.raises(InputError, match="lacks Imagenet64_train_part1_npz.zip and Imagenet64_train_part2_npz.zip and"):
        image_source("imagenet_resized", split="train", paths="64x64", cache_dir=tmp_path)
    for part in ("train", "val"):
        (tmp_path / f"Imagenet8_{part}_npz.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match="Imagenet8_train_npz.zip' is not a complete archive of 8x8 images"):
        image_source(
            "imagenet_resized", split="train", paths=("8x8", str(tmp_path)), cache_dir=tmp_path, progress=False
        )
