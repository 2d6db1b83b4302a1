"""Worker processes that make data: they outlive signals meant for the main process, and end with it."""

import multiprocessing
import os
import signal
import threading

from absl import flags

# A terminal and Slurm send them to all processes of a run; the main process still needs batches until it has saved.
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start_worker(index: int = 0, count: int = 1) -> None:
    """Prepares a worker process, before its first work.

    Args:
      index: number of the worker, which Grain passes.
      count: number of workers, which Grain passes.
    """
    del index, count
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not flags.FLAGS.is_parsed():  # Grain and ArrayRecord read flags of their own
        flags.FLAGS.mark_as_parsed()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Ends this process when its parent has ended, even by a kill."""
    parent.join()
    os._exit(1)
