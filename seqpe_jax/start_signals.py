"""Signals while a command starts. Imports nothing large, so that it comes before the seconds of all other imports."""

import os
import signal
from typing import Any, NoReturn

from seqpe_jax.errors import EXIT_PREEMPTED

NUMBERS = (signal.SIGTERM, signal.SIGHUP)


def exit_on_signal() -> None:
    """Exits at once on SIGTERM and SIGHUP, while there is nothing to save. Under `nohup` SIGHUP stays ignored."""
    for number in NUMBERS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit)


def release() -> None:
    """Gives the signals back: among several processes JAX handles SIGTERM itself."""
    for number in NUMBERS:
        if signal.getsignal(number) == _exit:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _: Any) -> NoReturn:
    name = signal.Signals(number).name
    os.write(2, f"{name}: there is nothing to save now; the same command resumes from the last checkpoint\n".encode())
    os._exit(EXIT_PREEMPTED)
