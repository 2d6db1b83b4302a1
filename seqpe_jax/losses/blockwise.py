"""Cross-entropy from hidden states, block by block of tokens, so that the logits of all tokens are never in memory.

The vocabulary is split over the devices that share the stored parameters (mesh axes tensor, fsdp and context): for each block they
gather each other's hidden states instead of the output embedding, whose gradient is summed over `data` once, after the last
block. Loss and gradients are computed in the same pass, so that no logits are computed twice.
"""

import functools
import math
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_loss(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    scaling: Scaling = UNSCALED,
) -> jax.Array:
    """Returns the weighted sum of the cross-entropies of all tokens, float32[] in nats.

    Args:
      hidden_BLD, embedding_VD, targets_BL, scaling: as in `token_losses`.
      weights_BL: float32, without gradient.
    """
    return (token_losses(hidden_BLD, embedding_VD, targets_BL, scaling) * weights_BL).sum()


def _forward(
    hidden_BLD: jax.Array, embedding_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, scaling: Scaling
) -> tuple[jax.Array, Any]:
    losses_BL, *gradients = _on_devices(hidden_BLD, embedding_VD, targets_BL, weights_BL, scaling, gradients=True)
    return (losses_BL * weights_BL).sum(), gradients


def _backward(scaling: Scaling, gradients: Any, d_loss: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    del scaling
    d_hidden_BLD, d_embedding_VD = gradients
    return (d_loss * d_hidden_BLD).astype(d_hidden_BLD.dtype), d_loss * d_embedding_VD, None, None


weighted_loss.defvjp(_forward, _backward)


def _on_devices(
    hidden_BLD: jax.Array,
    embedding_VD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    scaling: Scaling,
    gradients: bool,
) -> tuple[jax.Array, ...]:
    """Returns the losses float32[B, L], and the gradients of their weighted sum: [B, L, D] of the states, float32[V, D]."""
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
            _on_device, vocabulary=vocabulary, num_blocks=num_blocks, scaling=scaling, gradients=gradients
        ),
        (hidden_BLD, embedding_VD, targets_BL, weights_BL),
        (states, table, tokens, tokens),
        results=(tokens, states, table) if gradients else (tokens,),
    )
    losses_BL = results[0][:batch, :length]
    if not gradients:
        return (losses_BL,)
    d_embedding_VD = with_logical_constraint(results[2], VOCABULARY, PARAM_SHARDS)[:vocabulary]
    return losses_BL, results[1][:batch, :length], d_embedding_VD


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
        losses_T, d_hidden_TD, d_block_VD = _block_terms(*inputs, embedding_VD, vocabulary, scaling, gradients)
        total = d_embedding_VD if d_block_VD is None else d_embedding_VD + d_block_VD
        return total, (losses_T, d_hidden_TD)

    zeros = jnp.zeros(embedding_VD.shape, jnp.float32) if gradients else None
    targets_NT, weights_NT = (axes.all_gather(blocks(array), PARAM_SHARDS, 1) for array in (targets_BL, weights_BL))
    arrays = (blocks(hidden_BLD), targets_NT, weights_NT)
    d_embedding_VD, (losses_NT, d_hidden_NTD) = jax.lax.scan(add_block, zeros, arrays)
    losses_BL = losses_NT.reshape(-1)[:count].reshape(batch, length)
    if not gradients:
        return (losses_BL,)
    d_hidden_BLD = d_hidden_NTD.reshape(-1, width)[:count].reshape(batch, length, width)
    return losses_BL, d_hidden_BLD, axes.psum(d_embedding_VD, OUTER_TOKENS)


def _block_terms(
    hidden_TD: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    embedding_VD: jax.Array,
    vocabulary: int,
    scaling: Scaling,
    gradients: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns (losses float32[T], gradient of the states [T, D], float32[V, D] of the embedding) of a block.

    Args:
      hidden_TD: states of this device's tokens.
      targets_T, weights_T: of the tokens of all devices that share the vocabulary.
      embedding_VD: rows of this device; so is their gradient, which comes from the tokens of these devices.
      vocabulary: rows of all devices without padding.
      scaling: see `token_losses`.
      gradients: False = None in place of both.
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
    losses_T = max_T + jnp.log(sum_T) - target_T
    first = axes.shard_index(PARAM_SHARDS) * own
    losses_T = jax.lax.dynamic_slice_in_dim(losses_T, first, own)
    if not gradients:
        return losses_T, None, None
    d_logits_TV = weights_T[:, None] * (exp_TV / sum_T[:, None] - is_target_TV)
    if scaling != UNSCALED:
        d_logits_TV *= multiplier * cap_slope(capped_TV, cap)
    d_logits_TV = d_logits_TV.astype(dtype)
    d_hidden_TD = axes.psum(axes.matmul_reduce_scatter(d_logits_TV, embedding_VD, PARAM_SHARDS), VOCABULARY)
    d_embedding_VD = jnp.einsum("tv,td->vd", d_logits_TV, hidden_TD, preferred_element_type=jnp.float32)
    return losses_T, d_hidden_TD, d_embedding_VD
