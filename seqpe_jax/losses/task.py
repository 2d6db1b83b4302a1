"""Task losses: cross-entropy of the next token or of the class of an image."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.losses import blockwise
from seqpe_jax.losses.image_input import model_images
from seqpe_jax.losses.image_mixing import mix_images

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]
Z_TERM = "term/z_loss"  # metric of the squared normalizers
TOP_CLASSES = 5  # likeliest classes of an image that an evaluation returns


@dataclasses.dataclass(frozen=True)
class NetworkCall:
    """A network with its parameters and position signal.

    Attributes:
      network: module of (inputs, signal) -> logits.
      variables: {"params": ...} of the network.
      signal: PositionSignal of the inputs.
      options: further arguments of the network, such as those of dropout.
    """

    network: nn.Module
    variables: Any
    signal: PositionSignal
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns logits: float32[B, L, V] of tokens int32[B, L], [B, V] of images float32[B, sides..., C]."""
        return self.network.apply(self.variables, inputs, self.signal, **self.options)

    def hidden(self, tokens_BL: jax.Array) -> jax.Array:
        """Returns the final states of tokens, [B, L, D]."""
        return self.network.apply(self.variables, tokens_BL, self.signal, **self.options, method="hidden")

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """Returns the logits of final states, float32[B, L, V]."""
        return self.network.apply(self.variables, hidden_BLD, method="logits")

    def logit_embedding(self) -> jax.Array:
        """Returns the embedding whose products with final states become the logits, float32[V, D] as stored."""
        return self.network.apply(self.variables, method="logit_embedding")

    @property
    def logit_scaling(self) -> blockwise.Scaling:
        """Factor and cap of these products."""
        return self.network.logit_scaling()


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents in windows of tokens (`data.packing`).

    Attributes:
      end: id of the token that ends a document.
      reset_fields: fields of the position signal that begin anew in each document; () = positions continue.
    """

    end: int
    reset_fields: tuple[str, ...] = ()

    def signal(self, signal: PositionSignal, tokens_BL: jax.Array) -> PositionSignal:
        """Returns the signal of windows of tokens, whose attention stays in a document."""
        token_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
        begins_BL = jnp.pad(tokens_BL[:, :-1] == self.end, ((0, 0), (1, 0)))
        documents_BL = jnp.cumsum(begins_BL, axis=1, dtype=jnp.int32)
        index_BL = token_L - jax.lax.cummax(jnp.where(begins_BL, token_L, 0), axis=1)
        return signal.in_documents(documents_BL, index_BL, self.reset_fields)

    def counts(self, tokens_BL: jax.Array) -> jax.Array:
        """Returns whether the prediction after each token counts, bool[B, L]: it is of the same document."""
        return tokens_BL != self.end


@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """Language modeling. A batch is {"tokens": int32[B, L + 1]}, optionally with "weights": float32[B, L].

    Attributes:
      documents: attention stays in a document, and a document's first token is not predicted; None = windows are read as one.
      z_loss: weight of the squared normalizers, which `TrainLoss` adds; 0 = they are not computed.
    """

    documents: Documents | None = None
    z_loss: float = 0.0

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the weight of a batch in a mean over batches, float32[]: its weighted number of target tokens."""
        weights_BL = self._weights(batch)
        if weights_BL is not None:
            return weights_BL.sum()
        return jnp.float32(batch["tokens"].shape[0] * (batch["tokens"].shape[1] - 1))

    def _weights(self, batch: Batch) -> jax.Array | None:
        """Weights of the targets, float32[B, L]; None = all weigh 1."""
        weights_BL = batch.get("weights")
        if self.documents is None:
            return weights_BL
        counts_BL = self.documents.counts(batch["tokens"][:, :-1]).astype(jnp.float32)
        return counts_BL if weights_BL is None else counts_BL * weights_BL

    def _in_documents(self, network: NetworkCall, tokens_BL: jax.Array) -> NetworkCall:
        if self.documents is None:
            return network
        return dataclasses.replace(network, signal=self.documents.signal(network.signal, tokens_BL))

    def model_inputs(self, batch: Batch, key: jax.Array) -> Batch:
        """Returns the batch as the network reads it: as it is."""
        del key
        return batch

    def loss(self, network: NetworkCall, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns (mean loss in nats per token, {Z_TERM: float32[], mean of squared normalizers} with `z_loss`).

        Logits that do not fit into one block (`blockwise.fit_one_block`) are computed block by block.

        Args:
          network: the model with dropout.
          batch: see the class.
          key: unused.
        """
        inputs_BL, targets_BL = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        hidden_BLD, weights_BL = self._in_documents(network, inputs_BL).hidden(inputs_BL), self._weights(batch)
        if blockwise.fit_one_block(*targets_BL.shape, len(network.logit_embedding())):
            logits_BLV = network.logits(hidden_BLD)
            return cross_entropy(logits_BLV, targets_BL, weights_BL)[0], self._terms(
                lambda: mean_square_normalizer(logits_BLV, weights_BL)
            )
        if weights_BL is None:
            weights_BL = jnp.ones(targets_BL.shape, jnp.float32)
        weights_BL = weights_BL / _total_weight(weights_BL)
        arguments = (hidden_BLD, network.logit_embedding(), targets_BL, weights_BL, network.logit_scaling, self.z_loss)
        loss, squares = blockwise.weighted_loss(*arguments)
        return loss, self._terms(lambda: squares)

    def _terms(self, squares: Callable[[], jax.Array]) -> Metrics:
        return {Z_TERM: squares()} if self.z_loss else {}

    def eval_step(
        self, network: nn.Module, variables: Any, signal: PositionSignal, batch: Batch
    ) -> dict[str, jax.Array]:
        """Returns {"loss": float32[B, L]}, the loss of each token in nats, without dropout."""
        inputs_BL, targets_BL = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        call = self._in_documents(NetworkCall(network, variables, signal), inputs_BL)
        hidden_BLD = call.hidden(inputs_BL)
        if blockwise.fit_one_block(*targets_BL.shape, len(call.logit_embedding())):
            return {"loss": cross_entropy(call.logits(hidden_BLD), targets_BL)[1]}
        arguments = (hidden_BLD, call.logit_embedding(), targets_BL, call.logit_scaling)
        return {"loss": blockwise.token_losses(*arguments)}


@dataclasses.dataclass(frozen=True)
class OutputLoss(NextTokenLoss):
    """Outputs at given tokens. A batch is {"tokens": int32[B, L], "targets": int32[B, L], "weights": float32[B, L]}.

    The target of a token is its own output, which is what the logits at its index predict; "padding": bool[B, L] are tokens
    that no other attends to, in a batch of attention in both directions.
    """

    def loss(self, network: NetworkCall, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns (mean loss in nats by weight, {"accuracy": share of the right outputs}).

        Args:
          network: the model with dropout.
          batch: see the class.
          key: unused.
        """
        call = dataclasses.replace(network, signal=_with_padding(network.signal, batch))
        logits_BLV = call.logits(call.hidden(batch["tokens"]))
        right_BL = logits_BLV.argmax(axis=-1) == batch["targets"]
        accuracy = (right_BL * batch["weights"]).sum() / _total_weight(batch["weights"])
        return cross_entropy(logits_BLV, batch["targets"], batch["weights"])[0], {"accuracy": accuracy}

    def eval_step(
        self, network: nn.Module, variables: Any, signal: PositionSignal, batch: Batch
    ) -> dict[str, jax.Array]:
        """Returns {"loss": float32[B, L] in nats, "right": bool[B, L]} of each token's output, without dropout."""
        call = NetworkCall(network, variables, _with_padding(signal, batch))
        logits_BLV = call.logits(call.hidden(batch["tokens"]))
        losses_BL = cross_entropy(logits_BLV, batch["targets"])[1]
        return {"loss": losses_BL, "right": logits_BLV.argmax(axis=-1) == batch["targets"]}


def _with_padding(signal: PositionSignal, batch: Batch) -> PositionSignal:
    """The signal in which padding, if there is some, is a document of its own."""
    return signal.replace(documents=batch["padding"].astype(jnp.int32)) if "padding" in batch else signal


@dataclasses.dataclass(frozen=True)
class ClassificationLoss:
    """Classification of images or videos. A batch is {"images": [B, sides..., C], "labels": int32[B]}.

    Images are uint8, with further arrays in training (`image_input.model_images`), or normalized float32.

    Attributes:
      label_smoothing: share of the target that is spread over all classes.
      mixing: `objective.mixing` section of the config, see `image_mixing.mix_images`.
      mean: per channel in 0..1, of uint8 images.
      std: per channel in 0..1, of uint8 images.
      z_loss: weight of the squared normalizers, which `TrainLoss` adds; 0 = they are not computed.
    """

    label_smoothing: float
    mixing: Any
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    z_loss: float = 0.0

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the weight of a batch in a mean over batches, float32[]: its number of images."""
        return jnp.float32(batch["labels"].shape[0])

    def model_inputs(self, batch: Batch, key: jax.Array) -> Batch:
        """Returns the training batch as the network reads it: normalized float32 images, flipped and erased."""
        return model_images(batch, self.mean, self.std, key)

    def loss(self, apply: Callable[[jax.Array], jax.Array], batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Returns (mean loss in nats per image, {"accuracy": float32[]} unless images are mixed, Z_TERM with `z_loss`).

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
        terms = {Z_TERM: mean_square_normalizer(logits_BV)} if self.z_loss else {}
        losses_B = cross_entropy(logits_BV, labels_B, label_smoothing=self.label_smoothing)[1]
        if not mixed:
            return losses_B.mean(), terms | {"accuracy": (ranks(logits_BV, labels_B) == 0).mean()}
        other_losses_B = cross_entropy(logits_BV, other_labels_B, label_smoothing=self.label_smoothing)[1]
        return (proportion * losses_B + (1 - proportion) * other_losses_B).mean(), terms

    def eval_step(
        self, network: nn.Module, variables: Any, signal: PositionSignal, batch: Batch
    ) -> dict[str, jax.Array]:
        """Returns what is measured of each image, without dropout.

        Returns:
          {"loss": float32[B] in nats, "rank": int32[B], see `ranks`, "labels": int32[B], "classes": int32[B, K], the
          likeliest classes, and "probabilities": float32[B, K], with K = `TOP_CLASSES` or all classes}.
        """
        logits_BV = network.apply(variables, model_images(batch, self.mean, self.std)["images"], signal)
        return {
            "loss": cross_entropy(logits_BV, batch["labels"])[1],
            "rank": ranks(logits_BV, batch["labels"]),
            "labels": batch["labels"],  # also of the rows that another process reads
            **likeliest_classes(logits_BV),
        }


def likeliest_classes(logits_BV: jax.Array, count: int = TOP_CLASSES) -> dict[str, jax.Array]:
    """Returns {"classes": int32[B, K], "probabilities": float32[B, K]}, K = `count` or all classes, the likeliest first."""
    probabilities_BV = jax.nn.softmax(logits_BV.astype(jnp.float32))
    probabilities_BK, classes_BK = jax.lax.top_k(probabilities_BV, min(count, logits_BV.shape[-1]))
    return {"classes": classes_BK, "probabilities": probabilities_BK}


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
    return (losses * weights).sum() / _total_weight(weights), losses


def mean_square_normalizer(logits: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Returns the mean of the squared logarithms of the softmax's denominators, float32[]; arguments as `cross_entropy`."""
    squares = jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1))
    return squares.mean() if weights is None else (squares * weights).sum() / _total_weight(weights)


def _total_weight(weights: jax.Array) -> jax.Array:
    """Returns the sum of weights, or 1 where all are 0."""
    total = weights.sum()
    return jnp.where(total > 0, total, 1.0)
