"""A run's folder as one object: config, data spec, metrics, checkpoints and ownership; on a disk or in a bucket.

A folder that `export` or `convert` wrote has the same files, as far as they apply:

    config.json       the config; of an export with a section "export"
    sizes.json        data spec (vocabulary size, classes, channels)
    data.json         fingerprints of the data's splits
    tokenizer.json    for text; classes.json: class names, for images
    digests.json      checksums of these files (digests.json is the file's name for checksums)
    checkpoints/STEP  the state after STEP steps, in Orbax's format, with a digests.json of its own
    metrics.jsonl     metrics by step; tensorboard/, profile/: the same for TensorBoard, traces of the profiler
    starts.jsonl      the starts of `train` in this folder: Unix time, step, processes
    config_history.jsonl  changes of the config at a resume: Unix time, step, FIELD -> [old, new]
    stacks/           what each process was doing when the watchdog ended the run
    evaluation.json   results of `evaluate`
    owner.json        the process that trains in the folder
    compiled/         in a bucket: compiled programs, which may be removed
    log.txt           the output of a sweep's commands
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from seqpe_jax import config
from seqpe_jax.checksums import (
    DIGESTS_FILE,
    ORBAX_METADATA,
    RESTORE_HINT,
    check_small_files,
    checksum_error,
    files_error,
    listed_files,
    sha256_of,
    write_files,
)
from seqpe_jax.config import Config
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.files import (
    COMPILED_DIR,
    AnyPath,
    as_path,
    atomic_write,
    file_versions,
    is_remote,
    move_dir,
    parse_json,
    tmp_dir,
)
from seqpe_jax.metric_registry import HIGHER_IS_BETTER
from seqpe_jax.run_lock import OWNER_FILE, RunLock, run_lock
from seqpe_jax.trees import flatten_dict

if TYPE_CHECKING:
    from seqpe_jax.models.build import DataSpec

CONFIG_FILE = "config.json"
EXPORT_SECTION = "export"  # of an export's config.json; a run's has none
DATA_SPEC_FILE = "sizes.json"
FINGERPRINTS_FILE = "data.json"
TOKENIZER_FILE = "tokenizer.json"
CLASS_NAMES_FILE = "classes.json"
CONVERSION_FILE = "conversion.json"  # of a converted checkpoint: what it was made from
METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"
HISTORY_FILE = "config_history.jsonl"
STACKS_DIR = "stacks"
LOG_FILE = "log.txt"
FAILED = "== failed: "  # start of the last line of the log of a run that failed
SWEEP_FILE = "sweep.json"  # in the folder of a sweep, which holds the folders of its runs
EVALUATION_FILE = "evaluation.json"
CHECKPOINTS_DIR = "checkpoints"
COMMIT_MARKER = "commit_success.txt"  # of a checkpoint in a bucket, which has no renames: Orbax writes it last
META_FILE = pathlib.PurePosixPath("meta", "metadata")  # of a checkpoint: the metadata saved with the state
EVALUATION_KEY = "evaluation"  # of that metadata: the metrics of the state
SIDE_FILES_KEY = "side_files"  # of that metadata: the run's folder has a digests.json of its own
TRACKERS_FILE = "trackers.json"  # identities of the run at its trackers, so that a resumed run continues their curves
PARAMS_ONLY = "params_only"  # of that metadata: parameters without the state of an optimizer
UPLOAD_SECONDS = 30.0  # between uploads of metrics to a bucket
LOOKS = 5  # for a checkpoint that stays while it is read
MAX_COUNT = 1 << 24  # maximum size of a vocabulary, and number of classes
Exchange = Callable[[str, Any, Callable[[list[Any]], Any]], Any]  # `distributed.processes.exchange`
Fingerprint = dict[str, Any]  # {"fingerprint": hex digits of the content, and its size, by what is counted}


class RunDir:
    """One folder of a run, an export or a converted checkpoint; each object reads each file once.

    Args:
      path: the folder, which need not exist.

    Attributes:
      path: the folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path: AnyPath = as_path(path)
        self._errors: dict[AnyPath, tuple[Any, str]] = {}
        self._lock: RunLock | None = None

    @classmethod
    def of(cls, run: "RunDir | str | os.PathLike") -> "RunDir":
        """Returns a run's folder as an object, whether it is one already or a path."""
        return run if isinstance(run, RunDir) else cls(run)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    # ------------------------------------------------------------------------------------------------ config and data

    @property
    def exists(self) -> bool:
        """True if there is a config.json, which makes a folder a run."""
        return (self.path / CONFIG_FILE).exists()

    def is_model(self) -> bool:
        """Returns whether `train`, `convert` or `export` wrote this folder."""
        if self.checkpoints_dir.is_dir() or (self.path / DIGESTS_FILE).is_file():
            return True
        try:
            values = parse_json((self.path / CONFIG_FILE).read_text())
        except (OSError, ValueError):  # missing, or of another kind: the PyTorch reference's is YAML
            return False
        return isinstance(values, dict) and {"data", "model", "encoding"} <= values.keys()

    def check_files(self) -> None:
        """Refuses a folder with a damaged or missing small file (`checksums.check_small_files`). Raises: InputError."""
        if not (self.path / DIGESTS_FILE).exists() and any(
            _read_meta(step).get(SIDE_FILES_KEY) for step in self._step_dirs(complete=False)
        ):
            raise InputError(f"{self.path / DIGESTS_FILE} is missing, which this run had: {RESTORE_HINT}")
        check_small_files(self.path)

    @functools.cached_property
    def config_values(self) -> dict[str, Any]:
        """The content of config.json, as nested dicts, with the names of the version that wrote it.

        Raises:
          InputError: the folder is no run, or one of its small files is damaged.
        """
        path = self.path / CONFIG_FILE
        if not path.is_file():
            raise InputError(f"{self} is not a run: no config.json there; give a --workdir of `train`")
        self.check_files()
        try:
            values = parse_json(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise InputError(
                f"{path} is no object of fields, as `train` writes it: put back the file that the run began with"
            )
        return values

    @functools.cached_property
    def config(self) -> Config:
        """The run's config, with today's names. Raises: InputError: as `config_values`, or a field is invalid."""
        return config.from_dict({name: value for name, value in self.config_values.items() if name != EXPORT_SECTION})

    @property
    def export_section(self) -> dict[str, Any] | None:
        """The section of config.json that describes an export: step, input, output; None for a run.

        Raises:
          InputError: the section names no step or no range of positions, or the export's checksums are missing.
        """
        section = self.config_values.get(EXPORT_SECTION)
        if section is None:
            return None
        if not _is_export_section(section):
            raise InputError(f"{self}/config.json: section '{EXPORT_SECTION}' is damaged: export the run again")
        if "digests" in section and not (self.path / DIGESTS_FILE).is_file():
            raise InputError(f"{self}/{DIGESTS_FILE} is missing, which this export had: export the run again")
        return section

    @functools.cached_property
    def data_spec(self) -> "DataSpec | None":
        """Data spec (vocabulary size, classes, channels); None for runs older than the file. Raises: InputError: damaged."""
        path = self.path / DATA_SPEC_FILE
        if not path.exists():
            return None
        try:
            return _parse_data_spec(parse_json(path.read_text()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read ({error}): put back the file that the run wrote, or remove it"
            ) from error

    @functools.cached_property
    def fingerprints(self) -> dict[str, Fingerprint]:
        """The fingerprints of the run's data by split; {} for runs older than the file. Raises: InputError: damaged."""
        path = self.path / FINGERPRINTS_FILE
        if not path.exists():
            return {}
        try:
            found = parse_json(path.read_bytes())
            for fingerprint in found.values():
                describe_fingerprint(fingerprint)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(f"{path} cannot be read ({error}): put back the file that the run wrote") from error
        return found

    @functools.cached_property
    def conversion(self) -> dict[str, Any]:
        """The report of the conversion that made this folder; {} for other runs. Raises: InputError: damaged."""
        path = self.path / CONVERSION_FILE
        if not path.exists():
            return {}
        try:
            found = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): put back the file that `convert` wrote") from error
        return found if isinstance(found, dict) else {}

    def check_same_data(self, fingerprints: Mapping[str, Fingerprint]) -> None:
        """Refuses to resume with other data than before. Raises: InputError: names the splits that differ."""
        if lines := changed_fingerprints(self.fingerprints, fingerprints):
            raise InputError(
                f"the data of the run of {self} have changed since it began: {'; '.join(lines)}. Put the data back as "
                f"they were, or begin a new run with its parameters: a new --workdir and --init-from={self}"
            )

    @property
    def tokenizer_file(self) -> AnyPath | None:
        """The tokenizer's file; None for images, bytes, and runs of older versions."""
        path = self.path / TOKENIZER_FILE
        return path if path.exists() else None

    @functools.cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes; None without a file of them. Raises: InputError: it is damaged."""
        path = self.path / CLASS_NAMES_FILE
        if not path.exists():
            return None
        try:
            names = parse_json(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): put back the file that the run wrote") from error
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path} must hold a list of class names: put back the file that the run wrote")
        return tuple(names)

    # -------------------------------------------------------------------------------------------------------- results

    def read_metrics(self) -> list[dict[str, Any]]:
        """Returns the objects of metrics.jsonl, read anew; a half-written last line is left out.

        Raises:
          InputError: another line is no object of numbers with a step.
        """
        path = self.path / METRICS_FILE
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        found = []
        for number, line in enumerate(lines, 1):
            try:
                values = parse_json(line)
                if type(values["step"]) is not int or not all(map(_is_number, values.values())):
                    raise ValueError("its step must be a whole number, and all values numbers")
                found.append(values)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path}, line {number} is no object with a step ({error}): remove that line, then start again"
                ) from error
        return found

    def starts(self) -> list[dict[str, Any]]:
        """Returns the starts of `train` in this folder, with time, step and processes; [] for runs older than the file.

        Lines that cannot be read are left out.
        """
        path = self.path / STARTS_FILE
        found = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                start = parse_json(line)
                if math.isfinite(start["time"]):
                    found.append(start)
        return found

    def record_start(self, step: int, process_count: int, *, anew: bool) -> float:
        """Adds a start to starts.jsonl, and returns the Unix time of the first one.

        Args:
          step: steps done before.
          process_count: processes of this start.
          anew: another run begins in this folder: the starts before were not its own.
        """
        starts = [] if anew else self.starts()
        starts.append({"time": time.time(), "step": step, "processes": process_count})
        atomic_write(self.path / STARTS_FILE, "".join(json.dumps(start) + "\n" for start in starts))
        return starts[0]["time"]

    def config_history(self) -> list[dict[str, Any]]:
        """Returns the changes of the config at resumes, with time, step and changes: FIELD -> [old, new].

        Lines that cannot be read are left out.
        """
        path = self.path / HISTORY_FILE
        found = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                entry = parse_json(line)
                if isinstance(entry["changes"], dict):
                    found.append(entry)
        return found

    def record_change(self, step: int, settings: Config) -> None:
        """Adds the fields that are about to change to config_history.jsonl; nothing where none does.

        Args:
          step: steps done with the config so far.
          settings: config from there on.
        """
        before, now = (flatten_dict(config.to_dict(one), ".") for one in (self.config, settings))
        names = [name for name in now if name in before and before[name] != now[name]]
        if not names:
            return
        entry = {
            "time": time.time(),
            "step": step,
            "changes": {name: [before[name], now[name]] for name in names},
        }
        lines = [*self.config_history(), json.loads(json.dumps(entry))]
        if [line["changes"] for line in lines[-2:-1]] == [lines[-1]["changes"]]:
            return  # a start that was killed before it wrote config.json
        atomic_write(self.path / HISTORY_FILE, "".join(json.dumps(line) + "\n" for line in lines))

    def has_config(self, settings: Config) -> bool:
        """Returns whether config.json has exactly these values."""
        try:
            return self.exists and self.config_values == json.loads(json.dumps(config.to_dict(settings)))
        except InputError:  # damaged, or of something else
            return False

    def evaluation_sources(self, step: int) -> dict[str, str]:
        """Returns the checksums of the files that an evaluation of a step depends on: config and checkpoint.

        They, and not the files' times, decide later whether the evaluation still holds.
        """
        return sha256_of(self.path, (CONFIG_FILE, f"{CHECKPOINTS_DIR}/{step}/{DIGESTS_FILE}"))

    def evaluated_step(self) -> int | None:
        """Returns the step that evaluation.json is of; None if there is none, or its sources have changed since.

        Older versions wrote no sources, and their evaluations hold.
        """
        try:
            evaluation = parse_json((self.path / EVALUATION_FILE).read_bytes())
            sources = dict(evaluation.get("made_from", {}))
            return evaluation["step"] if sha256_of(self.path, sources) == sources else None
        except (FileNotFoundError, IsADirectoryError, ValueError, AttributeError, TypeError, KeyError):
            return None

    # ---------------------------------------------------------------------------------------------------- checkpoints

    @property
    def checkpoints_dir(self) -> AnyPath:
        """The folder of checkpoints, as an absolute path."""
        return (self.path / CHECKPOINTS_DIR).absolute()

    def steps(self) -> list[int]:
        """Returns the saved steps, rising, damaged ones included; in a bucket without those whose save was cut short."""
        return [int(path.name) for path in self._step_dirs()]

    def step_dir(self, step: int) -> AnyPath:
        """Returns the folder of a checkpoint."""
        return self.checkpoints_dir / str(step)

    def is_saved(self, step: int) -> bool:
        """Returns whether a checkpoint is complete; on a disk its name suffices, since Orbax renames it last."""
        path = self.step_dir(step)
        return (path / COMMIT_MARKER).exists() if is_remote(path) else path.is_dir()

    def _step_dirs(self, complete: bool = True) -> list[AnyPath]:
        folder = self.checkpoints_dir
        steps = (
            [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()] if folder.is_dir() else []
        )
        # The next save of a step that was cut short in a bucket takes its place.
        steps = [path for path in steps if not (complete and _is_cut_short(path))]
        return sorted(steps, key=lambda path: int(path.name))

    def checkpoint_error(self, step: int) -> str:
        """Returns a description of the damage of a checkpoint, or "" if it is valid.

        All of its files are read, once: again only those of a checkpoint that was written since.
        """
        path = self.step_dir(step)
        versions = file_versions(path)
        if self._errors.get(path, (None,))[0] != versions:
            self._errors[path] = versions, _checkpoint_error(path)
        return self._errors[path][1]

    def check_shared(self, exchange: Exchange, process: int, count: int, metric: str = "", every: bool = False) -> None:
        """Reads checkpoints to check them, each of the processes of a run its part of the bytes; all must call it.

        The results are those that `checkpoint_error` then returns in each process: of the newest checkpoints down to the
        first valid one, and of the best.

        Args:
          exchange: `processes.exchange`.
          process: number of this process.
          count: number of processes.
          metric: metric of the best checkpoint (`eval/NAME@SCALE`); "" = there is none.
          every: check all checkpoints.
        """
        steps = exchange("checkpoints", self.steps() if process == 0 else None, _first)
        valid = False
        for step in reversed(steps):
            if every or not valid:
                valid = not self._check_shared(step, exchange, process, count) or valid
        best = None
        if metric and process == 0:
            with contextlib.suppress(InputError):  # damaged metadata, which the caller reports
                best = best_of(self.metric_values(metric), metric)
        best = exchange("best checkpoint", best, _first)
        if best is not None:
            self._check_shared(best, exchange, process, count)

    def _check_shared(self, step: int, exchange: Exchange, process: int, count: int) -> str:
        path = self.step_dir(step)
        versions = file_versions(path)
        known = self._errors.get(path)
        plan = None
        if process == 0:
            error = known[1] if known and known[0] == versions else _layout_error(path) or None
            plan = {"error": error, "parts": _split_files(path, versions, count) if error is None else []}
        plan = exchange("checkpoint parts", plan, _first)
        error = plan["error"]
        if error is None:
            own = files_error(path, dict(plan["parts"][process]))
            if process == 0:
                own = own or _meta_error(path)
            error = exchange("checkpoint errors", own, lambda errors: next(filter(None, errors), ""))
        self._errors[path] = versions, error
        return error

    def latest_valid_step(self) -> tuple[int | None, dict[AnyPath, str]]:
        """Returns the newest undamaged step, or None, and the newer damaged ones: folder -> description of the damage.

        Checkpoints that a run which trains removes meanwhile are not damaged: `LOOKS` times it is looked for others.
        """
        damaged: dict[AnyPath, str] = {}
        for _ in range(LOOKS):
            damaged, gone = {}, False
            for step in reversed(self.steps()):
                try:
                    error = self.checkpoint_error(step)
                except FileNotFoundError as missing:
                    error = f"{missing.filename} is missing"
                if not error:
                    return step, damaged
                if self.step_dir(step).is_dir():
                    damaged[self.step_dir(step)] = error
                else:
                    gone = True
            if not gone:
                break
        return None, damaged

    def latest_step(self) -> int | None:
        """Returns the newest undamaged step, or None if nothing is saved. Raises: InputError: all are damaged."""
        step, damaged = self.latest_valid_step()
        if step is None and damaged:
            path, error = next(iter(damaged.items()))
            raise InputError(
                f"all checkpoints of {self} are damaged; of the newest, {path}, {error}: put back a copy of one, or use a "
                "new --workdir"
            )
        return step

    def require_latest_step(self) -> int:
        """Returns the newest undamaged step. Raises: InputError: there is none."""
        if not self.checkpoints_dir.is_dir():
            raise InputError(
                f"no checkpoints in {self}: expected a folder '{CHECKPOINTS_DIR}' as `train --workdir` writes it"
            )
        step = self.latest_step()
        if step is None:
            raise InputError(
                f"no finished checkpoint in {self.checkpoints_dir}: train until the first save (checkpoint.every)"
            )
        return step

    def best_step(self, metric: str) -> tuple[int, float]:
        """Returns the step of the best checkpoint, and its value.

        Args:
          metric: checkpoint.best of the run's config.

        Raises:
          InputError: there is none, or a checkpoint that may be the best is damaged.
        """
        if not metric:
            raise InputError(
                f"{self} has no best checkpoint: it was trained without checkpoint.best; use --which=latest"
            )
        key = f"eval/{metric.removeprefix('eval/')}"
        for step in self.steps():
            if (error := self.checkpoint_error(step)) and self.step_dir(step).is_dir():
                raise InputError(
                    f"checkpoint {self.step_dir(step)} is damaged ({error}) and may be the best: put back a copy of it, or "
                    "use --which=latest"
                )
        values = self.metric_values(key)
        best = best_of(values, key)
        if best is None:
            raise InputError(f"{self} has no best checkpoint yet: of none was {key} measured; use --which=latest")
        return best, values[best]

    def metric_values(self, metric: str) -> dict[int, float]:
        """Returns the value of a metric (`eval/NAME@SCALE`) by step, of each saved state that it was measured of.

        Raises:
          InputError: the metadata of a checkpoint is damaged.
        """
        values = {}
        for step in self.steps():
            path = self.step_dir(step)
            try:
                meta = parse_json((path / META_FILE).read_text())
            except (OSError, ValueError) as error:
                if not path.is_dir():  # removed by a run that trains
                    continue
                raise InputError(f"checkpoint {path} is damaged ({META_FILE} cannot be read: {error})") from error
            value = metric_in(meta, metric)
            if value is not None:
                values[step] = value
        return values

    def quarantine(self, best_metric: str = "") -> list[str]:
        """Renames damaged checkpoints that block a resumed run, and returns one line for each.

        Damaged checkpoints newer than the last valid one (Orbax saves no step below an existing one), the best one, and
        those whose metric cannot be read. Nothing is deleted.

        Args:
          best_metric: metric of the best checkpoint; "" = no best checkpoint.
        """
        step, damaged = self.latest_valid_step()
        lines = [
            f"checkpoint {path} is damaged ({error}): renamed to {self._rename_damaged(path)}, resuming from step {step}"
            for path, error in damaged.items()
        ]
        if not best_metric:
            return lines
        for path in self._step_dirs():
            error = checksum_error(path, subfolder=META_FILE.parts[0])
            if error or not (path / META_FILE).is_file():
                error = error or f"{META_FILE} is missing"
                lines.append(f"checkpoint {path} is damaged ({error}): renamed to {self._rename_damaged(path)}")
        while (best := best_of(self.metric_values(best_metric), best_metric)) is not None:
            error, path = self.checkpoint_error(best), self.step_dir(best)
            if not error:
                break
            name = self._rename_damaged(path)
            lines.append(f"checkpoint {path}, the best, is damaged ({error}): renamed to {name}")
        return lines

    def _rename_damaged(self, step_dir: AnyPath) -> str:
        """Renames a damaged checkpoint to a name that is no step, and returns the name."""
        target, number = step_dir.with_name(f"{step_dir.name}.damaged"), 1
        while target.exists():
            target, number = step_dir.with_name(f"{step_dir.name}.damaged{number}"), number + 1
        move_dir(step_dir, target, first=(COMMIT_MARKER,))
        return target.name

    # -------------------------------------------------------------------------------------------------------- writing

    def write_config(self, values: dict[str, Any]) -> None:
        """Writes config.json."""
        self._write(CONFIG_FILE, json.dumps(values, indent=2))

    def write_data_spec(self, data_spec: "DataSpec") -> None:
        """Writes sizes.json."""
        self._write(DATA_SPEC_FILE, json.dumps(dataclasses.asdict(data_spec)))

    def write_fingerprints(self, fingerprints: Mapping[str, Fingerprint]) -> None:
        """Writes data.json."""
        self._write(FINGERPRINTS_FILE, json.dumps(fingerprints, indent=1))

    def write_files(
        self,
        settings: Config,
        data_spec: "DataSpec",
        fingerprints: Mapping[str, Fingerprint],
        save_assets: Callable[[pathlib.Path], None],
    ) -> None:
        """Writes the small files of a run, with their checksums.

        Args:
          settings: content of config.json.
          data_spec: content of sizes.json.
          fingerprints: content of data.json.
          save_assets: writes the tokenizer or the class names into a folder.
        """
        with tmp_dir() as folder:
            staged = RunDir(folder)
            staged.write_config(config.to_dict(settings))
            staged.write_data_spec(data_spec)
            staged.write_fingerprints(fingerprints)
            save_assets(folder)
            write_files(folder, self.path)
        self.reload()

    def _write(self, name: str, content: str) -> None:
        atomic_write(self.path / name, content + "\n")
        self.reload()

    def reload(self) -> None:
        """Clears the cached files, so that they are read again."""
        for name in ("config_values", "config", "data_spec", "fingerprints", "class_names"):
            self.__dict__.pop(name, None)

    # ------------------------------------------------------------------------------------------------------ ownership

    @contextlib.contextmanager
    def lock(self, on_lost: Callable[[str], None]) -> Iterator[str]:
        """Locks the folder for this process; yields "taken over from ..." if its last owner was killed, else "".

        Args:
          on_lost: called in a thread, with the reason in words, if another process takes a folder in a bucket over.

        Raises:
          InputError: another process trains in the folder.
        """
        with run_lock(self.path, on_lost) as self._lock:
            try:
                previous = self._lock.previous
                yield f"taken over from {previous}, which is gone" if previous else ""
            finally:
                self._lock = None

    def check_owned(self) -> None:
        """Raises if the folder no longer belongs to this process: its saves would be lost, or overwrite another run's.

        Raises:
          Failure: the folder was removed, moved or taken over.
        """
        try:
            ours = self._lock is not None and self._lock.is_ours()
            if ours and self.exists:
                return
        except OSError:
            return  # the save that follows reports what is wrong with the disk or the bucket
        owner = "" if ours or self._lock is None else self._lock.owner()
        reason = f"was taken over by {owner}" if owner else "was removed, moved or emptied"
        raise Failure(
            f"the run's folder {self} {reason} while it trained: nothing more is saved there. To resume what was saved "
            "before, give its present folder as --workdir"
        )


# ------------------------------------------------------------------------------------------------------------ fingerprints


def describe_fingerprint(fingerprint: Mapping[str, Any]) -> str:
    """Returns a fingerprint in words: "62,003 tokens (fingerprint 0a1b2c3d4e5f)"."""
    counts = ", ".join(f"{value:,} {name}" for name, value in fingerprint.items() if name != "fingerprint")
    return f"{counts} (fingerprint {fingerprint['fingerprint'][:12]})"


def changed_fingerprints(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> list[str]:
    """Returns `split: before -> now` for each split of both whose content differs."""
    return [
        f"{split}: {describe_fingerprint(before[split])} -> {describe_fingerprint(found)}"
        for split, found in now.items()
        if split in before and before[split]["fingerprint"] != found["fingerprint"]
    ]


# -------------------------------------------------------------------------------------------------------- best checkpoint


def check_best_metric(metric: str, measured: list[str]) -> str:
    """Returns the name `eval/NAME@SCALE` of a metric as checkpoint.best gives it.

    Args:
      metric: NAME@SCALE, with or without `eval/`.
      measured: the metrics that the run measures while it trains.

    Raises:
      InputError: it is none of them.
    """
    key = f"eval/{metric.removeprefix('eval/')}"
    if key not in measured:
        names = ", ".join(name.removeprefix("eval/") for name in measured)
        raise InputError(f"checkpoint.best='{metric}' is not measured while this run trains: choose one of {names}")
    return key


def metric_in(meta: Mapping[str, Any], metric: str) -> float | None:
    """Returns a metric in a checkpoint's metadata; None if it was not measured or is not finite."""
    value = meta.get(EVALUATION_KEY, {}).get(metric)
    return value if value is not None and math.isfinite(value) else None


def best_of(values: Mapping[int, float], metric: str) -> int | None:
    """Returns the step with the best value, of equal ones the first; None if there are none."""
    sign = 1 if HIGHER_IS_BETTER[metric.removeprefix("eval/").partition("@")[0]] else -1
    return max(sorted(values), key=lambda step: sign * values[step], default=None)


# ------------------------------------------------------------------------------------------------------------ output paths

OUTPUT_FILES = {
    CONFIG_FILE,
    DATA_SPEC_FILE,
    FINGERPRINTS_FILE,
    DIGESTS_FILE,
    TOKENIZER_FILE,
    CLASS_NAMES_FILE,
    METRICS_FILE,
    STARTS_FILE,
    HISTORY_FILE,
    STACKS_DIR,
    OWNER_FILE,
    LOG_FILE,
    EVALUATION_FILE,
    CHECKPOINTS_DIR,
    COMPILED_DIR,
    TRACKERS_FILE,
    "tensorboard",
    "wandb",
    "mlruns",
    "profile",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    CONVERSION_FILE,
    "restored.json",
    "similarity.npz",
    "position_curves.npz",
    "attention.npz",
    "readme.md",
    "model.stablehlo",
    "params.safetensors",
}
SWEEP_FILES = {"sweep.json", "optuna.db"}


def check_output_path(path: str | os.PathLike, option: str, allowed: tuple[str, ...] = ()) -> None:
    """Refuses an output file that would replace a file of a run, a sweep or an export, or lie among checkpoints.

    Args:
      path: path of the output.
      option: the option that names it, for the message.
      allowed: names of such files that this option is for.

    Raises:
      InputError: names the folder.
    """
    target = as_path(path)
    target = target.parent.resolve() / target.name
    name = target.name.lower()  # some file systems take CONFIG.JSON for the same file
    reserved = name in OUTPUT_FILES or re.fullmatch(r"answers_\d+\.jsonl", name)
    markers = (CONFIG_FILE, CHECKPOINTS_DIR) if reserved else SWEEP_FILES & {name}
    if name not in allowed and any((target.parent / marker).exists() for marker in markers):
        raise InputError(
            f"{option}={path} is the name of something that the run, sweep or export in {target.parent} keeps: name another"
        )
    for parent in (target, *target.parents):
        if parent.name == CHECKPOINTS_DIR and (parent.parent / CONFIG_FILE).exists():
            raise InputError(
                f"{option}={path} lies among the checkpoints of the run in {parent.parent}: name another place"
            )


# ----------------------------------------------------------------------------------------------------------------- private


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or type(value) is int and abs(value) < 2**63


def _is_export_section(section: Any) -> bool:
    if not isinstance(section, dict) or type(section.get("step")) is not int:
        return False
    reach = section.get("reach")
    return isinstance(reach, list) and bool(reach) and all(type(side) is int and 0 < side < 2**31 for side in reach)


def _parse_data_spec(values: dict[str, Any]) -> "DataSpec":
    """Raises: ValueError, TypeError, AttributeError: they are none."""
    from seqpe_jax.models.build import DataSpec  # a report needs no model

    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    spec = DataSpec(**fields)
    counts = (spec.vocabulary, spec.classes, spec.channels)
    if not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts):
        raise ValueError(f"sizes are {counts}")
    for statistics in (spec.mean, spec.std):  # none, or one for each channel; images are divided by the second
        if not isinstance(statistics, tuple) or len(statistics) not in (0, spec.channels):
            raise ValueError(f"{spec.channels} channels have {statistics}")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in statistics):
            raise ValueError(f"means and deviations are {statistics}")
    if min(spec.std, default=1.0) <= 0:
        raise ValueError(f"deviations are {spec.std}")
    return spec


def _is_cut_short(step_dir: AnyPath) -> bool:
    return is_remote(step_dir) and not any((step_dir / name).is_file() for name in (COMMIT_MARKER, DIGESTS_FILE))


def _first(values: list[Any]) -> Any:
    return values[0]


def _split_files(step_dir: AnyPath, versions: tuple, count: int) -> list[list[tuple[str, Any]]]:
    """The listed files of a checkpoint with their checksums, in parts of nearly equal bytes, largest files first."""
    sizes = {name: size for name, size, _ in versions}
    parts: list[list[tuple[str, Any]]] = [[] for _ in range(count)]
    loads = [0] * count
    files = listed_files(step_dir)[1]
    for file in sorted(files, key=lambda file: (-sizes.get(file, 0), file)):
        least = loads.index(min(loads))
        parts[least].append((file, files[file]))
        loads[least] += sizes.get(file, 0)
    return parts


def _checkpoint_error(step_dir: AnyPath) -> str:
    return _layout_error(step_dir) or files_error(step_dir, listed_files(step_dir)[1]) or _meta_error(step_dir)


def _layout_error(step_dir: AnyPath) -> str:
    required = (COMMIT_MARKER, ORBAX_METADATA, META_FILE) if is_remote(step_dir) else (ORBAX_METADATA, META_FILE)
    missing = [str(name) for name in required if not (step_dir / name).is_file()]
    return f"{missing[0]} is missing" if missing else listed_files(step_dir)[0]


def _meta_error(step_dir: AnyPath) -> str:
    meta = _read_meta(step_dir)  # older versions wrote neither the step nor checksums into it
    if meta.get("step", int(step_dir.name)) != int(step_dir.name):
        return f"it was written as {meta['step']}"
    if "digests" in meta and not (step_dir / DIGESTS_FILE).is_file():
        return f"its {DIGESTS_FILE} is missing"
    return "" if meta else f"its {META_FILE} cannot be read"


def _read_meta(step_dir: AnyPath) -> dict[str, Any]:
    """The metadata of a checkpoint; {} if it is missing or damaged."""
    try:
        meta = parse_json((step_dir / META_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}
