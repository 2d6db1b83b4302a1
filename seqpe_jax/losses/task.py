"""Task losses: cross-entropy of the next token or of the class of an image."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.losses.image_input import model_images
from seqpe_jax.losses.image_mixing import mix_images

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]

LOGIT_BLOCK = 512  # tokens whose logits are in memory at a time in evaluation


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """Language modeling. A batch is {"tokens": int32[B, L + 1]}, optionally with "weights": float32[B, L]."""

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the weight of a batch in a mean over batches, float32[]: its weighted number of target tokens."""
        if "weights" in batch:
            return batch["weights"].sum()
        return jnp.float32(batch["tokens"].shape[0] * (batch["tokens"].shape[1] - 1))

    def model_inputs(self, batch: Batch, key: jax.Array) -> Batch:
        """Returns the batch as the network reads it: as it is."""
        del key
        return batch

    def loss(self, apply: Callable[[jax.Array], jax.Array], batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns (mean loss in nats per token, no metrics).

        Args:
          apply: the model with dropout, int32[B, L] -> logits float32[B, L, V].
          batch: see the class.
          key: unused.
        """
        logits_BLV = apply(batch["tokens"][:, :-1])
        return cross_entropy(logits_BLV, batch["tokens"][:, 1:], batch.get("weights"))[0], {}

    def eval_step(
        self, network: nn.Module, variables: Any, signal: PositionSignal, batch: Batch
    ) -> dict[str, jax.Array]:
        """Returns {"loss": float32[B, L]}, the loss of each token in nats, without dropout."""
        hidden_BLD = network.apply(variables, batch["tokens"][:, :-1], signal, method="hidden")
        logits_fn = functools.partial(network.apply, variables, method="logits")
        return {"loss": blockwise_token_losses(logits_fn, hidden_BLD, batch["tokens"][:, 1:], LOGIT_BLOCK)}


@dataclasses.dataclass(frozen=True)
class ClassificationLoss:
    """Classification of images or videos. A batch is {"images": [B, sides..., C], "labels": int32[B]}.

    Images are uint8, with further arrays in training (`image_input.model_images`), or normalized float32.

    Attributes:
      label_smoothing: share of the target that is spread over all classes.
      mixing: `objective.mixing` section of the config, see `image_mixing.mix_images`.
      mean: per channel in 0..1, of uint8 images.
      std: per channel in 0..1, of uint8 images.
    """

    label_smoothing: float
    mixing: Any
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the weight of a batch in a mean over batches, float32[]: its number of images."""
        return jnp.float32(batch["labels"].shape[0])

    def model_inputs(self, batch: Batch, key: jax.Array) -> Batch:
        """Returns the training batch as the network reads it: normalized float32 images, flipped and erased."""
        return model_images(batch, self.mean, self.std, key)

    def loss(self, apply: Callable[[jax.Array], jax.Array], batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns (mean loss in nats per image, {"accuracy": float32[]} unless images are mixed).

        Args:
          apply: the model with dropout, float32[B, sides..., C] -> logits float32[B, V].
          batch: batch of `model_inputs`.
          key: PRNG key of mixup and cutmix.
        """
        images, labels_B = batch["images"], batch["labels"]
        mixed = self.mixing.mixup or self.mixing.cutmix
        other_labels_B, proportion = labels_B, 1.0
        if mixed:
            images, other_labels_B, proportion = mix_images(
                key, images, labels_B, mixup=self.mixing.mixup, cutmix=self.mixing.cutmix, switch=self.mixing.switch
            )
        logits_BV = apply(images)
        losses_B = cross_entropy(logits_BV, labels_B, label_smoothing=self.label_smoothing)[1]
        if not mixed:
            return losses_B.mean(), {"accuracy": (ranks(logits_BV, labels_B) == 0).mean()}
        other_losses_B = cross_entropy(logits_BV, other_labels_B, label_smoothing=self.label_smoothing)[1]
        return (proportion * losses_B + (1 - proportion) * other_losses_B).mean(), {}

    def eval_step(
        self, network: nn.Module, variables: Any, signal: PositionSignal, batch: Batch
    ) -> dict[str, jax.Array]:
        """Returns {"loss": float32[B] in nats, "rank": int32[B], see `ranks`}, without dropout."""
        logits_BV = network.apply(variables, model_images(batch, self.mean, self.std)["images"], signal)
        return {"loss": cross_entropy(logits_BV, batch["labels"])[1], "rank": ranks(logits_BV, batch["labels"])}


def ranks(logits_BV: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Returns the number of classes that score above the true class, int32[B].

    Ties go to the lower class, as in `argmax`. A NaN logit scores above all others, as in PyTorch's `topk`; a NaN logit of
    the true class is never right: its rank is beyond every k.
    """
    true_B1 = jnp.take_along_axis(logits_BV, labels_B[:, None], axis=-1)
    lower_class = jnp.arange(logits_BV.shape[-1]) < labels_B[:, None]
    above = (logits_BV > true_B1) | (logits_BV == true_B1) & lower_class | jnp.isnan(logits_BV)
    return jnp.where(jnp.isnan(true_B1[:, 0]), jnp.iinfo(jnp.int32).max, above.sum(axis=-1, dtype=jnp.int32))


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns (mean loss float32[], losses float32[...]) in nats.

    Args:
      logits: float[..., V].
      labels: int32[...].
      weights: float[...] of the elements in the mean, which is 0 if all weights are 0.
      label_smoothing: share of the target that is spread over all classes.
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
    logits_fn: Callable[[jax.Array], jax.Array], hidden_BLD: jax.Array, targets_BL: jax.Array, block: int
) -> jax.Array:
    """Returns the loss of each token, float32[B, L] in nats, with the logits of one block of tokens in memory at a time.

    Args:
      logits_fn: hidden states [B, block, D] -> logits [B, block, V].
      hidden_BLD: last hidden states.
      targets_BL: int32.
      block: tokens of an example in a block.
    """
    batch, length = targets_BL.shape
    num_blocks = -(-length // block)
    padding = ((0, 0), (0, num_blocks * block - length))
    hidden = jnp.pad(hidden_BLD, (*padding, (0, 0))).reshape(batch, num_blocks, block, -1).swapaxes(0, 1)
    targets = jnp.pad(targets_BL, padding).reshape(batch, num_blocks, block).swapaxes(0, 1)

    @jax.checkpoint  # otherwise the backward pass keeps the logits of every block
    def block_losses(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(hidden), targets)[1]

    losses = jax.lax.map(lambda arguments: block_losses(*arguments), (hidden, targets))
    return losses.swapaxes(0, 1).reshape(batch, -1)[:, :length]
