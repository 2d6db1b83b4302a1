"""One run of a sweep: its commands, its state as its folder shows it, and the process that executes the commands."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from subprocess import DEVNULL, STDOUT, Popen
from typing import TypeVar

from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, cache_root, is_remote, lock_file
from seqpe_jax.run_dir import EVALUATION_FILE, FAILED, LOG_FILE, METRICS_FILE, RunDir
from seqpe_jax.sweeps.spec import Trial

RESTORED_FILE = "restored.json"  # marks a finished run without checkpoint, whose folder `--results` has made
MAX_REASON_LENGTH = 300  # characters of a command's last line that are quoted as its reason
# Slurm sends these to all processes of a job; only the sweep handles them, and sends SIGTERM to its commands.
JOB_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
REMOTE_REQUESTS = 16  # runs in a bucket whose state is queried at once

Command = tuple[str, list[str]]  # name, words of the command line
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A trial and the folder of its run.

    Attributes:
      trial: name and config.
      folder: run folder, local or in a bucket.
      evaluated: whether it is evaluated after training.
    """

    trial: Trial
    folder: AnyPath
    evaluated: bool = True

    @property
    def name(self) -> str:
        """Name of the trial."""
        return self.trial.name

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.trial.settings.steps

    @property
    def train(self) -> Command:
        """Training command; executed again, it resumes."""
        words = [sys.executable, "-m", "seqpe_jax.train", *self.trial.arguments, f"--workdir={self.folder}"]
        return "train", words

    @property
    def evaluate(self) -> Command:
        """Command that evaluates the last checkpoint."""
        words = [sys.executable, "-m", "seqpe_jax.evaluate", f"--checkpoint={self.folder}"]
        return "evaluate", [*words, f"--output={self.folder / EVALUATION_FILE}"]

    @property
    def log(self) -> pathlib.Path:
        """Log of its commands; for a run in a bucket a local file, uploaded when they have ended."""
        if is_remote(self.folder):
            return cache_root() / "sweeps" / str(self.folder).removeprefix("gs://").replace("://", "/") / LOG_FILE
        return self.folder / LOG_FILE

    @property
    def restored(self) -> bool:
        """True if `--results` has made the folder, without a checkpoint."""
        return (self.folder / RESTORED_FILE).exists()

    def remaining_commands(self) -> list[Command]:
        """Returns the commands that it still needs; none of a finished run."""
        if self.restored:
            return []
        if not RunDir(self.folder).is_saved(self.steps):
            return [self.train, self.evaluate] if self.evaluated else [self.train]
        return [] if not self.evaluated or RunDir(self.folder).evaluated_step() == self.steps else [self.evaluate]

    def failure(self) -> str | None:
        """Returns the reason for which the run failed, None where it did not."""
        if not self.remaining_commands():
            return None
        last = _last_line(self.log if self.log.exists() else self.folder / LOG_FILE)
        return last.removeprefix(FAILED) if last.startswith(FAILED) else None

    def outcome(self) -> str:
        """Returns "finished" or "failed"; "" of a run that has not ended."""
        return "failed" if self.failure() else "" if self.remaining_commands() else "finished"

    def steps_done(self) -> int:
        """Returns the last step in metrics.jsonl, 0 without one."""
        lines = _tail(self.folder / METRICS_FILE).splitlines(keepends=True)
        for line in reversed(lines):
            if line.endswith("\n"):
                found = re.match(r'\{"step": (\d+)', line)
                return min(int(found[1]), self.steps) if found else 0
        return 0

    def mark_failed(self, reason: str) -> None:
        """Writes into the log that the run failed.

        Args:
          reason: one line.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(_log_line(FAILED + reason))

    def download_log(self) -> None:
        """Replaces the local log of a run in a bucket by the bucket's, if another machine has written more."""
        there = self.folder / LOG_FILE
        if is_remote(self.folder) and there.exists() and len(content := there.read_bytes()) > self.log.stat().st_size:
            self.log.write_bytes(content)

    def upload_log(self) -> None:
        """Uploads the log of a run in a bucket. Raises: StoreError."""
        if is_remote(self.folder):
            (self.folder / LOG_FILE).upload(self.log)


def map_runs(runs: Iterable[SweepRun], query: Callable[[SweepRun], Result]) -> list[Result]:
    """Returns the result of a query for each run; those of runs in a bucket are requested in parallel."""
    runs = list(runs)
    if not runs or not is_remote(runs[0].folder):
        return [query(run) for run in runs]
    with concurrent.futures.ThreadPoolExecutor(REMOTE_REQUESTS) as pool:
        return list(pool.map(query, runs))


def outcomes_of(runs: Iterable[SweepRun]) -> dict[str, str]:
    """Returns run name -> "finished" or "failed" of the runs that have ended."""
    runs = list(runs)
    outcomes = zip(runs, map_runs(runs, lambda run: run.outcome()), strict=True)
    return {run.name: outcome for run, outcome in outcomes if outcome}


class Locked(Exception):
    """Another process executes commands of the run."""


class RunProcess:
    """The remaining commands of a run, executed one after another with their output in its log.

    The log is locked while this process or a command lives: a command survives a sweep that is killed, and the next sweep
    waits for it.

    Attributes:
      run: the run.
      stop_requested: whether it was asked to stop; a command that ends afterwards has not failed.
    """

    def __init__(self, run: SweepRun, *, cores: Iterable[int] | None = None, environment: dict[str, str] | None = None):
        """Starts the first command.

        Args:
          run: run with remaining commands.
          cores: CPU cores that the commands are bound to; None = all.
          environment: variables added for the commands.

        Raises:
          Locked: another process executes the run.
          InputError: the folder or the log cannot be written.
        """
        self.run = run
        self.stop_requested = False
        self._cores, self._environment = cores, environment or {}
        self._commands = run.remaining_commands()
        self._process: Popen | None = None
        try:
            run.log.parent.mkdir(parents=True, exist_ok=True)
            self._log = run.log.open("ab")
        except OSError as error:
            raise InputError(f"the log of run '{run.name}' cannot be written: {error}") from error
        if lock_file(self._log) is False:
            self._log.close()
            raise Locked
        run.download_log()
        self._start_next()

    def _start_next(self) -> None:
        self._name, words = self._commands.pop(0)
        self._log.write(_log_line(f"== {time.strftime('%Y-%m-%d %H:%M:%S')}: {shlex.join(words)}"))
        self._log.flush()
        self._output_start = self._log.tell()
        with _child_settings(self._cores):
            self._process = Popen(
                words,
                stdin=DEVNULL,
                stdout=self._log,
                stderr=STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,  # Ctrl-C reaches the sweep alone
            )
        if self.stop_requested:  # meanwhile, by a signal handler
            self.stop()

    def poll(self) -> str | None:
        """Returns the outcome of the run, "finished", "failed" or "stopped"; None while it is at work."""
        code = self._process.poll()
        if code is None:
            return None
        if code == 0 and self._commands and not self.stop_requested:
            self._start_next()
            return None
        outcome = "stopped" if self.stop_requested else "failed"
        if not self.run.remaining_commands():
            outcome = "finished"
        elif outcome == "failed":
            self.run.mark_failed(self._reason(code))
        self._log.close()
        self.run.upload_log()
        return outcome

    def _reason(self, code: int) -> str:
        """Reason for which a command failed, from its exit code and last line."""
        with self.run.log.open("rb") as log:
            log.seek(self._output_start)
            lines = _lines(log.read().decode(errors="replace"))
        last = lines[-1][:MAX_REASON_LENGTH] if lines else "(no output)"
        if code < 0:
            return f"{self._name} was killed by {signal.Signals(-code).name}; its last line: {last}"
        if code == 0:
            return f"{self._name} ended without error, but step {self.run.steps} is missing; its last line: {last}"
        return f"{self._name}, exit code {code}: {last}"

    def stop(self, *, send: bool = True) -> None:
        """Asks the command to save and end.

        Args:
          send: send SIGTERM; False where the command has got the signal already. A second SIGTERM ends it at once.
        """
        self.stop_requested = True
        if send and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def is_locked(run: SweepRun) -> bool:
    """Returns whether some process executes the run."""
    try:
        with run.log.open("r+b") as log:
            return lock_file(log) is False
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _child_settings(cores: Iterable[int] | None) -> Iterator[None]:
    """Context in which a started process is bound to cores and ignores the job's signals."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in JOB_SIGNALS}
    own = os.sched_getaffinity(0) if cores is not None else None
    try:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        yield
    finally:
        if own is not None:
            os.sched_setaffinity(0, own)
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_line(text: str) -> bytes:
    """Returns a line of a log, in UTF-8 in any locale; file names may hold any bytes."""
    return f"{text}\n".encode(errors="backslashreplace")


def _tail(path: AnyPath) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 16384))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _last_line(path: AnyPath) -> str:
    lines = _lines(_tail(path))
    return lines[-1] if lines else ""
