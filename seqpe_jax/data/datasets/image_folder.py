"""Your own images: one folder per class, read where they lie."""

import concurrent.futures
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm
from PIL import Image

from seqpe_jax.data import registry
from seqpe_jax.data.cache import locked
from seqpe_jax.data.datasets.base import SPLITS, hash_fraction
from seqpe_jax.data.datasets.image_base import (
    MAX_CLASSES_SHOWN,
    ImageSource,
    fingerprint_of,
    read_rgb,
    verify_image,
)
from seqpe_jax.data.paths import (
    HIDDEN_FOLDER,
    SYSTEM_FOLDER,
    Skipped,
    absolute_path,
    is_system_folder,
    resolve_paths,
    warn,
)
from seqpe_jax.errors import InputError
from seqpe_jax.files import atomic_write, parse_json

HEADER_ONLY = {
    "BUFR",
    "EPS",
    "GRIB",
    "HDF5",
    "MPEG",
    "WMF",
}  # Pillow knows them, but needs other programs for their pixels
Image.init()
SUFFIXES = tuple(
    sorted(end for end, form in Image.registered_extensions().items() if form in Image.OPEN.keys() - HEADER_ONLY)
)
TEST, VALIDATION = 0.1, 0.2  # upper ends of the range of `hash_fraction`, where the images lie in one folder per class
CAMERA_BIT_DEPTHS = (8, 10, 12, 14)  # bits that cameras give, in files of 16
MIN_FULL_RANGE = 2 ** CAMERA_BIT_DEPTHS[-1]  # of 65536 values; where none is larger, 64 of 256 grey levels are left
THREADS = 8  # that look at files at once: on network disks the wait is long
HOW_TO_REPAIR = "replace it by a whole PNG or JPEG file, or remove it"
FOLDER_LAYOUT = (
    "ROOT/{train,validation,test}/CLASS/*.png (jpg, tif, gif, ...), or ROOT/CLASS/*, which is split 80/10/10"
)
OUTSIDE_CLASS_FOLDERS, NO_SPLIT_FOLDERS = "outside of class folders", "folders of no split"  # kinds of what is left out
EVAL = "eval"  # the split that no other folder is: validation, else test
SPLIT_FOLDER_NAMES = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test",),
}  # splits wherever they stand
# As other programs call them; they are splits where they hold class folders, and a training and a held-out one are there.
ALTERNATIVE_SPLIT_NAMES = {"train": ("training",), "validation": ("valid", "dev", EVAL), "test": ("testing", EVAL)}
SPLIT_NAMES = {split: SPLIT_FOLDER_NAMES[split] + ALTERNATIVE_SPLIT_NAMES[split] for split in SPLITS}
HELD_OUT_NAMES = {*SPLIT_NAMES["validation"], *SPLIT_NAMES["test"]}


class ImageFolder:
    """Photos as files, RGB: ROOT/{train,validation,test}/CLASS/*, or ROOT/CLASS/* split by the hash of CLASS/FILE.

    Of ROOT/CLASS every class has an image for training. A class is all that lies below its folder, in any form that
    Pillow reads; links are followed, and each real file of a split is read once (see `data.files`). Labels are the places
    of the class names in sorted order, the same in all splits. Nothing is copied; each file is looked at once (Pillow's
    `verify`), and that is remembered until a name, size or time of change differs.
    """

    name = "image_folder"

    @classmethod
    def open_split(
        cls,
        split: str,
        *,
        paths: tuple[str, ...],
        datasets: pathlib.Path,
        cache: pathlib.Path,
        progress: bool,
        bit_depth: int = 0,
    ) -> ImageSource:
        """Returns a split, as `ImageBuilder.open_split` does.

        Args:
          bit_depth: bits of the grey values in files of 16 bits; 0 = 16, and files that use fewer are refused.
        """
        del datasets
        registry.get(cls.name).check_paths(paths)
        root = pathlib.Path(absolute_path(os.path.expanduser(paths[0])))
        folder, class_names, beside = _layout(root, split)
        files = _Files(folder, class_names, split if folder == root else None, progress)
        if progress:
            for place, skipped in ((root, beside), (folder, files.skipped)):
                if str(skipped):
                    warn(f"data.paths: left out of '{place}': {skipped}")
        if not len(files):
            raise InputError(
                f"data.paths: split '{split}' of '{root}' is empty: give more images, or make the folders train, "
                "validation and test yourself"
            )
        title = f"{cls.name}/{split}"
        done = cache / "verified" / f"{cls.name}-{fingerprint_of(str(folder), files.status)}"
        _check_depth(_verify(files, done, title, progress), bit_depth, title)
        narrow = [bit_depth] if bit_depth not in (0, 16) else []  # which gives the same files other pixels
        return ImageSource(
            name=title,
            class_names=class_names,
            channels=3,
            mean=registry.PHOTO_MEAN,
            std=registry.PHOTO_STD,
            fingerprint=fingerprint_of(class_names, [(name, size) for name, size, _ in files.status], *narrow),
            records=files,
            decode=lambda file: read_rgb(file, f"'{file}'", HOW_TO_REPAIR, upright=True, bit_depth=bit_depth),
        )


class _Files(Sequence):
    """The image files of a split, by class and name: [i] -> {"image": path, "label": int}.

    Args:
      split: the part of the files to keep, by the hash of CLASS/FILE; None = all of them.

    Attributes:
      status: CLASS/FILE, size in bytes and time of change of each file; left_out: what lies there, but is not read.
    """

    def __init__(self, folder: pathlib.Path, class_names: tuple[str, ...], split: str | None, progress: bool):
        self._folder = folder
        there = [name for name in class_names if (folder / name).is_dir()]  # a held-out split need not have every class
        title = f"list images of {split or folder.name}" if progress else ""
        found = resolve_paths([str(folder / name) for name in there], suffixes=SUFFIXES, title=title)
        self.skipped = found.skipped
        above = os.path.join(folder, "")
        files: dict[str, list[str]] = {name: [] for name in there}
        for file in found.files:
            name = file.removeprefix(above)
            files[name.partition(os.sep)[0]].append(name)
        for name in there:
            if not files[name]:
                left = f", left out: {self.skipped}" if str(self.skipped) else ""
                raise InputError(
                    f"data.paths: class folder '{folder / name}' holds no images of its own (png, jpg, tif, gif, ...)"
                    f"{left}: put images into it, or remove it"
                )
        self.status: list[tuple[str, int, int]] = []
        labels: list[int] = []
        for label, kind in enumerate(class_names):
            kept = files.get(kind, [])
            if split is not None:
                splits = _splits(kept)
                kept = [name for name in kept if splits[name] == split]
            self.status += map(self._described, kept)
            labels += [label] * len(kept)
        self._labels = np.array(labels, np.int32)

    def _described(self, name: str) -> tuple[str, int, int]:
        try:
            status = os.stat(os.path.join(self._folder, name))
        except OSError as error:
            raise InputError(f"cannot read '{self._folder / name}' ({error.strerror}): check data.paths") from error
        return name, status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return len(self.status)

    def __getitem__(self, index: int) -> Mapping:
        return {"image": os.path.join(self._folder, self.status[index][0]), "label": int(self._labels[index])}


def _layout(root: pathlib.Path, split: str) -> tuple[pathlib.Path, tuple[str, ...], Skipped]:
    """Returns (folder of the split's class folders, class names, what lies beside).

    The folder is `root` where there are no split folders.
    """
    if not root.is_dir():
        raise InputError(f"data.paths: there is no folder '{root}'; give a folder with images: {FOLDER_LAYOUT}")
    top, skipped = _folders(root), Skipped()
    named = _split_folders(root, top)
    folders = {name: root / named.get(name, name) for name in SPLITS}
    present = {name: found for name, folder in folders.items() if folder.is_dir() and (found := _folders(folder))}
    if not present:
        if not top:
            raise InputError(f"data.paths: '{root}' holds no class folders; expected {FOLDER_LAYOUT}")
        _check_classes(root, top, split)
        _outside(root, skipped)
        return root, top, skipped
    beside = [name for name in top if name not in named.values()]
    if beside and not any(named[name] in SPLIT_FOLDER_NAMES[name] for name in present):
        raise InputError(
            f"data.paths: '{root}' has '{named[next(iter(present))]}' beside '{beside[0]}', which may be a split or a "
            f"class: name splits in lower case (train, validation, test), or move the others away; expected {FOLDER_LAYOUT}"
        )
    for needed in ("train", split):
        if needed not in present:
            raise InputError(
                f"data.paths: '{root}' has {' and '.join(present)}, but no class folders in '{folders[needed]}': make "
                "them, or put the class folders into the root, which is then split 80/10/10"
            )
    class_names = present["train"]
    _check_classes(folders["train"], class_names, split)
    for name, others in present.items():
        unknown = sorted(set(others) - set(class_names))
        if unknown:
            raise InputError(
                f"data.paths: class folder '{folders[name] / unknown[0]}' has no counterpart in '{folders['train']}': "
                "every class needs training images; add some, or remove the folder"
            )
    for name in beside:
        skipped.add(NO_SPLIT_FOLDERS, str(root / name))
    for folder in (root, folders[split]):
        _outside(folder, skipped)
    return folders[split], class_names, skipped


def _split_folders(root: pathlib.Path, top: tuple[str, ...]) -> dict[str, str]:
    """Returns the names of the split folders that there are, by split.

    Args:
      top: names of the folders in `root`.

    Raises:
      InputError: several folders may be the same split.
    """
    found = {}
    for split, names in SPLIT_FOLDER_NAMES.items():
        if (name := next((name for name in names if name in top), None)) is not None:
            found[split] = name

    def holds_classes(name: str) -> bool:
        return bool(_folders(root / name)) and not _has_images(root / name)

    for split in SPLITS:
        if split in found:
            continue
        others = [name for name in top if name.lower() in SPLIT_NAMES[split] and name not in found.values()]
        others = [name for name in others if holds_classes(name)]
        others = [name for name in others if name.lower() != EVAL] or others
        if len(others) > 1:
            raise InputError(
                f"data.paths: '{root}' has {' and '.join(others)}, and only one can be the {split} split: name it '{split}'"
            )
        if others:
            found[split] = others[0]
    if "train" not in found or len(found) == 1:  # then those that have another name are classes
        found = {split: name for split, name in found.items() if name.lower() in SPLIT_FOLDER_NAMES[split]}
    return found


def _check_classes(folder: pathlib.Path, class_names: tuple[str, ...], split: str) -> None:
    """Refuses folders that are no classes: those that hold splits, and one alone, which tells nothing from nothing.

    Of a known run, a single class may be evaluated, so that one alone is refused where a model is trained.

    Raises:
      InputError: names the folder to give instead.
    """
    divided = [name for name in class_names if _holds_splits(folder / name)]
    if divided and len(class_names) == 1:
        raise InputError(
            f"data.paths: '{folder / divided[0]}' holds splits ({', '.join(_folders(folder / divided[0]))}) and is no "
            f"class: give that folder as data.paths, laid out as {FOLDER_LAYOUT}"
        )
    if divided:
        raise InputError(
            f"data.paths: class folder '{folder / divided[0]}' holds splits ({', '.join(_folders(folder / divided[0]))}): "
            f"give that folder as data.paths if it is the data set, or put splits above classes: {FOLDER_LAYOUT}"
        )
    if len(class_names) > 1 or split != "train":
        return
    inner = folder / class_names[0]
    while len(below := _folders(inner)) == 1 and not _has_images(inner):
        inner = inner / below[0]
    cure = "give a folder with two class folders or more"
    if len(below) > 1:
        cure = f"give '{inner}' as data.paths, if its folders ({', '.join(below[:MAX_CLASSES_SHOWN])}, ...) are the classes"
    raise InputError(
        f"data.paths: '{folder}' holds one class, '{class_names[0]}', and a model needs two to tell apart: {cure}; "
        f"expected {FOLDER_LAYOUT}"
    )


def _holds_splits(folder: pathlib.Path) -> bool:
    """Returns whether a folder holds a training split and a held-out one, by their names."""
    names = [name for name in _names(folder) if name.lower() in HELD_OUT_NAMES or name.lower() in SPLIT_NAMES["train"]]
    held = {name.lower() for name in names if os.path.isdir(folder / name)}
    return bool(held & HELD_OUT_NAMES) and bool(held & set(SPLIT_NAMES["train"]))


def _folders(folder: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the folders in a folder that may be splits or classes, sorted."""
    return tuple(name for name in _names(folder) if not is_system_folder(name) and os.path.isdir(folder / name))


def _has_images(folder: pathlib.Path) -> bool:
    return any(name.lower().endswith(SUFFIXES) and os.path.isfile(folder / name) for name in _names(folder))


def _outside(folder: pathlib.Path, skipped: Skipped) -> None:
    """Adds what lies in a folder of class folders and is none: files, hidden folders, those of the system."""
    for name in _names(folder, hidden=True):
        path = str(folder / name)
        if not os.path.isdir(path):
            if not name.startswith("."):
                skipped.add(OUTSIDE_CLASS_FOLDERS, path)
        elif is_system_folder(name):
            skipped.add(SYSTEM_FOLDER, path)
        elif name.startswith("."):
            skipped.add(HIDDEN_FOLDER, path)


def _names(folder: pathlib.Path, hidden: bool = False) -> list[str]:
    """Returns the names in a folder, sorted, with or without those that are hidden."""
    try:
        return sorted(name for name in os.listdir(folder) if hidden or not name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read '{folder}' ({error.strerror}): check data.paths") from error


def _splits(names: list[str]) -> dict[str, str]:
    """Returns the split of each image of a class, by CLASS/FILE.

    A hash of the name decides, so that an image stays where it is when others come or go. Of a class that would have no
    image for training, the one nearest to that range is trained on.
    """
    places = {name: hash_fraction(f"image_folder {name}") for name in names}
    splits = {
        name: "test" if place < TEST else "validation" if place < VALIDATION else "train"
        for name, place in places.items()
    }
    if names and "train" not in splits.values():
        splits[max(names, key=lambda name: (places[name], name))] = "train"
    return splits


def _verify(files: _Files, done: pathlib.Path, title: str, progress: bool) -> dict[str, int]:
    """Looks at every file once; the file `done` says that it was, and what was found.

    Returns:
      The largest value in the files of 16 bits, in 0..65535, of "grey" and of "colours" where there are any.

    Raises:
      InputError: names the first file that is no image.
    """
    if (known := _found(done)) is not None:
        return known
    with locked(done):
        if (known := _found(done)) is not None:
            return known
        largest: dict[str, int] = {}
        bar = tqdm.tqdm(total=len(files), desc=f"verify {title}", unit=" images", delay=2.0, disable=not progress)
        with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(files), 1000):  # a million at once would take a gigabyte
                group = range(first, min(first + 1000, len(files)))
                for found in pool.map(_check, [files[place]["image"] for place in group]):
                    bar.update()
                    if found is not None:
                        largest[found[0]] = max(found[1], largest.get(found[0], 0))
        atomic_write(done, json.dumps(largest))
        return largest


def _found(done: pathlib.Path) -> dict[str, int] | None:
    """Returns what a file of `_verify` says; None where there is none, or an older one, which is empty."""
    try:
        content = done.read_text()
    except FileNotFoundError:
        return None
    return parse_json(content) if content else None


def _check(file: str) -> tuple[str, int] | None:
    return verify_image(file, HOW_TO_REPAIR)


def _check_depth(largest: dict[str, int], bit_depth: int, title: str) -> None:
    """Refuses values that use a small part of 16 bits, as those of cameras of 10 or 12 bits do: most would become black.

    Args:
      largest: see `_verify`.

    Raises:
      InputError: says which bit depth they fit, or that one given is too small, or cannot be had.
    """
    grey, colours = largest.get("grey"), largest.get("colours")
    if colours is not None and (bit_depth not in (0, 16) or bit_depth == 0 and colours < MIN_FULL_RANGE):
        raise InputError(
            f"data.paths: colours of 16 bits in {title} go up to about {colours} of 65535, and only their upper 8 bits can "
            "be read: convert these files to 8 bits, scaled to the full range (data.bit_depth=16 takes the upper bits as "
            "they are, others are for grey values)"
        )
    if grey is not None and bit_depth == 0 and grey < MIN_FULL_RANGE:
        fits = next(bits for bits in CAMERA_BIT_DEPTHS if grey < 2**bits)
        raise InputError(
            f"data.paths: grey values of 16 bits in {title} go up to {grey} of 65535, so that nearly all would become "
            f"black: set data.bit_depth={fits} (evaluate: --bit-depth={fits}) if {2**fits - 1} is white, or 16 if 65535 is"
        )
    if grey is not None and grey >= 2 ** (bit_depth or 16):
        raise InputError(
            f"data.paths: grey values in {title} go up to {grey}, beyond the {2**bit_depth - 1} of "
            f"data.bit_depth={bit_depth}: give the bits that they have"
        )
