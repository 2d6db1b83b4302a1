"""The one place where queries, keys, values and a position signal meet."""

import functools
import math

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqpe_jax import axes
from seqpe_jax.axes import BATCH, HEADS, LENGTH
from seqpe_jax.encodings.base import Pair, PositionSignal, broadcast_to_batch
from seqpe_jax.errors import InputError
from seqpe_jax.models.attention_dispatch import dispatch
from seqpe_jax.models.attention_inputs import AttentionInputs, feature_logits, shard_position_sets


@flax.struct.dataclass
class KVCache:
    """What one layer remembers of a window of S places, so that a new token needs no other token's states.

    Attributes:
      key: [B, S, H, K], turned, multiplied and shifted as the signal says (2 K wide where they are arrows).
      value: [B, S, H, K].
      fade: float32[B, S, H], of `attend`, where the layer computes it.
    """

    key: jax.Array
    value: jax.Array
    cum_log_gate: jax.Array | None = None


def attend(
    query_BLHK: Float[Array, "B L H K"],
    key_BSHK: Float[Array, "B S H K"],
    value_BSHV: Float[Array, "B S H V"],
    signal: PositionSignal,
    cum_log_gate_BLH: jax.Array | None = None,
    *,
    causal: bool = True,
    kind: str = "auto",
    block: int = 0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B L H V"]:
    """Returns softmax(logits) @ value, [B, L, H, V] in the values' dtype.

    logits = (q . k) / sqrt(K) + f_q . f_k + bias, with q and k turned, multiplied and shifted as the signal says; where the
    signal has a relation, it is applied to the product of q and k alone.
    Logits and softmax are float32; so is the product of features, at full precision, whatever the dtype of q and k.

    Args:
      signal: of one layer (`PositionSignal.at_layer`).
      fade_BLH: float32, what the layer has of each token: logits gain fade[query] - fade[key] (`forget_gate_features`) too.
      causal: query l sees keys up to l + (S - L).
      kind: the implementation, "auto" or one of `choice.KINDS`; block: of queries and keys (`choice.dispatch`).
      dropout_rate, dropout_key: dropout on attention weights; no key, no dropout.

    Raises:
      InputError: as `choice.dispatch`.
    """
    causal_offset_P = jnp.full(1, key_BSHK.shape[1] - query_BLHK.shape[1], jnp.int32) if causal else None
    bias_PHLS = None if signal.bias is None else signal.bias[None]
    query_BLHK, key_BSHK = _positioned(query_BLHK, key_BSHK, signal)
    dropout_seed = None
    if dropout_rate and dropout_key is not None:
        dropout_seed = jax.lax.bitcast_convert_type(jax.random.bits(dropout_key, dtype=jnp.uint32), jnp.int32)
    logit_query_key = (
        signal.logit_query_key
        if cum_log_gate_BLH is None
        else forget_gate_features(cum_log_gate_BLH, cum_log_gate_BLH, signal.logit_query_key)
    )
    arguments = AttentionInputs(
        query_BLHK,
        key_BSHK,
        value_BSHV,
        logit_query_key,
        bias_PHLS,
        signal.relative_bias,
        signal.bias_params,
        causal_offset=causal_offset_P,
        dropout_seed=dropout_seed,
        dropout_rate=dropout_rate,
    )
    return _mix(arguments, kind, block)


def forget_gate_features(query_BLH: jax.Array, key_BSH: jax.Array, logit_query_key: Pair | None = None) -> Pair:
    """Returns the features with which logits gain query - key, float32[B, L, H, 2] and float32[B, S, H, 2].

    With sums over the tokens so far, that is the sum over the tokens after the key up to the query.

    Args:
      features: further ones of P position sets, [P, L, H or 1, F] and [P, S, H or 1, F], whose columns come first.
    """
    query, key = jnp.stack([query_BLH, jnp.ones_like(query_BLH)], -1), jnp.stack([jnp.ones_like(key_BSH), -key_BSH], -1)
    sides = (query.astype(jnp.float32), key.astype(jnp.float32))
    if logit_query_key is None:
        return sides

    def joined(own_PLHF: jax.Array, gate_BLHF: jax.Array) -> jax.Array:
        own = broadcast_to_batch(own_PLHF.astype(jnp.float32), gate_BLHF.shape[0])
        own = jnp.broadcast_to(own, (*gate_BLHF.shape[:-1], own.shape[-1]))
        return jnp.concatenate([own, gate_BLHF], axis=-1)

    return joined(logit_query_key[0], sides[0]), joined(logit_query_key[1], sides[1])


def apply_position_signal(
    query_BLHK: Float[Array, "B L H K"],
    key_BSHK: Float[Array, "B S H K"],
    value_BSHV: Float[Array, "B S H V"],
    signal: PositionSignal,
) -> tuple[Float[Array, "B L H W"], Float[Array, "B S H W"], Float[Array, "B S H _"]]:
    """Returns queries, keys and values with their positions in them, for any attention of one's own.

        q, k, v = place(q, k, v, signal.at_layer(layer))
        out = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True)[..., :head_width]

    What is mixed equals `attend`. Queries are divided by sqrt(K); features stand behind the K columns, and values are
    filled up with zeros, so that all three have one width. Where there are features, all are float32: their
    products must be. What a signal adds to tokens (`signal.input_embedding`) is for the embedding, before the first layer.

    Args:
      signal: of one layer (`PositionSignal.at_layer`).

    Raises:
      InputError: the signal has a bias or a relation, which stands for no query or key alone.
    """
    if signal.bias is not None or signal.relative_bias is not None:
        raise InputError("this encoding adds a bias to pairs of places: use seqpe_jax.attend, which can add it")
    query, key = _positioned(query_BLHK, key_BSHK, signal)
    query = query / math.sqrt(query.shape[-1])
    placed, value = [query, key], value_BSHV
    if signal.logit_query_key is not None:
        value = value.astype(jnp.float32)
        for side, field in enumerate(signal.logit_query_key):
            field = broadcast_to_batch(field.astype(jnp.float32), query.shape[0])
            field = jnp.broadcast_to(field, (*placed[side].shape[:-1], field.shape[-1]))
            placed[side] = jnp.concatenate([placed[side].astype(jnp.float32), field], axis=-1)
    missing = max(0, placed[0].shape[-1] - value.shape[-1])
    return placed[0], placed[1], jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, missing)))


def attend_cached(
    query_BLHK: jax.Array,
    key_BLHK: jax.Array,
    value_BLHK: jax.Array,
    signal: PositionSignal,
    cache: KVCache,
    places_PL: jax.Array,
    added_PHLS: jax.Array | None = None,
    log_gate_BLH: jax.Array | None = None,
    *,
    kind: str = "auto",
    block: int = 0,
) -> tuple[jax.Array, KVCache]:
    """Returns causal `attend` of L new tokens over the window up to each of them, and the cache with them in it.

    The logits are those of `attend` on the whole window.

    Args:
      signal: of one layer and of the whole window, one position set.
      cache: of that window, or of its first places up to the last new token; what it holds past a token's place is not
        read by that token.
      places_PL: int32, the places of the new tokens, consecutive along L; P = 1 (all samples alike) or B.
      added_PHLS: `position_logits` of the signal for these places, where layers share it; None = of this layer's signal.
      step_BLH: float32, by how much each new token raises the fade of `attend` over that of the one before it.
      kind, block: as of `attend`.

    Raises:
      InputError: as `choice.dispatch`.
    """
    here = signal.at_tokens(places_PL)
    query_BLHK, key_BLHK = _positioned(query_BLHK, key_BLHK, here)
    firsts_B = jnp.broadcast_to(places_PL[:, 0], query_BLHK.shape[:1])
    write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
    cum_log_gate_BLH = cum_log_gate_BSH = None
    if log_gate_BLH is not None:
        before_BH = jax.vmap(lambda fade_SH, first: jnp.where(first, fade_SH[first - 1], 0.0))(
            cache.cum_log_gate, firsts_B
        )
        cum_log_gate_BLH = before_BH[:, None] + jnp.cumsum(log_gate_BLH, axis=1)
        cum_log_gate_BSH = write(cache.cum_log_gate, cum_log_gate_BLH, firsts_B)
    cache = KVCache(write(cache.key, key_BLHK, firsts_B), write(cache.value, value_BLHK, firsts_B), cum_log_gate_BSH)
    logit_query_key, bias_PHLS, keys = None, added_PHLS, cache.key.shape[1]
    if added_PHLS is None:
        logit_query_key = (
            None if signal.logit_query_key is None else (here.logit_query_key[0], signal.logit_query_key[1][:, :keys])
        )
        bias_PHLS = None if signal.bias is None else jnp.moveaxis(signal.bias[:, places_PL, :keys], 1, 0)
    if cum_log_gate_BLH is not None:
        logit_query_key = forget_gate_features(cum_log_gate_BLH, cum_log_gate_BSH, logit_query_key)
    relative_bias = here.relative_bias and here.relative_bias.replace(key=here.relative_bias.key[:, :keys])
    inputs = AttentionInputs(
        query_BLHK,
        cache.key,
        cache.value,
        logit_query_key,
        bias_PHLS,
        relative_bias,
        here.bias_params,
        causal_offset=places_PL[:, 0],
    )
    return _mix(inputs, kind, block), cache


def position_logits(signal: PositionSignal, places_PL: jax.Array, keys: int) -> jax.Array | None:
    """Returns what features and bias add to the logits of tokens at some places of a window, float32[P, H or 1, L, S].

    Args:
      signal: of one layer and of the whole window, one position set; places_PL: as of `attend_cached`.
      keys: S, the first places of the window that are seen.
    """
    added_PHLS = None if signal.bias is None else jnp.moveaxis(signal.bias[:, places_PL, :keys], 1, 0)
    if signal.logit_query_key is None:
        return added_PHLS
    query, key = (field.astype(jnp.float32) for field in signal.logit_query_key)
    logits_PHLS = feature_logits(query[0][places_PL], key[:, :keys])
    return logits_PHLS if added_PHLS is None else logits_PHLS + added_PHLS


def _mix(inputs: AttentionInputs, kind: str, block: int) -> jax.Array:
    """`attend` of queries and keys that stand in their places, by each device for its own samples, queries and heads.

    Operands: of all samples, with any numbers of position sets.
    """
    query, rate = inputs.query / math.sqrt(inputs.query.shape[-1]), inputs.dropout_rate
    logit_query_key = inputs.logit_query_key and tuple(field.astype(jnp.float32) for field in inputs.logit_query_key)
    batch, length, heads, _ = query.shape
    relative_bias, params = inputs.relative_bias, inputs.bias_params
    inputs = inputs.replace(query=query, logit_query_key=logit_query_key, heads=jnp.arange(heads, dtype=jnp.int32))
    chosen = dispatch(kind, block, inputs, device=axes.device(), split=axes.shards(LENGTH) > 1)
    if query.shape[1] == 1:  # a token to decode: nothing to divide
        return chosen(inputs)
    leaves, tree = jax.tree.flatten(params)

    def of_device(
        query, key, value, f_q, f_k, bias, causal_offset, dropout_seed, samples, rows, heads, r_q, r_k, *leaves
    ):
        align = functools.partial(shard_position_sets, first=samples[0], batch=query.shape[0])
        global_offset = None if dropout_seed is None else jnp.stack([samples[0], heads[0], rows[0]])
        causal_offset = None if causal_offset is None else align(causal_offset) + rows[0]
        logit_query_key = None if f_q is None else (align(f_q), align(f_k))
        here = relative_bias and relative_bias.replace(query=align(r_q), key=align(r_k))
        own = (here, tree.unflatten(leaves), heads)
        return chosen(
            AttentionInputs(
                query, key, value, logit_query_key, align(bias), *own, causal_offset, dropout_seed, global_offset, rate
            )
        )

    f_q, f_k = (None, None) if logit_query_key is None else logit_query_key
    r_q, r_k = (None, None) if relative_bias is None else (relative_bias.query, relative_bias.key)
    numbers = (jnp.arange(size, dtype=jnp.int32) for size in (batch, length, heads))
    sets = BATCH if f_q is not None and f_q.shape[0] == batch else None  # a set for each sample, as gates have
    return axes.shard_map(
        of_device,
        (
            query,
            inputs.key,
            inputs.value,
            f_q,
            f_k,
            inputs.bias,
            inputs.causal_offset,
            inputs.dropout_seed,
            *numbers,
            r_q,
            r_k,
            *leaves,
        ),
        (
            (BATCH, LENGTH, HEADS, None),
            (BATCH, None, HEADS, None),
            (BATCH, None, HEADS, None),
            (sets, LENGTH, HEADS, None),
            (sets, None, HEADS, None),
            (None, HEADS, LENGTH, None),
            (None,),
            (),
            (BATCH,),
            (LENGTH,),
            (HEADS,),
            (None, LENGTH, None),
            (None, None, None),
            *((None,) * leaf.ndim for leaf in leaves),
        ),
    )


def attention_weights(query_BLHK: jax.Array, key_BSHK: jax.Array, signal: PositionSignal, *, causal: bool) -> jax.Array:
    """Returns the softmax of `attend`'s logits, float32[B, H, L, S], for pictures: training never holds this array."""
    batch, keys, heads, _ = key_BSHK.shape
    one_hot_BSHS = jnp.broadcast_to(
        jnp.eye(keys)[:, None], (batch, keys, heads, keys)
    )  # mixing these shows the weights
    return jnp.moveaxis(attend(query_BLHK, key_BSHK, one_hot_BSHS, signal, causal=causal, kind="reference"), 2, 1)


def _positioned(query: jax.Array, key: jax.Array, signal: PositionSignal) -> Pair:
    """Applies what a signal does to q and k themselves."""
    fit = functools.partial(broadcast_to_batch, batch=query.shape[0])
    dtype = query.dtype
    if signal.rotation is not None:
        cos, sin = (fit(part) for part in signal.rotation)
        query, key = (_rotate(array, cos, sin) for array in (query, key))
    if signal.polar_phase is not None:
        query, key = _arrows(
            query, key, signal.polar_num_heads, *(fit(part) for part in signal.polar_phase), signal.polar_key_phase
        )
    if signal.multiplicative is not None:
        query, key = (
            array * fit(part).astype(dtype) for array, part in zip((query, key), signal.multiplicative, strict=True)
        )
    if signal.additive is not None:
        query, key = (
            array + fit(part).astype(dtype) for array, part in zip((query, key), signal.additive, strict=True)
        )
    return query, key


def _arrows(
    query: jax.Array, key: jax.Array, count: int | None, cos: jax.Array, sin: jax.Array, shift_HK: jax.Array
) -> Pair:
    """Queries and keys [B, L, H, K] as the coordinates [B, L, H, 2 K] of K arrows of length softplus(q), softplus(k).

    Their products are as large as those of K numbers, so queries make up for being divided by sqrt(2 K) later.

    Args:
      count: the first heads that are arrows, None = all; in the others q and k keep their sign, at the angle 0.
    """

    def arrows(array: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        length = jax.nn.softplus(array.astype(jnp.float32))
        if count is not None:
            arrow_H1 = (jnp.arange(array.shape[2]) < count)[:, None]
            length = jnp.where(arrow_H1, length, array.astype(jnp.float32))
            cos, sin = jnp.where(arrow_H1, cos, 1.0), jnp.where(arrow_H1, sin, 0.0)
        return jnp.concatenate([length * cos, length * sin], axis=-1).astype(array.dtype)

    turn, lift = jnp.cos(shift_HK), jnp.sin(shift_HK)
    placed = arrows(query, cos, sin) * jnp.asarray(math.sqrt(2.0), query.dtype)
    return placed, arrows(key, cos * turn - sin * lift, sin * turn + cos * lift)


def _rotate(array: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the first F pairs (2i, 2i + 1) of [B, L, H, K] by angles given as cos and sin [.., L, H or 1, F]."""
    width = 2 * cos.shape[-1]
    pairs, rest = array[..., :width].astype(jnp.float32), array[..., width:]
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    turned = (
        jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(pairs.shape).astype(array.dtype)
    )
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
