"""Reads PyTorch's `.pth` files without torch and without running anything that they hold.

Such a file is a zip of a pickle and of raw storages. A pickle may name any function to be called; here names resolve to
a fixed few, all of them ours and harmless, and every other name ends the reading. Source of the format:
torch/serialization.py.
"""

import io
import math
import pathlib
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from seqpe_jax.archives import check_unpacked_size
from seqpe_jax.errors import InputError, format_value

SHARED = 4  # tensors may share a storage, as tied weights do, and take so many times what the file does
SMALL = 1 << 24  # bytes that they may take whatever the file does
DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
}


def read(path: str | pathlib.Path) -> Any:
    """Returns the content of a `.pth` file: tensors as NumPy arrays, `yacs` nodes as dicts, containers and numbers.

    Raises:
      InputError: not such a file, cut short, or its pickle names anything else; nothing of it has been run.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size  # PyTorch packs nothing, so that its records are no larger than the file
            try:
                check_unpacked_size(
                    archive, size, "unpack it and zip it again without compression (zip -0), as PyTorch does"
                )
            except ValueError as error:
                raise InputError(f"{path} is refused: {error}") from None
            records = {name.partition("/")[2]: name for name in archive.namelist()}
            if "data.pkl" not in records:
                raise InputError(f"{path} is no PyTorch checkpoint: it holds no data.pkl")
            if "byteorder" in records and archive.read(records["byteorder"]).strip() != b"little":
                raise InputError(f"{path} was written on a big-endian machine: save it again on a little-endian one")
            unpickler = _Unpickler(io.BytesIO(archive.read(records["data.pkl"])), archive, records, path)
            return unpickler.load()
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path} is not a whole PyTorch checkpoint ({error}): it is cut short, or older than PyTorch 1.6 (then load "
            "and save it again with a newer one)"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a pickle can fail in any way
        raise InputError(
            f"{path} is damaged: its pickle cannot be read ({type(error).__name__}: {str(error)[:200]})"
        ) from error


class _Unpickler(pickle.Unpickler):
    """A reader whose names are a closed list."""

    def __init__(self, data: io.BytesIO, archive: zipfile.ZipFile, records: dict[str, str], path: pathlib.Path):
        super().__init__(data)
        self._archive, self._records, self._path = archive, records, path
        self._storages: dict[str, np.ndarray] = {}
        self._left = SHARED * path.stat().st_size + SMALL

    def find_class(self, module: str, name: str) -> Any:
        """Returns our stand-in for a name. Raises: InputError: it is not on the list."""
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        known = {
            ("collections", "OrderedDict"): _Dict,
            ("yacs.config", "CfgNode"): _Dict,
            ("__builtin__", "set"): set,
            ("builtins", "set"): set,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch", "Size"): tuple,
        }
        if (module, name) not in known:
            raise InputError(
                f"{self._path} is refused: its pickle asks for '{module}.{name}', which weights do not need and which "
                "could run code; nothing of it has been run. Have it saved as plain state dicts or as safetensors"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Returns a storage as a flat array. Raises: InputError: it is missing or has another size."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise InputError(f"{self._path} is damaged: unknown record {format_value(pid)}")
        if key not in self._storages:
            record = self._records.get(f"data/{key}")
            if record is None:
                raise InputError(f"{self._path} is damaged: storage {key} is missing")
            content = self._archive.read(record)
            if len(content) != count * dtype.itemsize:
                raise InputError(f"{self._path} is damaged: storage {key} has {len(content)} bytes, not {count} values")
            self._storages[key] = np.frombuffer(content, dtype)
        return self._storages[key]

    def _tensor(self, storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
        """Returns the tensor of a storage. Raises: ValueError: it would reach past it; InputError: it fills the memory."""
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if min(size, default=0) < 0 or (
            count and not (offset >= 0 and min(stride, default=0) >= 0 and last < len(storage))
        ):
            raise ValueError(f"a tensor of {tuple(size)} reaches past its storage")
        if not count:
            return np.zeros(size, storage.dtype)
        self._left -= count * storage.itemsize
        if self._left < 0:
            raise InputError(
                f"{self._path} is refused: its tensors take more than {SHARED} times what the file does; one of "
                f"{tuple(size)} shows {len(storage)} values over and over: save it as it is (tensor.clone())"
            )
        strides = tuple(step * storage.itemsize for step in stride)
        return np.array(np.lib.stride_tricks.as_strided(storage[offset:], size, strides))


class _Dict(dict):
    """A dict that keeps the attributes a pickle gives it (`yacs` flags, a state dict's metadata) to itself."""

    def __setstate__(self, state: Any) -> None:
        """Drops them."""


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data
