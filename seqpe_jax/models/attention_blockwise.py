"""Attention in blocks of queries and keys: memory grows linearly with the length, and blocks to come are left out.

The online softmax of Milakov & Gimelshein 2018 (arXiv 1805.02867), its backward pass from the saved normaliser as in
FlashAttention-2 (Dao 2023, arXiv 2307.08691): nothing but XLA, so that any platform runs it, and sizes may be symbolic.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax.encodings.base import broadcast_to_batch
from seqpe_jax.models.attention_inputs import (
    MASK_VALUE,
    AttentionInputs,
    add_position_sets,
    apply_relation,
    dropout_mask,
    sum_over_sets,
)


def blockwise_attention(inputs: AttentionInputs, block: int, join: bool = False) -> jax.Array:
    """Returns `inputs.reference_attention`, computed from `block` queries and `block` keys at a time.

    Its backward pass computes the logits of a pair of blocks again, and knows no forward-mode derivative.

    Args:
      join: features stand behind the columns of queries and keys, in one product with them, whose arithmetic must be as
        precise as that of features.
    """
    if join:
        inputs = _joined(inputs)
    length, keys = inputs.query.shape[1], inputs.key.shape[1]
    ready = functools.partial(_ready, block=block)
    bias, relative_bias = inputs.bias, inputs.relative_bias
    padded = inputs.replace(
        query=ready(inputs.query),
        key=ready(inputs.key),
        value=ready(inputs.value),
        logit_query_key=None
        if inputs.logit_query_key is None
        else tuple(ready(field) for field in inputs.logit_query_key),
        bias=None if bias is None else _padded(_padded(bias, 2, block), 3, block),
        relative_bias=relative_bias
        and relative_bias.replace(
            query=_padded(relative_bias.query, 1, block), key=_padded(relative_bias.key, 1, block)
        ),
    )
    return jnp.moveaxis(_mix(padded, block, keys), 1, 2)[:, :length].astype(inputs.value.dtype)


def _joined(inputs: AttentionInputs) -> AttentionInputs:
    """Operands whose features are columns of their queries and keys."""

    def join(array_BLHK: jax.Array, field_PLHF: jax.Array) -> jax.Array:
        field = broadcast_to_batch(field_PLHF, array_BLHK.shape[0]).astype(array_BLHK.dtype)
        field_BLHF = jnp.broadcast_to(field, (*array_BLHK.shape[:-1], field.shape[-1]))
        return jnp.concatenate([array_BLHK, field_BLHF], axis=-1)

    query, key = (join(*pair) for pair in zip((inputs.query, inputs.key), inputs.logit_query_key, strict=True))
    return inputs.replace(query=query, key=key, logit_query_key=None)


def _padded(array: jax.Array, axis: int, block: int) -> jax.Array:
    length = array.shape[axis]
    missing = (length + block - 1) // block * block - length  # in this form, a symbolic length is known to hold a block
    return jnp.pad(array, [(0, missing) if at == axis else (0, 0) for at in range(array.ndim)])


def _ready(array_BLHK: jax.Array, block: int) -> jax.Array:
    """[B, H, L, K], L padded to whole blocks: what a matrix product of a block reads lies together."""
    return jnp.moveaxis(_padded(array_BLHK, 1, block), 2, 1)


def _part(array: jax.Array, at: jax.Array, block: int, axis: int = 2) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, at * block, block, axis)


def _add(array: jax.Array, part: jax.Array, at: jax.Array, block: int) -> jax.Array:
    """An array with a part added to one of its blocks."""
    return jax.lax.dynamic_update_slice_in_dim(array, _part(array, at, block) + part, at * block, 2)


def _product(subscripts: str, *arrays: jax.Array) -> jax.Array:
    """A product in the arrays' own dtype, its sums in float32."""
    return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)


def _feature_product(subscripts: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)


class _Tile:
    """A block of queries meets a block of keys: their logits, and what of these falls away."""

    def __init__(self, inputs: AttentionInputs, i: jax.Array, j: jax.Array, block: int, keys: int):
        self.inputs, self.i, self.j, self.block = inputs, i, j, block
        self.key, self.value = _part(inputs.key, j, block), _part(inputs.value, j, block)
        self.row, self.column = i * block + jnp.arange(block), j * block + jnp.arange(block)
        self.query, self.keys = _part(inputs.query, i, block), keys
        if inputs.logit_query_key is not None:
            self.logit_query_key = (
                _part(inputs.logit_query_key[0], i, block),
                _part(inputs.logit_query_key[1], j, block),
            )

    def product(self) -> jax.Array:
        """Returns float32[B, H, block, block]: what queries and keys give by themselves."""
        return _product("bhlk,bhsk->bhls", self.query, self.key)

    def apply_relation(self, params: Any, logits: jax.Array) -> jax.Array:
        """Returns logits with what the relation, which has these parameters, makes of them."""
        relative_bias = self.inputs.relative_bias
        query, key = (
            _part(places, at, self.block, 1)
            for places, at in ((relative_bias.query, self.i), (relative_bias.key, self.j))
        )
        return apply_relation(logits, relative_bias, params, query, key, self.inputs.heads)

    def logits(self) -> jax.Array:
        """Returns float32[B, H, block, block]."""
        inputs, logits = self.inputs, self.product()
        if inputs.relative_bias is not None:
            logits = self.apply_relation(inputs.bias_params, logits)
        if inputs.logit_query_key is not None:
            logits = add_position_sets(logits, _feature_product("phlf,phsf->phls", *_same_sets(*self.logit_query_key)))
        if inputs.bias is not None:
            logits = add_position_sets(logits, _part(_part(inputs.bias, self.i, self.block), self.j, self.block, 3))
        if inputs.causal_offset is not None:
            causal_offset = jnp.minimum(inputs.causal_offset[:, None] + self.row, self.keys - 1)
            hidden = self.column > causal_offset[:, None, :, None]
        elif inputs.key.shape[2] == self.keys:
            return logits
        else:
            hidden = (self.column >= self.keys)[None, None, None]
        return add_position_sets(logits, jnp.where(hidden, MASK_VALUE, 0.0))

    def dropout_mask(self) -> jax.Array:
        """Returns what dropout multiplies the weights by."""
        inputs = self.inputs
        sample, head = (
            first + jnp.arange(n) for first, n in zip(inputs.global_offset[:2], self.query.shape[:2], strict=True)
        )
        places = (
            sample[:, None, None, None],
            head[:, None, None],
            (inputs.global_offset[2] + self.row)[:, None],
            self.column,
        )
        return dropout_mask(inputs.dropout_seed, *places, inputs.dropout_rate)


def _same_sets(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Features of queries and keys with as many sets and heads."""
    shape = tuple(max(sizes) for sizes in zip(query.shape[:2], key.shape[:2], strict=True))
    return jnp.broadcast_to(query, shape + query.shape[2:]), jnp.broadcast_to(key, shape + key.shape[2:])


def _like(array: jax.Array, field: jax.Array) -> jax.Array:
    """Sums [B or P, H, ...] over the samples and heads that share a field's."""
    array = array if array.shape[0] == field.shape[0] else sum_over_sets(array, field.shape[0])
    return array if array.shape[1] == field.shape[1] else array.sum(axis=1, keepdims=True)


def _count(inputs: AttentionInputs, i: jax.Array, block: int, keys: int) -> jax.Array:
    """The number of blocks of keys, from the first on, that hold all that a block of queries sees."""
    count = jnp.asarray(inputs.key.shape[2] // block, jnp.int32)
    if inputs.causal_offset is None:
        return count
    return jnp.clip((inputs.causal_offset.max() + (i + 1) * block - 1) // block + 1, 1, count).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _mix(inputs: AttentionInputs, block: int, keys: int) -> jax.Array:
    """The mixed values float32[B, H, L, V] of operands that are `_ready`; keys: those that are no padding."""
    return _forward(inputs, block, keys)[0]


def _forward(inputs: AttentionInputs, block: int, keys: int) -> tuple[jax.Array, Any]:
    batch, heads, length, _ = inputs.query.shape

    def row(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(j: jax.Array, carry: tuple) -> tuple:
            top, total, mixed = carry
            tile = _Tile(inputs, i, j, block, keys)
            logits = tile.logits()
            higher = jnp.maximum(top, logits.max(axis=-1))
            weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            total = total * shrink + weights.sum(axis=-1)
            if inputs.dropout_seed is not None:
                weights = weights * tile.dropout_mask()
            part = _product("bhls,bhsv->bhlv", weights.astype(tile.value.dtype), tile.value)
            return higher, total, mixed * shrink[..., None] + part

        sizes = (batch, heads, block)
        start = jnp.full(sizes, MASK_VALUE), jnp.zeros(sizes), jnp.zeros((*sizes, inputs.value.shape[-1]))
        top, total, mixed = jax.lax.fori_loop(0, _count(inputs, i, block, keys), step, start)
        return mixed / total[..., None], top + jnp.log(total)

    mixed, normaliser = jax.lax.map(row, jnp.arange(length // block))
    mixed = jnp.moveaxis(mixed, 0, 2).reshape(batch, heads, length, -1)
    normaliser = jnp.moveaxis(normaliser, 0, 2).reshape(batch, heads, length)
    return mixed, (inputs, mixed, normaliser)


def _backward(block: int, keys: int, saved: Any, given: jax.Array) -> tuple[AttentionInputs]:
    inputs, mixed, normaliser = saved
    inner = (given * mixed).sum(axis=-1)
    given_ = given.astype(inputs.value.dtype)

    def row(i: jax.Array, gradients: dict) -> dict:
        of_row = functools.partial(_part, at=i, block=block)
        given, normal, around = of_row(given_), of_row(normaliser)[..., None], of_row(inner)[..., None]

        def step(j: jax.Array, gradients: dict) -> dict:
            tile = _Tile(inputs, i, j, block, keys)
            weights = jnp.exp(tile.logits() - normal)
            of_weights = _product("bhlv,bhsv->bhls", given, tile.value)
            dropped = weights
            if inputs.dropout_seed is not None:
                mask = tile.dropout_mask()
                dropped, of_weights = weights * mask, of_weights * mask
            of_logits = of_sums = weights * (of_weights - around)
            found = dict(gradients)
            if inputs.relative_bias is not None:
                pull = jax.vjp(tile.apply_relation, inputs.bias_params, tile.product())[1]
                of_params, of_logits = pull(of_logits)
                found["bias_params"] = jax.tree.map(jnp.add, gradients["bias_params"], of_params)
            small = of_logits.astype(tile.query.dtype)
            parts = {
                "query": (_product("bhls,bhsk->bhlk", small, tile.key), i),
                "key": (_product("bhls,bhlk->bhsk", small, tile.query), j),
                "value": (_product("bhls,bhlv->bhsv", dropped.astype(given.dtype), given), j),
            }
            if inputs.logit_query_key is not None:
                query, key = _same_sets(*tile.logit_query_key)
                shared = _like(of_sums, query)
                parts["f_q"] = _like(_feature_product("phls,phsf->phlf", shared, key), inputs.logit_query_key[0]), i
                parts["f_k"] = _like(_feature_product("phls,phlf->phsf", shared, query), inputs.logit_query_key[1]), j
            found |= {name: _add(gradients[name], part, at, block) for name, (part, at) in parts.items()}
            if inputs.bias is not None:  # every pair of blocks comes once
                start = 0, 0, i * block, j * block
                found["bias"] = jax.lax.dynamic_update_slice(gradients["bias"], _like(of_sums, inputs.bias), start)
            return found

        return jax.lax.fori_loop(0, _count(inputs, i, block, keys), step, gradients)

    fields = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    if inputs.logit_query_key is not None:
        fields |= {"f_q": inputs.logit_query_key[0], "f_k": inputs.logit_query_key[1]}
    if inputs.bias is not None:
        fields["bias"] = inputs.bias
    if inputs.relative_bias is not None:
        fields["bias_params"] = inputs.bias_params
    zeros = jax.tree.map(lambda field: jnp.zeros(field.shape, jnp.float32), fields)
    found = jax.lax.fori_loop(0, inputs.query.shape[2] // block, row, zeros)
    found = jax.tree.map(lambda gradient, field: gradient.astype(field.dtype), found, fields)
    logit_query_key = (found.pop("f_q"), found.pop("f_k")) if inputs.logit_query_key is not None else None
    rest = dict.fromkeys(
        ("bias", "relative_bias", "bias_params", "heads", "causal_offset", "dropout_seed", "global_offset")
    )
    return (inputs.replace(**rest | found, logit_query_key=logit_query_key),)


_mix.defvjp(_forward, _backward)
