"""Digits: exact round trip in every base, padding, significant digits."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.positions.counting import count_digits, largest_position
from seqpe_jax.positions.digits import from_digits, significant_mask, to_digits


@pytest.mark.slow
def test_round_trip_in_every_base():
    for base in range(2, 37):
        check_round_trip(base)


def check_round_trip(base):
    digits = count_digits(5000, base)
    assert largest_position(digits, base) >= 4999 > largest_position(digits - 1, base)
    positions = jnp.asarray(np.random.default_rng(base).integers(0, 5000, (64, 3)), jnp.int32)
    written = to_digits(positions, base=base, digits=digits)
    assert written.shape == (64, 3 * digits) and written.dtype == jnp.int32
    assert int(written.max()) < base and int(written.min()) >= 0
    np.testing.assert_array_equal(from_digits(written, base=base, axes=3), positions)


def test_digits_equal_python_formatting():
    positions = [0, 7, 10, 99, 123, 40506, 99999]
    written = to_digits(jnp.array(positions)[:, None], base=10, digits=5)
    assert [list(map(int, row)) for row in written] == [[int(c) for c in f"{p:05d}"] for p in positions]
    right = to_digits(jnp.array(positions)[:, None], base=10, digits=5, padding="right")
    assert [list(map(int, row)) for row in right] == [[int(c) for c in f"{p:<5d}".replace(" ", "0")] for p in positions]


def test_coordinates_follow_each_other():
    np.testing.assert_array_equal(to_digits(jnp.array([[2, 3]]), base=10, digits=2), [[0, 2, 0, 3]])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_significant_digits(padding):
    positions = [0, 7, 10, 99, 123, 40506]
    significant = significant_mask(jnp.array(positions)[:, None], base=10, digits=5, padding=padding)
    text = [f"{p:>5d}" if padding == "left" else f"{p:<5d}" for p in positions]
    assert [list(map(bool, row)) for row in significant] == [[c != " " for c in row] for row in text]


def test_digits_beyond_int32_are_zero():
    written = to_digits(jnp.array([[2**31 - 2]]), base=10, digits=12)
    assert "".join(str(int(d)) for d in written[0]) == f"{2**31 - 2:012d}"
