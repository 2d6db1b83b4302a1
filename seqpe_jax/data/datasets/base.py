"""What all builders share: TFDS without TensorFlow and without noise, errors kept as they were, versions told apart."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
import tqdm

from seqpe_jax.data.cache import locked, staged_directory
from seqpe_jax.data.paths import check_regular_file, warn
from seqpe_jax.errors import InputError
from seqpe_jax.files import atomic_write, cache_root, parse_json

SPLITS = ("train", "validation", "test")
FILE_SIZES_FILE = "sizes_of_files.json"  # of a prepared data set


class CachedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set written once, in an order that is kept, and read at random.

    A subclass says what it reads (`sources`), yields things by split (`contents`) and makes examples of one (`examples`).

    Args:
      paths: what the user points at; its meaning is the subclass's.
      downloads: folder for what is fetched; none = the cache's.
      **kwargs: of TFDS, e.g. `data_dir`.
    """

    ITEM_NAME = "examples"  # of a progress bar, and of the message that there are none

    def __init__(self, *, paths: Iterable[str] = (), downloads: str | os.PathLike = "", **kwargs):
        self.paths = tuple(os.fspath(path) for path in paths)
        self.downloads = pathlib.Path(downloads) if downloads else cache_root() / "downloads"
        self.input_error: InputError | None = None
        self._progress = True
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        """Returns one line per thing read, which changes when its content does.

        Raises:
          InputError: nothing there to read.
        """
        raise NotImplementedError

    @classmethod
    def skipped(cls, paths: tuple[str, ...]) -> str:
        """Returns what lies under the paths but is not read, in words; "" where that is nothing. Raises: as `sources`."""
        return ""

    def features(self) -> tfds.features.FeaturesDict:
        """Returns the fields of an example."""
        raise NotImplementedError

    def contents(self) -> Mapping[str, Iterable[Any]]:
        """Returns what there is to read, by split; lazily, as the data may be large.

        Raises:
          InputError: nothing there to read, or it is damaged.
        """
        raise NotImplementedError

    def examples(self, content: Any) -> Iterable[dict]:
        """Returns the examples that one thing of `contents` makes."""
        raise NotImplementedError

    @classmethod
    def source_key(cls, paths: tuple[str, ...]) -> str:
        """Returns 16 hex digits that name this version of the builder reading these sources."""
        identity = [cls.name, str(cls.VERSION), cls.sources(tuple(os.fspath(path) for path in paths))]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def prepare(self, *, progress: bool = True) -> None:
        """Writes the data set to `data_dir`; long work shows its progress on stderr, and nothing is said on stdout.

        Raises:
          InputError: as `contents`.
        """
        self._progress = progress
        try:
            tfds.disable_progress_bar()  # TFDS's own comes at once, one line per split and shard
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
        """TFDS adds words of its own to what a generator raises; this keeps the message as it was."""
        try:
            yield
        except InputError as error:
            self.input_error = InputError(str(error))
            raise


def prepare_dataset(
    kind: type[CachedBuilder], paths: tuple[str, ...], target: pathlib.Path, downloads: pathlib.Path, progress: bool
) -> CachedBuilder:
    """Returns a builder whose data set lies ready in `target`, after writing it there if need be.

    Safe to call from several processes at once; a killed one leaves nothing that is read later.

    Raises:
      InputError: as `CachedBuilder.contents`, or `target` cannot be written.
    """
    if not _is_complete(kind, paths, downloads, target):
        with locked(target) as alone:
            if not _is_complete(kind, paths, downloads, target):
                if target.is_dir():
                    warn(f"{target} is incomplete, as if it had been cleaned in part: it is prepared again")
                with staged_directory(target, alone=alone) as folder:
                    builder = kind(paths=paths, downloads=downloads, data_dir=folder)
                    builder.prepare(progress=progress)
                    atomic_write(folder / FILE_SIZES_FILE, json.dumps(_sizes(folder)) + "\n")
    return kind(paths=paths, downloads=downloads, data_dir=target)


def _is_complete(
    kind: type[CachedBuilder], paths: tuple[str, ...], downloads: pathlib.Path, target: pathlib.Path
) -> bool:
    """Whether all files of a prepared data set are there, as long as they were; older ones do not say how long."""
    if not target.is_dir():
        return False
    try:
        if parse_json((target / FILE_SIZES_FILE).read_bytes()) != _sizes(target):
            return False
    except FileNotFoundError:
        pass
    except ValueError:
        return False
    builder = kind(paths=paths, downloads=downloads, data_dir=target)
    if not all(pathlib.Path(builder.data_dir, name).is_file() for name in ("dataset_info.json", "features.json")):
        return False
    splits = builder.info.splits
    filled = [split for split in splits.values() if split.num_examples]
    return bool(filled) and all(pathlib.Path(file).is_file() for split in filled for file in split.filepaths)


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    """Bytes of the files of a prepared data set, by their paths in its folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FILE_SIZES_FILE]
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def file_signature(file: pathlib.Path, name: str) -> str:
    """Returns a line that changes when the file does: name, place, size in bytes and time of change.

    Raises:
      InputError: it is no file, or not there.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check data.paths") from error
    check_regular_file(status.st_mode, str(file))
    return f"{name} {file} {status.st_size} {status.st_mtime_ns}"


def hash_fraction(name: str) -> float:
    """Returns a number in [0, 1) that depends on `name` only, the same everywhere and for ever."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
