"""One line of progress on the terminal."""

import contextlib
import sys
import time as clock
from collections.abc import Iterable
from typing import TextIO

from seqpe_jax.distributed.processes import is_main_process

QUIET_SECONDS = 10.0  # between lines without a terminal


class ProgressLine:
    """Step, percent, time left, rate, loss and notes, printed by the main process.

    On a terminal the line is rewritten in place, else a new one is printed every `QUIET_SECONDS`.

    Args:
      total: steps, or whatever is counted.
      label: name of the counted units.
      stream: None = stderr.
    """

    def __init__(self, total: int, *, label: str = "step", stream: TextIO | None = None):
        self._total, self._first, self._label = total, 0, label
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._silent = not is_main_process()
        self._began: float | None = None  # the first step compiles, so the rate counts from its end
        self._last = 0.0
        self._width = 0  # of the line on the terminal

    def update(
        self, done: int, *, loss: float | None = None, total: int | None = None, notes: Iterable[str] = ()
    ) -> None:
        """Prints the line, if it is time to.

        Args:
          done: steps done.
          loss: loss of the last step.
          total: replaces the total.
          notes: notes to append; empty ones are left out.
        """
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
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._write(line + "\n")

    def say(self, message: str) -> None:
        """Prints a message on a line of its own."""
        if not self._silent:
            self.close()
            self._write(message + "\n")

    def close(self) -> None:
        """Closes the line."""
        if self._terminal and self._width:
            self._write("\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk, or a closed pipe, is no reason to end a run
            self._stream.write(text)
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
