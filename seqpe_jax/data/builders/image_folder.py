"""Your own images: one folder per class, read where they lie."""

import concurrent.futures
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm
from PIL import Image

from seqpe_jax.data.builders.base import SPLITS, chance
from seqpe_jax.data.builders.images import PHOTO_MEAN, PHOTO_STD, ImageSource, digest, read_rgb, readable
from seqpe_jax.data.cache import locked
from seqpe_jax.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
TEST, VALIDATION = 0.1, 0.2  # upper ends of the range of `chance`, where the images lie in one folder per class
THREADS = 8  # that look at files at once: on network disks the wait is long
CURE = "replace it by a whole PNG or JPEG file, or remove it"
LAYOUT = "ROOT/{train,validation,test}/CLASS/*.png (jpg, jpeg, bmp, webp), or ROOT/CLASS/*, which is split 80/10/10"


class ImageFolder:
    """Photos as files, RGB: ROOT/{train,validation,test}/CLASS/*, or ROOT/CLASS/* split by the hash of CLASS/FILE.

    Labels are the places of the class names in sorted order, the same in all splits. Nothing is copied; each file is
    looked at once (Pillow's `verify`), and that is remembered until a name, size or time of change differs.
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
        root = pathlib.Path(paths[0]).expanduser().absolute()
        folder, class_names = _layout(root, split)
        files = _Files(folder, class_names, split if folder == root else None, progress)
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
            decode=lambda file: read_rgb(file, f"'{file}'", CURE),
        )


class _Files(Sequence):
    """The image files of a split, by class and name: [i] -> {"image": path, "label": int}.

    Args:
      split: the part of the files to keep, by the hash of CLASS/FILE; None = all of them.
    Attributes:
      status: CLASS/FILE, size in bytes and time of change of each file.
    """

    def __init__(self, folder: pathlib.Path, class_names: tuple[str, ...], split: str | None, progress: bool):
        self._folder = folder
        self.status: list[tuple[str, int, int]] = []
        labels: list[int] = []
        title = f"list images of {split or folder.name}"
        bar = tqdm.tqdm(class_names, title, unit=" classes", delay=2.0, disable=not progress)
        for label, name in enumerate(bar):
            found = _images(folder / name)
            if found is None:
                continue  # a held-out split need not have every class
            if not found:
                raise InputError(
                    f"data.paths: class folder '{folder / name}' holds no images ({', '.join(SUFFIXES)}): put images into "
                    "it, or remove it"
                )
            kept = [(f"{name}/{file}", *rest) for file, *rest in found if split in (None, _split(f"{name}/{file}"))]
            self.status += kept
            labels += [label] * len(kept)
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.status)

    def __getitem__(self, index: int) -> Mapping:
        return {"image": os.path.join(self._folder, self.status[index][0]), "label": int(self._labels[index])}


def _layout(root: pathlib.Path, split: str) -> tuple[pathlib.Path, tuple[str, ...]]:
    """Returns (folder of the split's class folders, class names); the folder is `root` where there are no split folders."""
    if not root.is_dir():
        raise InputError(f"data.paths: there is no folder '{root}'; give a folder with images: {LAYOUT}")
    folders = {name: root / name for name in SPLITS}
    if not folders["validation"].is_dir():
        folders["validation"] = root / "val"  # as ImageNet's folders are often called
    present = {name: _folders(folder) for name, folder in folders.items() if _folders(folder)}
    if not present:
        class_names = _folders(root)
        if not class_names:
            raise InputError(f"data.paths: '{root}' holds no class folders; expected {LAYOUT}")
        return root, class_names
    for needed in ("train", split):
        if needed not in present:
            raise InputError(
                f"data.paths: '{root}' has {' and '.join(present)}, but no class folders in '{root / needed}': make them, "
                "or put the class folders into the root, which is then split 80/10/10"
            )
    class_names = present["train"]
    for name, others in present.items():
        unknown = sorted(set(others) - set(class_names))
        if unknown:
            raise InputError(
                f"data.paths: class folder '{folders[name] / unknown[0]}' has no counterpart in '{folders['train']}': "
                "every class needs training images; add some, or remove the folder"
            )
    return folders[split], class_names


def _folders(folder: pathlib.Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")))
    except OSError as error:
        raise InputError(f"cannot read '{folder}' ({error.strerror}): check data.paths") from error


def _images(folder: pathlib.Path) -> list[tuple[str, int, int]] | None:
    """Returns (name, size, time of change) of the images of a class folder, sorted; None where there is no folder."""
    if not folder.is_dir():
        return None
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file():
                    status = entry.stat()
                    found.append((entry.name, status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise InputError(f"cannot read '{error.filename or folder}' ({error.strerror}): check data.paths") from error
    return sorted(found)


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
        image.verify()
