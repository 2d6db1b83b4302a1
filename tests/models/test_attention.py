"""Attention backends against a loop over samples, heads and queries in float64: every signal field, gradients, dropout, devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.axes import use_sharding
from seqpe_jax.config import ALiBiConfig, ModelDims
from seqpe_jax.distributed.sharding import MeshSharding, make_mesh
from seqpe_jax.encodings.position_signal import PositionSignal, broadcast_to_batch
from seqpe_jax.encodings.relative_bias import ALiBi
from seqpe_jax.errors import InputError
from seqpe_jax.models import attention_blockwise, attention_inputs, attention_tpu
from seqpe_jax.models.attention import attend
from seqpe_jax.models.attention_inputs import AttentionInputs
from seqpe_jax.models.attention_tpu import AUTO_BLOCKS
from tests.jaxprs import has_array_of_size

pytestmark = pytest.mark.usefixtures("small_kernel")

BATCH, LENGTH, HEADS, WIDTH = 6, 7, 2, 4  # 6 samples: with 2 sets, i mod 2 is not i // 2
KEY = jax.random.PRNGKey(0)
BACKENDS = {
    "reference": {"kind": "reference"},
    "blockwise": {"kind": "blockwise", "block": 3},
    "flash": {"kind": "flash"},  # the TPU kernels, interpreted
}


def random(name: int, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, name), shape)


def pair(name: int, sets: int, heads: int, width: int):
    return tuple(random(name + side, sets, LENGTH, heads, width) for side in (0, 1))


@functools.cache
def signals(sets: int) -> dict[str, PositionSignal]:
    """A signal for each field that attention reads, with one position set or several."""
    angles = random(9, sets, LENGTH, 1, WIDTH // 2)
    first_pair, narrow = angles[..., :1], pair(20, sets, 1, 2)
    partial = PositionSignal(rotation=(jnp.cos(first_pair), jnp.sin(first_pair)), position_query_key=narrow)
    changed = {
        "rotation": (jnp.cos(angles), jnp.sin(angles)),
        "multiplicative": pair(10, sets, HEADS, WIDTH),
        "additive": pair(12, sets, 1, WIDTH),
    }
    return {
        **{name: PositionSignal(**{name: parts}) for name, parts in changed.items()},
        "changed queries and keys": PositionSignal(**changed),
        "position_query_key": PositionSignal(position_query_key=pair(14, sets, HEADS, 3)),
        "position_query_key of all heads": PositionSignal(position_query_key=pair(16, sets, 1, 3)),
        "narrow position_query_key": PositionSignal(position_query_key=pair(24, sets, 1, 1)),
        "bias": PositionSignal(bias=random(18, HEADS, LENGTH, LENGTH)),
        "one pair of one head": partial.for_heads(1, HEADS).joined(PositionSignal(multiplicative=pair(22, sets, 1, 1))),
    }


QKV = tuple(random(side, BATCH, LENGTH, HEADS, WIDTH) for side in (1, 2, 3))
# Queries and keys are changed before a backend sees them, so that to it the reference's other fields are one of these.
CASES = (
    ("changed queries and keys", 2, True),
    ("position_query_key", 2, True),
    ("position_query_key", 1, False),
    ("narrow position_query_key", 2, True),  # one head for all
    ("bias", 2, True),
    ("bias", 1, False),
)


def rotate(array, cos, sin):
    rotated, pairs = array.copy(), array[: 2 * len(cos)]
    rotated[: len(pairs) : 2] = pairs[0::2] * cos - pairs[1::2] * sin
    rotated[1 : len(pairs) : 2] = pairs[0::2] * sin + pairs[1::2] * cos
    return rotated


def loop(query, key, value, signal, causal, *, window=LENGTH, cap=0.0, scale=WIDTH**-0.5):
    """The definition, one query at a time."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    result, heads = np.zeros_like(query), query.shape[2]

    def of(field, sample, index, head):
        field = np.asarray(field, np.float64)
        return field[sample % field.shape[0], index, head % field.shape[2]]

    def transformed(array, side, *at):
        vector = array[*at[:2], at[2] * array.shape[2] // heads]
        if signal.rotation is not None:
            vector = rotate(vector, of(signal.rotation[0], *at), of(signal.rotation[1], *at))
        if signal.multiplicative is not None:
            vector = vector * of(signal.multiplicative[side], *at)
        if signal.additive is not None:
            vector = vector + of(signal.additive[side], *at)
        return vector

    for sample, i, head in np.ndindex(BATCH, LENGTH, heads):
        logits = np.full(LENGTH, -np.inf)
        for j in range(max(0, i - window + 1), i + 1) if causal else range(LENGTH):
            logits[j] = transformed(query, 0, sample, i, head) @ transformed(key, 1, sample, j, head) * scale
            if signal.position_query_key is not None:
                position_query, position_key = signal.position_query_key
                logits[j] += of(position_query, sample, i, head) @ of(position_key, sample, j, head)
            if signal.bias is not None:
                logits[j] += np.asarray(signal.bias)[head, i, j]
            logits[j] = cap * np.tanh(logits[j] / cap) if cap else logits[j]
        weights = np.exp(logits - logits.max())
        result[sample, i, head] = weights / weights.sum() @ value[sample, :, head * value.shape[2] // heads]
    return result


@pytest.mark.parametrize("sets, causal", [(1, False), (2, True)])
def test_reference_equals_the_loop(sets, causal):
    for name, signal in signals(sets).items():
        found = jax.jit(functools.partial(attend, causal=causal, **BACKENDS["reference"]))(*QKV, signal)
        np.testing.assert_allclose(found, loop(*QKV, signal, causal), atol=2e-5, err_msg=name)


def output_and_gradients(backend: str, signal: PositionSignal, causal: bool = True, qkv=QKV, **options):
    """The output, and the gradients of queries, keys, values and the signal for a random sum of it."""
    weight = random(30, *qkv[0].shape)

    def score(qkv, signal):
        out = attend(*qkv, signal, causal=causal, **BACKENDS[backend], **options)
        return (out * weight).sum(), out

    return jax.jit(jax.grad(score, argnums=(0, 1), has_aux=True))(qkv, signal)


DROPOUT = {"dropout_rate": 0.4, "dropout_key": KEY}


@functools.cache
def expected(name: str, sets: int, causal: bool):
    return output_and_gradients("reference", signals(sets)[name], causal)


def close(found, expected, name=""):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["blockwise", "flash"])
def test_every_backend_equals_the_reference(backend):
    """For each field that it reads: output and gradients. Dropout: `test_grouped_heads_windows_caps_and_scales`."""
    for name, sets, causal in CASES:
        if (backend, name) != ("flash", "bias"):  # the kernels read no bias
            close(output_and_gradients(backend, signals(sets)[name], causal), expected(name, sets, causal), name)


# Four heads of queries, of which two read one head of keys, with a term that differs by query head.
GROUPED = tuple(random(side, BATCH, LENGTH, heads, WIDTH) for side, heads in ((1, 4), (2, 2), (3, 2)))
LIMITS = {"window": 3, "cap": 1.5, "scale": 0.8}


@functools.cache
def of_groups() -> PositionSignal:
    return PositionSignal(
        rotation=signals(1)["rotation"].rotation, position_query_key=tuple(random(n, 2, LENGTH, 4, 3) for n in (50, 51))
    )


@functools.cache
def expected_of_groups():
    return output_and_gradients("reference", of_groups(), qkv=GROUPED, **LIMITS, **DROPOUT)


@pytest.mark.slow
def test_grouped_heads_windows_caps_and_scales():
    """In the reference as in the loop; each backend's output, gradients and dropout as the reference's."""
    found = jax.jit(functools.partial(attend, kind="reference", **LIMITS))(*GROUPED, of_groups())
    np.testing.assert_allclose(found, loop(*GROUPED, of_groups(), True, **LIMITS), atol=2e-5)
    for backend in ("blockwise", "flash"):
        close(
            output_and_gradients(backend, of_groups(), qkv=GROUPED, **LIMITS, **DROPOUT), expected_of_groups(), backend
        )


@pytest.mark.parametrize(
    "signal, options, words",
    [
        (
            {"additive": pair(52, 1, 4, WIDTH)},
            {},
            "terms added .* differ by head .4 heads., and 2 .* set model.kv_heads=4",
        ),
        ({"rotation": pair(53, 1, 4, 1)}, {}, "rotations .* differ by head"),
        (
            {"polar_phase": pair(54, 1, 1, WIDTH), "polar_key_phase": random(55, 4, WIDTH)},
            {},
            "polar .* model.kv_heads=4",
        ),
        ({}, {"window": 3, "causal": False}, "a window is of causal attention"),
    ],
)
def test_what_shared_heads_of_keys_cannot_serve_is_refused(signal, options, words):
    with pytest.raises(InputError, match=words):
        attend(*GROUPED, PositionSignal(**signal), **options)
    with pytest.raises(InputError, match="3 heads of keys cannot serve 4"):
        attend(GROUPED[0], *(random(2, BATCH, LENGTH, 3, WIDTH),) * 2, PositionSignal())


@pytest.mark.slow
def test_heads_of_keys_over_devices():
    """Two heads of keys on four devices, of which each has one head of queries; tokens over two."""
    with use_sharding(MeshSharding(make_mesh(1, 1, 2, 4))):
        found = output_and_gradients("blockwise", of_groups(), qkv=GROUPED, **LIMITS, **DROPOUT)
    close(found, expected_of_groups())
    query, key = jnp.zeros((3, 1, 4, 6, 2)), jnp.zeros((3, 1, 4, 2, 2))
    with use_sharding(MeshSharding(make_mesh(1, 1, 1, 3, jax.devices()[:3]))):
        with pytest.raises(InputError, match="mesh.tensor=3 .* model.kv_heads=2 .* parts of several heads of keys"):
            attend(query[0], key[0], key[0], PositionSignal())


def test_terms_by_head_of_keys():
    """Terms of two heads are those of the keys, and each serves the two query heads that read one."""
    signal, twice = (
        PositionSignal(multiplicative=tuple(jnp.repeat(part, times, axis=2) for part in pair(56, 1, 2, WIDTH)))
        for times in (1, 2)
    )
    query, *key_value = GROUPED
    found = attend(*GROUPED, signal, kind="reference")
    expected = attend(query, *(jnp.repeat(part, 2, axis=2) for part in key_value), twice, kind="reference")
    np.testing.assert_allclose(found, expected, atol=1e-6)


@functools.cache
def expected_rotated(name: str, sets: int):
    signal = signals(sets)[name].replace(rotation=signals(1)["rotation"].rotation)
    return output_and_gradients("reference", signal, **DROPOUT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, sizes",
    [("reference", (2, 1, 2, 2)), ("blockwise", (2, 1, 2, 2)), ("flash", (1, 4, 2, 1))],
)
def test_over_devices_it_is_the_same(backend, sizes):
    """6 samples of 2 or 3 sets over 2 devices, or 4 that do not divide them; 7 queries over 2; dropout."""
    sharding = MeshSharding(make_mesh(*sizes))
    rotation = signals(1)["rotation"].rotation
    for sets, name in ((2, "position_query_key"), (3, "position_query_key of all heads")):
        with use_sharding(sharding):
            found = output_and_gradients(backend, signals(sets)[name].replace(rotation=rotation), **DROPOUT)
        close(found, expected_rotated(name, sets))


@pytest.mark.parametrize("backend", ["blockwise", "flash"])
def test_no_array_of_all_logits(backend):
    length = 32
    qkv = tuple(random(side, 1, length, 1, WIDTH) for side in (1, 2, 3))
    signal = PositionSignal(position_query_key=(random(4, 1, length, 1, 2), random(5, 1, length, 1, 2)))

    def program(**options):
        return jax.make_jaxpr(jax.grad(lambda q: attend(q, *qkv[1:], signal, **options).sum()))(qkv[0]).jaxpr

    assert has_array_of_size(program(kind="reference"), length * length)
    assert not has_array_of_size(program(**BACKENDS[backend] | {"block": 8}), length * length)


@pytest.mark.slow
def test_a_long_window_needs_no_array_of_all_logits_by_default():
    """No array of 4096 x 4096 or more in what is compiled, forward and backward, nor memory for one."""
    length = 4096
    shapes = [jax.ShapeDtypeStruct((1, length, 2, WIDTH), jnp.float32)] * 3
    position_query_key = (jax.ShapeDtypeStruct((1, length, 2, 3), jnp.float32),) * 2

    def score(qkv, position_query_key):
        return attend(*qkv, PositionSignal(position_query_key=position_query_key)).sum()

    compiled = jax.jit(jax.grad(score, argnums=(0, 1))).lower(shapes, position_query_key).compile()
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    sizes = [np.prod([int(side) for side in shape.split(",")]) for shape in shapes]
    assert length * WIDTH < max(sizes) < length * length / 8
    assert compiled.memory_analysis().temp_size_in_bytes < length * length * 4 / 4


def test_a_window_makes_attention_linear_in_length(monkeypatch):
    """Tiles that are computed, forward and backward, and steps of the kernels' grids."""
    counts, query_key = [], attention_blockwise._Tile.query_key

    def counted(tile):
        jax.debug.callback(lambda: counts.append(1))
        return query_key(tile)

    monkeypatch.setattr(attention_blockwise._Tile, "query_key", counted)
    blocks = []
    for length, window in ((32, 0), (32, 8), (64, 8)):
        qkv = (random(1, 1, length, 1, WIDTH),) * 3
        run = jax.jit(lambda *qkv, w=window: attend(*qkv, PositionSignal(), kind="blockwise", block=4, window=w).sum())
        jax.block_until_ready(jax.grad(run)(*qkv))
        jax.effects_barrier()
        blocks.append(len(counts))
        counts.clear()
    assert blocks == [2 * 36, 2 * 21, 2 * 45]  # all before the query's, or the query's and two before it
    inputs = jax.eval_shape(lambda qkv: AttentionInputs(*qkv, causal_offset=jnp.zeros(1, jnp.int32), window=8), qkv)
    steps = set()

    def grids(inputs):
        kernel_inputs, config = attention_tpu._kernel_inputs(inputs, AUTO_BLOCKS, True, jnp.float32)
        steps.update(attention_tpu._KernelCall(kernel_inputs, config, outer).grid[3:] for outer in (False, True))

    jax.eval_shape(grids, inputs)
    assert steps == {
        (16, 4)
    }  # 16 blocks of queries against the four of keys that a window of 8 may touch, and the reverse


def test_sample_i_uses_set_i_mod_p():
    assert broadcast_to_batch(jnp.arange(3)[:, None], 6)[:, 0].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_few_queries_and_wide_values(backend):
    """The last two queries of a window see all keys before them; values may be wider than keys."""
    query, key, value = QKV
    whole = attend(query, key, value, PositionSignal(), kind="reference")
    found = attend(query[:, -2:], key, value, PositionSignal(), **BACKENDS[backend])
    np.testing.assert_allclose(found, whole[:, -2:], atol=1e-6)
    wide = random(40, BATCH, LENGTH, HEADS, 3 * WIDTH)
    parts = [attend(query, key, part, PositionSignal(), kind="reference") for part in jnp.split(wide, 3, axis=-1)]
    found = attend(query, key, wide, PositionSignal(), **BACKENDS[backend])
    np.testing.assert_allclose(found, jnp.concatenate(parts, axis=-1), atol=1e-5)


def far_features(positions) -> tuple[np.ndarray, np.ndarray]:
    """Features of queries and keys, float64[n, 8] each: logits j - i, as differences of products of up to 10 000."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    positions = np.asarray(positions, np.float64) / 100
    rest = np.random.default_rng(1).normal(size=(len(positions), 6))
    query = np.concatenate([-100 * positions[:, None], np.full((len(positions), 1), 100.0), rest], axis=1)
    key = np.concatenate([np.ones((len(positions), 1)), positions[:, None], 0 * rest], axis=1)
    return query @ turn, key @ turn


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_position_products_stay_float32_under_bfloat16(backend):
    """At 10 000 the next bfloat16 number is 64 away."""
    near, far = np.arange(6), np.array([9990, 9995, 9998, 9999, 10000])
    slope = 2.0**-8
    positions = np.concatenate([near, far])
    signal = ALiBi(ALiBiConfig(), ModelDims(1, 2, 1)).apply(
        {}, jnp.asarray(positions, jnp.int32)[None, :, None], shape=(11,)
    )
    alibi = tuple(np.asarray(field[0, :, 0]) for field in signal.position_query_key)
    for (query, key), rate in ((alibi, slope), (far_features(positions), 1.0)):
        # Far queries meet near keys, whose logits are -10 000 * rate and a little.
        fields = [jnp.asarray(field, jnp.float32)[None, :, None] for field in (query[len(near) :], key[: len(near)])]
        zeros = jnp.zeros((1, len(positions), 1, 4), jnp.bfloat16)
        value = jnp.eye(len(near))[None, :, None]
        found = attend(
            zeros[:, : len(far)],
            zeros[:, : len(near)],
            value,
            PositionSignal(position_query_key=tuple(fields)),
            causal=False,
            **BACKENDS[backend],
        )
        logits = -rate * (far[:, None] - near)
        logs = np.log(np.asarray(found[0, :, 0], np.float64))
        np.testing.assert_allclose(
            logs - logs.max(-1, keepdims=True), logits - logits.max(-1, keepdims=True), atol=0.02
        )


def test_dropout_keeps_the_mean_and_differs_by_query():
    ones = jnp.ones((1, 4, 1, 2))
    drop = functools.partial(attend, ones, ones, ones, PositionSignal(), causal=False, dropout_rate=0.5)
    outcomes = jax.jit(jax.vmap(lambda key: drop(dropout_key=key)))(jax.random.split(KEY, 400))
    assert float(outcomes.mean()) == pytest.approx(1.0, abs=0.05) and float(outcomes.std()) > 0.3
    assert not np.allclose(outcomes[:, :, :2], outcomes[:, :, 2:])
    np.testing.assert_allclose(drop(dropout_key=None), ones, atol=1e-6)


def test_dropout_masks_look_random():
    """Each bit of mask is its own: no mean over a row, column, head or sample is far from the rate, no neighbours alike."""
    sample, head, row, column = (jnp.arange(n, dtype=jnp.int32) for n in (3, 4, 64, 64))
    indices = sample[:, None, None, None], head[:, None, None], row[:, None], column
    mask = np.asarray(attention_inputs.dropout_mask(jnp.int32(5), *indices, 0.25))
    assert mask.shape == (3, 4, 64, 64) and set(np.unique(mask)) == {np.float32(0), np.float32(4 / 3)}
    assert mask.mean() == pytest.approx(1, abs=0.01)
    for axes, spread in (((0, 1, 2), 0.1), ((0, 1, 3), 0.1), ((2, 3), 0.05)):
        assert abs(mask.mean(axis=axes) - 1).max() < spread
    for axis in range(4):
        assert abs(np.corrcoef(mask.ravel(), np.roll(mask, 1, axis).ravel())[0, 1]) < 0.02
    other = np.asarray(attention_inputs.dropout_mask(jnp.int32(6), *indices, 0.25))
    assert abs(np.corrcoef(mask.ravel(), other.ravel())[0, 1]) < 0.02
