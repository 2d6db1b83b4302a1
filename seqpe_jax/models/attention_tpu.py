"""Flash attention for TPU, a Pallas kernel that knows features: their products stay float32 beside bfloat16 ones.

The algorithm is FlashAttention-2's (Dao 2023, arXiv 2307.08691). What is new is how the samples of a position set go
together: a step of the kernel holds the same block of several samples, so that the products of features, six times as
dear as those of bfloat16, are made once for all of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from seqpe_jax.models.attention_inputs import MASK_VALUE, AttentionInputs, dropout_mask
from seqpe_jax.models.kernel_cost import estimate

LANES = 128
BLOCKS = (512, 384, 256)  # queries or keys of a step; for less than the smallest, a multiple of LANES
MOST_TOGETHER = 8  # samples of a step
FEW = 4  # samples of a step, from which on blocks are small


class _Plan(NamedTuple):
    """Sizes of a call, all static. keys: those that are no padding; together: samples of a step; rate: of dropout."""

    keys: int
    block_q: int
    block_k: int
    together: int
    causal: bool
    dropping: bool
    dropout_rate: float
    interpret: bool


class _Arrays(NamedTuple):
    """What the kernels read. Samples are [R, P], sample r P + p; lengths are padded to blocks.

    Attributes:
      query [R, P, H, L, K], key [R, P, H, S, K], value [R, P, H, S, V].
      f_q, f_k: float32[1 or P, 1 or H, L or S, F], or None.
      last: int32[P]; numbers: int32[4], the place and seed of `AttentionInputs`.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    f_q: jax.Array | None
    f_k: jax.Array | None
    causal_offset: jax.Array
    numbers: jax.Array


def flash(inputs: AttentionInputs, interpret: bool = False) -> jax.Array:
    """Returns `inputs.reference_attention`, of operands without a bias; interpret: run as plain JAX, on any platform."""
    batch, length, _, _ = inputs.query.shape
    keys, position_sets = inputs.key.shape[1], inputs.position_sets
    together = max(n for n in range(1, MOST_TOGETHER + 1) if batch // position_sets % n == 0)
    block_q, block_k = block_of(length, together), block_of(keys, together)

    def ready(array: jax.Array, block: int) -> jax.Array:
        return jnp.moveaxis(jnp.pad(array, ((0, 0), (0, -array.shape[1] % block), (0, 0), (0, 0))), 2, 1)

    def grouped(array: jax.Array, block: int) -> jax.Array:
        array = ready(array, block)
        return array.reshape(batch // position_sets, position_sets, *array.shape[1:])

    f_q, f_k = inputs.logit_query_key or (None, None)
    global_offset = jnp.zeros(3, jnp.int32) if inputs.global_offset is None else inputs.global_offset
    dropout_seed = jnp.zeros(1, jnp.int32) if inputs.dropout_seed is None else inputs.dropout_seed[None]
    arrays = _Arrays(
        grouped(inputs.query, block_q),
        grouped(inputs.key, block_k),
        grouped(inputs.value, block_k),
        None if f_q is None else ready(f_q, block_q),
        None if f_k is None else ready(f_k, block_k),
        jnp.broadcast_to(jnp.int32(0) if inputs.causal_offset is None else inputs.causal_offset, (position_sets,)),
        jnp.concatenate([global_offset, dropout_seed]),
    )
    plan = _Plan(
        keys,
        block_q,
        block_k,
        together,
        inputs.causal_offset is not None,
        inputs.dropout_seed is not None,
        inputs.dropout_rate,
        interpret,
    )
    mixed = _mix(arrays, plan)
    return jnp.moveaxis(mixed.reshape(batch, *mixed.shape[2:]), 1, 2)[:, :length]


def block_of(length: int, together: int) -> int:
    """Returns how many queries or keys a step reads: those that leave the least padding."""
    if length <= BLOCKS[-1]:
        return -(-length // LANES) * LANES
    sizes = BLOCKS if together < FEW else BLOCKS[-1:]
    return min(sizes, key=lambda size: (-(-length // size) * size, -size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _mix(arrays: _Arrays, plan: _Plan) -> jax.Array:
    """The mixed values [R, P, H, L, V]."""
    return _forward(arrays, plan)[0]


def _forward(arrays: _Arrays, plan: _Plan) -> tuple[jax.Array, Any]:
    *samples, heads, length, _ = arrays.query.shape
    width = arrays.value.shape[-1]
    call = _Call(arrays, plan, of_keys=False)
    mixed, normaliser = call(
        _forward_kernel,
        (),
        (
            (call.queries(width), jax.ShapeDtypeStruct((*samples, heads, length, width), arrays.value.dtype)),
            (call.rows(), jax.ShapeDtypeStruct((*samples, heads, 1, length), jnp.float32)),
        ),
        [(plan.together, plan.block_q, size) for size in (LANES, LANES, width)],
    )
    return mixed, (arrays, mixed, normaliser)


def _backward(plan: _Plan, saved: Any, given: jax.Array) -> tuple[_Arrays]:
    arrays, mixed, normaliser = saved
    inner = (given.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1)[:, :, :, None]
    found = []
    for of_keys, kernel, places in ((False, _query_kernel, (0, 3)), (True, _key_kernel, (1, 2, 4))):
        call = _Call(arrays, plan, of_keys=of_keys)
        spec, block = (call.keys, plan.block_k) if of_keys else (call.queries, plan.block_q)
        results, scratch = [], []
        for index in places:
            if (array := arrays[index]) is None:
                continue
            width = array.shape[-1]
            if index < 3:
                results.append((spec(width), jax.ShapeDtypeStruct(array.shape, array.dtype)))
                scratch.append((plan.together, block, width))
            else:  # of all steps with other samples and heads, to be summed
                steps = (arrays.query.shape[0] // plan.together, *arrays.query.shape[1:3], *array.shape[2:])
                results.append((call.per_step(block, width, of_keys), jax.ShapeDtypeStruct(steps, jnp.float32)))
                scratch.append((block, width))
        extra = ((call.queries(given.shape[-1]), given), (call.rows(), normaliser), (call.rows(), inner))
        found.append(call(kernel, extra, results, scratch))
    (query, *f_q), (key, value, *f_k) = found

    def summed(steps: list[jax.Array], field: jax.Array | None) -> jax.Array | None:
        if field is None:
            return None
        total = steps[0].sum(axis=0)
        for axis in (0, 1):
            total = total if total.shape[axis] == field.shape[axis] else total.sum(axis=axis, keepdims=True)
        return total

    return (_Arrays(query, key, value, summed(f_q, arrays.f_q), summed(f_k, arrays.f_k), None, None),)


_mix.defvjp(_forward, _backward)


class _Call:
    """A pallas_call over (groups of samples, sets, heads, blocks, blocks), the innermost being summed over.

    Blocks that causality hides are neither computed nor read: their index stays at the nearest that is needed.
    """

    def __init__(self, arrays: _Arrays, plan: _Plan, of_keys: bool):
        self.arrays, self.plan, self.of_keys = arrays, plan, of_keys
        groups, position_sets, heads = arrays.query.shape[0] // plan.together, *arrays.query.shape[1:3]
        self.count_q, self.count_k = arrays.query.shape[3] // plan.block_q, arrays.key.shape[3] // plan.block_k
        self.grid = (
            groups,
            position_sets,
            heads,
            *((self.count_k, self.count_q) if of_keys else (self.count_q, self.count_k)),
        )

    def _blocks(self, set_: Any, outer: Any, inner: Any, causal_offset: Any) -> tuple[Any, Any]:
        """The blocks of queries and of keys that a step reads."""
        plan = self.plan
        i, j = (inner, outer) if self.of_keys else (outer, inner)
        if plan.causal and self.of_keys:
            first = jax.lax.div(jnp.maximum(j * plan.block_k - causal_offset[set_], 0), jnp.int32(plan.block_q))
            i = jnp.minimum(jnp.maximum(i, first), self.count_q - 1)
        elif plan.causal:
            seen = jax.lax.div(
                jnp.maximum(causal_offset[set_] + (i + 1) * plan.block_q - 1, 0), jnp.int32(plan.block_k)
            )
            j = jnp.minimum(jnp.minimum(j, seen), self.count_k - 1)
        return i, j

    def queries(self, width: int) -> pl.BlockSpec:
        """[R, P, H, L, width], a block of queries."""

        def index(group, set_, head, outer, inner, causal_offset, numbers):
            return group, set_, head, self._blocks(set_, outer, inner, causal_offset)[0], 0

        return pl.BlockSpec((self.plan.together, None, None, self.plan.block_q, width), index)

    def keys(self, width: int) -> pl.BlockSpec:
        """[R, P, H, S, width], a block of keys."""

        def index(group, set_, head, outer, inner, causal_offset, numbers):
            return group, set_, head, self._blocks(set_, outer, inner, causal_offset)[1], 0

        return pl.BlockSpec((self.plan.together, None, None, self.plan.block_k, width), index)

    def rows(self) -> pl.BlockSpec:
        """[R, P, H, 1, L], a number for each query of a block."""

        def index(group, set_, head, outer, inner, causal_offset, numbers):
            return group, set_, head, 0, self._blocks(set_, outer, inner, causal_offset)[0]

        return pl.BlockSpec((self.plan.together, None, None, 1, self.plan.block_q), index)

    def logit_query_key(self, field: jax.Array, of_keys: bool) -> pl.BlockSpec:
        """[1 or P, 1 or H, L or S, F], a block of queries or keys."""
        position_sets, heads, _, width = field.shape

        def index(group, set_, head, outer, inner, causal_offset, numbers):
            block = self._blocks(set_, outer, inner, causal_offset)[of_keys]
            return set_ if position_sets > 1 else 0, head if heads > 1 else 0, block, 0

        return pl.BlockSpec((None, None, self.plan.block_k if of_keys else self.plan.block_q, width), index)

    def per_step(self, block: int, width: int, of_keys: bool) -> pl.BlockSpec:
        """[groups, P, H, L or S, F], a block of queries or keys."""

        def index(group, set_, head, outer, inner, causal_offset, numbers):
            return group, set_, head, outer, 0

        return pl.BlockSpec((None, None, None, block, width), index)

    def __call__(self, kernel: Any, extra: Any, results: Any, scratch: Any) -> list[jax.Array]:
        """Returns the results, [(spec, shape)]; extra: [(spec, array)] that are read beside queries, keys, values."""
        arrays, plan = self.arrays, self.plan
        read = [
            (self.queries(arrays.query.shape[-1]), arrays.query),
            (self.keys(arrays.key.shape[-1]), arrays.key),
            (self.keys(arrays.value.shape[-1]), arrays.value),
        ]
        if arrays.f_q is not None:
            read += [
                (self.logit_query_key(arrays.f_q, False), arrays.f_q),
                (self.logit_query_key(arrays.f_k, True), arrays.f_k),
            ]
        read += extra
        return pl.pallas_call(
            functools.partial(_run, kernel, plan, arrays.f_q is not None, self.of_keys, self.grid[-1]),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=self.grid,
                in_specs=[spec for spec, _ in read],
                out_specs=[spec for spec, _ in results],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[shape for _, shape in results],
            cost_estimate=estimate(kernel.__name__, arrays, plan, [array for _, array in (*read, *results)]),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",)),
            interpret=plan.interpret,
        )(arrays.causal_offset, arrays.numbers, *(array for _, array in read))


class _Tile:
    """What a step of a kernel knows of its blocks of queries and keys; transposed: logits are [keys, queries]."""

    def __init__(self, plan: _Plan, causal_offset: Any, numbers: Any, f_q: Any, f_k: Any, of_keys: bool):
        self.plan, self.transposed, self.numbers = plan, of_keys, numbers
        self.group, self.set, self.head, outer, inner = (pl.program_id(axis) for axis in range(5))
        i, j = (inner, outer) if of_keys else (outer, inner)
        self.first_row, self.first_column, self.causal_offset = (
            i * plan.block_q,
            j * plan.block_k,
            causal_offset[self.set],
        )
        self.f_q, self.f_k = f_q, f_k
        # Of its logits some are seen.
        self.needed = (
            self.first_column <= self.causal_offset + self.first_row + plan.block_q - 1 if plan.causal else True
        )

    def _numbers(self) -> tuple[jax.Array, jax.Array]:
        """Queries and keys of the tile, as int32 that broadcast to its shape."""
        shape = (self.plan.block_k, self.plan.block_q) if self.transposed else (self.plan.block_q, self.plan.block_k)
        row = self.first_row + jax.lax.broadcasted_iota(jnp.int32, shape, int(self.transposed))
        column = self.first_column + jax.lax.broadcasted_iota(jnp.int32, shape, int(not self.transposed))
        return row, column

    def shared(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns what all samples' logits gain, and where they are hidden."""
        added = hidden = None
        if self.f_q is not None:
            sides = (self.f_k[...], self.f_q[...]) if self.transposed else (self.f_q[...], self.f_k[...])
            added = _product(*sides, (1, 1), exact=True)
        row, column = self._numbers()
        if self.plan.causal:
            hidden = column > self.causal_offset + row
        if self.plan.keys % self.plan.block_k:
            padding = column >= self.plan.keys
            hidden = padding if hidden is None else hidden | padding
        return added, hidden

    def logits(self, query: jax.Array, key: jax.Array, shared: tuple[jax.Array | None, jax.Array | None]) -> jax.Array:
        """Returns the logits of a sample, float32."""
        added, hidden = shared
        logits = _product(key, query, (1, 1)) if self.transposed else _product(query, key, (1, 1))
        logits = logits if added is None else logits + added
        return logits if hidden is None else jnp.where(hidden, MASK_VALUE, logits)

    def dropout_mask(self, sample: int) -> jax.Array:
        """Returns what dropout multiplies the weights of a sample of the step by."""
        row, column = self._numbers()
        index = (self.group * self.plan.together + sample) * pl.num_programs(1) + self.set
        first_sample, first_head, first_row, dropout_seed = (self.numbers[n] for n in range(4))
        return dropout_mask(
            dropout_seed, first_sample + index, first_head + self.head, first_row + row, column, self.plan.dropout_rate
        )


def _product(left: jax.Array, right: jax.Array, summed: tuple[int, int], exact: bool = False) -> jax.Array:
    """A matrix product with float32 sums; summed: the axis of each; exact: float32 as such, not in one bfloat16 pass."""
    dimensions = (((summed[0],), (summed[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if exact else None
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _run(
    kernel: Any, plan: _Plan, featured: bool, of_keys: bool, steps: int, causal_offset: Any, numbers: Any, *refs: Any
) -> None:
    query, key, value, *rest = refs
    f_q, f_k = (rest.pop(0), rest.pop(0)) if featured else (None, None)
    step = pl.program_id(4)
    kernel(
        _Tile(plan, causal_offset, numbers, f_q, f_k, of_keys), step == 0, step == steps - 1, query, key, value, *rest
    )


def _column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _forward_kernel(tile, first, final, query, key, value, mixed, normaliser, top, total, sums) -> None:
    """The online softmax: `top` and `total` hold the largest logit and the sum of weights of each query in every lane."""

    @pl.when(first)
    def _():
        top[...] = jnp.full_like(top, MASK_VALUE)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(tile.needed)
    def _():
        shared = tile.shared()
        for n in range(tile.plan.together):
            logits = tile.logits(query[n], key[n], shared)
            before = top[n][:, :1]
            higher = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights, shrink = jnp.exp(logits - higher), jnp.exp(before - higher)
            top[n] = jnp.broadcast_to(higher, top.shape[1:])
            total[n] = total[n] * shrink + weights.sum(axis=1, keepdims=True)
            if tile.plan.dropping:
                weights = weights * tile.dropout_mask(n)
            sums[n] = sums[n] * shrink + _product(weights.astype(value.dtype), value[n], (1, 0))

    @pl.when(final)
    def _():
        for n in range(tile.plan.together):
            mixed[n] = (sums[n] / total[n][:, :1]).astype(mixed.dtype)
            normaliser[n] = (top[n] + jnp.log(total[n])).T[:1]


def _begin(first, sums) -> None:
    @pl.when(first)
    def _():
        for each in sums:
            each[...] = jnp.zeros_like(each)


def _end(final, results, sums) -> None:
    @pl.when(final)
    def _():
        for result, each in zip(results, sums, strict=True):
            result[...] = each[...].astype(result.dtype)


def _query_kernel(tile, first, final, query, key, value, given, normaliser, inner, *rest) -> None:
    """Gradients of queries and their features, summed over blocks of keys."""
    results, sums = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    _begin(first, sums)

    @pl.when(tile.needed)
    def _():
        shared, total = tile.shared(), 0.0
        for n in range(tile.plan.together):
            weights = jnp.exp(tile.logits(query[n], key[n], shared) - _column(normaliser[n]))
            of_weights = _product(given[n], value[n], (1, 1))
            if tile.plan.dropping:
                of_weights = of_weights * tile.dropout_mask(n)
            of_logits = weights * (of_weights - _column(inner[n]))
            sums[0][n] += _product(of_logits.astype(key.dtype), key[n], (1, 0))
            total = total + of_logits
        if tile.f_q is not None:
            sums[1][...] += _product(total, tile.f_k[...], (1, 0), exact=True)

    _end(final, results, sums)


def _key_kernel(tile, first, final, query, key, value, given, normaliser, inner, *rest) -> None:
    """Gradients of keys, values and the keys' features, summed over blocks of queries; logits are [keys, queries]."""
    results, sums = rest[: len(rest) // 2], rest[len(rest) // 2 :]

    _begin(first, sums)

    @pl.when(tile.needed)
    def _():
        shared, total = tile.shared(), 0.0
        for n in range(tile.plan.together):
            weights = jnp.exp(tile.logits(query[n], key[n], shared) - normaliser[n])
            of_weights, dropped = _product(value[n], given[n], (1, 1)), weights
            if tile.plan.dropping:
                mask = tile.dropout_mask(n)
                of_weights, dropped = of_weights * mask, weights * mask
            of_logits = weights * (of_weights - inner[n])
            sums[0][n] += _product(of_logits.astype(query.dtype), query[n], (1, 0))
            sums[1][n] += _product(dropped.astype(given.dtype), given[n], (1, 0))
            total = total + of_logits
        if tile.f_q is not None:
            sums[2][...] += _product(total, tile.f_q[...], (1, 0), exact=True)

    _end(final, results, sums)
