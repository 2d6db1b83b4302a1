"""Your own images: one folder per class, read where they lie."""

import concurrent.futures
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm
from PIL import Image

from seqpe_jax.data.builders.base import SPLITS, chance
from seqpe_jax.data.builders.labelled import PHOTO_MEAN, PHOTO_STD, ImageSource, digest, read_rgb, readable
from seqpe_jax.data.cache import locked
from seqpe_jax.data.files import LeftOut, absolute, find, tell
from seqpe_jax.errors import InputError

HEADER_ONLY = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them, but needs other programs for their pixels
Image.init()
SUFFIXES = tuple(
    sorted(end for end, form in Image.registered_extensions().items() if form in Image.OPEN.keys() - HEADER_ONLY)
)
TEST, VALIDATION = 0.1, 0.2  # upper ends of the range of `chance`, where the images lie in one folder per class
THREADS = 8  # that look at files at once: on network disks the wait is long
CURE = "replace it by a whole PNG or JPEG file, or remove it"
LAYOUT = "ROOT/{train,validation,test}/CLASS/*.png (jpg, tif, gif, ...), or ROOT/CLASS/*, which is split 80/10/10"
OUTSIDE, NO_SPLIT = "outside of class folders", "folders of no split"  # kinds of what is left out


class ImageFolder:
    """Photos as files, RGB: ROOT/{train,validation,test}/CLASS/*, or ROOT/CLASS/* split by the hash of CLASS/FILE.

    A class is all that lies below its folder, in any form that Pillow reads; links are followed, and each real file of a
    split is read once (see `data.files`). Labels are the places of the class names in sorted order, the same in all
    splits. Nothing is copied; each file is looked at once (Pillow's `verify`), and that is remembered until a name, size
    or time of change differs.
    """

    name = "image_folder"

    @classmethod
    def open_split(
        cls, split: str, *, paths: tuple[str, ...], datasets: pathlib.Path, cache: pathlib.Path, progress: bool
    ) -> ImageSource:
        """Returns a split, as `ImageBuilder.open_split` does."""
        del datasets
        if len(paths) != 1:
            raise InputError(f"data.name='image_folder' needs one folder in data.paths, got {len(paths)}: {LAYOUT}")
        root = pathlib.Path(absolute(os.path.expanduser(paths[0])))
        folder, class_names, beside = _layout(root, split)
        files = _Files(folder, class_names, split if folder == root else None, progress)
        if progress:
            for place, left_out in ((root, beside), (folder, files.left_out)):
                if str(left_out):
                    tell(f"data.paths: left out of '{place}': {left_out}")
        if not len(files):
            raise InputError(
                f"data.paths: split '{split}' of '{root}' is empty: give more images, or make the folders train, "
                "validation and test yourself"
            )
        title = f"{cls.name}/{split}"
        _verify(files, cache / "verified" / f"{cls.name}-{digest(str(folder), files.status)}", title, progress)
        return ImageSource(
            name=title,
            class_names=class_names,
            channels=3,
            mean=PHOTO_MEAN,
            std=PHOTO_STD,
            fingerprint=digest(class_names, [(name, size) for name, size, _ in files.status]),
            records=files,
            decode=lambda file: read_rgb(file, f"'{file}'", CURE, upright=True),
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
        found = find([str(folder / name) for name in there], suffixes=SUFFIXES, title=title)
        self.left_out = found.left_out
        above = os.path.join(folder, "")
        files: dict[str, list[str]] = {name: [] for name in there}
        for file in found.files:
            name = file.removeprefix(above)
            files[name.partition(os.sep)[0]].append(name)
        for name in there:
            if not files[name]:
                left = f", left out: {self.left_out}" if str(self.left_out) else ""
                raise InputError(
                    f"data.paths: class folder '{folder / name}' holds no images of its own (png, jpg, tif, gif, ...)"
                    f"{left}: put images into it, or remove it"
                )
        self.status: list[tuple[str, int, int]] = []
        labels: list[int] = []
        for label, kind in enumerate(class_names):
            kept = [name for name in files.get(kind, ()) if split in (None, _split(name))]
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


def _layout(root: pathlib.Path, split: str) -> tuple[pathlib.Path, tuple[str, ...], LeftOut]:
    """Returns (folder of the split's class folders, class names, what lies beside).

    The folder is `root` where there are no split folders.
    """
    if not root.is_dir():
        raise InputError(f"data.paths: there is no folder '{root}'; give a folder with images: {LAYOUT}")
    top, left_out = _folders(root), LeftOut()
    named = {name: folder for name in SPLITS if (folder := _split_folder(root, top, name))}
    folders = {name: root / named.get(name, name) for name in SPLITS}
    present = {name: found for name, folder in folders.items() if folder.is_dir() and (found := _folders(folder))}
    if not present:
        if not top:
            raise InputError(f"data.paths: '{root}' holds no class folders; expected {LAYOUT}")
        _outside(root, left_out)
        return root, top, left_out
    beside = [name for name in top if name not in named.values()]
    if beside and not any(named[name].islower() for name in present):
        raise InputError(
            f"data.paths: '{root}' has '{named[next(iter(present))]}' beside '{beside[0]}', which may be a split or a "
            f"class: name splits in lower case (train, validation, test), or move the others away; expected {LAYOUT}"
        )
    for needed in ("train", split):
        if needed not in present:
            raise InputError(
                f"data.paths: '{root}' has {' and '.join(present)}, but no class folders in '{folders[needed]}': make "
                "them, or put the class folders into the root, which is then split 80/10/10"
            )
    class_names = present["train"]
    for name, others in present.items():
        unknown = sorted(set(others) - set(class_names))
        if unknown:
            raise InputError(
                f"data.paths: class folder '{folders[name] / unknown[0]}' has no counterpart in '{folders['train']}': "
                "every class needs training images; add some, or remove the folder"
            )
    for name in beside:
        left_out.add(NO_SPLIT, str(root / name))
    for folder in (root, folders[split]):
        _outside(folder, left_out)
    return folders[split], class_names, left_out


def _split_folder(root: pathlib.Path, top: tuple[str, ...], split: str) -> str | None:
    """Returns the name of a split's folder, if there is one: in lower case, or in any where it holds but class folders."""
    names = (split, "val") if split == "validation" else (split,)  # as ImageNet's folders are often called
    for name in names:
        if name in top:
            return name
    others = [name for name in top if name.lower() in names and _folders(root / name) and not _pictures(root / name)]
    if len(others) > 1:
        raise InputError(
            f"data.paths: '{root}' has {' and '.join(others)}, and only one can be the {split} split: name it '{split}'"
        )
    return others[0] if others else None


def _folders(folder: pathlib.Path) -> tuple[str, ...]:
    return tuple(name for name in _names(folder) if os.path.isdir(folder / name))


def _pictures(folder: pathlib.Path) -> bool:
    return any(name.lower().endswith(SUFFIXES) and os.path.isfile(folder / name) for name in _names(folder))


def _outside(folder: pathlib.Path, left_out: LeftOut) -> None:
    for name in _names(folder):
        if not os.path.isdir(folder / name):
            left_out.add(OUTSIDE, str(folder / name))


def _names(folder: pathlib.Path) -> list[str]:
    """Returns the names in a folder that are not hidden, sorted."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read '{folder}' ({error.strerror}): check data.paths") from error


def _split(name: str) -> str:
    """Returns the split of an image, from CLASS/FILE."""
    place = chance(f"image_folder {name}")
    return "test" if place < TEST else "validation" if place < VALIDATION else "train"


def _verify(files: _Files, done: pathlib.Path, title: str, progress: bool) -> None:
    """Looks at every file's header once; the empty file `done` says that it was.

    Raises:
      InputError: names the first file that is no image.
    """
    if done.exists():
        return
    with locked(done):
        if done.exists():
            return
        bar = tqdm.tqdm(total=len(files), desc=f"verify {title}", unit=" images", delay=2.0, disable=not progress)
        with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(files), 1000):  # a million at once would take a gigabyte
                group = range(first, min(first + 1000, len(files)))
                for _ in pool.map(_check, [files[place]["image"] for place in group]):
                    bar.update()
        done.touch()


def _check(file: str) -> None:
    with readable(f"'{file}'", CURE), Image.open(file) as image:
        if image.mode[0] in "IF":  # values whose range may be unknown are looked at themselves
            read_rgb(file, f"'{file}'", CURE)
        else:
            image.verify()
