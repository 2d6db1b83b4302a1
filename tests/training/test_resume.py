"""A run that was killed, or told to stop, ends exactly where an uninterrupted one does, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.commands import ROOT, environment, train_arguments

pytestmark = pytest.mark.slow

STEPS = 400
CLOCK = ("time", "train/tokens_per_second", "train/step_seconds", "train/mfu", "device/memory_bytes")  # these may differ
FIELDS = {
    "steps": STEPS, "checkpoint__every": 40, "report__every": 4, "eval__every": 100, "eval__lengths": (16, 32),
    "model__layers": 1, "model__dropout": 0.1, "encoding__layers": 1, "encoding__dropout": 0.1,
    "objective__shift__rate": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(1000)))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


def start(workdir: pathlib.Path, text: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    arguments = train_arguments(workdir, text, **FIELDS)
    return subprocess.Popen(
        [sys.executable, "-m", "seqpe_jax.train", *arguments],
        cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def lines(workdir: pathlib.Path) -> list[dict]:
    """Returns the whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def interrupt(process: subprocess.Popen, workdir: pathlib.Path, after: int, number: int) -> tuple[int, str]:
    """Sends a signal once a step beyond `after` is saved, and later ones reported; returns (exit code, stderr)."""
    deadline = time.monotonic() + 300
    while not (newest(workdir) > after and lines(workdir)[-1]["step"] > newest(workdir) + FIELDS["report__every"]):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def newest(workdir: pathlib.Path) -> int:
    """Returns the last step whose checkpoint is finished, or 0."""
    return max((int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0)


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Returns every array of a saved state, optimiser and all, by its path."""
    path = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.fixture(scope="module")
def uninterrupted(text, cache, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(start(workdir, text, cache))
    return workdir


def test_killed_stopped_and_resumed_equals_uninterrupted(text, cache, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    code, _ = interrupt(start(workdir, text, cache), workdir, 0, signal.SIGKILL)
    assert code == -signal.SIGKILL, "the run was over before it could be killed"
    killed_at = newest(workdir)
    assert 0 < killed_at < STEPS

    code, err = interrupt(start(workdir, text, cache), workdir, killed_at, signal.SIGTERM)
    assert code == 1 and "saved" in err and "Traceback" not in err, err
    stopped_at = newest(workdir)
    assert killed_at < stopped_at < STEPS
    assert lines(workdir)[-1]["step"] <= stopped_at, "the step that was reached is saved before the process ends"
    assert f"step {stopped_at}" in err

    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 10000, "train/lo')  # as a crash in the middle of a line leaves it
    out = finish(start(workdir, text, cache))
    assert f"from step {stopped_at}" in out

    expected, found = lines(uninterrupted), lines(workdir)
    assert len(expected) >= STEPS // FIELDS["report__every"]
    assert any("eval/perplexity@32" in line for line in expected)
    for line in [*expected, *found]:
        for name in CLOCK:
            line.pop(name, None)
    assert found == expected

    expected, found = arrays(uninterrupted, STEPS), arrays(workdir, STEPS)
    assert expected.keys() == found.keys() and len(expected) > 50
    for name, value in expected.items():
        assert value.dtype == found[name].dtype
        np.testing.assert_array_equal(value, found[name], err_msg=name)


def test_the_state_did_change(uninterrupted):
    first = STEPS - FIELDS["checkpoint__every"]
    before, after = arrays(uninterrupted, first), arrays(uninterrupted, STEPS)
    moved = [name for name in before if "params" in name and not np.array_equal(before[name], after[name])]
    assert len(moved) > 20
