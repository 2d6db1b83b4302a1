"""Whether a folder is that of the run to go on with."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

import seqpe_jax
from seqpe_jax import files
from seqpe_jax.distributed.progress import MetricsWriter
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.tasks.language_modeling import LanguageModeling
from seqpe_jax.training import loop, workdir
from seqpe_jax.training.loop import train_and_evaluate
from seqpe_jax.training.trainer import Trainer
from seqpe_jax.training.workdir import (
    OWNER_FILE,
    check_owned,
    check_same_run,
    check_space,
    owned,
    random_bits_of,
    with_random_bits,
)
from tests.tiny import ROOT, tiny_config, train
from tests.training.test_trainer import written


@pytest.mark.parametrize("variant", ["seqpe", "rotary"])
def test_an_older_run_goes_on(tmp_path, variant):
    """Its file lacks fields that were added since, and holds values that nothing reads."""
    unread = {"theta": 100.0} if variant == "seqpe" else {"width": 96, "qk": "multi", "scalar_scale": 2.0}
    settings, added = tiny_config(variant=variant), dict.fromkeys(("fraction_digits", "resize", "log_scaling"))
    written(tmp_path, settings, **added, **unread)
    check_same_run(settings, tmp_path, 2)
    with pytest.raises(InputError, match="it differs in encoding.log_scaling: False -> True. Use a new --workdir"):
        check_same_run(tiny_config(variant=variant, encoding__log_scaling=True), tmp_path, 2)


def test_a_run_keeps_the_random_bits_that_it_began_with(tmp_path):
    """Also where a new one would have others, as on another kind of device."""
    settings = tiny_config()
    assert settings.precision.random_bits == "auto"
    written(tmp_path, with_random_bits(settings, "rbg"))
    check_same_run(settings, tmp_path, 2)
    assert random_bits_of(json.loads((tmp_path / "config.json").read_text())) == "rbg"
    with pytest.raises(InputError, match="it differs in precision.random_bits: rbg -> threefry. Use a new"):
        check_same_run(tiny_config(precision__random_bits="threefry"), tmp_path, 2)


def test_a_run_from_before_there_was_a_choice_has_threefry(tmp_path):
    written(tmp_path, tiny_config())
    values = json.loads((tmp_path / "config.json").read_text())
    del values["precision"]["random_bits"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert random_bits_of(values) == "threefry"
    check_same_run(tiny_config(), tmp_path, 2)
    check_same_run(tiny_config(precision__random_bits="threefry"), tmp_path, 2)
    with pytest.raises(InputError, match="precision.random_bits: threefry -> rbg"):
        check_same_run(tiny_config(precision__random_bits="rbg"), tmp_path, 2)


def test_a_run_may_go_on_with_steps_skipped_from_there(tmp_path):
    written(tmp_path, tiny_config())
    check_same_run(tiny_config(optimizer__non_finite="skip", optimizer__skips=2), tmp_path, 2)


def test_a_run_that_resumes_keeps_the_checkpoint_that_it_began_with(tmp_path, monkeypatch):
    written(tmp_path, tiny_config(init_from="runs/a"))
    check_same_run(tiny_config(init_from="runs/a"), tmp_path, 2)
    check_same_run(tiny_config(), tmp_path, 2)
    with pytest.raises(
        InputError, match="began with init_from=runs/a: init_from=runs/b is read only when a run begins"
    ):
        check_same_run(tiny_config(init_from="runs/b"), tmp_path, 2)
    monkeypatch.setattr(Trainer, "of", lambda settings, **_: settings)
    assert loop.make_trainer(tiny_config(), tmp_path, 2).init_from == "runs/a"


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 3 * 2**20))
    check_space(tmp_path / "a" / "b", 3 * 2**19, 2)
    check_space(tmp_path, 3 * 2**20, 1)
    with pytest.raises(InputError, match="has 3.0 MiB of free space, and 2 checkpoint.s. of this model take 4.0"):
        check_space(tmp_path / "a" / "b", 2**21, 2)
    with pytest.raises(InputError, match="and 1 checkpoint.s. of this model take 4.0"):
        check_space(tmp_path, 2**22, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    check_space(tmp_path, 2**40, 3)  # a file system that does not tell
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(InputError, match="has 0.0 MiB of free space, and 3 checkpoint"):
        train_and_evaluate(tiny_config(steps=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_save_that_takes_too_long_for_a_preemption_is_told_at_the_start(tmp_path, monkeypatch, capsys):
    assert 0 < workdir.write_rate(tmp_path, 2**20) < 1e12 and not any(tmp_path.iterdir())
    assert workdir.slow_save(tmp_path, 2**20) == ""
    asked = []
    monkeypatch.setattr(workdir, "write_rate", lambda folder, size: asked.append(size) or 2**20)
    assert workdir.slow_save(tmp_path, 30 * 2**20) == ""
    told = workdir.slow_save(tmp_path, 300 * 2**20)
    assert (
        told.startswith("warning: a save takes about 300 s (300 MiB at 1.0 MiB/s, as measured in") and "\n" not in told
    )
    assert asked == [30 * 2**20, workdir.PROBE_BYTES], "no more is written than is saved, and not more than needed"
    monkeypatch.setattr(workdir, "write_rate", lambda folder, size: 1000)
    train(tiny_config(variant="none", steps=1, eval__every=0), tmp_path / "run")
    assert "warning: a save takes about" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, words",
    [
        ({"export": {}, "data": {}, "model": {}, "encoding": {}}, "holds an export, which training would overwrite"),
        (
            {"model_type": "gpt2", "n_layer": 2},
            "holds the config.json of something else, which training would overwrite",
        ),
        ([], "is no object of fields, as `train` writes it"),
    ],
)
def test_a_folder_of_another_kind_is_not_trained_in(tmp_path, values, words):
    text = json.dumps(values)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=words):
        train_and_evaluate(tiny_config(), tmp_path)
    assert (tmp_path / "config.json").read_text() == text


LENGTHS = {"steps": 6, "checkpoint__every": 2, "eval__every": 0}


@pytest.mark.parametrize(
    "schedule, fields, step, refused",
    [
        ("linear", {"steps": 6}, 6, ""),
        (
            "linear",
            {"steps": 8},
            4,
            "was to take 6 steps, .*optimizer.schedule='linear'.: add --extend=true to go on to 8",
        ),
        ("cosine", {"steps": 8}, 4, "add --extend=true"),
        ("constant", {"steps": 8}, 6, ""),
        ("constant", {"steps": 2}, 4, "has 4 steps already: set steps to 4 or more, got 2"),
        ("wsd", {"steps": 8, "optimizer__decay_steps": 2}, 4, ""),
        ("wsd", {"steps": 8, "optimizer__decay_steps": 2}, 6, "add --extend=true"),
        ("wsd", {"steps": 8, "optimizer__decay_steps": 6}, 4, "add --extend=true"),
        ("wsd", {"steps": 6, "optimizer__decay_steps": 2}, 6, ""),
    ],
)
def test_more_steps(tmp_path, schedule, fields, step, refused):
    known = {"optimizer__schedule": schedule} | ({"optimizer__decay_steps": 2} if schedule == "wsd" else {})
    written(tmp_path, tiny_config(**LENGTHS, **known))
    settings = tiny_config(**LENGTHS | known | fields)
    if refused:
        with pytest.raises(InputError, match=refused) as caught:
            check_same_run(settings, tmp_path, step)
        assert "\n" not in str(caught.value)
    else:
        check_same_run(settings, tmp_path, step)
    if "extend" in refused:
        check_same_run(settings, tmp_path, step, extend=True)


@pytest.mark.slow
def test_a_run_extended_before_its_decay_is_one_that_was_that_long_from_the_beginning(tmp_path, monkeypatch):
    """Bit for bit: the order of the data, the draws, masks of the device's own bits and the learning rates go on."""
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 60)
    fields = LENGTHS | {
        "optimizer__schedule": "wsd",
        "optimizer__decay_steps": 2,
        "data__name": "text_files",
        "data__paths": (str(tmp_path / "text.txt"),),
        "precision__random_bits": "rbg",
        "model__dropout": 0.1,
        "encoding__dropout": 0.1,
    }
    train(tiny_config(**fields), tmp_path / "short")
    shutil.rmtree(tmp_path / "short" / "checkpoints" / "6")  # as if it had been stopped there
    longer = tiny_config(**fields | {"steps": 8})
    train(longer, tmp_path / "short")
    train(longer, tmp_path / "long")
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("short", "long")]
    losses = [[json.loads(line)["train/loss"] for line in own] for own in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert json.loads((tmp_path / "short" / "config.json").read_text())["steps"] == 8


@pytest.mark.slow
def test_a_folder_begun_anew_keeps_nothing_of_the_start_before(tmp_path, monkeypatch):
    """That one saved nothing; its tokenizer would be taken for the new run's."""
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 60)
    workdir = tmp_path / "run"
    written(workdir, tiny_config(seed=7))
    for name in ("tokenizer.json", "classes.json", "tokenizer_config.json"):
        (workdir / name).write_text("{}")
    fields = {"steps": 1, "data__name": "text_files", "data__paths": (str(tmp_path / "text.txt"),)}
    train(tiny_config(**fields), workdir)
    assert not {"tokenizer.json", "classes.json", "tokenizer_config.json"} & {path.name for path in workdir.iterdir()}
    assert seqpe_jax.load(workdir).tokenizer.name == "bytes"


HOLDING = """
import pathlib, sys, time
from seqpe_jax.training.workdir import owned
with owned(pathlib.Path(sys.argv[1])):
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_owner_until_that_is_gone(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert holder.stdout.readline() == "holding\n"
    with pytest.raises(
        InputError, match=f"is in use by process {holder.pid} on .*, which began at 20.*: let that run end"
    ):
        with owned(tmp_path):
            pytest.fail("two owners")
    holder.kill()
    holder.wait()
    assert (tmp_path / OWNER_FILE).exists()
    with owned(tmp_path) as told:
        assert told.startswith(f"taken over from process {holder.pid} on ") and told.endswith("which is gone")
        assert json.loads((tmp_path / OWNER_FILE).read_text())["process"] == os.getpid()
    assert not (tmp_path / OWNER_FILE).exists()
    with owned(tmp_path) as told:
        assert told == ""


def test_a_folder_that_is_removed_moved_or_taken_over_is_not_saved_in(tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    with owned(run):
        (run / "config.json").touch()
        check_owned(run)
        run.rename(moved)
        with pytest.raises(
            Failure, match="folder .*/run was removed, moved or emptied while it trained: nothing more is"
        ):
            check_owned(run)
        run.mkdir()
        (run / OWNER_FILE).write_text(json.dumps(workdir._self() | {"process": 7}))
        with pytest.raises(Failure, match="was taken over by process 7 on .* while it trained") as caught:
            check_owned(run)
        assert caught.value.code == 1 and "\n" not in str(caught.value)
    assert (run / OWNER_FILE).exists(), "the lock of another run stays"


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_data_in_its_own_folder_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    text, run, moved = tmp_path / "text.txt", tmp_path / "run", tmp_path / "moved"
    text.write_text("a line of text, and another one\n" * 60)
    settings = tiny_config(
        variant="none",
        steps=4,
        eval__every=0,
        eval__lengths=(16,),
        eval__tokens=64,
        data__name="text_files",
        data__paths=(str(text),),
        checkpoint__keep=2,
    )

    def write(writer, step, *given, **named):  # somebody moves the folder while the third step is reported
        if step == 3:
            while not (run / "checkpoints" / "2").exists():
                time.sleep(0.01)
            run.rename(moved)
        line(writer, step, *given, **named)

    line = MetricsWriter.write
    with monkeypatch.context() as moving:
        moving.setattr(MetricsWriter, "write", write)
        with pytest.raises(Failure, match="was removed, moved or emptied while it trained"):
            train(settings, run)
    assert not run.exists() and sorted(path.name for path in (moved / "checkpoints").iterdir()) == ["2"]
    train(settings, moved)
    assert "resuming at step 2" in capsys.readouterr().out
    seqpe_jax.load(moved).evaluate()
    assert "is not what it was" not in capsys.readouterr().err

    stored = json.loads((moved / "data.json").read_text())
    assert stored.keys() == {"train", "validation", "test"} and stored["train"]["tokens"] == 1728
    shutil.rmtree(moved / "checkpoints" / "4")
    text.write_text("another line of text, and one more\n" * 90)
    with pytest.raises(InputError) as caught:
        train(settings, moved)
    assert str(caught.value) == (
        f"the data of the run of {moved} have changed since it began: train: 1,728 tokens (fingerprint "
        f"{stored['train']['fingerprint'][:12]}) -> 2,835 tokens (fingerprint {fingerprint(settings, 'train')[:12]}). Put "
        f"the data back as they were, or begin a new run with its parameters: a new --workdir and --init-from={moved}"
    )
    assert not (moved / "checkpoints" / "4").exists() and json.loads((moved / "data.json").read_text()) == stored
    seqpe_jax.load(moved).evaluate()
    told = capsys.readouterr().err
    assert f"note: text_files is not what it was when {moved} was trained: test: " in told
    assert told.count("is not what") == 1

    listed = json.loads((moved / "digests.json").read_text())  # as an older version left it
    del listed["files"]["data.json"]
    (moved / "digests.json").write_text(json.dumps(listed))
    (moved / "data.json").unlink()
    train(settings, moved)
    assert "an older version stored no fingerprints of the data" in capsys.readouterr().out
    assert json.loads((moved / "data.json").read_text())["train"]["fingerprint"] == fingerprint(settings, "train")


def fingerprint(settings, split):
    return LanguageModeling(settings).fingerprint(split)["fingerprint"]


def test_a_folder_in_use_is_not_trained_in(tmp_path):
    settings = tiny_config(variant="none", steps=1, eval__every=0)
    with owned(tmp_path / "run"), pytest.raises(InputError, match="is in use by process"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    train(settings, tmp_path / "run")
    assert not (tmp_path / "run" / OWNER_FILE).exists()


def test_without_locks_training_goes_on(tmp_path, monkeypatch):
    """Some file systems that machines share have none."""
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    with owned(tmp_path) as told:
        assert told == "" and (tmp_path / OWNER_FILE).exists()
    assert not (tmp_path / OWNER_FILE).exists()


def test_a_folder_in_a_store_has_one_owner_until_that_is_gone(store, monkeypatch, capsys):
    """A holder says now and then that it is there; who comes looks for that, however clocks are set."""
    monkeypatch.setattr(workdir, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(workdir, "STALE_SECONDS", 1.0)
    folder = files.as_path(store.folder)
    elsewhere = {"host": "elsewhere", "process": 7, "began": "2026-01-01 00:00:00 +0000", "id": "1"}
    files.atomic_write(folder / OWNER_FILE, json.dumps(elsewhere))
    with owned(folder) as told:
        assert told == "taken over from process 7 on elsewhere, which began at 2026-01-01 00:00:00 +0000, which is gone"
        assert "looking up to 1 s whether it is still there" in capsys.readouterr().out
        ours = json.loads((folder / OWNER_FILE).read_bytes())
        assert ours["process"] == os.getpid()
        monkeypatch.setattr(workdir, "_ended", lambda held: False)  # else this process takes over from itself
        with (
            pytest.raises(InputError, match=f"is in use by process {os.getpid()} on .*: let that run end"),
            owned(folder),
        ):
            pytest.fail("two owners")
        assert json.loads((folder / OWNER_FILE).read_bytes())["id"] == ours["id"]
    assert not (folder / OWNER_FILE).exists()
    with owned(folder) as told:
        assert told == ""


def test_an_owner_that_leaves_in_order_while_it_is_looked_for_is_followed(store, monkeypatch):
    monkeypatch.setattr(workdir, "HEARTBEAT_SECONDS", 0.2)
    folder = files.as_path(store.folder)
    files.atomic_write(folder / OWNER_FILE, "no json")  # whatever it is, somebody put it there
    leaving = threading.Timer(0.5, (folder / OWNER_FILE).unlink)
    leaving.start()
    with owned(folder) as told:
        assert told == ""
    leaving.join()


def test_an_owner_of_this_machine_that_is_gone_is_not_waited_for(store):
    folder, gone = files.as_path(store.folder), subprocess.Popen(["true"])
    gone.wait()
    files.atomic_write(folder / OWNER_FILE, json.dumps(workdir._self() | {"process": gone.pid, "id": "1"}))
    with owned(folder) as told:
        assert told.startswith(f"taken over from process {gone.pid} on ")


def test_who_comes_at_the_same_moment_is_told(store, monkeypatch):
    """Both saw nobody there; the store takes the first object alone."""
    folder = files.as_path(store.folder)
    looked = workdir._Claim._read
    files.atomic_write(folder / OWNER_FILE, json.dumps(workdir._self() | {"process": 7, "id": "1"}))
    monkeypatch.setattr(workdir._Claim, "_read", lambda claim: None)
    with pytest.raises(InputError, match="is in use by process 7"), owned(folder):
        pytest.fail("two owners")
    monkeypatch.setattr(workdir._Claim, "_read", looked)
    assert json.loads((folder / OWNER_FILE).read_bytes())["id"] == "1"


def test_a_run_whose_folder_was_taken_over_ends_unsaved(store, monkeypatch):
    monkeypatch.setattr(workdir, "HEARTBEAT_SECONDS", 0.1)
    ended = threading.Event()
    said, folder = [], files.as_path(store.folder)

    def end(code, words):
        said.append((code, words))
        ended.set()
        time.sleep(3600)  # it does not return

    monkeypatch.setattr(workdir.processes, "abort", end)
    with owned(folder):
        files.atomic_write(folder / OWNER_FILE, json.dumps(workdir._self() | {"process": 7, "id": "another"}))
        assert ended.wait(20)
        monkeypatch.setattr(workdir.threading.Thread, "join", lambda *_: None)
    assert said[0][0] == 1 and "was taken over by process 7" in said[0][1] and "ends unsaved" in said[0][1]
    assert json.loads((folder / OWNER_FILE).read_bytes())["id"] == "another"
