"""Tokens of text: a split as one long array of token ids, tokenized once into the cache, or read from prepared shards."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from seqpe_jax.data import registry, shards
from seqpe_jax.data.cache import load_or_build, local_copies
from seqpe_jax.data.datasets import base
from seqpe_jax.data.paths import MAX_NAMES_SHOWN, warn
from seqpe_jax.data.shards import TokenShards
from seqpe_jax.data.token_encoder import COUNTS, ROUND_TRIP_RECORDS, RecordEncoder, Totals
from seqpe_jax.data.tokenizers import RoundTrip, RoundTripLoss, Tokenizer, check_round_trip
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, cache_root, is_remote, parse_json

CACHE_FORMAT = 1  # of the two files; caches of another format are not read
TOKENS_FILE = "tokens.bin"
SUMMARY_FILE = "summary.json"
BATCH_BYTES = 8 << 20  # text that is tokenized in one call
MAX_BYTES_PER_HOST = 10**9  # of text that a run on several hosts tokenizes, once on each; minutes of work
MAX_BYTES_IN_MEMORY = 1 << 28  # of the tokens of a held-out split in a bucket that are read at once


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """A tokenized split.

    Attributes:
      tokens: uint8, uint16 or uint32[num_tokens], memory-mapped or of shards, which read slices; documents in order, the
        EOS token of the tokenizer between them if it has one.
      bytes: number of UTF-8 bytes of the text.
      words: number of whitespace-separated words of the text.
      documents: number of documents.
      fingerprint: hex digits, equal for equal tokens on every machine.
      round_trip_loss: text that decoding does not give back, from a sample; zero in caches of versions that did not
        check.
      special_token_counts: occurrences of special tokens spelled out in the text; empty in caches of versions that did
        not count them.
    """

    tokens: "np.ndarray | TokenShards | JoinedTokens"
    bytes: int
    words: int
    documents: int
    fingerprint: str
    round_trip_loss: RoundTripLoss = RoundTripLoss()
    special_token_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


class JoinedTokens:
    """The tokens of several sources as one array, of which slices are read."""

    def __init__(self, parts: Sequence[np.ndarray | TokenShards]):
        self._parts, self._ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: slice) -> np.ndarray:
        first, last, _ = index.indices(len(self))
        found = []
        for part, end in zip(self._parts, self._ends.tolist(), strict=True):
            start = end - len(part)
            if first < end and start < last:
                found.append(np.asarray(part[max(first - start, 0) : min(last, end) - start]))
        return np.concatenate([*found, np.empty(0, np.uint8)])


def joined_source(sources: Mapping[str, TokenSource]) -> TokenSource:
    """Returns the tokens of several sources one after another, with the sums of their counts."""
    named = sorted(sources.items())
    losses = [source.round_trip_loss for _, source in named]
    prints = json.dumps([(name, source.fingerprint) for name, source in named])
    return TokenSource(
        tokens=JoinedTokens([source.tokens for _, source in named]),
        bytes=sum(source.bytes for _, source in named),
        words=sum(source.words for _, source in named),
        documents=sum(source.documents for _, source in named),
        fingerprint=hashlib.sha256(prints.encode()).hexdigest()[:32],
        round_trip_loss=RoundTripLoss(
            sum(loss.lost_bytes for loss in losses),
            sum(loss.checked_bytes for loss in losses),
            next((loss.examples for loss in losses if loss.examples), ""),
        ),
    )


def token_source(
    name: str,
    *,
    split: str,
    tokenizer: Tokenizer,
    paths: Sequence[str] = (),
    data_dir: str | os.PathLike = "",
    cache_dir: str | os.PathLike = "",
    progress: bool = True,
    accept_lossy: bool = False,
    prepared: str | os.PathLike = "",
    max_bytes: int | None = None,
    options: base.Options = (),
) -> TokenSource:
    """Returns the tokens of a split, after preparing and tokenizing the data set if the cache lacks it.

    Several processes may call it at once; a killed one leaves nothing that is read later.

    Args:
      name: a text data set of `data.registry`.
      split: "train", "validation" or "test".
      tokenizer: see `load_tokenizer`.
      paths: `data.paths`.
      data_dir: folder of prepared data sets; "" = CACHE_DIR/datasets.
      cache_dir: folder of tokens; "" = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      progress: show progress bars and warnings on stderr.
      accept_lossy: accept a tokenizer that does not give the text back.
      prepared: folder of tokens that `data.prepare` wrote, which are read in place of `paths`; "" = none.
      max_bytes: bytes of text that may be tokenized, which a run on several hosts limits; None = any number.
      options: `registry.Dataset.options_of` the `data` section.

    Raises:
      InputError: unknown name or split, nothing to read, not UTF-8, an empty split, a folder that is not writable, a
        tokenizer that loses text; more text than `max_bytes`; a prepared folder that is incomplete or holds other data.
    """
    if isinstance(paths, str):
        paths = (paths,)
    builder = registry.load_builder(name, registry.DATA_TEXT)
    registry.get(name).check_paths(paths)
    base.check_split(split)
    if prepared:
        source = _prepared_source(prepared, name, split, tokenizer)
        check_round_trip(source.round_trip_loss, tokenizer, accept_lossy)
        return source
    paths = [os.fspath(path) for path in paths]
    _check_text_size(_remote_bytes(paths), max_bytes)
    paths = local_copies(paths, cache_dir, progress)
    root = cache_root(cache_dir)
    data_key = builder.source_key(paths, options)
    if progress:
        _warn_skipped(builder, paths)

    def build(folder: pathlib.Path) -> None:
        _check_text_size(builder.input_bytes(paths), max_bytes)
        records = base.prepared_split(builder, split, data_key, paths, data_dir, cache_dir, progress, options)
        _tokenize(records, tokenizer, folder, f"{name}/{split}", progress, accept_lossy)

    identity = json.dumps([CACHE_FORMAT, data_key, split, tokenizer.fingerprint])
    target = root / "tokens" / f"{name}-{split}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    source = load_or_build(target, _load, build)
    check_round_trip(source.round_trip_loss, tokenizer, accept_lossy)
    if progress:
        _warn_special_tokens(source, f"{name}/{split}")
    return source


@functools.cache  # all splits of a data set skip the same
def _warn_skipped(builder: type[base.CachedBuilder], paths: tuple[str, ...]) -> None:
    if skipped := builder.skipped(paths):
        warn(f"data.paths: skipped: {skipped}")


def _warn_special_tokens(source: TokenSource, title: str) -> None:
    """Warns of special tokens spelled out in the text: they are plain text, even if meant to end documents."""
    if source.special_token_counts:
        counts = sorted(source.special_token_counts.items(), key=lambda item: -item[1])
        more = "" if len(counts) <= MAX_NAMES_SHOWN else f" and {len(counts) - MAX_NAMES_SHOWN} more"
        documents = f"{source.documents:,} document{'' if source.documents == 1 else 's'}"
        warn(
            f"{title}: the text of {documents} spells special tokens, which are read as plain text: "
            f"{', '.join(f'{token} {count:,} times' for token, count in counts[:MAX_NAMES_SHOWN])}{more}; where they end "
            f"documents of plain text, set data.name='text' and data.split_on={counts[0][0]!r}, which leaves them out"
        )


def token_hash(tokenizer: Tokenizer) -> Any:
    """Returns the hash whose first 32 hex digits are the fingerprint of a split, once its tokens are added in order."""
    return hashlib.sha256(tokenizer.fingerprint.encode())


def _tokenize(
    records, tokenizer: Tokenizer, folder: pathlib.Path, title: str, progress: bool, accept_lossy: bool
) -> None:
    """Writes the tokens of all records and a summary into a folder. Raises: InputError: the tokenizer loses text."""
    sample = np.unique(np.linspace(0, len(records) - 1, ROUND_TRIP_RECORDS).astype(int)).tolist()
    trip = RoundTrip(tokenizer, len(sample))
    for index in sample:  # before the minutes that tokenizing everything takes
        trip.add(records[index]["text"])
    check_round_trip(trip.loss, tokenizer, accept_lossy)
    encode, totals, digest, previous = RecordEncoder(tokenizer), Totals(), token_hash(tokenizer), None
    bar = tqdm.tqdm(total=len(records), desc=f"tokenize {title}", unit=" texts", delay=2.0, disable=not progress)
    with bar, open(folder / TOKENS_FILE, "wb") as file:
        for batch in batches_of_records(map(records.__getitem__, range(len(records)))):
            ids, counts = encode(batch, previous)
            file.write(ids.data)
            digest.update(ids.data)
            totals.add(counts)
            previous = batch[-1]["name"]
            bar.update(len(batch))
    summary = split_summary(totals, encode.dtype, digest, trip.loss)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))


def split_summary(totals: Totals, dtype: np.dtype, digest: Any, loss: RoundTripLoss) -> dict[str, Any]:
    """Returns the facts of a tokenized split, as `_source_of` reads them."""
    return totals.to_json() | {
        "dtype": dtype.name,
        "fingerprint": digest.hexdigest()[:32],
        "loss": {"lost": loss.lost_bytes, "read": loss.checked_bytes, "characters": loss.examples},
    }


def batches_of_records(records: Iterable[Mapping[str, bytes]]) -> Iterator[list[Mapping[str, bytes]]]:
    """Yields records in order, in batches of about `BATCH_BYTES` of text."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record["text"])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _load(folder: pathlib.Path) -> TokenSource | None:
    """Opens a folder that `_tokenize` wrote; None where it is missing or damaged."""
    try:
        summary = parse_json((folder / SUMMARY_FILE).read_text())
        dtype, num_tokens = np.dtype(summary["dtype"]), int(summary["tokens"])
        counts = [summary[name] for name in COUNTS]
        if dtype.kind != "u" or not all(type(count) is int and count >= 0 for count in counts):
            return None
        if num_tokens == 0 or (folder / TOKENS_FILE).stat().st_size != num_tokens * dtype.itemsize:
            return None
        return _source_of(summary, np.memmap(folder / TOKENS_FILE, dtype=dtype, mode="r", shape=(num_tokens,)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _source_of(summary: Mapping[str, Any], tokens: np.ndarray | TokenShards) -> TokenSource:
    """Returns the source of a split from its summary and its tokens."""
    loss = summary.get("loss", {})
    return TokenSource(
        tokens=tokens,
        bytes=summary["bytes"],
        words=summary["words"],
        documents=summary["documents"],
        fingerprint=str(summary["fingerprint"]),
        round_trip_loss=RoundTripLoss(loss.get("lost", 0), loss.get("read", 0), loss.get("characters", "")),
        special_token_counts={str(token): int(count) for token, count in summary.get("spelled", {}).items()},
    )


def _prepared_source(path: str | os.PathLike, name: str, split: str, tokenizer: Tokenizer) -> TokenSource:
    """Opens a split of a prepared folder. Raises: InputError: see `shards.open_prepared`; or it has other tokens."""
    found = shards.open_prepared(path, name, split)
    if found.facts["tokenizer"] != tokenizer.fingerprint:
        raise InputError(
            f"data.prepared='{found.folder}' was tokenized with '{found.facts['tokenizer_name']}' "
            f"({found.facts['tokenizer']}), but data.tokenizer is '{tokenizer.name}' ({tokenizer.fingerprint}): set "
            f"data.tokenizer='{found.folder}', which has a copy, or prepare the text with this one"
        )
    size = sum(shard.size for shard in found.shards)
    in_memory = split != "train" and is_remote(found.folder) and size <= MAX_BYTES_IN_MEMORY
    return _source_of(found.facts, TokenShards(found, in_memory))


def _remote_bytes(paths: Sequence[str]) -> int:
    """Returns the bytes of the objects under those of the paths that are in a bucket."""
    return sum(size for path in paths if is_remote(path) for _, size, _ in as_path(path).file_versions())


def _check_text_size(size: int, limit: int | None) -> None:
    """Refuses to tokenize more than `limit` bytes of text in a run. Raises: InputError: names the command to run."""
    if limit is not None and size > limit:
        raise InputError(
            f"data.paths holds {size / 1e9:.3g} GB of text, and every host of this run would tokenize it (at most "
            f"{limit / 1e9:.3g} GB): do it once on one machine with `{shards.COMMAND} --config=FILE --output=FOLDER`, in a "
            "bucket or on a disk that all hosts share, and train with --config.data.prepared=FOLDER"
        )
