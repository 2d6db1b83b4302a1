"""Clock of a run: time of training, what the main thread does now, seconds by phase, productive time over all starts."""

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator

COMPILE, DATA, DEVICE, STEP, SAVE, EVALUATION = "compile", "data", "device", "step", "save", "evaluation"
MEASURED_STEPS = 100  # of which the median step time is


class TrainingClock:
    """Wall-clock time of a run in seconds, with the time of its earlier starts.

    One thread enters phases; others may read.

    Args:
      previous: seconds of earlier starts.
      productive: productive seconds of earlier starts, up to the state that this one resumes from.
      first_start: Unix time of the first start; None = now.

    Attributes:
      doing: (phase of the main thread, the monotonic time at which it was entered or last made progress).
      productive: seconds in steps that led to the present state, without those that compiled.
      median_step: median seconds of the newest `MEASURED_STEPS` steps, 0 before the first.
    """

    def __init__(self, previous: float = 0.0, *, productive: float = 0.0, first_start: float | None = None):
        self._previous = previous
        self._first_start = time.time() if first_start is None else first_start
        self._start = time.monotonic()
        self._paused = 0.0
        self._seconds: collections.Counter[str] = collections.Counter()
        self._steps: collections.deque[float] = collections.deque(maxlen=MEASURED_STEPS)
        self.doing = (COMPILE, self._start)
        self.productive = productive
        self.median_step = 0.0

    def seconds(self) -> float:
        """Returns the time of training so far, pauses included."""
        return self._previous + time.monotonic() - self._start

    def step_seconds(self) -> float:
        """Returns a time that does not advance during pauses; only differences of it have a meaning."""
        return time.monotonic() - self._paused

    def phase_seconds(self, phase: str) -> float:
        """Returns the seconds of this start in a phase, up to the last time that it ended."""
        return self._seconds[phase]

    def goodput(self) -> float:
        """Returns the fraction of the time since the first start that was productive, the time between starts included."""
        return self.productive / max(time.time() - self._first_start, self.productive, 1e-9)

    def finish_step(self, seconds: float) -> None:
        """Counts the time of a step that did not compile."""
        self.productive += seconds
        self._steps.append(seconds)
        self.median_step = statistics.median(self._steps)

    def progress(self) -> None:
        """Marks progress within a long phase."""
        self.doing = (self.doing[0], time.monotonic())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of this context as that of a phase; `doing` names it meanwhile."""
        outer, start = self.doing[0], time.monotonic()
        self.doing = (name, start)
        try:
            yield
        finally:
            now = time.monotonic()
            self._seconds[name] += now - start
            self.doing = (outer, now)

    @contextlib.contextmanager
    def pause(self, phase: str) -> Iterator[None]:
        """Excludes the time in this context, a phase, from `step_seconds`."""
        start = time.monotonic()
        try:
            with self.phase(phase):
                yield
        finally:
            self._paused += time.monotonic() - start
