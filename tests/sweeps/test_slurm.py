"""Jobs of a sweep through submitit: on this machine for Slurm's sake; a real Slurm is in tests/test_launch.py."""

import shutil
import signal
import sys
import threading
import time

import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.sweeps import slurm
from tests.sweeps.fake import headers, run

submitit = pytest.importorskip("submitit")


@pytest.mark.slow
def test_a_job_executes_the_remaining_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "FOLDER_SECONDS", 0.1)
    runs = [run(tmp_path, "a")]
    assert slurm.execute_array(tmp_path, runs, runs, 2, {}, cluster="local") is None
    assert not runs[0].remaining_commands() and headers(runs[0]) == ["train", "evaluate"]


def test_a_job_that_vanished_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "FOLDER_SECONDS", 0.05)
    monkeypatch.setattr(slurm, "_queued_jobs", lambda: {"7_1"} - gone)
    monkeypatch.setattr(slurm, "_submit", lambda *_: pytest.fail("it was in the queue"))
    gone: set[str] = set()
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text('{"a": "7_1"}')
    [one] = runs = [run(tmp_path, "a")]
    timer = threading.Timer(0.2, gone.add, ["7_1"])
    timer.start()
    assert slurm.execute_array(tmp_path, runs, runs, None, {}) is None
    assert one.failure().startswith("job 7_1 left the queue without a result")


def test_a_job_near_its_end_lets_the_run_save_and_is_queued_again(tmp_path):
    one = run(tmp_path, "a", "waits")
    job = slurm.Job(one)
    found = []

    def near_the_end():
        while not one.steps_done():
            time.sleep(0.01)
        found.append(job.checkpoint())

    watcher = threading.Thread(target=near_the_end)
    before = signal.getsignal(signal.SIGTERM)
    watcher.start()
    try:
        assert job() == "stopped"
    finally:
        signal.signal(signal.SIGTERM, before)
    watcher.join()
    [again] = found
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function._run == one
    assert one.failure() is None and (one.folder / "log.txt").read_text().endswith("SIGTERM: saved\n")


def test_options_of_jobs_are_checked(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert slurm.parameters(["partition=gpu", "time=600"]) == {"slurm_partition": "gpu", "slurm_time": 600}
    for items, word in ((["partition"], "KEY=VALUE"), (["partitoin=gpu"], "'partition'"), (["time="], "KEY=VALUE")):
        with pytest.raises(InputError, match=word):
            slurm.parameters(items)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="no sbatch"):
        slurm.parameters([])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match="pip install submitit"):
        slurm.parameters([])
