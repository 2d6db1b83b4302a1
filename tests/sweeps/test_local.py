"""Runs on this machine: finished runs are not repeated, failures are reported, stopped runs resume."""

import json
import os
import signal
import threading
import time

import pytest

from seqpe_jax import files
from seqpe_jax.checksums import sha256_of
from seqpe_jax.sweeps import local
from seqpe_jax.sweeps.run import Locked, RunProcess, SweepRun, is_locked, map_runs
from tests.sweeps.fake import headers, run


def test_every_run_is_trained_and_evaluated_once(tmp_path):
    runs = [run(tmp_path, name) for name in ("a", "b", "c")]
    assert local.execute(runs, runs, 2) is None
    assert [one.remaining_commands() for one in runs] == [[], [], []]
    assert local.execute(runs, runs, 1) is None
    assert [headers(one) for one in runs] == [["train", "evaluate"]] * 3


def test_runs_in_a_store_are_asked_at_once(store, tmp_path):
    """Four questions that wait for each other all find an answer, in the order of the runs; on a disk one by one."""
    trial = run(tmp_path, "a").trial
    runs = [SweepRun(trial, files.as_path(f"{store.folder}/{number}")) for number in range(4)]
    together = threading.Barrier(4)

    def question(one):
        together.wait(60)
        return one.folder.name, (one.folder / "config.json").exists()

    files.atomic_write(runs[2].folder / "config.json", "{}")
    assert map_runs(runs, question) == [("0", False), ("1", False), ("2", True), ("3", False)]
    here = threading.current_thread()
    assert map_runs([run(tmp_path, "b")], lambda _: threading.current_thread()) == [here]
    assert map_runs([], question) == []


def test_an_evaluation_of_other_files_is_repeated_whatever_the_clock_says(tmp_path):
    [one] = runs = [run(tmp_path, "a")]
    local.execute(runs, runs, 1)
    assert not one.remaining_commands()
    digests, evaluation = "checkpoints/3/digests.json", one.folder / "evaluation.json"
    (one.folder / digests).write_text("of the checkpoint")
    made_from = sha256_of(one.folder, ("config.json", digests))
    evaluation.write_text(json.dumps({"step": 3, "made_from": made_from}))
    for name in (
        "metrics.jsonl",
        "config.json",
        digests,
    ):  # written before the evaluation, by a clock that went back since
        os.utime(one.folder / name, (2**32, 2**32))
    assert len(made_from) == 2 and not one.remaining_commands()
    for name in made_from:
        held = (one.folder / name).read_text()
        (one.folder / name).write_text("of another run")
        os.utime(one.folder / name, (0, 0))
        assert [name for name, _ in one.remaining_commands()] == ["evaluate"]
        (one.folder / name).write_text(held)
        assert not one.remaining_commands()
    for content in ("", '{"step": 2}', "[]"):
        (one.folder / "evaluation.json").write_text(content)
        assert [name for name, _ in one.remaining_commands()] == ["evaluate"]


def test_failures_are_reported_with_their_last_line_and_others_go_on(tmp_path):
    runs = [run(tmp_path, "a", "fails"), run(tmp_path, "b", "dies"), run(tmp_path, "c")]
    assert local.execute(runs, runs, 1) is None
    assert runs[0].failure() == "train, exit code 1: the loss is nan"
    assert runs[1].failure().startswith("train was killed by SIGKILL; its last line: trains on")
    assert runs[2].failure() is None and not runs[2].remaining_commands()
    assert local.outcomes_of(runs) == {"a": "failed", "b": "failed", "c": "finished"}
    mended = run(tmp_path, "a")
    assert mended.failure()
    local.execute([mended], [mended], 1)
    assert mended.failure() is None and headers(mended) == ["train", "train", "evaluate"]


def test_a_command_that_ends_well_without_its_work_has_failed(tmp_path):
    one = run(tmp_path, "a")
    (one.folder / "evaluation.json").mkdir(parents=True)  # cannot be written
    local.execute([one], [one], 1)
    assert one.failure().startswith("evaluate, exit code 1: IsADirectoryError")


def test_logs_hold_names_of_any_bytes(tmp_path):
    one = run(tmp_path, "a", "caf\udce9")
    local.execute([one], [one], 1)
    assert not one.remaining_commands() and b"caf\\udce9" in (one.folder / "log.txt").read_bytes()
    other = run(tmp_path, "b")
    other.mark_failed("train, exit code 2: é and caf\udce9 do not exist")
    assert other.failure() == "train, exit code 2: é and caf\\udce9 do not exist"


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def number(request):
    """A signal that is not ignored, whoever started the tests."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_stops_what_runs_and_starts_nothing_more(tmp_path, number):
    runs = [run(tmp_path, "a", "waits"), run(tmp_path, "b", "waits"), run(tmp_path, "c")]

    def send():
        while not all(one.steps_done() for one in runs[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert local.execute(runs, runs, 2) == number.name
    sender.join()
    assert signal.getsignal(number) == signal.default_int_handler
    for one in runs[:2]:
        assert (one.folder / "log.txt").read_text().endswith("SIGTERM: saved\n") and one.failure() is None
    assert not runs[2].folder.exists()


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with local.Jobs(1) as jobs:
            os.kill(os.getpid(), signal.SIGHUP)
            assert jobs.stop_signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_another_process_works_on_is_waited_for(tmp_path):
    one = run(tmp_path, "a", "waits")
    process = RunProcess(one)
    while not one.steps_done():
        time.sleep(0.01)
    assert is_locked(one)
    with pytest.raises(Locked):
        RunProcess(one)
    process._log.close()  # as when the sweep is killed: the command holds the lock alone
    assert is_locked(one)
    again = run(tmp_path, "a")
    timer = threading.Timer(0.5, process.stop)
    timer.start()
    began = time.monotonic()
    assert local.execute([again], [again], 1) is None
    assert time.monotonic() - began > 0.4 and not again.remaining_commands() and not is_locked(again)
    assert headers(again) == ["train", "train", "evaluate"]
    process._process.wait()
    timer.join()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_jobs_share_the_cores_and_devices(tmp_path, monkeypatch):
    cores = os.sched_getaffinity(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    runs = [run(tmp_path, name) for name in ("a", "b")]
    local.execute(runs, runs, 2)
    for one, device in zip(runs, (5, 7), strict=True):
        count = len(local.core_shares(2)[runs.index(one)])
        assert f"trains on {count} core(s), device {device}" in (one.folder / "log.txt").read_text()
    assert os.sched_getaffinity(0) == cores

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 8})
    assert local.core_shares(1) is None and local.core_shares(2) == [{0, 4, 8}, {1, 5}]
    assert local.describe(2) == "2 at a time, each on 3 of 5 cores"
    assert [len(part) for part in local.core_shares(6)] == [1] * 6 and "some share one" in local.describe(6)


def test_the_view_counts_steps_of_all_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("seqpe_jax.distributed.progress.QUIET_SECONDS", 0.0)
    monkeypatch.setattr(local, "FOLDER_SECONDS", 0.0)
    runs = [run(tmp_path, name, steps=10) for name in ("a", "b", "c", "d")]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"st')
    local.ProgressView({one.name: one.steps for one in runs}).show({"a": "finished", "c": "failed"}, [runs[1]])
    [line] = capsys.readouterr().err.splitlines()
    assert line.split("  ") == [
        "step 15/30",
        "50%",
        "1 of 4 runs finished",
        "1 running (b)",
        "1 failed",
        "1 left",
    ]
