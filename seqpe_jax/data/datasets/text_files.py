"""A user's own text: files, globs and folders."""

import os
import pathlib
from collections.abc import Mapping

import tensorflow_datasets as tfds
import tqdm

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import SPLITS, file_signature, hash_fraction
from seqpe_jax.data.datasets.text_base import Documents, TextBuilder
from seqpe_jax.data.datasets.text_records import (
    HELD_OUT,
    MIN_FILES_TO_SPLIT_BY_FILE,
    SHARES,
    WHOLE,
    TextFile,
    text_span,
)
from seqpe_jax.data.formats import check_text_file
from seqpe_jax.data.paths import ResolvedPaths, resolve_paths
from seqpe_jax.errors import InputError


class TextFiles(TextBuilder):
    """UTF-8 text files, about 90/5/5: 20 files or more are split by file, fewer are each cut into three parts.

    Args:
      paths: files, globs (`**` crosses folders) or folders; see `resolve_paths`.
    """

    VERSION = tfds.core.Version("1.1.0")  # 1.0.0 read byte order marks, JSON lines and tar archives as text

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return [file_signature(file, name) for name, file in find_files(paths).items()]

    @classmethod
    def input_bytes(cls, paths: tuple[str, ...]) -> int:
        return sum(file.stat().st_size for file in find_files(paths).values())

    @classmethod
    def skipped(cls, paths: tuple[str, ...]) -> str:
        return str(_resolve(paths).skipped)

    def documents(self) -> Mapping[str, Documents]:
        files = find_files(self.paths)
        bar = tqdm.tqdm(files.values(), "check files", unit=" files", delay=2.0, disable=not self._progress)
        for file in bar:  # before the minutes that reading all of them may take
            check_text_file(file, raw=self.options.get("raw", False))
        if len(files) >= MIN_FILES_TO_SPLIT_BY_FILE:
            ranked = sorted(files, key=lambda name: (hash_fraction(name), name))
            held = max(1, round(HELD_OUT * len(files)))
            names = {"test": ranked[:held], "validation": ranked[held : 2 * held], "train": ranked[2 * held :]}
            return {split: _documents({name: files[name] for name in sorted(names[split])}, WHOLE) for split in SPLITS}
        return {split: _documents(files, SHARES[split]) for split in SPLITS}


def _documents(files: Mapping[str, pathlib.Path], share: tuple[float, float]) -> Documents:
    return ((name, text_span(TextFile(file, name, "text"), share)) for name, file in files.items())


def find_files(paths: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """Returns the files that paths, globs and folders lead to, by their name below the common folder, sorted.

    Raises:
      InputError: no path, or one that leads to no file.
    """
    files = _resolve(paths).files
    common = os.path.commonpath([os.path.dirname(file) for file in files])
    named = {pathlib.Path(os.path.relpath(file, common)).as_posix(): pathlib.Path(file) for file in files}
    return dict(sorted(named.items()))


def _resolve(paths: tuple[str, ...]) -> ResolvedPaths:
    registry.get(TextFiles.name).check_paths(paths)
    found = resolve_paths(paths)
    for path in found.unmatched:
        why = "holds no files" if os.path.exists(os.path.expanduser(path)) else "does not exist and matches nothing"
        skipped = f", skipped: {found.skipped}" if str(found.skipped) else ""
        raise InputError(f"data.paths: '{path}' {why}{skipped}; give files, globs or directories of UTF-8 text")
    return found
