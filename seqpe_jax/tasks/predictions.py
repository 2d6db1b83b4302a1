"""Predictions of an evaluation: what the model answered for each example, one JSON object per line.

    text       {"length" or "context", "start", "tokens", "losses", "text"}: the scored tokens of a window, the index of the
               first one in the split, and their losses in nats
    questions  {"length", "index", "question", "kind", "gold", "hypothesis", "depth", "prompt"} and the scores in 0..1
    images     {"size", "index", "file", "label", "top"}: [class, probability] of the likeliest five classes

Each line begins with "checkpoint" and "step", so that a file is not replaced by the predictions of another run.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_file, is_remote, parse_json

Record = dict[str, Any]
WriteRecord = Callable[[Record], None]
MAX_LINE_BYTES = 1 << 26  # of an existing file's first line
DIGITS = 6  # significant ones of losses and probabilities


def check_predictions_path(path: str | os.PathLike, checkpoint: str, option: str = "--predictions") -> None:
    """Refuses a file that holds anything but predictions of the same checkpoint.

    Args:
      path: path of the file, which need not exist.
      checkpoint: folder of the model.
      option: the option that names it, for messages.

    Raises:
      InputError: names the file and the run that it belongs to.
    """
    target = as_path(path)
    if target.is_dir():
        raise InputError(f"{option}={path} is a directory: give the name of a file")
    if not target.exists():
        return
    with target.open("rb") as file:
        line = file.readline(MAX_LINE_BYTES)
    try:
        owner = parse_json(line)["checkpoint"]
    except (ValueError, TypeError, KeyError):
        owner = None
    if owner is None and line:
        raise InputError(f"{option}={path} exists and holds no predictions of `evaluate`: choose another name")
    if owner is not None and _same_place(owner) != _same_place(checkpoint):
        raise InputError(f"{option}={path} holds the predictions of {owner}: choose another name, or remove it")


def _same_place(path: str) -> str:
    """Returns one spelling of a path."""
    return path if is_remote(path) else os.path.realpath(path)


@contextlib.contextmanager
def predictions_file(path: str | os.PathLike, checkpoint: str, step: int) -> Iterator[WriteRecord]:
    """Yields a function that writes a record; the file appears under its name when the block succeeds.

    Args:
      path: path of the file, local or in a bucket.
      checkpoint: folder of the model.
      step: training step of the model.
    """
    owner = {"checkpoint": checkpoint, "step": step}
    with atomic_file(path) as part, part.open("w", encoding="utf-8") as file:
        yield lambda record: print(json.dumps(owner | record), file=file)


def rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    """Returns numbers with `DIGITS` significant digits."""
    return [float(f"{value:.{DIGITS}g}") for value in values]


def top_classes(
    labels_K: np.ndarray, probabilities_K: np.ndarray, class_names: Sequence[str]
) -> list[tuple[str, float]]:
    """Returns (name, probability) of the likeliest classes of an image.

    Args:
      labels_K: labels of these classes, int32[K], the likeliest first.
      probabilities_K: float32[K].
      class_names: label -> name; a model may have more classes than names.
    """
    return list(
        zip([class_name(label, class_names) for label in labels_K.tolist()], rounded(probabilities_K), strict=True)
    )


def class_name(label: int, class_names: Sequence[str]) -> str:
    """Returns the name of a class, or "class N" where it has none."""
    return class_names[label] if label < len(class_names) else f"class {label}"
