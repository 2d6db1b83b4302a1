"""Random positions of a training step, as pure functions of a key: shifts, skips, pivots and candidates, far windows.

Rules: arXiv 2506.13277 section 3 and the released samplers, without their defects: coordinates are edited one by one
and stay inside the range, all candidate kinds are used, and every number of candidates works.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.errors import InputError
from seqpe_jax.positions.digits import count_digits
from seqpe_jax.positions.grids import grid
from seqpe_jax.positions.permutation import LIMIT, ROUNDS, permute, permute_with

HARD_TRIES = 64  # rounds of digit edits; nearly all candidates are done after a dozen
EDIT_TRIES = 4  # draws of one swap or substitution


class Contrastive(NamedTuple):
    """Pivots int32[B, A], candidates int32[B, C, A], and the index of the nearest one int32[B]."""

    pivots_BA: jax.Array
    candidates_BCA: jax.Array
    labels_B: jax.Array


class Distillation(NamedTuple):
    """Flat indices of M offsets in the origin grid int32[B, M], and the same offsets far away int32[B, M, A]."""

    indices_BM: jax.Array
    positions_BMA: jax.Array


def shift(
    key: jax.Array,
    *,
    sets: int,
    shape: tuple[int, ...],
    max_position: int,
    starts: int = 0,
    subset_key: jax.Array | None = None,
) -> jax.Array:
    """Returns starts int32[P, A] of grids anywhere in range.

    Args:
      sets: P; shape: side along each axis; max_position: coordinates lie below.
      starts: only a fixed subset of that many starts, chosen by subset_key; 0 = all.

    Raises:
      InputError: the grid does not fit into the range.
    """
    room = _room(shape, max_position)
    if not starts:
        return jax.random.randint(key, (sets, len(shape)), 0, jnp.array(room))
    total = math.prod(room)
    if total > LIMIT:
        raise InputError(f"objective.shift.starts: {total} starts are too many to choose a subset of; set it to 0")
    chosen = jax.random.randint(key, (sets,), 0, min(starts, total))
    return _unravel(permute(subset_key, chosen, total), room)


def skip(
    key: jax.Array, *, sets: int, shape: tuple[int, ...], max_position: int, chunks: int, range: int
) -> jax.Array:
    """Returns positions int32[P, L, A] of windows cut into chunks with random gaps between (arXiv 2309.10400).

    The first chunk starts at 0; positions rise strictly and stay below `range`. With more axes each is cut on its own.

    Raises:
      InputError: range is smaller than the window or larger than max_position.
    """
    _room(shape, range)
    if range > max_position:
        raise InputError(f"objective.skip.range={range} is beyond encoding.max_position={max_position}")

    def axis(key: jax.Array, side: int) -> jax.Array:
        cut_key, gap_key = jax.random.split(key)
        parts = min(chunks, side)
        cuts = jnp.sort(1 + permute(cut_key, jnp.arange(parts - 1), side - 1)) if parts > 1 else jnp.zeros(0, jnp.int32)
        gaps = jnp.sort(jax.random.randint(gap_key, (parts - 1,), 0, range - side + 1))
        offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), gaps])
        places = jnp.arange(side)
        return places + offsets[(places[:, None] >= cuts).sum(axis=1)]

    def one(key: jax.Array) -> jax.Array:
        sides = [axis(jax.random.fold_in(key, at), side) for at, side in enumerate(shape)]
        return jnp.stack(jnp.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, len(shape))

    return jax.vmap(one)(jax.random.split(key, sets))


def contrastive(
    key: jax.Array,
    step: jax.Array,
    *,
    batch: int,
    candidates: int,
    max_position: int,
    axes: int,
    base: int,
    mixture: tuple[float, float, float],
    hard_fraction: float,
    window: int,
    around_pivot: bool = False,
    past_only: bool = False,
) -> Contrastive:
    """Returns pivots, each with distinct candidates other than itself, and the nearest candidate's index.

    Every position is a pivot once per epoch, in an order of its own. Each pivot's list begins with special candidates
    (hard or distributional, as `mixture` says), then uniform draws fill it up.

    Args:
      key: the run's key for this purpose; step: int32, how many batches came before.
      batch, candidates: B and C; max_position: coordinates lie below; base: of the digits that hard candidates edit.
      mixture: probabilities of random, hard and distributional candidates.
      hard_fraction: hard candidates as a share of C, made by 1 to 3 digit edits and kept where farther than the nearest
        uniform draw; distributional ones all lie in one box of side max(window, (5 C)^(1/A)).
      around_pivot: that box lies around the pivot, not anywhere.
      past_only: one axis only; all candidates lie before the pivot.

    Raises:
      InputError: there are too few or too many positions.
    """
    total = max_position**axes
    if total > LIMIT:
        raise InputError(f"encoding.max_position={max_position} on {axes} axes gives more than {LIMIT} positions")
    if past_only and axes != 1:
        raise InputError("objective.contrastive.past_only needs one axis: there is no before on a grid")
    first = candidates + 1 if past_only else 0  # lower pivots have too little past
    if total - first < (1 if past_only else candidates + 1):
        raise InputError(
            f"objective.contrastive.candidates={candidates} is too many for the {total} positions of "
            f"encoding.max_position={max_position}: lower it"
        )
    extent = (max_position,) * axes
    pivot_key, draw_key = jax.random.split(key)
    count = jnp.asarray(step, jnp.int32) * batch + jnp.arange(batch)
    # A batch may end one epoch and begin the next.
    epoch = count[0] // (total - first)
    orders = jnp.stack([jax.random.bits(jax.random.fold_in(pivot_key, epoch + at), (ROUNDS,)) for at in (0, 1)])
    order_B = permute_with(orders[count // (total - first) - epoch], count % (total - first), total - first)
    pivots_B = first + order_B
    pivots_BA = _unravel(pivots_B, extent)
    keys = jax.random.split(jax.random.fold_in(draw_key, step), 4)

    below_B = pivots_B if past_only else jnp.full(batch, total)
    uniform_BC = _distinct(keys[0], below_B, candidates + 1)
    uniform = _unravel(uniform_BC, extent)
    specials = [jnp.full((batch, candidates + 1), -1)]
    for wanted, key, make in ((mixture[1], keys[1], _hard), (mixture[2], keys[2], _box)):
        made = specials[0]
        if wanted > 0:
            made = make(
                key, pivots_BA, uniform, candidates=candidates, max_position=max_position, base=base,
                hard_fraction=hard_fraction, window=window, around_pivot=around_pivot, past_only=past_only,
            )  # fmt: skip
            made = jnp.pad(made, ((0, 0), (0, candidates + 1 - made.shape[1])), constant_values=-1)
        specials.append(made)
    draw_B = jax.random.uniform(keys[3], (batch,))
    edges = np.cumsum(mixture) / sum(mixture)
    kind_B = (draw_B >= edges[0]).astype(jnp.int32) + (draw_B >= edges[1]).astype(jnp.int32)
    special_BC = jnp.stack(specials)[kind_B, jnp.arange(batch)]
    chosen_BC = _first_distinct(jnp.concatenate([special_BC, uniform_BC], axis=1), pivots_B, candidates)
    candidates_BCA = _unravel(chosen_BC, extent)
    labels_B = jnp.argmin(_distance(candidates_BCA, pivots_BA[:, None]), axis=1).astype(jnp.int32)
    return Contrastive(pivots_BA, candidates_BCA, labels_B)


def distillation(
    key: jax.Array, *, batch: int, offsets: int, shape: tuple[int, ...], max_position: int
) -> Distillation:
    """Returns M offsets into the grid at the origin, and the same offsets into a grid that starts out of range.

    Starts are uniform: on one axis in [L / 4, max_position - L], on more axes wherever the grid leaves the origin grid.

    Raises:
      InputError: there is no such start, or there are fewer than M offsets.
    """
    room, size = _room(shape, max_position), math.prod(shape)
    if offsets > size:
        raise InputError(f"objective.distillation.offsets={offsets} is more than the {size} positions of a window")
    axes = len(shape)
    lowest = shape[0] // 4 if axes == 1 else 0
    if lowest >= room[0] if axes == 1 else all(free <= side for free, side in zip(room, shape, strict=True)):
        raise InputError(
            f"objective.distillation finds no shifted window of {shape} below encoding.max_position={max_position}: "
            "raise it"
        )
    start_key, offset_key = jax.random.split(key)
    limits = jnp.array(room)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (batch, axes), lowest, limits)

    def inside(start_BA: jax.Array) -> jax.Array:
        return (start_BA < jnp.array(shape)).all(axis=1) if axes > 1 else jnp.zeros(batch, bool)

    def again(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        key, start_BA = state
        key, now = jax.random.split(key)
        return key, jnp.where(inside(start_BA)[:, None], draw(now), start_BA)

    _, start_BA = jax.lax.while_loop(lambda state: inside(state[1]).any(), again, (start_key, draw(start_key)))
    indices_BM = _distinct(offset_key, jnp.full(batch, size), offsets)
    origin_LA = grid(jnp.zeros(axes, jnp.int32), shape)
    return Distillation(indices_BM, origin_LA[indices_BM] + start_BA[:, None])


def _room(shape: tuple[int, ...], max_position: int) -> tuple[int, ...]:
    """Starts along each axis that keep the grid in range."""
    if max(shape) > max_position:
        raise InputError(
            f"a window of {max(shape)} does not fit below encoding.max_position={max_position}: raise it or shorten the "
            "window"
        )
    return tuple(max_position - side + 1 for side in shape)


def _unravel(flat: jax.Array, extent: tuple[int, ...]) -> jax.Array:
    """int32[...] -> int32[..., A], row-major."""
    coordinates = []
    for side in reversed(extent):
        coordinates.append(flat % side)
        flat = flat // side
    return jnp.stack(coordinates[::-1], axis=-1)


def _ravel(positions: jax.Array, side: int) -> jax.Array:
    """int32[..., A] -> int32[...] in a cube of that side."""
    flat = positions[..., 0]
    for axis in range(1, positions.shape[-1]):
        flat = flat * side + positions[..., axis]
    return flat


def _distance(first: jax.Array, second: jax.Array) -> jax.Array:
    """Orders pairs of positions as Euclidean distance does."""
    apart = jnp.abs(first - second)
    if apart.shape[-1] == 1:  # no square, no overflow
        return apart[..., 0]
    return jnp.square(apart.astype(jnp.float32)).sum(axis=-1)


def _first_distinct(values_BN: jax.Array, pivots_B: jax.Array, count: int) -> jax.Array:
    """The first `count` values of each row that are not -1, not the pivot and not seen before."""
    same_BNN = values_BN[:, :, None] == values_BN[:, None, :]
    seen_BN = jnp.tril(same_BNN, k=-1).any(axis=2)
    keep_BN = ~seen_BN & (values_BN >= 0) & (values_BN != pivots_B[:, None])
    rank_BN = jnp.where(keep_BN, jnp.cumsum(keep_BN, axis=1) - 1, count)
    rows_B1 = jnp.arange(values_BN.shape[0])[:, None]
    return jnp.zeros((values_BN.shape[0], count), jnp.int32).at[rows_B1, rank_BN].set(values_BN, mode="drop")


def _distinct(key: jax.Array, limits_B: jax.Array, count: int) -> jax.Array:
    """Distinct draws int32[B, count] below each limit."""
    round_keys = jax.random.bits(key, (len(limits_B), 1, ROUNDS))
    return permute_with(round_keys, jnp.broadcast_to(jnp.arange(count), (len(limits_B), count)), limits_B[:, None])


def _box(
    key: jax.Array, pivots_BA: jax.Array, uniform: jax.Array, *, candidates: int, max_position: int, window: int,
    around_pivot: bool, past_only: bool, **_: object,
) -> jax.Array:  # fmt: skip
    """Distinct flat positions int32[B, up to C + 1] from one box per pivot; one to spare where the pivot is in it."""
    batch, axes = pivots_BA.shape
    side = min(max_position, max(window, int((5 * candidates) ** (1 / axes) + 1e-9)))
    taken = min(candidates + around_pivot, side**axes)
    wide_B1 = jnp.minimum(side, pivots_BA[:, :1]) if past_only else jnp.full((batch, 1), side)
    last_start_BA = (pivots_BA if past_only else max_position) - wide_B1
    start_key, place_key = jax.random.split(key)
    if not around_pivot:
        start_BA = jax.random.randint(start_key, (batch, axes), 0, last_start_BA + 1)
    elif past_only:
        start_BA = last_start_BA
    else:
        start_BA = jnp.clip(pivots_BA - side // 2, 0, last_start_BA)
    flat_BC = _distinct(place_key, wide_B1[:, 0] ** axes, taken)
    return _ravel(start_BA[:, None] + _unravel(flat_BC, (side,) * axes), max_position)


def _hard(
    key: jax.Array, pivots_BA: jax.Array, uniform: jax.Array, *, candidates: int, max_position: int, base: int,
    hard_fraction: float, past_only: bool, **_: object,
) -> jax.Array:  # fmt: skip
    """Flat positions int32[B, hard_fraction * C] that look like the pivot's digits, -1 where too near."""
    count = int(candidates * hard_fraction)
    compared = uniform[:, : candidates + 1 - count]
    nearest_B = _distance(compared, pivots_BA[:, None]).min(axis=1)
    edited_BCA, done_BC = _edit(key, jnp.repeat(pivots_BA[:, None], count, axis=1), max_position, base)
    far_BC = _distance(edited_BCA, pivots_BA[:, None]) > nearest_B[:, None]
    keep_BC = far_BC & done_BC
    if past_only:
        keep_BC &= edited_BCA[..., 0] < pivots_BA
    return jnp.where(keep_BC, _ravel(edited_BCA, max_position), -1)


def _edit(
    key: jax.Array, positions: jax.Array, max_position: int, base: int
) -> tuple[jax.Array, jax.Array]:
    """Applies 1 to 3 random digit edits to each position int32[..., A]: (edited, whether all edits were done)."""
    *lead, axes = positions.shape
    places = count_digits(max_position, base)
    powers = np.array([base**power for power in range(places + 1) if base**power < 2**31], np.int32)
    pivot_CA = positions.reshape(-1, axes)
    total = len(pivot_CA)
    wanted_key, key = jax.random.split(key)
    wanted_C = jax.random.randint(wanted_key, (total,), 1, 4)

    def body(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        key, tries, values_CA, done_C = state
        key, now = jax.random.split(key)
        bits = jax.random.bits(now, (2 + 4 * EDIT_TRIES, total))  # one draw of bits: it compiles once
        axis_C = (bits[0] % axes).astype(jnp.int32)
        number_C = jnp.take_along_axis(values_CA, axis_C[:, None], axis=1)[:, 0]
        edited_C, allowed_C = _edit_number(bits[1:], number_C, powers, places, base)
        next_CA = jnp.where(jnp.arange(axes) == axis_C[:, None], edited_C[:, None], values_CA)
        allowed_C &= (edited_C < max_position) & (edited_C >= 0) & (next_CA != pivot_CA).any(axis=1)
        allowed_C &= done_C < wanted_C
        return key, tries + 1, jnp.where(allowed_C[:, None], next_CA, values_CA), done_C + allowed_C

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (state[3] < wanted_C).any() & (state[1] < HARD_TRIES)

    start = (key, jnp.zeros((), jnp.int32), pivot_CA, jnp.zeros(total, jnp.int32))
    _, _, values_CA, done_C = jax.lax.while_loop(unfinished, body, start)
    return values_CA.reshape(positions.shape), (done_C == wanted_C).reshape(lead)


def _edit_number(
    bits: jax.Array, number_C: jax.Array, powers: np.ndarray, places: int, base: int
) -> tuple[jax.Array, jax.Array]:
    """Tries one random edit of each number, written without leading zeros: (result, whether it is allowed).

    `bits` is uint32[1 + 4 * EDIT_TRIES, C] of randomness. The four edits are equally likely: insert a digit, delete one, swap two, substitute one. Places count from the right.
    """
    powers = jnp.asarray(powers)
    which, bits = (bits[0] % 4).astype(jnp.int32), bits[1:].reshape(4, EDIT_TRIES, -1)
    length_C = jnp.maximum(1, (number_C[:, None] >= powers[:places]).sum(axis=1))

    def power(place: jax.Array) -> jax.Array:
        return powers[jnp.clip(place, 0, len(powers) - 1)]

    def digit(place: jax.Array) -> jax.Array:
        return number_C // power(place) % base

    def below(bits: jax.Array, limit: jax.Array | int) -> jax.Array:
        return (bits % jnp.maximum(limit, 1).astype(jnp.uint32)).astype(jnp.int32)

    leading = length_C - 1
    # Insert before the first digit, between two, or after the last; never a leading zero.
    place = below(bits[0, 0], length_C + 1)
    new = jnp.where(place == length_C, 1 + below(bits[1, 0], base - 1), below(bits[1, 0], base))
    inserted = (number_C // power(place) * base + new) * power(place) + number_C % power(place)
    can_insert = (length_C < places) & (length_C + 1 < len(powers))
    # Delete; the first digit stays where a zero would come first.
    second_is_zero = digit(leading - 1) == 0
    place = below(bits[0, 0], jnp.where(second_is_zero, leading, length_C))
    deleted = number_C // power(place) // base * power(place) + number_C % power(place)
    can_delete = length_C > 1
    # Swap two different digits, and substitute one: the first of a few tries that changes something and leaves no
    # leading zero, so that these edits come about as often as the others.
    one, other, new = below(bits[0], length_C), below(bits[2], leading), below(bits[3], base)
    other = other + (other >= one)
    swapped = number_C + (digit(one) - digit(other)) * (power(other) - power(one))
    leads = (one == leading) & (digit(other) == 0) | (other == leading) & (digit(one) == 0)
    swapped, can_swap = _first_allowed(swapped, (length_C > 1) & (digit(one) != digit(other)) & ~leads)
    substituted = number_C + (new - digit(one)) * power(one)
    substituted, can_substitute = _first_allowed(substituted, (new != digit(one)) & ~((one == leading) & (new == 0)))

    results = jnp.stack([inserted, deleted, swapped, substituted])
    allowed = jnp.stack([can_insert, can_delete, can_swap, can_substitute])
    pick = which, jnp.arange(len(number_C))
    return results[pick], allowed[pick]


def _first_allowed(results_TC: jax.Array, allowed_TC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of T tries the first allowed one of each column, and whether there is any."""
    first_C = allowed_TC.argmax(axis=0)
    return jnp.take_along_axis(results_TC, first_C[None], axis=0)[0], allowed_TC.any(axis=0)
