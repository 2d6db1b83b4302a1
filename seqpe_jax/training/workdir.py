"""Whether a run may go on, or begin, in a folder; what an earlier start left there."""

import contextlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from seqpe_jax import config
from seqpe_jax.config import Config
from seqpe_jax.data.tokenizers import FILE, NAMED_IN
from seqpe_jax.errors import InputError, check_utf8_name
from seqpe_jax.files import free_space, from_json, lock
from seqpe_jax.runtime.checkpoint import read_config
from seqpe_jax.runtime.progress import LOG
from seqpe_jax.serving.exported import SECTION
from seqpe_jax.tasks.images import KEPT
from seqpe_jax.training.optimizer import decay_steps

OWNER = "owner.json"  # who trains in the folder


def check_space(workdir: pathlib.Path, size: int, count: int) -> None:
    """Refuses a disk without room for what a run saves, before its first step.

    Args:
      size: bytes of a checkpoint; count: how many there must be room for.

    Raises:
      InputError: names both sizes.
    """
    nearest = workdir.absolute()
    while not nearest.is_dir():
        nearest = nearest.parent
    needed, free = size * count, free_space(nearest)
    if free is not None and free < needed:
        raise InputError(
            f"workdir {workdir} has {free / 2**20:,.1f} MiB of free space, and {count} checkpoint(s) of this model take "
            f"{needed / 2**20:,.1f}: make room there, or choose another --workdir"
        )


def check_same_run(settings: Config, workdir: pathlib.Path, step: int | None, extend: bool = False) -> None:
    """Refuses a folder of something else. A run that has saved no step yet begins anew, with any config.

    Fields that change nothing of what was trained may differ (`config.FREE_SECTIONS`), and a run may get more steps.

    Args:
      step: the newest saved one, or None; extend: more steps are wanted although the learning rate that the run had so far
        depends on their number.

    Raises:
      InputError: names what stands in the folder, or what differs.
    """
    check_utf8_name(workdir.absolute(), "a folder with checkpoints (--workdir)")
    if not (workdir / "config.json").exists():
        if workdir.exists() and (not workdir.is_dir() or any(path.name not in (LOG, OWNER) for path in workdir.iterdir())):
            raise InputError(f"workdir {workdir} holds other files but no config.json: choose a new or empty folder")
        return
    values = read_config(workdir)
    if not isinstance(values, dict) or SECTION in values or not {"data", "model", "encoding"} <= values.keys():
        kind = "an export" if isinstance(values, dict) and SECTION in values else "the config.json of something else"
        raise InputError(f"workdir {workdir} holds {kind}, which training would overwrite: choose a new or empty folder")
    if step is None:
        return
    # An older run's file lacks fields that are newer, which have their defaults, and may hold values that nothing reads.
    before = config.from_dict(values)
    old, new = (config.to_dict(config.as_read(one)) for one in (before, settings))
    for values in (old, new):
        for section in (*config.FREE_SECTIONS, "steps"):
            values.pop(section, None)
        values["data"].pop("lossy_tokenizer")  # what is accepted changes nothing of what is computed
        for name in ("decay_steps", "non_finite", "skips"):  # the first is looked at below; none changes steps so far
            values["optimizer"].pop(name)
    lines = config.difference(old, new)
    if lines:
        raise InputError(
            f"workdir {workdir} belongs to a run with another config; it differs in {'; '.join(lines)}. Use a new "
            "--workdir, or the same fields"
        )
    _check_steps(before, settings, workdir, step, extend)


def _check_steps(before: Config, settings: Config, workdir: pathlib.Path, step: int, extend: bool) -> None:
    """Refuses a number of steps that the run is past, or under which it would have had another learning rate so far."""
    if settings.steps < step:
        raise InputError(
            f"the run of {workdir} has {step} steps already: set steps to {step} or more, got {settings.steps}"
        )
    if settings.optimizer.schedule == "wsd":
        same = all(step <= one.steps - decay_steps(one.optimizer, one.steps) for one in (before, settings))
        same = same or (before.steps, before.optimizer) == (settings.steps, settings.optimizer)
    else:
        same = settings.steps == before.steps or settings.optimizer.schedule == "constant"
    if not (same or extend):
        raise InputError(
            f"the run of {workdir} was to take {before.steps} steps, and its learning rate so far depends on that number "
            f"(optimizer.schedule='{settings.optimizer.schedule}'): add --extend=true to go on to {settings.steps} under "
            "the schedule of that many, or set steps as it was. Under wsd, more steps change nothing before the decay"
        )


@contextlib.contextmanager
def owned(workdir: pathlib.Path) -> Iterator[str]:
    """Keeps a run's folder for this process; yields whom it was taken over from, in words, or "".

    The kernel holds the lock (`files.lock`). Folders that several machines share are kept among them where their file
    system passes locks on, as NFS does.

    Raises:
      InputError: another process trains in the folder.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / OWNER
    with contextlib.ExitStack() as held:
        while True:
            file = path.open("a+")
            if lock(file) is False:
                words = _owner(path)
                file.close()
                raise InputError(
                    f"workdir {workdir} is in use{words and ' by '}{words}: let that run end, or choose another folder"
                )
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # its last owner removed it just now
        held.callback(file.close)
        held.callback(path.unlink, missing_ok=True)
        before = _owner(path)
        began = time.strftime("%Y-%m-%d %H:%M:%S %z")
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "began": began}) + "\n")
        file.flush()
        yield before and f"taken over from {before}, which is gone"


def _owner(path: pathlib.Path) -> str:
    """Who a lock says it is of, in words; "" where it says nothing, as at the moment when it is taken."""
    try:
        told = from_json(path.read_text())
        return f"process {told['process']} on {told['host']}, which began at {told['began']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def clear(workdir: pathlib.Path) -> None:
    """Removes what a start that saved nothing has left: its tokenizer or class names would be taken for the new run's."""
    for name in {FILE, *NAMED_IN, KEPT} - {"config.json"}:
        (workdir / name).unlink(missing_ok=True)
