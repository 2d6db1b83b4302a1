"""Watchdog of a run: ends it when no step is done for long, with the stacks of all processes and the name of who is late."""

import concurrent.futures
import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from seqpe_jax.distributed import processes
from seqpe_jax.errors import EXIT_PREEMPTED
from seqpe_jax.files import AnyPath, atomic_write
from seqpe_jax.run_dir import STACKS_DIR, RunDir
from seqpe_jax.training import clock as phases
from seqpe_jax.training.clock import TrainingClock

MEDIAN_STEPS = 10.0  # step times without progress that a run may take, unless report.watchdog is more
LONG_SECONDS = 1800.0  # the same while it compiles, evaluates or saves
SAVE_SECONDS = 300.0  # for a save that is under way to end, if every process still answers
DISK_SECONDS = 5.0  # for the disk, which may be what hangs; less than `roll_call.ANSWER_SECONDS`
MAX_SHOWN = 5  # processes in a message

DOES = {
    phases.COMPILE: "compiles",
    phases.DATA: "waits for a batch of data",
    phases.DEVICE: "waits for the devices",
    phases.STEP: "is between two steps",
    phases.SAVE: "saves",
    phases.EVALUATION: "evaluates",
}

Status = dict[str, Any]  # {"phase", "seconds" in it, "step", "over": whether a process may not take as long}


class Watchdog:
    """A thread that ends the run, with the exit code of a preemption, when the main thread makes no progress.

    On the main process it asks all others what they do, and ends the run at once if one does not answer. A worker whose
    coordinator does not answer ends by itself.

    Args:
      run: the run's folder; stacks are written to its folder `STACKS_DIR`.
      clock: clock of the run.
      seconds: seconds without progress that end the run, at least (`report.watchdog`).
      save_timeout: seconds that a save may take.
      saved_step: returns the newest saved step.
      is_saving: returns whether a save is under way in the background.

    Attributes:
      step: steps done.
    """

    def __init__(
        self,
        run: RunDir,
        clock: TrainingClock,
        *,
        seconds: float,
        save_timeout: float = 0.0,
        saved_step: Callable[[], int | None] = lambda: None,
        is_saving: Callable[[], bool] = lambda: False,
    ):
        self.step = 0
        self._folder, self._clock, self._seconds = run.path / STACKS_DIR, clock, seconds
        self._save_timeout, self._saved_step, self._is_saving = save_timeout, saved_step, is_saving
        self._asking, self._stopped = threading.Lock(), threading.Event()
        processes.on_stall(self._answer, self._check)
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    @property
    def patience(self) -> float:
        """Seconds without progress after which the processes are asked what they do."""
        return max(self._seconds, MEDIAN_STEPS * self._clock.median_step)

    def limit(self, phase: str) -> float:
        """Returns the seconds without progress that end the run in a phase though all processes answer."""
        if phase == phases.SAVE:
            return max(self.patience, LONG_SECONDS, self._save_timeout)
        is_long = phase in (phases.COMPILE, phases.EVALUATION) or not self._clock.median_step
        return max(self.patience, LONG_SECONDS) if is_long else self.patience

    def _watch(self) -> None:
        asked = -float("inf")
        while not self._stopped.wait(min(1.0, self._seconds / 10)):
            status, now = self._status(), time.monotonic()
            if status["seconds"] < self.patience or (not status["over"] and now - asked < self.patience):
                continue
            asked = now
            if processes.is_main_process():
                self._check(status)
            elif not processes.report_stall(status):
                self._answer(True)
                processes.exit_alone(
                    EXIT_PREEMPTED,
                    f"process {jax.process_index()} (on {socket.gethostname()}): {self._describe_time(status)}, and process "
                    f"0, the coordinator, does not answer: it is stopped, or its machine is overloaded or gone. "
                    f"{self._describe_resume()}",
                )

    def _status(self) -> Status:
        phase, since = self._clock.doing
        seconds = time.monotonic() - since
        return {"phase": phase, "seconds": seconds, "step": self.step, "over": seconds > self.limit(phase)}

    def _answer(self, with_stacks: bool) -> Status:
        """Returns the status of this process, and writes its stacks if asked to."""
        status = self._status()
        if not with_stacks:
            return status
        path = self._folder / f"process_{jax.process_index()}.txt"
        heading = (
            f"process {jax.process_index()} (on {socket.gethostname()}, {os.getpid()}) {DOES[status['phase']]} for "
            f"{status['seconds']:.1f} s after step {status['step']}; {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
        )
        if not _within(DISK_SECONDS, lambda: write_stacks(path, heading), False):
            print(f"{heading}; its stacks, which cannot be written to {path}:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr)
        return status

    def _check(self, status: Status) -> None:
        """Asks all processes what they do, and ends the run if one does not answer or takes too long.

        Called on the main process, in any thread.

        Args:
          status: of the process that noticed the stall first.
        """
        if self._stopped.is_set() or not self._asking.acquire(blocking=False):
            return
        statuses = {0: self._answer(status["over"])} | processes.ask_all(status["over"])
        if not status["over"] and None not in statuses.values():
            self._asking.release()
            return
        if not status["over"]:
            statuses = {0: self._answer(True)} | processes.ask_all(True)
        if None not in statuses.values():
            deadline = time.monotonic() + SAVE_SECONDS
            while time.monotonic() < deadline and _within(DISK_SECONDS, self._is_saving, False):
                time.sleep(min(1.0, self._seconds / 10))
        reason = (
            f"{self._describe_time(status)}: {describe_stall(statuses, processes.hosts())}. {self._describe_resume()}"
        )
        processes.abort(EXIT_PREEMPTED, reason)

    def _describe_time(self, status: Status) -> str:
        median = (
            f"the median step takes {self._clock.median_step:.3g} s" if self._clock.median_step else "no step is done"
        )
        return f"no progress for {status['seconds']:.0f} s after step {status['step']} ({median}, report.watchdog={self._seconds:g})"

    def _describe_resume(self) -> str:
        saved = _within(DISK_SECONDS, self._saved_step, None)
        start = f"resumes from step {saved}" if saved is not None else "begins anew, since nothing is saved"
        return f"The stacks are in {self._folder}; the same command {start}"


def describe_stall(statuses: Mapping[int, Status | None], hosts: Mapping[int, str]) -> str:
    """Returns who holds up a run, in words.

    Args:
      statuses: what each process does; None for one that does not answer.
      hosts: host names by process; {} for a single process.
    """
    silent = [process for process, status in statuses.items() if status is None]
    if silent:
        return f"{_names(silent, hosts)} does not answer: stopped, or its machine is overloaded or gone"
    answers = {process: status for process, status in statuses.items() if status is not None}
    # Those that wait for the devices wait for all others; if nobody else is left, for those that are behind.
    late = {process: one for process, one in answers.items() if one["phase"] != phases.DEVICE}
    behind = min(one["step"] for one in answers.values())
    late = late or {process: one for process, one in answers.items() if one["step"] == behind}
    parts = []
    for phase in dict.fromkeys(one["phase"] for one in late.values()):
        group = [process for process in late if late[process]["phase"] == phase]
        longest = max(late[process]["seconds"] for process in group)
        parts.append(f"{_names(group, hosts)} {DOES[phase]} since {longest:.0f} s")
    rest = len(answers) - len(late)
    return "; ".join(parts) + (f"; {rest} other(s) wait for the devices" if rest else "")


def _names(group: list[int], hosts: Mapping[int, str]) -> str:
    if not hosts:
        return "this process"
    named = ", ".join(f"process {process} (on {hosts.get(process, '?')})" for process in sorted(group)[:MAX_SHOWN])
    more = len(group) - MAX_SHOWN
    return named + (f" and {more} more" if more > 0 else "")


def write_stacks(path: AnyPath, heading: str) -> bool:
    """Writes the stacks of all threads of this process to a file, under a heading; returns True."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        atomic_write(path, f"{heading}\n\n".encode() + file.read())
    return True


def _within(seconds: float, function: Callable[[], Any], default: Any) -> Any:
    """Returns function(), or a default if it takes longer or raises an OSError: the disk may be what hangs."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(function())
        except OSError:
            future.set_result(default)

    threading.Thread(target=call, daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        return default
