"""A run whose folder is in an object store, as an emulator serves it: computed, stored and told as on a disk."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from seqpe_jax import files, load
from tests.commands import Commands, Result, train_arguments
from tests.emulator import Store

pytestmark = pytest.mark.slow

FIELDS = {
    "steps": 12, "checkpoint__every": 3, "report__every": 2, "eval__every": 6, "eval__lengths": (32,),
    "model__dropout": 0.1, "report__tensorboard": True,
}  # fmt: skip
CLOCK = ("time", "train/tokens_per_second", "train/step_seconds", "train/mfu", "device/memory_bytes")  # these may differ


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(1000)))
    return path


def run(commands: Commands, store: Store, name: str, *arguments: str) -> Result:
    result = commands.wait(commands.start(name, *arguments, **store.environment))
    assert "Traceback" not in result.err, result.err
    return result


def good(commands: Commands, store: Store, name: str, *arguments: str) -> str:
    result = run(commands, store, name, *arguments)
    assert result.code == 0, result.err
    return result.out


def metrics(workdir) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in found]


def test_a_killed_run_in_a_store_ends_as_one_on_a_disk(commands, store, text, tmp_path):
    """Trained, killed, resumed, evaluated, reported, exported and asked: all bits are those of the run on a disk."""
    disk, bucket = tmp_path / "run", files.as_path(f"{store.folder}/run")
    good(commands, store, "train", *train_arguments(disk, text, **FIELDS))

    running = commands.start("train", *train_arguments(bucket, text, **FIELDS), **store.environment)
    deadline = time.monotonic() + 240
    while not (bucket / "checkpoints" / "3" / "commit_success.txt").exists():
        assert time.monotonic() < deadline, running.err
        time.sleep(0.01)
    os.kill(running.process, signal.SIGKILL)
    assert commands.wait(running).code == -signal.SIGKILL, "the run was over before it could be killed"
    assert metrics(bucket)[-1]["step"] >= 2, "the metrics up to a checkpoint are there when it is"
    assert (bucket / "owner.json").exists()

    out = good(commands, store, "train", *train_arguments(bucket, text, **FIELDS))
    assert "going on from step" in out and f"taken over from process {running.process}" in out
    assert metrics(bucket) == metrics(disk)
    names = {path.name for path in bucket.iterdir()}
    assert names == {path.name for path in disk.iterdir()}
    assert {path.name for path in (bucket / "checkpoints").iterdir()} == {"9", "12"}
    assert any("tfevents" in path.name for path in files.below(bucket / "tensorboard"))

    for place in (disk, bucket):
        good(commands, store, "evaluate", f"--checkpoint={place}", "--lengths=16,32", f"--output={place}/evaluation.json")
        good(commands, store, "export", f"--checkpoint={place}", f"--output={place}_export", "--platforms=cpu")
    ours, theirs = (json.loads((place / "evaluation.json").read_text()) for place in (disk, bucket))
    assert ours["results"] == theirs["results"] and theirs["checkpoint"] == str(bucket)
    np.testing.assert_equal(*(dict(np.load((place / "similarity.npz").open("rb"))) for place in (disk, bucket)))
    exports = disk.with_name("run_export"), bucket.with_name("run_export")
    for name in ("params.safetensors", "sizes.json"):
        ours, theirs = ((place / name).read_bytes() for place in exports)
        assert ours == theirs, name
    good(commands, store, "report", f"--workdir={bucket}", f"--output={bucket}/report")
    assert "report.html" in {path.name for path in (bucket / "report").iterdir()}
    opened = {str(place): load(place) for place in (disk, bucket, *exports)}
    jax.tree.map(np.testing.assert_array_equal, opened[str(disk)].params, opened[str(bucket)].params)
    ids = np.frombuffer(b"12 times 12 is 1", np.uint8).astype(np.int32)[None]
    disk_says, bucket_says = (np.asarray(opened[str(place)].logits(ids)) for place in exports)
    np.testing.assert_array_equal(disk_says, bucket_says)
