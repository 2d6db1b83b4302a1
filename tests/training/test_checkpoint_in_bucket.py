"""Checkpoints and metrics in a bucket: complete, checked, quarantined, retried."""

import json
import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import checksums, files
from seqpe_jax.errors import InputError, StoreError
from seqpe_jax.files import as_path, list_files
from seqpe_jax.run_dir import CHECKPOINTS_DIR, COMMIT_MARKER, METRICS_FILE, RunDir
from seqpe_jax.training import metrics_writer, orbax_s3
from seqpe_jax.training.checkpoint import Checkpointer, SaveError
from seqpe_jax.training.metrics_writer import MetricsWriter

STATE = {"params": {"kernel": np.arange(64.0, dtype=np.float32).reshape(8, 8), "bias": np.ones(3, np.float32)}}


def state(step: int):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) + step, STATE)


def read(workdir, step=None):
    """The state of a step, by who has only just come."""
    checkpoints = Checkpointer(workdir, create=False)
    step = checkpoints.run.require_latest_step() if step is None else step
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))
    found = checkpoints.restore(shapes, step)
    params, _ = checkpoints.restore_params(shapes["params"], step)
    jax.tree.map(np.testing.assert_array_equal, params, found["params"])
    assert checkpoints.meta(step)["seconds"] == step
    checkpoints.close()
    return step, found


def is_of(found, step):
    jax.tree.map(np.testing.assert_array_equal, found, state(step))


def save(workdir, *steps, **options):
    checkpoints = Checkpointer(workdir, **options)
    for step in steps:
        checkpoints.save(step, state(step), {"seconds": float(step)})
    checkpoints.close()


def steps(workdir):
    return sorted(path.name for path in (as_path(workdir) / CHECKPOINTS_DIR).iterdir())


@pytest.mark.slow
def test_what_is_saved_is_restored_and_damage_is_quarantined(any_store, monkeypatch, caplog):
    manager = "orbax.checkpoint.checkpoint_manager"
    monkeypatch.setattr(f"{manager}._WAIT_FOR_PREV_SAVE_WARNING_THRESHOLD_SECS", -1.0)
    folder = as_path(any_store.folder) / CHECKPOINTS_DIR
    save(any_store.folder, 2, 4, 6, keep=2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "a library warns the user"
    assert steps(any_store.folder) == ["4", "6"] and RunDir(any_store.folder).latest_step() == 6
    step, found = read(any_store.folder)
    assert step == 6
    is_of(found, 6)

    written = {str(path.relative_to(folder / "6")): path.read_bytes() for path in list_files(folder / "6")}
    listed = json.loads(written[checksums.DIGESTS_FILE])
    assert listed["files"].pop(checksums.ORBAX_METADATA).startswith(checksums.WITHOUT_COMMIT_TIME)
    assert (
        listed["folder"] == "6"
        and set(listed["files"].values())
        and all(one.startswith("md5:") for one in listed["files"].values())
    )
    largest = max((name for name in listed["files"]), key=lambda name: len(written[name]))
    written[largest] = b"".join([written[largest][:20], bytes([written[largest][20] ^ 1]), written[largest][21:]])
    (folder / "6" / largest).write_bytes(written[largest])
    assert RunDir(any_store.folder).latest_step() == 4
    (words,) = RunDir(any_store.folder).quarantine()
    assert f"6 is damaged ({largest} has changed since it was written): renamed to 6.damaged" in words
    assert {
        str(path.relative_to(folder / "6.damaged")): path.read_bytes() for path in list_files(folder / "6.damaged")
    } == written
    step, found = read(any_store.folder)
    assert step == 4
    is_of(found, 4)
    save(any_store.folder, 6, keep=2)
    assert steps(any_store.folder) == ["4", "6", "6.damaged"]
    is_of(read(any_store.folder)[1], 6)


def test_a_save_that_was_cut_short_is_never_read_and_the_next_takes_its_place(any_store):
    folder = as_path(any_store.folder) / CHECKPOINTS_DIR
    save(any_store.folder, 2, 4, keep=2)
    for name in (COMMIT_MARKER, checksums.DIGESTS_FILE):
        (folder / "4" / name).unlink()
    assert RunDir(any_store.folder).latest_valid_step() == (2, {}) and RunDir(any_store.folder).quarantine() == []
    assert read(any_store.folder)[0] == 2
    save(any_store.folder, 4, keep=2)
    is_of(read(any_store.folder)[1], 4)


def test_a_mark_that_went_missing_is_damage_and_loses_nothing(store):
    folder = as_path(store.folder) / CHECKPOINTS_DIR
    save(store.folder, 2, 4, keep=2)
    (folder / "4" / COMMIT_MARKER).unlink()
    assert RunDir(store.folder).latest_step() == 2
    (words,) = RunDir(store.folder).quarantine()
    assert f"{COMMIT_MARKER} is missing" in words and steps(store.folder) == ["2", "4.damaged"]


def test_with_no_good_one_left_it_says_so(store):
    folder = as_path(store.folder) / CHECKPOINTS_DIR
    save(store.folder, 2)
    list_files(folder / "2" / "state")[0].unlink()
    with pytest.raises(InputError, match=f"all checkpoints of {store.folder} are damaged.*is missing"):
        RunDir(store.folder).latest_step()


def test_a_run_copied_from_a_disk_is_read_and_goes_on(store, tmp_path):
    save(tmp_path, 2, 4, keep=2)
    files.upload_dir(tmp_path, as_path(store.folder))
    is_of(read(store.folder)[1], 4)
    assert RunDir(store.folder).quarantine() == [] and RunDir(store.folder).latest_step() == 4
    save(store.folder, 6, keep=2)
    assert steps(store.folder) == ["4", "6"]


def test_a_copy_of_a_run_in_a_store_is_checked_on_a_disk(any_store, tmp_path):
    save(any_store.folder, 2)
    for path in list_files(as_path(any_store.folder)):
        target = tmp_path / path.relative_to(as_path(any_store.folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        path.download(target)
    is_of(read(tmp_path)[1], 2)
    damaged = max(list_files(tmp_path / CHECKPOINTS_DIR / "2" / "state"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match=f"{damaged.name} has changed"):
        RunDir(tmp_path).latest_step()


def test_a_save_that_fails_is_reported_in_one_line_and_the_next_one_may_do(any_store, capfd, caplog):
    save(any_store.folder, 2)
    checkpoints = Checkpointer(any_store.folder)
    for about in ("upload" if any_store.scheme == "gs://" else "PUT", "ocdbt"):
        any_store.fail(403, about=about)
        with pytest.raises(SaveError, match=r"the save of step 4 failed \(.*failed on purpose") as caught:
            checkpoints.save(4, state(4), {"seconds": 4.0})
            checkpoints.wait()
        assert len(str(caught.value).splitlines()) == 1
        any_store.fail(0)
        assert RunDir(any_store.folder).latest_step() == 2
    assert checkpoints.failed == 2
    checkpoints.save(6, state(6), {"seconds": 6.0})
    checkpoints.close()
    assert "6" in steps(any_store.folder) and checkpoints.failed == 0
    is_of(read(any_store.folder)[1], 6)
    said = capfd.readouterr().err
    assert "Traceback" not in said and not any(record.exc_info for record in caplog.records), said


def test_what_is_to_be_there_before_a_state_is_there_or_the_save_has_failed(store):
    checkpoints = Checkpointer(store.folder)

    def first():
        raise StoreError(5, "no answer", "metrics.jsonl")

    checkpoints.before_save = first
    with pytest.raises(SaveError, match="no answer"):
        checkpoints.save(2, state(2), {})
    checkpoints.close()
    assert RunDir(store.folder).latest_step() is None


def test_metrics_are_written_whole_now_and_then_and_when_asked(store, monkeypatch):
    path = as_path(store.folder) / METRICS_FILE
    writer = MetricsWriter(store.folder, trackers=("tensorboard",))
    for step in (1, 2):
        writer.write(step, {"train/loss": 1 / step}, time=float(step))
    assert path.read_bytes() == b"", "not at each step"
    writer.flush()
    assert [line["step"] for line in RunDir(store.folder).read_metrics()] == [1, 2]
    assert any("tfevents" in file.name for file in list_files(as_path(store.folder) / "tensorboard"))
    generation = path.info()["generation"]
    writer.flush()
    assert path.info()["generation"] == generation, "nothing new, nothing written"
    monkeypatch.setattr(metrics_writer, "UPLOAD_SECONDS", 0.0)
    writer.write(3, {"train/loss": 1.0}, time=3.0)
    assert [line["step"] for line in RunDir(store.folder).read_metrics()] == [1, 2, 3]
    store.fail(403, about="upload")
    writer.write(4, {"train/loss": 1.0}, time=4.0)  # no reason to end a run
    with pytest.raises(StoreError, match="metrics.jsonl: access denied"):
        writer.flush()
    store.fail(0)
    writer.write(5, {"train/loss": 1.0}, time=5.0)
    writer.close()
    assert [line["step"] for line in RunDir(store.folder).read_metrics()] == [1, 2, 3, 4, 5]

    writer = MetricsWriter(store.folder, 3)
    writer.write(4, {"train/loss": 1 / 3}, time=9.0)
    writer.close()
    lines = RunDir(store.folder).read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["train/loss"] == 1 / 3


def test_errors_of_arrays_after_a_failed_save_are_not_printed(tmp_path, monkeypatch):
    """The previous hook gets the rest, once; a reader does not change it."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", before := lambda one: reported.append(str(one.exc_value)))
    for _ in range(2):
        Checkpointer(tmp_path).close()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another"), OSError("Event loop is closed")):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert reported == ["another", "Event loop is closed"]
    monkeypatch.setattr(sys, "unraisablehook", before)
    Checkpointer(tmp_path, create=False).close()
    assert sys.unraisablehook is before


def test_an_orbax_that_makes_its_arguments_in_another_function_is_refused_for_s3_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_s3, "FUNCTION", "gone")
    orbax_s3.enable.cache_clear()
    with pytest.raises(InputError, match="cannot be saved to s3:// with orbax-checkpoint .*give gs://BUCKET/NAME"):
        orbax_s3.temporary_path_class("s3://runs/a/checkpoints")
    for path in ("gs://runs/a", str(tmp_path)):
        assert orbax_s3.temporary_path_class(path) is None
