"""How long a run has trained."""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds of training, those of earlier starts included.

    Attributes:
      paused: seconds of this start that went into other things than steps.
    """

    def __init__(self, before: float = 0.0):
        self._before, self._began, self.paused = before, time.monotonic(), 0.0

    def seconds(self) -> float:
        """Returns the time of training so far."""
        return self._before + time.monotonic() - self._began

    def stepping(self) -> float:
        """Returns a time that stands still while other things than steps are done."""
        return time.monotonic() - self.paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count as time of steps."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.paused += time.monotonic() - start
