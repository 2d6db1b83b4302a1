"""Random anchors and candidates of contrastive learning, with the nearest candidate as the positive one.

Rules: arXiv 2506.13277 section 3 and the released sampler without its defects: coordinates are edited one by one and stay
inside the range, all kinds of candidates are used, and every number of candidates works.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.errors import InputError
from seqpe_jax.positions.counting import count_digits
from seqpe_jax.positions.digits import to_digits
from seqpe_jax.positions.sampling import (
    MAX_PERMUTATION_SIZE,
    ROUNDS,
    integers_below,
    mix_bits,
    permute_with_keys,
    uniform_floats,
    unravel,
)

MAX_EDIT_ROUNDS = 64  # nearly all candidates are done after a dozen
EDIT_TRIES = 4  # tries of one edit
EDIT_WORDS = 2 + 4 * EDIT_TRIES  # random words of a round of edits
WEYL = 0x9E3779B9  # 2**32 over the golden ratio: increment of the counters of a word stream


class ContrastivePositions(NamedTuple):
    """A batch of contrastive learning.

    Attributes:
      anchors_BA: int32.
      candidates_BCA: int32, distinct positions other than the anchor.
      labels_B: int32, index of the nearest candidate.
    """

    anchors_BA: jax.Array
    candidates_BCA: jax.Array
    labels_B: jax.Array


def sample_contrastive_positions(
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
    """Returns anchors, each with distinct candidates other than itself, and the index of the nearest candidate.

    Every position is an anchor once per epoch, in a new random order. A list of candidates begins with special ones, hard or
    distributional, if the mixture selects them for the anchor, and is filled up with uniform ones.

    Args:
      key: PRNG key of the run for contrastive sampling.
      step: int32[], number of batches before this one.
      batch: B.
      candidates: C.
      max_position: coordinates are below.
      axes: A.
      base: base of the digits that hard candidates edit.
      mixture: probabilities of (random, hard, distributional) candidates for an anchor.
      hard_fraction: hard candidates as a fraction of C: 1 to 3 random digit edits of the anchor, used if farther from it
        than the nearest uniform candidate.
      window: distributional candidates lie in one box of side max(window, (5 C)^(1/A)).
      around_anchor: center the box on the anchor instead of anywhere.
      causal_only: one axis only; all candidates are before the anchor, and anchors start at position C.

    Raises:
      InputError: too few or too many positions, or a setting out of its range.
    """
    _check_settings(candidates, max_position, axes, mixture, hard_fraction, causal_only)
    num_positions = max_position**axes
    first_anchor = candidates if causal_only else 0  # earlier ones have fewer than C positions before them
    num_hard = int(candidates * hard_fraction) if mixture[1] > 0 else 0
    num_words = (2 * ROUNDS, 1, axes, num_hard)  # for permutations, kind, box, edits
    anchors_B, bits = _anchors_and_bits(
        key, step, batch=batch, first=first_anchor, count=num_positions - first_anchor, num_words=sum(num_words)
    )
    permutation_bits, kind_bits, box_bits, edit_bits = jnp.split(bits, np.cumsum(num_words)[:-1], axis=1)
    anchors_BA = unravel(anchors_B, (max_position,) * axes)

    # Uniform candidates, and random indices within the box of distributional ones.
    box_side = _box_side(candidates, max_position, window, axes)
    limit_B, box_side_B = jnp.full(batch, num_positions), jnp.full(batch, box_side)
    if causal_only:
        limit_B, box_side_B = anchors_B, jnp.minimum(box_side, anchors_B)
    num_uniform = candidates + (not causal_only)  # one more where the anchor itself may be sampled
    num_in_box = 0
    if mixture[2] > 0:
        num_in_box = min(candidates + (around_anchor and not causal_only), box_side**axes)
    uniform_BC, in_box_BC = _distinct_integers(permutation_bits, (num_uniform, num_in_box), (limit_B, box_side_B**axes))

    hard_BC = distributional_BC = jnp.full((batch, 0), -1)
    if num_hard:
        hard_BC = _hard_candidates(
            edit_bits,
            anchors_BA,
            unravel(uniform_BC[:, : candidates + 1 - num_hard], (max_position,) * axes),
            max_position=max_position,
            base=base,
            causal_only=causal_only,
        )
    if num_in_box:
        start_BA = _box_start(
            box_bits,
            anchors_BA,
            box_side_B[:, None],
            max_position=max_position,
            around_anchor=around_anchor,
            causal_only=causal_only,
        )
        distributional_BC = _ravel(start_BA[:, None] + unravel(in_box_BC, (box_side,) * axes), max_position)
    special_BC = _select_kind(kind_bits, mixture, hard_BC, distributional_BC)
    chosen_BC = _first_distinct(jnp.concatenate([special_BC, uniform_BC], axis=1), anchors_B, candidates)
    candidates_BCA = unravel(chosen_BC, (max_position,) * axes)
    return ContrastivePositions(anchors_BA, candidates_BCA, _nearest(candidates_BCA, anchors_BA))


def _check_settings(
    candidates: int,
    max_position: int,
    axes: int,
    mixture: tuple[float, float, float],
    hard_fraction: float,
    causal_only: bool,
) -> None:
    """Raises InputError for settings with which no candidates can be sampled."""
    num_positions = max_position**axes
    if candidates < 1:
        raise InputError(f"objective.contrastive.candidates={candidates}: at least 1 is needed")
    if not 0 <= hard_fraction <= 1:
        raise InputError(f"objective.contrastive.hard_fraction={hard_fraction} is not a fraction from 0 to 1")
    if len(mixture) != 3 or min(mixture) < 0 or sum(mixture) <= 0:
        raise InputError(
            f"objective.contrastive.mixture={tuple(mixture)}: expected probabilities of random, hard and "
            "distributional candidates"
        )
    if num_positions > MAX_PERMUTATION_SIZE:
        raise InputError(
            f"encoding.max_position={max_position} on {axes} axes gives more than {MAX_PERMUTATION_SIZE} positions"
        )
    if causal_only and axes != 1:
        raise InputError("objective.contrastive.causal_only needs one axis: grids have no order")
    needed = candidates + 1
    if num_positions < needed:
        raise InputError(
            f"objective.contrastive.candidates={candidates} is too many for the {num_positions} positions of "
            f"encoding.max_position={max_position}: lower it"
        )


def _anchors_and_bits(
    key: jax.Array, step: jax.Array, *, batch: int, first: int, count: int, num_words: int
) -> tuple[jax.Array, jax.Array]:
    """Returns flat anchors int32[B], each of `count` positions from `first` on once per epoch, and random words of the step.

    Even PRNG streams belong to epochs, odd ones to steps. A batch may end one epoch and begin others.

    Returns:
      (int32[B], uint32[B, num_words]).
    """
    step = jnp.asarray(step, jnp.int32)
    index_B = step * batch + jnp.arange(batch)
    epoch = index_B[0] // count
    epochs = epoch + jnp.arange(2 + (batch - 2) // count)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.append(2 * epochs, 2 * step + 1))
    bits = jax.vmap(lambda key: jax.random.bits(key, (batch, num_words), jnp.uint32))(keys)
    epoch_keys, step_bits = bits[:-1, 0, :ROUNDS], bits[-1]
    return first + permute_with_keys(epoch_keys[index_B // count - epoch], index_B % count, count), step_bits


def _distinct_integers(
    bits: jax.Array, counts: tuple[int, int], limits: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns distinct random integers of two ranges for each row, int32[B, counts[0]] and int32[B, counts[1]].

    One permutation call serves both, since each adds to the compilation.

    Args:
      bits: uint32[B, 2 * ROUNDS].
      counts: numbers of integers.
      limits: int32[B], integers are below.
    """
    batch = len(bits)
    source = np.repeat([0, 1], counts)
    index = np.concatenate([np.arange(count) for count in counts])
    limit_B2 = jnp.stack(limits, axis=1)
    values = permute_with_keys(bits.reshape(batch, 2, ROUNDS)[:, source], index, limit_B2[:, source])
    return values[:, : counts[0]], values[:, counts[0] :]


def _hard_candidates(
    seeds_BC: jax.Array,
    anchors_BA: jax.Array,
    uniform_BCA: jax.Array,
    *,
    max_position: int,
    base: int,
    causal_only: bool,
) -> jax.Array:
    """Returns flat positions int32[B, C] whose digits look like the anchor's; -1 if no farther than the nearest uniform one."""
    distances = _distance(uniform_BCA, anchors_BA[:, None])
    nearest_B1 = jnp.where(distances == 0, 2**31 - 1, distances).min(axis=1, keepdims=True)  # 0: the anchor itself
    edited_BCA, done_BC = random_digit_edits(seeds_BC, anchors_BA, max_position, base)
    valid_BC = done_BC & (_distance(edited_BCA, anchors_BA[:, None]) > nearest_B1)
    if causal_only:
        valid_BC &= edited_BCA[..., 0] < anchors_BA
    return jnp.where(valid_BC, _ravel(edited_BCA, max_position), -1)


def _box_side(candidates: int, max_position: int, window: int, axes: int) -> int:
    """Returns the side of the box of distributional candidates: at least the window, with 5 C positions if possible."""
    return min(max_position, max(window, int((5 * candidates) ** (1 / axes) + 1e-9)))


def _box_start(
    bits: jax.Array,
    anchors_BA: jax.Array,
    box_side_B1: jax.Array,
    *,
    max_position: int,
    around_anchor: bool,
    causal_only: bool,
) -> jax.Array:
    """Returns lowest corners int32[B, A] of boxes anywhere in range, around the anchor, or just before it."""
    last_BA = (anchors_BA if causal_only else max_position) - box_side_B1
    if not around_anchor:
        return integers_below(bits, last_BA + 1)
    return last_BA if causal_only else jnp.clip(anchors_BA - box_side_B1 // 2, 0, last_BA)


def _select_kind(
    bits: jax.Array, mixture: tuple[float, ...], hard_BC: jax.Array, distributional_BC: jax.Array
) -> jax.Array:
    """Returns the special candidates of the kind sampled for each anchor, int32[B, C'], padded with -1."""
    edges = np.cumsum(mixture[:2]) / sum(mixture)
    kind_B1 = (uniform_floats(bits) >= edges).sum(axis=1, keepdims=True)
    width = max(hard_BC.shape[1], distributional_BC.shape[1])
    hard_BC, distributional_BC = (
        jnp.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=-1)
        for array in (hard_BC, distributional_BC)
    )
    return jnp.where(kind_B1 == 1, hard_BC, jnp.where(kind_B1 == 2, distributional_BC, -1))


def _first_distinct(values_BN: jax.Array, anchors_B: jax.Array, count: int) -> jax.Array:
    """Returns the first `count` values of each row that are neither -1 nor the anchor nor repeated, int32[B, count]."""
    equal_BNN = values_BN[:, :, None] == values_BN[:, None, :]
    repeated_BN = jnp.tril(equal_BNN, k=-1).any(axis=2)
    valid_BN = ~repeated_BN & (values_BN >= 0) & (values_BN != anchors_B[:, None])
    rank_BN = jnp.where(valid_BN, jnp.cumsum(valid_BN, axis=1) - 1, count)
    return jnp.where(rank_BN[:, None] == jnp.arange(count)[:, None], values_BN[:, None], 0).sum(axis=2, dtype=jnp.int32)


def _nearest(candidates_BCA: jax.Array, anchors_BA: jax.Array) -> jax.Array:
    """Returns the labels: index of the candidate nearest to the anchor, int32[B]."""
    return jnp.argmin(_distance(candidates_BCA, anchors_BA[:, None]), axis=1).astype(jnp.int32)


def _distance(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns int32[...] that sort pairs of positions as the Euclidean distance; squares of 2**30 positions fit int32."""
    difference = jnp.abs(first - second)
    return difference[..., 0] if difference.shape[-1] == 1 else jnp.square(difference).sum(axis=-1)


def _ravel(positions: jax.Array, side: int) -> jax.Array:
    """Returns flat indices int32[...] of positions int32[..., A] in a cube."""
    flat = positions[..., 0]
    for axis in range(1, positions.shape[-1]):
        flat = flat * side + positions[..., axis]
    return flat


def random_digit_edits(
    seeds_BC: jax.Array, anchors_BA: jax.Array, max_position: int, base: int
) -> tuple[jax.Array, jax.Array]:
    """Applies 1 to 3 random digit edits to C copies of each anchor, each to one coordinate.

    An edit that leaves the range or restores the anchor is tried again.

    Args:
      seeds_BC: uint32, seeds of the random words: hashes of a counter that starts at the seed.
      anchors_BA: int32.
      max_position: coordinates are below.
      base: base of the digits.

    Returns:
      (int32[B, C, A] edited positions, bool[B, C] all edits succeeded).
    """
    (batch, num_copies), axes = seeds_BC.shape, anchors_BA.shape[1]
    num_digits = count_digits(max_position, base)
    powers = np.array([base**exponent for exponent in range(num_digits)])
    seeds_C = seeds_BC.reshape(-1)
    wanted_C = 1 + small_integers_below(mix_bits(seeds_C), 3)
    # Digits [A, N, C], least significant first: with copies last, an edit is a few selects of long vectors.
    anchor_ANC = to_digits(jnp.repeat(anchors_BA, num_copies, axis=0), base=base, digits=num_digits)
    anchor_ANC = anchor_ANC.reshape(-1, axes, num_digits).transpose(1, 2, 0)[:, ::-1]

    def edit_round(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        round_, digits_ANC, done_C = state
        counter = 1 + round_ * EDIT_WORDS + jnp.arange(EDIT_WORDS)
        bits = mix_bits(seeds_C + counter.astype(jnp.uint32)[:, None] * jnp.uint32(WEYL))
        axis_A1C = jnp.arange(axes)[:, None, None] == small_integers_below(bits[0], axes)
        coordinate_NC = jnp.where(axis_A1C, digits_ANC, 0).sum(axis=0, dtype=jnp.int32)
        edited_NC, valid_C = edit_once(bits[1:], coordinate_NC, base)
        # The floating-point sum detects numbers beyond int32.
        valid_C &= (edited_NC * powers[:, None].astype(np.float32)).sum(axis=0) < 1.5 * MAX_PERMUTATION_SIZE
        valid_C &= (edited_NC * powers[:, None].astype(np.int32)).sum(axis=0) < max_position
        next_ANC = jnp.where(axis_A1C, edited_NC, digits_ANC)
        valid_C &= (next_ANC != anchor_ANC).any(axis=(0, 1)) & (done_C < wanted_C)
        return round_ + 1, jnp.where(valid_C, next_ANC, digits_ANC).astype(jnp.int32), done_C + valid_C

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        round_, _, done_C = state
        return (done_C < wanted_C).any() & (round_ < MAX_EDIT_ROUNDS)

    start = (jnp.int32(0), anchor_ANC, jnp.zeros(batch * num_copies, jnp.int32))
    _, digits_ANC, done_C = jax.lax.while_loop(unfinished, edit_round, start)
    edited_AC = (digits_ANC * powers[:, None].astype(np.int32)).sum(axis=1)
    return edited_AC.T.reshape(batch, num_copies, axes), (done_C == wanted_C).reshape(batch, num_copies)


def edit_once(bits: jax.Array, digits_NC: jax.Array, base: int) -> tuple[jax.Array, jax.Array]:
    """Applies one random edit to each number, written without leading zeros.

    The four edits are equally likely: insert a digit, delete one, swap two different ones, substitute one. None leaves a
    leading zero. Of `EDIT_TRIES` random choices of digits the first valid one is used, so that swaps and substitutions
    succeed as often as the others.

    Args:
      bits: uint32[EDIT_WORDS - 1, C].
      digits_NC: int32, least significant first.
      base: base of the digits.

    Returns:
      (int32[N, C] edited digits, bool[C] a valid choice was found).
    """
    num_digits = len(digits_NC)
    index_N1 = jnp.arange(num_digits)[:, None]
    kind_C, bits = small_integers_below(bits[0], 4), bits[1:].reshape(4, EDIT_TRIES, -1)
    insert, delete, swap = kind_C == 0, kind_C == 1, kind_C == 2
    length_C = jnp.where(digits_NC > 0, index_N1 + 1, 1).max(axis=0)
    leading = length_C - 1

    def digit_at(index: jax.Array) -> jax.Array:
        return jnp.where(index[..., None, :] == index_N1, digits_NC, 0).sum(axis=-2, dtype=jnp.int32)

    # A digit may also be inserted before all others; the leading digit is not deleted if a zero follows it.
    one = small_integers_below(bits[0], length_C + insert - (delete & (digit_at(leading - 1) == 0)))
    other = small_integers_below(bits[1], leading)
    other = other + (other >= one)
    is_first = insert & (one == length_C)
    new = is_first + small_integers_below(bits[2], base - is_first)
    digit_one, digit_other = digit_at(one), digit_at(other)
    swap_leads_with_zero = (one == leading) & (digit_other == 0) | (other == leading) & (digit_one == 0)
    can_swap = (length_C > 1) & (digit_one != digit_other) & ~swap_leads_with_zero
    can_substitute = (new != digit_one) & ~((one == leading) & (new == 0))
    valid = jnp.where(swap, can_swap, can_substitute)
    valid = jnp.where(insert, length_C < num_digits, jnp.where(delete, length_C > 1, valid))

    chosen = one[-1], other[-1], new[-1], digit_one[-1], digit_other[-1]
    for attempt in reversed(range(EDIT_TRIES - 1)):
        choice = one[attempt], other[attempt], new[attempt], digit_one[attempt], digit_other[attempt]
        chosen = tuple(jnp.where(valid[attempt], *pair) for pair in zip(choice, chosen, strict=True))
    one, other, new, digit_one, digit_other = chosen
    zero_1C = jnp.zeros_like(digits_NC[:1])
    shifted_up = jnp.concatenate([zero_1C, digits_NC[:-1]])
    shifted_down = jnp.concatenate([digits_NC[1:], zero_1C])
    result = jnp.where(swap & (index_N1 == other), digit_one, digits_NC)
    result = jnp.where(
        insert & (index_N1 > one), shifted_up, jnp.where(delete & (index_N1 > one), shifted_down, result)
    )
    at_one = jnp.where(delete, shifted_down, jnp.where(swap, digit_other, new))
    return jnp.where(index_N1 == one, at_one, result), valid.any(axis=0)


def small_integers_below(bits: jax.Array, limit: jax.Array | int) -> jax.Array:
    """Maps random words uint32[...] to int32[...] in [0, limit) without a division; 0 if the limit is 0.

    The limit is far below 2**16, so that the bias is small.
    """
    return ((bits >> 16) * jnp.asarray(limit).astype(jnp.uint32) >> 16).astype(jnp.int32)
