"""Whether a run may go on, or begin, in a folder; what an earlier start left there."""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from seqpe_jax import config
from seqpe_jax.config import Config
from seqpe_jax.data.tokenizers import EOS_FILES, TOKENIZER_FILE
from seqpe_jax.distributed import processes
from seqpe_jax.distributed.progress import LOG_FILE, read_metrics
from seqpe_jax.errors import Failure, InputError, StoreError, check_utf8_name
from seqpe_jax.files import AnyPath, free_space, is_remote, lock, parse_json
from seqpe_jax.inference.exported import SECTION
from seqpe_jax.tasks.fingerprints import FINGERPRINTS_FILE
from seqpe_jax.tasks.image_classification import CLASS_NAMES_FILE
from seqpe_jax.training.checkpoint import CHECKPOINTS_DIR, read_config
from seqpe_jax.training.checksums import DIGESTS_FILE
from seqpe_jax.training.optimizer import decay_steps

OWNER_FILE = "owner.json"  # who trains in the folder
TAKEN_OVER = "taken over from {}, which is gone"
HEARTBEAT_SECONDS, STALE_SECONDS = (
    15.0,
    60.0,
)  # in a store: how often a holder says that it is there; when it is taken for gone
GRACE_SECONDS = 30.0  # between the news that a machine is taken away and its end, on most clouds
PROBE_BYTES = 64 * 2**20


def with_random_bits(settings: Config, chosen: str) -> Config:
    """Returns a config in which `precision.random_bits` is what was chosen where it was left open."""
    if settings.precision.random_bits != "auto":
        return settings
    return dataclasses.replace(settings, precision=dataclasses.replace(settings.precision, random_bits=chosen))


def random_bits_of(stored: dict) -> str:
    """Returns the `precision.random_bits` of a run's config.json; runs from before there was a choice have threefry."""
    return stored.get("precision", {}).get("random_bits", "threefry")


def check_space(workdir: AnyPath, size: int, count: int) -> None:
    """Refuses a disk without room for what a run saves, before its first step.

    Args:
      size: bytes of a checkpoint; count: how many there must be room for.

    Raises:
      InputError: names both sizes.
    """
    if is_remote(workdir):
        return
    nearest = workdir.absolute()
    while not nearest.is_dir():
        nearest = nearest.parent
    needed, free = size * count, free_space(nearest)
    if free is not None and free < needed:
        raise InputError(
            f"workdir {workdir} has {free / 2**20:,.1f} MiB of free space, and {count} checkpoint(s) of this model take "
            f"{needed / 2**20:,.1f}: make room there, or choose another --workdir"
        )


def slow_save(workdir: AnyPath, size: int) -> str:
    """Returns a warning where a save takes longer than a machine that is taken away leaves, else "".

    Args:
      size: bytes that this process saves; how fast it can is measured by writing some.
    """
    seconds = size / write_rate(workdir, min(size, PROBE_BYTES))
    if seconds <= GRACE_SECONDS:
        return ""
    return (
        f"warning: a save takes about {seconds:,.0f} s ({size / 2**20:,.0f} MiB at {size / seconds / 2**20:,.1f} MiB/s, as "
        f"measured in {workdir}), and a machine that is taken away usually leaves {GRACE_SECONDS:.0f}: what is done since "
        "the last save may be lost then, so lower checkpoint.every or use a faster disk"
    )


def write_rate(folder: AnyPath, size: int) -> float:
    """Returns how many bytes a second reach the disk of a folder, of a file of so many bytes, which is removed again."""
    content, began = os.urandom(size), time.monotonic()
    path = folder / f".{os.getpid()}.probe"
    try:
        if is_remote(path):
            path.write_bytes(content)
        else:
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        return size / max(time.monotonic() - began, 1e-9)
    finally:
        path.unlink(missing_ok=True)


def check_same_run(settings: Config, workdir: AnyPath, step: int | None, extend: bool = False) -> None:
    """Refuses a folder of something else. A run that has saved no step yet begins anew, with any config.

    Fields that change nothing of what was trained may differ (`config.RESUME_CHANGEABLE`), and a run may get more steps.

    Args:
      step: the newest saved one, or None; extend: more steps are wanted although the learning rate that the run had so far
        depends on their number.

    Raises:
      InputError: names what stands in the folder, or what differs.
    """
    check_utf8_name(workdir.absolute(), "a folder with checkpoints (--workdir)")
    if not (workdir / "config.json").exists():
        if workdir.exists() and (
            not workdir.is_dir() or any(path.name not in (LOG_FILE, OWNER_FILE) for path in workdir.iterdir())
        ):
            raise InputError(f"workdir {workdir} holds other files but no config.json: choose a new or empty folder")
        return
    values = read_config(workdir)
    if SECTION in values or not {"data", "model", "encoding"} <= values.keys():
        kind = "an export" if SECTION in values else "the config.json of something else"
        raise InputError(
            f"workdir {workdir} holds {kind}, which training would overwrite: choose a new or empty folder"
        )
    if step is None:
        if not (workdir / CHECKPOINTS_DIR).exists() and (lines := read_metrics(workdir)):
            raise InputError(
                f"workdir {workdir} has metrics up to step {lines[-1]['step']}, but its folder '{CHECKPOINTS_DIR}' is gone: put it "
                "back, or choose another --workdir"
            )
        return
    # An older run's file lacks fields that are newer, which have their defaults, and may hold values that nothing reads.
    before = with_random_bits(config.from_dict(values), random_bits_of(values))
    asked = with_random_bits(settings, random_bits_of(values))
    old, new = (config.to_dict(config.reset_unused(one)) for one in (before, asked))
    for values in (old, new):
        for section in (*config.RESUME_CHANGEABLE, "steps"):
            values.pop(section, None)
        values["data"].pop("lossy_tokenizer")  # what is accepted changes nothing of what is computed
        values["data"]["bit_depth"] = values["data"]["bit_depth"] or 16  # as files were read before the field was
        for name in ("decay_steps", "non_finite", "skips"):  # the first is looked at below; none changes steps so far
            values["optimizer"].pop(name)
    lines = config.difference(old, new)
    if lines:
        raise InputError(
            f"workdir {workdir} belongs to a run with another config; it differs in {'; '.join(lines)}. Use a new "
            "--workdir, or the same fields"
        )
    _check_steps(before, settings, workdir, step, extend)
    if settings.init_from and settings.init_from != before.init_from:
        began = f"began with init_from={before.init_from}" if before.init_from else "began with fresh parameters"
        raise InputError(
            f"the run of {workdir} is at step {step} and {began}: init_from={settings.init_from} is read only when a run "
            "begins. Leave it out to resume, or choose a new --workdir"
        )


def _check_steps(before: Config, settings: Config, workdir: AnyPath, step: int, extend: bool) -> None:
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
def owned(workdir: AnyPath) -> Iterator[str]:
    """Keeps a run's folder for this process; yields whom it was taken over from, in words, or "".

    The kernel holds the lock (`files.lock`). Folders that several machines share are kept among them where their file
    system passes locks on, as NFS does. In a store, which has no locks, the holder writes now and then that it is there.

    Raises:
      InputError: another process trains in the folder.
    """
    if is_remote(workdir):
        with _Claim(workdir) as taken_over:
            yield taken_over
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / OWNER_FILE
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
        held.callback(_release, path)
        before = _owner(path)
        file.truncate(0)
        file.write(json.dumps(_self()) + "\n")
        file.flush()
        yield before and TAKEN_OVER.format(before)


def check_owned(workdir: AnyPath) -> None:
    """Ends a run whose folder is not this process's any more: what it saves there would be lost, or another run's.

    Raises:
      Failure: the folder was removed, moved or taken over.
    """
    try:
        if _is_ours(workdir / OWNER_FILE) and (workdir / "config.json").exists():
            return
    except OSError:
        return  # the save that follows says what is wrong with the disk or the store
    words = "" if _is_ours(workdir / OWNER_FILE) else _owner(workdir / OWNER_FILE)
    gone = f"was taken over by {words}" if words else "was removed, moved or emptied"
    raise Failure(
        f"the run's folder {workdir} {gone} while it trained: nothing more is saved there. To resume what was "
        "saved before, give its present folder as --workdir"
    )


def _is_ours(path: AnyPath) -> bool:
    """Whether a lock says that it is of this process."""
    try:
        told = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    own = _self()
    return isinstance(told, dict) and all(told.get(name) == own[name] for name in ("host", "process"))


def _release(path: AnyPath) -> None:
    """Removes this process's lock: another one's, in a folder that has taken the place of this run's, stays."""
    with contextlib.suppress(OSError):  # a lock that stays is taken over by the next start
        if _is_ours(path):
            path.unlink(missing_ok=True)


class _Claim:
    """An object in a store that says who trains in a folder; a thread writes it anew, so that others see that it is held.

    A holder that has not written it for `STALE_SECONDS` is gone, and one of this machine whose process has ended is gone at
    once. Clocks of different machines are not compared: who comes watches whether the object changes.
    """

    def __init__(self, workdir: AnyPath):
        self._workdir, self._path = workdir, workdir / OWNER_FILE
        self._self = _self() | {"id": uuid.uuid4().hex}
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> str:
        held = self._read()
        before = _owner(self._path)
        if held is not None and not _ended(held):
            words = f"looking up to {STALE_SECONDS:.0f} s whether it is still there"
            print(f"  {self._workdir} is of {before or 'another process'}: {words}", flush=True)
            held = self._watch(held, before)
        try:
            self._path.write_bytes(self._content(), new=held is None)
        except FileExistsError:
            raise self._in_use(_owner(self._path)) from None
        if (self._read() or {}).get("id") != self._self["id"]:
            raise self._in_use(_owner(self._path))
        self._beating.start()
        return TAKEN_OVER.format(before) if held and before else ""

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._beating.join()
        with contextlib.suppress(OSError):  # an object that stays is taken over by the next start
            if (self._read() or {}).get("id") == self._self["id"]:
                self._path.unlink(missing_ok=True)

    def _watch(self, held: dict[str, Any], before: str) -> dict[str, Any] | None:
        """Waits until a holder is gone; returns what it left, None where it left in order. Raises: InputError: it stays."""
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(HEARTBEAT_SECONDS / 4, max(0.0, deadline - time.monotonic())))
            if (now := self._read()) != held:
                if now is None:
                    return None
                raise self._in_use(before if now.get("id") == held.get("id") else _owner(self._path))
        return held

    def _in_use(self, words: str) -> InputError:
        return InputError(
            f"workdir {self._workdir} is in use by {words or 'another process'}: let that run end, or choose another folder"
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            told = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return told if isinstance(told, dict) else {}

    def _content(self) -> bytes:
        return json.dumps(self._self | {"beat": time.time()}).encode() + b"\n"

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                held = self._read()
                if held is None:
                    processes.abort(
                        1, f"workdir {self._workdir} was removed or emptied while it trained: this run ends unsaved"
                    )
                if held and held.get("id") != self._self["id"]:
                    processes.abort(
                        1, f"workdir {self._workdir} was taken over by {_owner(self._path)}: this run ends unsaved"
                    )
                self._path.write_bytes(self._content())
            except StoreError:
                continue  # saves say what is wrong with the store


def _self() -> dict[str, Any]:
    """This process as a lock names it."""
    began = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "process": os.getpid(), "began": began}


def _ended(held: dict[str, Any]) -> bool:
    """Whether a holder is known to be gone: it was of this machine, and its process is not there any more."""
    process = held.get("process")
    if held.get("host") != socket.gethostname() or not isinstance(process, int) or process <= 0:
        return False
    if process == os.getpid():  # numbers begin anew where a container does
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _owner(path: AnyPath) -> str:
    """Who a lock says it is of, in words; "" where it says nothing, as at the moment when it is taken."""
    try:
        told = parse_json(path.read_text())
        return f"process {told['process']} on {told['host']}, which began at {told['began']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def clear(workdir: AnyPath) -> None:
    """Removes what a start that saved nothing has left: its tokenizer or class names would be taken for the new run's."""
    for name in (
        DIGESTS_FILE,
        *({FINGERPRINTS_FILE, TOKENIZER_FILE, *EOS_FILES, CLASS_NAMES_FILE} - {"config.json"}),
    ):  # first what says that the others are there
        (workdir / name).unlink(missing_ok=True)
