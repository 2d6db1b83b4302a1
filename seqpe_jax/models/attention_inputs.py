"""Inputs that every attention backend takes, and the parts of the definition that all of them share."""

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp

from seqpe_jax.encodings.position_signal import Pair, RelativeBias

MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)  # a masked logit; finite, so that two of them can be subtracted
ATTENTION_RESULT = "attention_result"  # name of what a kernel's backward pass needs of its forward pass (`model.remat`)


@flax.struct.dataclass
class AttentionInputs:
    """Queries, keys and values with positions applied, and the terms that logits gain.

    Fields with a leading P hold P position sets: sample i uses set i mod P. P is 1 or one common number that divides B.

    Attributes:
      query: [B, L, H, K], already scaled.
      key: [B, S, G, K]; G divides H, and query head h reads key and value head h // (H // G).
      value: [B, S, G, V].
      position_query_key: position queries float32[P, L, H or 1, F] and keys float32[P, S, H or 1, F], whose dot product is
        added to the logits.
      bias: float32[P, H or 1, L, S], added to the logits.
      relative_bias: function of query and key positions that is applied to q . k; None = none.
      bias_params: parameters of `relative_bias`, a pytree.
      documents: documents of the queries int32[B, L] and of the keys int32[B, S], rising along a sample; a query attends to keys
        of its document. None = all are of one.
      heads: int32[H], global indices of the heads; `relative_bias` reads them.
      causal_offset: int32[P]; query l attends to keys up to causal_offset + l. None = all keys.
      dropout_seed: int32[], seed of the dropout on attention weights; None = no dropout.
      global_offset: int32[4], global indices of the first sample, head, query and key of these arrays, so that every device
        draws its own part of one dropout mask.
      dropout_rate: probability that a weight is dropped.
      mean_causal_offset: mean of `causal_offset` over devices, for estimates of cost; None = that of the last queries.
      window: w, query l attends to keys from causal_offset + l - w + 1 on; 0 = from the first on. Needs `causal_offset`.
      cap: c, logits become c tanh(logits / c) before they are masked; 0 = they stay.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    position_query_key: Pair | None = None
    bias: jax.Array | None = None
    relative_bias: RelativeBias | None = None
    bias_params: Any = None
    documents: Pair | None = None
    heads: jax.Array | None = None
    causal_offset: jax.Array | None = None
    dropout_seed: jax.Array | None = None
    global_offset: jax.Array | None = None
    dropout_rate: float = flax.struct.field(pytree_node=False, default=0.0)
    mean_causal_offset: int | None = flax.struct.field(pytree_node=False, default=None)
    window: int = flax.struct.field(pytree_node=False, default=0)
    cap: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def num_position_sets(self) -> int:
        """P of the fields that have more than one set, else 1."""
        fields = [
            *(self.position_query_key or ()),
            self.bias,
            self.causal_offset,
            self.relative_bias and self.relative_bias.query,
        ]
        return max((len(field) for field in fields if field is not None), default=1)

    def on_device(self, first_sample: jax.Array, first_row: jax.Array) -> "AttentionInputs":
        """Returns the inputs of one device's shard, its position sets selected and its offsets global.

        Args:
          first_sample: int32[], global index of the shard's first sample.
          first_row: int32[], global index of the shard's first query.
        """
        batch = self.query.shape[0]

        def fit(field: jax.Array | None) -> jax.Array | None:
            return shard_position_sets(field, first_sample, batch)

        global_offset = None
        if self.dropout_seed is not None:
            global_offset = jnp.stack([first_sample, self.heads[0], first_row, jnp.zeros_like(first_row)])
        return self.replace(
            position_query_key=self.position_query_key and tuple(fit(field) for field in self.position_query_key),
            bias=fit(self.bias),
            relative_bias=self.relative_bias
            and self.relative_bias.replace(query=fit(self.relative_bias.query), key=fit(self.relative_bias.key)),
            causal_offset=None if self.causal_offset is None else fit(self.causal_offset) + first_row,
            global_offset=global_offset,
        )


def shard_position_sets(field: jax.Array | None, first: jax.Array, batch: int) -> jax.Array | None:
    """Returns a field of P position sets such that sample i of this device uses set i mod P.

    Args:
      field: [P, ...] or None.
      first: int32[], global index of this device's first sample.
      batch: number of samples on this device.
    """
    if field is None or field.shape[0] in (1, batch) or batch % field.shape[0] == 0:  # the first two may be symbolic
        return field
    return field[(first + jnp.arange(batch)) % field.shape[0]]


def add_position_sets(logits_BHLS: jax.Array, extra_PHLS: jax.Array) -> jax.Array:
    """Returns logits plus a term of P position sets, of H heads or of one for all."""
    num_sets = extra_PHLS.shape[0]
    if num_sets == logits_BHLS.shape[0]:
        return logits_BHLS + extra_PHLS
    return _add_sets(logits_BHLS, jnp.broadcast_to(extra_PHLS, (num_sets, *logits_BHLS.shape[1:])), num_sets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_sets(logits_BHLS: jax.Array, extra_PHLS: jax.Array, num_sets: int) -> jax.Array:
    """Returns the sum; its gradient is that of JAX, with the sum over samples of `sum_over_sets`."""
    grouped = logits_BHLS.reshape(-1, num_sets, *logits_BHLS.shape[1:])
    return (grouped + extra_PHLS).reshape(logits_BHLS.shape)


def _add_sets_forward(logits_BHLS: jax.Array, extra_PHLS: jax.Array, num_sets: int) -> tuple[jax.Array, None]:
    return _add_sets(logits_BHLS, extra_PHLS, num_sets), None


def _add_sets_backward(num_sets: int, saved: None, gradient_BHLS: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient_BHLS, sum_over_sets(gradient_BHLS, num_sets)


_add_sets.defvjp(_add_sets_forward, _add_sets_backward)


def sum_over_sets(array: jax.Array, num_sets: int) -> jax.Array:
    """Returns [P, ...], the sum of [B, ...] over the samples of each position set: the transpose of `add_position_sets`.

    It is a product with ones: XLA's sum over a leading axis takes 60 times as long on a CPU with several threads (jaxlib 0.10).
    """
    grouped = array.reshape(-1, num_sets, *array.shape[1:])
    ones = jnp.ones(grouped.shape[0], array.dtype)
    return jnp.einsum("n,n...->...", ones, grouped, precision=jax.lax.Precision.HIGHEST)


def apply_relative_bias(
    logits_BHLS: jax.Array,
    relative_bias: RelativeBias,
    params: Any,
    query_PLC: jax.Array,
    key_PSC: jax.Array,
    heads_H: jax.Array,
) -> jax.Array:
    """Returns logits * factor + addend, where a pairwise function gives both; for any block of queries and keys.

    Args:
      params: parameters of `relative_bias`.
      query_PLC: float32, the query positions that the function reads.
      key_PSC: float32, the key positions that the function reads.
      heads_H: int32, global indices of the heads.
    """
    factor, addend = relative_bias.function(params, query_PLC, key_PSC, heads_H)
    if relative_bias.heads:
        used_H11 = (heads_H < relative_bias.heads)[:, None, None]
        factor, addend = None if factor is None else jnp.where(used_H11, factor, 1.0), jnp.where(used_H11, addend, 0.0)
    if factor is not None:
        grouped = logits_BHLS.reshape(-1, factor.shape[0], *logits_BHLS.shape[1:])
        logits_BHLS = (grouped * factor).reshape(logits_BHLS.shape)
    return add_position_sets(logits_BHLS, addend)


def cap_logits(logits: jax.Array, cap: float) -> jax.Array:
    """Returns c tanh(logits / c) of a cap c; 0 = the logits themselves."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def cap_slope(capped: jax.Array, cap: float) -> jax.Array | float:
    """Returns the derivative of `cap_logits` where its result is `capped`."""
    return 1 - (capped / cap) ** 2 if cap else 1.0


def is_masked(row: jax.Array, column: jax.Array, window: int) -> jax.Array:
    """Returns True where a key is after its query, or before the query's window.

    Args:
      row: indices of the queries among the keys, which broadcast against `column`.
      column: indices of the keys.
      window: see `AttentionInputs`.
    """
    masked = column > row
    return masked | (column <= row - window) if window else masked


def mask_other_documents(logits_BHLS: jax.Array, documents: Pair | None) -> jax.Array:
    """Returns logits in which those of keys of another document than the query's are masked.

    Args:
      documents: see `AttentionInputs`, of these queries and keys.
    """
    if documents is None:
        return logits_BHLS
    query_BL, key_BS = documents
    return jnp.where((query_BL[:, :, None] == key_BS[:, None, :])[:, None], logits_BHLS, MASK_VALUE)


def hash_bits(number: jax.Array) -> jax.Array:
    """Returns pseudo-random int32 bits, different for different int32 numbers.

    Source: the finalizer of MurmurHash3 (Appleby, public domain). It needs shifts and products alone, so that a kernel
    can make the same mask in the forward and the backward pass, on every device and in blocks of any size.
    """
    number = number.astype(jnp.int32)  # indices are int64 under jax_enable_x64
    for factor, shift in ((-2048144789, 16), (-1028477387, 13)):  # 0x85ebca6b and 0xc2b2ae35 as int32
        number = (number ^ jax.lax.shift_right_logical(number, jnp.int32(shift))) * jnp.int32(factor)
    return number ^ jax.lax.shift_right_logical(number, jnp.int32(16))


def dropout_mask(
    seed: jax.Array, sample: jax.Array, head: jax.Array, row: jax.Array, column: jax.Array, rate: float
) -> jax.Array:
    """Returns the multiplier of attention weights, float32: 0 with probability `rate`, else 1 / (1 - rate).

    Args:
      seed: int32[], differs by layer and step.
      sample, head, row, column: int32, global indices that broadcast to the mask's shape.
      rate: probability of 0.
    """
    start = hash_bits(hash_bits(hash_bits(seed ^ sample) ^ head) ^ row)
    spread = column.astype(jnp.int32) * jnp.int32(-1640531527)  # 2^32 / golden ratio: separates neighbouring columns
    bits = hash_bits(start ^ spread)
    uniform = jax.lax.shift_right_logical(bits, jnp.int32(8))  # in [0, 2^24)
    return jnp.where(uniform < jnp.int32(round((1 - rate) * 2**24)), jnp.float32(1 / (1 - rate)), jnp.float32(0))


def position_dot_product(query_PLHF: jax.Array, key_PSHF: jax.Array) -> jax.Array:
    """Returns position_query . position_key, float32[P, H or 1, L, S]; either side may have one head, or one set, for all."""
    heads = max(query_PLHF.shape[2], key_PSHF.shape[2])
    query, key = (jnp.broadcast_to(f, (*f.shape[:2], heads, f.shape[3])) for f in (query_PLHF, key_PSHF))
    if key.shape[0] == 1 != query.shape[0]:  # no copy of the keys for each set
        return jnp.einsum("plhf,shf->phls", query, key[0], precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("plhf,pshf->phls", query, key, precision=jax.lax.Precision.HIGHEST)


def _query_key(query_BLHK: jax.Array, key_BSGK: jax.Array) -> jax.Array:
    """Returns q . k of each query head and the key head that it reads, float32[B, H, L, S]."""
    (batch, length, heads, width), (keys, groups) = query_BLHK.shape, key_BSGK.shape[1:3]
    if heads == groups:
        return jnp.einsum("blhk,bshk->bhls", query_BLHK, key_BSGK, preferred_element_type=jnp.float32)
    query_BLGRK = query_BLHK.reshape(batch, length, groups, heads // groups, width)
    logits_BGRLS = jnp.einsum("blgrk,bsgk->bgrls", query_BLGRK, key_BSGK, preferred_element_type=jnp.float32)
    return logits_BGRLS.reshape(batch, heads, length, keys)


def _weighted_values(weights_BHLS: jax.Array, value_BSGV: jax.Array) -> jax.Array:
    """Returns the sum of values by weight, [B, L, H, V]."""
    (batch, heads, length, keys), groups = weights_BHLS.shape, value_BSGV.shape[2]
    if heads == groups:
        return jnp.einsum("bhls,bshv->blhv", weights_BHLS, value_BSGV)
    weights_BGRLS = weights_BHLS.reshape(batch, groups, heads // groups, length, keys)
    return jnp.einsum("bgrls,bsgv->blgrv", weights_BGRLS, value_BSGV).reshape(batch, length, heads, -1)


def reference_attention(inputs: AttentionInputs) -> jax.Array:
    """Returns softmax(logits) @ value, [B, L, H, V] in the values' dtype, from one array of all logits."""
    logits_BHLS = _query_key(inputs.query, inputs.key)
    batch, heads, length, keys = logits_BHLS.shape
    if inputs.relative_bias is not None:
        relative_bias = inputs.relative_bias
        logits_BHLS = apply_relative_bias(
            logits_BHLS, relative_bias, inputs.bias_params, relative_bias.query, relative_bias.key, inputs.heads
        )
    if inputs.position_query_key is not None:
        logits_BHLS = add_position_sets(logits_BHLS, position_dot_product(*inputs.position_query_key))
    if inputs.bias is not None:
        logits_BHLS = add_position_sets(logits_BHLS, inputs.bias)
    logits_BHLS = cap_logits(logits_BHLS, inputs.cap)
    if inputs.causal_offset is not None:
        row_PL = inputs.causal_offset[:, None] + jnp.arange(length)
        masked_PHLS = is_masked(row_PL[:, None, :, None], jnp.arange(keys), inputs.window)
        logits_BHLS = add_position_sets(logits_BHLS, jnp.where(masked_PHLS, MASK_VALUE, 0.0))
    logits_BHLS = mask_other_documents(logits_BHLS, inputs.documents)
    weights_BHLS = jax.nn.softmax(logits_BHLS)
    if inputs.dropout_seed is not None:
        sample, head, row, column = (
            first + jnp.arange(n) for first, n in zip(inputs.global_offset, (batch, heads, length, keys), strict=True)
        )
        indices = (sample[:, None, None, None], head[:, None, None], row[:, None], column)
        weights_BHLS = weights_BHLS * dropout_mask(inputs.dropout_seed, *indices, inputs.dropout_rate)
    return _weighted_values(weights_BHLS.astype(inputs.value.dtype), inputs.value)
