"""Own images in class folders: layouts, splits, links, image formats, bit depths, and one line for each fault."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from seqpe_jax.data.datasets import image_base, image_folder
from seqpe_jax.data.datasets.base import SPLITS, hash_fraction
from seqpe_jax.data.datasets.image_base import ImageSource
from seqpe_jax.data.images import image_source
from seqpe_jax.errors import InputError


def write(file, mode="RGB", color=(10, 20, 30), size=(6, 4)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(file)


def folder(root, split, cache=None, **options):
    return image_source(
        "image_folder", split=split, paths=str(root), cache_dir=cache or root.parent / "c", progress=False, **options
    )


def names(source):
    return [
        os.path.relpath(source.records[i]["image"], source.records[0]["image"] + "/../..") for i in range(len(source))
    ]


@pytest.fixture
def split_folders(tmp_path):
    root = tmp_path / "photos"
    for split, classes in (("train", ("cat", "dog", "ant")), ("validation", ("cat", "dog")), ("test", ("dog",))):
        for kind in classes:
            for number, suffix in enumerate(("png", "JPG", "bmp", "webp")):
                write(root / split / kind / f"{number}.{suffix}", color=(40 * number, 100, 200))
            (root / split / kind / "notes.txt").write_text("not an image")
            (root / split / kind / ".hidden.png").write_text("not an image")
    return root


def test_split_folders(split_folders):
    train, held_out, test = (folder(split_folders, split) for split in SPLITS)
    assert train.class_names == held_out.class_names == test.class_names == ("ant", "cat", "dog")
    assert [train[i]["label"] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert [held_out[i]["label"] for i in range(8)] == [1] * 4 + [2] * 4 and [test[i]["label"] for i in range(4)] == [
        2
    ] * 4
    assert names(test) == ["dog/0.png", "dog/1.JPG", "dog/2.bmp", "dog/3.webp"]
    np.testing.assert_array_equal(train[2]["image"], np.full((4, 6, 3), (80, 100, 200), np.uint8))
    assert train.channels == 3 and train.mean == (0.485, 0.456, 0.406)
    assert len({source.fingerprint for source in (train, held_out, test)}) == 3


def test_class_folders_are_split_by_the_hash_of_names(tmp_path):
    root = tmp_path / "photos"
    for number in range(300):
        write(root / "ab"[number % 2] / f"{number}.bmp", size=(1, 1))
    found = {split: names(folder(root, split)) for split in SPLITS}
    assert len(sum(found.values(), [])) == len(set(sum(found.values(), []))) == 300
    assert 220 < len(found["train"]) < 260 and 15 < len(found["validation"]) < 45 and 15 < len(found["test"]) < 45
    assert found["test"][:3] == ["a/100.bmp", "a/106.bmp", "a/112.bmp"], "the same for ever"
    before = folder(root, "train").fingerprint
    write(root / "a" / "new.bmp")
    after = {split: names(folder(root, split)) for split in SPLITS}
    assert sum(len(set(after[split]) - set(found[split])) for split in SPLITS) == 1, "others stay where they were"
    moved = root.rename(tmp_path / "elsewhere")
    (moved / "a" / "new.bmp").unlink()
    assert folder(moved, "train").fingerprint == before


def test_files_are_verified_once(split_folders, tmp_path, monkeypatch):
    calls = []
    check = image_folder._verify_file
    monkeypatch.setattr(image_folder, "_verify_file", lambda file: (calls.append(file), check(file))[1])
    folder(split_folders, "train")
    folder(split_folders, "train")
    assert len(calls) == 12
    folder(split_folders, "train", tmp_path / "other")
    assert len(calls) == 24
    os.utime(split_folders / "train" / "cat" / "0.png", ns=(1, 1))
    folder(split_folders, "train")
    assert len(calls) == 36


def test_unreadable_images_are_named(split_folders):
    bad = split_folders / "train" / "cat" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(bad)
    for content in (b"not an image", bad.read_bytes()[:2000], b""):
        bad.write_bytes(content)
        for _ in range(2):  # a failure is not recorded as a success
            with pytest.raises(InputError) as caught:
                folder(split_folders, "train")
            message = str(caught.value)
            assert message.startswith(f"cannot read image '{bad}' (")
            assert "remove it" in message and "\n" not in message


def opened(root, split, capsys, **options):
    """Returns (the source, what is said to be left out, with names below the root)."""
    found = image_source("image_folder", split=split, paths=str(root), cache_dir=root.parent / "c", **options)
    return found, capsys.readouterr().err.replace(f"{root}/", "")


def test_folders_of_a_class_are_read_to_their_depth(tmp_path, capsys):
    root = tmp_path / "photos"
    for name in ("cat/a/b/1.png", "cat/2.tif", "cat/a/3.TIFF", "dog/4.gif", "dog/x/5.ppm", "dog/x/6.jp2"):
        write(root / "train" / name, size=(4, 4))
    for name in ("cat/a/notes.txt", "list.csv", "dog/.hidden.png"):
        (root / "train" / name).write_text("not an image")
    (root / "readme.md").write_text("not an image")
    (root / "extra").mkdir()
    os.mkfifo(root / "train" / "dog" / "7.png")
    train, words = opened(root, "train", capsys)
    assert [train.records.status[place][0] for place in range(len(train))] == [
        "cat/2.tif",
        "cat/a/3.TIFF",
        "cat/a/b/1.png",
        "dog/4.gif",
        "dog/x/5.ppm",
        "dog/x/6.jp2",
    ]
    assert [train[place]["label"] for place in range(6)] == [0, 0, 0, 1, 1, 1]
    for place in range(6):
        np.testing.assert_allclose(train[place]["image"][0, 0], (10, 20, 30), atol=4)
    assert words.splitlines() == [
        f"data.paths: skipped in '{root}': folders of no split: 1 (extra); outside of class folders: 2 (readme.md, "
        "train/list.csv)",
        "data.paths: skipped in 'train': files of other types: 1 (train/cat/a/notes.txt); pipes, sockets and devices: 1 "
        "(train/dog/7.png)",
    ]
    assert opened(root, "train", capsys)[1] == "", "what is said once need not be said again"
    assert opened(root, "train", capsys, progress=False)[1] == ""


def test_images_behind_links(tmp_path, capsys):
    root, far = tmp_path / "photos", tmp_path / "far"
    write(far / "cats" / "1.png")
    write(far / "2.png")
    write(root / "dog" / "3.png")
    (root / "cat").symlink_to(far / "cats")
    (root / "dog" / "two.png").symlink_to("../../far/2.png")
    (root / "dog" / "again.png").symlink_to("3.png")
    (root / "dog" / "up").symlink_to("..")
    (root / "gone").symlink_to("nowhere")
    every = [
        name
        for split in SPLITS
        for name, *_ in image_folder._ImageFiles(root, ("cat", "dog"), split, (split,), False).status
    ]
    assert sorted(every) == ["cat/1.png", "dog/3.png", "dog/two.png"]
    split = next(split for split in SPLITS if "dog/3.png" in names(folder(root, split)))
    words = opened(root, split, capsys)[1]
    assert "outside of class folders: 1 (gone)" in words
    assert "links to files already found: 1 (dog/again.png); links to parent folders: 1 (dog/up)" in words
    (root / "fox").symlink_to("dog")
    with pytest.raises(
        InputError, match=r"'.*photos/fox' holds no images of its own .*links to files already found: \d"
    ):
        folder(root, split)


def test_split_folders_in_any_case(split_folders):
    fingerprints = [folder(split_folders, split).fingerprint for split in SPLITS]
    for before, after in (("train", "Train"), ("validation", "VAL"), ("test", "Test")):
        (split_folders / before).rename(split_folders / after)
    assert [folder(split_folders, split).fingerprint for split in SPLITS] == fingerprints
    (split_folders / "bus" / "night").mkdir(parents=True)
    with pytest.raises(InputError, match="has 'Train' and 'bus', which may be splits or classes: name splits in lower"):
        folder(split_folders, "train")
    (split_folders / "Train").rename(split_folders / "train")
    assert folder(split_folders, "test").fingerprint == fingerprints[2], "one in lower case says what the others are"
    write(split_folders / "TEST" / "dog" / "0.png")
    with pytest.raises(InputError, match="has TEST and Test, and only one can be the test split: name it 'test'"):
        folder(split_folders, "test")


def test_a_class_may_be_called_like_a_split(tmp_path):
    for class_name in ("Train", "Plane"):
        for number in range(40):
            write(tmp_path / "photos" / class_name / f"{number}.png", size=(1, 1))
    (tmp_path / "photos" / "Train" / "empty").mkdir()
    assert folder(tmp_path / "photos", "train").class_names == ("Plane", "Train")
    for name in ("training", "dev/old", "ops"):
        write(tmp_path / "more" / name / "0.png")
    assert folder(tmp_path / "more", "train").class_names == ("dev", "ops", "training")


def test_names_of_images_need_not_be_utf8(tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    names = [os.fsdecode(b"\xff/%d\xfe.png" % number) for number in range(90)]
    write(root / "other" / "0.png", color=(255, 0, 0))
    for number, name in enumerate(names):
        write(root / name, color=(number, 0, 0))
    found = [folder(root, split) for split in SPLITS]
    assert all(source.class_names == ("other", "\udcff") for source in found)
    reds = sorted(source[place]["image"][0, 0, 0] for source in found for place in range(len(source)))
    assert reds == [*range(90), 255]


def test_values_of_unknown_range_are_refused(tmp_path):
    root = tmp_path / "photos"
    write(root / "train" / "a" / "1.png")
    write(root / "train" / "b" / "1.png")
    for mode, value, words in (
        ("F", 2.5, "its floating-point values range from 2.5 to 2.5, but the known range is 0 to 1"),
        ("F", -0.5, "its floating-point values range from -0.5"),
        ("F", float("nan"), "its floating-point values range from nan"),
        ("I", 70000, "its integers range from 70000 to 70000, but the known range is 0 to 65535"),
    ):
        write(root / "train" / "a" / "2.tif", mode, value)
        with pytest.raises(InputError, match=f"cannot read image '.*2.tif' .{words}"):
            folder(root, "train")


def test_photos_stand_upright_as_the_camera_marked_them(tmp_path):
    """The mark turns a picture whose left half is dark into one whose upper half is."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 4:] = 200
    path = tmp_path / "photos" / "train" / "a" / "1.png"
    path.parent.mkdir(parents=True)
    mark = Image.Exif()
    mark[0x0112] = 6  # turn by a quarter, clockwise
    Image.fromarray(pixels).save(path, exif=mark)
    write(tmp_path / "photos" / "train" / "b" / "1.png")
    image = folder(tmp_path / "photos", "train")[0]["image"]
    assert image.shape == (8, 4, 3) and (image[:4] == 0).all() and (image[4:] == 200).all()
    np.testing.assert_array_equal(image_base.read_rgb(str(path), "one", "none"), pixels)


@pytest.mark.parametrize(
    "names, words",
    [
        (["cat/train", "cat/valid", "dog/train"], r"'\S+/cat' holds splits .*put splits above classes"),
        (
            ["old/train/cat", "old/test/cat", "new/cat"],
            r"'\S+/old' holds splits .*give that folder as data.paths if it is",
        ),
        (
            ["zip/inner/cat", "zip/inner/dog"],
            r"holds one class, 'zip', .*: give '\S+/zip/inner' as data.paths.*\(cat, dog, ",
        ),
        (["train/pets/cat", "train/pets/dog", "test/pets/cat"], r"'\S+/train' holds one class, 'pets'"),
        (["training/0", "training/1"], r"holds one class, 'training', .*: give '\S+/training' as data.paths"),
        (
            ["cat"],
            "holds one class, 'cat', and a model needs at least two: give a folder with two class folders or more",
        ),
    ],
)
def test_folders_one_level_off_are_refused(tmp_path, names, words):
    for name in names:
        write(tmp_path / "photos" / name / "0.png")
    with pytest.raises(InputError, match=words):
        folder(tmp_path / "photos", "train")
    (tmp_path / "photos" / "labels.csv").write_text("file,label\n")
    if names == ["cat"]:
        with pytest.raises(
            InputError, match=r"needs at least two: give '\S+/photos/labels.csv' as data.paths, if it names"
        ):
            folder(tmp_path / "photos", "train")


def test_splits_below_a_folder_that_holds_them_alone_are_found(split_folders, tmp_path, capsys):
    fingerprints = [folder(split_folders, split).fingerprint for split in SPLITS]
    split_folders.rename(tmp_path / "inner")
    (tmp_path / "pets" / "v2").mkdir(parents=True)
    (tmp_path / "inner").rename(tmp_path / "pets" / "v2" / "data")
    found = [
        image_source("image_folder", split=split, paths=str(tmp_path / "pets"), cache_dir=tmp_path) for split in SPLITS
    ]
    assert [source.fingerprint for source in found] == fingerprints
    assert f"the splits are in '{tmp_path / 'pets/v2/data'}', which is read" in capsys.readouterr().err


def labels_of(root, table, text, split="train"):
    """Writes a table of labels; returns (file, class) of a split."""
    (root / table).write_text(text)
    found = folder(root / table, split, cache=root.parent / "c")
    return [
        (os.path.relpath(found.records[i]["image"], root), found.class_names[found[i]["label"]])
        for i in range(len(found))
    ]


@pytest.mark.parametrize("kind", ["folders", "table"])
def test_without_a_validation_split_a_tenth_of_the_training_images_is_held_out(tmp_path, capsys, kind):
    """The test split stays as it is, and training does not see what is held out."""
    rows = [("file", "label", "split")]
    for split, count in (("training", 60), ("testing", 5)):
        for name in ("cat", "dog"):
            for number in range(count):
                write(tmp_path / "all" / split / name / f"{number}.png")
                rows.append((f"{split}/{name}/{number}.png", name, split.removesuffix("ing")))
    (tmp_path / "all" / "labels.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    root = tmp_path / "all" / "labels.csv" if kind == "table" else tmp_path / "all"
    opened = {}
    for split in SPLITS:
        source = image_source("image_folder", split=split, paths=str(root), cache_dir=tmp_path / "c", progress=True)
        opened[split] = {source.records[number]["image"] for number in range(len(source))}
    assert not opened["train"] & opened["validation"] and len(opened["train"] | opened["validation"]) == 120
    assert 4 <= len(opened["validation"]) <= 22 and all("/training/" in file for file in opened["validation"])
    assert len(opened["test"]) == 10 and all("/testing/" in file for file in opened["test"])
    assert capsys.readouterr().err.count("has no validation split: a tenth of the training images") == 1


def test_a_table_names_the_classes(tmp_path):
    root, rows = tmp_path / "photos", [(f"{number:02d}", "cat" if number % 3 else "dog") for number in range(40)]
    for number, _ in rows:
        write(root / "images" / f"{number}.png", size=(1, 1))
    ids = "id,breed\n" + "".join(f"{number},{kind}\n" for number, kind in rows)  # names without folder and suffix
    found = {split: labels_of(root, "labels.csv", ids, split) for split in SPLITS}
    assert sorted(sum(found.values(), [])) == [(f"images/{number}.png", kind) for number, kind in rows]
    assert len(found["train"]) > 25 and found["validation"] and found["test"]
    before = folder(root / "labels.csv", "train")
    assert sum(before.images_by_class) == len(before) and before.images_by_class[0] > before.images_by_class[1]
    swapped = labels_of(root, "labels.csv", ids.replace("cat", "x").replace("dog", "cat").replace("x", "dog"))
    assert len(swapped) and folder(root / "labels.csv", "train").fingerprint != before.fingerprint
    split = "\ufeffFile;Label;Split\n" + "".join(
        f"images/{number}.png;{kind};{('train', 'valid')[number > '30']}\n" for number, kind in rows
    )
    assert [len(labels_of(root, "split.csv", split, name)) for name in ("train", "validation")] == [31, 9]
    for text, words in (
        ("photo,label\n00.png,cat\n", "no column of the files; its header names photo, label: rename one to 'file'"),
        ("file,kind\n00.png,cat\n", "no column of the classes"),
        ("file,label\n99.png,cat\n", "line 2 of .* names the image '99.png', and .* has none"),
        ("file,label\n00.png,cat\n00,dog\n", "line 3 of .* names 'images/00.png' again, with another class"),
        ("file,label\n00.png,cat,dog\n", "line 2 of .* has 3 cells, and the header 2"),
        ("file,label\n00.png,\n", "line 2 of .* names no class"),
        ("file,label,split\n00.png,cat,half\n", "has the split 'half': expected train, validation, test"),
        ("file,label\n00.png,cat\n", "names one class, 'cat'"),
        ("file,label\n", "has no rows"),
    ):
        with pytest.raises(InputError, match=words):
            labels_of(root, "bad.csv", text)


def test_splits_with_alternative_names(split_folders):
    fingerprints = [folder(split_folders, split).fingerprint for split in SPLITS]
    current = SPLITS
    for renamed in (
        ("training", "valid", "testing"),
        ("train", "dev", "eval"),
        ("train", "eval", "test"),
        ("train", "val", "Testing"),
    ):
        for before, after in zip(current, [f"{name}_" for name in renamed], strict=True):
            (split_folders / before).rename(split_folders / after)
        for name in renamed:
            (split_folders / f"{name}_").rename(split_folders / name)
        assert [folder(split_folders, split).fingerprint for split in SPLITS] == fingerprints, renamed
        current = renamed


def test_every_class_has_an_image_for_training(tmp_path):
    root, counts = tmp_path / "photos", {"big": 30} | {f"rare{number}": 2 for number in range(60)}
    for kind, count in counts.items():
        for number in range(count):
            write(root / kind / f"{number}.bmp", size=(1, 1))
    found = {split: names(folder(root, split)) for split in SPLITS}
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 150
    assert {name.partition("/")[0] for name in found["train"]} == set(counts)
    moved = [name for name in found["train"] if hash_fraction(f"image_folder {name}") < image_folder.VALIDATION_END]
    assert 0 < len(moved) < 8 and all(name.startswith("rare") for name in moved), (
        "others stay where their hash puts them"
    )
    assert len(found["test"]) > 5 < len(found["validation"])


def test_thumbnails_are_no_images(tmp_path, capsys):
    root = tmp_path / "photos"
    for number in range(40):
        write(root / "ab"[number % 2] / f"{number}.png")
        write(root / "ab"[number % 2] / "@eaDir" / f"{number}.png" / "SYNOPHOTO_THUMB_M.jpg")
    for name in ("#recycle", "__MACOSX", ".thumbnails"):
        write(root / name / "0.png")
    train, words = opened(root, "train", capsys)
    assert train.class_names == ("a", "b")
    assert len(train) + sum(len(folder(root, split)) for split in ("validation", "test")) == 40
    assert (
        "thumbnail and system folders: 2 (#recycle, __MACOSX)" in words and "hidden folders: 1 (.thumbnails)" in words
    )
    assert "thumbnail and system folders: 2 (a/@eaDir, b/@eaDir)" in words


def png_of_16_bits(file, values):
    """Writes what Pillow cannot: colours uint16[H, W, 3] as a PNG."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in parts
        )
    )


def test_grey_values_of_10_or_12_bits(tmp_path):
    root = tmp_path / "photos"
    for kind, value in (("a", 1000), ("b", 3999)):
        (root / "train" / kind).mkdir(parents=True)
        Image.fromarray(np.full((4, 6), value, np.uint16)).save(root / "train" / kind / "0.png")
    for _ in range(2):
        with pytest.raises(
            InputError, match="go up to 3999 of 65535, .* set data.bit_depth=12 .* if 4095 is white, or 16"
        ):
            folder(root, "train")
    with pytest.raises(InputError, match="go up to 3999, beyond the 1023 of data.bit_depth=10"):
        folder(root, "train", bit_depth=10)
    scaled, plain = folder(root, "train", bit_depth=12), folder(root, "train", bit_depth=16)
    assert [scaled[place]["image"][0, 0, 0] for place in range(2)] == [62, 249]
    assert [plain[place]["image"][0, 0, 0] for place in range(2)] == [4, 16]
    assert scaled.fingerprint != plain.fingerprint
    Image.fromarray(np.full((4, 6), 60_000, np.uint16)).save(root / "train" / "a" / "1.png")
    assert folder(root, "train").fingerprint, "one that uses the range shows that all have 16 bits"


def test_colours_of_which_the_upper_bits_are_empty(tmp_path):
    root = tmp_path / "photos"
    write(root / "train" / "b" / "0.png")
    png_of_16_bits(root / "train" / "a" / "0.png", np.full((4, 6, 3), 3999, np.uint16))
    for bits in (0, 12):
        with pytest.raises(InputError, match="colours of 16 bits in .* go up to about 3855 of 65535, .*convert"):
            folder(root, "train", bit_depth=bits)
    png_of_16_bits(root / "train" / "a" / "0.png", np.full((4, 6, 3), 39_990, np.uint16))
    assert folder(root, "train")[0]["image"][0, 0].tolist() == [156, 156, 156]


def test_a_complete_image_that_is_too_large_is_called_that(tmp_path):
    write(tmp_path / "photos" / "train" / "b" / "0.png")
    (tmp_path / "photos" / "train" / "a").mkdir()
    Image.new("1", (14_000, 14_000)).save(tmp_path / "photos" / "train" / "a" / "scan.png")
    with pytest.raises(InputError) as caught:
        folder(tmp_path / "photos", "train")
    assert "scan.png' is too large: it has more than 178,956,970 pixels" in str(caught.value)
    assert "replace it" not in str(caught.value) and "attack" not in str(caught.value)
    assert folder(tmp_path / "photos", "train", max_pixels=14_000 * 14_000).images_by_class == (1, 1)
    with pytest.raises(
        InputError, match="more than 196,000,000 pixels, the limit.* raise the limit with data.max_pixels"
    ):
        image_base.limit_pixels(14_000 * 14_000)
        Image.new("1", (14_000, 14_001)).save(tmp_path / "photos" / "train" / "a" / "scan.png")
        folder(tmp_path / "photos", "train", max_pixels=14_000 * 14_000)
    image_base.limit_pixels(0)


def test_labels_in_the_names_of_others(split_folders):
    test, train = folder(split_folders, "test"), folder(split_folders, "train")
    other = train.relabel(("fox", "dog", "cat", "ant"), "them")
    assert [other[place]["label"] for place in range(12)] == [3] * 4 + [2] * 4 + [1] * 4
    assert other.classes == 4 and len(other) == len(train)
    assert test.relabel(("ant", "cat", "dog"), "us")[0]["label"] == 2
    with pytest.raises(
        InputError, match="folder/train has classes cat, dog, unknown to them, whose class is ant: give"
    ):
        train.relabel(("ant",), "them")
    with pytest.raises(InputError, match="has class ant, unknown to them, whose classes are .*, 4 and 3 more: give"):
        train.relabel(("cat", "dog", *map(str, range(11, 0, -1))), "them")
    broken = ImageSource("made", ("a", "b"), 1, (0.5,), (0.5,), "f", [{"image": np.zeros((1, 1, 1)), "label": 2}])
    with pytest.raises(InputError, match="image 0 of made has label 2, expected 0 to 1"):
        broken.relabel(("a", "b", "c"), "them")[0]


def test_photo_damaged_behind_its_header_is_named_when_it_is_read(split_folders):
    bad = split_folders / "train" / "ant" / "0.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(bad)
    bad.write_bytes(bad.read_bytes()[:2000])
    source = folder(split_folders, "train")
    with pytest.raises(InputError, match="cannot read image '.*ant/0.jpg' .*truncated.*: replace it"):
        source[names(source).index("ant/0.jpg")]


def test_folder_errors(split_folders, tmp_path):
    with pytest.raises(InputError, match="needs one path in data.paths, got 0: give a directory ROOT/"):
        image_source("image_folder", split="train", cache_dir=tmp_path)
    with pytest.raises(InputError, match="there is no folder '.*nowhere'; give a folder with images: ROOT/"):
        folder(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="'.*empty' holds no class folders; expected ROOT/"):
        folder(tmp_path / "empty", "train")
    (split_folders / "train" / "bee").mkdir()
    with pytest.raises(
        InputError, match="class folder '.*train/bee' holds no images .*: put images into it, or remove it"
    ):
        folder(split_folders, "train")
    write(split_folders / "test" / "cow" / "0.png")
    for split in SPLITS:
        with pytest.raises(InputError, match="class folder '.*test/cow' has no counterpart in '.*train'"):
            folder(split_folders, split)
    (split_folders / "test").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="has train and validation, but no class folders in '.*test': make them"):
        folder(split_folders, "test")
    (split_folders / "train").rename(tmp_path / "gone too")
    with pytest.raises(InputError, match="has validation, but no class folders in '.*train'"):
        folder(split_folders, "validation")
    with pytest.raises(InputError, match="has validation, but no class folders in '.*train'"):
        folder(split_folders, "train")
    for kind in ("cat", "dog"):
        write(tmp_path / "few" / kind / "0.png")
    with pytest.raises(InputError, match="split 'test' of '.*few' is empty: give more images"):
        folder(tmp_path / "few", "test")


def test_every_kind_of_image_becomes_rgb(tmp_path):
    kinds = tmp_path / "photos" / "train" / "a"
    write(kinds / "cmyk.jpg", "CMYK", (0, 255, 255, 0), (16, 16))
    write(kinds / "grey.png", "L", 100)
    write(kinds / "bits.png", "1", 1)
    write(kinds / "alpha.png", "RGBA", (10, 20, 30, 128))
    write(kinds / "grey_alpha.png", "LA", (100, 128))
    palette = Image.new("RGB", (6, 4), (10, 20, 30)).quantize(4)
    palette.save(kinds / "palette.png")
    palette.save(kinds / "palette_clear.png", transparency=bytes([128, 255]))
    write(kinds / "hidden.png", "RGBA", (10, 20, 30, 0))
    write(kinds / "float.tif", "F", 0.5)
    Image.fromarray(np.full((4, 6), 100 * 257, np.uint16)).save(kinds / "sixteen.png")
    write(tmp_path / "photos" / "train" / "b" / "grey.png", "L", 100)
    expected = {
        "cmyk.jpg": (255, 0, 0),
        "grey.png": (100,) * 3,
        "bits.png": (255,) * 3,
        "alpha.png": (132, 137, 142),  # over white
        "grey_alpha.png": (177,) * 3,
        "hidden.png": (255,) * 3,
        "float.tif": (128,) * 3,
        "palette.png": (10, 20, 30),
        "palette_clear.png": (132, 137, 142),
        "sixteen.png": (100,) * 3,
    }
    source = folder(tmp_path / "photos", "train")
    for place, name in enumerate(names(source)[:-1]):
        image = source[place]["image"]
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        np.testing.assert_allclose(image[0, 0], expected.pop(name[2:]), atol=3)
    assert not expected


def test_large_images_are_read_at_a_part_of_their_size(tmp_path, monkeypatch):
    """Means of blocks of pixels, strip by strip; upright; of JPEG the decoder itself gives fewer pixels."""
    draw = np.random.default_rng(0).integers(0, 256, (45, 62, 4), np.uint8)
    image = Image.fromarray(draw, "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    image.save(tmp_path / "a.png", exif=exif)
    image.convert("RGB").resize((400, 400)).save(tmp_path / "a.jpg")
    whole = image_base.read_rgb(str(tmp_path / "a.png"), "one", "none")
    monkeypatch.setattr(image_base, "MAX_READ_PIXELS", 400)
    found = image_base.read_rgb(str(tmp_path / "a.png"), "one", "none")
    np.testing.assert_array_equal(found, np.asarray(Image.fromarray(whole).reduce(3)))
    upright = image_base.read_rgb(str(tmp_path / "a.png"), "one", "none", upright=True)
    np.testing.assert_array_equal(upright, np.rot90(found, -1))
    assert image_base.read_rgb(str(tmp_path / "a.jpg"), "one", "none").size <= 3 * 400
