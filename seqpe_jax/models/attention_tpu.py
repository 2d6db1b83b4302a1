"""Flash attention for TPU as Pallas kernels, with float32 position queries and keys next to bfloat16 queries and keys.

The algorithm is FlashAttention-2's (Dao 2023, arXiv 2307.08691): a forward kernel, one for the gradients of queries and
position queries, and one for those of keys, values and position keys. One addition: samples of the same position set share
position_query . position_key, which at full precision costs six bfloat16 products; so each grid step loads the same tile of
several samples and computes that product once for all of them.

Where H query heads share G key heads, the kernel of keys sums over the queries of all heads that read one, and nothing is
repeated in memory. With a window, the grid has as many inner steps as a window can need, so that its time is linear.

Documents are compared for each sample, and tiles without a pair of one document in any sample of a grid step are skipped like those
after the diagonal.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqpe_jax.models.attention_inputs import (
    ATTENTION_RESULT,
    MASK_VALUE,
    AttentionInputs,
    cap_logits,
    cap_slope,
    dropout_mask,
    is_masked,
)

LANES = 128
BLOCK_SIZES = (512, 384, 256)  # queries or keys per tile; for less than the smallest, a multiple of LANES
MAX_SAMPLES_PER_STEP = 8
SMALL_BLOCKS_FROM = 4  # samples per step from which on only the smallest of BLOCK_SIZES fits


class KernelBlocks(NamedTuple):
    """Sizes of the kernels' tiles, multiples of LANES.

    Attributes:
      q: queries per tile of the forward kernel; 0 = automatic (`block_size`).
      k: keys per tile of the forward kernel; 0 = automatic.
      q_backward: queries per tile of the backward kernels, a multiple or a divisor of `q`; 0 = `q`.
      k_backward: keys per tile of the backward kernels, a multiple or a divisor of `k`; 0 = `k`.
    """

    q: int = 0
    k: int = 0
    q_backward: int = 0
    k_backward: int = 0


AUTO_BLOCKS = KernelBlocks()


class KernelConfig(NamedTuple):
    """Static sizes and switches of a kernel call.

    Attributes:
      keys: number of keys without padding.
      block_q: queries per tile.
      block_k: keys per tile.
      backward_blocks: queries and keys per tile of the backward kernels.
      samples: samples per grid step.
      causal: mask keys after the query.
      dropout: apply dropout to the weights.
      dropout_rate: probability that a weight is dropped.
      mean_causal_offset: see `AttentionInputs`.
      out_dtype: dtype of the output.
      interpret: run as plain JAX, on any platform.
      window, cap: see `AttentionInputs`.
    """

    keys: int
    block_q: int
    block_k: int
    backward_blocks: tuple[int, int]
    samples: int
    causal: bool
    dropout: bool
    dropout_rate: float
    mean_causal_offset: int | None
    out_dtype: Any
    interpret: bool
    window: int = 0
    cap: float = 0.0


class KernelInputs(NamedTuple):
    """Arrays of the kernels: samples as [R, P], sample r P + p uses position set p; lengths padded to whole blocks.

    Attributes:
      query: [R, P, H, L, K].
      key: [R, P, G, S, K].
      value: [R, P, G, S, V].
      position_query: float32[1 or P, 1 or H, L, F], or None.
      position_key: float32[1 or P, 1 or H, S, F], or None.
      causal_offset: int32[P], as in `AttentionInputs`.
      dropout_indices: int32[5], `global_offset` and `dropout_seed` of `AttentionInputs`.
      documents: of queries int32[R, P, 1, L] and of keys int32[R, P, 1, S], rising along a sample; None = all are of one.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    position_query: jax.Array | None
    position_key: jax.Array | None
    causal_offset: jax.Array
    dropout_indices: jax.Array
    documents: tuple[jax.Array, jax.Array] | None = None


def flash(inputs: AttentionInputs, blocks: KernelBlocks = AUTO_BLOCKS, interpret: bool = False) -> jax.Array:
    """Returns the result of `reference_attention`, [B, L, H, V].

    Args:
      inputs: inputs of one device, without bias or relative bias.
      blocks: sizes of the tiles.
      interpret: run the kernels as plain JAX, on any platform.
    """
    return _tokens_first(_flash(*_kernel_inputs(inputs, blocks, interpret, inputs.value.dtype)), inputs)


def flash_forward(
    inputs: AttentionInputs, dtype: Any, blocks: KernelBlocks = AUTO_BLOCKS, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Returns (output [B, L, H, V], log-sum-exp of the logits float32[B, H, L]), without gradients.

    Args:
      inputs, blocks, interpret: as in `flash`.
      dtype: dtype of the output.
    """
    out, (_, _, lse) = _forward(*_kernel_inputs(inputs, blocks, interpret, dtype))
    batch, length, heads, _ = inputs.query.shape
    return _tokens_first(out, inputs), lse.reshape(batch, heads, -1)[:, :, :length]


def flash_resume(
    inputs: AttentionInputs,
    out_BLHV: jax.Array,
    lse_BHL: jax.Array,
    blocks: KernelBlocks = AUTO_BLOCKS,
    interpret: bool = False,
) -> jax.Array:
    """Returns `out_BLHV` itself, with the gradients that these inputs have as a part of the attention that it results from.

    Args:
      inputs, blocks, interpret: as in `flash`; the keys may be a part of those attended to.
      out_BLHV: output over all keys.
      lse_BHL: float32, log-sum-exp of the logits of all keys.
    """
    kernel_inputs, config = _kernel_inputs(inputs, blocks, interpret, out_BLHV.dtype)
    samples, length = kernel_inputs.query.shape[:2], kernel_inputs.query.shape[3]
    out, lse = _heads_first(out_BLHV, length), jnp.pad(lse_BHL, ((0, 0), (0, 0), (0, length - lse_BHL.shape[2])))
    out, lse = out.reshape(*samples, *out.shape[1:]), lse.reshape(*samples, lse.shape[1], 1, length)
    return _tokens_first(_resumed(kernel_inputs, out, lse, config), inputs)


def _heads_first(array_BLHK: jax.Array, multiple: int) -> jax.Array:
    """Returns [B, H, L, K], L padded to a multiple of a number."""
    padding = -array_BLHK.shape[1] % multiple
    return jnp.moveaxis(jnp.pad(array_BLHK, ((0, 0), (0, padding), (0, 0), (0, 0))), 2, 1)


def _tokens_first(out: jax.Array, inputs: AttentionInputs) -> jax.Array:
    """Returns [B, L, H, V] of [R, P, H, L, V], without the padding."""
    batch, length, _, _ = inputs.query.shape
    return jnp.moveaxis(out.reshape(batch, *out.shape[2:]), 1, 2)[:, :length]


def _kernel_inputs(
    inputs: AttentionInputs, blocks: KernelBlocks, interpret: bool, out_dtype: Any
) -> tuple[KernelInputs, KernelConfig]:
    batch, length, _, _ = inputs.query.shape
    keys, num_sets = inputs.key.shape[1], inputs.num_position_sets
    samples = max(n for n in range(1, MAX_SAMPLES_PER_STEP + 1) if batch // num_sets % n == 0)
    block_q, backward_q, multiple_q = _tile_sizes(length, samples, blocks.q, blocks.q_backward)
    block_k, backward_k, multiple_k = _tile_sizes(keys, samples, blocks.k, blocks.k_backward)

    def by_set(array: jax.Array, multiple: int) -> jax.Array:
        array = _heads_first(array, multiple)
        return array.reshape(batch // num_sets, num_sets, *array.shape[1:])

    def documents_by_set(documents: jax.Array, multiple: int) -> jax.Array:
        padded = jnp.pad(documents, ((0, 0), (0, -documents.shape[1] % multiple)), "edge")
        return padded.reshape(batch // num_sets, num_sets, 1, -1)

    position_query, position_key = inputs.position_query_key or (None, None)
    global_offset = jnp.zeros(4, jnp.int32) if inputs.global_offset is None else inputs.global_offset
    dropout_seed = jnp.zeros(1, jnp.int32) if inputs.dropout_seed is None else inputs.dropout_seed[None]
    causal_offset = jnp.int32(0) if inputs.causal_offset is None else inputs.causal_offset
    kernel_inputs = KernelInputs(
        query=by_set(inputs.query, multiple_q),
        key=by_set(inputs.key, multiple_k),
        value=by_set(inputs.value, multiple_k),
        position_query=None if position_query is None else _heads_first(position_query, multiple_q),
        position_key=None if position_key is None else _heads_first(position_key, multiple_k),
        causal_offset=jnp.broadcast_to(causal_offset, (num_sets,)),
        dropout_indices=jnp.concatenate([global_offset, dropout_seed]),
        documents=inputs.documents
        and tuple(
            documents_by_set(one, multiple)
            for one, multiple in zip(inputs.documents, (multiple_q, multiple_k), strict=True)
        ),
    )
    config = KernelConfig(
        keys=keys,
        block_q=block_q,
        block_k=block_k,
        backward_blocks=(backward_q, backward_k),
        samples=samples,
        causal=inputs.causal_offset is not None,
        dropout=inputs.dropout_seed is not None,
        dropout_rate=inputs.dropout_rate,
        mean_causal_offset=inputs.mean_causal_offset,
        out_dtype=jnp.dtype(out_dtype),
        interpret=interpret,
        window=inputs.window,
        cap=inputs.cap,
    )
    return kernel_inputs, config


def _tile_sizes(length: int, samples: int, forward: int, backward: int) -> tuple[int, int, int]:
    """Returns the queries or keys per tile of the forward and of the backward kernels, and the multiple to pad them to.

    Args:
      length: number of queries or keys.
      samples: samples per grid step.
      forward, backward: see `KernelBlocks`. A size above the padded length becomes that length.
    """
    longest = -(-length // LANES) * LANES
    forward = min(forward or block_size(length, samples), longest)
    backward = min(backward or forward, longest)
    if max(forward, backward) % min(forward, backward):  # one of them was cut to the length
        forward = backward = min(forward, backward)
    return forward, backward, max(forward, backward)


def block_size(length: int, samples: int) -> int:
    """Returns the number of queries or keys per tile that leaves the least padding.

    Args:
      length: number of queries or keys.
      samples: samples per grid step.
    """
    if length <= BLOCK_SIZES[-1]:
        return -(-length // LANES) * LANES
    sizes = BLOCK_SIZES if samples < SMALL_BLOCKS_FROM else BLOCK_SIZES[-1:]
    return min(sizes, key=lambda size: (-(-length // size) * size, -size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _flash(inputs: KernelInputs, config: KernelConfig) -> jax.Array:
    """Returns the output [R, P, H, L, V]."""
    return _forward(inputs, config)[0]


def _forward(inputs: KernelInputs, config: KernelConfig) -> tuple[jax.Array, Any]:
    *samples, heads, length, _ = inputs.query.shape
    width = inputs.value.shape[-1]
    call = _KernelCall(inputs, config, keys_outer=False)
    out, lse = call(
        _forward_kernel,
        extra=(),
        results=(
            (call.query_spec(width), jax.ShapeDtypeStruct((*samples, heads, length, width), config.out_dtype)),
            (call.row_spec(), jax.ShapeDtypeStruct((*samples, heads, 1, length), jnp.float32)),
        ),
        scratch=[(config.samples, config.block_q, size) for size in (LANES, LANES, width)],
    )
    out, lse = checkpoint_name((out, lse), ATTENTION_RESULT)
    return out, (inputs, out, lse)


def _backward(config: KernelConfig, saved: Any, d_out: jax.Array) -> tuple[KernelInputs]:
    inputs, out, lse = saved
    config = config._replace(block_q=config.backward_blocks[0], block_k=config.backward_blocks[1])
    # D of FlashAttention-2, rowsum(dO * O), float32[R, P, H, 1, L].
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)[:, :, :, None]
    rows = (d_out.astype(inputs.value.dtype), lse, delta)
    d_query, *d_position_query = _gradient_call(
        _dq_kernel, inputs, config, rows, ("query",), "position_query", keys_outer=False
    )
    d_key, d_value, *d_position_key = _gradient_call(
        _dkv_kernel, inputs, config, rows, ("key", "value"), "position_key", keys_outer=True
    )
    gradients = KernelInputs(
        query=d_query,
        key=d_key,
        value=d_value,
        position_query=_sum_like(d_position_query, inputs.position_query),
        position_key=_sum_like(d_position_key, inputs.position_key),
        causal_offset=None,
        dropout_indices=None,
        documents=None,
    )
    return (gradients,)


def _gradient_call(
    kernel: Any,
    inputs: KernelInputs,
    config: KernelConfig,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    fields: tuple[str, ...],
    feature: str,
    keys_outer: bool,
) -> list[jax.Array]:
    """Returns the gradients of some fields of the inputs, and of position queries or keys where there are any.

    Args:
      kernel: `_dq_kernel` or `_dkv_kernel`.
      rows: gradient of the output, log-sum-exp and delta.
      fields: names of the fields.
      feature: `position_query` or `position_key`; its gradient is float32[groups of samples, P, H, L or S, F], still to be summed.
      keys_outer: the kernel sums over blocks of queries.
    """
    d_out, lse, delta = rows
    call = _KernelCall(inputs, config, keys_outer)
    spec, block = (call.key_spec, config.block_k) if keys_outer else (call.query_spec, config.block_q)
    results, scratch = [], []
    for array in (getattr(inputs, name) for name in fields):
        width = array.shape[-1]
        results.append((spec(width), jax.ShapeDtypeStruct(array.shape, array.dtype)))
        scratch.append((config.samples, block, width))
    array = getattr(inputs, feature)
    if array is not None:
        shape = (inputs.query.shape[0] // config.samples, *inputs.query.shape[1:3], *array.shape[2:])
        results.append((call.per_step_spec(block, array.shape[-1]), jax.ShapeDtypeStruct(shape, jnp.float32)))
        scratch.append((block, array.shape[-1]))
    extra = ((call.query_spec(d_out.shape[-1]), d_out), (call.row_spec(), lse), (call.row_spec(), delta))
    return call(kernel, extra, results, scratch)


def _sum_like(per_step: list[jax.Array], field: jax.Array | None) -> jax.Array | None:
    """Returns the gradient of position queries or keys, summed over the groups of samples, sets and heads that share them."""
    if field is None:
        return None
    total = per_step[0].sum(axis=0)
    for axis in (0, 1):
        total = total if total.shape[axis] == field.shape[axis] else total.sum(axis=axis, keepdims=True)
    return total


_flash.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _resumed(inputs: KernelInputs, out: jax.Array, lse: jax.Array, config: KernelConfig) -> jax.Array:
    """Returns `out`, [R, P, H, L, V], with the gradients of `_flash` for a given output and log-sum-exp."""
    return out


def _resumed_forward(
    inputs: KernelInputs, out: jax.Array, lse: jax.Array, config: KernelConfig
) -> tuple[jax.Array, Any]:
    return out, (inputs, out, lse)


def _resumed_backward(config: KernelConfig, saved: Any, d_out: jax.Array) -> tuple[KernelInputs, None, None]:
    return *_backward(config, saved, d_out), None, None


_resumed.defvjp(_resumed_forward, _resumed_backward)


class _Step(NamedTuple):
    """Work of a grid step: query block i of a query head against key block j of the key head that it reads.

    Attributes:
      query_head: index of the query head.
      key_head: index of the key head.
      i: index of the query block.
      j: index of the key block.
      of_head: index of the step among those of its query head and outer block.
    """

    query_head: Any
    key_head: Any
    i: Any
    j: Any
    of_head: Any


class _Scalars(NamedTuple):
    """Arrays that the kernels and the choice of their blocks read as scalars.

    Attributes:
      causal_offset, dropout_indices: see `KernelInputs`.
      document_bounds: see `_document_bounds`; None = no documents.
    """

    causal_offset: Any
    dropout_indices: Any
    document_bounds: Any = None


def _document_bounds(documents: tuple[jax.Array, jax.Array], config: KernelConfig, keys_outer: bool) -> jax.Array:
    """Returns the first and the last inner block with a document of each outer block, in any sample of a grid step.

    They are int32[groups of samples * P * outer blocks * 2], flat, as scalars are stored in rows of 128. Where there is none, the
    last is before the first.

    Args:
      documents: see `KernelInputs`.
      config: sizes of the call.
      keys_outer: see `_KernelCall`.
    """
    blocks = []
    for array, size in zip(documents, (config.block_q, config.block_k), strict=True):
        by_block = array.reshape(-1, config.samples, array.shape[1], array.shape[3] // size, size)
        blocks.append((by_block.min(axis=4), by_block.max(axis=4)))
    (outer_min, outer_max), (inner_min, inner_max) = reversed(blocks) if keys_outer else blocks
    meets = (inner_max[..., None, :] >= outer_min[..., None]) & (inner_min[..., None, :] <= outer_max[..., None])
    meets = meets.any(axis=1)
    count = meets.shape[-1]
    first = jnp.where(meets.any(axis=-1), jnp.argmax(meets, axis=-1), count)
    return jnp.stack([first, count - 1 - jnp.argmax(meets[..., ::-1], axis=-1)], axis=-1).astype(jnp.int32).reshape(-1)


class _KernelCall:
    """A `pallas_call` over the grid (groups of samples, position sets, heads, outer blocks, inner blocks).

    The kernel accumulates over the inner blocks. Tiles that the causal mask, the window or documents hide are neither computed nor
    loaded: their index is clamped to the nearest tile that is needed. With a window, inner blocks begin at the first that is needed.

    Attributes:
      keys_outer: outer blocks are of keys, heads those of keys, and inner blocks those of all query heads that read one; else
        outer blocks and heads are of queries and inner blocks of keys.
      steps: inner blocks of a query head.
    """

    def __init__(self, inputs: KernelInputs, config: KernelConfig, keys_outer: bool):
        self.inputs, self.config, self.keys_outer = inputs, config, keys_outer
        (samples, num_sets, heads, length, _), key_heads = inputs.query.shape, inputs.key.shape[2]
        self.num_q, self.num_k = length // config.block_q, inputs.key.shape[3] // config.block_k
        self.group = heads // key_heads
        inner, of_outer, of_inner = self.num_k, config.block_q, config.block_k
        if keys_outer:
            inner, of_outer, of_inner = self.num_q, config.block_k, config.block_q
        if (
            config.window
        ):  # window + of_outer - 1 rows meet an outer block, and their first is anywhere in an inner block
            inner = min(inner, (config.window + of_outer - 2) // of_inner + 2)
        self.steps = inner
        outer = (key_heads, self.num_k, self.group * inner) if keys_outer else (heads, self.num_q, inner)
        self.bounds = None if inputs.documents is None else _document_bounds(inputs.documents, config, keys_outer)
        self.grid = (samples // config.samples, num_sets, *outer)

    def step(self, set_: Any, head: Any, outer: Any, inner: Any, causal_offset: Any) -> _Step:
        """Returns what a grid step computes; with a window, blocks may be beyond the last."""
        of_head = inner if not self.keys_outer or self.group == 1 else jax.lax.rem(inner, jnp.int32(self.steps))
        block = of_head
        if self.config.window:
            block = block + self._bounds(outer, causal_offset[set_])[0]
        if self.keys_outer:
            query_head = head
            if self.group > 1:
                query_head = head * self.group + jax.lax.div(inner, jnp.int32(self.steps))
            return _Step(query_head, head, block, outer, of_head)
        key_head = head if self.group == 1 else jax.lax.div(head, jnp.int32(self.group))
        return _Step(head, key_head, outer, block, of_head)

    def _bounds(self, outer: Any, causal_offset: Any) -> tuple[Any, Any]:
        """Returns the first and the last inner block that a causal outer block needs, if any; they may be beyond the last of all.

        None stands for the first or the last of all.
        """
        config = self.config
        if self.keys_outer:
            first_key = outer * config.block_k
            first = jax.lax.div(jnp.maximum(first_key - causal_offset, 0), jnp.int32(config.block_q))
            if not config.window:
                return first, None
            last_query = first_key + config.block_k - 1 - causal_offset + config.window - 1
            return first, jax.lax.div(jnp.maximum(last_query, 0), jnp.int32(config.block_q))
        first_query = outer * config.block_q + causal_offset
        last = jax.lax.div(jnp.maximum(first_query + config.block_q - 1, 0), jnp.int32(config.block_k))
        if not config.window:
            return None, last
        return jax.lax.div(jnp.maximum(first_query - config.window + 1, 0), jnp.int32(config.block_k)), last

    def bounds_of_documents(self, group: Any, set_: Any, outer: Any, scalars: _Scalars) -> tuple[Any, Any]:
        """Returns the first and the last inner block with a document of an outer block; see `_document_bounds`."""
        at = 2 * ((group * self.grid[1] + set_) * self.grid[3] + outer)
        return scalars.document_bounds[at], scalars.document_bounds[at + 1]

    def _loaded(self, group: Any, set_: Any, head: Any, outer: Any, inner: Any, scalars: _Scalars) -> _Step:
        """Returns the step whose blocks a grid step loads."""
        step = self.step(set_, head, outer, inner, scalars.causal_offset)
        limits = [self._bounds(outer, scalars.causal_offset[set_])] if self.config.causal else []
        if scalars.document_bounds is not None:
            limits.append(self.bounds_of_documents(group, set_, outer, scalars))
        if not limits:
            return step
        block = step.i if self.keys_outer else step.j
        for first, last in limits:
            block = block if first is None else jnp.maximum(block, first)
            block = block if last is None else jnp.minimum(block, last)
        block = jnp.clip(block, 0, (self.num_q if self.keys_outer else self.num_k) - 1)
        return step._replace(i=block) if self.keys_outer else step._replace(j=block)

    def query_spec(self, width: int) -> pl.BlockSpec:
        """Returns the spec of a query block of [R, P, H, L, width]."""

        def index(group, set_, head, outer, inner, *scalars):
            step = self._loaded(group, set_, head, outer, inner, _Scalars(*scalars))
            return group, set_, step.query_head, step.i, 0

        return pl.BlockSpec((self.config.samples, None, None, self.config.block_q, width), index)

    def key_spec(self, width: int) -> pl.BlockSpec:
        """Returns the spec of a key block of [R, P, G, S, width]."""

        def index(group, set_, head, outer, inner, *scalars):
            step = self._loaded(group, set_, head, outer, inner, _Scalars(*scalars))
            return group, set_, step.key_head, step.j, 0

        return pl.BlockSpec((self.config.samples, None, None, self.config.block_k, width), index)

    def row_spec(self) -> pl.BlockSpec:
        """Returns the spec of one number per query of a block, [R, P, H, 1, L]."""

        def index(group, set_, head, outer, inner, *scalars):
            step = self._loaded(group, set_, head, outer, inner, _Scalars(*scalars))
            return group, set_, step.query_head, 0, step.i

        return pl.BlockSpec((self.config.samples, None, None, 1, self.config.block_q), index)

    def document_spec(self, of_keys: bool) -> pl.BlockSpec:
        """Returns the spec of a block of the documents of queries or keys, [R, P, 1, L or S]."""

        def index(group, set_, head, outer, inner, *scalars):
            step = self._loaded(group, set_, head, outer, inner, _Scalars(*scalars))
            return group, set_, 0, step.j if of_keys else step.i

        block = self.config.block_k if of_keys else self.config.block_q
        return pl.BlockSpec((self.config.samples, None, 1, block), index)

    def position_spec(self, field: jax.Array, of_keys: bool) -> pl.BlockSpec:
        """Returns the spec of a block of position queries or keys [1 or P, 1 or H, L or S, F]."""
        num_sets, heads, _, width = field.shape

        def index(group, set_, head, outer, inner, *scalars):
            step = self._loaded(group, set_, head, outer, inner, _Scalars(*scalars))
            block = step.j if of_keys else step.i
            return set_ if num_sets > 1 else 0, step.query_head if heads > 1 else 0, block, 0

        return pl.BlockSpec((None, None, self.config.block_k if of_keys else self.config.block_q, width), index)

    def per_step_spec(self, block: int, width: int) -> pl.BlockSpec:
        """Returns the spec of an outer block of [groups, P, H, L or S, F]: a result for each group of samples and query head."""

        def index(group, set_, head, outer, inner, causal_offset, *_):
            return group, set_, self.step(set_, head, outer, inner, causal_offset).query_head, outer, 0

        return pl.BlockSpec((None, None, None, block, width), index)

    def __call__(self, kernel: Any, extra: Any, results: Any, scratch: Any) -> list[jax.Array]:
        """Returns the results.

        Args:
          kernel: function of (tile, refs of query, key, value, of `extra`, of results, of scratch).
          extra: [(spec, array)] of further inputs.
          results: [(spec, shape and dtype)].
          scratch: shapes of float32 accumulators in VMEM.
        """
        inputs, config = self.inputs, self.config
        loaded = [
            (self.query_spec(inputs.query.shape[-1]), inputs.query),
            (self.key_spec(inputs.key.shape[-1]), inputs.key),
            (self.key_spec(inputs.value.shape[-1]), inputs.value),
        ]
        if inputs.position_query is not None:
            loaded += [(self.position_spec(inputs.position_query, False), inputs.position_query)]
            loaded += [(self.position_spec(inputs.position_key, True), inputs.position_key)]
        scalars = [inputs.causal_offset, inputs.dropout_indices]
        if inputs.documents is not None:
            loaded += zip(map(self.document_spec, (False, True)), inputs.documents, strict=True)
            scalars.append(self.bounds)
        loaded += extra
        return pl.pallas_call(
            functools.partial(_run_kernel, kernel, self, len(scalars)),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=self.grid,
                in_specs=[spec for spec, _ in loaded],
                out_specs=[spec for spec, _ in results],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[shape for _, shape in results],
            cost_estimate=cost_estimate(kernel, inputs, config, [array for _, array in (*loaded, *results)]),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",)),
            interpret=config.interpret,
        )(*scalars, *(array for _, array in loaded))


class _Tile:
    """The tile of logits that a grid step computes, [block_q, block_k], or [block_k, block_q] where it is transposed.

    Attributes:
      transposed: rows are keys and columns queries, as `_dkv_kernel` needs them.
      needed: scalar bool, True if the causal mask, the window and documents leave any logit.
      is_first, is_last: scalar bool, the step is the first or last of its outer block.
      is_first_of_head, is_last_of_head: the same of its query head and outer block.
    """

    def __init__(
        self,
        call: _KernelCall,
        scalars: _Scalars,
        position_query: Any,
        position_key: Any,
        documents: tuple[Any, Any] | None,
    ):
        config = self.config = call.config
        self.transposed, self.dropout_indices = call.keys_outer, scalars.dropout_indices
        self.group, self.set, head, outer, inner = (pl.program_id(axis) for axis in range(5))
        step = call.step(self.set, head, outer, inner, scalars.causal_offset)
        self.is_first, self.is_last = inner == 0, inner == call.grid[-1] - 1
        self.is_first_of_head, self.is_last_of_head = step.of_head == 0, step.of_head == call.steps - 1
        self.head, self.first_query, self.first_key = step.query_head, step.i * config.block_q, step.j * config.block_k
        self.causal_offset = scalars.causal_offset[self.set]
        self.position_query, self.position_key, self.documents = position_query, position_key, documents
        first_row = self.causal_offset + self.first_query
        self.needed = self.first_key <= first_row + config.block_q - 1 if config.causal else True
        if config.window:
            self.needed &= self.first_key + config.block_k > first_row - config.window + 1
            self.needed &= (step.i < call.num_q) & (step.j < call.num_k)
        if documents is not None:
            block = step.i if self.transposed else step.j
            first, last = call.bounds_of_documents(self.group, self.set, outer, scalars)
            self.needed &= (block >= first) & (block <= last)

    def _indices(self) -> tuple[jax.Array, jax.Array]:
        """Returns the query and key index of every logit of the tile, int32."""
        config = self.config
        shape = (config.block_k, config.block_q) if self.transposed else (config.block_q, config.block_k)
        query = self.first_query + jax.lax.broadcasted_iota(jnp.int32, shape, int(self.transposed))
        key = self.first_key + jax.lax.broadcasted_iota(jnp.int32, shape, int(not self.transposed))
        return query, key

    def shared_logits(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns (position_query . position_key, mask), shared by all samples of the step; mask is True where a logit is hidden."""
        bias = masked = None
        if self.position_query is not None:
            sides = (
                (self.position_key[...], self.position_query[...])
                if self.transposed
                else (self.position_query[...], self.position_key[...])
            )
            bias = _dot(*sides, (1, 1), exact=True)
        query, key = self._indices()
        if self.config.causal:
            masked = is_masked(self.causal_offset + query, key, self.config.window)
        if self.config.keys % self.config.block_k:
            padding = key >= self.config.keys
            masked = padding if masked is None else masked | padding
        return bias, masked

    def logits(self, query: jax.Array, key: jax.Array, shared: tuple[jax.Array | None, jax.Array | None]) -> jax.Array:
        """Returns the logits of one sample after the cap, without the mask, float32; shared: from `shared_logits`."""
        logits = _dot(key, query, (1, 1)) if self.transposed else _dot(query, key, (1, 1))
        return cap_logits(logits if shared[0] is None else logits + shared[0], self.config.cap)

    def mask(self, n: int, logits: jax.Array, shared: tuple[jax.Array | None, jax.Array | None]) -> jax.Array:
        """Returns logits of sample `n` in which those of hidden keys are masked; shared: from `shared_logits`."""
        if shared[1] is not None:
            logits = jnp.where(shared[1], MASK_VALUE, logits)
        if self.documents is None:
            return logits
        rows, columns = (side[n] for side in (reversed(self.documents) if self.transposed else self.documents))
        return jnp.where(_column(rows) == columns, logits, MASK_VALUE)

    def dropout_mask(self, n: int) -> jax.Array:
        """Returns the multiplier of the weights of sample `n` of the step."""
        query, key = self._indices()
        sample = (self.group * self.config.samples + n) * pl.num_programs(1) + self.set
        first_sample, first_head, first_row, first_key, seed = (self.dropout_indices[field] for field in range(5))
        indices = first_sample + sample, first_head + self.head, first_row + query, first_key + key
        return dropout_mask(seed, *indices, self.config.dropout_rate)


def _dot(left: jax.Array, right: jax.Array, contract: tuple[int, int], exact: bool = False) -> jax.Array:
    """Returns a matrix product accumulated in float32.

    Args:
      contract: axis of each side that is summed over.
      exact: multiply at float32 precision, not in one bfloat16 pass.
    """
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if exact else None
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _run_kernel(kernel: Any, call: _KernelCall, num_scalars: int, *refs: Any) -> None:
    """Calls a kernel with its tile."""
    scalars = _Scalars(*refs[:num_scalars])
    query, key, value, *rest = refs[num_scalars:]
    position_query, position_key = (None, None) if call.inputs.position_query is None else (rest.pop(0), rest.pop(0))
    documents = None if call.inputs.documents is None else (rest.pop(0), rest.pop(0))
    tile = _Tile(call, scalars, position_query, position_key, documents)
    kernel(tile, query, key, value, *rest)


def _column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _forward_kernel(tile, query, key, value, out, lse, m, normalizer, acc) -> None:
    """Online softmax: running maximum m and normalizer of each query (the same in every lane), unnormalized output acc."""

    @pl.when(tile.is_first)
    def _():
        m[...] = jnp.full_like(m, MASK_VALUE)
        normalizer[...] = jnp.zeros_like(normalizer)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(tile.needed)
    def _():
        shared = tile.shared_logits()
        for n in range(tile.config.samples):
            logits = tile.mask(n, tile.logits(query[n], key[n], shared), shared)
            m_old = m[n][:, :1]
            m_new = jnp.maximum(m_old, logits.max(axis=1, keepdims=True))
            p, alpha = jnp.exp(logits - m_new), jnp.exp(m_old - m_new)
            m[n] = jnp.broadcast_to(m_new, m.shape[1:])
            normalizer[n] = normalizer[n] * alpha + p.sum(axis=1, keepdims=True)
            if tile.config.dropout:
                p = p * tile.dropout_mask(n)
            acc[n] = acc[n] * alpha + _dot(p.astype(value.dtype), value[n], (1, 0))

    @pl.when(tile.is_last)
    def _():
        for n in range(tile.config.samples):
            total = normalizer[n]
            if tile.config.window or tile.documents is not None:  # all of these keys may be hidden from a query
                total = jnp.where(total > 0, total, 1.0)
            out[n] = (acc[n] / total[:, :1]).astype(out.dtype)
            lse[n] = (m[n] + jnp.log(total)).T[:1]


def _zero(is_first, accumulators) -> None:
    """Sets accumulators to zero at their first step."""

    @pl.when(is_first)
    def _():
        for accumulator in accumulators:
            accumulator[...] = jnp.zeros_like(accumulator)


def _store(is_last, results, accumulators) -> None:
    """Writes accumulators into the results after their last step."""

    @pl.when(is_last)
    def _():
        for result, accumulator in zip(results, accumulators, strict=True):
            result[...] = accumulator[...].astype(result.dtype)


def _dq_kernel(tile, query, key, value, d_out, lse, delta, *rest) -> None:
    """Gradients of queries and position_query, accumulated over key blocks."""
    results, accumulators = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    _zero(tile.is_first, accumulators)

    @pl.when(tile.needed)
    def _():
        shared, ds_total = tile.shared_logits(), 0.0
        for n in range(tile.config.samples):
            logits = tile.logits(query[n], key[n], shared)
            p = jnp.exp(tile.mask(n, logits, shared) - _column(lse[n]))
            d_p = _dot(d_out[n], value[n], (1, 1))
            if tile.config.dropout:
                d_p = d_p * tile.dropout_mask(n)
            ds = p * (d_p - _column(delta[n])) * cap_slope(logits, tile.config.cap)
            accumulators[0][n] += _dot(ds.astype(key.dtype), key[n], (1, 0))
            ds_total = ds_total + ds
        if tile.position_query is not None:
            accumulators[1][...] += _dot(ds_total, tile.position_key[...], (1, 0), exact=True)

    _store(tile.is_last, results, accumulators)


def _dkv_kernel(tile, query, key, value, d_out, lse, delta, *rest) -> None:
    """Gradients of keys, values and position_key, accumulated over query blocks; tiles are transposed, [keys, queries].

    Those of keys and values are sums over all query heads that read them.
    """
    results, accumulators = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    _zero(tile.is_first, accumulators[:2])
    _zero(tile.is_first_of_head, accumulators[2:])

    @pl.when(tile.needed)
    def _():
        shared, ds_total = tile.shared_logits(), 0.0
        for n in range(tile.config.samples):
            logits = tile.logits(query[n], key[n], shared)
            p = jnp.exp(tile.mask(n, logits, shared) - lse[n])
            d_p, p_dropped = _dot(value[n], d_out[n], (1, 1)), p
            if tile.config.dropout:
                mask = tile.dropout_mask(n)
                d_p, p_dropped = d_p * mask, p * mask
            ds = p * (d_p - delta[n]) * cap_slope(logits, tile.config.cap)
            accumulators[0][n] += _dot(ds.astype(query.dtype), query[n], (1, 0))
            accumulators[1][n] += _dot(p_dropped.astype(d_out.dtype), d_out[n], (1, 0))
            ds_total = ds_total + ds
        if tile.position_query is not None:
            accumulators[2][...] += _dot(ds_total, tile.position_query[...], (1, 0), exact=True)

    _store(tile.is_last, results[:2], accumulators[:2])
    _store(tile.is_last_of_head, results[2:], accumulators[2:])


# Kernel -> number of products per tile over the width of queries and keys, of values, and of position queries.
PRODUCTS = {_forward_kernel: (1, 1, 1), _dq_kernel: (2, 1, 2), _dkv_kernel: (2, 2, 2)}


def cost_estimate(kernel: Any, inputs: KernelInputs, config: KernelConfig, moved: list[Any]) -> pl.CostEstimate:
    """Returns the cost of a kernel call on one device, for XLA's scheduler, which cannot see into kernels.

    Tiles that the causal mask or the window hides are left out, under the assumption that the last query meets the last key. That is so
    on the device that holds the last part of the queries, for which the others wait. Where devices have equal work, the mean
    of their offsets is known (`KernelConfig.mean_causal_offset`).

    Args:
      kernel: one of `PRODUCTS`.
      inputs: arrays or their shapes.
      config: sizes of the call.
      moved: arrays, or their shapes, that are read and written, once each.
    """
    *samples, heads, length, width = inputs.query.shape
    keys, features = inputs.key.shape[3], 0 if inputs.position_query is None else inputs.position_query.shape[-1]
    offset = max(0, config.keys - length) if config.mean_causal_offset is None else config.mean_causal_offset
    pairs = 0
    for row in range(0, length, config.block_q):
        blocks = keys // config.block_k
        if config.causal:
            blocks = min(blocks, (offset + row + config.block_q - 1) // config.block_k + 1)
        if config.window:
            blocks = max(0, blocks - max(0, offset + row - config.window + 1) // config.block_k)
        pairs += config.block_q * config.block_k * blocks
    of_width, of_values, of_features = PRODUCTS[kernel]
    calls = math.prod(samples) * heads
    per_pair = of_width * width + of_values * inputs.value.shape[-1]
    flops = 2 * pairs * calls * per_pair + 2 * pairs * calls // config.samples * of_features * features
    return pl.CostEstimate(
        flops=flops,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
        transcendentals=pairs * calls,
    )
