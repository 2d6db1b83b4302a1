"""Signals while a command starts, and those that Python would drop.

Imports nothing large, so that it comes before the seconds of all other imports.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from seqpe_jax.errors import EXIT_PREEMPTED

NUMBERS = (signal.SIGTERM, signal.SIGHUP)
REPEAT_SECONDS = 0.02


def exit_on_signal() -> None:
    """Exits at once on SIGTERM and SIGHUP, while there is nothing to save. Under `nohup` SIGHUP stays ignored."""
    for number in NUMBERS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)


def exit_on_interrupt() -> None:
    """Exits at once on SIGINT, while modules are imported, where an exception would be a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def release_interrupt() -> None:
    """Gives SIGINT back: from here on it is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) == _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def release() -> None:
    """Gives the signals back: among several processes JAX handles SIGTERM itself."""
    for number in NUMBERS:
        if signal.getsignal(number) == _exit:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _: Any) -> NoReturn:
    name = signal.Signals(number).name
    os.write(2, f"{name}: there is nothing to save now; the same command resumes from the last checkpoint\n".encode())
    os._exit(EXIT_PREEMPTED)


def repeat_dropped_signals() -> None:
    """Installs the hook that sends a signal again whose exception Python drops; called once by each command."""
    if not isinstance(sys.unraisablehook, _RepeatSignal):
        sys.unraisablehook = _RepeatSignal(sys.unraisablehook)


def _interrupted(*_: Any) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(130)


class _RepeatSignal:
    """A `sys.unraisablehook` that sends a signal again whose exception was raised where nothing can be raised.

    Python calls a signal's handler between any two bytecode instructions of the main thread. In a callback of the garbage
    collector, of which JAX has one, or in a `__del__`, it prints the handler's exception and continues.

    Args:
      hook: gets all the rest.
    """

    def __init__(self, hook: Callable[[Any], object]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        number = _signal_of(unraisable.exc_value)
        main = threading.main_thread()
        if not number or threading.current_thread() is not main:
            self._hook(unraisable)
            return

        def send() -> None:
            if main.is_alive() and main.ident is not None:
                signal.pthread_kill(main.ident, number)

        # Later, from another thread: what is raised before this hook has returned is dropped as well.
        timer = threading.Timer(REPEAT_SECONDS, send)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no thread can start any more: the process is at its end
            timer.start()


def _signal_of(error: BaseException | None) -> int:
    """Returns the signal whose handler raised an error: SIGINT, or that of an exit code as shells form it; 0 = none."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    code = error.code if isinstance(error, SystemExit) else None
    return code - 128 if isinstance(code, int) and code - 128 in signal.valid_signals() else 0
