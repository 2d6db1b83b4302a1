"""Random positions of a training step, as pure functions of a key: shifts, skips, pivots and candidates, far windows.

Rules: arXiv 2506.13277 section 3 and the released samplers, without their defects: coordinates are edited one by one
and stay inside the range, all candidate kinds are used, and every number of candidates works.

Each function takes all its randomness from one call of `jax.random.bits`: on CPU every further call adds a good part
of a second to the compilation of a training step. Whole numbers below n are words modulo n, whose bias is at most
n / 2**32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.errors import InputError
from seqpe_jax.positions.digits import count_digits, to_digits
from seqpe_jax.positions.permutation import LIMIT, ROUNDS, mix, permute, permute_with

HARD_TRIES = 64  # rounds of digit edits; nearly all candidates are done after a dozen
EDIT_TRIES = 4  # draws of one swap or substitution
EDIT_WORDS = 2 + 4 * EDIT_TRIES  # random words of a round of edits
WEYL = 0x9E3779B9  # 2**32 over the golden ratio: the step between the counters of a word stream


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
    unit: int = 1,
    starts: int = 0,
    subset_key: jax.Array | None = None,
) -> jax.Array:
    """Returns starts int32[P, A] of grids anywhere in range.

    Args:
      sets: P; shape: places along each axis; max_position: coordinates lie below; unit: from one place to the next.
      starts: only a fixed subset of that many starts, chosen by subset_key; 0 = all.

    Raises:
      InputError: the grid does not fit into the range.
    """
    room = _room(shape, max_position, unit)
    if not starts:
        return _below(jax.random.bits(key, (sets, len(shape)), jnp.uint32), np.array(room))
    total = math.prod(room)
    if total > LIMIT:
        raise InputError(f"objective.shift.starts: {total} starts are too many to choose a subset of; set it to 0")
    if subset_key is None:
        raise InputError(f"objective.shift.starts={starts} needs a key that fixes the subset")
    chosen = _below(jax.random.bits(key, (sets,), jnp.uint32), min(starts, total))
    return _unravel(permute(subset_key, chosen, total), room)


def skip(
    key: jax.Array,
    *,
    sets: int,
    shape: tuple[int, ...],
    max_position: int,
    chunks: int,
    range: int,
    unit: int = 1,
) -> jax.Array:
    """Returns positions int32[P, L, A] of windows cut into chunks with random gaps between (arXiv 2309.10400).

    The first chunk starts at 0; positions rise strictly and stay below `range`. With more axes each is cut on its own.
    Within a chunk, places stand `unit` apart.

    Raises:
      InputError: range is smaller than the window or larger than max_position.
    """
    _room(shape, range, unit)
    if range > max_position:
        raise InputError(f"objective.skip.range={range} is beyond encoding.max_position={max_position}")

    bits = jax.random.bits(key, (len(shape), sets, ROUNDS + chunks), jnp.uint32)

    def axis(bits: jax.Array, side: int) -> jax.Array:
        parts = min(chunks, side)
        cuts = 1 + permute_with(bits[:, None, :ROUNDS], jnp.arange(parts - 1), side - 1) if parts > 1 else bits[:, :0]
        gaps = jnp.sort(_below(bits[:, ROUNDS : ROUNDS + parts - 1], range - (side - 1) * unit), axis=1)
        gaps = jnp.pad(gaps, ((0, 0), (1, 0)))
        places = jnp.arange(side)
        chunk_PL = (places[:, None] >= cuts[:, None]).sum(axis=2)
        return places * unit + jnp.take_along_axis(gaps, chunk_PL, axis=1)

    sides = [axis(bits[at], side) for at, side in enumerate(shape)]
    grids = jax.vmap(lambda *sides: jnp.stack(jnp.meshgrid(*sides, indexing="ij"), axis=-1))(*sides)
    return grids.reshape(sets, -1, len(shape)).astype(jnp.int32)


def jitter(key: jax.Array, positions_PLA: jax.Array, *, reach: int, max_position: int, ordered: bool) -> jax.Array:
    """Returns positions int32[P, L, A], each coordinate moved by a whole number drawn from -reach .. reach.

    Args:
      max_position: coordinates stay in 0 .. max_position - 1.
      ordered: the places keep their order along the one axis, as a causal model needs it; two may come to stand together.
    """
    bits = jax.random.bits(key, positions_PLA.shape, jnp.uint32)
    moved = jnp.clip(positions_PLA + _below(bits, 2 * reach + 1) - reach, 0, max_position - 1)
    return jnp.sort(moved, axis=1) if ordered else moved


def boxes(key: jax.Array, *, sets: int, axes: int, smallest: float) -> jax.Array:
    """Returns parts of images or clips, float32[P, A, 2]: (first, length) along each axis, as shares of the side.

    Height and width of a part are the same share of the image's, whose logarithm is uniform from `smallest` to 1; of
    clips, whose first axis is time, a part has all frames.
    """
    unit = _unit(jax.random.bits(key, (sets, 3), jnp.uint32))
    length_P1 = smallest ** unit[:, :1]
    first_P2 = (1 - length_P1) * unit[:, 1:]
    found = jnp.stack([first_P2, jnp.broadcast_to(length_P1, first_P2.shape)], axis=-1)
    whole = jnp.broadcast_to(jnp.array([0.0, 1.0]), (sets, axes - 2, 2))
    return jnp.concatenate([whole, found], axis=1)


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
      past_only: one axis only; all candidates lie before the pivot, and pivots start at position C.

    Raises:
      InputError: there are too few or too many positions, or a setting is out of its range.
    """
    total = max_position**axes
    if candidates < 1:
        raise InputError(f"objective.contrastive.candidates={candidates}: at least 1 is needed")
    if not 0 <= hard_fraction <= 1:
        raise InputError(f"objective.contrastive.hard_fraction={hard_fraction} is not a share from 0 to 1")
    if len(mixture) != 3 or min(mixture) < 0 or sum(mixture) <= 0:
        raise InputError(
            f"objective.contrastive.mixture={tuple(mixture)}: expected probabilities of random, hard and "
            "distributional candidates"
        )
    if total > LIMIT:
        raise InputError(f"encoding.max_position={max_position} on {axes} axes gives more than {LIMIT} positions")
    if past_only and axes != 1:
        raise InputError("objective.contrastive.past_only needs one axis: there is no before on a grid")
    first = candidates if past_only else 0  # lower pivots have too little past
    if total - first < (1 if past_only else candidates + 1):
        raise InputError(
            f"objective.contrastive.candidates={candidates} is too many for the {total} positions of "
            f"encoding.max_position={max_position}: lower it"
        )
    extent = (max_position,) * axes
    spare = 0 if past_only else 1  # one draw more where the pivot itself may be drawn
    edited = int(candidates * hard_fraction) if mixture[1] > 0 else 0
    box = _box_side(candidates, max_position, window, axes)

    # Even streams belong to epochs, odd ones to steps. A batch may end one epoch and begin others.
    step, passes = jnp.asarray(step, jnp.int32), total - first
    count_B = step * batch + jnp.arange(batch)
    epoch = count_B[0] // passes
    epochs = epoch + jnp.arange(2 + (batch - 2) // passes)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.append(2 * epochs, 2 * step + 1))
    shape = (batch, 2 * ROUNDS + 1 + axes + edited)
    bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(keys)
    orders, bits = bits[:-1, 0, :ROUNDS], bits[-1]
    pivots_B = first + permute_with(orders[count_B // passes - epoch], count_B % passes, passes)
    pivots_BA = _unravel(pivots_B, extent)
    ends = 2 * ROUNDS, 2 * ROUNDS + 1, 2 * ROUNDS + 1 + axes
    draw_bits, kind_bits, start_bits, edit_bits = jnp.split(bits, ends, axis=1)

    # Distinct uniform draws from the whole range, and distinct places in a box: one permutation serves both.
    uniform = candidates + spare
    placed = min(candidates + spare * around_pivot, box**axes) if mixture[2] > 0 else 0
    wide_B = jnp.minimum(box, pivots_B) if past_only else jnp.full(batch, box)
    below_B2 = jnp.stack([pivots_B if past_only else jnp.full(batch, total), wide_B**axes], axis=1)
    source = np.repeat([0, 1], [uniform, placed])
    index = np.concatenate([np.arange(uniform), np.arange(placed)])
    draws = permute_with(draw_bits.reshape(batch, 2, ROUNDS)[:, source], index, below_B2[:, source])
    uniform_BC, places_BC = draws[:, :uniform], draws[:, uniform:]

    specials = [jnp.full((batch, candidates + 1), -1)] * 3
    if edited:
        compared = _unravel(uniform_BC[:, : candidates + 1 - edited], extent)
        specials[1] = _hard(edit_bits, pivots_BA, compared, max_position=max_position, base=base, past_only=past_only)
    if placed:
        start_BA = _box_start(
            start_bits, pivots_BA, wide_B[:, None], max_position=max_position, around_pivot=around_pivot,
            past_only=past_only,
        )  # fmt: skip
        specials[2] = _ravel(start_BA[:, None] + _unravel(places_BC, (box,) * axes), max_position)
    specials = [
        jnp.pad(special, ((0, 0), (0, candidates + 1 - special.shape[1])), constant_values=-1) for special in specials
    ]
    edges = np.cumsum(mixture[:2]) / sum(mixture)
    kind_B1 = (_unit(kind_bits) >= edges).sum(axis=1, keepdims=True)
    special_BC = jnp.where(kind_B1 == 1, specials[1], jnp.where(kind_B1 == 2, specials[2], specials[0]))
    chosen_BC = _first_distinct(jnp.concatenate([special_BC, uniform_BC], axis=1), pivots_B, candidates)
    candidates_BCA = _unravel(chosen_BC, extent)
    labels_B = jnp.argmin(_distance(candidates_BCA, pivots_BA[:, None]), axis=1).astype(jnp.int32)
    return Contrastive(pivots_BA, candidates_BCA, labels_B)


def distillation(
    key: jax.Array, *, batch: int, offsets: int, shape: tuple[int, ...], max_position: int, unit: int = 1
) -> Distillation:
    """Returns M offsets into the grid at the origin, and the same offsets into a grid that starts out of range.

    Starts are uniform: on one axis in [L / 4, max_position - L], on more axes wherever the grid leaves the origin grid.
    Places stand `unit` apart; starts may lie between them.

    Raises:
      InputError: there is no such start, or there are fewer than M offsets.
    """
    room, size = _room(shape, max_position, unit), math.prod(shape)
    sides = [side * unit for side in shape]
    if offsets > size:
        raise InputError(f"objective.distillation.offsets={offsets} is more than the {size} positions of a window")
    axes = len(shape)
    lowest = sides[0] // 4 if axes == 1 else 0
    if lowest >= room[0] if axes == 1 else all(free <= side for free, side in zip(room, sides, strict=True)):
        raise InputError(
            f"objective.distillation finds no shifted window of {shape} below encoding.max_position={max_position}: "
            "raise it"
        )
    # Where starts may lie, as boxes that do not overlap: in box i, axis i is the first to leave the origin grid.
    if axes == 1:
        lows, highs = np.array([[lowest]]), np.array([room])
    else:
        near = np.minimum(sides, room)
        lows = np.diag(near)
        highs = np.where(np.tri(axes, k=-1, dtype=bool), near, np.array(room))
    sizes = np.prod(highs - lows, axis=1, dtype=np.float64)
    edges = np.cumsum(sizes)[:-1] / sizes.sum()

    bits = jax.random.bits(key, (batch, 1 + axes + ROUNDS), jnp.uint32)
    box_B = (_unit(bits[:, :1]) >= edges).sum(axis=1)
    low_BA, high_BA = jnp.asarray(lows, jnp.int32)[box_B], jnp.asarray(highs, jnp.int32)[box_B]
    start_BA = low_BA + _below(bits[:, 1 : 1 + axes], high_BA - low_BA)
    indices_BM = permute_with(bits[:, None, 1 + axes :], jnp.arange(offsets), size)
    return Distillation(indices_BM, _unravel(indices_BM, shape) * unit + start_BA[:, None])


def _room(shape: tuple[int, ...], max_position: int, unit: int) -> tuple[int, ...]:
    """Starts along each axis that keep the grid in range."""
    if (max(shape) - 1) * unit >= max_position:
        raise InputError(
            f"a window of {max(shape)} does not fit below encoding.max_position={max_position // unit}: raise it or "
            "shorten the window"
        )
    return tuple(max_position - (side - 1) * unit for side in shape)


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
    """Orders pairs of positions as Euclidean distance does; exact: with LIMIT positions the squares fit int32."""
    apart = jnp.abs(first - second)
    return apart[..., 0] if apart.shape[-1] == 1 else jnp.square(apart).sum(axis=-1)


def _below(bits: jax.Array, limit: jax.Array | np.ndarray | int) -> jax.Array:
    """Random words uint32[...] -> int32[...] in [0, limit); 0 where the limit is below 1."""
    return (bits % jnp.maximum(limit, 1).astype(jnp.uint32)).astype(jnp.int32)


def _few(bits: jax.Array, limit: jax.Array | int) -> jax.Array:
    """As `_below` for limits far below 2**16, without a division; 0 where the limit is 0."""
    return ((bits >> 16) * jnp.asarray(limit).astype(jnp.uint32) >> 16).astype(jnp.int32)


def _unit(bits: jax.Array) -> jax.Array:
    """Random words uint32[...] -> float32[...] in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _first_distinct(values_BN: jax.Array, pivots_B: jax.Array, count: int) -> jax.Array:
    """The first `count` values of each row that are not -1, not the pivot and not seen before."""
    same_BNN = values_BN[:, :, None] == values_BN[:, None, :]
    seen_BN = jnp.tril(same_BNN, k=-1).any(axis=2)
    keep_BN = ~seen_BN & (values_BN >= 0) & (values_BN != pivots_B[:, None])
    rank_BN = jnp.where(keep_BN, jnp.cumsum(keep_BN, axis=1) - 1, count)
    return jnp.where(rank_BN[:, None] == jnp.arange(count)[:, None], values_BN[:, None], 0).sum(axis=2, dtype=jnp.int32)


def _box_side(candidates: int, max_position: int, window: int, axes: int) -> int:
    """Side of the box that distributional candidates come from: room for five times as many, at least the window."""
    return min(max_position, max(window, int((5 * candidates) ** (1 / axes) + 1e-9)))


def _box_start(
    bits: jax.Array, pivots_BA: jax.Array, wide_B1: jax.Array, *, max_position: int, around_pivot: bool, past_only: bool
) -> jax.Array:
    """Lowest corners int32[B, A] of boxes of that side: anywhere in range, or around (or just before) the pivot."""
    last_BA = (pivots_BA if past_only else max_position) - wide_B1
    if not around_pivot:
        return _below(bits, last_BA + 1)
    return last_BA if past_only else jnp.clip(pivots_BA - wide_B1 // 2, 0, last_BA)


def _hard(
    seeds_BC: jax.Array, pivots_BA: jax.Array, compared: jax.Array, *, max_position: int, base: int, past_only: bool
) -> jax.Array:
    """Flat positions int32[B, C] that look like the pivot's digits, -1 where no farther than all of `compared` are."""
    apart = _distance(compared, pivots_BA[:, None])
    nearest_B1 = jnp.where(apart == 0, 2**31 - 1, apart).min(axis=1, keepdims=True)  # the pivot is no candidate
    edited_BCA, done_BC = _edit(seeds_BC, pivots_BA, max_position, base)
    keep_BC = done_BC & (_distance(edited_BCA, pivots_BA[:, None]) > nearest_B1)
    if past_only:
        keep_BC &= edited_BCA[..., 0] < pivots_BA
    return jnp.where(keep_BC, _ravel(edited_BCA, max_position), -1)


def _edit(seeds_BC: jax.Array, pivots_BA: jax.Array, max_position: int, base: int) -> tuple[jax.Array, jax.Array]:
    """Applies 1 to 3 random digit edits to copies of each pivot: (int32[B, C, A], whether all edits were done).

    Edits of one axis at a time that leave the range or give the pivot back are tried again. A candidate's random words
    are a mixed counter that starts at its seed.
    """
    (batch, count), axes = seeds_BC.shape, pivots_BA.shape[1]
    places = count_digits(max_position, base)
    powers = np.array([base**place for place in range(places)])
    seeds_C = seeds_BC.reshape(-1)
    wanted_C = 1 + _few(mix(seeds_C), 3)
    # Digits as [A, N, C], units first: with the candidates last, every edit is a few selects of whole vectors.
    pivot_ANC = to_digits(jnp.repeat(pivots_BA, count, axis=0), base=base, digits=places)
    pivot_ANC = pivot_ANC.reshape(-1, axes, places).transpose(1, 2, 0)[:, ::-1]

    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        tries, now_ANC, done_C = state
        counter = 1 + tries * EDIT_WORDS + jnp.arange(EDIT_WORDS)
        bits = mix(seeds_C + counter.astype(jnp.uint32)[:, None] * jnp.uint32(WEYL))
        chosen_A1C = jnp.arange(axes)[:, None, None] == _few(bits[0], axes)
        edited_NC, allowed_C = _edit_digits(bits[1:], jnp.where(chosen_A1C, now_ANC, 0).sum(axis=0, dtype=jnp.int32), base)
        # The sum in floating point tells numbers that do not fit int32.
        allowed_C &= (edited_NC * powers[:, None].astype(np.float32)).sum(axis=0) < 1.5 * LIMIT
        allowed_C &= (edited_NC * powers[:, None].astype(np.int32)).sum(axis=0) < max_position
        next_ANC = jnp.where(chosen_A1C, edited_NC, now_ANC)
        allowed_C &= (next_ANC != pivot_ANC).any(axis=(0, 1)) & (done_C < wanted_C)
        return tries + 1, jnp.where(allowed_C, next_ANC, now_ANC).astype(jnp.int32), done_C + allowed_C

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[2] < wanted_C).any() & (state[0] < HARD_TRIES)

    start = (jnp.int32(0), pivot_ANC, jnp.zeros(batch * count, jnp.int32))
    _, last_ANC, done_C = jax.lax.while_loop(unfinished, body, start)
    edited_AC = (last_ANC * powers[:, None].astype(np.int32)).sum(axis=1)
    return edited_AC.T.reshape(batch, count, axes), (done_C == wanted_C).reshape(batch, count)


def _edit_digits(bits: jax.Array, digits_NC: jax.Array, base: int) -> tuple[jax.Array, jax.Array]:
    """Tries one random edit of each number, written without leading zeros: (result, whether it is allowed).

    `bits` is uint32[EDIT_WORDS - 1, C] of randomness. The four edits are equally likely: insert a digit, delete one,
    swap two different ones, substitute one; none leaves a leading zero. Of a few draws of the places and the digit
    the first that changes something is taken, so that swaps and substitutions come about as often as the others.
    """
    places = len(digits_NC)
    place_N1 = jnp.arange(places)[:, None]
    kind_C, bits = _few(bits[0], 4), bits[1:].reshape(4, EDIT_TRIES, -1)
    insert, delete, swap = kind_C == 0, kind_C == 1, kind_C == 2
    length_C = jnp.where(digits_NC > 0, place_N1 + 1, 1).max(axis=0)
    leading = length_C - 1

    def digit(place: jax.Array) -> jax.Array:
        return jnp.where(place[..., None, :] == place_N1, digits_NC, 0).sum(axis=-2, dtype=jnp.int32)

    # An inserted digit may also stand before all others; the leading one is not deleted where a zero follows it.
    one = _few(bits[0], length_C + insert - (delete & (digit(leading - 1) == 0)))
    other = _few(bits[1], leading)
    other = other + (other >= one)
    first = insert & (one == length_C)
    new = first + _few(bits[2], base - first)
    digit_one, digit_other = digit(one), digit(other)
    leads = (one == leading) & (digit_other == 0) | (other == leading) & (digit_one == 0)
    can_swap = (length_C > 1) & (digit_one != digit_other) & ~leads
    can_substitute = (new != digit_one) & ~((one == leading) & (new == 0))
    allowed = jnp.where(swap, can_swap, can_substitute)
    allowed = jnp.where(insert, length_C < places, jnp.where(delete, length_C > 1, allowed))

    taken = one[-1], other[-1], new[-1], digit_one[-1], digit_other[-1]
    for at in reversed(range(EDIT_TRIES - 1)):
        drawn = one[at], other[at], new[at], digit_one[at], digit_other[at]
        taken = tuple(jnp.where(allowed[at], *pair) for pair in zip(drawn, taken, strict=True))
    one, other, new, digit_one, digit_other = taken
    zero_1C = jnp.zeros_like(digits_NC[:1])
    raised, lowered = jnp.concatenate([zero_1C, digits_NC[:-1]]), jnp.concatenate([digits_NC[1:], zero_1C])
    result = jnp.where(swap & (place_N1 == other), digit_one, digits_NC)
    result = jnp.where(insert & (place_N1 > one), raised, jnp.where(delete & (place_N1 > one), lowered, result))
    at_place = jnp.where(delete, lowered, jnp.where(swap, digit_other, new))
    return jnp.where(place_N1 == one, at_place, result), allowed.any(axis=0)
