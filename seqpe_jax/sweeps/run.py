"""One run of a sweep: its commands, what its folder says of it, and its commands at work."""

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

from seqpe_jax.distributed.progress import LOG_FILE, METRICS_FILE
from seqpe_jax.errors import InputError
from seqpe_jax.files import COMMIT_MARKER, EVALUATION_FILE, GCS_SCHEME, AnyPath, cache_root, is_remote, lock, parse_json
from seqpe_jax.sweeps.spec import Trial
from seqpe_jax.training.checksums import sha256_of

RESTORED = "restored.json"  # stands for the checkpoint of a finished run whose folder was made from its results alone
FAILED = "== failed: "  # begins the last line of the log of a run that failed
SAID = 300  # characters of a last line that are told
OWN_SIGNALS = (
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # Slurm warns all processes of a job; the commands are told by SIGTERM alone

ASKED_AT_ONCE = 16  # runs in a store

Command = tuple[str, list[str]]  # its name, its words
Answer = TypeVar("Answer")


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A point and the folder that its run has.

    Attributes:
      evaluated: whether it is evaluated after training.
    """

    trial: Trial
    folder: AnyPath
    evaluated: bool = True

    @property
    def name(self) -> str:
        """Of the point."""
        return self.trial.name

    @property
    def steps(self) -> int:
        """To train."""
        return self.trial.settings.steps

    @property
    def train(self) -> Command:
        """The training command; again, it goes on."""
        words = [sys.executable, "-m", "seqpe_jax.train", *self.trial.arguments, f"--workdir={self.folder}"]
        return "train", words

    @property
    def evaluate(self) -> Command:
        """The command that evaluates what was trained."""
        words = [sys.executable, "-m", "seqpe_jax.evaluate", f"--checkpoint={self.folder}"]
        return "evaluate", [*words, f"--output={self.folder / EVALUATION_FILE}"]

    @property
    def log(self) -> pathlib.Path:
        """The output of its commands; of a run in a store it grows on this machine, until they have ended."""
        if is_remote(self.folder):
            return cache_root() / "sweeps" / str(self.folder).removeprefix(GCS_SCHEME) / LOG_FILE
        return self.folder / LOG_FILE

    @property
    def restored(self) -> bool:
        """Whether the folder was made from the results that `--results` keeps: it has no checkpoint."""
        return (self.folder / RESTORED).exists()

    def remaining_commands(self) -> list[Command]:
        """Returns the commands that it still needs."""
        if self.restored:
            return []
        if not self._is_trained():
            return [self.train, self.evaluate] if self.evaluated else [self.train]
        return [] if not self.evaluated or self._is_evaluated() else [self.evaluate]

    def _is_trained(self) -> bool:
        """Whether the last checkpoint is there; on a disk it has its name only when it is whole."""
        last = self.folder / "checkpoints" / str(self.steps)
        return (last / COMMIT_MARKER).exists() if is_remote(last) else last.is_dir()

    def _is_evaluated(self) -> bool:
        """Whether its evaluation is of the last step, and of what lies there."""
        return evaluated_step(self.folder) == self.steps

    def fail(self, words: str) -> None:
        """Notes in the log that the run failed."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(_line(FAILED + words))

    def go_on_with_log(self) -> None:
        """Begins the log of a run in a store with what is there of it, where other machines have written more."""
        there = self.folder / LOG_FILE
        if is_remote(self.folder) and there.exists() and len(content := there.read_bytes()) > self.log.stat().st_size:
            self.log.write_bytes(content)

    def put_log(self) -> None:
        """Puts the log of a run in a store beside its other files. Raises: StoreError."""
        if is_remote(self.folder):
            (self.folder / LOG_FILE).upload(self.log)

    def failure(self) -> str | None:
        """Returns the last line of a run that failed, else None."""
        if not self.remaining_commands():
            return None
        last = _last_line(self.log if self.log.exists() else self.folder / LOG_FILE)
        return last.removeprefix(FAILED) if last.startswith(FAILED) else None

    def steps_done(self) -> int:
        """Returns the last step that metrics.jsonl reports, 0 without one."""
        lines = _tail(self.folder / METRICS_FILE).splitlines(keepends=True)
        for line in reversed(lines):
            if line.endswith("\n"):
                found = re.match(r'\{"step": (\d+)', line)
                return min(int(found[1]), self.steps) if found else 0
        return 0


def map_runs(runs: Iterable[SweepRun], question: Callable[[SweepRun], Answer]) -> list[Answer]:
    """Returns what a question finds of each run; of runs in a store at once, for each answer is some round trips away."""
    runs = list(runs)
    if not runs or not is_remote(runs[0].folder):
        return [question(run) for run in runs]
    with concurrent.futures.ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(question, runs))


def evaluated_step(folder: AnyPath) -> int | None:
    """Returns the step of which a run's evaluation.json is, if it is of the config and the checkpoint that lie there.

    It names the checksums of both; of older versions, its step alone. Times of files are not asked: a clock may go back.

    Returns:
      None where there is no such evaluation; `evaluate` writes it anew.
    """
    try:
        found = parse_json((folder / EVALUATION_FILE).read_bytes())
        made_from = dict(found.get("made_from", {}))
        return found["step"] if sha256_of(folder, made_from) == made_from else None
    except (FileNotFoundError, IsADirectoryError, ValueError, AttributeError, TypeError, KeyError):
        return None


class Locked(Exception):
    """The run is at work already, begun by another sweep or by one that was killed."""


class RunProcess:
    """A run's commands at work, one after another, with their output in the run's log.

    The log is locked as long as this process or a command lives: a command outlives a sweep that was killed, and the next
    sweep waits for it.
    """

    def __init__(self, run: SweepRun, *, cores: Iterable[int] | None = None, environment: dict[str, str] | None = None):
        """Begins.

        Args:
          cores: the commands run on these alone; None = on all.
          environment: variables added for the commands.

        Raises:
          Busy: another process has the lock.
          InputError: the folder or the log cannot be written.
        """
        self.run = run
        self.stop_requested = False  # to stop: what ends then has not failed
        self._cores, self._environment = cores, environment or {}
        self._commands = run.remaining_commands()
        self._process: Popen | None = None
        try:
            run.log.parent.mkdir(parents=True, exist_ok=True)
            self._log = run.log.open("ab")
        except OSError as error:
            raise InputError(f"the log of run '{run.name}' cannot be written: {error}") from error
        if lock(self._log) is False:
            self._log.close()
            raise Locked
        run.go_on_with_log()
        self._next()

    def _next(self) -> None:
        self._name, words = self._commands.pop(0)
        self._say(f"== {time.strftime('%Y-%m-%d %H:%M:%S')}: {shlex.join(words)}")
        self._began = self._log.warn()
        with _inherited(self._cores):
            self._process = Popen(
                words,
                stdin=DEVNULL,
                stdout=self._log,
                stderr=STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,  # Ctrl-C reaches the sweep alone
            )
        if self.stop_requested:  # meanwhile, by a signal's handler
            self.stop()

    def poll(self) -> str | None:
        """Returns what became of the run, "finished", "failed" or "stopped"; None while it is at work."""
        code = self._process.poll()
        if code is None:
            return None
        if code == 0 and self._commands and not self.stop_requested:
            self._next()
            return None
        if not self.run.remaining_commands():
            outcome = "finished"
        elif self.stop_requested:
            outcome = "stopped"
        else:
            outcome = "failed"
            self.run.fail(self._reason(code))
        self._log.close()
        self.run.put_log()
        return outcome

    def _reason(self, code: int) -> str:
        with self.run.log.open("rb") as log:
            log.seek(self._began)
            said = _lines(log.read().decode(errors="replace"))
        last = said[-1][:SAID] if said else "it said nothing"
        if code < 0:
            return f"{self._name} was killed by {signal.Signals(-code).name}; its last line: {last}"
        if code == 0:
            return f"{self._name} ended well, but step {self.run.steps} is not there; its last line: {last}"
        return f"{self._name}, exit code {code}: {last}"

    def stop(self, *, send: bool = True) -> None:
        """Asks the command to save and end (SIGTERM), unless somebody else has done so; asked again, it ends at once."""
        self.stop_requested = True
        if send and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _say(self, words: str) -> None:
        self._log.write(_line(words))
        self._log.flush()


def is_locked(run: SweepRun) -> bool:
    """Whether some process works on the run."""
    try:
        with run.log.open("r+b") as log:
            return lock(log) is False
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _inherited(cores: Iterable[int] | None) -> Iterator[None]:
    """What a process started here inherits: its cores, and no ear for the signals that mean this process."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in OWN_SIGNALS}
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


def _line(words: str) -> bytes:
    """Returns a line of a log, in UTF-8 whatever the locale; names of files may be any bytes."""
    return f"{words}\n".encode(errors="backslashreplace")


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
    said = _lines(_tail(path))
    return said[-1] if said else ""
