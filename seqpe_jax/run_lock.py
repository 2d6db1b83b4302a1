"""One training process at a time in a run's folder; owner.json records which one.

On a disk the kernel holds the lock on that file and releases it however the process ends; folders that several machines
share are protected as far as their file system passes locks on, as NFS does. A bucket has no locks: there the owner rewrites
the object as a heartbeat.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from seqpe_jax.errors import InputError, StoreError
from seqpe_jax.files import AnyPath, is_remote, lock_file, parse_json

OWNER_FILE = "owner.json"
HEARTBEAT_SECONDS = 15.0  # between heartbeats in a bucket
STALE_SECONDS = 60.0  # without a heartbeat, after which an owner counts as gone

Record = dict[str, Any]


class RunLock:
    """The record of the owner, which both kinds of lock share.

    Args:
      folder: folder of the run.

    Attributes:
      previous: who the lock was taken over from, in words; "" if nobody.
    """

    def __init__(self, folder: AnyPath):
        self.folder, self.path, self.previous = folder, folder / OWNER_FILE, ""
        began = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self._record: Record = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": began,
            "id": uuid.uuid4().hex,
        }

    def acquire(self) -> None:
        """Acquires the lock. Raises: InputError: another process has it."""
        raise NotImplementedError

    def release(self) -> None:
        """Removes the record, unless it is another owner's: that of a folder which has replaced this run's."""
        with contextlib.suppress(OSError):  # a record that stays is taken over by the next start
            if self.is_ours():
                self.path.unlink(missing_ok=True)

    def is_ours(self) -> bool:
        """Returns whether the record is this process's. Raises: OSError: it cannot be read."""
        return (self.read() or {}).get("id") == self._record["id"]

    def read(self) -> Record | None:
        """Returns the record, {} if it is damaged, None if there is none. Raises: OSError: it cannot be read."""
        try:
            record = parse_json(self.path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def owner(self) -> str:
        """Returns the owner in words; "" if there is none or it is not recorded, as at the moment of locking."""
        with contextlib.suppress(OSError):
            return describe_owner(self.read())
        return ""

    def in_use(self, owner: str) -> InputError:
        """Returns the error for a folder that another process has locked."""
        return InputError(
            f"workdir {self.folder} is in use by {owner or 'another process'}: let that run end, or choose another folder"
        )


class KernelLock(RunLock):
    """The kernel's lock on the record's file."""

    def acquire(self) -> None:
        """Acquires the lock. Raises: InputError: another process has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = self.path.open("a+")
            if lock_file(self._file) is False:
                self._file.close()
                raise self.in_use(self.owner())
            if self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                break
            self._file.close()  # its last owner has removed it just now
        self.previous = self.owner()
        self._file.truncate(0)
        self._file.write(json.dumps(self._record) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Removes the record, then lets the lock go."""
        super().release()
        self._file.close()


class HeartbeatLock(RunLock):
    """A record in a bucket that its owner rewrites every `HEARTBEAT_SECONDS`, in a thread.

    An owner is gone if it has not done so for `STALE_SECONDS`, or at once if it was a process of this machine that has
    ended. Clocks of two machines are never compared: whoever wants the lock watches whether the record changes.

    Args:
      folder: folder of the run.
      on_lost: called in the thread, with the reason in words, when the record is another's or gone.
    """

    def __init__(self, folder: AnyPath, on_lost: Callable[[str], None]):
        super().__init__(folder)
        self._on_lost, self._released = on_lost, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def acquire(self) -> None:
        """Acquires the lock. Raises: InputError: another process has it."""
        record = self.read()
        owner = describe_owner(record)
        if record is not None and not _has_ended(record):
            print(
                f"  {self.folder} is of {owner or 'another process'}: watching up to {STALE_SECONDS:.0f} s whether it is "
                "still there",
                flush=True,
            )
            record = self._wait_until_stale(record)
        try:
            self.path.write_bytes(self._content(), new=record is None)
        except FileExistsError:
            raise self.in_use(self.owner()) from None
        if not self.is_ours():
            raise self.in_use(self.owner())
        self.previous = owner if record else ""
        self._thread.start()

    def release(self) -> None:
        """Stops the heartbeat and removes the record."""
        self._released.set()
        self._thread.join()
        super().release()

    def _wait_until_stale(self, record: Record) -> Record | None:
        """Returns a record that nobody renews, None if its owner has removed it. Raises: InputError: it is renewed."""
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(HEARTBEAT_SECONDS / 4, max(0.0, deadline - time.monotonic())))
            now = self.read()
            if now is None:
                return None
            if now != record:
                raise self.in_use(describe_owner(record if now.get("id") == record.get("id") else now))
        return record

    def _content(self) -> bytes:
        return json.dumps(self._record | {"beat": time.time()}).encode() + b"\n"

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                record = self.read()
                if record is None:
                    self._on_lost(
                        f"workdir {self.folder} was removed or emptied while it trained: this run ends unsaved"
                    )
                elif record and record.get("id") != self._record["id"]:
                    owner = describe_owner(record)
                    self._on_lost(f"workdir {self.folder} was taken over by {owner}: this run ends unsaved")
                self.path.write_bytes(self._content())
            except StoreError:
                continue  # the next save reports what is wrong with the bucket


@contextlib.contextmanager
def run_lock(folder: AnyPath, on_lost: Callable[[str], None]) -> Iterator[RunLock]:
    """Locks a run's folder for this process while the block runs.

    Args:
      folder: folder of the run; made if it does not exist.
      on_lost: called in a thread, with the reason in words, if another process takes a folder in a bucket over meanwhile.

    Raises:
      InputError: another process trains in the folder.
    """
    lock = HeartbeatLock(folder, on_lost) if is_remote(folder) else KernelLock(folder)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def describe_owner(record: Record | None) -> str:
    """Returns a record in words; "" if it names nobody."""
    try:
        return f"process {record['process']} on {record['host']}, which began at {record['began']}"
    except (KeyError, TypeError):
        return ""


def _has_ended(record: Record) -> bool:
    """True for an owner that is known to be gone: a process of this machine that no longer exists."""
    process = record.get("process")
    if record.get("host") != socket.gethostname() or not isinstance(process, int) or process <= 0:
        return False
    if process == os.getpid():  # process numbers start anew in each container
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
