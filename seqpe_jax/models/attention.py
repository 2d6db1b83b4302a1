"""Attention with position encodings: applies a PositionSignal to q, k and logits, then calls a backend.

`attend` serves training and evaluation, `attend_cached` prefill and decoding, and `apply_position_signal` attention
functions of other libraries. The backends in `attention_dispatch` compute them.
"""

import functools
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from seqpe_jax import axes
from seqpe_jax.axes import BATCH, HEADS, LENGTH
from seqpe_jax.encodings.position_signal import Pair, PositionSignal, broadcast_to_batch
from seqpe_jax.errors import InputError
from seqpe_jax.models.attention_context import attend_on_device, make_plan
from seqpe_jax.models.attention_dispatch import AUTO_BLOCKS, KernelBlocks
from seqpe_jax.models.attention_inputs import AttentionInputs, position_dot_product

PARABOLA_MESSAGE = (
    "the shape of this encoding's parabolas depends on the queries' tokens: replace signal.parabola by position queries and keys "
    "(models.transformer.parabola_query_key)"
)


@flax.struct.dataclass
class KVCache:
    """Keys and values of one layer for the S token indices of a sequence.

    A layer whose attention has a window of w = S tokens needs no more rows: then they are a ring, in which token t is in row
    t mod w. With fewer tokens than w it has a row for each.

    Attributes:
      key: [B, S, G, K], with the position signal applied; 2 K wide under polar coordinates.
      value: [B, S, G, K].
      cum_log_gate: float32[B, S, H], cumulative log forget gate; None where the layer has no gate.
    """

    key: jax.Array
    value: jax.Array
    cum_log_gate: jax.Array | None = None


def attend(
    query_BLHK: Float[Array, "B L H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGV: Float[Array, "B S G V"],
    signal: PositionSignal,
    cum_log_gate_BLH: jax.Array | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    cap: float = 0.0,
    scale: float | None = None,
    kind: str = "auto",
    block: int = 0,
    kernel_blocks: KernelBlocks = AUTO_BLOCKS,
    context: str = "auto",
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B L H V"]:
    """Returns softmax(logits) @ value, [B, L, H, V] in the values' dtype.

    logits = relative_bias(scale * q . k) + position_query . position_key + bias + cum_log_gate[query] - cum_log_gate[key],
    with q and k rotated, scaled and shifted by the signal. Logits and softmax are float32; position_query . position_key is
    float32 at full precision, whatever the dtype of q and k.

    Args:
      query_BLHK: queries.
      key_BSGK: keys; G divides H, and query head h reads key and value head h // (H // G).
      value_BSGV: values.
      signal: PositionSignal of one layer (`PositionSignal.at_layer`).
      cum_log_gate_BLH: float32, cumulative log forget gate; None = no gate.
      causal: query l attends to keys up to l + (S - L).
      window: causal attention to that many keys at most, the query's own the last; 0 = to all before it.
      cap: logits become cap * tanh(logits / cap) before they are masked; 0 = they stay.
      scale: of q . k; None = 1 / sqrt(K).
      kind: "auto" or one of `attention_dispatch.BACKENDS`.
      block: queries and keys per block; 0 = automatic (`attention_dispatch.dispatch`).
      kernel_blocks: sizes of the tiles of the TPU kernels.
      context: where tokens are split over devices: "auto" or one of `attention_context.MODES`.
      dropout_rate: dropout on attention weights.
      dropout_key: PRNG key; None = no dropout.

    Raises:
      InputError: the requested backend does not support these inputs, the signal has parabolas, its terms differ by query heads
        that share a key head, or attention in both directions has a window.
    """
    if signal.parabola is not None:
        raise InputError(PARABOLA_MESSAGE)
    if window and not causal:
        raise InputError("a window is of causal attention: leave it out, or set causal=True")
    _check_groups(query_BLHK, key_BSGK)
    causal_offset_P = jnp.full(1, key_BSGK.shape[1] - query_BLHK.shape[1], jnp.int32) if causal else None
    query_BLHK, key_BSGK = _scaled_query_key(query_BLHK, key_BSGK, signal, scale)
    dropout_seed = None
    if dropout_rate and dropout_key is not None:
        dropout_seed = jax.lax.bitcast_convert_type(jax.random.bits(dropout_key, dtype=jnp.uint32), jnp.int32)
    position_query_key = signal.position_query_key
    if cum_log_gate_BLH is not None:
        if signal.per_shard:
            copies = len(query_BLHK) // len(position_query_key[0])
            position_query_key = tuple(jnp.repeat(field, copies, axis=0) for field in position_query_key)
        position_query_key = forget_gate_query_key(cum_log_gate_BLH, cum_log_gate_BLH, position_query_key)
    inputs = AttentionInputs(
        query_BLHK,
        key_BSGK,
        value_BSGV,
        position_query_key,
        bias=None if signal.bias is None else signal.bias[None],
        relative_bias=signal.relative_bias,
        bias_params=signal.bias_params,
        documents=None if signal.documents is None else (signal.documents, signal.documents),
        causal_offset=causal_offset_P,
        dropout_seed=dropout_seed,
        dropout_rate=dropout_rate,
        window=window,
        cap=cap,
    )
    return _attention(inputs, kind, block, kernel_blocks, context, signal.per_shard)


def forget_gate_query_key(
    query_cum_log_gate_BLH: jax.Array, key_cum_log_gate_BSH: jax.Array, position_query_key: Pair | None = None
) -> Pair:
    """Encodes gate[query] - gate[key] as a rank-2 dot product of float32[B, L, H, 2] and float32[B, S, H, 2].

    The difference is the sum of the log gates of the tokens after the key, up to the query.

    Args:
      query_cum_log_gate_BLH: cumulative log gate at the queries.
      key_cum_log_gate_BSH: cumulative log gate at the keys.
      position_query_key: position queries [P, L, H or 1, F] and keys [P, S, H or 1, F], to which the columns are appended.
    """
    query = jnp.stack([query_cum_log_gate_BLH, jnp.ones_like(query_cum_log_gate_BLH)], -1).astype(jnp.float32)
    key = jnp.stack([jnp.ones_like(key_cum_log_gate_BSH), -key_cum_log_gate_BSH], -1).astype(jnp.float32)
    if position_query_key is None:
        return query, key
    return _append_gate(position_query_key[0], query), _append_gate(position_query_key[1], key)


def _append_gate(position_PLHF: jax.Array, gate_BLHF: jax.Array) -> jax.Array:
    own = broadcast_to_batch(position_PLHF.astype(jnp.float32), gate_BLHF.shape[0])
    own = jnp.broadcast_to(own, (*gate_BLHF.shape[:-1], own.shape[-1]))
    return jnp.concatenate([own, gate_BLHF], axis=-1)


def apply_position_signal(
    query_BLHK: Float[Array, "B L H K"],
    key_BSGK: Float[Array, "B S G K"],
    value_BSGV: Float[Array, "B S G V"],
    signal: PositionSignal,
) -> tuple[Float[Array, "B L H W"], Float[Array, "B S G W"], Float[Array, "B S G _"]]:
    """Returns queries, keys and values that carry their positions, for any attention function.

        q, k, v = apply_position_signal(q, k, v, signal.at_layer(layer))
        out = jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True)[..., :head_width]

    The result equals `attend`. Queries are divided by sqrt(K), position queries and keys are appended to queries and keys,
    and values are padded with zeros to the same width; all three are then float32, since their products must be. The part of
    a signal that is added to token embeddings (`signal.input_embedding`) is not applied here.

    Args:
      query_BLHK: queries.
      key_BSGK: keys; G divides H, as in `attend`.
      value_BSGV: values.
      signal: PositionSignal of one layer (`PositionSignal.at_layer`).

    Raises:
      InputError: the signal has a bias or a relative bias, which no query or key can carry alone, or parabolas, or its terms
        differ by query heads that share a key head.
    """
    if signal.parabola is not None:
        raise InputError(PARABOLA_MESSAGE)
    if signal.bias is not None or signal.relative_bias is not None:
        raise InputError(
            "this encoding has a pairwise attention bias, which cannot be folded into q and k; call seqpe_jax.attend instead"
        )
    _check_groups(query_BLHK, key_BSGK)
    query, key = _scaled_query_key(query_BLHK, key_BSGK, signal, None)
    value = value_BSGV
    if signal.position_query_key is not None:
        query, key = (
            _append_position(array, _of_heads(field, array.shape[2], "position queries and keys"))
            for array, field in zip((query, key), signal.position_query_key, strict=True)
        )
        value = value.astype(jnp.float32)
    padding = max(0, query.shape[-1] - value.shape[-1])
    return query, key, jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, padding)))


def _append_position(array_BLHK: jax.Array, position_PLHF: jax.Array) -> jax.Array:
    field = broadcast_to_batch(position_PLHF.astype(jnp.float32), array_BLHK.shape[0])
    field = jnp.broadcast_to(field, (*array_BLHK.shape[:-1], field.shape[-1]))
    return jnp.concatenate([array_BLHK.astype(jnp.float32), field], axis=-1)


def attend_cached(
    query_BLHK: jax.Array,
    key_BLHK: jax.Array,
    value_BLHK: jax.Array,
    signal: PositionSignal,
    cache: KVCache,
    token_index_PL: jax.Array,
    position_logits_PHLS: jax.Array | None = None,
    log_gate_BLH: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    *,
    window: int = 0,
    cap: float = 0.0,
    scale: float | None = None,
    kind: str = "auto",
    block: int = 0,
    kernel_blocks: KernelBlocks = AUTO_BLOCKS,
    context: str = "auto",
) -> tuple[jax.Array, KVCache]:
    """Returns causal attention of L new tokens over the window up to each of them, and the cache with them written.

    The logits are those of `attend` on the whole window.

    Args:
      query_BLHK, key_BLHK, value_BLHK: of the new tokens.
      signal: PositionSignal of one layer and of the whole window, one position set.
      cache: KV cache of the sequence, or of its first indices up to the last new token, or a ring of `window` rows; entries past
        a token's index are not read.
      token_index_PL: int32, indices of the new tokens in the window, consecutive along L; P = 1 (the same for all samples)
        or B.
      position_logits_PHLS: `position_logits` at these indices, where layers share them; None = computed from `signal`.
      log_gate_BLH: float32, log forget gate of each new token; None = no gate.
      lengths_B: int32, number of new tokens that are no padding, which a ring must not hold; None = all.
      window, cap, scale, kind, block, kernel_blocks, context: as in `attend`.

    Raises:
      InputError: the requested backend does not support these inputs, or the signal differs by query heads that share a key head.
    """
    own = signal.at_tokens(token_index_PL)
    _check_groups(query_BLHK, key_BLHK)
    query_BLHK, key_BLHK = _scaled_query_key(query_BLHK, key_BLHK, own, scale)
    first_B, ring = jnp.broadcast_to(token_index_PL[:, 0], query_BLHK.shape[:1]), cache.key.shape[1] == window
    cum_log_gate_BLH = None
    if log_gate_BLH is not None:
        last_row_B = (first_B - 1) % window if ring else first_B - 1
        before_BH = jax.vmap(lambda gate_SH, first, row: jnp.where(first, gate_SH[row], 0.0))(
            cache.cum_log_gate, first_B, last_row_B
        )
        cum_log_gate_BLH = before_BH[:, None] + jnp.cumsum(log_gate_BLH, axis=1)
    new, token_PN = (
        KVCache(key_BLHK, value_BLHK, cum_log_gate_BLH),
        _key_tokens(token_index_PL, cache.key.shape[1], window),
    )
    if ring and query_BLHK.shape[1] > 1:
        attended, cache = _append_to_ring(cache, new, token_index_PL, token_PN, lengths_B)
        causal_offset_P = token_index_PL[:, 0] - token_PN[:, 0]
    else:
        # A ring is filled in order: before it is full, its last rows are masked as those of a longer cache.
        write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
        row_B = first_B % window if ring else first_B
        attended = cache = jax.tree.map(lambda rows, of_new: write(rows, of_new, row_B), cache, new)
        causal_offset_P, window = token_index_PL[:, 0], 0 if cache.key.shape[1] <= window else window
    position_query_key, bias_PHLS = None, position_logits_PHLS
    if position_logits_PHLS is None:
        position_query_key = (
            None
            if signal.position_query_key is None
            else (own.position_query_key[0], _at_keys(signal.position_query_key[1], token_PN))
        )
        bias_PHLS = _bias_rows(signal, token_index_PL, token_PN)
    if cum_log_gate_BLH is not None:
        position_query_key = forget_gate_query_key(cum_log_gate_BLH, attended.cum_log_gate, position_query_key)
    inputs = AttentionInputs(
        query_BLHK,
        attended.key,
        attended.value,
        position_query_key,
        bias_PHLS,
        relative_bias=own.relative_bias and own.relative_bias.replace(key=_at_keys(own.relative_bias.key, token_PN)),
        bias_params=own.bias_params,
        causal_offset=causal_offset_P,
        window=window,
        cap=cap,
    )
    return _attention(inputs, kind, block, kernel_blocks, context), cache


def _key_tokens(token_index_PL: jax.Array, rows: int, window: int) -> jax.Array | int:
    """Returns the tokens to whose keys new tokens attend, int32[P, N]; or N, where they are the first N of the sequence.

    Args:
      token_index_PL: int32, indices of the new tokens.
      rows: of the cache.
      window: of the layer; with as many rows the cache is a ring, in whose order the keys of a single token are. Several
        tokens attend to those of the window before them and to one another, in the order of the sequence.
    """
    if rows != window:
        return rows
    first_P1, length = token_index_PL[:, :1], token_index_PL.shape[1]
    if length == 1:
        return _ring_tokens(first_P1, window)
    return jnp.maximum(first_P1 - window + 1, 0) + jnp.arange(window - 1 + length)


def _ring_tokens(newest_P1: jax.Array, window: int) -> jax.Array:
    """Returns the token in each row of a ring, int32[P, w], negative where there is none; newest_P1: token added last."""
    return newest_P1 - (newest_P1 - jnp.arange(window)) % window


def _append_to_ring(
    ring: KVCache, new: KVCache, token_index_PL: jax.Array, token_PN: jax.Array, lengths_B: jax.Array | None
) -> tuple[KVCache, KVCache]:
    """Returns the keys and values of some tokens, and the ring with the new ones.

    Args:
      ring: cache of w rows, with the tokens before the new ones.
      new: keys and values of L new tokens.
      token_index_PL: int32, indices of the new tokens.
      token_PN: int32, tokens of the ring and the new ones.
      lengths_B: int32, number of new tokens that are added; None = all.
    """
    window, length, first_P1 = ring.key.shape[1], token_index_PL.shape[1], token_index_PL[:, :1]
    joined = jax.tree.map(lambda *rows: jnp.concatenate(rows, axis=1), ring, new)
    new_row_PN = window + jnp.minimum(token_PN - first_P1, length - 1)
    attended_row_PN = jnp.where(token_PN < first_P1, token_PN % window, new_row_PN)
    added = length if lengths_B is None else lengths_B[:, None]
    newest_BS = _ring_tokens(first_P1 + added - 1, window)
    ring_row_BS = jnp.where(newest_BS >= first_P1, window + newest_BS - first_P1, jnp.arange(window))

    def take(row_PN: jax.Array) -> KVCache:
        if len(row_PN) == 1:
            return jax.tree.map(lambda rows: jnp.take(rows, row_PN[0], axis=1), joined)
        return jax.tree.map(lambda rows: jax.vmap(lambda own, row_N: own[row_N])(rows, row_PN), joined)

    return take(attended_row_PN), take(ring_row_BS)


def position_logits(signal: PositionSignal, token_index_PL: jax.Array, rows: int, window: int = 0) -> jax.Array | None:
    """Returns bias + position_query . position_key of the tokens at some indices, float32[P, H or 1, L, S] or None.

    Args:
      signal: PositionSignal of one layer and of the whole sequence, one position set.
      token_index_PL: int32, indices of the tokens.
      rows: of the cache whose keys they attend to.
      window: of the layer, as in `attend`.
    """
    token_PN = _key_tokens(token_index_PL, rows, window)
    bias_PHLS = _bias_rows(signal, token_index_PL, token_PN)
    if signal.position_query_key is None:
        return bias_PHLS
    query, key = (field.astype(jnp.float32) for field in signal.position_query_key)
    logits_PHLS = position_dot_product(query[0][token_index_PL], _at_keys(key, token_PN))
    return logits_PHLS if bias_PHLS is None else logits_PHLS + bias_PHLS


def _at_keys(field_1SX: jax.Array, token_PN: jax.Array | int) -> jax.Array:
    """Returns a field of the whole sequence at the keys of `_key_tokens`, [P, N, ...]."""
    return field_1SX[:, :token_PN] if isinstance(token_PN, int) else field_1SX[0][token_PN]


def _bias_rows(signal: PositionSignal, token_index_PL: jax.Array, token_PN: jax.Array | int) -> jax.Array | None:
    """Returns the bias of the queries at some indices for the keys of `_key_tokens`, float32[P, H or 1, L, N]."""
    if signal.bias is None:
        return None
    if isinstance(token_PN, int):
        return jnp.moveaxis(signal.bias[:, token_index_PL, :token_PN], 1, 0)
    return jnp.moveaxis(signal.bias[:, token_index_PL[:, :, None], token_PN[:, None]], 1, 0)


def attention_weights(query_BLHK: jax.Array, key_BSGK: jax.Array, signal: PositionSignal, **options: Any) -> jax.Array:
    """Returns the softmax of the logits of `attend`, float32[B, H, L, S], for plots; training never holds this array.

    Args:
      query_BLHK, key_BSGK, signal: as in `attend`.
      **options: causal, window, cap and scale of `attend`.
    """
    batch, keys, groups, _ = key_BSGK.shape
    identity_BSGS = jnp.broadcast_to(jnp.eye(keys)[:, None], (batch, keys, groups, keys))  # as values: weights @ I
    return jnp.moveaxis(attend(query_BLHK, key_BSGK, identity_BSGS, signal, kind="reference", **options), 2, 1)


def _attention(
    inputs: AttentionInputs,
    kind: str,
    block: int,
    kernel_blocks: KernelBlocks,
    context: str,
    per_shard: bool = False,
) -> jax.Array:
    """Returns the attention of all devices' inputs, [B, L, H, V], each device computing its own samples, queries and heads.

    Args:
      inputs: `heads` and `global_offset` unset.
      kind, block, kernel_blocks, context: as in `attend`.
      per_shard: see `PositionSignal`.
    """
    batch, length, heads, _ = inputs.query.shape
    group = heads // inputs.key.shape[2]  # query heads of a key head
    _check_head_shards(heads, group)
    inputs = inputs.replace(
        position_query_key=inputs.position_query_key
        and tuple(field.astype(jnp.float32) for field in inputs.position_query_key),
        heads=jnp.arange(heads, dtype=jnp.int32),
    )
    plan = make_plan(
        inputs,
        kind=kind,
        block=block,
        kernel_blocks=kernel_blocks,
        mode=context,
        device=axes.device(),
        context_axes=axes.mesh_axes(LENGTH),
        shards=(axes.shards(LENGTH), axes.shards(BATCH), axes.shards(HEADS)),
    )
    if length == 1:  # one token to decode: nothing to split over devices
        return plan.backend.attend(inputs)
    split = plan.split
    leaves, treedef = jax.tree.flatten(inputs)
    specs = _logical_axes(inputs, LENGTH if split.axes else None, per_shard)
    names = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    indices = jnp.arange(batch, dtype=jnp.int32), jnp.arange(length, dtype=jnp.int32)

    def on_device(*arguments: jax.Array) -> jax.Array:
        *shard, samples, rows = arguments
        own = _with_own_groups(treedef.unflatten(shard), group)
        if split.axes:
            first_row = jnp.zeros_like(rows[0])  # that of each chunk is added later
            return attend_on_device(own.on_device(samples[0], first_row), plan)
        return plan.backend.attend(own.on_device(samples[0], rows[0]))

    arguments = (*leaves, *indices), (*map(tuple, names), (BATCH,), (LENGTH,))
    return axes.shard_map(on_device, *arguments, multiple=split.chunks)


def _check_groups(query: jax.Array, key: jax.Array) -> None:
    """Raises: InputError: the key heads do not divide the query heads."""
    heads, groups = query.shape[2], key.shape[2]
    if heads % groups:
        raise InputError(
            f"{groups} heads of keys cannot serve {heads} heads of queries: their number must divide {heads}"
        )


def _check_head_shards(heads: int, group: int) -> None:
    """Raises: InputError: queries of a device read parts of several key heads, none of which it would have alone."""
    count = axes.shards(HEADS)
    if count == 1 or heads % count:  # then no head is split off
        return
    own = heads // count
    if own % group and group % own:
        raise InputError(
            f"mesh.tensor={count} divides neither model.kv_heads={heads // group} nor is it a multiple of it, so that a device "
            "would need parts of several heads of keys: choose another mesh.tensor"
        )


def _with_own_groups(inputs: AttentionInputs, group: int) -> AttentionInputs:
    """Returns the inputs of a device with the key head of its queries, where it has all key heads and queries of one.

    Args:
      inputs: a device's shard.
      group: query heads of a key head.
    """
    if inputs.query.shape[2] == inputs.key.shape[2] * group:
        return inputs
    first = inputs.heads[0] // group
    key, value = (jax.lax.dynamic_slice_in_dim(array, first, 1, axis=2) for array in (inputs.key, inputs.value))
    return inputs.replace(key=key, value=value)


def _logical_axes(inputs: AttentionInputs, keys: str | None, per_shard: bool) -> AttentionInputs:
    """Returns the logical axis names of every array, a PartitionSpec in its place.

    Args:
      inputs: inputs of all devices.
      keys: logical name of the keys.
      per_shard: see `PositionSignal`.
    """
    sets = BATCH if per_shard else None
    if inputs.position_query_key is not None and inputs.position_query_key[0].shape[0] == inputs.query.shape[0]:
        sets = BATCH  # one set per sample, as forget gates have
    relative_bias = inputs.relative_bias
    return inputs.replace(
        query=PartitionSpec(BATCH, LENGTH, HEADS, None),
        key=PartitionSpec(BATCH, keys, HEADS, None),
        value=PartitionSpec(BATCH, keys, HEADS, None),
        position_query_key=inputs.position_query_key
        and (PartitionSpec(sets, LENGTH, HEADS, None), PartitionSpec(sets, keys, HEADS, None)),
        bias=None if inputs.bias is None else PartitionSpec(None, HEADS, LENGTH, None),
        relative_bias=relative_bias
        and relative_bias.replace(query=PartitionSpec(None, LENGTH, None), key=PartitionSpec(None, keys, None)),
        bias_params=jax.tree.map(lambda leaf: PartitionSpec(*(None,) * leaf.ndim), inputs.bias_params),
        documents=inputs.documents and (PartitionSpec(BATCH, LENGTH), PartitionSpec(BATCH, keys)),
        heads=PartitionSpec(HEADS),
        causal_offset=None if inputs.causal_offset is None else PartitionSpec(None),
        dropout_seed=None if inputs.dropout_seed is None else PartitionSpec(),
    )


def _scaled_query_key(query: jax.Array, key: jax.Array, signal: PositionSignal, scale: float | None) -> Pair:
    """Returns queries and keys after `_transform_query_key`, whose products are logits; scale: see `attend`."""
    width = query.shape[-1]
    query, key = _transform_query_key(query, key, signal)
    if scale is None:
        return query / math.sqrt(query.shape[-1]), key
    return query * (scale * math.sqrt(width / query.shape[-1])), key  # polar queries are scaled for twice the width


def _of_heads(field: jax.Array, heads: int, name: str) -> jax.Array:
    """Returns a field [P, L, 1, G or H, ...] for queries or keys of some heads: [P, L, 1 or heads, F].

    Args:
      field: [P, L, N, F]; with fewer heads than the queries, one for all that read a key head.
      heads: of the queries or keys.
      name: of the term, for a message.

    Raises:
      InputError: the field differs by query heads that share a key head.
    """
    own = field.shape[2]
    if own in (1, heads):
        return field
    if heads % own == 0:
        return jnp.repeat(field, heads // own, axis=2)
    raise InputError(
        f"the {name} of this encoding differ by head ({own} heads), and {own // heads} of them share a head of keys "
        f"(model.kv_heads={heads}): give them one head for all or {heads}, or set model.kv_heads={own}"
    )


def _transform_query_key(query: jax.Array, key: jax.Array, signal: PositionSignal) -> Pair:
    """Returns queries and keys after rotation, polar coordinates, multiplicative and additive terms of a signal."""
    dtype = query.dtype

    def fit(field: jax.Array, array: jax.Array, name: str) -> jax.Array:
        return _of_heads(broadcast_to_batch(field, array.shape[0]), array.shape[2], name)

    if signal.rotation is not None:
        query, key = (
            rotate_pairs(array, *(fit(part, array, "rotations") for part in signal.rotation)) for array in (query, key)
        )
    if signal.polar_phase is not None:
        cos, sin = (broadcast_to_batch(part, query.shape[0]) for part in signal.polar_phase)
        _check_polar_heads(query, key, signal)
        query, key = _polar_query_key(query, key, signal.polar_num_heads, cos, sin, signal.polar_key_phase)
    if signal.multiplicative is not None:
        query, key = (
            array * fit(part, array, "factors of queries and keys").astype(dtype)
            for array, part in zip((query, key), signal.multiplicative, strict=True)
        )
    if signal.additive is not None:
        query, key = (
            array + fit(part, array, "terms added to queries and keys").astype(dtype)
            for array, part in zip((query, key), signal.additive, strict=True)
        )
    return query, key


def _check_polar_heads(query: jax.Array, key: jax.Array, signal: PositionSignal) -> None:
    """Raises: InputError: polar coordinates differ by query heads that share a key head."""
    heads, groups, phases = query.shape[2], key.shape[2], signal.polar_key_phase.shape[0]
    if heads != groups and (signal.polar_num_heads is not None or phases not in (1, groups)):
        raise InputError(
            f"polar coordinates (encoding.kind='pope') differ by head, and {heads // groups} heads share a head of keys "
            f"(model.kv_heads={groups}): set model.kv_heads={heads}"
        )


def _polar_query_key(
    query: jax.Array, key: jax.Array, num_heads: int | None, cos: jax.Array, sin: jax.Array, phase_HK: jax.Array
) -> Pair:
    """Returns the Cartesian coordinates [B, L, H, 2 K] of K polar ones: magnitudes softplus(q) and softplus(k), angles given.

    Queries are scaled by sqrt(2), which makes up for the later division by sqrt(2 K) in place of sqrt(K).

    Args:
      query, key: [B, L, H, K].
      num_heads: the first heads that are polar, None = all; in the others q and k keep their sign, at the angle 0.
      cos, sin: of the angles, [B or 1, L, 1, K].
      phase_HK: learned phase that the angles of the keys gain, radians.
    """

    def cartesian(array: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        magnitude = jax.nn.softplus(array.astype(jnp.float32))
        if num_heads is not None:
            polar_H1 = (jnp.arange(array.shape[2]) < num_heads)[:, None]
            magnitude = jnp.where(polar_H1, magnitude, array.astype(jnp.float32))
            cos, sin = jnp.where(polar_H1, cos, 1.0), jnp.where(polar_H1, sin, 0.0)
        return jnp.concatenate([magnitude * cos, magnitude * sin], axis=-1).astype(array.dtype)

    cos_phase, sin_phase = jnp.cos(phase_HK), jnp.sin(phase_HK)
    query = cartesian(query, cos, sin) * jnp.asarray(math.sqrt(2.0), query.dtype)
    return query, cartesian(key, cos * cos_phase - sin * sin_phase, sin * cos_phase + cos * sin_phase)


def rotate_pairs(array: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns [B, L, H, K] with its first F pairs of columns (2i, 2i + 1) rotated by angles (rotary embedding).

    Args:
      array: queries or keys, [B, L, H, K].
      cos, sin: of the angles, [B or 1, L, H or 1, F].
    """
    width = 2 * cos.shape[-1]
    pairs, rest = array[..., :width].astype(jnp.float32), array[..., width:]
    even, odd = pairs[..., 0::2], pairs[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    rotated = rotated.reshape(pairs.shape).astype(array.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
