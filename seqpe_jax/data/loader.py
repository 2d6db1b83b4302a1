"""Batches from examples with Grain: training batch i is a function of (source, batch size, seed, i)."""

import bisect
import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from seqpe_jax.data.workers import start_worker
from seqpe_jax.errors import InputError

Example = dict[str, np.ndarray]
ENDLESS = 2**62  # examples of a run, at most
MIXTURE_BLOCK = 10_000  # examples of which each source of a mixture has its share


class TokenArray(Protocol):
    """One long array of token ids, of which slices are read: an array of NumPy, or shards of `data.shards`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice) -> np.ndarray: ...


class Windows:
    """Non-overlapping windows of `length` tokens, each with the token after it as the last target.

    A random-access source in Grain's sense: `windows[i]` -> {"tokens": int32[length + 1]}. Tokens after the last
    complete window, fewer than `length` of the split, are dropped.
    """

    def __init__(self, tokens: TokenArray, length: int):
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> Example:
        start = int(index) * self._length
        return {"tokens": np.asarray(self._tokens[start : start + self._length + 1]).astype(np.int32)}


def training_windows(tokens: TokenArray, length: int, *, field: str = "data.length") -> Windows:
    """Returns the training windows of a split.

    Args:
      tokens: 1-D.
      length: length of a window.
      field: the option to name in the message.

    Raises:
      InputError: there are fewer than length + 1 tokens.
    """
    _check_window(tokens, length, field)
    return Windows(tokens, length)


def _check_window(tokens: TokenArray, length: int, field: str) -> None:
    if length < 1:
        raise InputError(f"{field} must be at least 1, got {length}")
    if len(tokens) < length + 1:
        raise InputError(
            f"a window of {length} tokens needs {length + 1}, but the split has {len(tokens)}: lower {field}, or give "
            "more data"
        )


class ScoredWindows:
    """Windows of `length` tokens whose last targets are scored.

    A random-access source in Grain's sense: `windows[i]` -> {"tokens": int32[length + 1], "scored": bool[length],
    "end": int64[]}; "scored" marks the targets, `tokens[1:]`, whose losses count, "end" is the token index of the last one.

    Args:
      tokens: 1-D, of a split.
      length: length of a window.
      ends: int[W], token index of the last target of each window, at least `length`.
      counts: int[W], number of scored targets of each window, 1 to `length`.
      document_end: token after which a target is not scored, since it begins another document; None = there is none.
    """

    def __init__(
        self,
        tokens: TokenArray,
        length: int,
        ends: np.ndarray,
        counts: np.ndarray,
        document_end: int | None = None,
    ):
        self._tokens, self._length, self._ends, self._counts = tokens, length, ends, counts
        self._document_end = document_end

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Example:
        end, length = int(self._ends[index]), self._length
        tokens = np.asarray(self._tokens[end - length : end + 1]).astype(np.int32)
        scored = np.arange(length) >= length - self._counts[index]
        if self._document_end is not None:
            scored &= tokens[:-1] != self._document_end
        return {"tokens": tokens, "scored": scored, "end": np.int64(end)}


class Mixture:
    """Endless examples of several sources, drawn by weight: the example of a number is a function of seed and number alone.

    Of each `MIXTURE_BLOCK` examples every source has its share, in random places. A source gives each of its examples once per
    epoch, each epoch in another order. After a change of weights each source continues where it is.

    Args:
      sources: random access, by name.
      phases: (number of the first example, weight of each source) in order; the first begins at 0.
      seed: seed of places and orders.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Any]],
        phases: Sequence[tuple[int, Mapping[str, float]]],
        seed: int,
    ):
        self._names, self._seed = sorted(sources), seed
        self._examples = [_shuffled(sources[name], _seed_of(seed, name)) for name in self._names]
        self._starts = [start for start, _ in phases]
        self._counts = [_block_counts([weights[name] for name in self._names]) for _, weights in phases]
        self._block = functools.lru_cache(maxsize=8)(self._make_block)
        self._before = [np.zeros(len(self._names), np.int64)]  # examples of each source before each phase
        for phase in range(len(phases) - 1):
            self._before.append(self._given(phase, self._starts[phase + 1]))

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, number: int) -> Any:
        source, index = self.place(number)
        return self._examples[source][index]

    def place(self, number: int) -> tuple[int, int]:
        """Returns (index of the source among the sorted names, number of the example among all that it gives)."""
        phase = bisect.bisect_right(self._starts, number) - 1
        block, place = divmod(number - self._starts[phase], MIXTURE_BLOCK)
        sources, ranks = self._block(phase, block)
        source = int(sources[place])
        return source, int(self._before[phase][source] + block * self._counts[phase][source] + ranks[place])

    def given(self, number: int) -> dict[str, int]:
        """Returns the examples that each source has given before an example."""
        phase = max(0, bisect.bisect_left(self._starts, number) - 1)
        return dict(zip(self._names, self._given(phase, number).tolist(), strict=True))

    def _given(self, phase: int, number: int) -> np.ndarray:
        block, place = divmod(number - self._starts[phase], MIXTURE_BLOCK)
        of_block = np.bincount(self._block(phase, block)[0][:place], minlength=len(self._names))
        return self._before[phase] + block * self._counts[phase] + of_block

    def _make_block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each example of a block, and its rank among those of its source in the block."""
        ordered = np.repeat(np.arange(len(self._names)), self._counts[phase])
        bits = np.random.PCG64([self._seed, phase, block]).random_raw(MIXTURE_BLOCK)
        sources, ranks = ordered[np.argsort(bits, kind="stable")], np.empty(MIXTURE_BLOCK, np.int64)
        for source, count in enumerate(self._counts[phase]):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


def _block_counts(weights: Sequence[float]) -> np.ndarray:
    """Returns the examples of each source among `MIXTURE_BLOCK`, int64[sources]: the largest remainders are rounded up."""
    exact = np.asarray(weights, np.float64) / sum(weights) * MIXTURE_BLOCK
    counts = np.floor(exact).astype(np.int64)
    missing = MIXTURE_BLOCK - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def _seed_of(seed: int, name: str) -> int:
    """Returns the seed of a source's order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little") >> 1


def _shuffled(source: Sequence[Any], seed: int) -> grain.MapDataset:
    """Returns endless examples: each of a source once per epoch, each epoch in another order."""
    epochs = ENDLESS // len(source)  # Grain's own endless repeat overflows in batches of one
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat(epochs)


class TrainLoader:
    """Endless training batches: every example once per epoch, each epoch in another order.

    Args:
      source: random access, `source[i]`; or a `Mixture`, whose examples are in order already and take no `example`.
      batch_size: examples of a step over all processes.
      seed: seed of the order and of the generators.
      example: (source[i], numpy Generator) -> example; the generator depends on the seed and on the number of the
        example in the run only. None = source[i] is the example.
      rows: indices of the rows of each batch that this process reads, in that order; None = all of them. A row has the
        same example in every process.
      threads: batches that each process makes in parallel in `prefetch`.
      workers: processes in which `prefetch` makes batches; 0 = this one. Source and `example` are sent to them.

    Raises:
      InputError: no examples, or an empty batch.
      ValueError: a row outside of the batch.
    """

    def __init__(
        self,
        source: Sequence[Any] | Mixture,
        *,
        batch_size: int,
        seed: int,
        example: Callable[[Any, np.random.Generator], Example] | None = None,
        rows: Sequence[int] | None = None,
        threads: int = 1,
        workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        rows = range(batch_size) if rows is None else rows
        if not len(rows) or not 0 <= min(rows) <= max(rows) < batch_size:
            raise ValueError(f"rows must be some of 0 to {batch_size - 1}, got {list(rows)}")
        if not len(source):
            raise InputError("the training split has no examples")
        examples = source if isinstance(source, Mixture) else _shuffled(source, seed)
        if example is not None:
            examples = examples.random_map(example)
        self._batches = grain.MapDataset.source(_RowsOfBatches(examples, batch_size, rows)).batch(len(rows))
        self._threads, self._workers = threads, workers

    def batch(self, step: int) -> Example:
        """Returns this process's rows of the batch of a step >= 0: each array of an example with a leading batch axis."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return self._batches[step]

    def prefetch(self, start_step: int = 0, *, ahead: int = 2) -> Iterator[tuple[int, Example]]:
        """Yields (step, batch) from `start_step` on, and reads `ahead` batches in advance in the background."""
        with _read_ahead(self._batches[start_step:], self._threads, self._workers, ahead) as batches:
            yield from enumerate(batches, start_step)


@contextlib.contextmanager
def _read_ahead(elements: grain.MapDataset, threads: int, workers: int, ahead: int = 2) -> Iterator[Iterator[Example]]:
    """Yields an iterator over elements in order, made in the background.

    Element i is a function of i, wherever it is made, so that the number of threads and workers changes nothing.

    Args:
      elements: random access.
      threads: elements that each process makes in parallel.
      workers: worker processes; 0 = threads of this process.
      ahead: elements that each process makes in advance, at least.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    dataset = elements.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # of a library user; Grain reads flags of its own when it starts processes
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        dataset = dataset.mp_prefetch(processes, worker_init_fn=start_worker)
    iterator = iter(dataset)
    try:
        yield iterator
    finally:
        iterator.close()


class _RowsOfBatches:
    """Some rows of each batch, batch after batch: a random-access source over the examples of a run."""

    def __init__(self, examples: Sequence[Any], batch_size: int, rows: Sequence[int]):
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> Example:
        step, number = divmod(index, len(self._rows))
        return self._examples[step * self._batch_size + self._rows[number]]


class EvalBatches:
    """The first `count` examples once, in order, in batches of one shape with "weights" float32[batch_size].

    The last batch is padded with zeros of weight 0. `len()` is the number of batches.

    Args:
      source: random access, `source[i]`.
      batch_size: rows of a batch.
      count: number of examples.
      example: source[i] -> example; None = source[i] is the example.
      rows: indices of the rows of each batch that this process reads, in that order; None = all of them. "weights" has all
        rows in any case.
      threads: batches that each process makes in parallel.
      workers: processes that make batches; 0 = this one.
    """

    def __init__(
        self,
        source: Sequence[Any],
        batch_size: int,
        count: int,
        example: Callable[[Any], Example] | None = None,
        *,
        rows: Sequence[int] | None = None,
        threads: int = 1,
        workers: int = 0,
    ):
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.examples = count
        self._batch_size, self._threads, self._workers = batch_size, threads, workers
        rows = range(batch_size) if rows is None else rows
        padded = _PaddedExamples(source, count, len(self) * batch_size, example)
        self._batches = grain.MapDataset.source(_RowsOfBatches(padded, batch_size, rows)).batch(len(rows))

    def __len__(self) -> int:
        return -(-self.examples // self._batch_size)

    def __iter__(self) -> Iterator[Example]:
        with _read_ahead(self._batches, self._threads, self._workers) as batches:
            for number, batch in enumerate(batches):
                real = self.examples - number * self._batch_size
                yield batch | {"weights": (np.arange(self._batch_size) < real).astype(np.float32)}


class _PaddedExamples:
    """Examples, followed by zeros of their shapes: a random-access source."""

    def __init__(self, source: Sequence[Any], count: int, length: int, example: Callable[[Any], Example] | None):
        self._source, self._count, self._length, self._example = source, count, length, example
        self._zeros: Example | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if index < self._count:
            record = self._source[index]
            return record if self._example is None else self._example(record)
        if self._zeros is None:
            self._zeros = {name: np.zeros_like(value) for name, value in self[self._count - 1].items()}
        return self._zeros


def eval_windows(
    tokens: TokenArray, length: int, batch_size: int, max_tokens: int = 0, document_end: int | None = None
) -> EvalBatches:
    """Returns windows that score every token of a split but the first once, at any length.

    Windows are consecutive. The last one ends at the last token: it overlaps the previous one, for context, and scores
    its new tokens only.

    Args:
      tokens: 1-D, of a split.
      length: length of a window.
      batch_size: windows of a batch.
      max_tokens: score only the first `max_tokens` tokens; 0 = all of them.
      document_end: as in `ScoredWindows`.

    Returns:
      Batches of {"tokens": int32[batch_size, length + 1], "scored": bool[batch_size, length], "weights"}; padding rows
      score nothing.

    Raises:
      InputError: there are fewer than length + 1 tokens, or max_tokens is less than a window.
    """
    _check_window(tokens, length, "eval.lengths (--lengths)")
    if 0 < max_tokens < length:
        raise InputError(
            f"eval.tokens={max_tokens} (--tokens) is less than a window of {length} tokens: raise it to {length} or more, "
            f"or lower eval.lengths (--lengths)"
        )
    targets = min(len(tokens) - 1, max_tokens or len(tokens) - 1)
    ends = np.minimum(length * np.arange(1, -(-targets // length) + 1), targets)
    source = ScoredWindows(tokens, length, ends, np.diff(ends, prepend=0), document_end)
    return EvalBatches(source, batch_size, len(source))


def target_ends(count: int, *, largest: int, stride: int, targets: int) -> np.ndarray:
    """Returns the ends of the blocks of targets that are scored under every context, int[N], rising.

    Blocks of `stride` targets are counted back from the end of the split, as far as the largest context allows. If
    there are more of them than `targets`, those in the middle of equal parts of the split are taken.

    Args:
      count: tokens of the split, more than `largest`.
      largest: largest context, in tokens; no other context influences the targets.
      stride: targets of a block.
      targets: maximum number of targets, at least `stride`.
    """
    blocks = (count - 1 - largest) // stride + 1
    taken = min(blocks, targets // stride)
    chosen = (2 * np.arange(taken) + 1) * blocks // (2 * taken)
    return (count - 1 - stride * chosen)[::-1]


def context_windows(
    tokens: TokenArray,
    context: int,
    batch_size: int,
    ends: np.ndarray,
    stride: int,
    document_end: int | None = None,
) -> EvalBatches:
    """Returns windows of `context` tokens that score their last `stride` targets.

    Each of these targets has context - stride + 1 to `context` tokens before it.

    Args:
      tokens: 1-D, of a split.
      context: tokens of a window.
      batch_size: windows of a batch.
      ends: int[N], token index of the last target of each window (`target_ends`).
      stride: number of scored targets of each window.
      document_end: as in `ScoredWindows`.

    Returns:
      Batches, see `eval_windows`.
    """
    source = ScoredWindows(tokens, context, ends, np.full(len(ends), stride), document_end)
    return EvalBatches(source, batch_size, len(source))
