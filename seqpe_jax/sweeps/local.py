"""Runs of a sweep on this machine: some at once, each on its share of the cores."""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from seqpe_jax.distributed.progress import STORE_SECONDS, ProgressLine
from seqpe_jax.files import is_remote
from seqpe_jax.sweeps.run import Locked, RunProcess, SweepRun, is_locked, map_runs
from seqpe_jax.sweeps.trial_graph import TrialGraph

TURN = 0.1  # seconds between looks at the commands
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK = 1.0  # seconds between looks at the folders


def shares(jobs: int) -> list[set[int]] | None:
    """Returns the cores of each job, or None where a process's cores cannot be chosen (not Linux) or need not be."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[job::jobs]) or {cores[job % len(cores)]} for job in range(jobs)]


def describe(jobs: int) -> str:
    """Returns how the machine is divided among so many jobs."""
    parts = shares(jobs)
    if jobs == 1:
        return "one at a time, on all cores"
    if parts is None:
        return f"{jobs} at a time; this system cannot bind them to cores: each takes as many threads as there are"
    total, most = len(set().union(*parts)), max(map(len, parts))
    shared = f", more than the {total} cores, so that some share one" if jobs > total else ""
    return f"{jobs} at a time, each on {most} of {total} cores{shared}"


class Jobs:
    """Runs at work, `limit` of them at most; SIGINT, SIGTERM and SIGHUP stop them, saved, while it is entered.

    Where CUDA_VISIBLE_DEVICES names several devices, the jobs take them in turns.
    """

    def __init__(self, limit: int):
        self.limit, self.stop_signal = limit, None
        self._shares = shares(limit)
        self._devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        self._at_work: dict[int, RunProcess] = {}  # by the number of the job

    def __enter__(self) -> "Jobs":
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self._previous = {number: signal.signal(number, self._stop) for number in heard}
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is not None:  # the sweep itself failed
            for process in self._at_work.values():
                process.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        self.stop_signal = signal.Signals(number).name
        for process in list(self._at_work.values()):
            process.stop()

    @property
    def runs(self) -> list[SweepRun]:
        """Those at work."""
        return [process.run for process in self._at_work.values()]

    @property
    def free(self) -> bool:
        """Whether a run may be started: a job is free, and nobody told to stop."""
        return len(self._at_work) < self.limit and not self.stop_signal

    def start(self, run: SweepRun) -> None:
        """Begins a run on a free job. Raises: Busy: another process works on it."""
        free = next(job for job in range(self.limit) if job not in self._at_work)
        many = len(self._devices) > 1 and self.limit > 1
        device = {"CUDA_VISIBLE_DEVICES": self._devices[free % len(self._devices)]} if many else {}
        self._at_work[free] = RunProcess(run, cores=self._shares[free] if self._shares else None, environment=device)
        if self.stop_signal:  # the signal came while it began
            self._at_work[free].stop()

    def stop(self, run: SweepRun) -> None:
        """Asks one run to save and end."""
        next(process for process in self._at_work.values() if process.run == run and not process.stop_requested).stop()

    def ended(self) -> Iterator[tuple[SweepRun, str]]:
        """Yields the runs that ended since, and how: "finished", "failed" or "stopped"."""
        for job, process in list(self._at_work.items()):
            outcome = process.poll()
            if outcome is not None:
                del self._at_work[job]
                yield process.run, outcome


class ProgressView:
    """One line on all runs of a sweep, by the steps of their trainings."""

    def __init__(self, steps: Mapping[str, int], pause: float = LOOK):
        """Takes the steps that each run trains, by its name, and the seconds between looks at the folders."""
        self._steps, self._pause = steps, pause
        self._line = ProgressLine(sum(steps.values()))
        self._looked = 0.0

    def show(self, outcomes: Mapping[str, str], at_work: Sequence[SweepRun]) -> None:
        """Shows it, if it is time to.

        Args:
          outcomes: how runs ended, "finished" or otherwise, by name; at_work: the runs under way.
        """
        now = time.monotonic()
        if now - self._looked < self._pause:
            return
        self._looked = now
        count = Counter(outcomes.values())
        total = sum(steps for name, steps in self._steps.items() if outcomes.get(name, "finished") == "finished")
        done = sum(steps for name, steps in self._steps.items() if outcomes.get(name) == "finished")
        done += sum(run.steps_done() for run in at_work)
        names = ", ".join(run.name for run in at_work[:4]) + (", ..." if len(at_work) > 4 else "")
        self._line.update(
            done,
            total=max(total, 1),
            notes=[
                f"{count['finished']} of {len(self._steps)} runs finished",
                f"{len(at_work)} running ({names})" if at_work else "",
                *(f"{number} {outcome}" for outcome, number in sorted(count.items()) if outcome != "finished"),
                f"{len(self._steps.keys() - outcomes.keys() - {run.name for run in at_work})} left",
            ],
        )

    def close(self) -> None:
        """Ends the line."""
        self._line.close()


def work(
    runs: Sequence[SweepRun],
    todo: Sequence[SweepRun],
    jobs: int,
    stages: TrialGraph | None = None,
    keep: Callable[[Sequence[SweepRun]], None] = lambda _: None,
) -> str | None:
    """Works runs off; returns the name of the signal that stopped it. What became of a run is in its folder.

    A run that another process works on is waited for, and begun afterwards if it still needs it. One that waits for others
    of the sweep to decide its fields is begun when they have ended, and left if they cannot.

    Args:
      runs: all of the sweep, for the view; todo: those to do; stages: what they wait for.
      keep: called with the runs that have just ended, well or not.
    """
    names = {run.name for run in todo}
    outcomes = outcomes_of([run for run in runs if run.name not in names])
    waiting, elsewhere, looked = _settled(stages, list(todo), ()), [], 0.0
    pause = STORE_SECONDS if is_remote(runs[0].folder) else LOOK
    with Jobs(jobs) as at_work, contextlib.closing(ProgressView({run.name: run.steps for run in runs}, pause)) as view:
        while at_work.runs or (not at_work.stop_signal and (_first_ready(waiting) or elsewhere)):
            ended = list(at_work.ended())
            outcomes |= {run.name: outcome for run, outcome in ended if outcome != "stopped"}
            if elsewhere and time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                waiting += (free := [run for run in elsewhere if not is_locked(run)])
                elsewhere = [run for run in elsewhere if run not in free]
            if ended:
                keep([run for run, _ in ended])
                waiting = _settled(stages, waiting, [*at_work.runs, *elsewhere])
            while at_work.free and (run := _first_ready(waiting)):
                waiting.remove(run)
                try:
                    if run.remaining_commands():
                        at_work.start(run)
                    else:  # another process has finished it
                        outcomes[run.name] = "finished"
                        waiting = _settled(stages, waiting, [*at_work.runs, *elsewhere])
                except Locked:
                    elsewhere.append(run)
            view.show(outcomes, [*at_work.runs, *elsewhere])
            time.sleep(TURN)
        return at_work.stop_signal


def _settled(stages: TrialGraph | None, waiting: list[SweepRun], at_work: Sequence[SweepRun]) -> list[SweepRun]:
    """Decides what can be decided, says it, and returns the waiting runs with it."""
    if stages is None or not any(run.trial.best for run in waiting):
        return waiting
    for line in stages.settle({run.name for run in (*waiting, *at_work)}):
        print(f"  {line}", flush=True)
    return stages.now(waiting)


def _first_ready(waiting: Sequence[SweepRun]) -> SweepRun | None:
    return next((run for run in waiting if not run.trial.best), None)


def outcomes_of(runs: Sequence[SweepRun]) -> dict[str, str]:
    """Returns name -> "finished" or "failed" of those that ended."""
    outcomes = map_runs(runs, lambda run: "failed" if run.failure() else "" if run.remaining_commands() else "finished")
    return {run.name: outcome for run, outcome in zip(runs, outcomes, strict=True) if outcome}
