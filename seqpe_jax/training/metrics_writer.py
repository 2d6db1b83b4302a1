"""Writes a run's metrics to metrics.jsonl and to TensorBoard."""

import contextlib
import io
import json
import os
import time as clock
from typing import TextIO

from tensorboardX import SummaryWriter

from seqpe_jax.distributed.processes import is_main_process
from seqpe_jax.errors import StoreError
from seqpe_jax.files import atomic_write, is_remote, list_files, tmp_dir
from seqpe_jax.run_dir import METRICS_FILE, UPLOAD_SECONDS, RunDir


class MetricsWriter:
    """Appends one object per step to WORKDIR/metrics.jsonl, and the same values to TensorBoard; on the main process only.

    A resumed run drops what an earlier start wrote past the step that it resumes from. Nothing can be appended in a bucket:
    there both lie on this machine and are uploaded every `UPLOAD_SECONDS` and by `flush`.

    Args:
      run: the run's folder.
      resume_step: steps that are done.
      tensorboard: writes TensorBoard's events too.
    """

    def __init__(self, run: RunDir | str | os.PathLike, resume_step: int = 0, *, tensorboard: bool = True):
        run = RunDir.of(run)
        self._file: TextIO | None = None
        self._events = self._local_dir = None
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
            self._file = io.StringIO()
            self._file.write(content)
            self._local_dir = self._closing.enter_context(tmp_dir())
        else:
            self._file = self._path.open("a")
        if tensorboard:
            folder = self._local_dir or run.path / "tensorboard"
            self._events = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, float], *, time: float) -> None:
        """Writes the values of a step.

        Args:
          step: step of the metrics.
          values: value of each metric, written in full precision.
          time: seconds of training so far.
        """
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "time": time} | values) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        self._is_uploaded = False
        if self._local_dir is not None and clock.monotonic() - self._upload_time > UPLOAD_SECONDS:
            with contextlib.suppress(StoreError):  # the next upload writes all of it, or a save reports the error
                self.flush()

    def flush(self) -> None:
        """Uploads the written metrics, if the run is in a bucket. Raises: StoreError."""
        if self._local_dir is None or self._is_uploaded:
            return
        self._upload_time = clock.monotonic()
        self._path.write_bytes(self._file.getvalue().encode())
        if self._events is not None:
            self._events.flush()
            for file in list_files(self._local_dir):
                (self._path.parent / "tensorboard" / file.name).upload(file)
        self._is_uploaded = True

    def close(self) -> None:
        """Flushes and closes the files. Raises: StoreError."""
        with self._closing:
            try:
                self.flush()
            finally:
                for file in filter(None, (self._file, self._events)):
                    file.close()
