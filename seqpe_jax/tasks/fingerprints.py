"""Fingerprints of the splits of a run's data, stored with it, by which it is known when they have changed."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_write, parse_json
from seqpe_jax.tasks.task import Task

FINGERPRINTS_FILE = "data.json"  # of a run's folder
SPLITS = ("train", "validation", "test")

Fingerprint = dict[str, Any]  # {"fingerprint": hex digits of the content, and how much there is, by unit}


def fingerprints(task: Task, splits: Iterable[str]) -> dict[str, Fingerprint]:
    """Returns the fingerprint of each split. Raises: InputError: one cannot be read."""
    return {split: task.fingerprint(split) for split in splits}


def available_fingerprints(task: Task) -> dict[str, Fingerprint]:
    """Returns the fingerprint of each split that the data have and that can be read: not all data have all of them."""
    found = {}
    for split in SPLITS:
        try:
            found[split] = task.fingerprint(split)
        except InputError:  # whoever evaluates this split is told why it cannot be read
            continue
    return found


def describe(found: Mapping[str, Any]) -> str:
    """Returns a fingerprint in words: "62,003 tokens (fingerprint 0a1b2c3d4e5f)"."""
    counts = ", ".join(f"{value:,} {unit}" for unit, value in found.items() if unit != "fingerprint")
    return f"{counts} (fingerprint {found['fingerprint'][:12]})"


def changes(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> list[str]:
    """Returns `split: before -> now` for each split of both whose content differs."""
    return [
        f"{split}: {describe(before[split])} -> {describe(found)}"
        for split, found in now.items()
        if split in before and before[split]["fingerprint"] != found["fingerprint"]
    ]


def check_same_data(folder: str | os.PathLike, now: Mapping[str, Fingerprint]) -> None:
    """Refuses to go on with other data than a run was trained on so far. Raises: InputError: says what differs."""
    if lines := changes(read_fingerprints(folder), now):
        raise InputError(
            f"the data of the run of {folder} have changed since it began: {'; '.join(lines)}. Put the data back as they "
            f"were, or begin a new run with its parameters: a new --workdir and --init-from={folder}"
        )


def read_fingerprints(folder: str | os.PathLike) -> dict[str, Fingerprint]:
    """Returns the fingerprints that a run's folder keeps, by split; {} where it is older than the file.

    Raises:
      InputError: the file is damaged.
    """
    path = as_path(folder) / FINGERPRINTS_FILE
    if not path.exists():
        return {}
    try:
        found = parse_json(path.read_bytes())
        for one in found.values():
            describe(one)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({error}): put back the file that the run wrote") from error
    return found


def write_fingerprints(folder: str | os.PathLike, found: Mapping[str, Fingerprint]) -> None:
    """Writes the fingerprints into a run's folder, whole or not at all."""
    atomic_write(as_path(folder) / FINGERPRINTS_FILE, json.dumps(found, indent=1) + "\n")
