"""A run that is killed or stopped at any moment and resumed ends bit-equal to an uninterrupted one.

Its windows are of two sources, several documents in each.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.commands import train_arguments
from tests.run_files import arrays, bits, lines, measured, newest
from tests.tiny_text import write_mixture

pytestmark = pytest.mark.slow

ALIBI = "tests/tiny_text.py:alibi"
STEPS, EVERY = 60, 20
FIELDS = {
    "config": ALIBI,
    "steps": STEPS,
    "checkpoint__every": EVERY,
    "report__every": 1,
    "eval__every": EVERY,
    "eval__lengths": (16,),
    "eval__batch_tokens": 16,
    "eval__tokens": 6_000,
    "model__dropout": 0.1,
}


def compiles(workdir, _):
    return (workdir / "metrics.jsonl").exists()


def evaluates(workdir, _):
    """The step before the evaluation is reported, and its metrics are not yet."""
    found = lines(workdir)
    return bool(found) and found[-1]["step"] == EVERY and "train/loss" in found[-1]


def steps(workdir, start):
    found = lines(workdir)
    return bool(found) and found[-1]["step"] > start + 3


def saves(workdir, _):
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


# In the order of a run; in-process tests of each signal are in test_loop.py.
MOMENTS = (
    (compiles, signal.SIGTERM),
    (evaluates, signal.SIGHUP),
    (steps, signal.SIGINT),
    (saves, signal.SIGTERM),
    (steps, signal.SIGKILL),  # the last: it leaves metrics of later steps
)


def interrupt(commands, running, workdir: pathlib.Path, moment, number: int):
    """Sends a signal at a moment of a run; returns its result."""
    start, deadline = newest(workdir), time.monotonic() + 300
    while not moment(workdir, start):
        assert time.monotonic() < deadline, running.err
        time.sleep(0.002)
    if moment in (compiles, evaluates):
        time.sleep(0.2)  # it has begun
    os.kill(running.process, number)
    begin = time.monotonic()
    result = commands.wait(running)
    assert time.monotonic() - begin < 30
    return result


def test_a_run_interrupted_at_every_moment_ends_as_one_that_was_not(commands, text, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    fields = FIELDS | {"config": f"{write_mixture(tmp_path, text)}:alibi"}
    assert commands("train", *train_arguments(straight, None, **fields)).code == 0
    arguments, saved = train_arguments(stopped, None, **fields), 0
    for moment, number in MOMENTS:
        result = interrupt(commands, commands.start("train", *arguments), stopped, moment, number)
        step = newest(stopped)
        assert f"resuming at step {saved}" in result.out or not saved
        if number == signal.SIGKILL:
            assert result.code == -number and step == saved and lines(stopped)[-1]["step"] > saved
            with open(stopped / "metrics.jsonl", "a") as file:
                file.write('{"step": 10000, "train/lo')  # as a crash in the middle of a line leaves it
            continue
        [message] = [line for line in result.err.splitlines() if not line.startswith("step ")]
        assert result.code == 75, result.err
        assert message == f"{signal.Signals(number).name} at step {step}: saved; the same command resumes from there"
        assert step == 0 and not lines(stopped) if moment is compiles else step == lines(stopped)[-1]["step"]
        if moment is evaluates:
            assert step == EVERY and not any("eval/loss@16" in line for line in lines(stopped))
        saved = step
    assert EVERY < saved < STEPS
    result = commands("train", *arguments)
    assert result.code == 0 and f"resuming at step {saved}" in result.out, result.err
    assert measured(stopped) == measured(straight)
    assert [line["step"] for line in lines(stopped) if "source/few/loss@16" in line] == [20, 40, 60]
    expected, found = (bits(arrays(workdir, STEPS)) for workdir in (straight, stopped))
    assert expected == found and len(expected) > 20
    before, after = arrays(straight, STEPS - EVERY), arrays(straight, STEPS)
    assert sum("params" in name and not np.array_equal(before[name], after[name]) for name in before) > 10


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
    fields = {"steps": 96, "checkpoint__every": 4, "checkpoint__keep_every": 4, "model__width": 48, "eval__every": 0}
    given = train_arguments(small_disk / "run", text, config=ALIBI, **fields)
    result = commands("train", *given)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    reported = [line for line in result.err.splitlines() if line.startswith("the save of step")]
    assert len(reported) == 3 and all("no space is left on the device" in line for line in reported), result.err
    assert reported[2].endswith("Once the cause is fixed, the same command resumes from there")
    last = newest(small_disk / "run")
    assert f"the last checkpoint is of step {last}." in reported[2] and 8 <= last < 96
    found = commands("evaluate", f"--checkpoint={small_disk / 'run'}", "--lengths=16", "--tokens=64")
    assert found.code == 0 and "damaged" not in found.err, found.err
    shutil.rmtree(small_disk / "run" / "checkpoints" / "4")
    again = commands("train", *given)
    assert again.code == 1 and f"resuming at step {last}" in again.out and newest(small_disk / "run") > last
