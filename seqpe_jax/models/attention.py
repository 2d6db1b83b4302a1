"""The one place where queries, keys, values and a position signal meet."""

import functools
import math

import flax
import jax
import jax.numpy as jnp

from seqpe_jax.axes import HEADS, LENGTH, lay_out, over_length
from seqpe_jax.encodings.signal import Pair, PositionSignal, fit_batch


@flax.struct.dataclass
class Cache:
    """What one layer remembers of a window of S places, so that a new token needs no other token's states.

    Attributes:
      key: [B, S, H, K], turned, multiplied and shifted as the signal says; value: the same shape.
    """

    key: jax.Array
    value: jax.Array


def attend(
    query_BLHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHK: jax.Array,
    signal: PositionSignal,
    *,
    causal: bool = True,
    block: int = 0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(logits) @ value, [B, L, H, K] in the values' dtype.

    logits = (q . k) / sqrt(K) + f_q . f_k + bias, with q and k turned, multiplied and shifted as the signal says.
    Logits and softmax are float32; so is the product of features, at full precision, whatever the dtype of q and k.

    Args:
      signal: of one layer (`PositionSignal.at_layer`).
      causal: query l sees keys up to l + (S - L).
      block: queries handled at once when L is larger, so that no [B, H, L, S] array exists; 0 = all at once. The
        backward pass computes each block's logits again.
      dropout_rate, dropout_key: dropout on attention weights; no key, no dropout.
    """
    length, keys = query_BLHK.shape[1], key_BSHK.shape[1]
    last_seen_PL = (jnp.arange(length) + (keys - length))[None] if causal else None
    bias_PHLS = None if signal.bias is None else lay_out(signal.bias[None], None, HEADS, LENGTH, None)
    query_BLHK, key_BSHK = _place(query_BLHK, key_BSHK, signal)
    features = signal.features
    if features is not None:
        features = (_lay_out_feature(features[0], LENGTH), _lay_out_feature(features[1], None))
    arguments = (query_BLHK, key_BSHK, value_BSHK, features, bias_PHLS, last_seen_PL, jnp.arange(length))
    places = (1, None, None, None if features is None else (1, None), 2, 1, 0)  # of L in each
    mix = functools.partial(_mix, block=block, dropout_rate=dropout_rate, dropout_key=dropout_key)
    return over_length(mix, arguments, places, length)


def attend_cached(
    query_BLHK: jax.Array,
    key_BLHK: jax.Array,
    value_BLHK: jax.Array,
    signal: PositionSignal,
    cache: Cache,
    places_PL: jax.Array,
    added_PHLS: jax.Array | None,
    *,
    block: int = 0,
) -> tuple[jax.Array, Cache]:
    """Returns causal `attend` of L new tokens over the window up to each of them, and the cache with them in it.

    The logits are those of `attend` on the whole window.

    Args:
      signal: of one layer and of the whole window, one position set.
      cache: of that window, or of its first places up to the last new token; what it holds past a token's place is not
        read by that token.
      places_PL: int32, the places of the new tokens, consecutive along L; P = 1 (all samples alike) or B.
      added_PHLS: `position_logits` of the signal for these places.
      block: as of `attend`.
    """
    here = signal.at_places(places_PL)
    query_BLHK, key_BLHK = _place(query_BLHK, key_BLHK, here)
    firsts_B = jnp.broadcast_to(places_PL[:, 0], query_BLHK.shape[:1])
    write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    cache = Cache(write(cache.key, key_BLHK, firsts_B), write(cache.value, value_BLHK, firsts_B))
    return _mix(query_BLHK, cache.key, cache.value, None, added_PHLS, places_PL, block=block), cache


def position_logits(signal: PositionSignal, places_PL: jax.Array, keys: int) -> jax.Array | None:
    """Returns what features and bias add to the logits of tokens at some places of a window, float32[P, H or 1, L, S].

    Args:
      signal: of one layer and of the whole window, one position set; places_PL: as of `attend_cached`.
      keys: S, the first places of the window that are seen.
    """
    added_PHLS = None if signal.bias is None else jnp.moveaxis(signal.bias[:, places_PL, :keys], 1, 0)
    if signal.features is None:
        return added_PHLS
    query, key = (field.astype(jnp.float32) for field in signal.features)
    logits_PHLS = _feature_logits(query[0][places_PL], key[:, :keys])
    return logits_PHLS if added_PHLS is None else logits_PHLS + added_PHLS


def _mix(
    query_BLHK: jax.Array,
    key_BSHK: jax.Array,
    value_BSHK: jax.Array,
    features: Pair | None,
    bias_PHLS: jax.Array | None,
    last_seen_PL: jax.Array | None,
    number_L: jax.Array | None = None,
    *,
    block: int,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """`attend` of queries and keys that stand in their places; each query sees the keys up to its last one.

    `number_L` tells queries apart where only some of them are here, so that they draw other masks than those elsewhere.
    """
    batch, length, _, head_width = query_BLHK.shape
    query_BLHK = query_BLHK / math.sqrt(head_width)
    features = None if features is None else tuple(field.astype(jnp.float32) for field in features)
    rate = dropout_rate if dropout_key is not None else 0.0

    def rows(
        query: jax.Array,
        feature: jax.Array | None,
        bias: jax.Array | None,
        last_seen: jax.Array | None,
        first: jax.Array | int,
    ) -> jax.Array:
        logits = jnp.einsum("blhk,bshk->bhls", query, key_BSHK, preferred_element_type=jnp.float32)
        if feature is not None:
            logits = _add_sets(logits, _feature_logits(feature, features[1]))
        if bias is not None:
            logits = _add_sets(logits, bias)
        if last_seen is not None:
            seen = jnp.arange(logits.shape[-1]) <= last_seen[:, None, :, None]
            logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits)
        if rate:
            key = jax.random.fold_in(dropout_key, number_L[0] + first)
            weights = weights * jax.random.bernoulli(key, 1 - rate, weights.shape) / (1 - rate)
        return jnp.einsum("bhls,bshk->blhk", weights.astype(value_BSHK.dtype), value_BSHK)

    feature = None if features is None else features[0]
    if not block or jax.core.max_dim(length, block) == block:  # a symbolic length may be larger
        return rows(query_BLHK, feature, bias_PHLS, last_seen_PL, 0)

    count = -(-length // block)

    def cut(field: jax.Array | None, axis: int) -> jax.Array | None:
        """[..., L, ...] -> [count, ..., block, ...], padded at the end."""
        if field is None:
            return None
        padding = [(0, count * block - length) if at == axis else (0, 0) for at in range(field.ndim)]
        field = jnp.pad(field, padding)
        return jnp.moveaxis(field.reshape(*field.shape[:axis], count, block, *field.shape[axis + 1 :]), axis, 0)

    firsts = jnp.arange(count) * block
    blocks = (cut(query_BLHK, 1), cut(feature, 1), cut(bias_PHLS, 2), cut(last_seen_PL, 1), firsts)
    mixed = jax.lax.map(lambda part: jax.checkpoint(rows)(*part), blocks)
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * block, *mixed.shape[3:])[:, :length]


def attention_weights(query_BLHK: jax.Array, key_BSHK: jax.Array, signal: PositionSignal, *, causal: bool) -> jax.Array:
    """Returns the softmax of `attend`'s logits, float32[B, H, L, S], for pictures: training never holds this array."""
    batch, keys, heads, _ = key_BSHK.shape
    one_hot_BSHS = jnp.broadcast_to(jnp.eye(keys)[:, None], (batch, keys, heads, keys))  # mixing these shows the weights
    return jnp.moveaxis(attend(query_BLHK, key_BSHK, one_hot_BSHS, signal, causal=causal), 2, 1)


def _lay_out_feature(field_PLHF: jax.Array, length: str | None) -> jax.Array:
    return lay_out(field_PLHF, None, length, HEADS, None)


def _place(query: jax.Array, key: jax.Array, signal: PositionSignal) -> Pair:
    """Applies what a signal does to q and k themselves."""
    fit = functools.partial(fit_batch, batch=query.shape[0])
    dtype = query.dtype
    if signal.rotation is not None:
        cos, sin = (fit(part) for part in signal.rotation)
        query, key = (_rotate(array, cos, sin).astype(dtype) for array in (query, key))
    if signal.factors is not None:
        query, key = (array * fit(part).astype(dtype) for array, part in zip((query, key), signal.factors, strict=True))
    if signal.shifts is not None:
        query, key = (array + fit(part).astype(dtype) for array, part in zip((query, key), signal.shifts, strict=True))
    return query, key


def _rotate(array: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (2i, 2i + 1) of [B, L, H, K] by angles given as cos and sin [.., L, H or 1, K/2]."""
    even, odd = array[..., 0::2].astype(jnp.float32), array[..., 1::2].astype(jnp.float32)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(array.shape)


def _feature_logits(query_PLHF: jax.Array, key_PSHF: jax.Array) -> jax.Array:
    """Returns f_q . f_k, float32[P, H or 1, L, S]; either side may have one head for all, the keys one set for all."""
    heads = max(query_PLHF.shape[2], key_PSHF.shape[2])
    query, key = (jnp.broadcast_to(f, (*f.shape[:2], heads, f.shape[3])) for f in (query_PLHF, key_PSHF))
    if len(query) > len(key) == 1:  # no copy of the keys for each set
        return jnp.einsum("plhf,shf->phls", query, key[0], precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("plhf,pshf->phls", query, key, precision=jax.lax.Precision.HIGHEST)


def _add_sets(logits_BHLS: jax.Array, extra_PHLS: jax.Array) -> jax.Array:
    """Adds the logits of P position sets: sample i takes set i mod P."""
    sets = extra_PHLS.shape[0]
    grouped = logits_BHLS.reshape(-1, sets, *logits_BHLS.shape[1:])
    return (grouped + extra_PHLS).reshape(logits_BHLS.shape)
