"""Preparation of a data set for many hosts: tokens of text, or image files, in shards with an index (`data.shards`).

Each split is read once, in order. Text is tokenized by worker processes, whose results are written in the order of the text,
so that the shards hold the tokens that a run would make itself. A preparation that is killed continues after its last
finished shard.
"""

import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tqdm

from seqpe_jax.checksums import md5_of
from seqpe_jax.data import image_records, registry, shards
from seqpe_jax.data.cache import local_copies, locked
from seqpe_jax.data.datasets import base
from seqpe_jax.data.datasets.image_base import ImageSource
from seqpe_jax.data.datasets.text_base import TextBuilder
from seqpe_jax.data.images import image_source
from seqpe_jax.data.paths import warn
from seqpe_jax.data.token_encoder import (
    BatchEncoder,
    EncodedBatch,
    Records,
    Totals,
    encode_in_process,
    start_process,
)
from seqpe_jax.data.tokenizers import RoundTripLoss, Tokenizer, load_tokenizer, token_dtype
from seqpe_jax.data.tokens import batches_of_records, split_summary, token_hash
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_file, cache_root, is_remote, tmp_dir

TOKENS_SUFFIX = ".tokens"
SHARD_BYTES = 10**9
BATCHES_PER_PROCESS = 2  # of text that wait for a process or are with it

Counts = dict[str, int]  # tokens or images of each split
Item, Result = TypeVar("Item"), TypeVar("Result")


def prepare(
    data: Any,
    output: str | os.PathLike,
    *,
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
    progress: bool = True,
) -> Counts:
    """Prepares the data set of a config.

    Args:
      data: `data` section of the config.
      output: new folder, or one of the same preparation, which continues; local or in a bucket.
      shard_bytes: size of a shard in bytes.
      processes: number of processes that tokenize, or of threads that read images; 1 = this one.
      progress: show progress bars and warnings on stderr.

    Raises:
      InputError: data that need no preparation, nothing to read, or an output folder with other content.
    """
    kind = registry.get(data.name).kind
    if data.prepared:
        raise InputError(f"data.prepared='{data.prepared}' is read by runs, not by their preparation: leave it out")
    if data.mixture:
        raise InputError(
            "data.mixture is prepared one source at a time: run this with --config.data.paths of each, and name the folder as its "
            "'prepared'"
        )
    shared = {"paths": data.paths, "cache_dir": data.cache_dir, "shard_bytes": shard_bytes, "processes": processes}
    if kind == registry.DATA_TEXT:
        settings = {"tokenizer": data.tokenizer, "accept_lossy": data.lossy_tokenizer}
        settings["options"] = registry.get(data.name).options_of(data)
        return prepare_text(output, data.name, **shared, **settings, progress=progress)
    if kind == registry.DATA_IMAGE:
        limits = {"bit_depth": data.bit_depth, "max_pixels": data.max_pixels}
        return prepare_images(output, data.name, **shared, **limits, progress=progress)
    raise InputError(
        f"data.name='{data.name}' has questions, which need no preparation: each host indexes them once; text and images "
        "are prepared"
    )


def prepare_text(
    output: str | os.PathLike,
    name: str,
    *,
    paths: Sequence[str] = (),
    tokenizer: str | os.PathLike,
    cache_dir: str | os.PathLike = "",
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
    accept_lossy: bool = False,
    options: base.Options = (),
    progress: bool = True,
) -> Counts:
    """Tokenizes all splits of a text data set into shards.

    Args:
      output: new folder, or one of the same preparation, which continues; local or in a bucket.
      name: a text data set of `data.registry`.
      paths: `data.paths`.
      tokenizer: `data.tokenizer`; a copy is written.
      cache_dir: folder of downloads; "" = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      shard_bytes: size of a shard in bytes.
      processes: number of processes that tokenize; 1 = this one.
      accept_lossy: accept a tokenizer that does not give the text back.
      options: `registry.Dataset.options_of` the `data` section.
      progress: show progress bars and warnings on stderr.

    Returns:
      The number of tokens of each split.

    Raises:
      InputError: nothing to read, not UTF-8, a tokenizer that loses text, or an output folder with other content.
    """
    builder = registry.load_builder(name, registry.DATA_TEXT)
    registry.get(name).check_paths(tuple(paths))
    found, folder = load_tokenizer(tokenizer), as_path(output)
    paths = local_copies(list(paths), cache_dir, progress)
    plan = {
        "format": shards.FORMAT,
        "data": name,
        "source": builder.source_key(paths, options),
        "tokenizer": found.fingerprint,
        "tokenizer_name": found.name,
        "shard_bytes": shard_bytes,
    }
    with _alone(folder):
        shards.begin(folder, plan)
        found.save(folder)
        with tmp_dir() as unused, _encoders(found, tokenizer, processes, accept_lossy) as encode_all:
            data: TextBuilder = builder(
                paths=paths, options=options, downloads=cache_root(cache_dir) / "downloads", data_dir=unused
            )
            splits = {}
            for split, contents in data.contents().items():
                records = (record for content in contents for record in data.examples(content))
                title = f"{name}/{split}" if progress else ""
                summary = _write_tokens(folder, split, records, found, encode_all, shard_bytes, title)
                if summary["shards"]:
                    splits[split] = summary
        if not splits:
            raise InputError(f"data set '{name}' is empty: no texts in {', '.join(paths) or 'its files'}")
        shards.write_index(folder, plan | {"paths": list(paths), "splits": splits})
    return {split: summary["tokens"] for split, summary in splits.items()}


@contextlib.contextmanager
def _alone(folder: AnyPath) -> Iterator[None]:
    """Holds the lock of an output folder on a disk, after another process that prepares there. A bucket has no locks."""
    if is_remote(folder):
        yield
    else:
        with locked(pathlib.Path(folder).absolute()):
            yield


# --- Text: worker processes


EncodeAll = Callable[[Iterable[tuple[Records, bytes | None]]], Iterator[EncodedBatch]]


@contextlib.contextmanager
def _encoders(tokenizer: Tokenizer, path: str | os.PathLike, processes: int, accept_lossy: bool) -> Iterator[EncodeAll]:
    """Yields a function that encodes batches and yields the results in their order, with some processes."""
    if processes == 1:
        yield functools.partial(map, BatchEncoder(tokenizer, accept_lossy))
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),  # threads of other libraries do not survive a fork
        start_process,
    )
    encode = functools.partial(
        encode_in_process,
        tokenizer=os.fspath(path),
        fingerprint=tokenizer.fingerprint,
        accept_lossy=accept_lossy,
    )
    try:
        yield functools.partial(_map_ahead, pool, encode, ahead=BATCHES_PER_PROCESS * processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _map_ahead(
    pool: concurrent.futures.Executor, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[Result]:
    """Yields function(item) of each item in order; at most `ahead` items are read before their result is taken."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# --- Text: shards


class _TokenWriter:
    """Writes the tokens of a split into shards, after those that are finished already.

    Args:
      folder: folder of the data set.
      split: name of the split.
      tokenizer: tokenizer of the text.
      shard_bytes: size of a shard in bytes.

    Attributes:
      records: number of records of the text that are in shards.
      totals: their counts.
      summary: facts of the complete split; None = it is not complete.
    """

    def __init__(self, folder: AnyPath, split: str, tokenizer: Tokenizer, shard_bytes: int):
        self.records, self.totals, self.summary = 0, Totals(), None
        self._loss, self._digest, self._dtype = (
            RoundTripLoss(),
            token_hash(tokenizer),
            token_dtype(tokenizer.vocab_size),
        )
        self._folder, self._log = folder, shards.ShardLog(folder, split, TOKENS_SUFFIX)
        self._shard_tokens = max(1, shard_bytes // self._dtype.itemsize)
        self._skip = 0  # tokens of the next batch that are in shards
        self._shard: _OpenShard | None = None
        found = list(self._log.finished())
        if found:
            self._restore(found[-1][1])
        if self.summary is None:
            for shard, _ in found:
                for block in shards.blocks(folder / shard.file, shard.size):
                    self._digest.update(block)

    def _state(self, skip: int) -> dict[str, Any]:
        return {
            "records": self.records,
            "skip": skip,
            "totals": self.totals.to_json(),
            "loss": dataclasses.asdict(self._loss),
            "summary": self.summary,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.totals = Totals.from_json(state["totals"])
        self._loss, self.summary = RoundTripLoss(**state["loss"]), state["summary"]
        self.records, self._skip = state["records"], state["skip"]

    def add(self, batch: "EncodedBatch") -> None:
        """Appends the tokens of the next batch of records."""
        start, self._skip = self._skip, 0
        while start < len(batch.ids):
            if self._shard is not None and self._shard.count == self._shard_tokens:
                self._finish_shard(self._state(start))
            if self._shard is None:
                self._shard = _OpenShard(self._folder / self._log.next_file())
            part = batch.ids[start : start + self._shard_tokens - self._shard.count]
            self._shard.write(part.data, len(part))
            self._digest.update(part.data)
            start += len(part)
        self.records += batch.records
        self.totals.add(batch.totals)
        lost, checked = (
            self._loss.lost_bytes + batch.loss.lost_bytes,
            self._loss.checked_bytes + batch.loss.checked_bytes,
        )
        self._loss = RoundTripLoss(lost, checked, self._loss.examples or batch.loss.examples)

    def complete(self) -> None:
        """Writes the last shard, with the facts of the split."""
        self.summary = split_summary(self.totals, self._dtype, self._digest, self._loss)
        if self._shard is not None:
            self._finish_shard(self._state(0))

    def close(self) -> None:
        """Removes an unfinished shard."""
        if self._shard is not None:
            self._shard.discard()

    def index_entry(self) -> dict[str, Any]:
        """Returns the part of the index on a complete split."""
        return self.summary | {"shards": [dataclasses.asdict(shard) for shard in self._log.shards]}

    def _finish_shard(self, state: dict[str, Any]) -> None:
        shard, self._shard = self._shard, None
        checksum = shard.publish()
        self._log.add(shard.count, checksum, state)


class _OpenShard:
    """A shard that is being written; it appears under its name when it is published.

    Args:
      path: its final path, local or in a bucket.

    Attributes:
      count: number of tokens or images written.
    """

    def __init__(self, path: AnyPath):
        self.count = 0
        self._context = atomic_file(path)
        self._file = self._context.__enter__().open("wb")
        self._md5 = hashlib.md5(usedforsecurity=False)

    def write(self, content: Any, count: int) -> None:
        """Appends bytes that hold `count` tokens."""
        self._file.write(content)
        self._md5.update(content)
        self.count += count

    def publish(self) -> str:
        """Puts the shard under its name; returns the MD5 of its content in base64."""
        self._file.close()
        self._context.__exit__(None, None, None)
        return base64.b64encode(self._md5.digest()).decode()

    def discard(self) -> None:
        """Removes the shard."""
        self._file.close()
        reason = InterruptedError()
        self._context.__exit__(type(reason), reason, None)


def _write_tokens(
    folder: AnyPath,
    split: str,
    records: Iterator[Mapping[str, bytes]],
    tokenizer: Tokenizer,
    encode_all: EncodeAll,
    shard_bytes: int,
    title: str,
) -> dict[str, Any]:
    """Writes the tokens of a split, after the shards that are finished already; returns its part of the index."""
    writer, previous = _TokenWriter(folder, split, tokenizer, shard_bytes), None
    if writer.summary is not None:
        return writer.index_entry()
    for record in itertools.islice(records, writer.records):
        previous = record["name"]
    bar = tqdm.tqdm(desc=f"tokenize {title}", unit="B", unit_scale=True, delay=2.0, disable=not title)
    with bar, contextlib.closing(writer):
        bar.update(writer.totals.bytes)
        for batch in encode_all(_with_previous(batches_of_records(records), previous)):
            writer.add(batch)
            bar.update(batch.totals.bytes)
        writer.complete()
    return writer.index_entry()


def _with_previous(batches: Iterable[Records], previous: bytes | None) -> Iterator[tuple[Records, bytes | None]]:
    """Yields each batch with the name of the record before it."""
    for batch in batches:
        yield batch, previous
        previous = batch[-1]["name"]


# --- Images


def prepare_images(
    output: str | os.PathLike,
    name: str,
    *,
    paths: Sequence[str] = (),
    bit_depth: int = 0,
    max_pixels: int = 0,
    cache_dir: str | os.PathLike = "",
    shard_bytes: int = SHARD_BYTES,
    processes: int = 1,
    progress: bool = True,
) -> Counts:
    """Writes the image files of all splits, as they are, with their labels into ArrayRecord shards.

    Args:
      output: new folder, or one of the same preparation, which continues; local or in a bucket.
      name: a data set of image files of `data.registry`.
      paths: `data.paths`.
      bit_depth: `data.bit_depth`.
      max_pixels: `data.max_pixels`.
      cache_dir: "" = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      shard_bytes: size of a shard in bytes.
      processes: number of threads that read files.
      progress: show progress bars and warnings on stderr.

    Returns:
      The number of images of each split.

    Raises:
      InputError: no training images, a damaged file, a data set that has no files, or an output folder with other content.
    """
    folder, sources = as_path(output), _image_splits(name, paths, bit_depth, max_pixels, cache_dir, progress)
    prints = {split: source.fingerprint for split, source in sources.items()}
    plan = {"format": shards.FORMAT, "data": name, "source": prints, "bit_depth": bit_depth, "shard_bytes": shard_bytes}
    splits: dict[str, dict[str, Any]] = {}
    with _alone(folder), concurrent.futures.ThreadPoolExecutor(processes) as pool:
        shards.begin(folder, plan)
        for split, source in sources.items():
            same = next((other for other in splits if prints[other] == prints[split]), None)
            if same is not None:  # the official validation photos serve as both held-out splits
                splits[split] = splits[same]
                continue
            read_all = functools.partial(_map_ahead, pool, ahead=BATCHES_PER_PROCESS * processes)
            written = _write_images(folder, split, source, read_all, shard_bytes, f"{name}/{split}" if progress else "")
            splits[split] = {
                "images": len(source),
                "fingerprint": source.fingerprint,
                "class_names": list(source.class_names),
                "channels": source.channels,
                "mean": list(source.mean),
                "std": list(source.std),
                "images_by_class": list(source.images_by_class),
                "shards": [dataclasses.asdict(shard) for shard in written],
            }
        shards.write_index(folder, plan | {"paths": list(paths), "splits": splits})
    return {split: facts["images"] for split, facts in splits.items()}


def _image_splits(
    name: str, paths: Sequence[str], bit_depth: int, max_pixels: int, cache_dir: str | os.PathLike, progress: bool
) -> dict[str, ImageSource]:
    """Returns the splits that the data have. Raises: InputError: no training split, or images that are no files."""
    registry.get(name).check_prepared()
    sources = {}
    for split in base.SPLITS:
        try:
            source = image_source(
                name,
                split=split,
                paths=paths,
                cache_dir=cache_dir,
                progress=progress,
                bit_depth=bit_depth,
                max_pixels=max_pixels,
            )
        except InputError as error:
            if split == "train":
                raise
            if progress:
                warn(f"split '{split}' is left out: {error}")
            continue
        sources[split] = source
    return sources


def _write_images(
    folder: AnyPath,
    split: str,
    source: ImageSource,
    read_all: Callable[[Callable[[int], bytes], Iterable[int]], Iterator[bytes]],
    shard_bytes: int,
    title: str,
) -> list[shards.Shard]:
    """Writes the images of a split, after the shards that are finished already; returns its shards."""
    log, first = shards.ShardLog(folder, split, image_records.SUFFIX), 0
    for _, state in log.finished():
        first = state["next"]
    bar = tqdm.tqdm(desc=f"prepare {title}", total=len(source), unit=" images", delay=2.0, disable=not title)
    with bar:
        bar.update(first)
        records = read_all(functools.partial(image_records.encode, source), range(first, len(source)))
        for record in records:
            count, checksum = _write_image_shard(
                folder / log.next_file(), itertools.chain([record], records), shard_bytes, bar
            )
            first += count
            log.add(count, checksum, {"next": first})
    return log.shards


def _write_image_shard(path: AnyPath, records: Iterator[bytes], shard_bytes: int, bar: tqdm.tqdm) -> tuple[int, str]:
    """Writes records up to the size of a shard; returns their number, and the MD5 of the shard in base64."""
    count = size = 0
    with atomic_file(path) as part:
        with contextlib.closing(image_records.open_writer(part)) as writer:
            for record in records:
                writer.write(record)
                count, size = count + 1, size + len(record)
                bar.update()
                if size >= shard_bytes:
                    break
        checksum = md5_of(part)
    return count, checksum
