"""Hyperparameter search: Optuna proposes trials, each a training run; unpromising ones are pruned early."""

import contextlib
import logging
import pathlib
import time
from typing import Any

from seqpe_jax.errors import Failure, InputError
from seqpe_jax.run_dir import RunDir
from seqpe_jax.sweeps.local import FOLDER_SECONDS, POLL_SECONDS, Jobs, ProgressView
from seqpe_jax.sweeps.run import Locked, SweepRun
from seqpe_jax.sweeps.spec import Range, Search, SweepFile, make_trial
from seqpe_jax.sweeps.trial_graph import record_trials

STUDY_FILE = "optuna.db"  # in the sweep's folder
INVALID = "impossible"  # attribute of a trial whose values are no valid config: the reason
STARTUP_TRIALS = 4  # trials that run to their end before others are pruned


def check_search(sweep: SweepFile) -> tuple[Search, int]:
    """Returns the search of a sweep file and the training steps of a trial.

    Args:
      sweep: the sweep file.

    Raises:
      InputError: it has no SEARCH, or Optuna is missing.
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
    """The trials of an Optuna study, and their runs.

    Attributes:
      search: ranges and metric.
      steps: trial name -> training steps.
      outcomes: trial name -> "finished", "pruned" or "failed"; values that are no valid config count as pruned.
      invalid: trial name -> why its values are no valid config.
    """

    def __init__(self, workdir: pathlib.Path, sweep: SweepFile):
        """Opens the study of a folder, or creates one.

        Args:
          workdir: folder of the sweep.
          sweep: sweep file with a SEARCH.

        Raises:
          InputError: see `check_search` and `record_trials`.
        """
        import optuna

        self.search, steps = check_search(sweep)
        self.steps = {_name(number): steps for number in range(self.search.trials)}
        self._workdir, self._sweep, self._states = workdir, sweep, optuna.trial.TrialState
        record_trials(workdir, sweep, ())
        optuna.logging.set_verbosity(logging.WARNING)
        self._study = optuna.create_study(
            storage=f"sqlite:///{(workdir / STUDY_FILE).resolve()}",
            study_name="sweep",
            load_if_exists=True,
            direction="minimize" if self.search.minimise else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
        )
        past = self._study.get_trials()
        self._study.sampler = optuna.samplers.TPESampler(seed=len(past))  # resumed, it does not repeat its proposals
        # Trials that an interrupted search left running keep their number, values and folder.
        self._interrupted = [
            optuna.trial.Trial(self._study, one._trial_id) for one in past if not one.state.is_finished()
        ]
        words = {self._states.COMPLETE: "finished", self._states.PRUNED: "pruned"}
        self.outcomes = {_name(one.number): words.get(one.state, "failed") for one in past if one.state.is_finished()}
        self.invalid = {_name(one.number): one.user_attrs[INVALID] for one in past if INVALID in one.user_attrs}
        self._trials: dict[str, Any] = {}  # name -> Optuna's trial, of those under way
        self._last_reported = {_name(one.number): max(one.intermediate_values, default=0) for one in past}  # step
        self._to_prune: set[str] = set()

    def next(self) -> SweepRun | None:
        """Returns the run of one more trial, None if there are enough."""
        while self._interrupted or len(self.outcomes) + len(self._trials) < self.search.trials:
            trial = self._interrupted.pop(0) if self._interrupted else self._study.ask()
            name = _name(trial.number)
            values = {field: _suggest(trial, field, choices) for field, choices in self.search.ranges.items()}
            try:
                own = make_trial(name, self._sweep.config, {**self.search.overrides, **values})
            except InputError as error:
                # Pruned, the sampler takes such values for bad; a failed trial it would ignore.
                self.outcomes[name], self.invalid[name] = "pruned", str(error).removeprefix(f"run '{name}': ")
                trial.set_user_attr(INVALID, self.invalid[name])
                self._study.tell(trial, state=self._states.PRUNED)
                continue
            record_trials(self._workdir, self._sweep, (own,))
            self._trials[name] = trial
            return SweepRun(own, self._workdir / name, evaluated=False)
        return None

    def should_prune(self, run: SweepRun) -> bool:
        """Reports new metrics of a run to the study; returns whether to stop the run, once."""
        self._report(run)
        if run.name in self._to_prune or not self._trials[run.name].should_prune():
            return False
        self._to_prune.add(run.name)
        return True

    def finish(self, run: SweepRun, outcome: str) -> None:
        """Reports the end of a run to the study; a run that was only stopped resumes another time.

        Args:
          run: a run of `next`.
          outcome: "finished", "failed" or "stopped".
        """
        measured = self._report(run)
        if outcome == "finished" and not measured:
            outcome = "failed"
        if outcome == "stopped":
            if run.name not in self._to_prune:
                return
            outcome = "pruned"
        trial = self._trials.pop(run.name)
        if outcome == "finished":
            self._study.tell(trial, measured[-1][1])
        else:
            self._study.tell(trial, state={"pruned": self._states.PRUNED, "failed": self._states.FAIL}[outcome])
        self.outcomes[run.name] = outcome

    def best(self) -> tuple[SweepRun, str]:
        """Returns the run of the best finished trial, and a line with its metric and fields.

        Raises:
          InputError: no trial was a valid config.
          Failure: no trial has finished.
        """
        if self.outcomes and self.invalid.keys() == self.outcomes.keys():
            name, why = next(reversed(self.invalid.items()))
            raise InputError(
                f"{self._sweep.path}: none of the {len(self.outcomes)} trials of SEARCH is a possible config, the last, "
                f"{name}, because {why}"
            )
        if "finished" not in self.outcomes.values():
            raise Failure(f"{len(self.outcomes)} of {len(self.steps)} trials ended, none with its {self.search.metric}")
        best = self._study.best_trial
        own = make_trial(_name(best.number), self._sweep.config, {**self.search.overrides, **best.params})
        fields = ", ".join(f"{field}={best.params[field]}" for field in self.search.ranges)
        line = f"best: {own.name}, {self.search.metric} {best.value:.4g} with {fields}"
        return SweepRun(own, self._workdir / own.name), line

    def _report(self, run: SweepRun) -> list[tuple[int, float]]:
        """Reports new metrics of a run to the study; returns all of them as (step, value)."""
        lines = RunDir(run.folder).read_metrics()
        measured = [(line["step"], line[self.search.metric]) for line in lines if self.search.metric in line]
        for step, value in measured:
            if step > self._last_reported.get(run.name, 0):
                self._last_reported[run.name] = step
                self._trials[run.name].report(value, step)
        return measured


def execute(trials: SearchTrials, jobs: int) -> str | None:
    """Runs trials until there are as many as the search asks for.

    Args:
      trials: the study.
      jobs: number of runs at a time.

    Returns:
      Name of the signal that stopped it, or None.
    """
    waiting: SweepRun | None = None
    last_read = 0.0
    with Jobs(jobs) as at_work, contextlib.closing(ProgressView(trials.steps)) as view:
        while True:
            for run, outcome in at_work.ended():
                trials.finish(run, outcome)
            if time.monotonic() - last_read > FOLDER_SECONDS:
                last_read = time.monotonic()
                for run in filter(trials.should_prune, at_work.runs):
                    at_work.stop(run)
            while at_work.has_free_job and (waiting := waiting or trials.next()) is not None:
                try:
                    if waiting.remaining_commands():
                        at_work.start(waiting)
                    else:  # it ended after the search was killed
                        trials.finish(waiting, "finished")
                    waiting = None
                except Locked:  # by a search that was killed: wait for it
                    break
            if not at_work.runs and (at_work.stop_signal or waiting is None):
                return at_work.stop_signal
            view.show(trials.outcomes, at_work.runs)
            time.sleep(POLL_SECONDS)


def _name(number: int) -> str:
    return f"trial-{number:03d}"


def _suggest(trial: Any, field: str, values: Range | tuple) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(field, list(values))
    integers = isinstance(values.low, int) and isinstance(values.high, int)
    return (trial.suggest_int if integers else trial.suggest_float)(field, values.low, values.high, log=values.log)
