"""Trackers of a run: TensorBoard's files, Weights & Biases and MLflow, behind one interface.

The last two are imported for runs that name them alone (`report.trackers`). A resumed run continues its curves under the
identities that `TRACKERS_FILE` in its folder stores. What a tracker cannot take now waits and is given to it later, and one
line says so: a run does not end because of a tracker.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import secrets
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar, text

from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, atomic_write, is_remote, parse_json
from seqpe_jax.run_dir import TRACKERS_FILE
from seqpe_jax.trees import flatten_dict

FLUSH_SECONDS = 10.0  # between two times that values go to a disk or a server, for which training waits
PROJECT = "seqpe_jax"  # of Weights & Biases and MLflow, unless their environment variables name another
STEP = "step"
# Packages of trackers: (module, what `pip install` takes).
PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}
MAX_PARAM = 6000  # characters of a parameter's value that MLflow stores
MAX_PARAMS = 100  # parameters that it takes at once

Rows = Sequence[Sequence[Any]]


def check_installed(trackers: Sequence[str]) -> None:
    """Refuses trackers whose package is missing. Raises: InputError: with the command that installs it."""
    for name in trackers:
        module, package = PACKAGES.get(name, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise InputError(
                f"report.trackers names {name}, whose package is not installed: pip install {package}, or leave {name} out"
            )


class Tracker:
    """Destination of a run's metrics besides its metrics.jsonl; each method does nothing by default."""

    wants_figures = False

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Writes the config of the run: values by dotted name."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Rows) -> None:
        """Writes a table of a step."""

    def write_figure(self, step: int, name: str, image: Any) -> None:
        """Writes a plot of a step, an image of Pillow, if `wants_figures`."""

    def flush(self) -> None:
        """Gives what waits to the disk or the server."""

    def close(self, complete: bool) -> None:
        """Flushes and closes; complete: the run took all of its steps."""


class Deferred(Tracker):
    """A tracker of which each call may fail: calls wait in order until the next flush that reaches the disk or server.

    Args:
      name: name of the tracker in messages.
    """

    def __init__(self, name: str):
        self._name, self._has_failed = name, False
        self._calls: list[Callable[[], Any]] = []
        self._time = clock.monotonic()

    def _defer(self, call: Callable[[], Any]) -> None:
        self._calls.append(call)
        if clock.monotonic() - self._time > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes the calls that wait, in order; the first that fails, and all after it, wait on."""
        self._time = clock.monotonic()
        try:
            while self._calls:
                self._calls[0]()
                del self._calls[0]
            self._has_failed = False
        except Exception as error:  # the errors of a server's client are of many types
            if not self._has_failed:
                message = " ".join(str(error).split())[:200]
                ProgressLine(1).say(f"{self._name}: {type(error).__name__}: {message}: it gets all that waits later")
            self._has_failed = True


class TensorBoard(Tracker):
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

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Adds the config as a text."""
        rows = [(name, json.dumps(value)) for name, value in values.items()]
        self._add(0, text("config", _markdown(("field", "value"), rows)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step."""
        for name, value in values.items():
            self._add(step, scalar(name, value))
        if clock.monotonic() - self._time > FLUSH_SECONDS:
            self.flush()

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Rows) -> None:
        """Adds a table as a text."""
        self._add(step, text(name, _markdown(columns, rows)))

    def _add(self, step: int, summary: Any) -> None:
        self._events.append(Event(step=step, wall_time=clock.time(), summary=summary))

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

    def close(self, complete: bool) -> None:
        """Flushes."""
        self.flush()


def _markdown(columns: Sequence[str], rows: Rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


class WandB(Deferred):
    """Weights & Biases; WANDB_MODE=offline keeps all in `wandb/` of the run's folder, for `wandb sync`.

    Args:
      run: folder of the run, or None for the current one, where that is in a bucket.
      name: name of the run.
      identity: of an earlier start, which is continued, or "".

    Attributes:
      identity: what the next start continues.
    """

    wants_figures = True

    def __init__(self, run: pathlib.Path | None, name: str, identity: str):
        super().__init__("wandb")
        self._wandb = importlib.import_module("wandb")
        self.identity = identity or secrets.token_hex(4)
        with _refused("wandb", "wandb login, or set WANDB_MODE=offline"):
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=os.environ.get("WANDB_NAME") or name,
                id=self.identity,
                resume="allow",
                dir=os.environ.get("WANDB_DIR") or (run and str(run)),
                settings=self._wandb.Settings(console="off"),  # the output of a run belongs to the run
            )
        # By our own step, which begins again at a checkpoint; theirs would drop what comes a second time.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Writes the config, whose fields may have changed since an earlier start."""
        self._defer(lambda: self._run.config.update(dict(values), allow_val_change=True))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        line = {STEP: step} | dict(values)
        self._defer(lambda: self._run.log(line))

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Rows) -> None:
        """Writes a table of a step."""
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._defer(lambda: self._run.log({STEP: step, name: table}))

    def write_figure(self, step: int, name: str, image: Any) -> None:
        """Writes a plot of a step."""
        self._defer(lambda: self._run.log({STEP: step, name: self._wandb.Image(image)}))

    def close(self, complete: bool) -> None:
        """Flushes and ends the run, which another start may continue."""
        self.flush()
        self._defer(lambda: self._run.finish(exit_code=0 if complete else 1))
        self.flush()


class MLflow(Deferred):
    """MLflow; without MLFLOW_TRACKING_URI its files are in `mlruns/` of the run's folder.

    Args:
      run: folder of the run, or None for the current one, where that is in a bucket.
      name: name of the run.
      identity: see `WandB`.

    Attributes:
      identity: what the next start continues.
    """

    wants_figures = True

    def __init__(self, run: pathlib.Path | None, name: str, identity: str):
        super().__init__("mlflow")
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            address = ((run or pathlib.Path()).absolute() / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else it asks for a database
        tracking = importlib.import_module("mlflow.tracking")
        self._entities = importlib.import_module("mlflow.entities")
        with _refused("mlflow", f"check MLFLOW_TRACKING_URI, which is {address}"):
            self._client = tracking.MlflowClient(address)
            if identity:
                self._client.update_run(identity, status="RUNNING")
            else:
                project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
                experiment = self._client.get_experiment_by_name(project)
                experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
                identity = self._client.create_run(experiment_id, run_name=name).info.run_id
        self.identity = identity

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Writes the config as a file, and its fields as parameters; those that an earlier start wrote cannot change."""

        def write() -> None:
            known = self._client.get_run(self.identity).data.params
            params = [
                self._entities.Param(field, json.dumps(value)[:MAX_PARAM])
                for field, value in values.items()
                if field not in known
            ]
            for first in range(0, len(params), MAX_PARAMS):
                self._client.log_batch(self.identity, params=params[first : first + MAX_PARAMS])
            self._client.log_dict(self.identity, dict(values), "config.json")

        self._defer(write)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        now = round(clock.time() * 1000)
        metrics = [self._entities.Metric(_metric_name(name), value, now, step) for name, value in values.items()]
        self._defer(lambda: self._client.log_batch(self.identity, metrics=metrics))

    def write_table(self, step: int, name: str, columns: Sequence[str], rows: Rows) -> None:
        """Writes a table of a step as a JSON file, in the form in which MLflow shows tables."""
        content = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._defer(lambda: self._client.log_dict(self.identity, content, f"{name}/{step}.json"))

    def write_figure(self, step: int, name: str, image: Any) -> None:
        """Writes a plot of a step as a PNG file."""
        self._defer(lambda: self._client.log_image(self.identity, image, f"{name}/{step}.png"))

    def close(self, complete: bool) -> None:
        """Flushes and ends the run, which another start may continue."""
        self._defer(lambda: self._client.set_terminated(self.identity, "FINISHED" if complete else "KILLED"))
        self.flush()


def _metric_name(name: str) -> str:
    """Returns a name that MLflow allows: it has no @, as in eval/loss@512."""
    return name.replace("@", "_at_")


@contextlib.contextmanager
def _refused(name: str, cure: str) -> Iterator[None]:
    """Converts the errors of a tracker that cannot start into one line."""
    logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:  # of many types
        message = " ".join(str(error).split())[:200]
        raise InputError(
            f"report.trackers: {name} does not start ({type(error).__name__}: {message}): {cure}. To begin a new run there, "
            f"remove {TRACKERS_FILE} from the run's folder"
        ) from error


def open_trackers(
    names: Sequence[str], run: AnyPath, local_dir: pathlib.Path | None, resume_step: int, config: Mapping[str, Any]
) -> list[Tracker]:
    """Returns the trackers of a run, which have its config.

    Args:
      names: `report.trackers` of the config.
      run: folder of the run.
      local_dir: where TensorBoard's files of a run in a bucket lie until they are uploaded.
      resume_step: steps that are done.
      config: nested values of the config.

    Raises:
      InputError: a tracker does not start, such as one whose server refuses.
    """
    path = run / TRACKERS_FILE
    stored = parse_json(path.read_bytes()) if path.exists() else {}
    folder, title = (
        (None if is_remote(run) else pathlib.Path(run)),
        run.absolute().name if not is_remote(run) else run.name,
    )
    trackers: list[Tracker] = []
    kinds = {"wandb": WandB, "mlflow": MLflow}
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoard(local_dir or run / "tensorboard", resume_step + 1))
            continue
        tracker = kinds[name](folder, title, stored.get(name, ""))
        trackers.append(tracker)
        if stored.get(name) != tracker.identity:
            stored[name] = tracker.identity
            atomic_write(path, json.dumps(stored, indent=1) + "\n")
    for tracker in trackers:
        if config:
            tracker.write_config(flatten_dict(dict(config), "."))
    return trackers
