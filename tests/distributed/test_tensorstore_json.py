"""Saves leave nothing behind in memory, and TensorStore's answers are as they were."""

import gc
import json
import sys

import jax.numpy as jnp
import pytest
import tensorstore

from seqpe_jax.training import checkpoint, tensorstore_json
from seqpe_jax.training.checkpoint import Checkpointer

ARRAYS, SAVES = 40, 10
TO_JSON = vars(tensorstore.KvStore.Spec)["to_json"]
COUNTERS = tensorstore.experimental_collect_matching_metrics


@pytest.fixture
def change(monkeypatch):
    """What changes TensorStore, which is as nobody has changed it, and is as it was after the test."""
    monkeypatch.setattr(tensorstore.KvStore.Spec, "to_json", TO_JSON)
    monkeypatch.setattr(tensorstore, "experimental_collect_matching_metrics", COUNTERS)
    return tensorstore_json.patch_tensorstore_json.__wrapped__


def blocks_of_a_save(checkpoints, state, first) -> float:
    """How many blocks of memory Python holds more after each of some saves."""
    gc.collect()
    before = sys.getallocatedblocks()
    for step in range(first, first + SAVES):
        checkpoints.save(step, state, {})
        checkpoints.wait()
    gc.collect()
    return (sys.getallocatedblocks() - before) / SAVES


def test_a_save_leaves_nothing_behind_for_each_array(tmp_path):
    """TensorStore holds four pieces of text of each array, and hundreds of others, where it is asked as Orbax asks it."""
    state = {f"array {number}": jnp.zeros(3) for number in range(ARRAYS)}
    checkpoints = Checkpointer(tmp_path)
    blocks_of_a_save(checkpoints, state, first=0)  # what is held once
    left = blocks_of_a_save(checkpoints, state, first=SAVES)
    checkpoints.close()
    assert left < 3 * ARRAYS, left  # with the fault there are 450; some 40 are of caches that fill


def test_who_only_reads_changes_nothing(tmp_path, monkeypatch):
    changed = []
    monkeypatch.setattr(checkpoint, "patch_tensorstore_json", lambda: changed.append(True))
    Checkpointer(tmp_path).close()
    Checkpointer(tmp_path, create=False).close()
    assert changed == [True]


@pytest.mark.parametrize("given", [{}, {"include_defaults": True}], ids=str)
def test_an_answer_is_the_same_each_time_and_may_be_changed(change, monkeypatch, given):
    monkeypatch.setattr(tensorstore_json, "_held", lambda: True)
    specs = [
        tensorstore.KvStore.Spec({"driver": "file", "path": f"/tmp/{name}/"})
        for name in ("été", *range(tensorstore_json.FEW))
    ]
    expected = [spec.to_json(**given) for spec in specs]
    before = tensorstore.KvStore.Spec.to_json
    change()
    assert tensorstore.KvStore.Spec.to_json is not before
    for spec, answer in zip(specs, expected, strict=True):
        for _ in range(2):
            found = spec.to_json(**given)
            assert found == answer
            found["driver"] = "memory"
    assert specs[0].to_json() != specs[0].to_json(include_defaults=True)
    assert tensorstore.experimental_collect_matching_metrics("/tensorstore/", include_zero_metrics=True) == []


def test_it_is_left_as_it_is_where_it_lets_go(change, monkeypatch):
    """Of a version without the fault, an answer has as few references as what Python reads by itself."""
    monkeypatch.setattr(tensorstore.KvStore.Spec, "to_json", lambda spec: json.loads('{"driver": "memory"}'))
    free = tensorstore.KvStore.Spec.to_json
    change()
    assert tensorstore.KvStore.Spec.to_json is free
    assert tensorstore.experimental_collect_matching_metrics is COUNTERS
