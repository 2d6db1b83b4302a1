"""What a run says of itself: metrics.jsonl, TensorBoard events, and one line of progress."""

import contextlib
import io
import json
import os
import sys
import time as clock
from collections.abc import Iterable
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from seqpe_jax.distributed.processes import is_main_process
from seqpe_jax.errors import InputError, StoreError
from seqpe_jax.files import as_path, atomic_write, is_remote, list_files, parse_json, tmp_dir

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"  # what a sweep keeps of the output of a run's commands
QUIET_SECONDS = 10.0  # between lines where there is no terminal
STORE_SECONDS = 30.0  # between writings of metrics to a store, where a file is written anew to be longer


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the objects of WORKDIR/metrics.jsonl; a half-written last line is left out.

    Raises:
      InputError: another line is not an object of numbers, one of them the step.
    """
    path = as_path(workdir) / METRICS_FILE
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line)
            if type(values["step"]) is not int or not all(map(_is_number, values.values())):
                raise ValueError("its step must be a whole number, and all values numbers")
            found.append(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number} is no object with a step ({error}): remove that line, then start again"
            ) from error
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or type(value) is int and abs(value) < 2**63


class MetricsWriter:
    """Appends one object per step to WORKDIR/metrics.jsonl, and the same values to TensorBoard; on the lead host only.

    A run that goes on drops what an earlier start wrote past the step it goes on from. In a store nothing can be appended:
    both are kept on this machine and written there whole, every `STORE_SECONDS` and when `flush` is called.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0, *, tensorboard: bool = True):
        self._file: TextIO | None = None
        self._events = self._local = None
        self._told = True  # whether the store has all of it
        self._closing = contextlib.ExitStack()
        if not is_main_process():
            return
        self._path = as_path(workdir) / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
        content = "".join(json.dumps(line) + "\n" for line in kept)
        atomic_write(self._path, content)
        self._written = clock.monotonic()
        if is_remote(workdir):
            self._file = io.StringIO()
            self._file.write(content)
            self._local = self._closing.enter_context(tmp_dir())
        else:
            self._file = self._path.open("a")
        if tensorboard:
            folder = self._local or as_path(workdir) / "tensorboard"
            self._events = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, float], *, time: float) -> None:
        """Writes the values of a step, floats in full precision.

        Args:
          time: seconds of training so far.
        """
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "time": time} | values) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        self._told = False
        if self._local is not None and clock.monotonic() - self._written > STORE_SECONDS:
            with contextlib.suppress(StoreError):  # the next time, or a save, which says so, writes all of it again
                self.flush()

    def flush(self) -> None:
        """Makes sure that what was written is where the run's files are. Raises: StoreError."""
        if self._local is None or self._told:
            return
        self._written = clock.monotonic()
        self._path.write_bytes(self._file.getvalue().encode())
        if self._events is not None:
            self._events.flush()
            for file in list_files(self._local):
                (self._path.parent / "tensorboard" / file.name).upload(file)
        self._told = True

    def close(self) -> None:
        """Flushes and closes the files. Raises: StoreError."""
        with self._closing:
            try:
                self.flush()
            finally:
                for file in filter(None, (self._file, self._events)):
                    file.close()


class ProgressLine:
    """Step, percent, time left, rate, loss and notes, on the lead host.

    The line is rewritten in place on a terminal, else a new one is written now and then.
    """

    def __init__(self, total: int, *, label: str = "step", stream: TextIO | None = None):
        self._total, self._first, self._label = total, 0, label
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._silent = not is_main_process()
        self._began: float | None = None  # the first step compiles, so the rate counts from its end
        self._last = 0.0
        self._said = 0

    def update(
        self, done: int, *, loss: float | None = None, total: int | None = None, notes: Iterable[str] = ()
    ) -> None:
        """Says where the work stands, if it is time to; empty notes are left out."""
        if self._silent:
            return
        self._total = total or self._total
        now = clock.monotonic()
        if self._began is None:
            self._began, self._first = now, done
        if now - self._last < (0.2 if self._terminal else QUIET_SECONDS) and done < self._total:
            return
        self._last = now
        parts = [f"{self._label} {done}/{self._total}", f"{100 * done / self._total:.0f}%"]
        if done > self._first:
            rate = (done - self._first) / max(now - self._began, 1e-9)
            parts += [f"{_clock((self._total - done) / rate)} left", f"{rate:.{1 if rate >= 1 else 3}f}/s"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        parts += filter(None, notes)
        line = "  ".join(parts)
        if self._terminal:
            self._stream.write("\r" + line.ljust(self._said))
            self._said = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def say(self, words: str) -> None:
        """Writes something on a line of its own."""
        if not self._silent:
            self.close()
            self._stream.write(words + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Ends the line."""
        if self._terminal and self._said:
            self._stream.write("\n")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
