"""Saving, restoring onto another mesh, retention, checksums, quarantine."""

import concurrent.futures
import contextlib
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import checksums
from seqpe_jax.checksums import DIGESTS_FILE, ORBAX_METADATA, files_error
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import META_FILE, RunDir
from seqpe_jax.training.checkpoint import Checkpointer, SaveError, checkpoint_bytes
from tests.run_files import files_of, flip, largest

KERNEL = np.arange(64.0, dtype=np.float32).reshape(8, 8)
STATE = {"params": {"model": {"head": {"kernel": KERNEL, "bias": np.ones(3, np.float32)}}}, "step": 4}


def placed(mesh):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype), STATE)
    return layout.abstract_state_with_shardings(mesh, shapes)[0]


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(folder, keep=2)
    for step in (2, 4, 6):
        checkpointer.save(step, state_on(layout.make_mesh(4, 2)), {"seconds": float(step)})
    checkpointer.close()
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    return shutil.copytree(saved_once, tmp_path / "run")


def state_on(mesh):
    return jax.tree.map(lambda leaf, shape: jax.device_put(jnp.asarray(leaf), shape.sharding), STATE, placed(mesh))


def test_restore_on_another_mesh(saved):
    checkpoints = Checkpointer(saved, create=False)
    assert checkpoints.latest_step() == 6 and checkpoints.meta()["seconds"] == 6.0
    mesh = layout.make_mesh(2, 4)
    restored = checkpoints.restore(placed(mesh))
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)
    kernel = restored["params"]["model"]["head"]["kernel"]
    assert kernel.sharding.mesh.shape["fsdp"] == 4 and kernel.sharding.shard_shape(kernel.shape) == (2, 8)
    params, step = checkpoints.restore_params(placed(mesh)["params"])
    jax.tree.map(np.testing.assert_array_equal, params, STATE["params"])
    assert step == 6
    checkpoints.close()


def test_a_checkpoint_takes_no_more_room_than_is_asked_for(tmp_path):
    """Else a disk fills while TensorStore writes, whose threads tell each array that has no room."""
    for count, width in ((1, 4), (60, 4), (4, 20_000)):
        state = {f"w{number}": jnp.asarray(np.random.default_rng(number).normal(size=width)) for number in range(count)}
        checkpoints = Checkpointer(tmp_path / str(count))
        checkpoints.save(2, state, {"config": "x" * 3000})
        checkpoints.close()
        files = files_of(tmp_path / str(count) / "checkpoints" / "2")
        assert len(files) > 5 and sum(path.stat().st_blocks * 512 for path in files) <= checkpoint_bytes(state), (
            count,
            width,
        )


def test_only_the_newest_are_saved(saved):
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["4", "6"]


def test_those_of_every_so_many_steps_stay_for_good(tmp_path):
    state = state_on(layout.make_mesh(4, 2))
    for keep, steps in ((1, (2, 4, 6)), (1, (8, 10))):  # a second start keeps them too
        checkpoints = Checkpointer(tmp_path, keep=keep, keep_every=4)
        for step in steps:
            checkpoints.save(step, state, {})
        checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 8, 10]


def test_a_save_that_fails_is_reported_in_one_line_and_the_next_one_may_do(tmp_path, monkeypatch, caplog):
    """Orbax's threads raise; the unfinished save is removed, and earlier ones stay."""
    shapes, state = placed(layout.make_mesh(4, 2)), state_on(layout.make_mesh(4, 2))
    checkpoints = Checkpointer(tmp_path, keep=3)
    checkpoints.save(2, state, {})
    checkpoints.wait()
    with monkeypatch.context() as broken:
        broken.setattr("seqpe_jax.training.checkpoint.write_checksums", raises(OSError(5, "the disk answers no more")))
        checkpoints.save(4, state, {})
        with pytest.raises(SaveError, match="^the save of step 4 failed .*the disk answers no more"):
            checkpoints.wait()
    assert checkpoints.failed == 1 and [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert not [record for record in caplog.records if record.exc_info]
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 99))
        with pytest.raises(SaveError, match="the save of step 4 failed .no space is left"):
            checkpoints.save(4, state, {})
    assert checkpoints.failed == 2
    checkpoints.save(6, state, {})
    checkpoints.wait()
    assert checkpoints.failed == 0 and checkpoints.latest_step() == 6
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(shapes), STATE)
    checkpoints.close()


def raises(error):
    def call(*_, **__):
        raise error

    return call


def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_is_used(saved):
    """Other damage: test_damage.py."""
    flip(largest(saved / "checkpoints" / "6"))
    assert {run.latest_valid_step()[0] for run in Together(2).check(saved)} == {4}
    before = {path.read_bytes() for path in files_of(saved)}
    mesh = layout.make_mesh(8, 1)
    checkpoints = Checkpointer(saved, create=False)
    assert checkpoints.latest_step() == RunDir(saved).require_latest_step() == RunDir(saved).latest_step() == 4
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(placed(mesh)), STATE)
    assert checkpoints.restore_params(placed(mesh)["params"])[1] == 4 and checkpoints.meta()["seconds"] == 4.0
    checkpoints.close()
    [line] = RunDir(saved).quarantine()
    assert "is damaged (" in line and "resuming from step 4" in line
    assert RunDir(saved).quarantine() == []
    assert before == {path.read_bytes() for path in files_of(saved)}, "nothing is deleted"
    again = Checkpointer(saved, keep=2)
    again.save(5, state_on(mesh), {"seconds": 5.0})
    again.close()
    assert RunDir(saved).latest_step() == 5


def untimed(content):
    """What Orbax says of a checkpoint, without the time of its commit, which nothing reads; None where it is no JSON."""
    try:
        return {name: value for name, value in json.loads(content).items() if name != checksums.COMMIT_TIME}
    except ValueError:
        return None


def test_every_flipped_byte_is_found(saved):
    step = saved / "checkpoints" / "6"
    draw = np.random.default_rng(0)
    for path in files_of(step):
        if not path.stat().st_size:
            continue
        content = path.read_bytes()
        every = range(0, len(content), 5) if path.name == ORBAX_METADATA else ()
        for place in {0, len(content) - 1, int(draw.integers(len(content))), *every}:
            flip(path, place)
            if path.name == ORBAX_METADATA:
                assert RunDir(saved).latest_step() == (6 if untimed(path.read_bytes()) == untimed(content) else 4), (
                    place
                )
            elif path.parent == step:  # written last of all; of the digests, a name or a number has changed
                assert path.name in (DIGESTS_FILE, "commit_success.txt")
                checkpoints = Checkpointer(saved, create=False)
                jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(placed(layout.make_mesh(8, 1))), STATE)
                checkpoints.close()
            else:
                assert RunDir(saved).latest_step() == 4, path
            flip(path, place)
    assert RunDir(saved).latest_step() == 6


class Together:
    """Processes of a run as threads, which exchange values.

    Args:
      count: number of processes.
    """

    def __init__(self, count):
        self.count, self.barrier = count, threading.Barrier(count, timeout=60)
        self.values, self.result = [None] * count, None

    def exchange_of(self, process):
        def exchange(key, value, reduce):
            self.values[process] = (key, json.loads(json.dumps(value)))
            self.barrier.wait()
            if process == 0:
                assert {key for key, _ in self.values} == {key}
                self.result = reduce([value for _, value in self.values])
            self.barrier.wait()
            result = self.result
            self.barrier.wait()
            return result

        return exchange

    def check(self, folder, metric="", every=False):
        """Returns the object of the run's folder of each process, which have checked the checkpoints together."""
        runs = [RunDir(folder) for _ in range(self.count)]
        with concurrent.futures.ThreadPoolExecutor(self.count) as pool:
            list(
                pool.map(
                    lambda n: runs[n].check_shared(self.exchange_of(n), n, self.count, metric, every), range(self.count)
                )
            )
        return runs


def test_each_process_reads_its_part_of_a_checkpoint(saved, monkeypatch):
    """All know the result afterwards, and read nothing again."""
    reads, checksum = [], checksums._checksum
    monkeypatch.setattr(checksums, "HASH_THREADS", 1)
    monkeypatch.setattr(checksums, "_checksum", lambda path, scheme: reads.append(path) or checksum(path, scheme))
    parts = []
    monkeypatch.setattr(
        "seqpe_jax.run_dir.files_error", lambda path, files: parts.append(files) or files_error(path, files)
    )
    runs = Together(3).check(saved)
    listed = {
        str(saved / "checkpoints" / step / file)
        for step in ("4", "6")
        for file in checksums.read_checksums(saved / "checkpoints" / step)
    }
    newest = {path for path in listed if "/checkpoints/6/" in path}
    assert sorted(map(str, reads)) == sorted(newest)
    sizes = [sum((saved / "checkpoints" / "6" / file).stat().st_size for file in part) for part in parts]
    assert len(sizes) == 3 and max(sizes) - min(sizes) <= largest(saved / "checkpoints" / "6").stat().st_size
    assert min(sizes) > 0
    assert [run.latest_step() for run in runs] == [6, 6, 6] and len(reads) == len(newest)
    second = sorted(files_of(saved / "checkpoints" / "6" / "state"), key=lambda path: path.stat().st_size)[-2]
    for damaged in (second, largest(saved / "checkpoints" / "6")):  # a file of either's part
        flip(damaged, 10)
        assert [run.latest_valid_step()[0] for run in Together(2).check(saved)] == [4, 4]
        flip(damaged, 10)
    reads.clear()
    Together(2).check(saved, every=True)
    assert sorted(map(str, reads)) == sorted(listed), "all checkpoints, of which the best is chosen"


def test_a_byte_that_flips_after_it_was_looked_at_is_found(saved):
    """In one process, of which each part of a file was compared already."""
    assert RunDir(saved).latest_step() == 6
    flip(largest(saved / "checkpoints" / "6"), 10)
    assert RunDir(saved).latest_step() == 4


def test_small_files_and_their_digests_agree_whenever_their_writing_is_cut_short(tmp_path, monkeypatch):
    staged = tmp_path / "staged"
    staged.mkdir()
    run, written = tmp_path / "run", checksums.atomic_write
    for version in range(3):
        for name in ("config.json", "data.json", f"new{version}.json"):
            (staged / name).write_text(f"{name} {version}")
        for left in range(8):  # writes until the process is killed
            count = iter([written] * left)
            monkeypatch.setattr(checksums, "atomic_write", lambda *given, count=count: next(count)(*given))
            with contextlib.suppress(StopIteration):
                checksums.write_files(staged, run)
            checksums.check_small_files(run)
        assert (run / "config.json").read_text() == f"config.json {version}"
        (run / "data.json").write_text("another")
        with pytest.raises(InputError, match="data.json has changed since it was written"):
            checksums.check_small_files(run)
        (run / "data.json").write_text(f"data.json {version}")


def test_handlers_that_orbax_adds_after_the_checksums_are_no_damage(saved):
    step = saved / "checkpoints" / "6"
    metadata, complete = step / ORBAX_METADATA, (step / ORBAX_METADATA).read_text()
    metadata.write_text(json.dumps(json.loads(complete) | {"item_handlers": None}))
    checksums.write_checksums(step)
    metadata.write_text(complete)
    assert RunDir(saved).latest_step() == 6
    metadata.write_text(complete.replace("custom_metadata", "custom_metadatb"))
    assert RunDir(saved).latest_step() == 4


def test_with_no_good_one_left_it_says_so(saved):
    for step in ("4", "6"):
        flip(largest(saved / "checkpoints" / step), 10)
    checkpoints = Checkpointer(saved, create=False)
    for read in (checkpoints.run.require_latest_step, lambda: RunDir(saved).latest_step()):
        with pytest.raises(
            InputError, match="all checkpoints .*are damaged; of the newest, .*/6, .* has changed since"
        ):
            read()
    checkpoints.close()


def of_an_older_version(step):
    """Makes a checkpoint one of a version that wrote no digests, nor said that it did."""
    (step / DIGESTS_FILE).unlink()
    meta = json.loads((step / META_FILE).read_text())
    del meta["digests"], meta["step"]
    (step / META_FILE).write_text(json.dumps(meta))


def test_a_checkpoint_of_a_version_without_digests_is_read(saved):
    of_an_older_version(saved / "checkpoints" / "6")
    assert RunDir(saved).latest_step() == 6


def test_a_damaged_checkpoint_is_reported_in_one_line(saved):
    """A damaged checkpoint without checksums, which Orbax cannot read."""
    shutil.rmtree(saved / "checkpoints" / "6" / "state" / "d", ignore_errors=True)
    of_an_older_version(saved / "checkpoints" / "6")
    for path in (saved / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    checkpoints = Checkpointer(saved, create=False)
    for read in (checkpoints.restore, lambda shapes: checkpoints.restore_params(shapes["params"])):
        with pytest.raises(InputError, match="cannot be read") as caught:
            read(placed(layout.make_mesh(8, 1)))
        assert "\n" not in str(caught.value)
    checkpoints.close()


def test_a_folder_without_checkpoints_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no checkpoints in"):
        Checkpointer(tmp_path, create=False)
