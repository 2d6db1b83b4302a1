"""Examples -> batches, on Grain's random access: batch i is a function of (source, batch size, seed, i), whoever asks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from seqpe_jax.errors import InputError

Example = dict[str, np.ndarray]


class Windows:
    """Non-overlapping windows of `length` tokens, each with the one token that follows, to be predicted.

    A random-access source in Grain's sense: `windows[i]` -> {"tokens": int32[length + 1]}. Tokens after the last whole
    window are left out.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        self._rows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), length + 1)[::length]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return {"tokens": self._rows[index].astype(np.int32)}


def windows(tokens: np.ndarray, length: int, *, field: str = "data.length") -> Windows:
    """Returns the windows of 1-D tokens.

    Args:
      field: the option to name when the length does not fit.
    Raises:
      InputError: there are fewer than length + 1 tokens.
    """
    if length < 1:
        raise InputError(f"{field} must be at least 1, got {length}")
    if len(tokens) < length + 1:
        raise InputError(
            f"a window of {length} tokens needs {length + 1}, but the split has {len(tokens)}: lower {field}, or give "
            "more data"
        )
    return Windows(tokens, length)


class TrainLoader:
    """Endless training batches: every example once per epoch, each epoch in another order.

    Args:
      source: random access, `source[i]`.
      batch_size: examples of a step over all hosts.
      seed: of the order, and of what `example` draws.
      example: (source[i], numpy Generator) -> example; the generator depends on the seed and on the example's place
        in the run only. None = the source's own.
      rows: indices of the rows that this process reads of each batch, in that order; None = all of them. A row has the
        same example whoever reads it.
      threads: examples made at once by `prefetch`.
    Raises:
      InputError: no examples, or a batch of none.
      ValueError: rows that a batch does not have.
    """

    def __init__(
        self,
        source: Sequence[Any],
        *,
        batch_size: int,
        seed: int,
        example: Callable[[Any, np.random.Generator], Example] | None = None,
        rows: Sequence[int] | None = None,
        threads: int = 1,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        rows = range(batch_size) if rows is None else rows
        if not len(rows) or not 0 <= min(rows) <= max(rows) < batch_size:
            raise ValueError(f"rows must be some of 0 to {batch_size - 1}, got {list(rows)}")
        if not len(source):
            raise InputError("the training split has no examples")
        epochs = 2**62 // len(source)  # for ever; Grain's own "for ever" overflows in batches of one
        examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat(epochs)
        if example is not None:
            examples = examples.random_map(example)
        self._batches = grain.MapDataset.source(_RowsOfBatches(examples, batch_size, rows)).batch(len(rows))
        self._threads = threads

    def batch(self, step: int) -> Example:
        """Returns this process's rows of the batch of a step >= 0: each array of an example with a leading batch axis."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return self._batches[step]

    def prefetch(self, start_step: int = 0, *, ahead: int = 2) -> Iterator[tuple[int, Example]]:
        """Yields (step, batch) from `start_step` on, reading `ahead` batches early on threads of its own."""
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=max(ahead, self._threads))
        batches = iter(self._batches[start_step:].to_iter_dataset(options))
        try:
            yield from enumerate(batches, start_step)
        finally:
            batches.close()


class _RowsOfBatches:
    """The examples of some rows of each batch, batch after batch: a random-access source over the examples of a run."""

    def __init__(self, examples: Sequence[Any], batch_size: int, rows: Sequence[int]):
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Example:
        step, number = divmod(index, len(self._rows))
        return self._examples[step * self._batch_size + self._rows[number]]


class EvaluationBatches:
    """The first `count` examples once, in order, in batches of one shape with "weights" float32[batch_size].

    Rows that fill up the last batch are zeros of weight 0. `len()` is the number of batches.
    """

    def __init__(self, source: Sequence[Any], batch_size: int, count: int, example: Callable[[Any], Example] | None = None):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.examples = count
        self._source, self._batch_size, self._example = source, batch_size, example or (lambda record: record)

    def __len__(self) -> int:
        return -(-self.examples // self._batch_size)

    def __iter__(self) -> Iterator[Example]:
        read = grain.MapDataset.source(self._source)[: self.examples].map(self._example).batch(self._batch_size)
        for batch in read.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)):
            rows = len(next(iter(batch.values())))
            padded = {
                name: np.concatenate([value, np.zeros((self._batch_size - rows, *value.shape[1:]), value.dtype)])
                for name, value in batch.items()
            }
            yield padded | {"weights": (np.arange(self._batch_size) < rows).astype(np.float32)}


def evaluation_windows(tokens: np.ndarray, length: int, batch_size: int, max_tokens: int = 0) -> EvaluationBatches:
    """Returns the non-overlapping windows of 1-D tokens: {"tokens": int32[batch_size, length + 1], "weights"}.

    Args:
      max_tokens: predict at most that many tokens (but one window); 0 = all of them.
    Raises:
      InputError: there are fewer than length + 1 tokens.
    """
    source = windows(tokens, length, field="eval.lengths (--lengths)")
    count = min(len(source), max(1, max_tokens // length)) if max_tokens else len(source)
    return EvaluationBatches(source, batch_size, count)
