"""A run that is killed or preempted and resumed ends bit-equal to an uninterrupted one."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.commands import Commands, Result, Running, train_arguments

pytestmark = pytest.mark.slow

STEPS = 96
CLOCK = (
    "time",
    "train/tokens_per_second",
    "train/step_seconds",
    "train/data_seconds",
    "train/save_seconds",
    "train/goodput",
    "train/mfu",
    "hosts/slowest_process",
    "hosts/slowest_seconds",
    "hosts/median_seconds",
    "device/memory_bytes",
)  # these may differ
FIELDS = {
    "steps": STEPS,
    "checkpoint__every": 12,
    "report__every": 4,
    "eval__every": 32,
    "eval__lengths": (32,),
    "model__layers": 1,
    "model__dropout": 0.1,
    "encoding__layers": 1,
    "encoding__dropout": 0.1,
    "objective__shift__rate": 0.3,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(1000)))
    return path


def start(commands: Commands, workdir: pathlib.Path, text: pathlib.Path) -> Running:
    return commands.start("train", *train_arguments(workdir, text, **FIELDS))


def finish(commands: Commands, running: Running) -> str:
    result = commands.wait(running)
    assert result.code == 0, result.err
    return result.out


def lines(workdir: pathlib.Path) -> list[dict]:
    """Returns the whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def interrupt(commands: Commands, running: Running, workdir: pathlib.Path, after: int, number: int) -> Result:
    """Sends a signal once a step beyond `after` is saved, and later ones reported."""
    deadline = time.monotonic() + 300
    while not (newest(workdir) > after and lines(workdir)[-1]["step"] > newest(workdir) + FIELDS["report__every"]):
        assert time.monotonic() < deadline, running.err
        time.sleep(0.002)
    os.kill(running.process, number)
    return commands.wait(running)


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
def uninterrupted(commands, text, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(commands, start(commands, workdir, text))
    return workdir


def test_killed_stopped_and_resumed_equals_uninterrupted(commands, text, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    killed = interrupt(commands, start(commands, workdir, text), workdir, 0, signal.SIGKILL)
    assert killed.code == -signal.SIGKILL, "the run was over before it could be killed"
    killed_at = newest(workdir)
    assert 0 < killed_at < STEPS

    stopped = interrupt(commands, start(commands, workdir, text), workdir, killed_at, signal.SIGTERM)
    assert stopped.code == 75 and "saved" in stopped.err and "Traceback" not in stopped.err, stopped.err
    stopped_at = newest(workdir)
    assert killed_at < stopped_at < STEPS
    assert lines(workdir)[-1]["step"] <= stopped_at, "the step that was reached is saved before the process ends"
    assert f"step {stopped_at}" in stopped.err

    with open(workdir / "metrics.jsonl", "a") as file:
        file.write('{"step": 10000, "train/lo')  # as a crash in the middle of a line leaves it
    out = finish(commands, start(commands, workdir, text))
    assert f"resuming at step {stopped_at}" in out

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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3.5 MiB, which checkpoints of the tiny run fill."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3560k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_ends_the_run_in_few_lines_and_with_all_checkpoints_whole(commands, text, small_disk):
    fields = FIELDS | {"checkpoint__every": 4, "checkpoint__keep_every": 4, "model__width": 48, "eval__every": 0}
    fields = {name: value for name, value in fields.items() if not name.startswith(("encoding", "objective"))}
    given = train_arguments(small_disk / "run", text, config="tests/tiny_text.py:alibi", **fields)
    result = commands("train", *given)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    reported = [line for line in result.err.splitlines() if line.startswith("the save of step")]
    assert len(reported) == 3 and all("no space is left on the device" in line for line in reported), result.err
    assert reported[2].endswith("Once the cause is fixed, the same command resumes from there")
    last = newest(small_disk / "run")
    assert f"the last checkpoint is of step {last}." in reported[2] and 8 <= last < STEPS
    found = commands("evaluate", f"--checkpoint={small_disk / 'run'}", "--lengths=16", "--tokens=64")
    assert found.code == 0 and "damaged" not in found.err, found.err
    shutil.rmtree(small_disk / "run" / "checkpoints" / "4")
    again = commands("train", *given)
    assert again.code == 1 and f"resuming at step {last}" in again.out and newest(small_disk / "run") > last


def test_the_state_did_change(uninterrupted):
    first = STEPS - FIELDS["checkpoint__every"]
    before, after = arrays(uninterrupted, first), arrays(uninterrupted, STEPS)
    moved = [name for name in before if "params" in name and not np.array_equal(before[name], after[name])]
    assert len(moved) > 20
