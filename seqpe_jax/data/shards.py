"""Prepared data: numbered shards on a disk or in a bucket with an index, of which hosts read the byte ranges they need.

    FOLDER/index.json             written last: facts and shards of each split
    FOLDER/plan.json              written first: what is prepared, so that another preparation does not mix with it
    FOLDER/train/00000.tokens     a shard, and 00000.json, its size and checksum and where the next one begins

`data.prepare` writes such folders (`python -m seqpe_jax.prepare`), `data.tokens` and `data.images` read them
(`data.prepared`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from seqpe_jax.checksums import md5_of
from seqpe_jax.errors import Failure, InputError
from seqpe_jax.files import AnyPath, as_path, atomic_write, is_remote, list_files, parse_json, read_range

INDEX_FILE = "index.json"
PLAN_FILE = "plan.json"
FORMAT = 1  # of the folder
BLOCK_BYTES = 8 << 20  # of a shard that are read at once to compare it with its checksum
COMMAND = "python -m seqpe_jax.prepare"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
      file: path in the folder.
      count: number of tokens or images.
      size: size in bytes.
      checksum: MD5 in base64, as buckets store it.
    """

    file: str
    count: int
    size: int
    checksum: str


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """A split of a prepared data set.

    Attributes:
      folder: folder of the data set.
      facts: values of the split and its data set, by name.
      shards: shards in order.
    """

    folder: AnyPath
    facts: Mapping[str, Any]
    shards: tuple[Shard, ...]


# --- The index


def write_index(folder: AnyPath, content: Mapping[str, Any]) -> None:
    """Writes the index, with its own checksum; before that nobody reads the folder."""
    atomic_write(folder / INDEX_FILE, json.dumps(content | {"checksum": _digest(content)}, indent=1) + "\n")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_prepared(path: str | os.PathLike, name: str, split: str) -> PreparedSplit:
    """Returns a split of a prepared folder; reads the index and the sizes of the shards, no shard.

    Args:
      path: `data.prepared`.
      name: data set that it must hold, `data.name`.
      split: "train", "validation" or "test".

    Raises:
      InputError: no finished folder, a damaged index, another data set, no such split, or a missing or cut shard.
    """
    folder = as_path(path)
    index = _read_index(folder)
    if index["data"] != name:
        raise InputError(
            f"data.prepared='{folder}' holds '{index['data']}', but data.name='{name}': set one as the other"
        )
    if split not in index["splits"]:
        raise InputError(
            f"data.prepared='{folder}' has no split '{split}' (it has {', '.join(index['splits'])}): prepare data that do"
        )
    facts = dict(index["splits"][split])
    shards = tuple(Shard(**shard) for shard in facts.pop("shards"))
    _check_sizes(folder, shards)
    return PreparedSplit(folder, {name: value for name, value in index.items() if name != "splits"} | facts, shards)


def _read_index(folder: AnyPath) -> dict[str, Any]:
    """Returns the content of the index. Raises: InputError: there is none, or it is damaged."""
    try:
        content = parse_json((folder / INDEX_FILE).read_bytes())
        stated = content.pop("checksum")
        if stated != _digest(content):
            raise ValueError("its checksum is another")
        if content["format"] != FORMAT:
            raise InputError(
                f"data.prepared='{folder}' has format {content['format']}, this version reads {FORMAT}: prepare it again"
            )
        return content
    except (FileNotFoundError, NotADirectoryError):
        fix = f"give the folder that `{COMMAND}` has written"
        if (folder / PLAN_FILE).exists():
            fix = f"its preparation has not finished; run `{COMMAND}` again, which continues it"
        raise InputError(f"data.prepared='{folder}' has no {INDEX_FILE}: {fix}") from None
    except OSError as error:
        raise InputError(f"data.prepared='{folder}' cannot be read ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"'{folder / INDEX_FILE}' is damaged ({error}): run `{COMMAND}` again with the same --output, which keeps the "
            "shards and writes a new one"
        ) from error


def _check_sizes(folder: AnyPath, shards: Sequence[Shard]) -> None:
    """Refuses a split with a missing or cut shard. Raises: InputError: names the first one."""
    parents = {shard.file.rpartition("/")[0] for shard in shards}  # one; that of another split of the same images
    sizes = {f"{parent}/{name}": size for parent in parents for name, size in file_sizes(folder / parent).items()}
    for shard in shards:
        size = sizes.get(shard.file)
        if size != shard.size:
            wrong = "is missing" if size is None else f"has {size:,} of {shard.size:,} bytes"
            raise InputError(
                f"data.prepared: shard '{folder / shard.file}' {wrong}: run `{COMMAND}` again with the same --output, which "
                "writes damaged and missing shards anew"
            )


def file_sizes(folder: AnyPath) -> dict[str, int]:
    """Returns the bytes of each file in a folder, by name; in a bucket with one request."""
    if is_remote(folder):
        try:
            return {name: size for name, size, _ in folder.file_versions()}
        except FileNotFoundError:
            return {}
    if not folder.is_dir():
        return {}
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}


# --- Reading


class ShardReader:
    """Byte ranges of shards: memory-mapped on a disk, requested one by one in a bucket. Threads may share it.

    Args:
      split: a split.
    """

    def __init__(self, split: PreparedSplit):
        self._files = [split.folder / shard.file for shard in split.shards]
        self._maps: dict[int, np.memmap] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Returns bytes of a shard.

        Args:
          shard: index of the shard.
          start: offset of the first byte.
          stop: offset of the byte after the last one.

        Returns:
          uint8[stop - start].

        Raises:
          StoreError: the bucket does not answer.
        """
        file = self._files[shard]
        if is_remote(file):
            return np.frombuffer(read_range(file, start, stop), np.uint8)
        with self._lock:
            if shard not in self._maps:
                self._maps[shard] = np.memmap(file, np.uint8, "r")
        return self._maps[shard][start:stop]


class TokenShards:
    """The tokens of a split as one array, of which slices are read: `tokens[start:stop]` -> ids[stop - start].

    Args:
      split: a split of text.
      in_memory: read all of it at the first slice, as for a held-out split in a bucket, of which windows of several
        lengths are read in order.

    Attributes:
      dtype: uint8, uint16 or uint32.
      size: number of tokens.
    """

    def __init__(self, split: PreparedSplit, in_memory: bool = False):
        self.dtype = np.dtype(split.facts["dtype"])
        self._in_memory = in_memory
        self._ends = np.cumsum([shard.count for shard in split.shards])
        self.size = int(self._ends[-1])
        self._reader = ShardReader(split)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(self.size)
        if step != 1:
            raise ValueError(f"tokens are read without gaps, got a step of {step}")
        return self._all[start:stop] if self._in_memory else self._read(start, stop)

    @functools.cached_property
    def _all(self) -> np.ndarray:
        return self._read(0, self.size)

    def _read(self, start: int, stop: int) -> np.ndarray:
        parts = []
        while start < stop:
            shard = int(np.searchsorted(self._ends, start, side="right"))
            first = int(self._ends[shard - 1]) if shard else 0
            end = min(stop, int(self._ends[shard]))
            width = self.dtype.itemsize
            parts.append(self._reader.read(shard, (start - first) * width, (end - first) * width).view(self.dtype))
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self.dtype)])


# --- Writing


def begin(folder: AnyPath, plan: Mapping[str, Any]) -> None:
    """Writes the plan of a preparation, or continues one of the same plan.

    Raises:
      InputError: the folder holds something else; names the first difference.
    """
    content = json.loads(json.dumps(plan))
    if (folder / PLAN_FILE).exists():
        try:
            known = dict(parse_json((folder / PLAN_FILE).read_bytes()))
        except (ValueError, TypeError):
            raise InputError(
                f"--output: '{folder / PLAN_FILE}' is damaged: remove the folder, or choose another"
            ) from None
        for name, value in content.items():
            if known.get(name) != value:
                raise InputError(
                    f"--output={folder} holds shards with {name}={known.get(name)}, not {value}: choose another folder, or "
                    "remove that one"
                )
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--output={folder} is not empty and has no {PLAN_FILE}: choose a new or empty folder")
    atomic_write(folder / PLAN_FILE, json.dumps(content, indent=1) + "\n")


class ShardLog:
    """The shards of a split that are finished: each has a file of its own, written after the shard.

    Args:
      folder: folder of the data set.
      split: name of the split.
      suffix: ending of the shards' names.
    """

    def __init__(self, folder: AnyPath, split: str, suffix: str):
        self._folder, self._split, self._suffix = folder, split, suffix
        self.shards: list[Shard] = []

    def next_file(self) -> str:
        """Returns the path in the folder of the next shard."""
        return f"{self._split}/{len(self.shards):05d}{self._suffix}"

    def add(self, count: int, checksum: str, state: Any) -> None:
        """Records that the next shard is written.

        Args:
          count: number of tokens or images in it.
          checksum: MD5 of what was written, in base64.
          state: where the one after it begins, for `finished`; JSON.

        Raises:
          Failure: a bucket holds something else than what was written.
        """
        file = self.next_file()
        path = self._folder / file
        if is_remote(path) and md5_of(path) != checksum:
            raise Failure(f"{path} is not what was written there: run the command again, which continues before it")
        shard = Shard(file, count, _size_of(path), checksum)
        content = {"shard": dataclasses.asdict(shard), "state": state}
        atomic_write(self._record(file), json.dumps(content | {"checksum": _digest(content)}) + "\n")
        self.shards.append(shard)

    def finished(self) -> Iterator[tuple[Shard, Any]]:
        """Yields each finished shard and its state, in order, as far as sizes and checksums are right; removes others.

        Shards that it yields count as finished; a caller who stops early drops the rest.
        """
        self._remove_parts()
        while (found := self._read(self.next_file())) is not None:
            self.shards.append(found[0])
            yield found
        for file in file_sizes(self._folder / self._split):
            if file.partition(".")[0] >= f"{len(self.shards):05d}":
                (self._folder / self._split / file).unlink(missing_ok=True)

    def _record(self, file: str) -> AnyPath:
        return self._folder / f"{file.removesuffix(self._suffix)}.json"

    def _read(self, file: str) -> tuple[Shard, Any] | None:
        """Returns a shard and its state; None where it is missing or damaged."""
        path = self._folder / file
        try:
            content = dict(parse_json(self._record(file).read_bytes()))
            if content.pop("checksum") != _digest(content):
                return None
            shard, state = Shard(**content["shard"]), content["state"]
            return (shard, state) if _size_of(path) == shard.size and md5_of(path) == shard.checksum else None
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
            return None

    def _remove_parts(self) -> None:
        """Removes what killed processes left unfinished on a disk."""
        folder = self._folder / self._split
        if not is_remote(folder) and folder.is_dir():
            for file in list_files(folder):
                if file.name.startswith(".") and file.name.endswith(".part"):
                    with contextlib.suppress(FileNotFoundError):
                        file.unlink()


def _size_of(path: AnyPath) -> int:
    return path.info()["size"] if is_remote(path) else path.stat().st_size


def blocks(path: AnyPath, size: int) -> Iterator[bytes]:
    """Yields the content of a file of `size` bytes, `BLOCK_BYTES` at a time."""
    for start in range(0, size, BLOCK_BYTES):
        yield bytes(read_range(path, start, min(size, start + BLOCK_BYTES)))
