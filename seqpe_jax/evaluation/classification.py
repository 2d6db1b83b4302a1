"""Top-1 and top-5 accuracy of a classifier over a split."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def accuracy(
    eval_step: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    batches: Any,
    *,
    size: tuple[int, ...],
    put: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Returns {"size", "examples", "loss", "top1", "top5"}: nats, and percent of the examples.

    Args:
      size: (height, width), or (frames, height, width) of clips.
      examine: a batch -> {"loss": float32[B] in nats, "rank": int32[B], classes ahead of the true one}.
      batches: {"images", "labels", "weights": float32[B]}; weight 0 marks padding rows.
      put: lays a host batch out over the devices.
      progress: called with the examples done.
    """
    loss, ranks = 0.0, []
    pending = None

    def add(found: dict[str, jax.Array], weights_B: np.ndarray) -> None:
        nonlocal loss
        real_B = weights_B > 0
        loss += float(np.asarray(found["loss"], np.float64)[real_B].sum())
        ranks.extend(np.asarray(found["rank"])[real_B].tolist())
        progress(len(ranks))

    for batch in batches:
        found = eval_step(put({name: batch[name] for name in ("images", "labels")}))
        if pending is not None:
            add(*pending)
        pending = (found, batch["weights"])
    if pending is not None:
        add(*pending)
    count = len(ranks)
    return {
        "size": list(size),
        "examples": count,
        "loss": loss / count,
        "top1": 100.0 * sum(rank < 1 for rank in ranks) / count,
        "top5": 100.0 * sum(rank < 5 for rank in ranks) / count,
    }
