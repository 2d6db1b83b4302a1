"""The source of the running Python's standard library: 10 MB of real text on every machine, without a download."""

import os
import pathlib
import platform
import sysconfig
from collections.abc import Mapping

import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.base import SPLITS, file_signature, hash_fraction
from seqpe_jax.data.datasets.text_base import Documents, TextBuilder
from seqpe_jax.data.formats import strip_bom
from seqpe_jax.errors import InputError

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_PREFIX = "_sysconfigdata"  # written when Python is built, different on every machine
SALT = "stdlib_text 10: "  # with it no file above 130 kB (pydoc_data/topics.py has 757) fills a held-out split
TEST_END = 0.05  # files with a smaller `hash_fraction` are the test split
VALIDATION_END = 0.10  # the next ones are the validation split


class StdlibText(TextBuilder):
    """Every non-empty UTF-8 *.py file outside of test folders, split by the hash of its relative name, about 90/5/5."""

    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        root = _root()
        return [f"python {platform.python_version()}"] + [file_signature(root / name, name) for name in _names(root)]

    def documents(self) -> Mapping[str, Documents]:
        return files()


def files() -> Mapping[str, Documents]:
    """Returns (name, UTF-8 source) by split, read lazily. Raises: InputError: this Python has no source files."""
    root = _root()
    names = _names(root)
    return {wanted: _read(root, [name for name in names if split(name) == wanted]) for wanted in SPLITS}


def split(name: str) -> str:
    """Returns the split of a file, from its relative name with forward slashes."""
    fraction = hash_fraction(SALT + name)
    return "test" if fraction < TEST_END else "validation" if fraction < VALIDATION_END else "train"


def _root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def _names(root: pathlib.Path) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py") and not file.startswith(SKIPPED_PREFIX):
                names.append((pathlib.Path(folder) / file).relative_to(root).as_posix())
    if not names:
        raise InputError(
            f"this Python has no standard library source in '{root}': use another Python, or data.name='text_files'"
        )
    return sorted(names)


def _read(root: pathlib.Path, names: list[str]) -> Documents:
    for name in names:
        text = (root / name).read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:  # source may declare another coding
            continue
        yield name, strip_bom(text)
