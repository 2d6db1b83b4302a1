"""Perplexity of a split, at any window length or under any context.

A window of L reads L tokens and predicts the L that follow its tokens one by one, so windows share one token and every
token of the split but the first is predicted once, whatever the length. A longer window is not a longer context: the mean
falls with the length for the share of tokens at a window's beginning falls. What context is worth is measured on the same
tokens under different contexts (`perplexity_in_context`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

CURVE_POINTS = 64  # points of the curve of loss by place in the window

TokenLosses = Callable[[jax.Array], jax.Array]
Put = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


def perplexity(
    token_losses: TokenLosses,
    batches: Any,
    *,
    length: int,
    put: Put,
    progress: Callable[[int], None] = lambda done: None,
    **split: int | None,
) -> dict[str, Any]:
    """Returns {"length", "tokens", "loss", "perplexity", ...} of a split (windows: `data.loader.eval_windows`).

    Args:
      token_losses: int32[B, L + 1] -> float32[B, L], nats.
      batches: {"tokens": int32[B, L + 1], "scored": bool[B, L]}; "scored" marks the targets that count.
      put: lays a host batch out over the devices.
      progress: called with the windows done.
      split: size of the whole split, as in `in_units`.
    """
    sums_L, counts_L = _by_index(token_losses, batches, length, put, progress)
    tokens = int(counts_L.sum())
    groups = np.array_split(np.arange(length), min(CURVE_POINTS, length))
    return {
        "length": length,
        "tokens": tokens,
        **in_units(float(sums_L.sum() / tokens), **split),
        "loss_by_position": {
            "position": [float(group.mean()) for group in groups],
            "loss": [float(sums_L[group].sum() / counts_L[group].sum()) for group in groups],
        },
    }


def perplexity_in_context(
    token_losses: TokenLosses,
    batches: Any,
    *,
    context: int,
    stride: int,
    put: Put,
    progress: Callable[[int], None] = lambda done: None,
    **split: int | None,
) -> dict[str, Any]:
    """Returns {"context", "targets", "stride", "loss", "perplexity", ...} (`data.loader.context_windows`).

    Args:
      context: tokens of a window; stride: targets that each of them scores, its last ones.
      token_losses, batches, put, progress, split: as in `perplexity`, with windows of `context` tokens.
    """
    sums_L, counts_L = _by_index(token_losses, batches, context, put, progress)
    targets = int(counts_L.sum())
    return {
        "context": context,
        "targets": targets,
        "stride": stride,
        **in_units(float(sums_L.sum() / targets), **split),
    }


def in_units(
    loss: float,
    *,
    tokens_of_split: int,
    bytes_of_split: int | None = None,
    words_of_split: int | None = None,
) -> dict[str, float]:
    """Returns a mean loss in nats per token as "loss", "perplexity" and, where sizes are known, other units.

    Args:
      tokens_of_split, bytes_of_split, words_of_split: size of the whole split; bits per byte and word perplexity assume
        that the part read has the split's average of tokens to a byte or word.
    """
    found = {"loss": loss, "perplexity": _exp(loss)}
    if bytes_of_split:
        found["bits_per_byte"] = loss * tokens_of_split / bytes_of_split / math.log(2)
    if words_of_split:
        found["word_perplexity"] = _exp(loss * tokens_of_split / words_of_split)
    return found


def _by_index(
    token_losses: TokenLosses, batches: Any, length: int, put: Put, progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """The scored losses, float64[L], and how many there are, int64[L], by their index in the window."""
    sums_L, counts_L = np.zeros(length, np.float64), np.zeros(length, np.int64)
    windows = 0

    def add(losses_BL: jax.Array, scored_BL: np.ndarray) -> None:
        nonlocal windows
        sums_L[:] += np.where(scored_BL, np.asarray(losses_BL, np.float64), 0.0).sum(axis=0)
        counts_L[:] += scored_BL.sum(axis=0)
        windows += int(scored_BL.any(axis=1).sum())
        progress(windows)

    pending = None  # the device computes a batch while the host adds up the one before
    for batch in batches:
        losses = token_losses(put({"tokens": batch["tokens"]})["tokens"])
        if pending is not None:
            add(*pending)
        pending = (losses, batch["scored"])
    if pending is not None:
        add(*pending)
    return sums_L, counts_L


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
