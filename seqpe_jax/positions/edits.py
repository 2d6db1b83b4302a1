"""Random edits of digits: numbers that look like another one, wherever they lie."""

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.positions.counting import count_digits
from seqpe_jax.positions.digits import to_digits
from seqpe_jax.positions.permutation import MAX_PERMUTATION_SIZE, mix_bits

HARD_TRIES = 64  # rounds of digit edits; nearly all candidates are done after a dozen
EDIT_TRIES = 4  # draws of one swap or substitution
EDIT_WORDS = 2 + 4 * EDIT_TRIES  # random words of a round of edits
WEYL = 0x9E3779B9  # 2**32 over the golden ratio: the step between the counters of a word stream


def random_digit_edits(
    seeds_BC: jax.Array, anchors_BA: jax.Array, max_position: int, base: int
) -> tuple[jax.Array, jax.Array]:
    """Applies 1 to 3 random digit edits to copies of each pivot: (int32[B, C, A], whether all edits were done).

    Edits of one axis at a time that leave the range or give the pivot back are tried again. A candidate's random words
    are a mixed counter that starts at its seed.
    """
    (batch, count), axes = seeds_BC.shape, anchors_BA.shape[1]
    places = count_digits(max_position, base)
    powers = np.array([base**place for place in range(places)])
    seeds_C = seeds_BC.reshape(-1)
    wanted_C = 1 + random_below_small(mix_bits(seeds_C), 3)
    # Digits as [A, N, C], units first: with the candidates last, every edit is a few selects of whole vectors.
    anchor_ANC = to_digits(jnp.repeat(anchors_BA, count, axis=0), base=base, digits=places)
    anchor_ANC = anchor_ANC.reshape(-1, axes, places).transpose(1, 2, 0)[:, ::-1]

    def body(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        tries, now_ANC, done_C = state
        counter = 1 + tries * EDIT_WORDS + jnp.arange(EDIT_WORDS)
        bits = mix_bits(seeds_C + counter.astype(jnp.uint32)[:, None] * jnp.uint32(WEYL))
        chosen_A1C = jnp.arange(axes)[:, None, None] == random_below_small(bits[0], axes)
        edited_NC, allowed_C = edit_once(bits[1:], jnp.where(chosen_A1C, now_ANC, 0).sum(axis=0, dtype=jnp.int32), base)
        # The sum in floating point tells numbers that do not fit int32.
        allowed_C &= (edited_NC * powers[:, None].astype(np.float32)).sum(axis=0) < 1.5 * MAX_PERMUTATION_SIZE
        allowed_C &= (edited_NC * powers[:, None].astype(np.int32)).sum(axis=0) < max_position
        next_ANC = jnp.where(chosen_A1C, edited_NC, now_ANC)
        allowed_C &= (next_ANC != anchor_ANC).any(axis=(0, 1)) & (done_C < wanted_C)
        return tries + 1, jnp.where(allowed_C, next_ANC, now_ANC).astype(jnp.int32), done_C + allowed_C

    def unfinished(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[2] < wanted_C).any() & (state[0] < HARD_TRIES)

    start = (jnp.int32(0), anchor_ANC, jnp.zeros(batch * count, jnp.int32))
    _, last_ANC, done_C = jax.lax.while_loop(unfinished, body, start)
    edited_AC = (last_ANC * powers[:, None].astype(np.int32)).sum(axis=1)
    return edited_AC.T.reshape(batch, count, axes), (done_C == wanted_C).reshape(batch, count)


def edit_once(bits: jax.Array, digits_NC: jax.Array, base: int) -> tuple[jax.Array, jax.Array]:
    """Tries one random edit of each number, written without leading zeros: (result, whether it is allowed).

    `bits` is uint32[EDIT_WORDS - 1, C] of randomness. The four edits are equally likely: insert a digit, delete one,
    swap two different ones, substitute one; none leaves a leading zero. Of a few draws of the places and the digit
    the first that changes something is taken, so that swaps and substitutions come about as often as the others.
    """
    places = len(digits_NC)
    place_N1 = jnp.arange(places)[:, None]
    kind_C, bits = random_below_small(bits[0], 4), bits[1:].reshape(4, EDIT_TRIES, -1)
    insert, delete, swap = kind_C == 0, kind_C == 1, kind_C == 2
    length_C = jnp.where(digits_NC > 0, place_N1 + 1, 1).max(axis=0)
    leading = length_C - 1

    def digit(place: jax.Array) -> jax.Array:
        return jnp.where(place[..., None, :] == place_N1, digits_NC, 0).sum(axis=-2, dtype=jnp.int32)

    # An inserted digit may also stand before all others; the leading one is not deleted where a zero follows it.
    one = random_below_small(bits[0], length_C + insert - (delete & (digit(leading - 1) == 0)))
    other = random_below_small(bits[1], leading)
    other = other + (other >= one)
    first = insert & (one == length_C)
    new = first + random_below_small(bits[2], base - first)
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


def random_below_small(bits: jax.Array, limit: jax.Array | int) -> jax.Array:
    """Random words uint32[...] -> int32[...] in [0, limit), 0 where that is 0; for limits far below 2**16, no division."""
    return ((bits >> 16) * jnp.asarray(limit).astype(jnp.uint32) >> 16).astype(jnp.int32)
