"""Encoding of the records of a split, in this process or in worker processes, which import little more than this module."""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seqpe_jax.data.tokenizers import (
    EOS_TOKENS,
    SPECIAL_EOS_TOKENS,
    RoundTrip,
    RoundTripLoss,
    Tokenizer,
    check_round_trip,
    load_tokenizer,
    token_dtype,
)
from seqpe_jax.data.workers import start_worker
from seqpe_jax.errors import InputError

COUNTS = ("tokens", "bytes", "words", "documents")  # numbers in the summary of a split
ROUND_TRIP_RECORDS = 256  # records whose text is compared with what their tokens decode to

Records = Sequence[Mapping[str, bytes]]  # {"text", "name"} of each


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[bytes]:
    """Returns a pattern of the special tokens of a tokenizer and of the common EOS tokens, in UTF-8 text."""
    names = {*tokenizer.special_tokens, *EOS_TOKENS, *SPECIAL_EOS_TOKENS} - {""}
    return re.compile(b"|".join(re.escape(name.encode()) for name in sorted(names, key=len, reverse=True)))


@dataclasses.dataclass
class Totals:
    """Counts of some text and its tokens.

    Attributes:
      tokens: number of tokens.
      bytes: number of UTF-8 bytes.
      words: number of whitespace-separated words.
      documents: number of documents.
      special: occurrences of special tokens spelled out, by their spelling.
    """

    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0
    special: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Totals") -> None:
        """Adds the counts of more text."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.special += other.special

    def to_json(self) -> dict[str, Any]:
        """Returns the counts as the summary of a split stores them."""
        return {name: getattr(self, name) for name in COUNTS} | {"spelled": dict(self.special)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Totals":
        """Returns the counts of `to_json`."""
        return cls(*(values[name] for name in COUNTS), collections.Counter(values["spelled"]))


class RecordEncoder:
    """Tokens of the records of a split, with the EOS token of the tokenizer between documents if it has one.

    Args:
      tokenizer: tokenizer of the split.

    Attributes:
      dtype: dtype of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._separator = None if tokenizer.eos_id is None else np.array([tokenizer.eos_id], self.dtype)
        self._pattern = special_pattern(tokenizer)

    def __call__(self, records: Sequence[Mapping[str, bytes]], previous: bytes | None) -> tuple[np.ndarray, Totals]:
        """Encodes consecutive records; records of one document share its name.

        Args:
          records: {"text", "name"} of each.
          previous: name of the record before them; None = they are the first ones.

        Returns:
          (ids[num_tokens], their counts).
        """
        parts, totals = [], Totals()
        encoded = self._tokenizer.encode_many([record["text"] for record in records])
        for record, ids in zip(records, encoded, strict=True):
            text, name = record["text"], record["name"]
            if name != previous:
                totals.documents += 1
                if previous is not None and self._separator is not None:
                    parts.append(self._separator)
            previous = name
            parts.append(ids.astype(self.dtype, copy=False))
            totals.bytes += len(text)
            totals.words += len(text.decode("utf-8").split())
            totals.special.update(token.decode() for token in self._pattern.findall(text))
        ids = np.concatenate([*parts, np.empty(0, self.dtype)])
        totals.tokens = ids.size
        return ids, totals


@dataclasses.dataclass(frozen=True)
class EncodedBatch:
    """The tokens of consecutive records.

    Attributes:
      ids: uint8, uint16 or uint32[num_tokens].
      records: number of records.
      totals: counts of the records.
      loss: text of the first record that decoding does not give back.
    """

    ids: np.ndarray
    records: int
    totals: Totals
    loss: RoundTripLoss


class BatchEncoder:
    """Encodes a batch of records and checks some of its text for characters that the tokenizer loses.

    Args:
      tokenizer: tokenizer of the text.
      accept_lossy: do not refuse a tokenizer that loses text.
    """

    def __init__(self, tokenizer: Tokenizer, accept_lossy: bool):
        self._tokenizer, self._accept_lossy, self._encode = tokenizer, accept_lossy, RecordEncoder(tokenizer)

    def __call__(self, batch: tuple[Records, bytes | None]) -> EncodedBatch:
        """Returns the tokens and counts of (records, name of the record before them)."""
        records, previous = batch
        trip = RoundTrip(self._tokenizer, ROUND_TRIP_RECORDS)
        trip.add(records[0]["text"])
        check_round_trip(trip.loss, self._tokenizer, self._accept_lossy)
        ids, totals = self._encode(records, previous)
        return EncodedBatch(ids, len(records), totals, trip.loss)


def start_process() -> None:
    """Prepares a worker process, which tokenizes with one thread, since there is a process for each core."""
    start_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@functools.cache
def _encoder_of_process(tokenizer: str, fingerprint: str, accept_lossy: bool) -> BatchEncoder:
    """Loads the tokenizer in a worker process, once. Raises: InputError: it is another than the main process has."""
    found = load_tokenizer(tokenizer)
    if found.fingerprint != fingerprint:
        raise InputError(f"data.tokenizer: '{tokenizer}' has changed since the preparation began: start it again")
    return BatchEncoder(found, accept_lossy)


def encode_in_process(
    batch: tuple[Records, bytes | None], tokenizer: str, fingerprint: str, accept_lossy: bool
) -> EncodedBatch:
    """Encodes a batch in a worker process, as `BatchEncoder` does.

    Args:
      batch: (records, name of the record before them).
      tokenizer: `data.tokenizer`, which the process loads once.
      fingerprint: fingerprint of the tokenizer in the main process.
      accept_lossy: do not refuse a tokenizer that loses text.
    """
    return _encoder_of_process(tokenizer, fingerprint, accept_lossy)(batch)
