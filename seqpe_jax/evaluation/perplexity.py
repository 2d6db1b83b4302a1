"""Perplexity at any length: non-overlapping windows of a split, each token's loss, and the loss by place in the window.

A window of L reads L tokens and predicts the L that follow its tokens one by one, so windows share one token and every
token of the split but the first is predicted once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from seqpe_jax.errors import InputError

PLACES = 64  # points of the curve of loss by place in the window


def perplexity(
    token_losses: Callable[[jax.Array], jax.Array],
    batches: Any,
    *,
    length: int,
    tokens_of_split: int,
    bytes_of_split: int | None = None,
    words_of_split: int | None = None,
    put: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Returns {"length", "tokens", "loss", "perplexity", ...} of a split read in windows.

    Args:
      token_losses: int32[B, L + 1] -> float32[B, L], nats.
      batches: {"tokens": int32[B, L + 1], "weights": float32[B]}; weight 0 marks padding rows.
      tokens_of_split, bytes_of_split, words_of_split: size of the whole split; bits per byte and word perplexity
        assume that the part read has the split's average of tokens to a byte or word.
      put: lays a host batch out over the devices.
      progress: called with the windows done.
    """
    by_place = np.zeros(length, np.float64)
    windows = 0
    pending = None

    def add(losses_BL: jax.Array, weights_B: np.ndarray) -> None:
        nonlocal windows
        by_place[:] += np.asarray(losses_BL, np.float64)[weights_B > 0].sum(axis=0)
        windows += int((weights_B > 0).sum())
        progress(windows)

    for batch in batches:
        losses = token_losses(put({"tokens": batch["tokens"]})["tokens"])
        if pending is not None:
            add(*pending)
        pending = (losses, batch["weights"])
    if pending is not None:
        add(*pending)
    if not windows:
        raise InputError(f"no window of {length} tokens was read")
    tokens = windows * length
    loss = float(by_place.sum() / tokens)
    result: dict[str, Any] = {"length": length, "tokens": tokens, "loss": loss, "perplexity": _exp(loss)}
    if bytes_of_split:
        result["bits_per_byte"] = loss * tokens_of_split / bytes_of_split / math.log(2)
    if words_of_split:
        result["word_perplexity"] = _exp(loss * tokens_of_split / words_of_split)
    groups = np.array_split(np.arange(length), min(PLACES, length))
    result["loss_by_position"] = {
        "position": [float(group.mean()) for group in groups],
        "loss": [float(by_place[group].mean() / windows) for group in groups],
    }
    return result


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
