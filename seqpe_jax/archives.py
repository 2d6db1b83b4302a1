"""NumPy's .npz archives from untrusted sources, with a limit on the memory that they may take."""

import io
import os
import zipfile

import numpy as np

MAX_UNPACKED_BYTES = 4 << 30


def check_unpacked_size(archive: zipfile.ZipFile, max_bytes: int, hint: str) -> None:
    """Refuses an archive whose members would fill the memory.

    Args:
      archive: opened for reading; `zipfile` reads no more of a member than its directory says.
      max_bytes: maximum bytes of all members.
      hint: fix for the user, for the message.

    Raises:
      ValueError: names both sizes.
    """
    size = sum(member.file_size for member in archive.infolist())
    if size > max_bytes:
        raise ValueError(
            f"its members unpack to {size / 2**20:,.0f} MiB, and at most {max_bytes / 2**20:,.0f} fit: {hint}"
        )


def load_npz(file: str | os.PathLike | io.BytesIO, max_bytes: int = MAX_UNPACKED_BYTES) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz; Python objects are refused.

    Args:
      file: path or content.
      max_bytes: maximum bytes of all arrays.

    Raises:
      ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error: it is no such archive, cut short, too large,
        or an array has fewer bytes than its header says.
    """
    with zipfile.ZipFile(file) as archive:
        check_unpacked_size(archive, max_bytes, "write it anew in parts")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except MemoryError as error:  # NumPy allocates what a header says before it reads
        raise ValueError(f"an array is larger than its content ({error})") from error
