"""Blockwise attention in plain XLA: FlashAttention-2 over tiles of queries and keys, on any platform and for symbolic sizes.

Forward: the online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867) keeps, for each query, the running maximum m of the
logits, the normalizer l and the unnormalized output acc, one block of keys after another. Backward: logits are computed
again from the saved log-sum-exp L = m + log l (FlashAttention-2, Dao 2023, arXiv 2307.08691). Memory grows linearly with
the length, and blocks of which the causal mask, the window or the documents of all samples hide all keys are skipped.

Where H query heads share G key heads, the H / G queries of a token that read one key head are rows of one product with it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqpe_jax.encodings.position_signal import Pair, broadcast_to_batch
from seqpe_jax.models.attention_inputs import (
    ATTENTION_RESULT,
    MASK_VALUE,
    AttentionInputs,
    add_position_sets,
    apply_relative_bias,
    cap_logits,
    cap_slope,
    dropout_mask,
    is_masked,
    mask_other_documents,
    sum_over_sets,
)


def blockwise_attention(inputs: AttentionInputs, block: int, concat_position: bool = False) -> jax.Array:
    """Returns the result of `reference_attention`, [B, L, H, V], computed from tiles of `block` queries and `block` keys.

    It has a custom backward pass, and no forward-mode derivative.

    Args:
      inputs: inputs of one device.
      block: queries and keys per tile.
      concat_position: append position queries and keys to queries and keys, so that one product gives both logits; the dtype
        of queries must then be as precise as theirs.
    """
    padded = _padded_inputs(inputs, block, concat_position)
    return _tokens_first(_flash(padded, block, inputs.key.shape[1]), inputs).astype(inputs.value.dtype)


def blockwise_forward(
    inputs: AttentionInputs, dtype: Any, block: int, concat_position: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns (output [B, L, H, V], log-sum-exp of the logits float32[B, H, L]), without gradients.

    Args:
      inputs, block, concat_position: as in `blockwise_attention`.
      dtype: dtype of the output.
    """
    padded = _padded_inputs(inputs, block, concat_position)
    out_BHLV, (_, _, lse_BHL) = _forward(padded, block, inputs.key.shape[1])
    return _tokens_first(out_BHLV, inputs).astype(dtype), lse_BHL[:, :, : inputs.query.shape[1]]


def blockwise_resume(
    inputs: AttentionInputs, out_BLHV: jax.Array, lse_BHL: jax.Array, block: int, concat_position: bool = False
) -> jax.Array:
    """Returns `out_BLHV` itself, with the gradients that these inputs have as a part of the attention that it results from.

    Args:
      inputs, block, concat_position: as in `blockwise_attention`; the keys may be a part of those attended to.
      out_BLHV: output over all keys.
      lse_BHL: float32, log-sum-exp of the logits of all keys.
    """
    padded = _padded_inputs(inputs, block, concat_position)
    out_BHLV, lse_BHL = _heads_first(out_BLHV.astype(jnp.float32), block), _pad(lse_BHL, 2, block)
    resumed_BHLV = _resumed(padded, out_BHLV, lse_BHL, block, inputs.key.shape[1])
    return _tokens_first(resumed_BHLV, inputs).astype(out_BLHV.dtype)


def _tokens_first(out_BHLV: jax.Array, inputs: AttentionInputs) -> jax.Array:
    """Returns [B, L, H, V] without the padding."""
    return jnp.moveaxis(out_BHLV, 1, 2)[:, : inputs.query.shape[1]]


def _padded_inputs(inputs: AttentionInputs, block: int, concat_position: bool) -> AttentionInputs:
    """Returns inputs [B, H, L, ...], lengths padded to multiples of `block`."""
    if concat_position:
        inputs = _concat_position(inputs)
    to_blocks = functools.partial(_heads_first, block=block)
    bias, relative_bias = inputs.bias, inputs.relative_bias
    return inputs.replace(
        query=to_blocks(inputs.query),
        key=to_blocks(inputs.key),
        value=to_blocks(inputs.value),
        position_query_key=inputs.position_query_key and tuple(to_blocks(field) for field in inputs.position_query_key),
        bias=None if bias is None else _pad(_pad(bias, 2, block), 3, block),
        relative_bias=relative_bias
        and relative_bias.replace(query=_pad(relative_bias.query, 1, block), key=_pad(relative_bias.key, 1, block)),
        documents=inputs.documents and tuple(_pad(field, 1, block, "edge") for field in inputs.documents),
    )


def _concat_position(inputs: AttentionInputs) -> AttentionInputs:
    """Returns inputs whose position queries and keys are further columns of queries and keys."""

    def concat(array_BLHK: jax.Array, field_PLHF: jax.Array) -> jax.Array:
        field = broadcast_to_batch(field_PLHF, array_BLHK.shape[0]).astype(array_BLHK.dtype)
        field_BLHF = jnp.broadcast_to(field, (*array_BLHK.shape[:-1], field.shape[-1]))
        return jnp.concatenate([array_BLHK, field_BLHF], axis=-1)

    query, key = (concat(*pair) for pair in zip((inputs.query, inputs.key), inputs.position_query_key, strict=True))
    return inputs.replace(query=query, key=key, position_query_key=None)


def _pad(array: jax.Array, axis: int, block: int, mode: str = "constant") -> jax.Array:
    """Returns an array whose axis is padded to a multiple of `block`, with zeros or in another mode of `jnp.pad`."""
    length = array.shape[axis]
    missing = (length + block - 1) // block * block - length  # a symbolic length is thus known to hold a whole block
    return jnp.pad(array, [(0, missing) if at == axis else (0, 0) for at in range(array.ndim)], mode)


def _heads_first(array_BLHK: jax.Array, block: int) -> jax.Array:
    """Returns [B, H, L, K], L padded to a multiple of `block`, so that a tile is contiguous in memory."""
    return jnp.moveaxis(_pad(array_BLHK, 1, block), 2, 1)


def _block(array: jax.Array, index: jax.Array, block: int, axis: int = 2) -> jax.Array:
    """Returns block number `index` along an axis."""
    return jax.lax.dynamic_slice_in_dim(array, index * block, block, axis)


def _add_to_block(array: jax.Array, part: jax.Array, index: jax.Array, block: int) -> jax.Array:
    """Returns an array with `part` added to block number `index` along axis 2."""
    return jax.lax.dynamic_update_slice_in_dim(array, _block(array, index, block) + part, index * block, 2)


def _einsum(subscripts: str, *arrays: jax.Array) -> jax.Array:
    """Returns a product in the arrays' own dtype, accumulated in float32."""
    return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)


def _by_group(array_BHLX: jax.Array, groups: int) -> jax.Array:
    """Returns [B, G, H / G * L, X]: the rows of all query heads that read one key head, in that order; nothing moves."""
    batch, heads, length, width = array_BHLX.shape
    return array_BHLX if heads == groups else array_BHLX.reshape(batch, groups, heads // groups * length, width)


def _by_head(array_BGRX: jax.Array, heads: int) -> jax.Array:
    """Returns [B, H, L, X]: the inverse of `_by_group`."""
    batch, groups, rows, width = array_BGRX.shape
    return array_BGRX if heads == groups else array_BGRX.reshape(batch, heads, rows * groups // heads, width)


def _exact_einsum(subscripts: str, *arrays: jax.Array) -> jax.Array:
    """Returns a product of float32 arrays at full precision."""
    return jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)


class _Tile:
    """Query block i against key block j.

    Attributes:
      query: [B, H, block, K], the query block.
      key, value: [B, G, block, K] and [B, G, block, V], the key block.
      position_query_key: position queries and keys of these blocks, if there are any.
      row, column: int32[block], indices of the queries and keys on this device.
      keys: number of keys without padding.
    """

    def __init__(self, inputs: AttentionInputs, i: jax.Array, j: jax.Array, block: int, keys: int):
        self.inputs, self.i, self.j, self.block = inputs, i, j, block
        self.key, self.value = _block(inputs.key, j, block), _block(inputs.value, j, block)
        self.row, self.column = i * block + jnp.arange(block), j * block + jnp.arange(block)
        self.query, self.keys = _block(inputs.query, i, block), keys
        if inputs.position_query_key is not None:
            self.position_query_key = (
                _block(inputs.position_query_key[0], i, block),
                _block(inputs.position_query_key[1], j, block),
            )

    def query_key(self) -> jax.Array:
        """Returns q . k, float32[B, H, block, block]."""
        return self.times_keys("bgrk,bgsk->bgrs", self.query, self.key)

    def times_keys(self, subscripts: str, rows_BHLX: jax.Array, key_BGSK: jax.Array) -> jax.Array:
        """Returns the product of rows of all query heads with the key heads that they read, float32[B, H, block, ...]."""
        return _by_head(_einsum(subscripts, _by_group(rows_BHLX, key_BGSK.shape[1]), key_BGSK), rows_BHLX.shape[1])

    def sum_over_rows(self, weight_BHLS: jax.Array, rows_BHLX: jax.Array) -> jax.Array:
        """Returns the sum of rows of all query heads that read a key, by weight, float32[B, G, block, X]."""
        groups = self.key.shape[1]
        return _einsum("bgrs,bgrx->bgsx", _by_group(weight_BHLS, groups), _by_group(rows_BHLX, groups))

    def apply_relative_bias(self, params: Any, logits: jax.Array) -> jax.Array:
        """Returns logits after the pairwise function of positions; params: parameters of the function."""
        relative_bias = self.inputs.relative_bias
        query, key = (
            _block(field, index, self.block, 1)
            for field, index in ((relative_bias.query, self.i), (relative_bias.key, self.j))
        )
        return apply_relative_bias(logits, relative_bias, params, query, key, self.inputs.heads)

    def logits(self) -> jax.Array:
        """Returns the logits after the cap, without the mask, float32[B, H, block, block]."""
        inputs, logits = self.inputs, self.query_key()
        if inputs.relative_bias is not None:
            logits = self.apply_relative_bias(inputs.bias_params, logits)
        if inputs.position_query_key is not None:
            position_query, position_key = _common_sets_and_heads(*self.position_query_key)
            logits = add_position_sets(logits, _exact_einsum("phlf,phsf->phls", position_query, position_key))
        if inputs.bias is not None:
            logits = add_position_sets(logits, _block(_block(inputs.bias, self.i, self.block), self.j, self.block, 3))
        return cap_logits(logits, inputs.cap)

    def mask(self, logits: jax.Array) -> jax.Array:
        """Returns logits in which those of keys that a query does not attend to are masked."""
        inputs = self.inputs
        if inputs.causal_offset is not None:
            row = (inputs.causal_offset[:, None] + self.row)[:, None, :, None]
            if not inputs.window:  # one comparison for both
                row = jnp.minimum(row, self.keys - 1)
            masked = is_masked(row, self.column, inputs.window)
            if inputs.window:
                masked |= self.column >= self.keys
        elif inputs.key.shape[2] == self.keys:
            return mask_other_documents(logits, self._documents)
        else:
            masked = (self.column >= self.keys)[None, None, None]
        return mask_other_documents(add_position_sets(logits, jnp.where(masked, MASK_VALUE, 0.0)), self._documents)

    @property
    def _documents(self) -> Pair | None:
        """Documents of the queries and keys of the tile."""
        if self.inputs.documents is None:
            return None
        of_queries, of_keys = self.inputs.documents
        return _block(of_queries, self.i, self.block, 1), _block(of_keys, self.j, self.block, 1)

    def dropout_mask(self) -> jax.Array:
        """Returns the multiplier of the weights, float32[B, H, block, block]."""
        inputs = self.inputs
        sample, head = (
            first + jnp.arange(n) for first, n in zip(inputs.global_offset[:2], self.query.shape[:2], strict=True)
        )
        row, column = inputs.global_offset[2] + self.row, inputs.global_offset[3] + self.column
        indices = sample[:, None, None, None], head[:, None, None], row[:, None], column
        return dropout_mask(inputs.dropout_seed, *indices, inputs.dropout_rate)


def _common_sets_and_heads(position_query: jax.Array, position_key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns position queries and keys broadcast to the same position sets and heads."""
    shape = tuple(max(sizes) for sizes in zip(position_query.shape[:2], position_key.shape[:2], strict=True))
    return jnp.broadcast_to(position_query, shape + position_query.shape[2:]), jnp.broadcast_to(
        position_key, shape + position_key.shape[2:]
    )


def _sum_like(gradient: jax.Array, field: jax.Array) -> jax.Array:
    """Returns [B or P, H, ...] summed over the samples and heads that share one entry of a field."""
    gradient = gradient if gradient.shape[0] == field.shape[0] else sum_over_sets(gradient, field.shape[0])
    return gradient if gradient.shape[1] == field.shape[1] else gradient.sum(axis=1, keepdims=True)


def _key_blocks(inputs: AttentionInputs, i: jax.Array, block: int) -> tuple[Any, jax.Array]:
    """Returns the range of key blocks that query block i attends to: the first, and the one after the last.

    It holds one block at least, but for a window or documents outside of the keys, which are then a part of all.
    """
    count = jnp.asarray(inputs.key.shape[2] // block, jnp.int32)
    document_first = 0 if inputs.documents is None else _first_block_of_documents(inputs.documents, i, block)
    if inputs.causal_offset is None:
        return document_first, count
    stop = (inputs.causal_offset.max() + (i + 1) * block - 1) // block + 1
    stop = jnp.clip(stop, 0 if inputs.window else 1, count).astype(jnp.int32)
    if not inputs.window:
        return document_first, stop
    first_key = inputs.causal_offset.min() + i * block - inputs.window + 1
    return jnp.maximum(jnp.clip(first_key // block, 0, stop).astype(jnp.int32), document_first), stop


def _first_block_of_documents(documents: Pair, i: jax.Array, block: int) -> jax.Array:
    """Returns the first key block with a key that is not of an earlier document than all queries of block i, int32[].

    It is the first that any sample needs, since a tile holds all samples; the number of blocks where none does.
    """
    of_queries, of_keys = documents
    query_B = _block(of_queries, i, block, 1).min(axis=1)
    key_BN = of_keys.reshape(len(of_keys), -1, block).max(axis=2)
    reached_N = (key_BN >= query_B[:, None]).any(axis=0)
    return jnp.where(reached_N.any(), jnp.argmax(reached_N), len(reached_N)).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _flash(inputs: AttentionInputs, block: int, keys: int) -> jax.Array:
    """Returns the output float32[B, H, L, V].

    Args:
      inputs: arrays [B, H, L, ...], padded to multiples of `block`.
      block: queries and keys per tile.
      keys: number of keys without padding.
    """
    return _forward(inputs, block, keys)[0]


def _forward(inputs: AttentionInputs, block: int, keys: int) -> tuple[jax.Array, Any]:
    batch, heads, length, _ = inputs.query.shape

    def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def key_block(j: jax.Array, carry: tuple) -> tuple:
            m, normalizer, acc = carry
            tile = _Tile(inputs, i, j, block, keys)
            logits = tile.mask(tile.logits())
            m_new = jnp.maximum(m, logits.max(axis=-1))
            p, alpha = jnp.exp(logits - m_new[..., None]), jnp.exp(m - m_new)
            normalizer = normalizer * alpha + p.sum(axis=-1)
            if inputs.dropout_seed is not None:
                p = p * tile.dropout_mask()
            pv = tile.times_keys("bgrs,bgsv->bgrv", p.astype(tile.value.dtype), tile.value)
            return m_new, normalizer, acc * alpha[..., None] + pv

        rows = (batch, heads, block)
        start = jnp.full(rows, MASK_VALUE), jnp.zeros(rows), jnp.zeros((*rows, inputs.value.shape[-1]))
        m, normalizer, acc = jax.lax.fori_loop(*_key_blocks(inputs, i, block), key_block, start)
        if inputs.window or inputs.documents is not None:
            normalizer = jnp.where(normalizer > 0, normalizer, 1.0)
        return acc / normalizer[..., None], m + jnp.log(normalizer)

    out, lse = jax.lax.map(query_block, jnp.arange(length // block))
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, length, -1)
    lse = jnp.moveaxis(lse, 0, 2).reshape(batch, heads, length)
    out, lse = checkpoint_name((out, lse), ATTENTION_RESULT)
    return out, (inputs, out, lse)


def _backward(block: int, keys: int, saved: Any, d_out: jax.Array) -> tuple[AttentionInputs]:
    inputs, out, lse = saved
    delta = (d_out * out).sum(axis=-1)  # D of FlashAttention-2: rowsum(dO * O)
    d_out = d_out.astype(inputs.value.dtype)

    def query_block(i: jax.Array, gradients: dict) -> dict:
        block_of = functools.partial(_block, index=i, block=block)
        rows = block_of(d_out), block_of(lse)[..., None], block_of(delta)[..., None]

        def key_block(j: jax.Array, gradients: dict) -> dict:
            return _add_tile_gradients(gradients, _Tile(inputs, i, j, block, keys), *rows)

        return jax.lax.fori_loop(*_key_blocks(inputs, i, block), key_block, gradients)

    fields = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    if inputs.position_query_key is not None:
        fields |= {"position_query": inputs.position_query_key[0], "position_key": inputs.position_query_key[1]}
    if inputs.bias is not None:
        fields["bias"] = inputs.bias
    if inputs.relative_bias is not None:
        fields["bias_params"] = inputs.bias_params
    zeros = jax.tree.map(lambda field: jnp.zeros(field.shape, jnp.float32), fields)
    gradients = jax.lax.fori_loop(0, inputs.query.shape[2] // block, query_block, zeros)
    gradients = jax.tree.map(lambda gradient, field: gradient.astype(field.dtype), gradients, fields)
    position_query_key = (
        (gradients.pop("position_query"), gradients.pop("position_key"))
        if inputs.position_query_key is not None
        else None
    )
    without = dict.fromkeys(
        ("bias", "relative_bias", "bias_params", "documents", "heads", "causal_offset", "dropout_seed", "global_offset")
    )
    return (inputs.replace(**without | gradients, position_query_key=position_query_key),)


def _add_tile_gradients(gradients: dict, tile: _Tile, d_out: jax.Array, lse: jax.Array, delta: jax.Array) -> dict:
    """Returns gradients of all inputs with those of one tile added.

    Args:
      gradients: float32 arrays by field name, and a pytree under "bias_params".
      tile: query block i against key block j.
      d_out: [B, H, block, V], gradient of the output of the query block.
      lse: float32[B, H, block, 1], log-sum-exp of the logits of the query block.
      delta: float32[B, H, block, 1], rowsum(dO * O) of the query block.
    """
    inputs, block, result = tile.inputs, tile.block, dict(gradients)
    logits = tile.logits()
    p = jnp.exp(tile.mask(logits) - lse)
    d_p = tile.times_keys("bgrv,bgsv->bgrs", d_out, tile.value)
    p_dropped = p
    if inputs.dropout_seed is not None:
        mask = tile.dropout_mask()
        p_dropped, d_p = p * mask, d_p * mask
    d_query_key = d_logits = p * (d_p - delta) * cap_slope(logits, inputs.cap)
    if inputs.relative_bias is not None:
        bias_vjp = jax.vjp(tile.apply_relative_bias, inputs.bias_params, tile.query_key())[1]
        d_params, d_query_key = bias_vjp(d_logits)
        result["bias_params"] = jax.tree.map(jnp.add, gradients["bias_params"], d_params)
    ds = d_query_key.astype(tile.query.dtype)
    parts = {
        "query": (tile.times_keys("bgrs,bgsk->bgrk", ds, tile.key), tile.i),
        "key": (tile.sum_over_rows(ds, tile.query), tile.j),
        "value": (tile.sum_over_rows(p_dropped.astype(d_out.dtype), d_out), tile.j),
    }
    if inputs.position_query_key is not None:
        position_query, position_key = _common_sets_and_heads(*tile.position_query_key)
        shared = _sum_like(d_logits, position_query)
        parts["position_query"] = (
            _sum_like(_exact_einsum("phls,phsf->phlf", shared, position_key), inputs.position_query_key[0]),
            tile.i,
        )
        parts["position_key"] = (
            _sum_like(_exact_einsum("phls,phlf->phsf", shared, position_query), inputs.position_query_key[1]),
            tile.j,
        )
    result |= {name: _add_to_block(gradients[name], part, index, block) for name, (part, index) in parts.items()}
    if inputs.bias is not None:  # every tile is visited once
        start = 0, 0, tile.i * block, tile.j * block
        result["bias"] = jax.lax.dynamic_update_slice(gradients["bias"], _sum_like(d_logits, inputs.bias), start)
    return result


_flash.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _resumed(inputs: AttentionInputs, out: jax.Array, lse: jax.Array, block: int, keys: int) -> jax.Array:
    """Returns `out`, float32[B, H, L, V], with the gradients of `_flash` for a given output and log-sum-exp."""
    return out


def _resumed_forward(inputs: AttentionInputs, out: jax.Array, lse: jax.Array, *sizes: int) -> tuple[jax.Array, Any]:
    return out, (inputs, out, lse)


def _resumed_backward(block: int, keys: int, saved: Any, d_out: jax.Array) -> tuple[AttentionInputs, None, None]:
    return *_backward(block, keys, saved, d_out), None, None


_resumed.defvjp(_resumed_forward, _resumed_backward)
