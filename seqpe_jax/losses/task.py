"""What the model is trained for: the next token, or the class of an image; the loss is a cross-entropy."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.losses.mixing import mix_images

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]

LOGIT_BLOCK = 512  # places whose logits evaluation holds at once


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """Every next token. A batch: {"tokens": int32[B, L + 1]}, and optionally "weights" float32[B, L]."""

    def weight(self, batch: Batch) -> jax.Array:
        """Returns by how much a batch counts in a mean over batches, float32[]: its counted tokens."""
        if "weights" in batch:
            return batch["weights"].sum()
        return jnp.float32(batch["tokens"].shape[0] * (batch["tokens"].shape[1] - 1))

    def loss(self, apply: Callable[[jax.Array], jax.Array], batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the mean loss (nats per token) and further metrics of a model as it is trained.

        Args:
          apply: int32[B, L] -> logits float32[B, L, V]; key: of what the task itself draws.
        """
        return cross_entropy(apply(batch["tokens"][:, :-1]), batch["tokens"][:, 1:], batch.get("weights"))[0], {}

    def eval_step(
        self, network: nn.Module, variables: Any, signal: PositionSignal, batch: Batch
    ) -> dict[str, jax.Array]:
        """Returns {"loss": each token's loss, float32[B, L] in nats}, without dropout."""
        hidden_BLD = network.apply(variables, batch["tokens"][:, :-1], signal, method="hidden")
        logits_of = functools.partial(network.apply, variables, method="logits")
        return {"loss": blockwise_token_losses(logits_of, hidden_BLD, batch["tokens"][:, 1:], LOGIT_BLOCK)}


@dataclasses.dataclass(frozen=True)
class ClassificationLoss:
    """The class of an image or clip. A batch: {"images": float32[B, sides..., C], "labels": int32[B]}.

    Attributes:
      label_smoothing: share of the target that is spread over all classes; mixing: see `objectives.mixing.mix_images`.
    """

    label_smoothing: float
    mixing: Any

    def weight(self, batch: Batch) -> jax.Array:
        """Returns by how much a batch counts in a mean over batches, float32[]: its images."""
        return jnp.float32(batch["labels"].shape[0])

    def loss(self, apply: Callable[[jax.Array], jax.Array], batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns the mean loss (nats per image) and, where images are not mixed, the share of right answers.

        Args:
          apply: float32[B, sides..., C] -> logits float32[B, V]; key: of the mixture.
        """
        images, labels_B = batch["images"], batch["labels"]
        mixed = self.mixing.mixup or self.mixing.cutmix
        partner_B, share_B = labels_B, 1.0
        if mixed:
            images, partner_B, share_B = mix_images(
                key, images, labels_B, mixup=self.mixing.mixup, cutmix=self.mixing.cutmix, switch=self.mixing.switch
            )
        logits_BV = apply(images)
        own = cross_entropy(logits_BV, labels_B, label_smoothing=self.label_smoothing)[1]
        if not mixed:
            return own.mean(), {"accuracy": (ranks(logits_BV, labels_B) == 0).mean()}
        other = cross_entropy(logits_BV, partner_B, label_smoothing=self.label_smoothing)[1]
        return (share_B * own + (1 - share_B) * other).mean(), {}

    def eval_step(
        self, network: nn.Module, variables: Any, signal: PositionSignal, batch: Batch
    ) -> dict[str, jax.Array]:
        """Returns {"loss": float32[B] in nats, "rank": int32[B] as of `ranks`}."""
        logits_BV = network.apply(variables, batch["images"], signal)
        return {"loss": cross_entropy(logits_BV, batch["labels"])[1], "rank": ranks(logits_BV, batch["labels"])}


def ranks(logits_BV: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Returns how many classes score above the true one, int32[B].

    Of equal classes the lower one comes first, as `argmax` has it. A class whose logit is NaN comes before all others, as
    in PyTorch's `topk`, but where the true one's is, nothing is right: its rank is beyond every k.
    """
    true_B1 = jnp.take_along_axis(logits_BV, labels_B[:, None], axis=-1)
    earlier = jnp.arange(logits_BV.shape[-1]) < labels_B[:, None]
    ahead = (logits_BV > true_B1) | (logits_BV == true_B1) & earlier | jnp.isnan(logits_BV)
    return jnp.where(jnp.isnan(true_B1[:, 0]), jnp.iinfo(jnp.int32).max, ahead.sum(axis=-1, dtype=jnp.int32))


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns (mean loss, losses) in nats.

    Args:
      logits: float[..., V]; labels: int32[...]; weights: float[...], elements count by it in the mean, which is 0 where
        none counts. label_smoothing: that share of the target is spread over all classes.
    """
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * jax.nn.log_softmax(logits).mean(axis=-1)
    if weights is None:
        return losses.mean(), losses
    total = weights.sum()
    return (losses * weights).sum() / jnp.where(total > 0, total, 1.0), losses


def blockwise_token_losses(
    logits_of: Callable[[jax.Array], jax.Array], hidden_BLD: jax.Array, targets_BL: jax.Array, block: int
) -> jax.Array:
    """Returns each token's loss, float32[B, L], with the logits of only `block` places in memory at a time."""
    batch, length = targets_BL.shape
    count = -(-length // block)
    padding = ((0, 0), (0, count * block - length))
    hidden = jnp.pad(hidden_BLD, (*padding, (0, 0))).reshape(batch, count, block, -1).swapaxes(0, 1)
    targets = jnp.pad(targets_BL, padding).reshape(batch, count, block).swapaxes(0, 1)

    @jax.checkpoint  # else the backward pass would keep the logits of every block
    def losses_of(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(logits_of(hidden), targets)[1]

    losses = jax.lax.map(lambda part: losses_of(*part), (hidden, targets))
    return losses.swapaxes(0, 1).reshape(batch, -1)[:, :length]
