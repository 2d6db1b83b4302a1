"""A run that is told to stop, whatever it is doing, is saved and says so; the same command goes on from there."""

import os
import signal
import time

import pytest

from tests.commands import train_arguments
from tests.training.test_resume import CLOCK, arrays, lines, newest

pytestmark = pytest.mark.slow

STEPS, EVALUATED = 120, 10
FIELDS = {
    "config": "tests/tiny_text.py:alibi",
    "steps": STEPS,
    "checkpoint__every": 20,
    "report__every": 1,
    "eval__every": EVALUATED,
    "eval__lengths": (16,),
    "eval__batch_tokens": 16,
    "eval__tokens": 12_000,
}
SIGNALS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT] * 2,
    "SIGHUP": [signal.SIGHUP],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(12_000)))
    return path


def compiles(workdir):
    """The folder is claimed, and no step is told yet."""
    return (workdir / "metrics.jsonl").exists()


def steps(workdir):
    return len(lines(workdir)) >= EVALUATED // 2


def evaluates(workdir):
    """The step before has been told, and what is measured after it has not."""
    told = lines(workdir)
    return bool(told) and told[-1]["step"] == EVALUATED and "train/loss" in told[-1]


def saves(workdir):
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


MOMENTS = {"compilation": compiles, "step": steps, "evaluation": evaluates, "save": saves}


def stop(commands, running, workdir, moment, numbers):
    """Sends signals as soon as a run is at a moment; returns what it left, and the seconds until then."""
    deadline = time.monotonic() + 300
    while not MOMENTS[moment](workdir):
        assert time.monotonic() < deadline, running.err
        time.sleep(0.002)
    if moment in ("compilation", "evaluation"):
        time.sleep(0.2)  # it has begun
    for number in numbers:
        os.kill(running.process, number)
        time.sleep(0.01)
    began = time.monotonic()
    return commands.wait(running), time.monotonic() - began


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("told", SIGNALS)
def test_a_run_is_told_to_stop(commands, text, tmp_path, told, moment):
    workdir, fields = tmp_path / "run", FIELDS | ({} if moment == "evaluation" else {"eval__every": 0})
    given = train_arguments(workdir, text, **fields)
    result, seconds = stop(commands, commands.start("train", *given), workdir, moment, SIGNALS[told])
    said = [line for line in result.err.splitlines() if not line.startswith("step ")]
    assert len(said) == 1 and seconds < 30, result.err
    if told == "SIGINT twice" and result.code == 130:
        assert said == ["interrupted"]
        return
    at = newest(workdir)
    assert result.code == 75
    if at or "at step" in said[0]:
        assert said == [f"{told.split()[0]} at step {at}: saved; the same command resumes from there"]
    else:
        assert moment == "compilation" and said[0].startswith(f"{told.split()[0]}: there is nothing to save now")
    if moment == "evaluation":
        assert at == EVALUATED and not any("eval/loss@16" in line for line in lines(workdir)), (
            "it did not wait for the end"
        )
    assert moment != "compilation" or (at == 0 and not lines(workdir))


def test_runs_that_were_told_to_stop_end_as_one_that_was_not(commands, text, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    fields = FIELDS | {"steps": 2 * EVALUATED, "eval__tokens": 6_000}
    assert commands("train", *train_arguments(straight, text, **fields)).code == 0
    given = train_arguments(stopped, text, **fields)
    for moment in ("compilation", "evaluation"):
        result, _ = stop(commands, commands.start("train", *given), stopped, moment, [signal.SIGTERM])
        assert result.code == 75, result.err
    assert commands("train", *given).code == 0
    expected, found = (
        [{name: value for name, value in line.items() if name not in CLOCK} for line in lines(one)]
        for one in (straight, stopped)
    )
    assert found == expected and sum("eval/loss@16" in line for line in found) == 2
    expected, found = (arrays(one, 2 * EVALUATED) for one in (straight, stopped))
    assert {name: one.tobytes() for name, one in found.items()} == {
        name: one.tobytes() for name, one in expected.items()
    }
