"""Positions of grids: integers, fixed-point numbers, interpolation onto the training range, and fine sampling."""

import zlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.positions import sampling
from seqpe_jax.positions.digits import from_digits, to_digits
from seqpe_jax.positions.grids import PositionGrid
from seqpe_jax.training.trainer import Trainer
from tests.tiny import ROOT

KEY = jax.random.PRNGKey(3)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_an_integer_grid_is_row_major(shape):
    np.testing.assert_array_equal(
        PositionGrid().positions(shape), np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), 1)
    )
    np.testing.assert_array_equal(PositionGrid(10).positions(shape), 10 * PositionGrid().positions(shape))
    rest = int(np.prod(shape[1:]))
    np.testing.assert_array_equal(
        PositionGrid(10).positions(shape, 1, 1), PositionGrid(10).positions(shape)[rest : 2 * rest]
    )


# Checksums of the sampled positions of six steps: older runs resume with them.
CHECKSUMS = {
    "stdlib_lm": [3894761951, 4144323016, 2308539396, 2444338775, 290396026, 3551406778],
    "digits_vit": [4284630782, 115145670, 1145072029, 2033619739, 1064773631, 2201904033],
}
FIELDS = {
    "stdlib_lm": {
        "encoding.max_position": 2560,
        "objective.skip.rate": 0.3,
        "objective.shift.sets": 4,
        "objective.shift.rate": 0.3,
    },
    "digits_vit": {
        "encoding.max_position": 100,
        "objective.shift.rate": 0.9,
        "objective.shift.sets": 1,
        "objective.zoom.rate": 0.0,
        "encoding.fraction_digits": 0,
        "encoding.resize": "extrapolate",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKSUMS)
def test_sampled_positions_are_those_of_older_versions(name):
    draw = jax.jit(Trainer.of(config.load(f"{ROOT}/configs/{name}.py", FIELDS[name])).train_loss.sample)
    for step, expected in enumerate(CHECKSUMS[name]):
        leaves = jax.tree.leaves(draw(KEY, step))
        assert zlib.crc32(b"".join(np.asarray(leaf).astype(np.int32).tobytes() for leaf in leaves)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, fields, carry",
    [
        ("stdlib_lm", {"encoding.base": 7}, 343),
        ("digits_vit", {"encoding.max_position": 20, "objective.zoom.rate": 0.0}, 100),
    ],
)
def test_shifted_windows_of_a_config_straddle_carries(name, fields, carry):
    """Multiples of the config's base, between first and last position of the grid as the encoder reads them."""
    fields |= {"objective.shift.rate": 1.0, "objective.shift.carries": 1.0, "objective.shift.sets": 16}
    draw = jax.jit(Trainer.of(config.load(f"{ROOT}/configs/{name}.py", fields)).train_loss.sample)
    windows = np.concatenate([np.asarray(draw(KEY, step).positions_PLA) for step in range(4)])
    assert (windows.min(axis=1) // carry < windows.max(axis=1) // carry).all()


@pytest.mark.slow
@pytest.mark.parametrize("unit, side", [(8, 4), (10, 4), (9, 5), (2, 14)])
def test_interpolated_positions_are_cell_centers(unit, side):
    position_grid = PositionGrid(unit, (side, side))
    for count in (1, side - 1, side, 2 * side, side * unit):
        found = np.asarray(position_grid.positions((count, 2)))[::2, 0]
        middles = [Fraction(2 * place + 1, 2 * count) * side * unit for place in range(count)]
        np.testing.assert_array_equal(found, [middle.numerator // middle.denominator for middle in middles])
        assert len(np.unique(found)) == count and 0 <= found.min() and found.max() < side * unit
        for rows in range(1, count + 1):
            parts = [found[first : first + rows] for first in range(count - rows + 1)]
            assert max(part[-1] - part[0] for part in parts) <= position_grid.spans((count, 2), rows)[0]
    np.testing.assert_array_equal(
        position_grid.positions((side, 1))[:, 0], np.arange(side) * unit + position_grid.first_position(0)
    )


@pytest.mark.parametrize("unit, length, count", [(1000, 512, 16384), (100, 1024, 65536), (10**6, 1000, 999_999 // 2)])
def test_large_interpolated_grids_are_exact(unit, length, count):
    """Their products exceed int32."""
    found = np.asarray(PositionGrid(unit, (length,)).positions((count,)))[:, 0]
    places = np.arange(count, dtype=np.int64)
    np.testing.assert_array_equal(found, (2 * places + 1) * (length * unit) // (2 * count))


def test_videos_extrapolate_in_time_and_interpolate_in_space():
    position_grid = PositionGrid(10, (0, 4, 4))
    times, rows, columns = np.asarray(position_grid.positions((3, 8, 4))).reshape(3, 8, 4, 3).transpose(3, 0, 1, 2)
    assert times[:, 0, 0].tolist() == [0, 10, 20] and columns[0, 0].tolist() == [5, 15, 25, 35]
    np.testing.assert_array_equal(rows[0, :, 0], PositionGrid(10, (4, 4)).positions((8, 1))[:, 0])
    assert position_grid.table_shape((3, 8, 8)) == ((30, 40, 40), 1)


def test_a_shorter_text_is_not_interpolated():
    position_grid = PositionGrid(10, (8,))
    np.testing.assert_array_equal(position_grid.positions((3,)), position_grid.positions((8,))[:3])
    assert position_grid.positions((16,)).max() < 80


@pytest.mark.slow
def test_crops_have_the_positions_of_the_complete_grid():
    position_grid = PositionGrid(10, (4, 4))
    whole = jnp.array([[[0.0, 1.0], [0.0, 1.0]]])
    np.testing.assert_array_equal(position_grid.crop_positions((4, 4), whole)[0], position_grid.positions((4, 4)))
    quarter = jnp.array([[[0.5, 0.5], [0.0, 0.5]]])
    rows, columns = np.asarray(position_grid.crop_positions((4, 4), quarter))[0].reshape(4, 4, 2).transpose(2, 0, 1)
    twice = np.asarray(position_grid.positions((8, 8))).reshape(8, 8, 2)
    np.testing.assert_array_equal(rows, twice[4:, :4, 0])
    np.testing.assert_array_equal(columns, twice[4:, :4, 1])
    boxes = np.asarray(sampling.crop_boxes(KEY, num_sets=500, axes=2, smallest=0.2))
    assert (boxes[..., 0, 1] == boxes[..., 1, 1]).all() and (boxes.min(axis=(0, 1)) >= [0, 0.2]).all()
    assert (boxes.sum(axis=-1) <= 1 + 1e-6).all() and boxes[..., 1].max() > 0.98 and boxes[..., 1].min() < 0.21


def test_fractional_digits_round_trip():
    numbers = [0.0, 0.1, 3.4, 12.3, 123.4, 255.9]  # tenths; the strings are those of ten times as much
    tenths_RA = jnp.array([[round(10 * number)] for number in numbers], jnp.int32)
    digits_RN = to_digits(tenths_RA, base=10, digits=4)
    assert np.asarray(digits_RN)[3].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(from_digits(digits_RN, base=10, axes=1)[:, 0] / 10, numbers, rtol=1e-6)


@pytest.mark.parametrize("shape", [(9,), (3, 4)])
def test_sampling_with_fractional_digits(shape):
    """Windows have constant steps, stay in range, and start at fractions."""
    axes, unit, limit, side = len(shape), 10, 200, max(shape)
    shift = jax.jit(
        lambda key: sampling.random_offsets(
            key, num_sets=3000, shape=shape, max_position=limit, position_resolution=unit
        )
    )(KEY)
    assert (
        shift.min() == 0 and shift.max() == limit - (min(shape) - 1) * unit - 1 and len(np.unique(shift % unit)) == unit
    )
    far = jax.jit(
        lambda key: sampling.distillation_positions(
            key, batch=500, offsets=5, shape=shape, max_position=limit, position_resolution=unit
        )
    )(KEY)
    offsets_BMA = np.stack(np.unravel_index(np.asarray(far.indices_BM), shape), -1) * unit
    starts_BMA = np.asarray(far.positions_BMA) - offsets_BMA
    assert (starts_BMA == starts_BMA[:, :1]).all() and far.positions_BMA.max() < limit
    left = starts_BMA[:, 0] >= (side * unit // 4 if axes == 1 else np.array(shape) * unit)
    assert left.any(axis=-1).all() and len(np.unique(starts_BMA % unit)) == unit
    cut = jax.jit(
        lambda key: sampling.pose_skip(
            key,
            num_sets=500,
            shape=shape,
            max_position=limit,
            num_chunks=2,
            position_range=limit,
            position_resolution=unit,
        )
    )(KEY)
    steps = np.diff(
        np.asarray(cut).reshape(500, *shape, axes)[(slice(None), slice(None), *([0] * (axes - 1)), 0)], axis=1
    )
    assert steps.min() == unit and cut.max() < limit and (np.sort(steps, axis=1)[:, :-1] == unit).all()


def test_jitter_is_bounded_and_keeps_the_order_of_a_text():
    window = jnp.broadcast_to(PositionGrid(10).positions((50,)), (400, 50, 1))
    shaken = np.asarray(sampling.jitter(KEY, window, max_distance=7, max_position=495, ordered=True))
    assert (np.diff(shaken[..., 0], axis=1) >= 0).all() and shaken.min() == 0 and shaken.max() == 494
    free = np.asarray(sampling.jitter(KEY, window, max_distance=7, max_position=495, ordered=False)) - np.asarray(
        window
    )
    assert set(np.unique(free[:, 1:49])) == set(range(-7, 8))
