"""Attention over a sequence whose tokens are split over devices: keys gathered, or passed around a ring.

Each device has its own queries. "gather" collects the keys and values of all devices, once for the forward and once for the
backward pass, and sums their gradients at the devices to which they belong. "ring" holds one device's keys and values at a
time and passes them on to the next device while it computes (Liu et al. 2023, arXiv 2310.01889), so that memory does not grow
with the number of devices.

Under a causal mask the last device would have almost twice the mean work. So the sequence is cut into two chunks per device,
and device d computes chunks d and 2n - 1 - d, which together see as many keys on every device. Only the inputs of attention
are exchanged, and its outputs exchanged back: all else sees tokens in their order.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqpe_jax.errors import InputError
from seqpe_jax.models.attention_dispatch import Backend, KernelBlocks, dispatch
from seqpe_jax.models.attention_inputs import ATTENTION_RESULT, MASK_VALUE, AttentionInputs
from seqpe_jax.ring import reduce_scatter

MODES = ("gather", "ring")
MAX_GATHERED_BYTES = 2**30  # of one device's keys, values and position keys, from which on "auto" takes the ring
ChunkFn = Callable[[jax.Array, int], jax.Array]  # of an array and the number of its length axis


@dataclasses.dataclass(frozen=True)
class Split:
    """Division of the tokens of a sequence over devices.

    Attributes:
      axes: names of the mesh axes, () = not split.
      shards: n, number of shards.
      causal: tokens attend to the past only; each shard is then two chunks of equal length.
      keys: number of keys without padding.
    """

    axes: tuple[str, ...]
    shards: int
    causal: bool
    keys: int

    @property
    def chunks(self) -> int:
        """Chunks of a shard."""
        return 2 if self.causal else 1

    def holder(self, chunk: int) -> int:
        """Returns the device that computes a chunk of a causal sequence."""
        return chunk if chunk < self.shards else 2 * self.shards - 1 - chunk

    def device(self) -> jax.Array:
        """Returns the index of this device, inside a `shard_map`."""
        return jax.lax.axis_index(self.axes)

    def low_chunk(self, device: Any) -> tuple[Any, Any]:
        """Returns (slot, chunk): which of a device's chunks comes first in the sequence, and its index there.

        A device has an even and an odd chunk: the even one is in slot 0.
        """
        return device % 2, device

    def high_chunk(self, device: Any) -> tuple[Any, Any]:
        """Returns (slot, chunk) of the other chunk of a device."""
        return 1 - device % 2, 2 * self.shards - 1 - device

    def exchange(self, array: jax.Array, axis: int) -> jax.Array:
        """Returns the chunks that this device computes, the even one first, of a shard of the sequence in order."""
        return self._permute(array, axis, lambda source, chunk: (source, self.holder(chunk)))

    def exchange_back(self, array: jax.Array, axis: int) -> jax.Array:
        """Returns a shard of the sequence in order: the inverse of `exchange`."""
        return self._permute(array, axis, lambda source, chunk: (self.holder(chunk), source))

    def _permute(self, array: jax.Array, axis: int, pair: Callable[[int, int], tuple[int, int]]) -> jax.Array:
        halves = jnp.split(array, 2, axis)
        sent = [
            jax.lax.ppermute(half, self.axes, [pair(source, 2 * source + slot) for source in range(self.shards)])
            for slot, half in enumerate(halves)
        ]
        return jnp.concatenate(sent, axis)

    def pass_on(self, tree: Any) -> Any:
        """Returns the arrays of the device before this one, and sends its own to the next."""
        pairs = [(device, (device + 1) % self.shards) for device in range(self.shards)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axes, pairs), tree)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A way to compute attention on a device.

    Attributes:
      backend: computes the attention of some queries to some keys.
      split: how tokens are split over devices.
      ring: keys are passed around, not gathered.
    """

    backend: Backend
    split: Split
    ring: bool = False


def make_plan(
    inputs: AttentionInputs,
    *,
    kind: str,
    block: int,
    kernel_blocks: KernelBlocks,
    mode: str,
    device: Any,
    context_axes: tuple[str, ...] = (),
    shards: tuple[int, int, int] = (1, 1, 1),
) -> Plan:
    """Returns how attention is computed.

    Args:
      inputs: inputs of all devices, or their shapes.
      kind, block, kernel_blocks: see `attention_dispatch.dispatch`.
      mode: "gather", "ring", or "auto": the ring if gathered keys and values are more than `MAX_GATHERED_BYTES`.
      device: device that the program is compiled for; None = JAX's default.
      context_axes: mesh axes over which tokens are split.
      shards: shards of tokens, of samples and of heads.

    Raises:
      InputError: the backend or mode asked for cannot serve.
    """
    length, keys = inputs.query.shape[1], inputs.key.shape[1]
    of_tokens, of_samples, of_heads = shards
    choose = functools.partial(dispatch, kind, block, inputs, device=device, kernel_blocks=kernel_blocks)
    if of_tokens == 1 or length == 1:
        return Plan(choose(), Split((), 1, False, keys))
    if length != keys:  # new tokens on a cache, which every device has
        return Plan(choose(split=True), Split((), 1, False, keys))
    causal = inputs.causal_offset is not None
    split = Split(context_axes, of_tokens, causal, keys)
    refused = mode == "ring" and not causal and keys % of_tokens
    if refused:
        raise InputError(
            f"mesh.context_attention='ring' cannot serve attention in both directions over {keys} tokens, which do not "
            f"divide over mesh.context={of_tokens}: choose 'gather'"
        )
    if mode == "auto":
        of_key_heads = math.gcd(of_heads, inputs.key.shape[2])  # devices may share a head of keys
        fits = gathered_bytes(inputs) / (of_samples * of_key_heads) <= MAX_GATHERED_BYTES
        mode = "gather" if fits or (not causal and keys % of_tokens) else "ring"
    ring = mode == "ring"
    return Plan(choose(split=True, in_parts=ring), split, ring)


def gathered_bytes(inputs: AttentionInputs) -> int:
    """Returns the bytes of keys, values and position keys of all samples and heads of keys."""
    arrays = [inputs.key, inputs.value, *(inputs.position_query_key or ())[1:]]
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def attend_on_device(inputs: AttentionInputs, plan: Plan) -> jax.Array:
    """Returns the output of this device's queries, [B, L, H, V], inside a `shard_map`.

    Args:
      inputs: queries and keys of this device, a shard of the sequence in order (`AttentionInputs.on_device` for row 0).
      plan: of `make_plan`, with tokens split over devices.
    """
    split = plan.split
    if split.causal:
        inputs = _map_queries(inputs, split.exchange)
    if plan.ring:
        if split.causal:
            inputs = _map_keys(inputs, split.exchange)
        out = _ring(_pad_bias(inputs, split), plan)
    elif plan.backend.forward is None:
        out = _over_chunks(_gather_keys(inputs, split), plan, plan.backend.attend)
    else:
        out = _gathered(inputs, plan)
    return split.exchange_back(out, 1) if split.causal else out


def _map_queries(inputs: AttentionInputs, function: ChunkFn) -> AttentionInputs:
    """Returns inputs with a function applied to all arrays that have queries."""
    position, relative_bias, documents = inputs.position_query_key, inputs.relative_bias, inputs.documents
    return inputs.replace(
        query=function(inputs.query, 1),
        position_query_key=position and (function(position[0], 1), position[1]),
        bias=None if inputs.bias is None else function(inputs.bias, 2),
        relative_bias=relative_bias and relative_bias.replace(query=function(relative_bias.query, 1)),
        documents=documents and (function(documents[0], 1), documents[1]),
    )


def _map_keys(inputs: AttentionInputs, function: ChunkFn) -> AttentionInputs:
    """Returns inputs with a function applied to all arrays that have keys, but for `bias`, whose columns are never split."""
    position, relative_bias, documents = inputs.position_query_key, inputs.relative_bias, inputs.documents
    return inputs.replace(
        key=function(inputs.key, 1),
        value=function(inputs.value, 1),
        position_query_key=position and (position[0], function(position[1], 1)),
        relative_bias=relative_bias and relative_bias.replace(key=function(relative_bias.key, 1)),
        documents=documents and (documents[0], function(documents[1], 1)),
    )


def _gather_keys(inputs: AttentionInputs, split: Split) -> AttentionInputs:
    """Returns inputs with the keys of all devices, in order and without padding."""

    def gather(array: jax.Array, axis: int) -> jax.Array:
        return jax.lax.slice_in_dim(_all_gather(array, axis, split), 0, split.keys, axis=axis)

    return _map_keys(inputs, gather)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(array: jax.Array, axis: int, split: Split) -> jax.Array:
    """Returns the shards of all devices, joined along an axis."""
    return jax.lax.all_gather(array, split.axes, axis=axis, tiled=True)


def _all_gather_forward(array: jax.Array, axis: int, split: Split) -> tuple[jax.Array, None]:
    return _all_gather(array, axis, split), None


def _all_gather_backward(axis: int, split: Split, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Returns this device's shard of the sum of all devices' gradients."""
    return (reduce_scatter(gradient, axis, split.axes),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def _at(inputs: AttentionInputs, first_query: Any, first_key: Any, mean_offset: int) -> AttentionInputs:
    """Returns inputs whose queries and keys are those of the sequence from some indices on.

    Args:
      mean_offset: mean of their difference over all devices and calls.
    """
    causal_offset, global_offset = inputs.causal_offset, inputs.global_offset
    return inputs.replace(
        causal_offset=None if causal_offset is None else causal_offset + (first_query - first_key),
        global_offset=None
        if global_offset is None
        else global_offset + jnp.stack([jnp.zeros_like(first_query)] * 2 + [first_query, first_key]),
        mean_causal_offset=mean_offset,
    )


def _over_chunks(
    inputs: AttentionInputs, plan: Plan, function: Callable[..., Any], *arrays: tuple[jax.Array, int]
) -> Any:
    """Returns the results of a function for each chunk of queries, joined along their length axes.

    Args:
      inputs: queries of this device and all keys.
      function: (inputs of a chunk, chunk of each array) -> [B, L, H, V], or a pair of that and [B, H, L].
      arrays: (array, number of its length axis).
    """
    split, device, length = plan.split, plan.split.device(), inputs.query.shape[1] // plan.split.chunks
    results = []
    for slot in range(split.chunks):
        index = jnp.where(device % 2 == slot, device, 2 * split.shards - 1 - device) if split.causal else device

        def chunk(array: jax.Array, axis: int, slot: int = slot) -> jax.Array:
            return jax.lax.slice_in_dim(array, slot * length, (slot + 1) * length, axis=axis)

        mean_offset = (split.shards * split.chunks - 1) * length // 2
        part = _at(_map_queries(inputs, chunk), index * length, jnp.zeros_like(index), mean_offset)
        results.append(function(part, *(chunk(*array) for array in arrays)))
    if isinstance(results[0], tuple):
        out, lse = zip(*results, strict=True)
        return jnp.concatenate(out, 1), jnp.concatenate(lse, 2)
    return jnp.concatenate(results, 1)


# --- Keys gathered


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(inputs: AttentionInputs, plan: Plan) -> jax.Array:
    """Returns the output [B, L, H, V]; keys are gathered again for the gradients, not stored."""
    return _gathered_forward(inputs, plan)[0]


def _gathered_forward(inputs: AttentionInputs, plan: Plan) -> tuple[jax.Array, Any]:
    forward = functools.partial(plan.backend.forward, dtype=inputs.value.dtype)
    out, lse = checkpoint_name(_over_chunks(_gather_keys(inputs, plan.split), plan, forward), ATTENTION_RESULT)
    return out, (inputs, out, lse)


def _gathered_backward(plan: Plan, saved: Any, d_out: jax.Array) -> tuple[AttentionInputs]:
    inputs, out, lse = saved

    def resume(inputs: AttentionInputs) -> jax.Array:
        return _over_chunks(_gather_keys(inputs, plan.split), plan, plan.backend.resume, (out, 1), (lse, 2))

    return jax.vjp(resume, inputs)[1](d_out)


_gathered.defvjp(_gathered_forward, _gathered_backward)


# --- Keys passed around a ring


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A chunk of queries of this device and a chunk of the keys that it holds.

    Attributes:
      query_slot, key_slot: which chunks of the arrays.
      query_chunk, key_chunk: their indices in the sequence.
    """

    query_slot: Any
    query_chunk: Any
    key_slot: Any
    key_chunk: Any


def _own_pairs(split: Split, device: jax.Array) -> list[_Pair]:
    """Returns the pairs that a device computes before the ring turns, beyond those of each turn."""
    if not split.causal:
        return []
    low = split.low_chunk(device)
    return [_Pair(*low, *low)]


def _pairs(split: Split, device: jax.Array, source: jax.Array) -> list[_Pair]:
    """Returns the pairs that a device computes while it holds the keys of `source`, the same number on every device.

    Under a causal mask, the device's high chunk sees the source's low one. Beyond that, where the source comes before it, its
    low chunk sees the source's low one, else its high chunk the source's high one. With `_own_pairs`, these are all pairs of
    which any key is visible, each once.
    """
    if not split.causal:
        return [_Pair(0, device, 0, source)]
    (low, high), (other_low, other_high) = ((split.low_chunk(one), split.high_chunk(one)) for one in (device, source))
    before = source < device
    query = [jnp.where(before, *sides) for sides in zip(low, high, strict=True)]
    key = [jnp.where(before, *sides) for sides in zip(other_low, other_high, strict=True)]
    return [_Pair(*high, *other_low), _Pair(*query, *key)]


def _pad_bias(inputs: AttentionInputs, split: Split) -> AttentionInputs:
    """Returns inputs whose bias has a column for each key, padding included."""
    if inputs.bias is None:
        return inputs
    missing = split.shards * inputs.key.shape[1] - inputs.bias.shape[3]
    return inputs.replace(bias=jnp.pad(inputs.bias, ((0, 0), (0, 0), (0, 0), (0, missing))))


def _moving(inputs: AttentionInputs) -> tuple[Any, Any]:
    """Returns the arrays that are passed around: (those with gradients, those without)."""
    position, relative_bias, documents = inputs.position_query_key, inputs.relative_bias, inputs.documents
    without = relative_bias and relative_bias.key, documents and documents[1]
    return (inputs.key, inputs.value, position and position[1]), without


def _with_keys(inputs: AttentionInputs, moving: tuple[Any, Any]) -> AttentionInputs:
    """Returns inputs with other keys."""
    (key, value, position_key), (relative_key, key_documents) = moving
    position, relative_bias, documents = inputs.position_query_key, inputs.relative_bias, inputs.documents
    return inputs.replace(
        key=key,
        value=value,
        position_query_key=position and (position[0], position_key),
        relative_bias=relative_bias and relative_bias.replace(key=relative_key),
        documents=documents and (documents[0], key_documents),
    )


def _pair_inputs(inputs: AttentionInputs, pair: _Pair, split: Split) -> AttentionInputs:
    """Returns the inputs of one pair of chunks."""
    length = inputs.query.shape[1] // split.chunks

    def slot_of(slot: Any) -> ChunkFn:
        return lambda array, axis: jax.lax.dynamic_slice_in_dim(array, slot * length, length, axis)

    part = _map_keys(_map_queries(inputs, slot_of(pair.query_slot)), slot_of(pair.key_slot))
    if part.bias is not None:
        part = part.replace(bias=slot_of(pair.key_chunk)(part.bias, 3))
    return _at(part, pair.query_chunk * length, pair.key_chunk * length, length)


def _turns(split: Split, turn: Callable[..., Any], state: Any, moving: Any) -> Any:
    """Returns the state after a turn for each device's keys; turn: (state, moving, source) -> (state, moving)."""

    def body(count: jax.Array, carry: Any) -> Any:
        return turn(*carry, (split.device() - count) % split.shards)

    return jax.lax.fori_loop(0, split.shards, body, (state, moving))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _ring(inputs: AttentionInputs, plan: Plan) -> jax.Array:
    """Returns the output [B, L, H, V]; each pass of the ring, forward and backward, holds one device's keys."""
    return _ring_forward(inputs, plan)[0]


def _ring_forward(inputs: AttentionInputs, plan: Plan) -> tuple[jax.Array, Any]:
    split, (batch, rows, heads, _) = plan.split, inputs.query.shape
    length = rows // split.chunks

    def add(state: Any, moving: Any, pair: _Pair) -> Any:
        out, lse = state
        part = _pair_inputs(_with_keys(inputs, moving), pair, split)
        part_out, part_lse = plan.backend.forward(part, jnp.float32)
        start = pair.query_slot * length
        before = jax.lax.dynamic_slice_in_dim(lse, start, length, 2)
        total = jnp.logaddexp(before, part_lse)
        share, part_share = (jnp.moveaxis(jnp.exp(one - total), 1, 2)[..., None] for one in (before, part_lse))
        merged = share * jax.lax.dynamic_slice_in_dim(out, start, length, 1) + part_share * part_out
        return (
            jax.lax.dynamic_update_slice_in_dim(out, merged, start, 1),
            jax.lax.dynamic_update_slice_in_dim(lse, total, start, 2),
        )

    def turn(state: Any, moving: Any, source: jax.Array) -> Any:
        following = split.pass_on(moving)  # while these are computed with
        for pair in _pairs(split, split.device(), source):
            state = add(state, moving, pair)
        return state, following

    out = jnp.zeros((batch, rows, heads, inputs.value.shape[-1]), jnp.float32)
    state, moving = (out, jnp.full((batch, heads, rows), MASK_VALUE)), _moving(inputs)
    for pair in _own_pairs(split, split.device()):
        state = add(state, moving, pair)
    (out, lse), _ = _turns(split, turn, state, moving)
    out, lse = checkpoint_name((out.astype(inputs.value.dtype), lse), ATTENTION_RESULT)
    return out, (inputs, out, lse)


def _ring_backward(plan: Plan, saved: Any, d_out: jax.Array) -> tuple[AttentionInputs]:
    inputs, out, lse = saved
    split, length, position = plan.split, inputs.query.shape[1] // plan.split.chunks, inputs.position_query_key
    local = inputs.query, position and position[0], inputs.bias, inputs.bias_params

    def add(gradients: Any, moving: Any, pair: _Pair) -> Any:
        start = pair.query_slot * length
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=length)
        keys, without_gradients = moving

        def resume(local: Any, keys: Any) -> jax.Array:
            query, position_query, bias, bias_params = local
            own = inputs.replace(
                query=query,
                position_query_key=position and (position_query, None),
                bias=bias,
                bias_params=bias_params,
            )
            part = _pair_inputs(_with_keys(own, (keys, without_gradients)), pair, split)
            return plan.backend.resume(part, rows(out, axis=1), rows(lse, axis=2))

        parts = jax.vjp(resume, local, keys)[1](rows(d_out, axis=1))
        return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), gradients, parts)

    def turn(d_local: Any, arrays: Any, source: jax.Array) -> Any:
        # The sums for these keys come from the device before, while their next part is computed.
        moving, d_keys = arrays
        following, d_before = split.pass_on((moving, d_keys))
        gradients = d_local, zeros[1]
        for pair in _pairs(split, split.device(), source):
            gradients = add(gradients, moving, pair)
        return gradients[0], (following, jax.tree.map(jnp.add, d_before, gradients[1]))

    moving = _moving(inputs)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (local, moving[0]))
    d_local, d_own_keys = zeros
    for pair in _own_pairs(split, split.device()):
        d_local, d_own_keys = add((d_local, d_own_keys), moving, pair)
    d_local, (_, d_keys) = _turns(split, turn, d_local, (moving, zeros[1]))
    d_keys = jax.tree.map(jnp.add, split.pass_on(d_keys), d_own_keys)  # now at home
    d_local, d_keys = jax.tree.map(
        lambda gradient, leaf: gradient.astype(leaf.dtype), (d_local, d_keys), (local, moving[0])
    )
    query, position_query, bias, bias_params = d_local
    key, value, position_key = d_keys
    without = dict.fromkeys(("relative_bias", "documents", "heads", "causal_offset", "dropout_seed", "global_offset"))
    gradient = inputs.replace(
        **without,
        query=query,
        key=key,
        value=value,
        position_query_key=position and (position_query, position_key),
        bias=bias,
        bias_params=bias_params,
    )
    return (gradient,)


_ring.defvjp(_ring_forward, _ring_backward)
