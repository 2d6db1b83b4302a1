"""A user's own text in any common format: plain text, JSON lines, Parquet, Arrow, ArrayRecord, TFDS; also compressed."""

import collections
import dataclasses
import functools
import importlib.util
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping

import tensorflow_datasets as tfds
import tqdm

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import SPLITS, file_signature, hash_fraction, split_of_name
from seqpe_jax.data.datasets.text_base import Documents, TextBuilder, split_document
from seqpe_jax.data.datasets.text_records import (
    HELD_OUT,
    MIN_FILES_TO_SPLIT_BY_FILE,
    SHARES,
    WHOLE,
    BadRecords,
    TextFile,
    detect,
    text_of,
    text_span,
)
from seqpe_jax.data.paths import ResolvedPaths, resolve_paths, warn
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.files import parse_json

TFDS_PREFIX = "tfds:"
DEFAULT_KEY = "text"
NOTES = "notes on records"  # reason for skipping
_NOTE = re.compile(r"(readme|license|licence|copying|citation|notice)\b.*|dataset_infos?\.json|.*\.md", re.IGNORECASE)
_RECORD_SUFFIX = re.compile(
    r".*\.(jsonl|ndjson|json|parquet|arrow|array_?record\S*)(\.(gz|zst|xz|bz2))?", re.IGNORECASE
)
# Files that `datasets.save_to_disk` adds to the Arrow files that one of them names.
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


class Text(TextBuilder):
    """Text files of any format that `text_records` reads, and TFDS data sets: each record, and each plain file, is a document.

    Splits: those that all names say (train-00.jsonl, valid/a.txt, a TFDS data set's); a held-out one that none says is a share
    of the training documents. Else about 90/5/5: 20 files or more are split by file; of fewer, records by hash, and each plain
    file into three spans.

    Args:
      paths: files, globs, folders, folders of `datasets.save_to_disk`, tfds:NAME[/CONFIG][:VERSION], or tfds:FILE.py with a TFDS
        builder.
      options: {"text_key": name of the field that holds the text of a record, "split_on": string after which a document of
        plain text ends}; such documents are split like records.
    """

    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        registry.get(cls.name).check_paths(paths)
        names = [f"{path} {_tfds_builder(path).info.full_name}" for path in paths if _is_tfds(path)]
        return names + [file_signature(file, name) for name, file in find_files(paths).items()]

    @classmethod
    def input_bytes(cls, paths: tuple[str, ...]) -> int:
        sizes = [int(_tfds_builder(path).info.download_size or 0) for path in paths if _is_tfds(path)]
        return sum(sizes) + sum(file.stat().st_size for file in find_files(paths).values())

    @classmethod
    def skipped(cls, paths: tuple[str, ...]) -> str:
        return str(_resolve(paths).skipped) if _local(paths) else ""

    def documents(self) -> Mapping[str, Documents]:
        key, split_on = self.options.get("text_key", DEFAULT_KEY), self.options.get("split_on", "")
        parts = [part for path in self.paths if _is_tfds(path) for part in _tfds_parts(path, self._progress)]
        files = find_files(self.paths)
        for name, file in tqdm.tqdm(files.items(), "check files", unit=" files", delay=2.0, disable=not self._progress):
            parts.append(_Part(detect(file, name), name, split_of_name(name)))
        _check_one_kind(parts, key)
        if split_on:
            parts = _split_parts(parts, split_on)
        shares, how = _shares(parts)
        if self._progress:
            counts = collections.Counter(split for split in SPLITS for share in shares[split] if share)
            warn(f"data.paths: {how}: {', '.join(f'{split} {counts[split]:,}' for split in SPLITS if counts[split])}")
        bad = BadRecords()
        return {split: _documents(parts, shares[split], key, bad, split == SPLITS[-1]) for split in SPLITS}


Share = tuple[float, float] | None  # of the documents or bytes of a part, from and to; None = nothing of it


@dataclasses.dataclass(frozen=True)
class _Part:
    """A file, or a split of a TFDS data set.

    Attributes:
      source: the file or the records.
      name: name of the part.
      split: the split that its name says; None = none.
    """

    source: "TextFile | _TfdsSplit"
    name: str
    split: str | None


@dataclasses.dataclass(frozen=True)
class _TfdsSplit:
    """A split of a prepared TFDS data set."""

    builder: tfds.core.DatasetBuilder
    split: str
    name: str
    has_records = True

    def records(self, key: str, select: Callable[[int], bool], bad: BadRecords) -> Iterator[tuple[int, bytes]]:
        """Yields (number from 0, UTF-8 text) of selected records; see `TextFile.records`."""
        field = key if key in self.builder.info.features else key.partition(".")[0]
        if field not in self.builder.info.features:
            raise InputError(
                f"data.paths: '{self.name}' has no field '{key}', but {', '.join(self.builder.info.features)}: name the one "
                "that holds the text with data.text_key"
            )
        try:
            records = self.builder.as_data_source(split=self.split)
        except NotImplementedError as error:
            raise InputError(
                f"data.paths: '{self.name}' is prepared in a format that needs TensorFlow: prepare it again with `tfds build "
                "--file_format=array_record`, or remove its folder"
            ) from error
        for number in filter(select, range(len(records))):
            bad.seen += 1
            text, reason = text_of(records[number], key)
            if text is None:
                bad.add(f"'{self.name}' record {number + 1}", reason)
            else:
                yield number, text


def _documents(
    parts: list[_Part], shares: list[Share], key: str, bad: BadRecords, last: bool
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yields the documents of one split; `last`: no other split is read after it."""
    for part, share in zip(parts, shares, strict=True):
        if share is None:
            continue
        if part.source.has_records:
            for number, text in part.source.records(key, functools.partial(_in_share, part.name, share), bad):
                yield f"{part.name}#{number}", split_document(text)
        else:
            yield part.name, text_span(part.source, share)
    if last:
        bad.check()
        if str(bad):
            warn(f"data.paths: records without text, which are left out: {bad}")


def _in_share(name: str, share: tuple[float, float], number: int) -> bool:
    return share == WHOLE or share[0] <= hash_fraction(f"{name}#{number}") < share[1]


def _shares(parts: list[_Part]) -> tuple[dict[str, list[Share]], str]:
    """Returns (the share of each part in each split, how they were decided)."""
    named = {part.split for part in parts}
    if None not in named and "train" in named and len(named) > 1:
        missing = [split for split in SPLITS[1:] if split not in named]
        shares: dict[str, list[Share]] = {
            split: [WHOLE if part.split == split else None for part in parts] for split in SPLITS
        }
        if missing:
            held_out, is_train = missing[0], [part.split == "train" for part in parts]
            shares["train"] = [(0.0, 1 - HELD_OUT) if train else None for train in is_train]
            shares[held_out] = [(1 - HELD_OUT, 1.0) if train else None for train in is_train]
        share = f", {missing[0]} is {HELD_OUT:.0%} of train" if missing else ""
        return shares, f"split by names{share}"
    if len(parts) >= MIN_FILES_TO_SPLIT_BY_FILE:
        ranked = sorted(range(len(parts)), key=lambda index: (hash_fraction(parts[index].name), parts[index].name))
        held = max(1, round(HELD_OUT * len(parts)))
        split_of = {index: "test" for index in ranked[:held]} | {i: "validation" for i in ranked[held : 2 * held]}
        shares = {
            split: [WHOLE if split_of.get(index, "train") == split else None for index in range(len(parts))]
            for split in SPLITS
        }
        return shares, "split by file"
    return {split: [SHARES[split] for _ in parts] for split in SPLITS}, "each file is split 90/5/5"


def _check_one_kind(parts: list[_Part], key: str) -> None:
    """refuses records together with plain text, of which one is there by mistake, and a key that nothing has."""
    records = [part.name for part in parts if part.source.has_records]
    plain = [part.name for part in parts if not part.source.has_records]
    if records and plain:
        raise InputError(
            f"data.paths leads to records ({', '.join(records[:3])}{', ...' if records[3:] else ''}) and to plain text "
            f"({', '.join(plain[:3])}{', ...' if plain[3:] else ''}): name the files of one kind, e.g. with a glob"
        )
    if plain and key != DEFAULT_KEY:
        raise InputError(f"data.text_key='{key}' is for records, but data.paths has plain text: leave it out")


def _split_parts(parts: list[_Part], split_on: str) -> list[_Part]:
    """Returns files of plain text that are split. Raises: InputError: they hold records, which are documents already."""
    if any(part.source.has_records for part in parts):
        raise InputError(
            f"data.split_on={split_on!r} is for plain text, but data.paths has records, each of which is a document: leave it "
            "out"
        )
    split = split_on.encode()
    return [dataclasses.replace(part, source=dataclasses.replace(part.source, split_on=split)) for part in parts]


# --- Files and folders


def find_files(paths: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """Returns the files that paths lead to, by their name below the common folder, sorted; {} for TFDS data sets alone.

    Raises:
      InputError: a path leads to no file.
    """
    if not _local(paths):
        return {}
    files = _resolve(paths).files
    common = os.path.commonpath([os.path.dirname(file) for file in files])
    named = {pathlib.Path(os.path.relpath(file, common)).as_posix(): pathlib.Path(file) for file in files}
    return dict(sorted(named.items()))


def _resolve(paths: tuple[str, ...]) -> ResolvedPaths:
    """Returns the files of `paths`, without what saved data sets and notes on records add."""
    found = resolve_paths(_local(paths))
    for path in found.unmatched:
        why = "holds no files" if os.path.exists(os.path.expanduser(path)) else "does not exist and matches nothing"
        raise InputError(
            f"data.paths: '{path}' {why}; give files, globs or folders of text, JSON lines, Parquet or Arrow, or "
            f"{TFDS_PREFIX}NAME"
        )
    files = _without_states(found.files)
    if any(_RECORD_SUFFIX.fullmatch(os.path.basename(file)) for file in files):
        given = {os.path.abspath(os.path.expanduser(path)) for path in paths}
        notes = [file for file in files if _NOTE.fullmatch(os.path.basename(file)) and file not in given]
        for file in notes:
            found.skipped.add(NOTES, file)
        files = [file for file in files if file not in set(notes)]
    return dataclasses.replace(found, files=files)


def _without_states(files: list[str]) -> list[str]:
    """Returns files without those that `datasets.save_to_disk` adds, and of each such folder the Arrow files in use."""
    names = set(files)
    left_out: set[str] = set()
    for file in files:
        folder, name = os.path.split(file)
        if name == _SPLITS:
            left_out.add(file)
        elif name == _STATE and os.path.join(folder, _INFO) in names:
            try:
                used = {entry["filename"] for entry in parse_json(pathlib.Path(file).read_bytes())["_data_files"]}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"data.paths: '{file}' is not the state of a saved data set: save it again, or name its files"
                ) from error
            left_out |= {
                other for other in files if os.path.dirname(other) == folder and os.path.basename(other) not in used
            }
    return [file for file in files if file not in left_out]


# --- TFDS


def _is_tfds(path: str) -> bool:
    return path.startswith(TFDS_PREFIX)


def _local(paths: tuple[str, ...]) -> list[str]:
    return [path for path in paths if not _is_tfds(path)]


@functools.cache
def _tfds_builder(path: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of tfds:NAME[/CONFIG][:VERSION] or tfds:FILE.py. Raises: InputError: there is none."""
    name = path.removeprefix(TFDS_PREFIX)
    if name.endswith(".py"):
        return _own_builder(pathlib.Path(name).expanduser(), path)
    try:
        return tfds.builder(name, try_gcs=False, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError, TypeError) as error:
        known = tfds.list_builders(with_community_datasets=False)
        base = re.split("[/:]", name)[0]
        reason = " ".join(str(error).split())[:200] if base in known else f"TFDS has no '{base}'.{suggest(base, known)}"
        raise InputError(
            f"data.paths: '{path}' cannot be opened: {reason} (expected {TFDS_PREFIX}NAME[/CONFIG][:VERSION])"
        ) from error


def _own_builder(file: pathlib.Path, path: str) -> tfds.core.DatasetBuilder:
    """Returns the builder that a user's module defines. Raises: InputError: it cannot be imported, or defines none."""
    if not file.is_file():
        raise InputError(f"data.paths: '{path}' names no file: expected a Python file with a TFDS builder")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's code raises anything
        raise InputError(f"data.paths: '{path}' cannot be imported: {type(error).__name__}: {error}") from error
    found = [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, tfds.core.DatasetBuilder) and member.__module__ == file.stem
    ]
    if len(found) != 1:
        raise InputError(f"data.paths: '{path}' defines {len(found)} TFDS builders: expected one")
    return found[0](file_format="array_record")


def _tfds_parts(path: str, progress: bool) -> list[_Part]:
    """Returns the splits of a TFDS data set, which is downloaded and prepared where it is not yet."""
    builder = _tfds_builder(path)
    if progress:
        warn(f"data.paths: {path} is read from {builder.data_dir}")
    try:
        builder.download_and_prepare()
    except (OSError, tfds.download.DownloadError) as error:
        raise InputError(
            f"data.paths: '{path}' cannot be downloaded or prepared ({' '.join(str(error).split())[:200]}): prepare it with "
            "`tfds build`, on a machine with a network"
        ) from error
    return [
        _Part(_TfdsSplit(builder, split, f"{path} {split}"), f"{path}/{split}", split_of_name(split))
        for split in builder.info.splits
    ]
