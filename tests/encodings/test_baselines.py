"""Baselines on one axis and between whole positions: angles, slopes, tables, log scaling, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import ENCODINGS, MAX_POSITION_UNITS, CompatConfig, ModelDims
from seqpe_jax.encodings.composed import LogScaling
from seqpe_jax.encodings.relative_bias import alibi_slopes
from seqpe_jax.encodings.rope import unit_circle
from seqpe_jax.errors import InputError


def make(kind, width, heads=1, layers=1, grid=(4,), compat=None, **fields):
    """An encoding by itself, for a model of this size."""
    dims = ModelDims(layers, width, heads, grid, compat=compat or CompatConfig())
    return ENCODINGS[kind](**fields).make_module(dims)


def test_angles_are_exact_far_out():
    positions = np.array([0, 1, 63, 64, 9999, 1_000_003, 64**4 - 1, 64**4 + 5, MAX_POSITION_UNITS - 1])
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    cos, sin = jax.jit(lambda at: unit_circle(at, frequencies))(jnp.asarray(positions, jnp.int32))
    angles = positions[:, None] * frequencies
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def test_alibi_falls_by_slope_times_distance():
    positions_PLA = jnp.array([[[2], [5], [9]]], jnp.int32)
    query, key = make("alibi", 16, 4).apply({}, positions_PLA, shape=(3,)).position_query_key
    logits = np.einsum("plhf,pshf->phls", query, key)[0]
    for head, slope in enumerate([1 / 4, 1 / 16, 1 / 64, 1 / 256]):
        np.testing.assert_allclose(logits[head, 2], [-7 * slope, -4 * slope, 0], atol=1e-6)
    scaled = (
        make("alibi", 16, 4, compat=CompatConfig(reference_scaling=True))
        .apply({}, positions_PLA, shape=(3,))
        .position_query_key
    )
    np.testing.assert_allclose(np.einsum("plhf,pshf->phls", *scaled)[0], logits / 2, atol=1e-6)


def test_slopes_of_head_counts_that_are_no_powers_of_two():
    np.testing.assert_allclose(alibi_slopes(3), [2**-4, 2**-8, 2**-2])
    assert len(set(alibi_slopes(12))) == 12


def test_sinusoidal_columns_and_amplitude():
    signal = make("sinusoidal", 5, amplitude=0.5).apply({}, jnp.array([[[3]]], jnp.int32), shape=(1,))
    angles = 3 * 10000.0 ** (-np.array([0, 0, 2, 2, 4]) / 5)
    sinusoids = [np.sin, np.cos, np.sin, np.cos, np.sin]
    expected = [0.5 * function(angle) for function, angle in zip(sinusoids, angles, strict=True)]
    np.testing.assert_allclose(signal.input_embedding[0, 0], expected, atol=1e-6)


def test_a_longer_window_interpolates_the_table():
    table, length = np.array([[0.0], [1.0], [3.0]]), 8
    positions_PLA = jnp.arange(length, dtype=jnp.int32)[None, :, None]
    encoding, variables = make("learned", 1, grid=(3,)), {"params": {"table": jnp.asarray(table)}}
    found = encoding.apply(variables, positions_PLA, shape=(length,)).input_embedding[0, :, 0]
    at = np.clip((np.arange(length) + 0.5) * 3 / length - 0.5, 0, 2)  # half-pixel centres
    np.testing.assert_allclose(found, np.interp(at, np.arange(3), table[:, 0]), atol=1e-6)
    short = encoding.apply(variables, positions_PLA[:, :2], shape=(2,)).input_embedding[0, :, 0]
    np.testing.assert_allclose(short, table[:2, 0])


def rotary_angles(theta, width, axes, counts, positions):
    """Angles of pairs by a plain loop: `counts` of each axis, the last axis first, from the fastest on."""
    angles = []
    for part, count in enumerate(counts):
        for pair in range(count):
            angles.append(positions[:, axes - 1 - part] * float(theta) ** (-2 * axes * pair / width))
    return np.stack(angles, axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes, pairs, counts",
    [
        (1, 3, [3]),
        (1, 8, [8]),
        (2, 4, [2, 2]),
        (2, 3, [2, 1]),
        (3, 4, [2, 1, 1]),
        (3, 8, [3, 3, 2]),
    ],
)
def test_the_highest_frequencies_of_each_axis_rotate(axes, pairs, counts):
    shape = (3,) * axes
    positions = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, axes)
    encoding = make("rotary_axial", 16, theta=100.0, rotary_pairs=pairs)
    cos, sin = encoding.apply({}, jnp.asarray(positions[None], jnp.int32), shape=shape).rotation
    angles = rotary_angles(100.0, 16, axes, counts, positions)
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angles), atol=1e-6)
    all_pairs = (
        make("rotary_axial", 16, theta=100.0).apply({}, jnp.asarray(positions[None], jnp.int32), shape=shape).rotation
    )
    assert all_pairs[0].shape[-1] == 8
    if pairs == 8:
        np.testing.assert_array_equal((cos, sin), all_pairs)
    if axes == 1:
        line = make("rotary", 16, theta=100.0, rotary_pairs=pairs)
        np.testing.assert_array_equal(line.apply({}, jnp.arange(3)[None, :, None], shape=shape).rotation, (cos, sin))


REFUSED = [
    (
        "alibi",
        {"grid": (2, 3)},
        "encoding.kind='alibi' is for text, and these positions have 2 axes: choose one of seqpe",
    ),
    *(
        (kind, {"grid": (2, 3)}, f"encoding.kind='{kind}' is for text")
        for kind in ("t5", "kerple", "scale_invariant", "pope")
    ),
    (
        "alibi_grid",
        {},
        "encoding.kind='alibi_grid' is for images, and these positions have one axis: choose one of seqpe",
    ),
    ("lookhere", {}, "encoding.kind='lookhere' is for images"),
    ("rotary", {"width": 6, "heads": 2}, "encoding.kind='rotary' .* = 3 must be even"),
    ("rotary_axial", {"width": 6, "heads": 2, "grid": (2, 3)}, "encoding.kind='rotary_axial' .* = 3 must be even"),
    (
        "rotary_mixed",
        {"width": 4, "heads": 2, "grid": (2, 3)},
        "encoding.kind='rotary_mixed' .* must be at least 4 for 2 axes",
    ),
    ("sinusoidal", {"width": 3, "grid": (2, 3)}, "model.width of at least 4 for 2 axes"),
    ("rotary_axial", {"rotary_pairs": 9}, "rotary_pairs=9 must lie between the 1 axes and the 8 pairs"),
    ("rotary_axial", {"rotary_pairs": 1, "grid": (2, 3)}, "rotary_pairs=1 must lie between the 2 axes and the 8 pairs"),
    ("rotary_axial", {"rotary_pairs": 9, "grid": (2, 3)}, "rotary_pairs=9 must lie between the 2 axes and the 8 pairs"),
    ("lookhere", {"directed_heads": 5, "heads": 4, "grid": (2, 3)}, "directed_heads=5 is more than model.heads=4"),
    ("fire", {"fire_signed": True}, "encoding.fire_signed=True is for images"),
    ("rope_id", {"grid": (2, 3)}, "encoding.kind='rope_id' is for text"),
    ("rope_id", {"log_scaling": True}, "encoding.log_scaling and encoding.kind='rope_id' both sharpen attention"),
    ("rope_id", {"width": 6, "heads": 2}, "encoding.kind='rope_id' .* = 3 must be even"),
    ("rope_id", {"fastest_period": 9.0, "slowest_period": 8.0}, "fastest_period=9 must be at most .*slowest_period=8"),
    ("pape", {}, "encoding.kind='pape' is for images"),
    (
        "t5",
        {"t5_buckets": 32, "t5_max_distance": 16},
        "t5_max_distance=16 must be more than half of encoding.t5_buckets=32",
    ),
]


@pytest.mark.parametrize("kind, values, message", REFUSED)
def test_an_encoding_that_does_not_fit_the_model_or_the_positions_is_refused(kind, values, message):
    sizes = {"layers": 1, "width": 16, "heads": 1} | {
        name: value for name, value in values.items() if name in ("width", "heads", "grid")
    }
    fields = {name: value for name, value in values.items() if name not in sizes and name != "grid"}
    with pytest.raises(InputError, match=message):
        ENCODINGS[kind](**fields).build(ModelDims(**sizes))


def test_a_table_of_another_number_of_axes_is_refused():
    with pytest.raises(InputError, match="has a table of 1 axes and cannot read 2 coordinates"):
        make("learned", 8).init(jax.random.PRNGKey(0), jnp.zeros((1, 4, 2), jnp.int32), shape=(2, 2))


RESOLUTIONS = {1: {}, 10: {"fraction_digits": 1}, 64: {"base": 8, "fraction_digits": 2}}  # units of a token or patch


@pytest.mark.slow
@pytest.mark.parametrize("unit", RESOLUTIONS)
def test_angles_between_whole_positions(unit):
    """Every sinusoidal and rotary encoding at position / unit, by its formula in float64."""
    draw, width, theta = np.random.default_rng(unit), 16, 100.0
    units = draw.integers(0, 5000 * unit, (40, 2))
    line, grid = (jnp.asarray(part[None], jnp.int32) for part in (units[:, :1], units))
    positions, sinusoids = units / unit, {"theta": theta} | RESOLUTIONS[unit]
    rotations = [
        (
            make("rotary", width, **sinusoids).apply({}, line, shape=(40,)),
            rotary_angles(theta, width, 1, [8], positions[:, :1]),
        ),
        (
            make("rotary_axial", width, **sinusoids).apply({}, grid, shape=(8, 5)),
            rotary_angles(theta, width, 2, [4, 4], positions),
        ),
    ]
    for signal, angles in rotations:
        for found, function in zip(signal.rotation, (np.cos, np.sin), strict=True):
            np.testing.assert_allclose(found[0, :, 0], function(angles), atol=1e-5)
    input_embedding = (
        make("sinusoidal", width, amplitude=0.5, **sinusoids).apply({}, grid, shape=(8, 5)).input_embedding[0]
    )
    angles = np.stack(
        [positions[:, axis] * theta ** (-2 * 2 * pair / width) for axis in (0, 1) for pair in range(4)], -1
    )
    np.testing.assert_allclose(input_embedding[:, 0::2], 0.5 * np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(input_embedding[:, 1::2], 0.5 * np.cos(angles), atol=1e-5)


@pytest.mark.parametrize("unit", RESOLUTIONS)
def test_learned_frequencies_and_slopes_between_whole_positions(unit):
    draw = np.random.default_rng(unit)
    units = draw.integers(0, 50 * unit, (1, 30, 2))
    positions = units / unit
    encoding = make("rotary_mixed", 16, 2, layers=2, theta=10.0, **RESOLUTIONS[unit])
    frequencies = draw.normal(size=(2, 2, 2, 4)).astype(np.float32)
    variables = {"params": {"frequencies": frequencies}}
    rotation = encoding.apply(variables, jnp.asarray(units, jnp.int32), shape=(6, 5)).rotation
    angles = np.einsum("pla,nahf->nplhf", positions, frequencies.astype(np.float64))
    for found, function in zip(rotation, (np.cos, np.sin), strict=True):
        np.testing.assert_allclose(found, function(angles), atol=1e-4)
    alibi = make("alibi", 16, 4, **RESOLUTIONS[unit])
    query, key = alibi.apply({}, jnp.asarray(units[..., :1], jnp.int32), shape=(30,)).position_query_key
    logits = np.einsum("plhf,pshf->phls", query, key)[0]
    position = positions[0, :, 0]
    np.testing.assert_allclose(logits, -alibi_slopes(4)[:, None, None] * (position[:, None] - position), atol=1e-4)


@pytest.mark.slow
def test_log_scaling_multiplies_queries_that_see_more_keys_than_in_training():
    scaling = LogScaling(ModelDims(1, 1, 1, (4,)))
    query, key = scaling.apply({}, jnp.arange(9, dtype=jnp.int32)[None, :, None] * 7, shape=(9,)).multiplicative
    expected = [1, 1, 1, 1, *(np.log(seen) / np.log(4) for seen in range(5, 10))]
    np.testing.assert_allclose(query[0, :, 0, 0], expected, rtol=1e-6)
    assert query.shape == key.shape == (1, 9, 1, 1) and (key == 1).all()
    on_grid = LogScaling(
        ModelDims(1, 1, 1, (2, 3), prefix_tokens=1)
    )  # every query sees the whole grid and the token before it
    for shape, expected in (((2, 3), 1.0), ((1, 2), 1.0), ((4, 5), np.log(21) / np.log(7))):
        count = int(np.prod(shape))
        query, key = on_grid.apply({}, jnp.zeros((2, count, 2), jnp.int32), shape=shape).multiplicative
        np.testing.assert_allclose(query[0, :, 0, 0], np.full(1 + count, expected), rtol=1e-6)
        assert (key == 1).all()
    assert (
        LogScaling(ModelDims(1, 1, 1, (1,))).apply({}, jnp.zeros((1, 1, 1), jnp.int32), shape=(1,)).multiplicative[0]
        == 1
    ).all()
