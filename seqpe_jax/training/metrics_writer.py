"""Writes a run's metrics to metrics.jsonl and to TensorBoard."""

import contextlib
import io
import json
import os
import pathlib
import time as clock

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from seqpe_jax.distributed.processes import is_main_process
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import Failure, StoreError
from seqpe_jax.files import atomic_write, is_remote, list_files, tmp_dir
from seqpe_jax.run_dir import METRICS_FILE, UPLOAD_SECONDS, RunDir

TENSORBOARD_SECONDS = 10.0  # between writes of events, each of which waits for the disk


class MetricsWriter:
    """Appends one object per step to WORKDIR/metrics.jsonl, and the same values to TensorBoard; on the main process only.

    What cannot be written, e.g. on a full disk, waits, and is written with the next step; the first failure prints one line. A
    resumed run drops what an earlier start wrote past the step that it resumes from. Nothing can be appended in a bucket: there
    both lie on this machine and are uploaded every `UPLOAD_SECONDS` and by `flush`.

    Args:
      run: the run's folder.
      resume_step: steps that are done.
      tensorboard: writes TensorBoard's events too.
    """

    def __init__(self, run: RunDir | str | os.PathLike, resume_step: int = 0, *, tensorboard: bool = True):
        run = RunDir.of(run)
        self._file: io.RawIOBase | io.BytesIO | None = None
        self._events = self._local_dir = None
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
        if tensorboard:
            self._events = _TensorBoard(self._local_dir or run.path / "tensorboard", resume_step + 1)

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
        if self._events is not None:
            self._events.write(step, values)
        self._is_uploaded = False
        if self._local_dir is not None and clock.monotonic() - self._upload_time > UPLOAD_SECONDS:
            with contextlib.suppress(StoreError):  # the next upload writes all of it, or a save reports the error
                self.flush()

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
        if self._events is not None:
            self._events.flush()
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
            self.flush()
            if self._pending:
                lines = self._pending.count(b"\n")
                raise Failure(
                    f"failed: no space for the last {lines} lines of {self._path}; the checkpoints are complete"
                )


class _TensorBoard:
    """Writes events without a thread: the writer of the library hangs once its thread has met a full disk.

    Args:
      folder: folder of the event files.
      first_step: TensorBoard hides what earlier files hold from this step on.
    """

    def __init__(self, folder: os.PathLike, first_step: int):
        self._folder, self._has_failed = pathlib.Path(folder), False
        self._writer: EventsWriter | None = None
        # Events that may not be on the disk yet.
        self._events = [Event(step=first_step, session_log=SessionLog(status=SessionLog.START))]
        self._time = clock.monotonic()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step."""
        now = clock.time()
        self._events += [Event(step=step, wall_time=now, summary=scalar(name, value)) for name, value in values.items()]
        if clock.monotonic() - self._time > TENSORBOARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the events to the disk; what fails is written into another file by the next flush."""
        self._time = clock.monotonic()
        try:
            if self._writer is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(self._folder / "events"))
            for event in self._events:
                self._writer.write_event(event)
            self._writer.flush()
            self._events, self._has_failed = [], False
        except OSError as error:
            if not self._has_failed:
                ProgressLine(1).say(f"{self._folder}: {error.strerror}: events are written when there is space again")
            self._has_failed, self._writer = True, None
