"""Token cache: a split of a text data set as one long array of token ids, tokenized once."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tqdm

from seqpe_jax.data import registry
from seqpe_jax.data.cache import load_or_build, local_copies
from seqpe_jax.data.datasets import base
from seqpe_jax.data.paths import MAX_NAMES_SHOWN, warn
from seqpe_jax.data.tokenizers import (
    EOS_TOKENS,
    SPECIAL_EOS_TOKENS,
    RoundTrip,
    RoundTripLoss,
    Tokenizer,
    check_round_trip,
    token_dtype,
)
from seqpe_jax.files import cache_root, parse_json

CACHE_FORMAT = 1  # of the two files; caches of another format are not read
TOKENS_FILE = "tokens.bin"
SUMMARY_FILE = "summary.json"
BATCH_BYTES = 8 << 20  # text that is tokenized in one call
ROUND_TRIP_RECORDS = 256  # records whose text is compared with what their tokens decode to


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """A tokenized split.

    Attributes:
      tokens: uint8, uint16 or uint32[num_tokens], memory-mapped; documents in order, the EOS token of the tokenizer
        between them if it has one.
      bytes: number of UTF-8 bytes of the text.
      words: number of whitespace-separated words of the text.
      documents: number of documents.
      fingerprint: hex digits, equal for equal tokens on every machine.
      round_trip_loss: text that decoding does not give back, from a sample; zero in caches of versions that did not
        check.
      special_token_counts: occurrences of special tokens spelled out in the text; empty in caches of versions that did
        not count them.
    """

    tokens: np.ndarray
    bytes: int
    words: int
    documents: int
    fingerprint: str
    round_trip_loss: RoundTripLoss = RoundTripLoss()
    special_token_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


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

    Raises:
      InputError: unknown name or split, nothing to read, not UTF-8, an empty split, a folder that is not writable, a
        tokenizer that loses text.
    """
    if isinstance(paths, str):
        paths = (paths,)
    builder = registry.load_builder(name, registry.DATA_TEXT)
    registry.get(name).check_paths(paths)
    base.check_split(split)
    paths = local_copies([os.fspath(path) for path in paths], cache_dir, progress)
    root = cache_root(cache_dir)
    data_key = builder.source_key(paths)
    if progress:
        _warn_skipped(builder, paths)

    def build(folder: pathlib.Path) -> None:
        records = base.prepared_split(builder, split, data_key, paths, data_dir, cache_dir, progress)
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
            "documents, write each document into a file of its own, without them"
        )


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[bytes]:
    """Returns a pattern of the special tokens of a tokenizer and of the common EOS tokens, in UTF-8 text."""
    names = {*tokenizer.special_tokens, *EOS_TOKENS, *SPECIAL_EOS_TOKENS} - {""}
    return re.compile(b"|".join(re.escape(name.encode()) for name in sorted(names, key=len, reverse=True)))


class _TokenWriter:
    """The token file of a split, with its counts and its hash.

    Args:
      file: open binary file.
      tokenizer: tokenizer of the split.
    """

    def __init__(self, file, tokenizer: Tokenizer):
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.counts = {"tokens": 0, "bytes": 0, "words": 0, "documents": 0}
        self.special: collections.Counter[bytes] = collections.Counter()
        self.hash = hashlib.sha256(tokenizer.fingerprint.encode())
        self._file = file
        self._separator = None if tokenizer.eos_id is None else np.array([tokenizer.eos_id], self.dtype)
        self._pattern = special_pattern(tokenizer)
        self._document = None

    def add(self, record: Mapping[str, bytes], ids: np.ndarray) -> None:
        """Appends the tokens of a record; records of one document share its name."""
        if record["name"] != self._document:
            if self._document is not None and self._separator is not None:
                self._append(self._separator)
            self.counts["documents"] += 1
        self._document = record["name"]
        self._append(ids.astype(self.dtype, copy=False))
        self.counts["bytes"] += len(record["text"])
        self.counts["words"] += len(record["text"].decode("utf-8").split())
        self.special.update(self._pattern.findall(record["text"]))

    def _append(self, ids: np.ndarray) -> None:
        content = np.ascontiguousarray(ids).data
        self._file.write(content)
        self.hash.update(content)
        self.counts["tokens"] += ids.size


def _tokenize(
    records, tokenizer: Tokenizer, folder: pathlib.Path, title: str, progress: bool, accept_lossy: bool
) -> None:
    """Writes the tokens of all records and a summary into a folder. Raises: InputError: the tokenizer loses text."""
    sample = np.unique(np.linspace(0, len(records) - 1, ROUND_TRIP_RECORDS).astype(int)).tolist()
    trip = RoundTrip(tokenizer, len(sample))
    for index in sample:  # before the minutes that tokenizing everything takes
        trip.add(records[index]["text"])
    check_round_trip(trip.loss, tokenizer, accept_lossy)
    bar = tqdm.tqdm(total=len(records), desc=f"tokenize {title}", unit=" texts", delay=2.0, disable=not progress)
    with bar, open(folder / TOKENS_FILE, "wb") as file:
        writer = _TokenWriter(file, tokenizer)
        for batch in _batches_of_records(records):
            encoded = tokenizer.encode_many([record["text"] for record in batch])
            for record, ids in zip(batch, encoded, strict=True):
                writer.add(record, ids)
            bar.update(len(batch))
    summary = writer.counts | {
        "dtype": writer.dtype.name,
        "fingerprint": writer.hash.hexdigest()[:32],
        "loss": {"lost": trip.loss.lost_bytes, "read": trip.loss.checked_bytes, "characters": trip.loss.examples},
        "spelled": {token.decode(): count for token, count in writer.special.items()},
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))


def _batches_of_records(records) -> Iterator[list[dict]]:
    """Yields records in order, in batches of about `BATCH_BYTES` of text."""
    batch, size = [], 0
    for index in range(len(records)):
        batch.append(records[index])
        size += len(batch[-1]["text"])
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
        counts = [summary[name] for name in ("tokens", "bytes", "words", "documents")]
        if dtype.kind != "u" or not all(type(count) is int and count >= 0 for count in counts):
            return None
        if num_tokens == 0 or (folder / TOKENS_FILE).stat().st_size != num_tokens * dtype.itemsize:
            return None
        loss = summary.get("loss", {})
        return TokenSource(
            tokens=np.memmap(folder / TOKENS_FILE, dtype=dtype, mode="r", shape=(num_tokens,)),
            bytes=summary["bytes"],
            words=summary["words"],
            documents=summary["documents"],
            fingerprint=str(summary["fingerprint"]),
            round_trip_loss=RoundTripLoss(loss.get("lost", 0), loss.get("read", 0), loss.get("characters", "")),
            special_token_counts={str(token): int(count) for token, count in summary.get("spelled", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
