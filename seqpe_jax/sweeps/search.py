"""A search over ranges: Optuna proposes trials, each a run that trains; hopeless ones are stopped early."""

import contextlib
import logging
import pathlib
import time
from typing import Any

from seqpe_jax.distributed.progress import read_metrics
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.sweeps import record
from seqpe_jax.sweeps.local import LOOK, TURN, Jobs, ProgressView
from seqpe_jax.sweeps.run import Locked, SweepRun
from seqpe_jax.sweeps.spec import Range, Search, SweepFile, make_trial

FILE = "optuna.db"  # the study, in the sweep's folder
IMPOSSIBLE = "impossible"  # attribute of a trial whose values are no config: why
UNPRUNED = 4  # trials that run to their end before others are compared with them


def check(sweep: SweepFile) -> tuple[Search, int]:
    """Returns the search of a sweep, and the steps of a trial.

    Raises:
      InputError: there is none, or Optuna is not here.
    """
    if sweep.search is None:
        raise InputError(f"--executor=optuna: {sweep.path} defines no SEARCH (see configs/sweeps/search.py)")
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InputError("--executor=optuna needs Optuna: pip install optuna") from error
    field, values = next(iter(sweep.search.ranges.items()))
    first = values.low if isinstance(values, Range) else values[0]
    settings = make_trial("search", sweep.config, {**sweep.search.overrides, field: first}).settings
    return sweep.search, settings.steps


class SearchTrials:
    """The trials of a study, their runs and what became of them: name -> "finished", "pruned" or "failed".

    A combination of values that is no config counts as pruned; `impossible` tells why, by name.
    """

    def __init__(self, workdir: pathlib.Path, sweep: SweepFile):
        """Opens the study of a folder, or begins one. Raises: as `check` and `record.remember`."""
        import optuna

        self.search, steps = check(sweep)
        self.steps = {_name(number): steps for number in range(self.search.trials)}
        self._workdir, self._sweep, self._states = workdir, sweep, optuna.trial.TrialState
        record.remember(workdir, sweep, ())
        optuna.logging.set_verbosity(logging.WARNING)
        self._study = optuna.create_study(
            storage=f"sqlite:///{(workdir / FILE).resolve()}",
            study_name="sweep",
            load_if_exists=True,
            direction="minimize" if self.search.minimise else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED),
        )
        past = self._study.get_trials()
        self._study.sampler = optuna.samplers.TPESampler(
            seed=len(past)
        )  # one that goes on does not propose the same again
        # What a search that was cut short left running keeps its number, its values and its folder.
        self._cut_short = [optuna.trial.Trial(self._study, at._trial_id) for at in past if not at.state.is_finished()]
        words = {self._states.COMPLETE: "finished", self._states.PRUNED: "pruned"}
        self.outcomes = {_name(at.number): words.get(at.state, "failed") for at in past if at.state.is_finished()}
        self.impossible = {_name(at.number): at.user_attrs[IMPOSSIBLE] for at in past if IMPOSSIBLE in at.user_attrs}
        self._trials: dict[str, Any] = {}
        self._reported = {_name(at.number): max(at.intermediate_values, default=0) for at in past}  # up to which step
        self.hopeless: set[str] = set()

    def next(self) -> SweepRun | None:
        """Returns the run of one more trial, None if there are enough."""
        while self._cut_short or len(self.outcomes) + len(self._trials) < self.search.trials:
            trial = self._cut_short.pop(0) if self._cut_short else self._study.ask()
            name = _name(trial.number)
            chosen = {field: _suggest(trial, field, values) for field, values in self.search.ranges.items()}
            try:
                trial = make_trial(name, self._sweep.config, {**self.search.overrides, **chosen})
            except InputError as error:
                self._prune_impossible(trial, str(error).removeprefix(f"run '{name}': "))
                continue
            record.remember(self._workdir, self._sweep, (trial,))
            run = SweepRun(trial, self._workdir / name, evaluated=False)
            self._trials[name] = trial
            return run
        return None

    def _prune_impossible(self, trial: Any, why: str) -> None:
        """Ends a trial that cannot run. As a pruned one the sampler takes it for bad, and a failed one it would ignore."""
        name = _name(trial.number)
        trial.set_user_attr(IMPOSSIBLE, why)
        self._study.warn(trial, state=self._states.PRUNED)
        self.outcomes[name], self.impossible[name] = "pruned", why

    def is_hopeless(self, run: SweepRun) -> bool:
        """Tells the study what was measured since; whether the trial should end, which is said once."""
        self._report(run)
        if run.name in self.hopeless or not self._trials[run.name].should_prune():
            return False
        self.hopeless.add(run.name)
        return True

    def settle(self, run: SweepRun, outcome: str) -> None:
        """Tells the study how a trial ended; one that was only stopped goes on another time."""
        measured = self._report(run)
        if outcome == "finished" and not measured:
            outcome = "failed"
        if outcome == "stopped":
            if run.name not in self.hopeless:
                return
            outcome = "pruned"
        trial = self._trials.pop(run.name)
        states = {"pruned": self._states.PRUNED, "failed": self._states.FAIL}
        if outcome == "finished":
            self._study.warn(trial, measured[-1][1])
        else:
            self._study.warn(trial, state=states[outcome])
        self.outcomes[run.name] = outcome

    def best(self) -> tuple[SweepRun, str]:
        """Returns the run of the best trial that came to its end, and what it measured with which fields.

        Raises:
          InputError: none was a config; Failure: none came to its end.
        """
        if self.outcomes and self.impossible.keys() == self.outcomes.keys():
            name, why = next(reversed(self.impossible.items()))
            raise InputError(
                f"{self._sweep.path}: none of the {len(self.outcomes)} trials of SEARCH is a possible config, the last, "
                f"{name}, because {why}"
            )
        if "finished" not in self.outcomes.values():
            raise Failure(f"{len(self.outcomes)} of {len(self.steps)} trials ended, none with its {self.search.metric}")
        best = self._study.best_trial
        trial = make_trial(_name(best.number), self._sweep.config, {**self.search.overrides, **best.params})
        fields = ", ".join(f"{field}={best.params[field]}" for field in self.search.ranges)
        words = f"best: {trial.name}, {self.search.metric} {best.value:.4g} with {fields}"
        return SweepRun(trial, self._workdir / trial.name), words

    def _report(self, run: SweepRun) -> list[tuple[int, float]]:
        """Tells the study what was measured since, and returns all of it as (step, value)."""
        lines = read_metrics(run.folder)
        measured = [(line["step"], line[self.search.metric]) for line in lines if self.search.metric in line]
        for step, value in measured:
            if step > self._reported.get(run.name, 0):
                self._reported[run.name] = step
                self._trials[run.name].report(value, step)
        return measured


def work(trials: SearchTrials, jobs: int) -> str | None:
    """Runs trials until there are as many as the search asks for; returns the name of the signal that stopped it."""
    waiting: SweepRun | None = None
    looked = 0.0
    with Jobs(jobs) as at_work, contextlib.closing(ProgressView(trials.steps)) as view:
        while True:
            for run, outcome in at_work.ended():
                trials.settle(run, outcome)
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                for run in filter(trials.is_hopeless, at_work.runs):
                    at_work.stop(run)
            while at_work.free and (waiting := waiting or trials.next()) is not None:
                try:
                    if waiting.remaining_commands():
                        at_work.start(waiting)
                    else:  # it ended when nobody looked
                        trials.settle(waiting, "finished")
                    waiting = None
                except Locked:  # of a search that was killed: wait for it
                    break
            if not at_work.runs and (at_work.stop_signal or waiting is None):
                return at_work.stop_signal
            view.show(trials.outcomes, at_work.runs)
            time.sleep(TURN)


def _name(number: int) -> str:
    return f"trial-{number:03d}"


def _suggest(trial: Any, field: str, values: Range | tuple) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(field, list(values))
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    return (trial.suggest_int if whole else trial.suggest_float)(field, values.low, values.high, log=values.log)
