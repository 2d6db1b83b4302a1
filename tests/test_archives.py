"""Archives of arrays with limits on their size."""

import io
import zipfile

import numpy as np
import pytest

from seqpe_jax.archives import check_unpacked_size, load_npz


def archive_of(shape, content=b"\0" * 64):
    """An archive with one array whose header has a shape."""
    header, archive = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("values.npy", header.getvalue() + content)
    return archive


def test_arrays_come_back(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 4), np.int8), "c": np.array("text")}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "arrays.npz", **arrays)
        found = load_npz(tmp_path / "arrays.npz")
        assert found.keys() == arrays.keys() and all((found[name] == arrays[name]).all() for name in arrays)
    assert load_npz(archive_of((4, 4)))["values"].shape == (4, 4)


def test_arrays_with_less_content_than_their_header_says_are_refused():
    for shape in ((5, 5), (1 << 40,)):
        with pytest.raises(ValueError):
            load_npz(archive_of(shape))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", zeros=np.zeros(1 << 22, np.int8))
    assert (tmp_path / "zeros.npz").stat().st_size < 10_000
    with pytest.raises(ValueError, match="unpack to 4 MiB, and at most 1 fit: write it anew"):
        load_npz(tmp_path / "zeros.npz", 1 << 20)
    with zipfile.ZipFile(tmp_path / "zeros.npz") as archive, pytest.raises(ValueError, match="at most 2 fit: hint"):
        check_unpacked_size(archive, 2 << 20, "hint")
