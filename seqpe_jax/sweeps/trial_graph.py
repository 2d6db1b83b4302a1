"""Runs that wait for others: a field whose value is that of the best of other runs is decided once those have ended."""

import dataclasses
import math
from collections.abc import Collection, Sequence

from seqpe_jax.distributed.progress import read_metrics
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath
from seqpe_jax.sweeps import record
from seqpe_jax.sweeps.run import SweepRun
from seqpe_jax.sweeps.spec import BestOf, Trial, make_trial, value_of


class TrialGraph:
    """The runs of a sweep, with what they wait for decided where that has ended.

    Of the runs that decide, those that failed are left out, and the decision says so. It is recorded, and stands as soon as
    one of the runs that it settles has begun; before that it is made anew, as a run that failed may have been mended.

    Attributes:
      runs: of the sweep, in its order, by name. Those that others wait for are measured on the validation split while they
        train, and not evaluated on the test split.
      recorded: what has been decided, by name and field.
    """

    def __init__(self, workdir: AnyPath, trials: Sequence[Trial]):
        """Takes the points of a sweep, and what its folder has decided. Raises: InputError: a damaged record."""
        self._workdir = workdir
        deciding = {name for trial in trials for best in trial.best.values() for name in best.runs}
        self.runs = {trial.name: SweepRun(trial, workdir / trial.name, trial.name not in deciding) for trial in trials}
        self.recorded = record.decisions(workdir)
        self._standing = {
            (field, best): self.recorded[name][field]
            for name, run in self.runs.items()
            if name in self.recorded and (run.folder / "config.json").exists()
            for field, best in run.trial.best.items()
        }

    def now(self, runs: Sequence[SweepRun]) -> list[SweepRun]:
        """Returns runs with what has been decided since."""
        return [self.runs.get(run.name, run) for run in runs]

    def settle(self, pending: Collection[str] = ()) -> list[str]:
        """Decides what can be decided, records it, and returns a line for each decision that is new.

        Args:
          pending: names of runs that will be worked on, and have not ended even if they failed before.
        """
        decided = {}
        for name, run in self.runs.items():
            found = {
                field: self._standing.get((field, best)) or self._decision(best, field, pending)
                for field, best in run.trial.best.items()
            }
            if found and all(found.values()):
                decided[name] = found
                values = {field: one["value"] for field, one in found.items()}
                closed = make_trial(name, run.trial.config, {**run.trial.overrides, **values})
                self.runs[name] = dataclasses.replace(run, trial=closed)
        if decided:
            record.decide(self._workdir, decided, {name: self.runs[name].trial for name in decided})
        groups: dict[str, list[str]] = {}
        for name, found in decided.items():
            for field, one in found.items():
                if self.recorded.get(name, {}).get(field) != one:
                    groups.setdefault(in_words(field, one), []).append(name)
        self.recorded |= decided
        return [f"{', '.join(names)}: {words}" for words, names in groups.items()]

    def check(self, chosen: Sequence[SweepRun]) -> None:
        """Refuses runs that wait for others which have not ended and are not among them.

        Raises:
          InputError: names these.
        """
        names = {run.name for run in chosen}
        for run in chosen:
            for field, best in run.trial.best.items():
                missing = [name for name in best.runs if name not in names and not self._ended(self.runs[name], ())]
                if missing and (field, best) not in self._standing:
                    raise InputError(
                        f"--only: '{run.name}' waits for {', '.join(missing)}, whose results decide its {field}: name "
                        "these too, or run them before"
                    )

    def obstacles(self, runs: Sequence[SweepRun]) -> list[str]:
        """Returns a line for each group of runs that cannot begin, with what they wait for."""
        groups: dict[str, list[str]] = {}
        for run in self.now(runs):
            for field, best in run.trial.best.items():
                left = [one for one in map(self.runs.get, best.runs) if self._measured(one, best) is None]
                words = f"for {', '.join(f'{one.name} ({self._state(one)})' for one in left)} to decide {field}"
                groups.setdefault(words, []).append(run.name)
        return [f"{', '.join(names)} wait{'s' * (len(names) == 1)} {words}" for words, names in groups.items()]

    @staticmethod
    def _state(run: SweepRun) -> str:
        return "failed" if run.failure() else "not finished" if run.remaining_commands() else "measured no number"

    def _decision(self, best: BestOf, field: str, pending: Collection[str]) -> record.Decision | None:
        """What decides a field, as the record has it; None while runs are left, and where all failed."""
        runs = [self.runs[name] for name in best.runs]
        if not all(self._ended(run, pending) for run in runs):
            return None
        measured = {run.name: self._measured(run, best) for run in runs}
        there = [name for name, value in measured.items() if value is not None]
        if not there:
            return None
        chosen = (min if best.minimise else max)(there, key=lambda name: measured[name])  # of equal ones the first
        value = value_of(self.runs[chosen].trial.settings, field)
        return {"value": value, "run": chosen, "metric": best.metric, "measured": measured}

    @staticmethod
    def _ended(run: SweepRun, pending: Collection[str]) -> bool:
        return not run.remaining_commands() or (run.name not in pending and run.failure() is not None)

    @staticmethod
    def _measured(run: SweepRun, best: BestOf) -> float | None:
        """What a finished run measured at its last step; None without it, or where it is no number."""
        if run.remaining_commands():
            return None
        found = [line.get(best.metric) for line in read_metrics(run.folder) if line["step"] == run.steps]
        return next((value for value in found if value is not None and math.isfinite(value)), None)


def in_words(field: str, decided: record.Decision) -> str:
    """Returns what was decided, and how."""
    value, run = decided["value"], decided["run"]
    without = [name for name, measured in decided["measured"].items() if measured is None]
    left_out = f"; without {', '.join(without)}, which failed" if without else ""
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{field}={shown} ({run} has the best {decided['metric']}, {decided['measured'][run]:.4g}{left_out})"
