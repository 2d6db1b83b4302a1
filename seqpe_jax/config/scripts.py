"""Config and sweep files are Python: they are run here, and whatever they raise is told in one line."""

import importlib.machinery
import importlib.util
import pathlib
import traceback
import types
from collections.abc import Callable
from typing import Any

from seqpe_jax.errors import InputError


class _AsWritten(importlib.machinery.SourceFileLoader):
    """Runs a file as it stands. Python would keep its bytecode and, by size and second alone, miss an edit made at once."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


PACKAGE = pathlib.Path(__file__).parents[1]


def resolve_config_path(path: str) -> str:
    """Returns the path of a config or sweep file.

    The package brings the files of `configs/`. A path such as configs/stdlib_lm.py means the package's file where the
    current folder has none of that name, so that the same command works outside a clone.

    Args:
      path: as the user gave it, perhaps with a :variant.
    """
    name, colon, variant = path.partition(":")
    shipped = PACKAGE / name
    if pathlib.PurePath(name).parts[:1] != ("configs",) or pathlib.Path(name).exists() or not shipped.is_file():
        return path
    return f"{shipped}{colon}{variant}"


def execute_file(path: str, what: str) -> types.ModuleType:
    """Returns the module of a Python file, run.

    Args:
      what: what the file is and must define, for messages.

    Raises:
      InputError: no such file, no Python, or it raises; names the file and the line.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"no {what.split()[0]} file at {path}")
    if not path.endswith(".py"):
        raise InputError(f"{path} is not a Python file: a {what}")
    loader = _AsWritten("seqpe_file", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    call_user_code(path, lambda: loader.exec_module(module))
    return module


def call_user_code(path: str, act: Callable[[], Any]) -> Any:
    """Returns what a piece of a file's own code returns; whatever it raises is told with the file's name and line.

    Raises:
      InputError: what the code raised.
    """
    try:
        return act()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise InputError(f"{path}{where} cannot be read: SyntaxError: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a file may end Python, too
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        raise InputError(f"{path}{where} cannot be read: {type(error).__name__}: {error}") from error
