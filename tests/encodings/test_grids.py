"""Encodings of grids: not square, of three axes, shifted, larger than trained, and the tokens before the grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import ENCODINGS, CompatConfig, ModelDims, kinds_for
from seqpe_jax.encodings.rope import axis_frequencies
from seqpe_jax.models.attention import rotate_pairs
from seqpe_jax.positions.grids import PositionGrid
from tests.tiny import draw_params

KEY = jax.random.PRNGKey(0)
LAYERS, WIDTH, HEADS = 2, 24, 2  # heads of 12 columns: 3 pairs for each of 2 axes, 2 for each of 3
GRIDS = [(2, 3), (2, 2, 3)]
SEQPE = {
    "mode": "attn_mul",
    "qk": "multi",
    "max_position": 100,
    "width": 8,
    "heads": 2,
    "layers": 1,
    "qk_init_std": 0.5,
}
FIELDS = {"seqpe": SEQPE | {"init_std": 0.5}, "learned": {"init_std": 0.5}}
BIASES = {"alibi_grid", "fire", "lookhere"}  # functions of two positions: see test_relative_bias.py
KINDS = sorted(set(kinds_for(2)) - BIASES)
FIELDS_OF_TOKENS = ("input_embedding", "rotation", "multiplicative", "parabola")


def make(kind, shape, *, layers=LAYERS, width=WIDTH, heads=HEADS, prefix_tokens=1, compat=None, **fields):
    dims = ModelDims(layers, width, heads, shape, prefix_tokens, compat or CompatConfig())
    return ENCODINGS[kind](**FIELDS.get(kind, {}) | fields).make_module(dims)


def grid_positions(shape, start=0):
    return (start + PositionGrid().positions(shape))[None]


@functools.cache
def initial(encoding, shape):
    init = functools.partial(encoding.init, shape=shape)
    return draw_params(jax.eval_shape(init, KEY, grid_positions(shape)), 0.5)


@functools.partial(jax.jit, static_argnums=(0, 3))
def signal(encoding, variables, positions_PLA, shape):
    return encoding.apply(variables, positions_PLA, shape=shape)


def of_grid(encoding, shape, at=None):
    return signal(encoding, initial(encoding, at or shape), grid_positions(shape), shape)


def tokens_of(field, name, per_layer_fields):
    """[P, L, ...] of a field, its layers last."""
    field = np.asarray(field)
    return np.moveaxis(field, 0, -1) if per_layer_fields and name != "input_embedding" else field


@pytest.mark.parametrize("shape", [GRIDS[0], pytest.param(GRIDS[1], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_positions_of_a_grid_have_different_signals(kind, shape):
    found = of_grid(make(kind, shape), shape)
    fields = {name: getattr(found, name) for name in FIELDS_OF_TOKENS}
    features = []
    for name, field in fields.items():
        for part in () if field is None else field if isinstance(field, tuple) else (field,):
            part = tokens_of(part, name, found.per_layer_fields)
            assert part.shape[:2] == (1, 1 + np.prod(shape)), name
            features.append(part.reshape(part.shape[1], -1))
    if kind == "none":
        assert not features
        return
    features = np.concatenate(features, axis=1)
    distance = np.abs(features[:, None] - features).max(axis=-1) + np.eye(len(features))
    if kind in ("rotary_axial", "rotary_mixed"):  # the origin and the token before the grid do not rotate
        distance[0, 1] = distance[1, 0] = 1.0
    assert distance.min() > 1e-3


def logits_between(rotation, query, key):
    """q . k between the tokens of a grid, [layers..., H, L, L]."""
    cos, sin = (part[..., 1:, :, :] for part in rotation)
    rotate = functools.partial(rotate_pairs, cos=cos, sin=sin)
    return jnp.einsum("...lhk,...shk->...hls", rotate(query), rotate(key))


@pytest.mark.parametrize("shape", [GRIDS[0], pytest.param(GRIDS[1], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", ["rotary_axial", "rotary_mixed"])
def test_a_shifted_grid_has_the_same_logits(kind, shape):
    encoding = make(kind, shape)
    length = int(np.prod(shape))
    lead = (LAYERS, 1) if kind == "rotary_mixed" else (1,)
    query, key = (jax.random.normal(jax.random.fold_in(KEY, side), (*lead, length, HEADS, 12)) for side in (0, 1))
    variables = initial(encoding, shape)
    at = {start: signal(encoding, variables, grid_positions(shape, start), shape).rotation for start in (0, 40)}
    here, there = (logits_between(rotation, query, key) for rotation in at.values())
    assert np.abs(at[0][0] - at[40][0]).max() > 1e-2
    np.testing.assert_allclose(here, there, atol=2e-4)
    reversed_places = signal(encoding, variables, grid_positions(shape)[:, ::-1], shape).rotation
    assert np.abs(logits_between(reversed_places, query, key) - here).max() > 1e-2


def test_tokens_before_the_grid():
    """They get no signal, except on a flattened axis, where they are its first positions."""
    shape = (2, 3)
    for kind in ("rotary_axial", "rotary_mixed"):
        cos, sin = of_grid(make(kind, shape, prefix_tokens=2), shape).rotation
        assert (cos[..., :2, :, :] == 1).all() and (sin[..., :2, :, :] == 0).all()
    assert (of_grid(make("sinusoidal", shape, prefix_tokens=2), shape).input_embedding[:, :2] == 0).all()
    line, flat = (
        make("sinusoidal", (8,), prefix_tokens=0),
        make("sinusoidal", shape, prefix_tokens=2, compat=CompatConfig(flatten=True)),
    )
    np.testing.assert_array_equal(of_grid(flat, shape).input_embedding, of_grid(line, (8,)).input_embedding)
    line, flat = make("rotary", (8,), prefix_tokens=0), make("rotary", shape, prefix_tokens=2)
    for found, expected in zip(of_grid(flat, shape).rotation, of_grid(line, (8,)).rotation, strict=True):
        np.testing.assert_array_equal(found, expected)
    encoding = make("learned", shape, prefix_tokens=2)
    variables = initial(encoding, shape)
    assert variables["params"]["table"].shape == (8, WIDTH)
    np.testing.assert_array_equal(of_grid(encoding, shape).input_embedding[0], variables["params"]["table"])


def test_seqpe_sees_the_token_before_the_grid_in_the_signal_only():
    shape, encoding = (2, 3), make("seqpe", (2, 3), mode="input_add", qk="none")
    variables = initial(encoding, shape)
    positions_PLA = jnp.concatenate([grid_positions(shape), grid_positions(shape, 5)])  # two sets
    input_embedding = signal(encoding, variables, positions_PLA, shape).input_embedding
    vectors = jax.jit(functools.partial(encoding.apply, method="vectors"))(variables, positions_PLA.reshape(-1, 2))
    np.testing.assert_allclose(input_embedding[:, 1:].reshape(12, -1), vectors, atol=1e-5)
    first = variables["params"]["prefix_vectors"]
    assert first.shape == (1, WIDTH) and np.abs(first).max() > 0.1
    np.testing.assert_array_equal(input_embedding[:, 0], np.broadcast_to(first, (2, WIDTH)))
    mapped = make("seqpe", shape)  # attn_mul, a map per layer: the vector passes through it
    variables = initial(mapped, shape)
    query, key = signal(mapped, variables, grid_positions(shape), shape).multiplicative
    params = variables["params"]
    expected = (
        np.einsum("e,lef->lf", params["prefix_vectors"][0], params["qk_map"]["kernel"]) + params["qk_map"]["bias"]
    )
    found = np.concatenate([part[:, 0, 0].reshape(LAYERS, -1) for part in (query, key)], axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_sinusoidal_axes_share_the_columns():
    """Each axis is a table of its own part of the width."""
    shape, width = (3, 4), 16
    found = of_grid(make("sinusoidal", shape, width=width, prefix_tokens=0), shape).input_embedding.reshape(3, 4, width)
    line = of_grid(make("sinusoidal", (4,), width=width // 2, prefix_tokens=0), (4,)).input_embedding[0]
    np.testing.assert_allclose(found[1], np.concatenate([np.tile(line[1], (4, 1)), line], -1), atol=1e-6)
    np.testing.assert_allclose(found[:, 2], np.concatenate([line[:3], np.tile(line[2], (3, 1))], -1), atol=1e-6)


def test_the_first_axes_get_the_remaining_frequencies():
    assert [len(part) for part in axis_frequencies(64, 3, 100.0)] == [11, 11, 10]
    np.testing.assert_allclose(axis_frequencies(12, 2, 100.0), [100.0 ** -np.array([0, 1 / 3, 2 / 3])] * 2)
    cos, _ = of_grid(make("rotary_axial", (2, 2, 2), width=64, heads=1, prefix_tokens=0), (2, 2, 2)).rotation
    assert cos.shape == (1, 8, 1, 32)


def test_fresh_mixed_frequencies_point_along_orthogonal_directions():
    for axes in (1, 2, 3):
        shape = (2,) * axes
        encoding = make("rotary_mixed", shape, layers=40, width=4 * 12, heads=4, theta=100.0)
        fresh = jax.jit(functools.partial(encoding.init, shape=shape))(KEY, grid_positions(shape))
        frequencies = np.asarray(fresh["params"]["frequencies"])
        assert frequencies.shape == (40, axes, 4, 6)
        parts = frequencies.reshape(40, axes, 4, axes, 6 // axes)  # [layer, axis, head, direction, magnitude]
        lengths = np.sqrt((parts**2).sum(axis=1))
        np.testing.assert_allclose(
            lengths, np.broadcast_to(axis_frequencies(12, axes, 100.0)[0], lengths.shape), rtol=1e-5
        )
        directions = parts[..., 0]
        products = np.einsum("nahd,nahe->nhde", directions, directions)
        np.testing.assert_allclose(products, np.broadcast_to(np.eye(axes), products.shape), atol=1e-5)
        # Read last axis first, they are a rotation; so is every matrix of the reference's.
        rotations = np.moveaxis(directions, 1, -1)[..., ::-1]
        np.testing.assert_allclose(np.linalg.det(rotations), 1.0, atol=1e-5)
        if axes > 1:  # drawn for each layer and head: the mean direction is that of nobody
            assert np.abs(directions.mean(axis=(0, 2))).max() < 5 / np.sqrt(160 * axes)
            assert min(np.ptp(directions, axis=at).min() for at in (0, 2)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_grid_than_trained(kind):
    trained, larger = (2, 3), (4, 5)
    encoding = make(kind, trained)
    small, large = of_grid(encoding, trained), of_grid(encoding, larger, at=trained)
    inside = [0, *(1 + row * 5 + column for row, column in np.ndindex(*trained))]
    for name in FIELDS_OF_TOKENS:
        pairs = zip(jax.tree.leaves(getattr(small, name)), jax.tree.leaves(getattr(large, name)), strict=True)
        for here, there in pairs:
            here, there = (tokens_of(field, name, small.per_layer_fields) for field in (here, there))
            assert there.shape[1] == 21
            same = np.abs(there[:, inside] - here).max() < 1e-5
            assert same == (kind not in ("learned", "rotary"))  # those are interpolated, or flattened anew


def cubic(line, count):
    """A line interpolated to `count` entries by a plain loop: Keys' kernel with a = -0.75, half-pixel centres, border repeated."""
    found = []
    for index in range(count):
        centre, total = (index + 0.5) * len(line) / count - 0.5, 0.0
        for near in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            gap = abs(centre - near)
            inner = 1.25 * gap**3 - 2.25 * gap**2 + 1
            weight = inner if gap <= 1 else -0.75 * gap**3 + 3.75 * gap**2 - 6 * gap + 3
            total += weight * line[min(max(near, 0), len(line) - 1)]
        found.append(total)
    return np.array(found)


@pytest.mark.slow
@pytest.mark.parametrize("larger", [(5, 9), (3, 2), (4, 7, 3)], ids=str)
def test_a_learned_table_is_interpolated_along_each_axis(larger):
    trained = (3, 4, 2)[: len(larger)]
    lines = [np.random.default_rng(axis).normal(size=side) for axis, side in enumerate(trained)]
    table = np.concatenate([[9.0], functools.reduce(np.multiply.outer, lines).ravel()])[:, None]
    variables = {"params": {"table": jnp.asarray(table, jnp.float32)}}
    found = signal(make("learned", trained, width=1), variables, grid_positions(larger), larger).input_embedding[
        0, :, 0
    ]
    interpolated = functools.reduce(np.multiply.outer, [cubic(*pair) for pair in zip(lines, larger, strict=True)])
    np.testing.assert_allclose(found, np.concatenate([[9.0], interpolated.ravel()]), atol=1e-5)


def test_the_scramble_of_the_reference_reads_heads_as_positions():
    shape = (2, 3)
    right, wrong = (make("rotary_mixed", shape, compat=CompatConfig(reference_scramble=flag)) for flag in (False, True))
    variables = initial(right, shape)
    for here, there in zip(
        *(signal(e, variables, grid_positions(shape), shape).rotation for e in (right, wrong)), strict=True
    ):
        assert (there[:, :, 0] == here[:, :, 0]).all()
        expected = np.swapaxes(here[:, 0, 1:], 1, 2).reshape(LAYERS, 6, HEADS, 6)
        np.testing.assert_array_equal(there[:, 0, 1:], expected)
        assert np.abs(there - here).max() > 1e-2
