"""Base class of all data sets: TFDS without TensorFlow and without its output, prepared once in the cache."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from seqpe_jax.data.cache import locked, staged_directory
from seqpe_jax.data.paths import check_regular_file, warn
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.files import atomic_write, cache_root, parse_json

SPLITS = ("train", "validation", "test")
Options = tuple[tuple[str, Any], ...]  # (field of `data`, value), of values that are not the default
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FILE_SIZES_FILE = "sizes_of_files.json"  # of a prepared data set: bytes of each of its files


class CachedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set that is written once, in a fixed order, for random access.

    A subclass implements `sources` (identity of the input), `features`, `contents` (items by split) and `examples` (the
    records of one item). Its class name gives `data.name` and the name of the cache folder.

    Attributes:
      ITEM_NAME: name of an item, for progress bars and messages.

    Args:
      paths: `data.paths`; its meaning is the subclass's.
      options: values of the fields of `data` that the registry lists for the data set; () = their defaults.
      downloads: folder of downloaded files; "" = that of the cache.
      **kwargs: of TFDS, e.g. `data_dir`.
    """

    ITEM_NAME = "examples"

    def __init__(
        self,
        *,
        paths: Iterable[str] = (),
        options: Options = (),
        downloads: str | os.PathLike = "",
        **kwargs,
    ):
        self.paths = tuple(os.fspath(path) for path in paths)
        self.options = dict(options)
        self.downloads = pathlib.Path(downloads) if downloads else cache_root() / "downloads"
        self.input_error: InputError | None = None
        self._progress = True
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        """Returns one line per input, which changes when its content does.

        Raises:
          InputError: there is no input.
        """
        raise NotImplementedError

    @classmethod
    def skipped(cls, paths: tuple[str, ...]) -> str:
        """Describes the files under `paths` that are not read; "" = none. Raises: InputError as `sources`."""
        return ""

    def features(self) -> tfds.features.FeaturesDict:
        """Returns the fields of an example."""
        raise NotImplementedError

    def contents(self) -> Mapping[str, Iterable[Any]]:
        """Returns the items of each split, lazily, since the data may be large.

        Raises:
          InputError: there is no input, or it is damaged.
        """
        raise NotImplementedError

    def examples(self, content: Any) -> Iterable[dict]:
        """Returns the examples of one item of `contents`."""
        raise NotImplementedError

    @classmethod
    def source_key(cls, paths: tuple[str, ...], options: Options = ()) -> str:
        """Returns 16 hex digits that identify this version of the class with its input and options."""
        identity = [cls.name, str(cls.VERSION), cls.sources(tuple(os.fspath(path) for path in paths)), *options]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def prepare(self, *, progress: bool = True) -> None:
        """Writes the data set to `data_dir`, with a progress bar on stderr and nothing on stdout.

        Raises:
          InputError: see `contents`.
        """
        self._progress = progress
        try:
            tfds.disable_progress_bar()  # it shows at once, with a line for each split and shard
            with contextlib.redirect_stdout(io.StringIO()):
                self.download_and_prepare()
        except Exception:
            if self.input_error is not None:
                raise self.input_error from None
            raise

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=self.features(), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        del dl_manager
        splits = {}
        with self._keep_input_error():
            for split, contents in self.contents().items():
                examples = (example for content in contents for example in self.examples(content))
                first = next(examples, None)  # TFDS refuses a split without examples
                if first is not None:
                    splits[split] = self._generate_examples(
                        itertools.chain([first], examples), f"prepare {self.name}/{split}"
                    )
            if not splits:
                where = ", ".join(self.paths) or "its files"
                raise InputError(f"data set '{self.name}' is empty: no {self.ITEM_NAME} in {where}")
        return splits

    def _generate_examples(self, examples: Iterable[dict], title: str) -> Iterator[tuple[int, dict]]:
        with self._keep_input_error():
            yield from enumerate(
                tqdm.tqdm(examples, title, unit=f" {self.ITEM_NAME}", delay=2.0, disable=not self._progress)
            )

    @contextlib.contextmanager
    def _keep_input_error(self):
        """Remembers an InputError before TFDS adds its own words to the message."""
        try:
            yield
        except InputError as error:
            self.input_error = InputError(str(error))
            raise


def check_split(split: str) -> None:
    """Raises InputError for an unknown split."""
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}'.{suggest(split, SPLITS)}")


def datasets_folder(data_dir: str | os.PathLike, cache_dir: str | os.PathLike) -> pathlib.Path:
    """Returns the folder of prepared data sets: `data_dir`, else that of the cache."""
    return pathlib.Path(data_dir).expanduser().absolute() if data_dir else cache_root(cache_dir) / "datasets"


def prepared_split(
    builder_class: type[CachedBuilder],
    split: str,
    key: str,
    paths: tuple[str, ...],
    data_dir: str | os.PathLike,
    cache_dir: str | os.PathLike,
    progress: bool,
    options: Options = (),
) -> Sequence[Mapping[str, Any]]:
    """Returns the records of a split, after preparing the data set where that is not done yet.

    Args:
      builder_class: class of the data set.
      split: "train", "validation" or "test".
      key: `builder_class.source_key(paths, options)`.
      paths: `data.paths`, local.
      data_dir: folder of prepared data sets; "" = that of the cache.
      cache_dir: folder of the cache; "" = the default one.
      progress: show a progress bar on stderr.
      options: see `CachedBuilder`.

    Raises:
      InputError: see `CachedBuilder.contents`; or the split has no records.
    """
    name = builder_class.name
    target = datasets_folder(data_dir, cache_dir) / f"{name}-{key}"
    builder = prepare_dataset(builder_class, paths, target, cache_root(cache_dir) / "downloads", progress, options)
    if split not in builder.info.splits:
        raise InputError(
            f"data set '{name}' has no {builder.ITEM_NAME} in split '{split}' (it has {', '.join(builder.info.splits)}): "
            "give more data in data.paths, or, where it is given as files, one whose name says the split"
        )
    return builder.as_data_source(split=split)


def prepare_dataset(
    builder_class: type[CachedBuilder],
    paths: tuple[str, ...],
    target: pathlib.Path,
    downloads: pathlib.Path,
    progress: bool,
    options: Options = (),
) -> CachedBuilder:
    """Returns a builder whose prepared data set is in `target`, after writing it there where necessary.

    Several processes may call it at once; a killed one leaves nothing that is read later.

    Raises:
      InputError: see `CachedBuilder.contents`; or `target` is not writable.
    """

    def builder(folder: pathlib.Path) -> CachedBuilder:
        return builder_class(paths=paths, options=options, downloads=downloads, data_dir=folder)

    def is_complete() -> bool:
        return _has_all_sizes(target) and _has_all_files(builder(target))

    if not is_complete():
        with locked(target) as alone:
            if not is_complete():
                if target.is_dir():
                    warn(f"{target} is incomplete, as if it had been cleaned in part: it is prepared again")
                with staged_directory(target, alone=alone) as folder:
                    builder(folder).prepare(progress=progress)
                    atomic_write(folder / FILE_SIZES_FILE, json.dumps(_file_sizes(folder)) + "\n")
    return builder(target)


def _has_all_sizes(target: pathlib.Path) -> bool:
    """True where the files of a prepared data set have the sizes they were written with; older ones list no sizes."""
    if not target.is_dir():
        return False
    try:
        return parse_json((target / FILE_SIZES_FILE).read_bytes()) == _file_sizes(target)
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def _has_all_files(builder: CachedBuilder) -> bool:
    """True where the description and all shards of a prepared data set exist."""
    if not all(pathlib.Path(builder.data_dir, name).is_file() for name in ("dataset_info.json", "features.json")):
        return False
    splits = [split for split in builder.info.splits.values() if split.num_examples]
    return bool(splits) and all(pathlib.Path(file).is_file() for split in splits for file in split.filepaths)


def _file_sizes(folder: pathlib.Path) -> dict[str, int]:
    """Returns the bytes of each file of a prepared data set, by its path in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FILE_SIZES_FILE]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def file_signature(file: pathlib.Path, name: str) -> str:
    """Returns a line that changes when the file does: name, path, size in bytes and modification time.

    Raises:
      InputError: it does not exist, or is no regular file.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check data.paths") from error
    check_regular_file(status.st_mode, str(file))
    return f"{name} {file} {status.st_size} {status.st_mtime_ns}"


def split_of_name(name: str) -> str | None:
    """Returns the split that a file's name or folder says; None where it says none, or several."""
    found = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def hash_fraction(name: str) -> float:
    """Returns a number in [0, 1) that depends on `name` only, on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
