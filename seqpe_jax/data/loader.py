"""Tokens -> batches. Batch i is a function of (tokens, length, batch size, seed, i), whoever asks and however often."""

import collections
import concurrent.futures
import functools
import hashlib
import math
from collections.abc import Iterator

import numpy as np

from seqpe_jax.errors import InputError

ROUNDS = 6  # of the Feistel network below; the order looks random from four on (Luby and Rackoff)


class Windows:
    """Non-overlapping windows of `length` tokens, each with the one token that follows, to be predicted.

    A random-access source in Grain's sense: `len(windows)`, `windows[i]` -> [length + 1] of the tokens' dtype; an array
    of indices [n] gives [n, length + 1]. Tokens after the last whole window are left out.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        tokens = np.asarray(tokens)
        self._rows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> np.ndarray:
        return self._rows[index]


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
    """Endless training batches: every window once per epoch, each epoch in another order.

    Args:
      source: a `TokenSource`, or 1-D tokens.
      length: tokens of a window.
      batch_size: sequences of a step over all hosts.
      seed: of the order.
      host_index, host_count: this host reads rows [i * n, (i + 1) * n) of each batch, n = batch_size // host_count; the
        batch that they make together does not depend on host_count.
    Raises:
      InputError: fewer tokens than a window needs, or batch_size is not a multiple of host_count.
    """

    def __init__(
        self, source, *, length: int, batch_size: int, seed: int, host_index: int = 0, host_count: int = 1
    ) -> None:
        if batch_size < 1 or batch_size % host_count:
            raise InputError(f"batch_size={batch_size} must be a positive multiple of the {host_count} hosts")
        if not 0 <= host_index < host_count:
            raise InputError(f"host {host_index} of {host_count} does not exist")
        self.windows = windows(getattr(source, "tokens", source), length)
        self._seed, self._batch_size = seed, batch_size
        self._rows = batch_size // host_count
        self._first = host_index * self._rows

    @property
    def steps_per_epoch(self) -> float:
        """Steps that read every window once."""
        return len(self.windows) / self._batch_size

    def indices(self, step: int) -> np.ndarray:
        """Returns the windows that this host reads at `step`, int64[batch_size // host_count]."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        place = step * self._batch_size + self._first + np.arange(self._rows, dtype=np.int64)
        count = len(self.windows)
        epochs, index = np.divmod(place, count)
        parts = [
            shuffled(index[epochs == epoch], epoch, count, self._seed)
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(parts)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Returns {"tokens": int32[batch_size // host_count, length + 1]} of a step >= 0."""
        return {"tokens": self.windows[self.indices(step)].astype(np.int32)}

    def prefetch(self, start_step: int = 0, *, ahead: int = 2) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yields (step, batch) from `start_step` on, reading `ahead` batches early on a thread of its own.

        The thread ends when the iterator is closed or forgotten.
        """
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            pending = collections.deque(
                (step, pool.submit(self.batch, step)) for step in range(start_step, start_step + ahead)
            )
            while True:
                later = start_step + ahead
                pending.append((later, pool.submit(self.batch, later)))
                start_step += 1
                step, future = pending.popleft()
                yield step, future.result()


class EvaluationWindows:
    """Every window once, in order, in batches of one shape.

    Attributes:
      windows: how many windows there are; `len()` is the number of batches.
    """

    def __init__(self, source: Windows, batch_size: int, count: int):
        self.windows = count
        self._source, self._batch_size = source, batch_size

    def __len__(self) -> int:
        return -(-self.windows // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, self.windows, self._batch_size):
            index = np.arange(first, first + self._batch_size)
            real = index < self.windows
            tokens = self._source[np.where(real, index, 0)].astype(np.int32)
            yield {"tokens": tokens * real[:, None], "weights": real.astype(np.float32)}


def evaluation_windows(tokens: np.ndarray, length: int, batch_size: int, max_tokens: int = 0) -> EvaluationWindows:
    """Returns the non-overlapping windows of 1-D tokens as an iterable of batches.

    Each batch is {"tokens": int32[batch_size, length + 1], "weights": float32[batch_size]}; rows that fill up the last
    batch are zeros of weight 0.

    Args:
      max_tokens: predict at most that many tokens (but one window); 0 = all of them.
    Raises:
      InputError: there are fewer than length + 1 tokens.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    source = windows(tokens, length, field="eval.lengths (--lengths)")
    count = min(len(source), max(1, max_tokens // length)) if max_tokens else len(source)
    return EvaluationWindows(source, batch_size, count)


def shuffled(index: np.ndarray, epoch: int, count: int, seed: int) -> np.ndarray:
    """Returns where `index` stands in the order of `epoch`: for each epoch a bijection of range(count).

    A Feistel network over pairs of numbers below the root of `count`, walked on from the few values out of range: any
    element costs the same, nothing is stored, and it is the same on every machine and with every NumPy.

    Args:
      index: int64[n], 0 <= index < count.
    Returns:
      int64[n].
    """
    side = np.uint64(math.isqrt(count - 1) + 1)
    keys = _keys(seed, epoch)
    value = index.astype(np.uint64)
    outside = slice(None)
    while True:
        left, right = np.divmod(value[outside], side)
        for add, multiply in keys:
            mixed = (right + add) * multiply  # wraps around
            mixed ^= mixed >> _HALF
            mixed *= multiply
            left, right = right, (left + (mixed >> _HALF)) % side
        value[outside] = left * side + right
        outside = np.flatnonzero(value >= count)
        if not outside.size:
            return value.astype(np.int64)


_HALF = np.uint64(32)


@functools.lru_cache(maxsize=8)
def _keys(seed: int, epoch: int) -> list[tuple[np.uint64, np.uint64]]:
    """Returns (addend, odd multiplier) of each round."""
    content = hashlib.sha512(f"{seed} {epoch}".encode()).digest() + hashlib.sha512(f"{epoch} {seed}".encode()).digest()
    words = [np.uint64(int.from_bytes(content[8 * i : 8 * i + 8], "little")) for i in range(2 * ROUNDS)]
    return [(words[2 * turn], words[2 * turn + 1] | np.uint64(1)) for turn in range(ROUNDS)]
