"""A signal at any moment of a run: it is saved, exits with code 75, and ends as if it had not been interrupted."""

import os
import signal
import time

import pytest

from tests.commands import train_arguments
from tests.training.test_resume import CLOCK, arrays, lines, newest

pytestmark = pytest.mark.slow

STEPS, EVAL_EVERY = 60, 20
FIELDS = {
    "config": "tests/tiny_text.py:alibi",
    "steps": STEPS,
    "checkpoint__every": 20,
    "report__every": 1,
    "eval__every": EVAL_EVERY,
    "eval__lengths": (16,),
    "eval__batch_tokens": 16,
    "eval__tokens": 6_000,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(12_000)))
    return path


def compiles(workdir, _):
    return (workdir / "metrics.jsonl").exists()


def evaluates(workdir, start):
    """The step before the evaluation is reported, and its metrics are not yet."""
    found = lines(workdir)
    return bool(found) and found[-1]["step"] == EVAL_EVERY and "train/loss" in found[-1]


def steps(workdir, start):
    found = lines(workdir)
    return bool(found) and found[-1]["step"] > start + 3


def saves(workdir, _):
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


# In the order of a run, each with its signals.
MOMENTS = {
    "compilation": (compiles, [signal.SIGTERM]),
    "evaluation": (evaluates, [signal.SIGHUP]),
    "step": (steps, [signal.SIGINT]),
    "save": (saves, [signal.SIGTERM]),
}


def interrupt(commands, running, workdir, moment, numbers):
    """Sends signals at a moment of a run; returns its result."""
    start, deadline = newest(workdir), time.monotonic() + 300
    while not MOMENTS[moment][0](workdir, start):
        assert time.monotonic() < deadline, running.err
        time.sleep(0.002)
    if moment in ("compilation", "evaluation"):
        time.sleep(0.2)  # it has begun
    for number in numbers:
        os.kill(running.process, number)
        time.sleep(0.01)
    begin = time.monotonic()
    result = commands.wait(running)
    assert time.monotonic() - begin < 30
    return result


def messages(result):
    return [line for line in result.err.splitlines() if not line.startswith("step ")]


def test_a_run_interrupted_at_every_moment_ends_as_one_that_was_not(commands, text, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert commands("train", *train_arguments(straight, text, **FIELDS)).code == 0
    arguments = train_arguments(stopped, text, **FIELDS)
    for moment, (_, numbers) in MOMENTS.items():
        result = interrupt(commands, commands.start("train", *arguments), stopped, moment, numbers)
        step = newest(stopped)
        assert result.code == 75 and len(messages(result)) == 1, result.err
        if moment == "compilation":
            assert step == 0 and not lines(stopped)
            continue
        assert messages(result) == [
            f"{signal.Signals(numbers[0]).name} at step {step}: saved; the same command resumes from there"
        ]
        if moment == "evaluation":
            assert step == EVAL_EVERY and not any("eval/loss@16" in line for line in lines(stopped))
    assert commands("train", *arguments).code == 0
    expected, found = (
        [{name: value for name, value in line.items() if name not in CLOCK} for line in lines(workdir)]
        for workdir in (straight, stopped)
    )
    assert found == expected and sum("eval/loss@16" in line for line in found) == STEPS // EVAL_EVERY
    expected, found = (arrays(workdir, STEPS) for workdir in (straight, stopped))
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


def test_a_second_signal_acts_at_once(commands, text, tmp_path):
    running = commands.start("train", *train_arguments(tmp_path / "run", text, **FIELDS))
    result = interrupt(commands, running, tmp_path / "run", "step", [signal.SIGINT] * 2)
    assert result.code == 130 and messages(result) == ["interrupted"] or result.code == 75
