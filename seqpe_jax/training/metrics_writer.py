"""Writes a run's metrics to metrics.jsonl and to its trackers."""

import contextlib
import io
import json
import os
import time as clock
from collections.abc import Mapping, Sequence
from typing import Any

from seqpe_jax.distributed.processes import is_main_process
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import Failure, StoreError
from seqpe_jax.files import atomic_write, is_remote, list_files, tmp_dir
from seqpe_jax.run_dir import METRICS_FILE, UPLOAD_SECONDS, RunDir
from seqpe_jax.training.trackers import Tracker, open_trackers


class MetricsWriter:
    """Appends one object per step to WORKDIR/metrics.jsonl, and gives the same to trackers; on the main process only.

    What cannot be written, e.g. on a full disk, waits, and is written with the next step; the first failure prints one line. A
    resumed run drops what an earlier start wrote past the step that it resumes from. Nothing can be appended in a bucket: there
    the file and TensorBoard's lie on this machine and are uploaded every `UPLOAD_SECONDS` and by `flush`.

    Args:
      run: the run's folder.
      resume_step: steps that are done.
      trackers: names of trackers (`report.trackers`).
      config: nested values of the run's config, for the trackers.

    Attributes:
      complete: the run has taken all of its steps; set by who knows.

    Raises:
      InputError: a tracker does not start.
    """

    def __init__(
        self,
        run: RunDir | str | os.PathLike,
        resume_step: int = 0,
        *,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        run = RunDir.of(run)
        self.complete = False
        self._trackers: list[Tracker] = []
        self._file: io.RawIOBase | io.BytesIO | None = None
        self._local_dir = None
        self._pending, self._has_failed = bytearray(), False
        self._is_uploaded = True
        self._closing = contextlib.ExitStack()
        if not is_main_process():
            return
        self._path = run.path / METRICS_FILE
        lines = [line for line in run.read_metrics() if line["step"] <= resume_step]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        atomic_write(self._path, content)
        self._upload_time = clock.monotonic()
        if is_remote(run.path):
            self._file = io.BytesIO()
            self._file.write(content.encode())
            self._local_dir = self._closing.enter_context(tmp_dir())
        else:
            self._file = open(self._path, "ab", buffering=0)
        self._trackers = open_trackers(trackers, run.path, self._local_dir, resume_step, config or {})

    def write(self, step: int, values: dict[str, float], *, time: float) -> None:
        """Writes the values of a step.

        Args:
          step: step of the metrics.
          values: value of each metric, written in full precision.
          time: seconds of training so far.
        """
        if self._file is None:
            return
        self._pending += (json.dumps({"step": step, "time": time} | values) + "\n").encode()
        self._write_pending()
        for tracker in self._trackers:
            tracker.write(step, values)
        self._is_uploaded = False
        if self._local_dir is not None and clock.monotonic() - self._upload_time > UPLOAD_SECONDS:
            with contextlib.suppress(StoreError):  # the next upload writes all of it, or a save reports the error
                self.flush()

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives the metrics of an evaluation, "eval/NAME@SIZE", to the trackers as a table with a row for each size."""
        cells = {
            tuple(name.removeprefix("eval/").split("@", 1)): value for name, value in metrics.items() if "@" in name
        }
        names = list(dict.fromkeys(name for name, _ in cells))
        sizes = list(dict.fromkeys(size for _, size in cells))
        rows = [[size, *(cells.get((name, size)) for name in names)] for size in sizes]
        for tracker in self._trackers:
            tracker.write_table(step, "evaluation", ["size", *names], rows)

    def write_figures(self, step: int) -> None:
        """Gives the plots of the run so far, those of `report`, to trackers that take some."""
        trackers = [tracker for tracker in self._trackers if tracker.wants_figures]
        if not trackers:
            return
        with contextlib.suppress(StoreError):  # as in `write`
            self.flush()
        from PIL import Image  # drawing takes long to import, and no other tracker needs it

        from seqpe_jax.reporting import plots, study

        for plot in plots.plot_study(study.read_study(self._path.parent)):
            image = Image.open(io.BytesIO(plot.png()))
            plots.close(plot)
            for tracker in trackers:
                tracker.write_figure(step, f"plots/{plot.name}", image)

    def _write_pending(self) -> None:
        """Writes the lines that are not in the file yet, as far as there is space."""
        try:
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                ProgressLine(1).say(f"{self._path}: {error.strerror}: they are written when there is space again")
            self._has_failed = True

    def flush(self) -> None:
        """Writes what waits, and uploads the metrics if the run is in a bucket. Raises: StoreError."""
        if self._file is None:
            return
        self._write_pending()
        for tracker in self._trackers:
            tracker.flush()
        if self._local_dir is None or self._is_uploaded:
            return
        self._upload_time = clock.monotonic()
        self._path.write_bytes(self._file.getvalue())
        for file in list_files(self._local_dir):
            (self._path.parent / "tensorboard" / file.name).upload(file)
        self._is_uploaded = True

    def close(self) -> None:
        """Flushes and closes the files. Raises: StoreError; Failure: metrics could not be written."""
        if self._file is None:
            return
        with self._closing, contextlib.closing(self._file):
            for tracker in self._trackers:
                tracker.close(self.complete)
            self.flush()
            if self._pending:
                lines = self._pending.count(b"\n")
                raise Failure(
                    f"failed: no space for the last {lines} lines of {self._path}; the checkpoints are complete"
                )
