"""Your own text: files, globs and directories."""

import os
import pathlib
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds
import tqdm

from seqpe_jax.data import registry
from seqpe_jax.data.datasets.base import SPLITS, file_signature, hash_fraction
from seqpe_jax.data.datasets.text_base import Documents, TextBuilder, character_start, read_text
from seqpe_jax.data.formats import check_text_file
from seqpe_jax.data.paths import ResolvedPaths, resolve_paths
from seqpe_jax.errors import InputError

SPLIT_BY_FILE = 20  # from that many files on, whole files go to a split
HELD_OUT = 0.05  # share of validation, and of test


class TextFiles(TextBuilder):
    """UTF-8 text files, about 90/5/5: by file from 20 files on, else each file is cut into three contiguous spans.

    Args:
      paths: files, globs (`**` crosses folders) or directories (every file below that is not hidden); links are
        followed, and each real file is read once (see `data.files`).
    """

    VERSION = tfds.core.Version("1.1.0")  # 1.0.0 kept byte order marks, and read JSON lines and tar archives as text

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        return [file_signature(file, name) for name, file in find_files(paths).items()]

    @classmethod
    def skipped(cls, paths: tuple[str, ...]) -> str:
        return str(_find(paths).skipped)

    def documents(self) -> Mapping[str, Documents]:
        files = find_files(self.paths)
        bar = tqdm.tqdm(files.values(), "look at files", unit=" files", delay=2.0, disable=not self._progress)
        for file in bar:  # before the minutes that reading all of them may take
            check_text_file(file)
        if len(files) >= SPLIT_BY_FILE:
            ranked = sorted(files, key=lambda name: (hash_fraction(name), name))
            held = max(1, round(HELD_OUT * len(files)))
            names = {"test": ranked[:held], "validation": ranked[held : 2 * held], "train": ranked[2 * held :]}
            return {
                split: _documents_of_files({name: files[name] for name in sorted(names[split])}) for split in SPLITS
            }
        return {split: _spans(files, index) for index, split in enumerate(SPLITS)}


def _documents_of_files(files: Mapping[str, pathlib.Path]) -> Iterator[tuple[str, bytes]]:
    for name, file in files.items():
        yield name, read_text(file)


def _spans(files: Mapping[str, pathlib.Path], index: int) -> Iterator[tuple[str, bytes]]:
    for name, file in files.items():
        text = read_text(file)
        first, second = (_line_start(text, int(len(text) * share)) for share in (1 - 2 * HELD_OUT, 1 - HELD_OUT))
        yield name, (text[:first], text[first:second], text[second:])[index]


def _line_start(text: bytes, offset: int) -> int:
    """Returns where the next line starts if that is near (within a hundredth of the text), else the next character."""
    newline = text.find(b"\n", offset, offset + max(1, len(text) // 100))
    return newline + 1 if newline >= 0 else character_start(text, offset)


def find_files(paths: tuple[str, ...]) -> dict[str, pathlib.Path]:
    """Returns the files that paths, globs and directories name, by their name below the folder common to all, sorted.

    Raises:
      InputError: no path given, one that matches no file, or one that is no file.
    """
    found = _find(paths).files
    common = os.path.commonpath([os.path.dirname(file) for file in found])
    named = {pathlib.Path(os.path.relpath(file, common)).as_posix(): pathlib.Path(file) for file in found}
    return dict(sorted(named.items()))


def _find(paths: tuple[str, ...]) -> ResolvedPaths:
    registry.get(TextFiles.name).check_paths(paths)
    found = resolve_paths(paths)
    for path in found.empty:
        why = "holds no files" if os.path.exists(os.path.expanduser(path)) else "does not exist and matches nothing"
        left = f", left out: {found.skipped}" if str(found.skipped) else ""
        raise InputError(f"data.paths: '{path}' {why}{left}; give files, globs or directories of UTF-8 text")
    return found
