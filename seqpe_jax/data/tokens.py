"""A split of a text data set as one long array of tokens, tokenised once and kept in the cache."""

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
from seqpe_jax.data.cache import local_copies, locked, staged_directory
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
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.files import cache_root, parse_json

CACHE_FORMAT = 1  # of the files below; a new number makes old caches unread
BATCH_BYTES = 8 << 20  # text tokenised at once
TOKENS_FILE, SUMMARY_FILE = "tokens.bin", "summary.json"


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """A split, tokenised.

    Attributes:
      tokens: uint8, uint16 or uint32[tokens], read from disk as needed; documents follow each other, with the
        tokenizer's end of text between them where it has one.
      bytes: UTF-8 bytes of the text.
      words: whitespace-separated words of the text.
      documents: how many there are.
      fingerprint: hex digits; equal for equal tokens, on every machine.
      loss: what does not come back from the tokens, of a sample; nothing where it was tokenised before that was looked at.
      spelled: how often the text spells each special token; nothing where it was tokenised before they were counted.
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
    """Returns a split of a data set as tokens, preparing and tokenising it when that has not been done yet.

    Safe to call from several processes at once; a killed one leaves nothing that is read later.

    Args:
      name: stdlib_text, text_files or wikitext103.
      split: train, validation or test.
      tokenizer: see `load_tokenizer`.
      paths: the builder's.
      data_dir: prepared data sets; none = CACHE_DIR/datasets.
      cache_dir: tokens; none = $SEQPE_JAX_CACHE or ~/.cache/seqpe_jax.
      progress: show how far long work is, on stderr.
      lossy: text that does not come back from its tokens is accepted.

    Raises:
      InputError: unknown name or split, nothing to read, not UTF-8, a split without text, a folder not writable, a
        tokenizer that loses text.
    """
    if isinstance(paths, str):
        paths = (paths,)
    builder = registry.load_builder(name, registry.DATA_TEXT)
    registry.get(name).check_paths(paths)
    paths = local_copies([os.fspath(path) for path in paths], cache_dir, progress)
    if split not in base.SPLITS:
        raise InputError(f"unknown split '{split}'.{suggest(split, base.SPLITS)}")
    root = cache_root(cache_dir)
    datasets = pathlib.Path(data_dir).expanduser().absolute() if data_dir else root / "datasets"
    data_key = builder.source_key(paths)
    if progress:
        _warn_skipped(builder, paths)
    identity = json.dumps([CACHE_FORMAT, data_key, split, tokenizer.fingerprint])
    target = root / "tokens" / f"{name}-{split}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    found = _read_cached(target)
    if found is not None:
        check_round_trip(found.round_trip_loss, tokenizer, accept_lossy)
        if progress:
            _warn_special_tokens(found, f"{name}/{split}")
        return found
    with locked(target) as alone:
        if (found := _read_cached(target)) is None:
            written = base.prepare_dataset(
                builder, paths, datasets / f"{name}-{data_key}", root / "downloads", progress
            )
            if split not in written.info.splits:
                held = ", ".join(written.info.splits)
                raise InputError(
                    f"data set '{name}' has no text in split '{split}' (it has {held}): give more data in data.paths"
                )
            with staged_directory(target, alone=alone) as folder:
                _tokenize(
                    written.as_data_source(split=split), tokenizer, folder, f"{name}/{split}", progress, accept_lossy
                )
            found = _read_cached(target)
    if found is None:
        raise RuntimeError(f"'{target}' cannot be read back: is the disk full?")
    if progress:
        _warn_special_tokens(found, f"{name}/{split}")
    return found


@functools.cache  # the splits of a data set leave out the same
def _warn_skipped(builder: type[base.CachedBuilder], paths: tuple[str, ...]) -> None:
    if words := builder.skipped(paths):
        warn(f"data.paths: left out: {words}")


def _warn_special_tokens(source: TokenSource, title: str) -> None:
    """Tells of special tokens that a text spells: they are read as text, also where they were meant to end documents."""
    if source.special_token_counts:
        counts = sorted(source.special_token_counts.items(), key=lambda item: -item[1])
        several = "" if len(counts) <= MAX_NAMES_SHOWN else f" and {len(counts) - MAX_NAMES_SHOWN} more"
        documents = f"{source.documents:,} document{'' if source.documents == 1 else 's'}"
        warn(
            f"{title}: the text of {documents} spells special tokens, which are read as plain text: "
            f"{', '.join(f'{token} {count:,} times' for token, count in counts[:MAX_NAMES_SHOWN])}{several}; where they end "
            "documents, write each document into a file of its own, without them"
        )


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[bytes]:
    """Returns what finds, in UTF-8 text, a tokenizer's special tokens and those with which others end documents."""
    names = {*tokenizer.special_tokens, *EOS_TOKENS, *SPECIAL_EOS_TOKENS} - {""}
    return re.compile(b"|".join(re.escape(name.encode()) for name in sorted(names, key=len, reverse=True)))


def _tokenize(
    records, tokenizer: Tokenizer, folder: pathlib.Path, title: str, progress: bool, accept_lossy: bool
) -> None:
    places = np.unique(np.linspace(0, len(records) - 1, 256).astype(int)).tolist()
    trip = RoundTrip(tokenizer, len(places))
    for place in places:  # before the minutes that all of them take
        trip.add(records[place]["text"])
    check_round_trip(trip.loss, tokenizer, accept_lossy)
    dtype = token_dtype(tokenizer.vocab_size)
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    separator = None if tokenizer.eos_id is None else np.array([tokenizer.eos_id], dtype)
    count = {"tokens": 0, "bytes": 0, "words": 0, "documents": 0}
    special, met = special_pattern(tokenizer), collections.Counter()
    previous = None
    bar = tqdm.tqdm(total=len(records), desc=f"tokenise {title}", unit=" texts", delay=2.0, disable=not progress)
    with bar, open(folder / TOKENS_FILE, "wb") as out:
        for group in _batches_of_records(records):
            encoded = tokenizer.encode_many([record["text"] for record in group])
            for record, ids in zip(group, encoded, strict=True):
                if record["name"] != previous:
                    if previous is not None and separator is not None:
                        _append(out, digest, separator)
                        count["tokens"] += 1
                    count["documents"] += 1
                previous = record["name"]
                _append(out, digest, ids.astype(dtype, copy=False))
                count["tokens"] += ids.size
                count["bytes"] += len(record["text"])
                count["words"] += len(record["text"].decode("utf-8").split())
                met.update(special.findall(record["text"]))
            bar.update(len(group))
    # Keys of the file, as all versions wrote it.
    loss = {"lost": trip.loss.lost_bytes, "read": trip.loss.checked_bytes, "characters": trip.loss.examples}
    summary = {**count, "dtype": dtype.name, "fingerprint": digest.hexdigest()[:32], "loss": loss}
    summary["spelled"] = {token.decode(): number for token, number in met.items()}
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))


def _batches_of_records(records) -> Iterator[list[dict]]:
    group, size = [], 0
    for index in range(len(records)):
        group.append(records[index])
        size += len(group[-1]["text"])
        if size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _append(out, digest, ids: np.ndarray) -> None:
    content = np.ascontiguousarray(ids).data
    out.write(content)
    digest.update(content)


def _read_cached(target: pathlib.Path) -> TokenSource | None:
    """Returns what `target` holds, or None when it is not there or damaged."""
    try:
        summary = parse_json((target / SUMMARY_FILE).read_text())
        dtype, size = np.dtype(summary["dtype"]), int(summary["tokens"])
        counts = [summary[name] for name in ("tokens", "bytes", "words", "documents")]
        if dtype.kind != "u" or not all(type(count) is int and count >= 0 for count in counts):
            return None
        if size == 0 or (target / TOKENS_FILE).stat().st_size != size * dtype.itemsize:
            return None
        tokens = np.memmap(target / TOKENS_FILE, dtype=dtype, mode="r", shape=(size,))
        stored = summary.get("loss")
        loss = RoundTripLoss(*(stored[name] for name in ("lost", "read", "characters"))) if stored else RoundTripLoss()
        special_token_counts = {str(token): int(number) for token, number in summary.get("spelled", {}).items()}
        return TokenSource(tokens, *counts[1:], str(summary["fingerprint"]), loss, special_token_counts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
