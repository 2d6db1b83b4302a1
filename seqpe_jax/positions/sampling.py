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
from seqpe_jax.positions.edits import random_digit_edits
from seqpe_jax.positions.permutation import MAX_PERMUTATION_SIZE, ROUNDS, permute, permute_with_keys


class ContrastivePositions(NamedTuple):
    """Pivots int32[B, A], candidates int32[B, C, A], and the index of the nearest one int32[B]."""

    anchors_BA: jax.Array
    candidates_BCA: jax.Array
    labels_B: jax.Array


class DistillationPositions(NamedTuple):
    """Flat indices of M offsets in the origin grid int32[B, M], and the same offsets far away int32[B, M, A]."""

    indices_BM: jax.Array
    positions_BMA: jax.Array


def random_offsets(
    key: jax.Array,
    *,
    sets: int,
    shape: tuple[int, ...],
    max_position: int,
    position_resolution: int = 1,
    num_start_positions: int = 0,
    subset_key: jax.Array | None = None,
) -> jax.Array:
    """Returns starts int32[P, A] of grids anywhere in range.

    Args:
      sets: P; shape: places along each axis; max_position: coordinates lie below; position_resolution: from one place to the next.
      num_start_positions: only a fixed subset of that many starts, chosen by subset_key; 0 = all.

    Raises:
      InputError: the grid does not fit into the range.
    """
    free_range = _free_range(shape, max_position, position_resolution)
    if not num_start_positions:
        return _below(jax.random.bits(key, (sets, len(shape)), jnp.uint32), np.array(free_range))
    total = math.prod(free_range)
    if total > MAX_PERMUTATION_SIZE:
        raise InputError(f"objective.shift.starts: {total} starts are too many to choose a subset of; set it to 0")
    if subset_key is None:
        raise InputError(f"objective.shift.starts={num_start_positions} needs a key that fixes the subset")
    chosen = _below(jax.random.bits(key, (sets,), jnp.uint32), min(num_start_positions, total))
    return _unravel(permute(subset_key, chosen, total), free_range)


def pose_skip(
    key: jax.Array,
    *,
    sets: int,
    shape: tuple[int, ...],
    max_position: int,
    num_chunks: int,
    range: int,
    position_resolution: int = 1,
) -> jax.Array:
    """Returns positions int32[P, L, A] of windows cut into chunks with random gaps between (arXiv 2309.10400).

    The first chunk starts at 0; positions rise strictly and stay below `range`. With more axes each is cut on its own.
    Within a chunk, places stand `position_resolution` apart.

    Raises:
      InputError: range is smaller than the window or larger than max_position.
    """
    _free_range(shape, range, position_resolution)
    if range > max_position:
        raise InputError(f"objective.skip.range={range} is beyond encoding.max_position={max_position}")

    bits = jax.random.bits(key, (len(shape), sets, ROUNDS + num_chunks), jnp.uint32)

    def axis(bits: jax.Array, side: int) -> jax.Array:
        parts = min(num_chunks, side)
        cuts = (
            1 + permute_with_keys(bits[:, None, :ROUNDS], jnp.arange(parts - 1), side - 1) if parts > 1 else bits[:, :0]
        )
        gaps = jnp.sort(_below(bits[:, ROUNDS : ROUNDS + parts - 1], range - (side - 1) * position_resolution), axis=1)
        gaps = jnp.pad(gaps, ((0, 0), (1, 0)))
        places = jnp.arange(side)
        chunk_PL = (places[:, None] >= cuts[:, None]).sum(axis=2)
        return places * position_resolution + jnp.take_along_axis(gaps, chunk_PL, axis=1)

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


def crop_boxes(key: jax.Array, *, sets: int, axes: int, smallest: float) -> jax.Array:
    """Returns parts of images or clips, float32[P, A, 2]: (first, length) along each axis, as shares of the side.

    Height and width of a part are the same share of the image's, whose logarithm is uniform from `smallest` to 1; of
    clips, whose first axis is time, a part has all frames.
    """
    uniform = _uniform(jax.random.bits(key, (sets, 3), jnp.uint32))
    length_P1 = smallest ** uniform[:, :1]
    first_P2 = (1 - length_P1) * uniform[:, 1:]
    found = jnp.stack([first_P2, jnp.broadcast_to(length_P1, first_P2.shape)], axis=-1)
    whole = jnp.broadcast_to(jnp.array([0.0, 1.0]), (sets, axes - 2, 2))
    return jnp.concatenate([whole, found], axis=1)


def contrastive_positions(
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
    around_anchor: bool = False,
    causal_only: bool = False,
) -> ContrastivePositions:
    """Returns pivots, each with distinct candidates other than itself, and the nearest candidate's index.

    Every position is a pivot once per epoch, in an order of its own. Each pivot's list begins with special candidates
    (hard or distributional, as `mixture` says), then uniform draws fill it up.

    Args:
      key: the run's key for this purpose; step: int32, how many batches came before.
      batch, candidates: B and C; max_position: coordinates lie below; base: of the digits that hard candidates edit.
      mixture: probabilities of random, hard and distributional candidates.
      hard_fraction: hard candidates as a share of C, made by 1 to 3 digit edits and kept where farther than the nearest
        uniform draw; distributional ones all lie in one box of side max(window, (5 C)^(1/A)).
      around_anchor: that box lies around the pivot, not anywhere.
      causal_only: one axis only; all candidates lie before the pivot, and pivots start at position C.

    Raises:
      InputError: there are too few or too many positions, or a setting is out of its range.
    """
    _check_pairs(candidates, max_position, axes, mixture, hard_fraction, causal_only)
    total, first = max_position**axes, candidates if causal_only else 0  # lower pivots have too little past
    extent = (max_position,) * axes
    spare = 0 if causal_only else 1  # one draw more where the pivot itself may be drawn
    edited = int(candidates * hard_fraction) if mixture[1] > 0 else 0
    box = _box_side(candidates, max_position, window, axes)

    anchors_B, bits = _anchors(
        key, step, batch=batch, first=first, passes=total - first, words=2 * ROUNDS + 1 + axes + edited
    )
    anchors_BA = _unravel(anchors_B, extent)
    ends = 2 * ROUNDS, 2 * ROUNDS + 1, 2 * ROUNDS + 1 + axes  # of the words: permutations, kind, box, edits
    draw_bits, kind_bits, start_bits, edit_bits = jnp.split(bits, ends, axis=1)

    # Distinct uniform draws from the whole range, and distinct places in a box: one permutation serves both.
    uniform = candidates + spare
    placed = min(candidates + spare * around_anchor, box**axes) if mixture[2] > 0 else 0
    wide_B = jnp.minimum(box, anchors_B) if causal_only else jnp.full(batch, box)
    below_B2 = jnp.stack([anchors_B if causal_only else jnp.full(batch, total), wide_B**axes], axis=1)
    source = np.repeat([0, 1], [uniform, placed])
    index = np.concatenate([np.arange(uniform), np.arange(placed)])
    draws = permute_with_keys(draw_bits.reshape(batch, 2, ROUNDS)[:, source], index, below_B2[:, source])
    uniform_BC, places_BC = draws[:, :uniform], draws[:, uniform:]

    specials = [jnp.full((batch, candidates + 1), -1)] * 3
    if edited:
        compared = _unravel(uniform_BC[:, : candidates + 1 - edited], extent)
        specials[1] = _hard_candidates(
            edit_bits, anchors_BA, compared, max_position=max_position, base=base, causal_only=causal_only
        )
    if placed:
        start_BA = _box_start(
            start_bits,
            anchors_BA,
            wide_B[:, None],
            max_position=max_position,
            around_anchor=around_anchor,
            causal_only=causal_only,
        )
        specials[2] = _ravel(start_BA[:, None] + _unravel(places_BC, (box,) * axes), max_position)
    special_BC = _of_kind(kind_bits, specials, mixture)
    chosen_BC = _first_distinct(jnp.concatenate([special_BC, uniform_BC], axis=1), anchors_B, candidates)
    candidates_BCA = _unravel(chosen_BC, extent)
    labels_B = jnp.argmin(_distance(candidates_BCA, anchors_BA[:, None]), axis=1).astype(jnp.int32)
    return ContrastivePositions(anchors_BA, candidates_BCA, labels_B)


def _of_kind(bits: jax.Array, specials: list[jax.Array], mixture: tuple[float, ...]) -> jax.Array:
    """The special candidates int32[B, C + 1] of the kind that is drawn for each pivot; -1 where it has fewer."""
    edges = np.cumsum(mixture[:2]) / sum(mixture)
    kind_B1 = (_uniform(bits) >= edges).sum(axis=1, keepdims=True)
    width = specials[0].shape[1]
    none, hard, near = (jnp.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=-1) for one in specials)
    return jnp.where(kind_B1 == 1, hard, jnp.where(kind_B1 == 2, near, none))


def _check_pairs(
    candidates: int,
    max_position: int,
    axes: int,
    mixture: tuple[float, float, float],
    hard_fraction: float,
    causal_only: bool,
) -> None:
    """Refuses settings that no candidates can be drawn with. Raises: InputError."""
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
    if total > MAX_PERMUTATION_SIZE:
        raise InputError(
            f"encoding.max_position={max_position} on {axes} axes gives more than {MAX_PERMUTATION_SIZE} positions"
        )
    if causal_only and axes != 1:
        raise InputError("objective.contrastive.causal_only needs one axis: there is no before on a grid")
    first = candidates if causal_only else 0
    if total - first < (1 if causal_only else candidates + 1):
        raise InputError(
            f"objective.contrastive.candidates={candidates} is too many for the {total} positions of "
            f"encoding.max_position={max_position}: lower it"
        )


def _anchors(
    key: jax.Array, step: jax.Array, *, batch: int, first: int, passes: int, words: int
) -> tuple[jax.Array, jax.Array]:
    """Flat pivots int32[B], each position from `first` on once per epoch, and random words uint32[B, words] of the step.

    Even streams belong to epochs, odd ones to steps. A batch may end one epoch and begin others.
    """
    step = jnp.asarray(step, jnp.int32)
    count_B = step * batch + jnp.arange(batch)
    epoch = count_B[0] // passes
    epochs = epoch + jnp.arange(2 + (batch - 2) // passes)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.append(2 * epochs, 2 * step + 1))
    bits = jax.vmap(lambda key: jax.random.bits(key, (batch, words), jnp.uint32))(keys)
    orders, bits = bits[:-1, 0, :ROUNDS], bits[-1]
    return first + permute_with_keys(orders[count_B // passes - epoch], count_B % passes, passes), bits


def distillation_positions(
    key: jax.Array, *, batch: int, offsets: int, shape: tuple[int, ...], max_position: int, position_resolution: int = 1
) -> DistillationPositions:
    """Returns M offsets into the grid at the origin, and the same offsets into a grid that starts out of range.

    Starts are uniform: on one axis in [L / 4, max_position - L], on more axes wherever the grid leaves the origin grid.
    Places stand `position_resolution` apart; starts may lie between them.

    Raises:
      InputError: there is no such start, or there are fewer than M offsets.
    """
    free_range, size = _free_range(shape, max_position, position_resolution), math.prod(shape)
    sides = [side * position_resolution for side in shape]
    if offsets > size:
        raise InputError(f"objective.distillation.offsets={offsets} is more than the {size} positions of a window")
    axes = len(shape)
    lowest = sides[0] // 4 if axes == 1 else 0
    if (
        lowest >= free_range[0]
        if axes == 1
        else all(free <= side for free, side in zip(free_range, sides, strict=True))
    ):
        raise InputError(
            f"objective.distillation finds no shifted window of {shape} below encoding.max_position={max_position}: "
            "raise it"
        )
    # Where starts may lie, as boxes that do not overlap: in box i, axis i is the first to leave the origin grid.
    if axes == 1:
        lows, highs = np.array([[lowest]]), np.array([free_range])
    else:
        near = np.minimum(sides, free_range)
        lows = np.diag(near)
        highs = np.where(np.tri(axes, k=-1, dtype=bool), near, np.array(free_range))
    sizes = np.prod(highs - lows, axis=1, dtype=np.float64)
    edges = np.cumsum(sizes)[:-1] / sizes.sum()

    bits = jax.random.bits(key, (batch, 1 + axes + ROUNDS), jnp.uint32)
    box_B = (_uniform(bits[:, :1]) >= edges).sum(axis=1)
    low_BA, high_BA = jnp.asarray(lows, jnp.int32)[box_B], jnp.asarray(highs, jnp.int32)[box_B]
    start_BA = low_BA + _below(bits[:, 1 : 1 + axes], high_BA - low_BA)
    indices_BM = permute_with_keys(bits[:, None, 1 + axes :], jnp.arange(offsets), size)
    return DistillationPositions(indices_BM, _unravel(indices_BM, shape) * position_resolution + start_BA[:, None])


def _free_range(shape: tuple[int, ...], max_position: int, position_resolution: int) -> tuple[int, ...]:
    """Starts along each axis that keep the grid in range."""
    if (max(shape) - 1) * position_resolution >= max_position:
        raise InputError(
            f"a window of {max(shape)} does not fit below encoding.max_position={max_position // position_resolution}: raise it or "
            "shorten the window"
        )
    return tuple(max_position - (side - 1) * position_resolution for side in shape)


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


def _uniform(bits: jax.Array) -> jax.Array:
    """Random words uint32[...] -> float32[...] in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _first_distinct(values_BN: jax.Array, anchors_B: jax.Array, count: int) -> jax.Array:
    """The first `count` values of each row that are not -1, not the pivot and not seen before."""
    same_BNN = values_BN[:, :, None] == values_BN[:, None, :]
    seen_BN = jnp.tril(same_BNN, k=-1).any(axis=2)
    keep_BN = ~seen_BN & (values_BN >= 0) & (values_BN != anchors_B[:, None])
    rank_BN = jnp.where(keep_BN, jnp.cumsum(keep_BN, axis=1) - 1, count)
    return jnp.where(rank_BN[:, None] == jnp.arange(count)[:, None], values_BN[:, None], 0).sum(axis=2, dtype=jnp.int32)


def _box_side(candidates: int, max_position: int, window: int, axes: int) -> int:
    """Side of the box that distributional candidates come from: room for five times as many, at least the window."""
    return min(max_position, max(window, int((5 * candidates) ** (1 / axes) + 1e-9)))


def _box_start(
    bits: jax.Array,
    anchors_BA: jax.Array,
    wide_B1: jax.Array,
    *,
    max_position: int,
    around_anchor: bool,
    causal_only: bool,
) -> jax.Array:
    """Lowest corners int32[B, A] of boxes of that side: anywhere in range, or around (or just before) the pivot."""
    last_BA = (anchors_BA if causal_only else max_position) - wide_B1
    if not around_anchor:
        return _below(bits, last_BA + 1)
    return last_BA if causal_only else jnp.clip(anchors_BA - wide_B1 // 2, 0, last_BA)


def _hard_candidates(
    seeds_BC: jax.Array, anchors_BA: jax.Array, compared: jax.Array, *, max_position: int, base: int, causal_only: bool
) -> jax.Array:
    """Flat positions int32[B, C] that look like the pivot's digits, -1 where no farther than all of `compared` are."""
    apart = _distance(compared, anchors_BA[:, None])
    nearest_B1 = jnp.where(apart == 0, 2**31 - 1, apart).min(axis=1, keepdims=True)  # the pivot is no candidate
    edited_BCA, done_BC = random_digit_edits(seeds_BC, anchors_BA, max_position, base)
    keep_BC = done_BC & (_distance(edited_BCA, anchors_BA[:, None]) > nearest_B1)
    if causal_only:
        keep_BC &= edited_BCA[..., 0] < anchors_BA
    return jnp.where(keep_BC, _ravel(edited_BCA, max_position), -1)
