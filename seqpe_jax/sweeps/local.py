"""Execution of a sweep's runs on this machine: several at once, each on its share of the cores."""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.files import is_remote
from seqpe_jax.run_dir import UPLOAD_SECONDS
from seqpe_jax.sweeps.run import Locked, RunProcess, SweepRun, is_locked, outcomes_of
from seqpe_jax.sweeps.trial_graph import TrialGraph

POLL_SECONDS = 0.1  # between polls of the commands
FOLDER_SECONDS = 1.0  # between reads of the run folders
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def core_shares(jobs: int) -> list[set[int]] | None:
    """Returns the cores of each job; None for one job, and where processes cannot be bound to cores (not Linux)."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[job::jobs]) or {cores[job % len(cores)]} for job in range(jobs)]


def describe(jobs: int) -> str:
    """Returns a line on how so many jobs share the machine."""
    shares = core_shares(jobs)
    if jobs == 1:
        return "one at a time, on all cores"
    if shares is None:
        return f"{jobs} at a time; this system cannot bind them to cores: each takes as many threads as there are"
    total, most = len(set().union(*shares)), max(map(len, shares))
    shared = f", more than the {total} cores, so that some share one" if jobs > total else ""
    return f"{jobs} at a time, each on {most} of {total} cores{shared}"


class Jobs:
    """Runs at work, at most `limit` at a time.

    As a context manager it handles SIGINT, SIGTERM and SIGHUP: the runs save and stop, and no further one starts. Where
    CUDA_VISIBLE_DEVICES names several devices, the jobs take turns on them.

    Attributes:
      limit: number of jobs.
      stop_signal: name of the signal that stopped them, or None.
    """

    def __init__(self, limit: int):
        self.limit, self.stop_signal = limit, None
        self._shares = core_shares(limit)
        self._devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        self._processes: dict[int, RunProcess] = {}  # by job number

    def __enter__(self) -> "Jobs":
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup: no SIGHUP
        self._previous = {number: signal.signal(number, self._stop_all) for number in handled}
        return self

    def __exit__(self, error: type | None, *_: Any) -> None:
        if error is not None:  # of the sweep itself
            for process in self._processes.values():
                process.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop_all(self, number: int, _: Any) -> None:
        self.stop_signal = signal.Signals(number).name
        for process in list(self._processes.values()):
            process.stop()

    @property
    def runs(self) -> list[SweepRun]:
        """Runs at work."""
        return [process.run for process in self._processes.values()]

    @property
    def has_free_job(self) -> bool:
        """True if a run may start."""
        return len(self._processes) < self.limit and not self.stop_signal

    def start(self, run: SweepRun) -> None:
        """Starts a run on a free job. Raises: Locked: another process executes it."""
        job = next(number for number in range(self.limit) if number not in self._processes)
        choose = len(self._devices) > 1 and self.limit > 1
        device = {"CUDA_VISIBLE_DEVICES": self._devices[job % len(self._devices)]} if choose else {}
        self._processes[job] = RunProcess(run, cores=self._shares[job] if self._shares else None, environment=device)
        if self.stop_signal:  # came during the start
            self._processes[job].stop()

    def stop(self, run: SweepRun) -> None:
        """Asks one run to save and end."""
        next(
            process for process in self._processes.values() if process.run == run and not process.stop_requested
        ).stop()

    def ended(self) -> Iterator[tuple[SweepRun, str]]:
        """Yields the runs that have ended since the last call, and "finished", "failed" or "stopped"."""
        for job, process in list(self._processes.items()):
            outcome = process.poll()
            if outcome is not None:
                del self._processes[job]
                yield process.run, outcome


class ProgressView:
    """One progress line over the training steps of all runs of a sweep."""

    def __init__(self, steps: Mapping[str, int], seconds: float = FOLDER_SECONDS):
        """Takes the steps of the sweep.

        Args:
          steps: run name -> its training steps.
          seconds: least time between two reads of the run folders.
        """
        self._steps, self._seconds = steps, seconds
        self._line = ProgressLine(sum(steps.values()))
        self._last_read = 0.0

    def show(self, outcomes: Mapping[str, str], at_work: Sequence[SweepRun]) -> None:
        """Updates the line, if it is time to.

        Args:
          outcomes: run name -> "finished" or another outcome, of the runs that have ended.
          at_work: runs under way.
        """
        now = time.monotonic()
        if now - self._last_read < self._seconds:
            return
        self._last_read = now
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
        """Closes the line."""
        self._line.close()


class _Pending:
    """Runs that have not started: those that wait for their turn or for a decision, and those locked by another process."""

    def __init__(self, runs: Sequence[SweepRun], graph: TrialGraph | None):
        self.locked: list[SweepRun] = []
        self._waiting, self._graph = list(runs), graph
        self._last_look = 0.0
        self.decide(())

    def __bool__(self) -> bool:
        """True if a run may start now or later without another run's end."""
        return bool(self.locked) or any(not run.trial.best for run in self._waiting)

    def decide(self, at_work: Sequence[SweepRun]) -> None:
        """Decides open fields of waiting runs, and prints the decisions."""
        if self._graph is None or not any(run.trial.best for run in self._waiting):
            return
        for line in self._graph.decide({run.name for run in (*self._waiting, *at_work, *self.locked)}):
            print(f"  {line}", flush=True)
        self._waiting = self._graph.updated(self._waiting)

    def unlock(self) -> None:
        """Returns runs that no other process executes any more to those that wait."""
        if self.locked and time.monotonic() - self._last_look > FOLDER_SECONDS:
            self._last_look = time.monotonic()
            free = [run for run in self.locked if not is_locked(run)]
            self._waiting += free
            self.locked = [run for run in self.locked if run not in free]

    def next(self) -> SweepRun | None:
        """Removes and returns the first run without open fields; None without one."""
        run = next((run for run in self._waiting if not run.trial.best), None)
        if run is not None:
            self._waiting.remove(run)
        return run


def execute(
    runs: Sequence[SweepRun],
    todo: Sequence[SweepRun],
    jobs: int,
    graph: TrialGraph | None = None,
    on_end: Callable[[Sequence[SweepRun]], None] = lambda _: None,
) -> str | None:
    """Executes runs until none is left that can start. Their outcomes are in their folders.

    A run that another process executes is awaited, and started afterwards if it still needs it. A run with open fields
    starts when the runs that decide them have ended.

    Args:
      runs: all runs of the sweep, for the progress line.
      todo: runs to execute.
      jobs: number of runs at a time.
      graph: decides open fields.
      on_end: called with the runs that have just ended.

    Returns:
      Name of the signal that stopped it, or None.
    """
    names = {run.name for run in todo}
    outcomes = outcomes_of(run for run in runs if run.name not in names)
    seconds = UPLOAD_SECONDS if is_remote(runs[0].folder) else FOLDER_SECONDS
    pending = _Pending(todo, graph)
    with (
        Jobs(jobs) as at_work,
        contextlib.closing(ProgressView({run.name: run.steps for run in runs}, seconds)) as view,
    ):
        while at_work.runs or (pending and not at_work.stop_signal):
            pending.unlock()
            if ended := list(at_work.ended()):
                outcomes |= {run.name: outcome for run, outcome in ended if outcome != "stopped"}
                on_end([run for run, _ in ended])
                pending.decide(at_work.runs)
            while at_work.has_free_job and (run := pending.next()):
                if not run.remaining_commands():  # another process has finished it
                    outcomes[run.name] = "finished"
                    pending.decide(at_work.runs)
                    continue
                try:
                    at_work.start(run)
                except Locked:
                    pending.locked.append(run)
            view.show(outcomes, [*at_work.runs, *pending.locked])
            time.sleep(POLL_SECONDS)
        return at_work.stop_signal
