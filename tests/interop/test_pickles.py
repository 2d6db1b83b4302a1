"""PyTorch's pickles: read to the bit, and never obeyed."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.interop import pickles


class Exploit:
    """What a malicious checkpoint holds: unpickled freely, it would run a command."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def write(path, content, storages=()):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/byteorder", "little")
        for key, values in enumerate(storages):
            archive.writestr(f"model/data/{key}", np.asarray(values).tobytes())
    return path


def tensor_pickle(dtype, count, offset, size, stride):
    """A pickle as torch writes it, by hand: a dict of one tensor in storage "0"."""
    out = io.BytesIO()
    ints = lambda values: b"(" + b"".join(b"K" + bytes([value]) for value in values) + b"t"  # noqa: E731
    out.write(b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n(")
    out.write(b"(U\x07storagectorch\n" + dtype.encode() + b"\nU\x010U\x03cpuK" + bytes([count]) + b"tQ")
    out.write(b"K" + bytes([offset]) + ints(size) + ints(stride) + b"\x89ccollections\nOrderedDict\n)RtRs.")
    return out.getvalue()


def test_tensors_are_read_with_offset_and_strides(tmp_path):
    values = np.arange(12, dtype=np.float32)
    path = write(tmp_path / "a.pth", tensor_pickle("FloatStorage", 12, 1, (2, 3), (1, 4)), [values])
    np.testing.assert_array_equal(pickles.read(path)["w"], values[1:].reshape(-1)[[0, 4, 8, 1, 5, 9]].reshape(2, 3))
    halves = np.arange(6, dtype=np.float16)
    path = write(tmp_path / "b.pth", tensor_pickle("HalfStorage", 6, 0, (6,), (1,)), [halves])
    found = pickles.read(path)["w"]
    assert found.dtype == np.float16 and (found == halves).all()


@pytest.mark.parametrize("name, size", [("reaches past", (3, 5)), ("reaches past", (13,))])
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, name, size):
    stride = (5, 1) if len(size) == 2 else (1,)
    path = write(tmp_path / "a.pth", tensor_pickle("FloatStorage", 12, 0, size, stride), [np.zeros(12, np.float32)])
    with pytest.raises(InputError, match=name):
        pickles.read(path)
    path = write(tmp_path / "b.pth", tensor_pickle("FloatStorage", 12, 0, (12,), (1,)), [np.zeros(11, np.float32)])
    with pytest.raises(InputError, match="storage 0 has 44 bytes, not 12 values"):
        pickles.read(path)


@pytest.mark.parametrize("how", ["system", "open", "getattr", "nested"])
def test_a_pickle_bomb_runs_nothing(tmp_path, how):
    import builtins
    import os

    trap = tmp_path / "trap"
    bomb = {
        "system": Exploit(os.system, f"touch {trap}"),
        "open": Exploit(open, str(trap), "w"),
        "getattr": Exploit(builtins.getattr, os, "system"),
        "nested": {"model": {"w": [Exploit(eval, f"open({str(trap)!r}, 'w')")]}},
    }[how]
    content = pickle.dumps(bomb) if how != "getattr" else b"cbuiltins\ngetattr\n(cos\nsystem\ntR."
    with pytest.raises(InputError, match="refused.*asks for '.*'.*nothing of it has been run"):
        pickles.read(write(tmp_path / "bomb.pth", content))
    assert not trap.exists()
    if how != "getattr":  # the trap works where it is obeyed
        pickle.loads(content)
        assert trap.exists()


def test_damaged_files_are_refused(tmp_path):
    whole = write(tmp_path / "a.pth", tensor_pickle("FloatStorage", 4, 0, (4,), (1,)), [np.zeros(4, np.float32)])
    content = whole.read_bytes()
    for cut in (10, len(content) // 2, len(content) - 5):
        whole.write_bytes(content[:cut])
        with pytest.raises(InputError, match="a.pth.*cut short"):
            pickles.read(whole)
    with pytest.raises(InputError, match="damaged"):
        pickles.read(write(tmp_path / "b.pth", b"no pickle"))
    with pytest.raises(InputError, match="storage 0 is missing"):
        pickles.read(write(tmp_path / "c.pth", tensor_pickle("FloatStorage", 4, 0, (4,), (1,))))
    with pytest.raises(InputError, match="cannot be read"):
        pickles.read(tmp_path / "absent.pth")


def test_a_tensor_that_shows_one_value_without_end_is_refused(tmp_path):
    """A file of a kilobyte that would take as much memory as it likes; a little of it is well, as masks are made so."""
    one = [np.ones(1, np.float32)]
    path = write(tmp_path / "a.pth", tensor_pickle("FloatStorage", 1, 0, (200, 200), (0, 0)), one)
    assert pickles.read(path)["w"].shape == (200, 200) and path.stat().st_size < 1000
    path = write(tmp_path / "b.pth", tensor_pickle("FloatStorage", 1, 0, (255, 255, 255), (0, 0, 0)), one)
    with pytest.raises(InputError, match=r"b.pth is refused: its tensors take more than 4 times.*tensor.clone\(\)"):
        pickles.read(path)


def test_tensors_that_share_a_storage_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "SMALL", 0)
    path = write(tmp_path / "a.pth", tensor_pickle("FloatStorage", 100, 0, (100,), (1,)), [np.zeros(100, np.float32)])
    assert pickles.read(path)["w"].shape == (100,)


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", tensor_pickle("FloatStorage", 4, 0, (4,), (1,)))
        archive.writestr("model/data/0", bytes(1 << 22))
    with pytest.raises(InputError, match="a.pth is refused: its members unpack to 4 MiB.*without compression"):
        pickles.read(path)
