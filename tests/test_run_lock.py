"""One owner of a run's folder at a time, on a disk and in a bucket."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from seqpe_jax import files, run_lock
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.run_dir import RunDir
from seqpe_jax.run_lock import OWNER_FILE
from tests.tiny import ROOT, tiny_config, train

HOLD = """
import sys, time
from seqpe_jax.run_dir import RunDir
with RunDir(sys.argv[1]).lock(print):
    print("locked", flush=True)
    time.sleep(60)
"""
OTHER_OWNER = {"host": "other", "process": 7, "began": "2026-01-01 00:00:00 +0000", "id": "1"}


def lock(path, on_lost=pytest.fail):
    return RunDir(path).lock(on_lost)


def test_a_folder_has_one_owner_until_its_process_ends(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(
        InputError, match=f"is in use by process {holder.pid} on .*, which began at 20.*: let that run end"
    ):
        with lock(tmp_path):
            pytest.fail("two owners")
    holder.kill()
    holder.wait()
    assert (tmp_path / OWNER_FILE).exists()
    with lock(tmp_path) as message:
        assert message.startswith(f"taken over from process {holder.pid} on ") and message.endswith("which is gone")
        assert json.loads((tmp_path / OWNER_FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / OWNER_FILE).exists()
    with lock(tmp_path) as message:
        assert message == ""


def test_a_folder_that_is_removed_moved_or_taken_over_is_not_saved_in(tmp_path):
    run, moved = RunDir(tmp_path / "run"), tmp_path / "moved"
    with run.lock(pytest.fail):
        (run.path / "config.json").touch()
        run.check_owned()
        run.path.rename(moved)
        with pytest.raises(Failure, match="folder .*/run was removed, moved or emptied while it trained: nothing more"):
            run.check_owned()
        run.path.mkdir()
        (run.path / OWNER_FILE).write_text(json.dumps(OTHER_OWNER))
        with pytest.raises(Failure, match="was taken over by process 7 on .* while it trained") as caught:
            run.check_owned()
        assert caught.value.code == 1 and "\n" not in str(caught.value)
    assert (run.path / OWNER_FILE).exists(), "the record of another run stays"


def test_a_folder_in_use_is_not_trained_in(tmp_path):
    settings = tiny_config(variant="none", steps=1, eval__every=0)
    with lock(tmp_path / "run"), pytest.raises(InputError, match="is in use by process"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_file_system_without_locks_is_trained_in(tmp_path, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    with lock(tmp_path) as message:
        assert message == "" and (tmp_path / OWNER_FILE).exists()
    assert not (tmp_path / OWNER_FILE).exists()


def test_a_bucket_has_one_owner_until_its_heartbeat_stops(store, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    record = files.as_path(store.folder) / OWNER_FILE
    files.atomic_write(record, json.dumps(OTHER_OWNER))
    with lock(store.folder) as message:
        assert message == "taken over from process 7 on other, which began at 2026-01-01 00:00:00 +0000, which is gone"
        assert "watching up to 1 s whether it is still there" in capsys.readouterr().out
        ours = json.loads(record.read_bytes())
        assert ours["process"] == os.getpid()
        monkeypatch.setattr(run_lock, "_has_ended", lambda _: False)  # else this process takes over from itself
        with pytest.raises(InputError, match=f"is in use by process {os.getpid()} on .*: let that run end"):
            with lock(store.folder):
                pytest.fail("two owners")
        assert json.loads(record.read_bytes())["id"] == ours["id"]
    assert not record.exists()

    files.atomic_write(record, "no json")  # a record, whatever it says, that its owner removes meanwhile
    leaving = threading.Timer(0.5, record.unlink)
    leaving.start()
    with lock(store.folder) as message:
        assert message == ""
    leaving.join()


def test_an_owner_of_this_machine_that_has_ended_is_not_waited_for(store):
    ended = subprocess.Popen(["true"])
    ended.wait()
    record = run_lock.KernelLock(files.as_path(store.folder))._record | {"process": ended.pid, "id": "1"}
    files.atomic_write(files.as_path(store.folder) / OWNER_FILE, json.dumps(record))
    with lock(store.folder) as message:
        assert message.startswith(f"taken over from process {ended.pid} on ")


def test_of_two_that_lock_a_bucket_at_once_one_is_refused(any_store, monkeypatch):
    """Both saw no record; the bucket takes the first one alone."""
    path = files.as_path(any_store.folder) / OWNER_FILE
    files.atomic_write(path, json.dumps(OTHER_OWNER))
    seen = iter([None])
    read = run_lock.HeartbeatLock.read
    monkeypatch.setattr(run_lock.HeartbeatLock, "read", lambda lock: next(seen, read(lock)))
    with pytest.raises(InputError, match="is in use by process 7"), lock(any_store.folder):
        pytest.fail("two owners")
    assert json.loads(path.read_bytes())["id"] == "1"


def test_an_owner_whose_bucket_was_taken_over_is_reported(store, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.1)
    lost, reasons = threading.Event(), []

    def on_lost(reason):
        reasons.append(reason)
        lost.set()
        time.sleep(3600)  # a process would end here

    path = files.as_path(store.folder) / OWNER_FILE
    with lock(store.folder, on_lost):
        files.atomic_write(path, json.dumps(OTHER_OWNER))
        assert lost.wait(20)
        monkeypatch.setattr(run_lock.threading.Thread, "join", lambda *_: None)
    assert "was taken over by process 7" in reasons[0] and "ends unsaved" in reasons[0]
    assert json.loads(path.read_bytes()) == OTHER_OWNER
