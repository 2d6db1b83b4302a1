"""Commands on a run in a bucket, which an emulator serves, against a run on a disk."""

import os
import re
import signal
import time

import jax
import numpy as np
import pytest

from seqpe_jax import files, load
from seqpe_jax.reporting.report import write_report
from seqpe_jax.run_dir import RunDir
from tests.commands import Commands, Result, free_port, hosts, train_arguments
from tests.emulator import Store
from tests.run_files import measured
from tests.tiny_text import write_mixture

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

FIELDS = {
    "steps": 9,
    "checkpoint__every": 3,
    "report__every": 2,
    "eval__every": 9,
    "eval__lengths": (32,),
    "objective__contrastive__weight": 0.0,
    "objective__distillation__weight": 0.0,
    "model__dropout": 0.1,
    "report__trackers": ("tensorboard",),
}


def run(commands: Commands, store: Store, name: str, *arguments: str) -> Result:
    result = commands.wait(commands.start(name, *arguments, **store.environment))
    assert "Traceback" not in result.err, result.err
    return result


def good(commands: Commands, store: Store, name: str, *arguments: str) -> str:
    result = run(commands, store, name, *arguments)
    assert result.code == 0, result.err
    assert not strange(result)
    return result.out


def strange(result: Result) -> list[str]:
    """The lines that libraries log or warn with."""
    return [line for line in (result.err + result.out).splitlines() if re.search(r"^[A-Z]+:\w+:|\w+Warning: ", line)]


@pytest.mark.parametrize("one", ["store", pytest.param("s3_store", marks=pytest.mark.long)], ids=["gs", "s3"])
def test_a_killed_run_in_a_store_ends_as_one_on_a_disk(commands, one, text, tmp_path, request):
    """Metrics and parameters are bit-equal to those of a run on a disk; then evaluated, reported and exported there.

    Both train on a mixture, several documents in a window; the run in the store reads one source prepared from there.
    """
    store = request.getfixturevalue(one)
    disk, bucket, few = tmp_path / "run", files.as_path(f"{store.folder}/run"), f"{store.folder}/few"
    good(commands, store, "train", *train_arguments(disk, None, write_mixture(tmp_path, text), **FIELDS))
    source = {"name": "text", "paths": tmp_path / "few.jsonl", "tokenizer": "bytes_eos"}
    options = [f"--config.data.{name}={value}" for name, value in source.items()]
    good(commands, store, "prepare", "--config=tests/tiny_text.py", *options, "--processes=1", f"--output={few}")

    arguments = train_arguments(bucket, None, write_mixture(tmp_path, text, "prepared", prepared=few), **FIELDS)
    running = commands.start("train", *arguments, **store.environment)
    deadline = time.monotonic() + 240
    while not (bucket / "checkpoints" / "3" / "commit_success.txt").exists():
        assert time.monotonic() < deadline, running.err
        time.sleep(0.01)
    os.kill(running.process, signal.SIGKILL)
    assert commands.wait(running).code == -signal.SIGKILL, "the run was over before it could be killed"
    assert measured(bucket)[-1]["step"] >= 2, "the metrics up to a checkpoint are there when it is"
    assert (bucket / "owner.json").exists()

    out = good(commands, store, "train", *arguments)
    assert "resuming at step" in out and f"taken over from process {running.process}" in out
    assert measured(bucket) == measured(disk)
    names = {path.name for path in bucket.iterdir()}
    assert names == {path.name for path in disk.iterdir()}
    assert {path.name for path in (bucket / "checkpoints").iterdir()} == {"6", "9"}
    assert any("tfevents" in path.name for path in files.list_files(bucket / "tensorboard"))

    good(commands, store, "evaluate", f"--checkpoint={bucket}", "--lengths=16,32", f"--output={bucket}/evaluation.json")
    write_report(bucket, bucket / "report")
    assert "report.html" in {path.name for path in (bucket / "report").iterdir()}
    assert "cosine" in dict(np.load((bucket / "similarity.npz").open("rb")))
    local, remote = load(disk), load(bucket)
    remote.export(f"{bucket}_export", platforms=("cpu",))
    exported = load(f"{bucket}_export")
    jax.tree.map(np.testing.assert_array_equal, local.params, remote.params)
    ids = np.frombuffer(b"12 times 12 is 1", np.uint8).astype(np.int32)[None]
    np.testing.assert_allclose(exported.logits(ids), local.logits(ids), atol=1e-4)


def test_bad_addresses_are_refused_in_one_line(commands, store, text):
    """Other addresses: tests/test_buckets.py and tests/test_files.py."""
    train = train_arguments(f"{store.folder}/run", text)
    for name, arguments, words in (
        (
            "train",
            train_arguments("gs://no-such-bucket/run", text),
            "--workdir=gs://no-such-bucket/run: there is no buc",
        ),
        ("train", ["--config=gs://runs/config.py", *train[1:2]], "config files are Python"),
        ("evaluate", [f"--checkpoint={store.folder}/none"], f"{store.folder}/none does not exist"),
        ("train", train, "access denied"),
    ):
        store.fail(403 if "denied" in words else 0)
        result = run(commands, store, name, *arguments)
        assert result.code == 2 and words in result.err, result.err
        assert len(result.err.strip().splitlines()) == 1, result.err
    store.fail(0)
    assert not files.as_path(store.folder).exists()


@pytest.mark.long
def test_a_conversion_in_a_store_goes_there_and_back(commands, store, text):
    """A run, in the layout of the reference, and a run again: all three in a bucket, with the same parameters."""
    fields = {"steps": 1, "eval__every": 0, "checkpoint__every": 1}
    good(commands, store, "train", *train_arguments(f"{store.folder}/run", text, **fields))
    good(
        commands, store, "convert", f"--source={store.folder}/run", f"--output={store.folder}/theirs", "--to=reference"
    )
    good(commands, store, "convert", f"--source={store.folder}/theirs", f"--output={store.folder}/back")
    ours, back = (load(f"{store.folder}/{name}") for name in ("run", "back"))
    jax.tree.map(np.testing.assert_array_equal, ours.params, back.params)


@pytest.mark.long
def test_two_processes_share_a_bucket(commands, any_store, text):
    """As on a pod: the main process writes, both save their shards, and one process resumes from them."""
    store = any_store
    fields = {"config": "tests/tiny_text.py:alibi", "checkpoint__every": 2, "eval__every": 0}
    bucket, port = files.as_path(f"{store.folder}/run"), free_port()
    both = [
        commands.start(
            "train", *train_arguments(bucket, text, steps=4, **fields), *hosts(port, 2, process), **store.environment
        )
        for process in range(2)
    ]
    for result in [commands.wait(one) for one in both]:
        assert result.code == 0 and not strange(result), result.err
    assert RunDir(bucket).latest_valid_step() == (4, {})
    assert any("process_1" in str(path) for path in files.list_files(bucket / "checkpoints" / "4"))
    arguments = train_arguments(bucket, text, steps=6, **fields)
    out = good(commands, store, "train", *arguments, "--extend=true")
    assert "resuming at step 4" in out and measured(bucket)[-1]["step"] == 6
