"""Zip archives of arrays from anywhere: what they claim to hold is compared with what they are before memory is given."""

import io
import math
import os
import zipfile
from typing import Any

import numpy as np

LARGEST = 4 << 30  # bytes that an archive of arrays may unpack to


def check_claims(archive: zipfile.ZipFile, most: int, cure: str) -> None:
    """Refuses an archive whose members would fill the memory.

    Args:
      most: bytes of all members together; cure: what to do about it, for the message.

    Raises:
      ValueError: names both sizes.
    """
    claimed = sum(member.file_size for member in archive.infolist())
    if claimed > most:
        raise ValueError(
            f"its members unpack to {claimed / 2**20:,.0f} MiB, and at most {most / 2**20:,.0f} fit: {cure}"
        )


def read_arrays(file: str | os.PathLike | io.BytesIO, most: int = LARGEST) -> dict[str, np.ndarray]:
    """Returns the arrays of an `.npz`; nothing of Python's own objects is read.

    Args:
      most: bytes that all of them may take.

    Raises:
      ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error: no such archive, cut short, or one that
        claims more than it holds.
    """
    with zipfile.ZipFile(file) as archive:
        check_claims(archive, most, "write it anew in parts")
        for member in archive.infolist():
            with archive.open(member) as content:
                shape, dtype = _header(content)
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{member.filename} claims to be {dtype}{list(shape)}, which it does not hold")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _header(content: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, as its file begins."""
    version = np.lib.format.read_magic(content)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its arrays are of version {version}")
    shape, _, dtype = read(content)
    return shape, dtype
