"""Archives of arrays: read as they are, and refused where they claim more than they hold."""

import io
import zipfile

import numpy as np
import pytest

from seqpe_jax.archives import check_claims, read_arrays


def claiming(shape, content=b"\0" * 64):
    """An archive whose one array says that it has a shape."""
    head, archive = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("values.npy", head.getvalue() + content)
    return archive


def test_arrays_come_back(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 4), np.int8), "c": np.array("text")}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "arrays.npz", **arrays)
        found = read_arrays(tmp_path / "arrays.npz")
        assert found.keys() == arrays.keys() and all((found[name] == arrays[name]).all() for name in arrays)
    assert read_arrays(claiming((4, 4)))["values"].shape == (4, 4)


def test_an_array_that_claims_terabytes_is_refused():
    with pytest.raises(ValueError, match=r"values.npy claims to be float32\[1099511627776\], which it does not hold"):
        read_arrays(claiming((1 << 40,)))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", zeros=np.zeros(1 << 22, np.int8))
    assert (tmp_path / "zeros.npz").stat().st_size < 10_000
    with pytest.raises(ValueError, match="unpack to 4 MiB, and at most 1 fit: write it anew"):
        read_arrays(tmp_path / "zeros.npz", 1 << 20)
    with zipfile.ZipFile(tmp_path / "zeros.npz") as archive, pytest.raises(ValueError, match="at most 2 fit: cure"):
        check_claims(archive, 2 << 20, "cure")
