"""A user's own images in class folders or with a table of labels, read in place: layout, splits, checks."""

import concurrent.futures
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

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
    limit_pixels,
    read_rgb,
    verify_image,
)
from seqpe_jax.data.datasets.image_labels import is_label_file, read_labels
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

# Pillow reads the headers of these, but needs other programs for their pixels.
HEADER_ONLY = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
Image.init()
SUFFIXES = tuple(
    sorted(end for end, form in Image.registered_extensions().items() if form in Image.OPEN.keys() - HEADER_ONLY)
)
# Of ROOT/CLASS/*: images with a smaller `hash_fraction` are the test split, the next ones the validation split.
TEST_END = 0.1
VALIDATION_END = 0.2
CAMERA_BIT_DEPTHS = (8, 10, 12, 14)  # in files of 16 bits
MIN_FULL_RANGE = 2 ** CAMERA_BIT_DEPTHS[-1]  # of 65536 values; below it, 64 of 256 grey levels would be left
THREADS = 8  # that check files at once: network disks are slow to answer
VERIFY_GROUP = 1000  # files that are submitted at once: a million would take a gigabyte
HOW_TO_REPAIR = "replace it by an undamaged PNG or JPEG file, or remove it"
FOLDER_LAYOUT = registry.get("image_folder").paths_hint.removeprefix("give a directory ")

NO_VALIDATION = "data.paths: '{}' has no validation split: a tenth of the training images of each class is held out, by the hash of CLASS/FILE"

# Reasons for skipping.
OUTSIDE_CLASS_FOLDERS = "outside of class folders"
NO_SPLIT_FOLDERS = "folders of no split"

# Names that always mean a split.
SPLIT_FOLDER_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
EVAL = "eval"  # means validation, or test if another folder is validation
# Names of other programs, which mean a split if they hold class folders and there is a training and a held-out split.
ALTERNATIVE_SPLIT_NAMES = {"train": ("training",), "validation": ("valid", "dev", EVAL), "test": ("testing", EVAL)}
SPLIT_NAMES = {split: SPLIT_FOLDER_NAMES[split] + ALTERNATIVE_SPLIT_NAMES[split] for split in SPLITS}
HELD_OUT_NAMES = {*SPLIT_NAMES["validation"], *SPLIT_NAMES["test"]}


class ImageFolder:
    """Image files as RGB: ROOT/{train,validation,test}/CLASS/*, or ROOT/CLASS/* split by the hash of CLASS/FILE, or a CSV file.

    Every class of ROOT/CLASS has an image for training. A class is all files below its folder, in every format that
    Pillow reads; links are followed, and each real file of a split is read once (`resolve_paths`). Labels are the
    indices of the class names in sorted order, equal in all splits. Nothing is copied; each file is verified once, and
    again when its name, size or modification time changes.
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
        max_pixels: int = 0,
    ) -> ImageSource:
        """Opens a split; arguments and errors as `ImageBuilder.open_split`.

        Args:
          bit_depth: bits of the grey values in files of 16 bits; 0 = 16, and files that use fewer are refused.
          max_pixels: largest image, in pixels; 0 = Pillow's limit.
        """
        del datasets
        registry.get(cls.name).check_paths(paths)
        root = pathlib.Path(absolute_path(os.path.expanduser(paths[0])))
        limit_pixels(max_pixels)
        if is_label_file(root):
            files: _Files = _labelled_files(root, split, progress)
            folder, class_names = root.parent, files.class_names
        else:
            root = _with_splits(root, progress)
            folder, class_names, outside, hashed = _find_layout(root, split)
            files = _ImageFiles(folder, class_names, split, hashed, progress)
            if progress:
                if split == "train" and hashed and folder != root:
                    warn(NO_VALIDATION.format(root))
                for where, skipped in ((root, outside), (folder, files.skipped)):
                    if str(skipped):
                        warn(f"data.paths: skipped in '{where}': {skipped}")
        if not len(files):
            raise InputError(
                f"data.paths: split '{split}' of '{root}' is empty: give more images, or say the splits yourself: in folders train, "
                "validation and test, or in a column 'split' of a CSV file of labels"
            )
        title = f"{cls.name}/{split}"
        verified = cache / "verified" / f"{cls.name}-{fingerprint_of(str(folder), files.status)}"
        _check_bit_depth(_verify(files, verified, title, progress), bit_depth, title)
        more = [bit_depth] if bit_depth not in (0, 16) else []  # gives the same files other pixels
        more += [files.labels.tolist()] if is_label_file(root) else []  # names of files do not say the classes
        return ImageSource(
            name=title,
            class_names=class_names,
            channels=3,
            mean=registry.PHOTO_MEAN,
            std=registry.PHOTO_STD,
            fingerprint=fingerprint_of(class_names, [(name, size) for name, size, _ in files.status], *more),
            records=files,
            decode=functools.partial(_decode_file, bit_depth=bit_depth, max_pixels=max_pixels),
            content=_read_file,
            images_by_class=tuple(np.bincount(files.labels, minlength=len(class_names)).tolist()),
        )

    @classmethod
    def decoder(cls, bit_depth: int = 0, max_pixels: int = 0) -> Callable[[bytes], np.ndarray]:
        """Returns a function that decodes the content of a prepared file to uint8[H, W, 3]."""
        return functools.partial(_decode_content, bit_depth=bit_depth, max_pixels=max_pixels)


def _decode_file(file: str, bit_depth: int, max_pixels: int) -> np.ndarray:
    limit_pixels(max_pixels)  # in a worker process, too
    return read_rgb(file, f"'{file}'", HOW_TO_REPAIR, upright=True, bit_depth=bit_depth)


def _decode_content(content: bytes, bit_depth: int, max_pixels: int) -> np.ndarray:
    limit_pixels(max_pixels)
    return read_rgb(io.BytesIO(content), "of data.prepared", HOW_TO_REPAIR, upright=True, bit_depth=bit_depth)


def _read_file(file: str) -> bytes:
    try:
        return pathlib.Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check data.paths") from error


class _Files(Sequence):
    """Image files of a split: [i] -> {"image": path, "label": int}.

    Args:
      folder: folder that their names are relative to.
      class_names: label -> name.
      names: names of the files.
      labels: label of each.

    Attributes:
      class_names: label -> name.
      status: (name, bytes, modification time in ns) of each file.
      labels: int32[N].
    """

    def __init__(self, folder: pathlib.Path, class_names: tuple[str, ...], names: Sequence[str], labels: Sequence[int]):
        self._folder, self.class_names = folder, class_names
        self.status: list[tuple[str, int, int]] = list(map(self._status, names))
        self.labels = np.array(labels, np.int32)

    def _status(self, name: str) -> tuple[str, int, int]:
        try:
            status = os.stat(os.path.join(self._folder, name))
        except OSError as error:
            raise InputError(f"cannot read '{self._folder / name}' ({error.strerror}): check data.paths") from error
        return name, status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return len(self.status)

    def __getitem__(self, index: int) -> Mapping:
        return {"image": os.path.join(self._folder, self.status[index][0]), "label": int(self.labels[index])}


def _labelled_files(table: pathlib.Path, split: str, progress: bool) -> _Files:
    """Returns the files of a split that a table of labels names; of a split that it does not name by the hash of CLASS/FILE.

    Raises:
      InputError: as `image_labels.read_labels`; a single class, or a class without images for training.
    """
    rows, has_splits = read_labels(table, SUFFIXES)
    class_names = tuple(sorted({label for _, label, _ in rows}))
    if len(class_names) < 2 and split == "train":
        raise InputError(f"data.paths: '{table}' names one class, '{class_names[0]}', and a model needs at least two")
    labels = {name: label for label, name in enumerate(class_names)}
    splits: dict[str, str | None] = {file: own for file, _, own in rows}
    has_validation = "validation" in splits.values()
    if has_splits and not has_validation and split == "train" and progress:
        warn(NO_VALIDATION.format(table))
    if not has_validation:
        for name in class_names:
            files = {f"{name}/{file}": file for file, label, own in rows if label == name and own in (None, "train")}
            parts = {files[key]: own for key, own in _assign_splits(list(files)).items()}
            splits |= {file: own for file, own in parts.items() if not has_splits or own == "validation"}
    trained = {label for file, label, _ in rows if splits[file] == "train"}
    if missing := sorted(set(class_names) - trained):
        raise InputError(f"data.paths: class '{missing[0]}' of '{table}' has no image in the train split: add some")
    chosen = [(file, labels[label]) for file, label, _ in rows if splits[file] == split]
    return _Files(table.parent, class_names, [file for file, _ in chosen], [label for _, label in chosen])


class _ImageFiles(_Files):
    """The image files of a split by class and name, CLASS/FILE.

    Args:
      folder: folder of the class folders.
      class_names: label -> name.
      split: the split.
      hashed: the parts of the files to take, by the hash of CLASS/FILE (`_assign_splits`); () = all of them.
      progress: show a progress bar on stderr.

    Attributes:
      skipped: files that are not read.
    """

    def __init__(
        self, folder: pathlib.Path, class_names: tuple[str, ...], split: str, hashed: tuple[str, ...], progress: bool
    ):
        self._folder = folder
        present = [name for name in class_names if (folder / name).is_dir()]  # a held-out split may lack classes
        title = f"list images of {split}" if progress else ""
        found = resolve_paths([str(folder / name) for name in present], suffixes=SUFFIXES, title=title)
        self.skipped = found.skipped
        files = self._by_class(found.files, present)
        chosen: list[str] = []
        labels: list[int] = []
        for label, class_name in enumerate(class_names):
            names = files.get(class_name, [])
            if hashed:
                splits = _assign_splits(names)
                names = [name for name in names if splits[name] in hashed]
            chosen += names
            labels += [label] * len(names)
        super().__init__(folder, class_names, chosen, labels)

    def _by_class(self, files: list[str], class_names: list[str]) -> dict[str, list[str]]:
        """Returns CLASS/FILE of all files, by class. Raises: InputError: a class has none."""
        prefix = os.path.join(self._folder, "")
        found: dict[str, list[str]] = {name: [] for name in class_names}
        for file in files:
            name = file.removeprefix(prefix)
            found[name.partition(os.sep)[0]].append(name)
        for name in class_names:
            if not found[name]:
                skipped = f", skipped: {self.skipped}" if str(self.skipped) else ""
                raise InputError(
                    f"data.paths: class folder '{self._folder / name}' holds no images of its own (png, jpg, tif, gif, ...)"
                    f"{skipped}: put images into it, or remove it"
                )
        return found


# Layout of folders.


def _with_splits(root: pathlib.Path, progress: bool) -> pathlib.Path:
    """Returns the folder that holds the splits, below folders that hold one folder alone; else `root`."""
    inner = root
    while len(below := _subfolders(inner) if inner.is_dir() else ()) == 1 and not _has_images(inner):
        inner = inner / below[0]
        if _holds_splits(inner):
            if progress:
                warn(f"data.paths: the splits are in '{inner}', which is read")
            return inner
    return root


def _find_layout(root: pathlib.Path, split: str) -> tuple[pathlib.Path, tuple[str, ...], Skipped, tuple[str, ...]]:
    """Finds the class folders of a split.

    Returns:
      (folder that holds them: `root` if there are no split folders; class names; what is skipped next to them; the parts of
      their files that are the split, by the hash of CLASS/FILE, () = all of them).
    """
    if not root.is_dir():
        raise InputError(f"data.paths: there is no folder '{root}'; give a folder with images: {FOLDER_LAYOUT}")
    top, skipped = _subfolders(root), Skipped()
    split_folders = _find_split_folders(root, top)
    folders = {name: root / split_folders.get(name, name) for name in SPLITS}
    present = {name: found for name, folder in folders.items() if folder.is_dir() and (found := _subfolders(folder))}
    if not present:
        if not top:
            raise InputError(f"data.paths: '{root}' holds no class folders; expected {FOLDER_LAYOUT}")
        _check_classes(root, top, split)
        _add_skipped(root, skipped)
        return root, top, skipped, (split,)
    others = [name for name in top if name not in split_folders.values()]
    if others and not any(split_folders[name] in SPLIT_FOLDER_NAMES[name] for name in present):
        raise InputError(
            f"data.paths: '{root}' has '{split_folders[next(iter(present))]}' and '{others[0]}', which may be splits or "
            "classes: name splits in lower case (train, validation, test), or move the others away; expected "
            f"{FOLDER_LAYOUT}"
        )
    _check_splits(root, folders, present, split)
    _check_classes(folders["train"], present["train"], split)
    for name in others:
        skipped.add(NO_SPLIT_FOLDERS, str(root / name))
    hashed: tuple[str, ...] = ()
    if set(present) == {"train", "test"} and split != "test":  # validation is held out of the training images
        folders["validation"] = folders["train"]
        hashed = ("validation",) if split == "validation" else ("train", "test")
    for folder in (root, folders[split]):
        _add_skipped(folder, skipped)
    return folders[split], present["train"], skipped, hashed


def _check_splits(
    root: pathlib.Path, folders: Mapping[str, pathlib.Path], present: Mapping[str, tuple[str, ...]], split: str
) -> None:
    """Refuses a missing split, and a held-out class without training images.

    Validation may be missing where there are training and test folders: it is then held out of the training images.

    Args:
      root: `data.paths`.
      folders: folder of each split.
      present: names of the class folders of each split that exists.
      split: split to read.

    Raises:
      InputError: names the folder.
    """
    for needed in ("train", split):
        if needed not in present and not (needed == "validation" and {"train", "test"} <= set(present)):
            raise InputError(
                f"data.paths: '{root}' has {' and '.join(present)}, but no class folders in '{folders[needed]}': make "
                "them, or put the class folders into the root, which is then split 80/10/10"
            )
    for name, class_names in present.items():
        unknown = sorted(set(class_names) - set(present["train"]))
        if unknown:
            raise InputError(
                f"data.paths: class folder '{folders[name] / unknown[0]}' has no counterpart in '{folders['train']}': "
                "every class needs training images; add some, or remove the folder"
            )


def _find_split_folders(root: pathlib.Path, top: tuple[str, ...]) -> dict[str, str]:
    """Returns the names of the split folders that exist, by split.

    Args:
      root: `data.paths`.
      top: names of the folders in it.

    Raises:
      InputError: several folders may be the same split.
    """
    found = {}
    for split, names in SPLIT_FOLDER_NAMES.items():
        if (name := next((name for name in names if name in top), None)) is not None:
            found[split] = name
    for split in SPLITS:
        if split not in found and (name := _find_alternative(root, top, split, set(found.values()))) is not None:
            found[split] = name
    if "train" not in found or len(found) == 1:  # then folders with alternative names are classes
        found = {split: name for split, name in found.items() if name.lower() in SPLIT_FOLDER_NAMES[split]}
    return found


def _find_alternative(root: pathlib.Path, top: tuple[str, ...], split: str, used: set[str]) -> str | None:
    """Returns the folder that has an alternative name of a split and holds class folders, or None."""
    names = [name for name in top if name.lower() in SPLIT_NAMES[split] and name not in used]
    names = [name for name in names if _subfolders(root / name) and not _has_images(root / name)]
    names = [name for name in names if name.lower() != EVAL] or names
    if len(names) > 1:
        raise InputError(
            f"data.paths: '{root}' has {' and '.join(names)}, and only one can be the {split} split: name it '{split}'"
        )
    return names[0] if names else None


def _check_classes(folder: pathlib.Path, class_names: tuple[str, ...], split: str) -> None:
    """Refuses folders that are no classes: those that hold splits, and a single one, which cannot be learnt.

    A single class may be evaluated with the classes of a run, so it is refused for training only.

    Raises:
      InputError: names the folder to give instead.
    """
    with_splits = [name for name in class_names if _holds_splits(folder / name)]
    if with_splits:
        inner = folder / with_splits[0]
        splits = ", ".join(_subfolders(inner))
        if len(class_names) == 1:
            raise InputError(
                f"data.paths: '{inner}' holds splits ({splits}) and is no class: give that folder as data.paths, laid out as "
                f"{FOLDER_LAYOUT}"
            )
        raise InputError(
            f"data.paths: class folder '{inner}' holds splits ({splits}): give that folder as data.paths if it is the data "
            f"set, or put splits above classes: {FOLDER_LAYOUT}"
        )
    if len(class_names) > 1 or split != "train":
        return
    inner = folder / class_names[0]
    while len(below := _subfolders(inner)) == 1 and not _has_images(inner):
        inner = inner / below[0]
    fix = "give a folder with two class folders or more"
    if tables := [name for name in _names(folder) if is_label_file(folder / name)]:
        fix = f"give '{folder / tables[0]}' as data.paths, if it names the classes"
    if len(below) > 1:
        fix = f"give '{inner}' as data.paths, if its folders ({', '.join(below[:MAX_CLASSES_SHOWN])}, ...) are the classes"
    raise InputError(
        f"data.paths: '{folder}' holds one class, '{class_names[0]}', and a model needs at least two: {fix}; expected "
        f"{FOLDER_LAYOUT}"
    )


def _holds_splits(folder: pathlib.Path) -> bool:
    """True if a folder holds a training and a held-out split, by their names."""
    names = [name for name in _names(folder) if name.lower() in HELD_OUT_NAMES or name.lower() in SPLIT_NAMES["train"]]
    found = {name.lower() for name in names if os.path.isdir(folder / name)}
    return bool(found & HELD_OUT_NAMES) and bool(found & set(SPLIT_NAMES["train"]))


def _subfolders(folder: pathlib.Path) -> tuple[str, ...]:
    """Returns the names of the folders in a folder that may be splits or classes, sorted."""
    return tuple(name for name in _names(folder) if not is_system_folder(name) and os.path.isdir(folder / name))


def _has_images(folder: pathlib.Path) -> bool:
    return any(name.lower().endswith(SUFFIXES) and os.path.isfile(folder / name) for name in _names(folder))


def _add_skipped(folder: pathlib.Path, skipped: Skipped) -> None:
    """Adds the entries of a folder of class folders that are no class folders: files, hidden folders, those of the system."""
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
    """Returns the names in a folder, sorted, by default without hidden ones."""
    try:
        return sorted(name for name in os.listdir(folder) if hidden or not name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read '{folder}' ({error.strerror}): check data.paths") from error


def _assign_splits(names: list[str]) -> dict[str, str]:
    """Returns the split of each image of a class, by CLASS/FILE.

    The hash of the name decides, so that an image keeps its split when others are added or removed. A class without an
    image for training gets the one nearest to that range.
    """
    fractions = {name: hash_fraction(f"image_folder {name}") for name in names}
    splits = {
        name: "test" if fraction < TEST_END else "validation" if fraction < VALIDATION_END else "train"
        for name, fraction in fractions.items()
    }
    if names and "train" not in splits.values():
        splits[max(names, key=lambda name: (fractions[name], name))] = "train"
    return splits


# Checks of files.


def _verify(files: _ImageFiles, verified: pathlib.Path, title: str, progress: bool) -> dict[str, int]:
    """Verifies every file once; the file `verified` records that it was, and the result.

    Returns:
      The largest value in the files of 16 bits, in 0..65535, of "grey" and of "colours" if there are any.

    Raises:
      InputError: names the first file that is no image.
    """
    if (known := _read_verified(verified)) is not None:
        return known
    with locked(verified):
        if (known := _read_verified(verified)) is not None:
            return known
        largest: dict[str, int] = {}
        bar = tqdm.tqdm(total=len(files), desc=f"verify {title}", unit=" images", delay=2.0, disable=not progress)
        with bar, concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for first in range(0, len(files), VERIFY_GROUP):
                group = range(first, min(first + VERIFY_GROUP, len(files)))
                for found in pool.map(_verify_file, [files[index]["image"] for index in group]):
                    bar.update()
                    if found is not None:
                        largest[found[0]] = max(found[1], largest.get(found[0], 0))
        atomic_write(verified, json.dumps(largest))
        return largest


def _read_verified(verified: pathlib.Path) -> dict[str, int] | None:
    """Returns the recorded result of `_verify`; None if there is none, or an empty one of an older version."""
    try:
        content = verified.read_text()
    except FileNotFoundError:
        return None
    return parse_json(content) if content else None


def check_images(files: Sequence[str]) -> None:
    """Checks that files are images, several at once. Raises: InputError: names the first that is none."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(files), VERIFY_GROUP):
            list(pool.map(_verify_file, files[first : first + VERIFY_GROUP]))


def _verify_file(file: str) -> tuple[str, int] | None:
    return verify_image(file, HOW_TO_REPAIR)


def _check_bit_depth(largest: dict[str, int], bit_depth: int, title: str) -> None:
    """Refuses values that use a small part of 16 bits, as those of cameras of 10 or 12 bits: most would become black.

    Args:
      largest: see `_verify`.
      bit_depth: `data.bit_depth`.
      title: title of the split, for the message.

    Raises:
      InputError: names the bit depth that fits, or says that the given one is too small or impossible.
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
            f"data.bit_depth={bit_depth}: give their real bit depth"
        )
