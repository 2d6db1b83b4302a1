"""Long work in a thread of its own, so that this one can do something about a signal meanwhile."""

import concurrent.futures
import contextvars
import threading
from collections.abc import Callable
from typing import Any

LOOK_SECONDS = 0.1


def run_interruptible(work: Callable[[], Any], look: Callable[[], None]) -> Any:
    """Returns what `work` returns, or raises what it raises.

    Python handles a signal in its main thread alone, and only between two of its own instructions: while that thread is in
    a compiler or waits for a device, nothing happens. Here it waits for another thread instead.

    Args:
      look: called in this thread every `LOOK_SECONDS` and once at the end; what it raises is raised at once, and the work
        is left to itself: its thread does not keep the process alive.
    """
    found: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    while not found.done():
        concurrent.futures.wait([found], LOOK_SECONDS)
        look()
    return found.result()
