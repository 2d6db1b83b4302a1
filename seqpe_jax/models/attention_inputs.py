"""What every implementation of attention is given, and the parts of its definition that all of them share."""

from typing import Any

import flax
import jax
import jax.numpy as jnp

from seqpe_jax.encodings.base import Pair, RelativeBias

MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)  # a logit that counts nothing; two of them can be subtracted


@flax.struct.dataclass
class AttentionInputs:
    """Queries, keys and values that stand in their places, on one device; sample i uses position set i mod P.

    P is 1 or one number for all fields that have sets, and the samples are a multiple of it.

    Attributes:
      query: [B, L, H, K], divided by sqrt(K); key: [B, S, H, K]; value: [B, S, H, V].
      features: (f_q, f_k), float32[P, L, H or 1, F] and float32[P, S, H or 1, F]; logits gain f_q . f_k.
      bias: float32[P, H or 1, L, S], added to the logits.
      relation: what q . k gains as a function of two places; relation_params: of it; heads: int32[H], numbers of the heads.
      last: int32[P], query l sees keys up to last + l; None = all keys.
      seed: int32, of dropout on attention weights; None = no dropout. rate: of dropout.
      place: int32[3], the first sample, head and query here among all that there are, so that each draws its own mask.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    logit_query_key: Pair | None = None
    bias: jax.Array | None = None
    relative_bias: RelativeBias | None = None
    bias_params: Any = None
    heads: jax.Array | None = None
    causal_offset: jax.Array | None = None
    dropout_seed: jax.Array | None = None
    global_offset: jax.Array | None = None
    dropout_rate: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def position_sets(self) -> int:
        """P of those fields that have more than one set."""
        fields = [
            *(self.logit_query_key or ()),
            self.bias,
            self.causal_offset,
            self.relative_bias and self.relative_bias.query,
        ]
        return max((len(field) for field in fields if field is not None), default=1)


def shard_position_sets(field: jax.Array | None, first: jax.Array, batch: int) -> jax.Array | None:
    """Returns a field of P position sets such that sample i of this device uses set i mod P.

    Args:
      first: the first sample here among all; batch: samples here.
    """
    if field is None or field.shape[0] in (1, batch) or batch % field.shape[0] == 0:  # the first two may be symbolic
        return field
    return field[(first + jnp.arange(batch)) % field.shape[0]]


def add_position_sets(logits_BHLS: jax.Array, extra_PHLS: jax.Array) -> jax.Array:
    """Returns logits with those of P position sets added."""
    position_sets = extra_PHLS.shape[0]
    if position_sets == logits_BHLS.shape[0]:
        return logits_BHLS + extra_PHLS
    grouped = logits_BHLS.reshape(-1, position_sets, *logits_BHLS.shape[1:])
    return (grouped + extra_PHLS).reshape(logits_BHLS.shape)


def sum_over_sets(array: jax.Array, position_sets: int) -> jax.Array:
    """Returns the sum of [B, ...] over the samples of each position set, [P, ...]: the transpose of `add_position_sets`."""
    return array.reshape(-1, position_sets, *array.shape[1:]).sum(axis=0)


def apply_relation(
    logits_BHLS: jax.Array,
    relative_bias: RelativeBias,
    params: Any,
    query_PLC: jax.Array,
    key_PSC: jax.Array,
    heads_H: jax.Array,
) -> jax.Array:
    """Returns logits with what a relation makes of them, for some of its queries and keys."""
    factor, addend = relative_bias.function(params, query_PLC, key_PSC, heads_H)
    if relative_bias.heads:
        mine = (heads_H < relative_bias.heads)[:, None, None]
        factor, addend = None if factor is None else jnp.where(mine, factor, 1.0), jnp.where(mine, addend, 0.0)
    if factor is not None:
        grouped = logits_BHLS.reshape(-1, factor.shape[0], *logits_BHLS.shape[1:])
        logits_BHLS = (grouped * factor).reshape(logits_BHLS.shape)
    return add_position_sets(logits_BHLS, addend)


def hash_bits(number: jax.Array) -> jax.Array:
    """Returns int32 bits that look random, different for different int32 numbers.

    Source: the finalizer of MurmurHash3 (Appleby, public domain). Shifts and products alone, so that a kernel can make
    the same mask again, in the forward and the backward pass, on every device and in blocks of any size.
    """
    number = number.astype(jnp.int32)  # places are wider where JAX's defaults are
    for factor, shift in ((-2048144789, 16), (-1028477387, 13)):  # 0x85ebca6b and 0xc2b2ae35 as int32
        number = (number ^ jax.lax.shift_right_logical(number, jnp.int32(shift))) * jnp.int32(factor)
    return number ^ jax.lax.shift_right_logical(number, jnp.int32(16))


def dropout_mask(
    dropout_seed: jax.Array, sample: jax.Array, head: jax.Array, row: jax.Array, column: jax.Array, dropout_rate: float
) -> jax.Array:
    """Returns what dropout multiplies attention weights by: 0 with probability `dropout_rate`, else 1 / (1 - rate), float32.

    Args:
      seed: of the layer and step; sample, head, row, column: int32 that broadcast to each other, numbers among all.
    """
    start = hash_bits(hash_bits(hash_bits(dropout_seed ^ sample) ^ head) ^ row)
    far = column.astype(jnp.int32) * jnp.int32(-1640531527)  # 2^32 / golden ratio: neighbours lie far apart
    bits = hash_bits(start ^ far)
    share = jax.lax.shift_right_logical(bits, jnp.int32(8))
    return jnp.where(
        share < jnp.int32(round((1 - dropout_rate) * 2**24)), jnp.float32(1 / (1 - dropout_rate)), jnp.float32(0)
    )


def reference_attention(inputs: AttentionInputs) -> jax.Array:
    """Returns softmax(logits) @ value, [B, L, H, V] in the values' dtype, through an array of all logits."""
    query, key, value = inputs.query, inputs.key, inputs.value
    logits_BHLS = jnp.einsum("blhk,bshk->bhls", query, key, preferred_element_type=jnp.float32)
    batch, heads, length, keys = logits_BHLS.shape
    if inputs.relative_bias is not None:
        relative_bias = inputs.relative_bias
        logits_BHLS = apply_relation(
            logits_BHLS, relative_bias, inputs.bias_params, relative_bias.query, relative_bias.key, inputs.heads
        )
    if inputs.logit_query_key is not None:
        logits_BHLS = add_position_sets(logits_BHLS, feature_logits(*inputs.logit_query_key))
    if inputs.bias is not None:
        logits_BHLS = add_position_sets(logits_BHLS, inputs.bias)
    if inputs.causal_offset is not None:
        last_PL = inputs.causal_offset[:, None] + jnp.arange(length)
        hidden_PHLS = jnp.where(jnp.arange(keys) <= last_PL[:, None, :, None], 0.0, MASK_VALUE)
        logits_BHLS = add_position_sets(logits_BHLS, hidden_PHLS)
    weights_BHLS = jax.nn.softmax(logits_BHLS)
    if inputs.dropout_seed is not None:
        sample, head, row = (
            first + jnp.arange(n) for first, n in zip(inputs.global_offset, (batch, heads, length), strict=True)
        )
        places = (sample[:, None, None, None], head[:, None, None], row[:, None], jnp.arange(keys))
        weights_BHLS = weights_BHLS * dropout_mask(inputs.dropout_seed, *places, inputs.dropout_rate)
    return jnp.einsum("bhls,bshk->blhk", weights_BHLS.astype(value.dtype), value)


def feature_logits(query_PLHF: jax.Array, key_PSHF: jax.Array) -> jax.Array:
    """Returns f_q . f_k, float32[P, H or 1, L, S]; either side may have one head, or one set, for all."""
    heads = max(query_PLHF.shape[2], key_PSHF.shape[2])
    query, key = (jnp.broadcast_to(f, (*f.shape[:2], heads, f.shape[3])) for f in (query_PLHF, key_PSHF))
    if key.shape[0] == 1 != query.shape[0]:  # no copy of the keys for each set
        return jnp.einsum("plhf,shf->phls", query, key[0], precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("plhf,pshf->phls", query, key, precision=jax.lax.Precision.HIGHEST)
