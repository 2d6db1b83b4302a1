"""Fingerprints of the splits of a task's data, by which a change of the data is noticed when a run resumes."""

from collections.abc import Iterable

from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import Fingerprint
from seqpe_jax.tasks.task import Task

SPLITS = ("train", "validation", "test")


def fingerprints(task: Task, splits: Iterable[str]) -> dict[str, Fingerprint]:
    """Returns the fingerprint of each split. Raises: InputError: one cannot be read."""
    return {split: task.fingerprint(split) for split in splits}


def available_fingerprints(task: Task) -> dict[str, Fingerprint]:
    """Returns the fingerprint of each split that exists and can be read: not all data have all splits."""
    found = {}
    for split in SPLITS:
        try:
            found[split] = task.fingerprint(split)
        except InputError:  # an evaluation of this split reports why it cannot be read
            continue
    return found
