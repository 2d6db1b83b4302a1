"""Cross-entropy from hidden states, block by block of tokens, so that the logits of all tokens are never in memory.

The vocabulary is split over the devices that share the stored parameters (mesh axes tensor, fsdp and context): for each block they
gather each other's hidden states instead of the output embedding, whose gradient is summed over `data` once, after the last
block. Loss and gradients are computed in the same pass, so that no logits are computed twice.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax import axes
from seqpe_jax.axes import (
    BATCH,
    LENGTH,
    OUTER_TOKENS,
    PARAM_SHARDS,
    VOCABULARY,
    VOCABULARY_SHARDS,
    shards,
    with_logical_constraint,
)
from seqpe_jax.models.attention_inputs import cap_logits, cap_slope

Scaling = tuple[float, float]
UNSCALED: Scaling = (1.0, 0.0)
LOGITS_PER_BLOCK = 2**25  # of a device, float32: 128 MiB


def fit_one_block(batch: int, length: int, vocabulary: int) -> bool:
    """Returns whether the logits of all tokens of a device take at most the memory of a block.

    Args:
      batch: samples of all devices.
      length: tokens of a sample.
      vocabulary: rows of the output embedding.
    """
    devices = shards(BATCH) * shards(LENGTH) * shards(VOCABULARY)
    return batch * length * vocabulary <= LOGITS_PER_BLOCK * devices


def token_losses(
    hidden_BLD: jax.Array, embedding_VD: jax.Array, targets_BL: jax.Array, scaling: Scaling = UNSCALED
) -> jax.Array:
    """Returns the cross-entropy of each token, float32[B, L] in nats, without gradients.

    Args:
      hidden_BLD: final states.
      embedding_VD: float32, output embedding as stored; logits are its products with the states, in their dtype.
      targets_BL: int32, below V.
      scaling: factor of these products, and the cap of the logits after it, 0 = none (`Decoder.logit_scaling`).
    """
    return _on_devices(hidden_BLD, embedding_VD, targets_BL, jnp.zeros(()), scaling, gradients=False)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_loss(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    scaling: Scaling = UNSCALED,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns (loss, squares): the weighted sums of the cross-entropies of all tokens, and of their squared normalizers.

    Both are float32[]. A token's normalizer is the logarithm of the softmax's denominator. The loss has the gradient of
    loss + z_loss * squares, so that both come from one pass, and the squares have none.

    Args:
      hidden_BLD, embedding_VD, targets_BL, scaling: as in `token_losses`.
      weights_BL: float32, without gradient.
      z_loss: weight of the squares, which are 0 if it is.
    """
    losses = _on_devices(hidden_BLD, embedding_VD, targets_BL, weights_BL, scaling, gradients=False, z_loss=z_loss)
    return _weighted_sums(losses, weights_BL)


def _weighted_sums(losses: Sequence[jax.Array], weights_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what `weighted_loss` does, of the losses of tokens, and their normalizers if there are some."""
    losses_BL, *normalizers = losses
    squares = (jnp.square(normalizers[0]) * weights_BL).sum() if normalizers else jnp.zeros(())
    return (losses_BL * weights_BL).sum(), squares


def _forward(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    scaling: Scaling,
    z_loss: float,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    found = _on_devices(hidden_BLD, embedding_VD, targets_BL, weights_BL, scaling, gradients=True, z_loss=z_loss)
    return _weighted_sums(found[:-2], weights_BL), found[-2:]


def _backward(
    scaling: Scaling, z_loss: float, gradients: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    del scaling, z_loss
    (d_hidden_BLD, d_embedding_VD), d_loss = gradients, cotangents[0]
    return (d_loss * d_hidden_BLD).astype(d_hidden_BLD.dtype), d_loss * d_embedding_VD, None, None


weighted_loss.defvjp(_forward, _backward)


def _on_devices(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    scaling: Scaling,
    gradients: bool,
    z_loss: float = 0.0,
) -> tuple[jax.Array, ...]:
    """Returns float32[B, L], the losses, with z_loss also the normalizers, and the gradients of their weighted sum.

    Gradients: [B, L, D] of the states, float32[V, D] of the embedding; see `weighted_loss`.
    """
    batch, length, width = hidden_BLD.shape
    vocabulary = len(embedding_VD)
    weights_BL = jnp.broadcast_to(weights_BL, targets_BL.shape)
    rows, columns = -batch % shards(BATCH), -length % shards(LENGTH)

    def pad(array: jax.Array) -> jax.Array:
        return jnp.pad(array, ((0, rows), (0, columns), *((0, 0),) * (array.ndim - 2)))

    hidden_BLD, targets_BL, weights_BL = pad(hidden_BLD), pad(targets_BL), pad(weights_BL)
    # Padded as stored, where rows of the embedding are together, then split over the vocabulary: an all-to-all.
    embedding_VD = with_logical_constraint(embedding_VD.astype(hidden_BLD.dtype), VOCABULARY, PARAM_SHARDS)
    embedding_VD = jnp.pad(embedding_VD, ((0, -vocabulary % shards(VOCABULARY_SHARDS)), (0, 0)))
    embedding_VD = with_logical_constraint(embedding_VD, VOCABULARY_SHARDS, None)
    states, tokens, table = (BATCH, LENGTH, None), (BATCH, LENGTH), (VOCABULARY_SHARDS, None)
    logits = targets_BL.size * len(embedding_VD) // (shards(BATCH) * shards(LENGTH) * shards(VOCABULARY))
    least, count = math.ceil(logits / LOGITS_PER_BLOCK), targets_BL.size // (shards(BATCH) * shards(LENGTH))
    # Without padding where possible.
    num_blocks = next((number for number in range(least, 2 * least) if count % number == 0), least)
    results = axes.shard_map(
        functools.partial(
            _on_device,
            vocabulary=vocabulary,
            num_blocks=num_blocks,
            scaling=scaling,
            gradients=gradients,
            z_loss=z_loss,
        ),
        (hidden_BLD, embedding_VD, targets_BL, weights_BL),
        (states, table, tokens, tokens),
        results=(*(tokens,) * (2 if z_loss else 1), *((states, table) if gradients else ())),
    )
    if not gradients:
        return tuple(values_BL[:batch, :length] for values_BL in results)
    *of_tokens, d_embedding_VD = results
    d_embedding_VD = with_logical_constraint(d_embedding_VD, VOCABULARY, PARAM_SHARDS)[:vocabulary]
    return *(values[:batch, :length] for values in of_tokens), d_embedding_VD


def _on_device(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    *,
    vocabulary: int,
    num_blocks: int,
    scaling: Scaling,
    gradients: bool,
    z_loss: float,
) -> tuple[jax.Array, ...]:
    """Returns what `_on_devices` does, of the shards of one device."""
    batch, length, width = hidden_BLD.shape
    count = batch * length
    block = math.ceil(count / num_blocks)

    def blocks(array: jax.Array) -> jax.Array:
        flat = array.reshape(count, *array.shape[2:])
        padded = jnp.pad(flat, ((0, num_blocks * block - count), *((0, 0),) * (flat.ndim - 1)))
        return padded.reshape(num_blocks, block, *flat.shape[1:])

    def add_block(d_embedding_VD: jax.Array | None, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array | None, Any]:
        of_tokens, d_block_VD = _block_terms(*inputs, embedding_VD, vocabulary, scaling, gradients, z_loss)
        total = d_embedding_VD if d_block_VD is None else d_embedding_VD + d_block_VD
        return total, of_tokens

    zeros = jnp.zeros(embedding_VD.shape, jnp.float32) if gradients else None
    targets_NT, weights_NT = (axes.all_gather(blocks(array), PARAM_SHARDS, 1) for array in (targets_BL, weights_BL))
    arrays = (blocks(hidden_BLD), targets_NT, weights_NT)
    d_embedding_VD, of_blocks = jax.lax.scan(add_block, zeros, arrays)
    of_tokens = tuple(
        values.reshape(-1, *values.shape[2:])[:count].reshape(batch, length, *values.shape[2:]) for values in of_blocks
    )
    return (*of_tokens, axes.psum(d_embedding_VD, OUTER_TOKENS)) if gradients else of_tokens


def _block_terms(
    hidden_TD: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    embedding_VD: jax.Array,
    vocabulary: int,
    scaling: Scaling,
    gradients: bool,
    z_loss: float,
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Returns (values of this device's tokens, gradient of the embedding float32[V, D]) of a block.

    The values: losses float32[T], with z_loss also normalizers float32[T], and the gradient of the states [T, D].

    Args:
      hidden_TD: states of this device's tokens.
      targets_T, weights_T: of the tokens of all devices that share the vocabulary.
      embedding_VD: rows of this device; so is their gradient, which comes from the tokens of these devices.
      vocabulary: rows of all devices without padding.
      scaling: see `token_losses`.
      gradients: False = neither gradient, None in place of the embedding's.
      z_loss: see `weighted_loss`.
    """
    own, dtype = len(hidden_TD), hidden_TD.dtype
    hidden_TD = axes.all_gather(hidden_TD, PARAM_SHARDS)
    logits_TV = jnp.einsum("td,vd->tv", hidden_TD, embedding_VD, preferred_element_type=jnp.float32)
    multiplier, cap = scaling
    logits_TV = capped_TV = cap_logits(logits_TV if multiplier == 1.0 else logits_TV * multiplier, cap)
    ids_V = axes.shard_index(VOCABULARY_SHARDS) * len(embedding_VD) + jnp.arange(len(embedding_VD))
    logits_TV = jnp.where(ids_V < vocabulary, logits_TV, -jnp.inf)  # rows that pad the embedding
    max_T = axes.pmax(logits_TV.max(axis=-1), VOCABULARY_SHARDS)
    exp_TV = jnp.exp(logits_TV - max_T[:, None])
    is_target_TV = ids_V == targets_T[:, None]
    sums = exp_TV.sum(axis=-1), jnp.where(is_target_TV, logits_TV, 0.0).sum(axis=-1)
    sum_T, target_T = axes.psum(jnp.stack(sums), VOCABULARY_SHARDS)
    normalizers_T = max_T + jnp.log(sum_T)
    values = (normalizers_T - target_T, normalizers_T) if z_loss else (normalizers_T - target_T,)
    first = axes.shard_index(PARAM_SHARDS) * own
    values = tuple(jax.lax.dynamic_slice_in_dim(values_T, first, own) for values_T in values)
    if not gradients:
        return values, None
    softmax_TV = exp_TV / sum_T[:, None]
    if z_loss:
        softmax_TV *= 1.0 + 2.0 * z_loss * normalizers_T[:, None]
    d_logits_TV = weights_T[:, None] * (softmax_TV - is_target_TV)
    if scaling != UNSCALED:
        d_logits_TV *= multiplier * cap_slope(capped_TV, cap)
    d_logits_TV = d_logits_TV.astype(dtype)
    d_hidden_TD = axes.psum(axes.matmul_reduce_scatter(d_logits_TV, embedding_VD, PARAM_SHARDS), VOCABULARY)
    d_embedding_VD = jnp.einsum("tv,td->vd", d_logits_TV, hidden_TD, preferred_element_type=jnp.float32)
    return (*values, d_hidden_TD), d_embedding_VD
