"""A search records its trials: unpromising ones are pruned, interrupted ones resume, the best is known."""

import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from seqpe_jax.errors import Failure, InputError
from seqpe_jax.sweeps import search
from seqpe_jax.sweeps.spec import Range, Search, SweepFile
from tests.sweeps.fake import FakeRun

optuna = pytest.importorskip("optuna")
ROOT = pathlib.Path(__file__).resolve().parents[2]
OVERRIDES = {"eval.every": 1, "steps": 3, "data.paths": ("x",)}


def sweep(trials: int, **given) -> SweepFile:
    given = {"ranges": {"seed": Range(0, 99)}, "minimise": "eval/loss@16"} | given
    search = Search(overrides=OVERRIDES, trials=trials, **given)
    return SweepFile("sweep.py", f"{ROOT}/tests/tiny_text.py:alibi", (), search)


@pytest.fixture
def wishes(monkeypatch):
    """What the trials measure, in turn; each asks once."""
    found: dict[str, str] = {}

    def made(trial, folder, evaluated=True):
        return FakeRun(trial, folder, evaluated=evaluated, wish=found.get(trial.name, "0.5"))

    monkeypatch.setattr(search, "SweepRun", made)
    monkeypatch.setattr(search, "FOLDER_SECONDS", 0.05)
    return found


@pytest.mark.slow
def test_unpromising_trials_are_pruned_and_the_best_is_known(tmp_path, wishes, monkeypatch):
    monkeypatch.setattr(search, "STARTUP_TRIALS", 2)
    wishes |= {"trial-000": "0.75", "trial-001": "0.25", "trial-002": "9.0", "trial-003": "fails", "trial-004": "0.5"}
    trials = search.SearchTrials(tmp_path / "sweep", sweep(5))
    assert search.execute(trials, 1) is None
    assert list(trials.outcomes.values()) == ["finished", "finished", "pruned", "failed", "finished"]
    assert (tmp_path / "sweep" / "trial-002" / "log.txt").read_text().endswith("SIGTERM: saved\n")
    run, words = trials.best()
    assert run.name == "trial-001" and words.startswith("best: trial-001, eval/loss@16 0.25 with seed=")
    assert run.evaluated and run.trial.settings.seed == run.trial.overrides["seed"]

    before = {path: path.read_bytes() for path in (tmp_path / "sweep").glob("*/log.txt")}
    again = search.SearchTrials(tmp_path / "sweep", sweep(6))
    assert again.outcomes == trials.outcomes and search.execute(again, 1) is None
    assert list(again.outcomes) == [f"trial-00{number}" for number in range(6)]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_interrupted_trial_resumes_with_its_values(tmp_path, wishes):
    wishes |= {"trial-000": "waits"}
    trials = search.SearchTrials(tmp_path, sweep(2))

    def send():
        while not (tmp_path / "trial-000" / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert search.execute(trials, 1) == "SIGTERM" and trials.outcomes == {}
    sender.join()
    with pytest.raises(Failure, match="0 of 2 trials ended"):
        trials.best()
    seed = {at.number: at.params for at in trials._study.get_trials()}[0]["seed"]

    wishes.clear()
    again = search.SearchTrials(tmp_path, sweep(2))
    assert search.execute(again, 1) is None and again.outcomes == {"trial-000": "finished", "trial-001": "finished"}
    assert again._study.get_trials()[0].params == {"seed": seed}


HEADS = {"model.heads": (2, 3), "model.width": (24, 32)}  # 3 heads do not divide a width of 32


@pytest.mark.slow
def test_a_combination_that_is_not_possible_is_pruned_and_the_search_goes_on(tmp_path, wishes):
    trials = search.SearchTrials(tmp_path, sweep(8, ranges=HEADS))
    assert search.execute(trials, 1) is None
    values = {f"trial-00{at.number}": tuple(at.params.values()) for at in trials._study.get_trials()}
    bad = {name for name, chosen in values.items() if chosen == (3, 32)}
    assert len(trials.outcomes) == 8 and 0 < len(bad) < 8
    assert {name for name, outcome in trials.outcomes.items() if outcome == "pruned"} == bad == trials.invalid.keys()
    assert all("model.width=32" in why and "model.heads=3" in why for why in trials.invalid.values())
    assert not any((tmp_path / name).exists() for name in bad) and trials.best()[0].name not in bad

    # What an earlier search left when such a combination ended it: under way, with its values.
    trials._study.enqueue_trial({name: choices[-1] for name, choices in HEADS.items()})
    left = trials._study.ask()
    assert [left.suggest_categorical(name, choices) for name, choices in HEADS.items()] == [3, 32]
    again = search.SearchTrials(tmp_path, sweep(10, ranges=HEADS))
    assert again.invalid == trials.invalid and search.execute(again, 1) is None
    assert len(again.outcomes) == 10 and again.outcomes[f"trial-00{left.number}"] == "pruned"


def test_a_search_of_which_nothing_is_possible_ends_with_one_line(tmp_path, wishes):
    ranges = {"seed": Range(0, 99), "model.heads": (3,), "model.width": (32,)}
    trials = search.SearchTrials(tmp_path, sweep(3, ranges=ranges))
    assert search.execute(trials, 2) is None and list(trials.outcomes.values()) == ["pruned"] * 3
    with pytest.raises(
        InputError, match="none of the 3 trials of SEARCH is a possible config.*model.heads=3"
    ) as caught:
        trials.best()
    assert "\n" not in str(caught.value)


def test_without_optuna_or_a_search_one_line_says_so(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="sweep.py defines no SEARCH"):
        search.check_search(SweepFile("sweep.py", "x", (), None))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match="pip install optuna"):
        search.check_search(sweep(2))
