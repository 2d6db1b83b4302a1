"""The two losses on position vectors, for an encoding inside a model of one's own."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax.config import ContrastiveConfig, DistillationConfig, ObjectiveConfig
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError
from seqpe_jax.losses.train_loss import TrainLoss
from seqpe_jax.models.build import ModelSpec


def position_losses(
    encoding: SeqPE,
    params: Mapping[str, Any],
    key: jax.Array,
    step: jax.Array | int,
    *,
    window: int | tuple[int, ...],
    max_position: int = 0,
    causal: bool = True,
    settings: ObjectiveConfig | None = None,
) -> dict[str, jax.Array]:
    """Returns the losses that shape the space of vectors; without them SeqPE does not extrapolate.

        loss = task_loss + 0.1 * sum(position_losses(encoding, params, key, step, window=64).values())

    Positions are drawn anew in each step, a pure function of the key and the step.

    Args:
      encoding: in mode "attn_scalar", as `SeqPE.for_model` makes it, or another with losses on vectors in `settings`.
      params: variables of the encoding, {"params": ...}, as its `init` returns them.
      key: of the training run; step: int32[], the optimiser step.
      window: positions that the model trains on, or the sides of a grid.
      max_position: coordinates are drawn below; 0 = all that the digits can write.
      causal: pivots are compared with positions before them, as causal attention sees them; not on grids.
      settings: of the draws and the losses; None = the recipe of `configs/stdlib_lm.py`. Weights are not applied, but a
        term whose weight is 0 is left out.

    Returns:
      {"contrastive": float32[], near positions have near vectors; "distillation": float32[], vectors far out relate to each
      other as those of the window do}, in nats.

    Raises:
      InputError: the window has other axes than the encoding, or does not fit below max_position.
    """
    shape = (window,) if isinstance(window, int) else tuple(window)
    reach = max_position or encoding.base**encoding.digits
    if len(shape) != encoding.axes:
        raise InputError(f"window has {len(shape)} axes and the encoding {encoding.axes}: give a side for each")
    if reach < 2 * max(shape):
        raise InputError(
            f"a window of {max(shape)} leaves no room for positions far out below {reach}: give the encoding more "
            "digits, or raise max_position"
        )
    if settings is None:
        text = causal and len(shape) == 1
        settings = ObjectiveConfig(
            contrastive=ContrastiveConfig(
                batch=4,
                candidates=16,
                window=min(256, reach // 4),
                around_anchor=True,
                causal_only=text,
                space="logits",
            ),
            distillation=DistillationConfig(batch=4, offsets=min(16, *shape)),
        )
    heads = encoding.heads_model if encoding.per_head else None
    example = jax.ShapeDtypeStruct((1, *shape), jnp.int32)
    model_spec = ModelSpec(encoding, None, example, shape, reach, encoding.base, heads)
    train_loss = TrainLoss(model_spec, None, settings)
    sampled = train_loss.sample(key, jnp.asarray(step, jnp.int32))
    return train_loss.signal_and_terms(params["params"], sampled, jax.random.fold_in(key, step))[1]
