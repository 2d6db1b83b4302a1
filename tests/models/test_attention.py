"""Every implementation of attention against a loop over samples, heads and places in float64; sets, precision, dropout."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.axes import use_sharding
from seqpe_jax.distributed.sharding import MeshSharding, make_mesh
from seqpe_jax.encodings.base import PositionSignal, broadcast_to_batch
from seqpe_jax.encodings.fixed import ALiBi
from seqpe_jax.models import attention_inputs
from seqpe_jax.models.attention import attend
from tests.jaxprs import has_array_of_size

BATCH, LENGTH, HEADS, WIDTH = 6, 7, 2, 4  # 6 samples: with 2 sets, i mod 2 is not i // 2
KEY = jax.random.PRNGKey(0)


def random(name: int, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, name), shape)


def pair(name: int, sets: int, heads: int, width: int):
    return tuple(random(name + side, sets, LENGTH, heads, width) for side in (0, 1))


def signals(sets: int) -> dict[str, PositionSignal]:
    angles = random(9, sets, LENGTH, 1, WIDTH // 2)
    fast, narrow = angles[..., :1], pair(20, sets, 1, 2)
    some = PositionSignal(rotation=(jnp.cos(fast), jnp.sin(fast)), logit_query_key=narrow).for_heads(1, HEADS)
    return {
        "rotation": PositionSignal(rotation=(jnp.cos(angles), jnp.sin(angles))),
        "multiplicative": PositionSignal(multiplicative=pair(10, sets, HEADS, WIDTH)),
        "additive": PositionSignal(additive=pair(12, sets, 1, WIDTH)),
        "logit_query_key": PositionSignal(logit_query_key=pair(14, sets, HEADS, 3)),
        "shared features": PositionSignal(logit_query_key=pair(16, sets, 1, 3)),
        "narrow features": PositionSignal(logit_query_key=pair(24, sets, 1, 1)),
        "bias": PositionSignal(bias=random(18, HEADS, LENGTH, LENGTH)),
        "some pairs of some heads": some.joined(PositionSignal(multiplicative=pair(22, sets, 1, 1))),
    }


IMPLEMENTATIONS = {
    "reference": {"kind": "reference"},
    "blockwise": {"kind": "blockwise", "block": 3},
    "flash": {"kind": "flash"},
}
pytestmark = pytest.mark.usefixtures("small_kernel")


QKV = tuple(random(side, BATCH, LENGTH, HEADS, WIDTH) for side in (1, 2, 3))
NAMES = list(signals(1))


def turn(array, cos, sin):
    turned, pairs = array.copy(), array[: 2 * len(cos)]
    turned[: len(pairs) : 2] = pairs[0::2] * cos - pairs[1::2] * sin
    turned[1 : len(pairs) : 2] = pairs[0::2] * sin + pairs[1::2] * cos
    return turned


def loop(query, key, value, signal, causal):
    """The definition, one query at a time."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    result = np.zeros_like(query)

    def of(field, sample, place, head):
        field = np.asarray(field, np.float64)
        return field[sample % field.shape[0], place, head % field.shape[2]]

    def placed(array, side, sample, place, head):
        vector = array[sample, place, head]
        at = (sample, place, head)
        if signal.rotation is not None:
            vector = turn(vector, of(signal.rotation[0], *at), of(signal.rotation[1], *at))
        if signal.multiplicative is not None:
            vector = vector * of(signal.multiplicative[side], *at)
        if signal.additive is not None:
            vector = vector + of(signal.additive[side], *at)
        return vector

    for sample, i, head in np.ndindex(BATCH, LENGTH, HEADS):
        logits = np.full(LENGTH, -np.inf)
        for j in range(i + 1 if causal else LENGTH):
            logits[j] = placed(query, 0, sample, i, head) @ placed(key, 1, sample, j, head) / np.sqrt(WIDTH)
            if signal.logit_query_key is not None:
                logits[j] += of(signal.logit_query_key[0], sample, i, head) @ of(
                    signal.logit_query_key[1], sample, j, head
                )
            if signal.bias is not None:
                logits[j] += np.asarray(signal.bias)[head, i, j]
        weights = np.exp(logits - logits.max())
        result[sample, i, head] = weights / weights.sum() @ value[sample, :, head]
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sets, causal", [(1, False), (2, True)])
@pytest.mark.parametrize("how", ["reference", "blockwise", pytest.param("flash", marks=pytest.mark.slow)])
def test_equals_the_loop(how, name, sets, causal):
    if (how, name) == ("flash", "bias"):
        pytest.skip("the kernels read no bias")
    signal = signals(sets)[name]
    found = jax.jit(functools.partial(attend, causal=causal, **IMPLEMENTATIONS[how]))(*QKV, signal)
    np.testing.assert_allclose(found, loop(*QKV, signal, causal), atol=2e-5)


def gradients(how: str, signal: PositionSignal, causal: bool, **fields):
    """The result, and the gradients of queries, keys, values and the signal for a random sum of it."""
    weight = random(30, BATCH, LENGTH, HEADS, WIDTH)

    def score(qkv, signal):
        mixed = attend(*qkv, signal, causal=causal, **IMPLEMENTATIONS[how], **fields)
        return (mixed * weight).sum(), mixed

    return jax.jit(jax.grad(score, argnums=(0, 1), has_aux=True))(QKV, signal)


def close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, causal", [*((name, True) for name in NAMES), ("logit_query_key", False), ("bias", False)]
)
def test_gradients_equal_those_of_the_plain_form(name, causal):
    signal = signals(2)[name]
    expected = gradients("reference", signal, causal)
    for how in ("blockwise", "flash")[: 1 if name == "bias" else 2]:
        close(gradients(how, signal, causal), expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blockwise", "flash"])
def test_dropout_draws_the_same_mask_in_every_implementation(how):
    signal = signals(1)["shared features"]
    dropping = {"dropout_rate": 0.4, "dropout_key": KEY}
    close(gradients(how, signal, True, **dropping), gradients("reference", signal, True, **dropping))


@pytest.mark.slow
@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [(2, 1, 2, 2), (1, 4, 2, 1)])
def test_over_devices_it_is_the_same(how, sizes):
    """6 samples of 2 or 3 sets over 2 devices, or 4 that do not divide them; 7 places over 2; dropout."""
    layout = MeshSharding(make_mesh(*sizes))
    angles = signals(1)["rotation"].rotation
    for sets, name in ((2, "logit_query_key"), (3, "shared features")):
        signal = signals(sets)[name].replace(rotation=angles)
        expected = gradients("reference", signal, True, dropout_rate=0.4, dropout_key=KEY)
        with use_sharding(layout):
            close(gradients(how, signal, True, dropout_rate=0.4, dropout_key=KEY), expected)


@pytest.mark.parametrize("how", ["blockwise", "flash"])
def test_no_square_array_is_held(how):
    length = 32
    qkv = tuple(random(side, 1, length, 1, WIDTH) for side in (1, 2, 3))
    signal = PositionSignal(logit_query_key=(random(4, 1, length, 1, 2), random(5, 1, length, 1, 2)))

    def program(**how):
        return jax.make_jaxpr(jax.grad(lambda q: attend(q, *qkv[1:], signal, **how).sum()))(qkv[0]).jaxpr

    assert has_array_of_size(program(kind="reference"), length * length)
    assert not has_array_of_size(program(**IMPLEMENTATIONS[how] | {"block": 8}), length * length)


@pytest.mark.slow
def test_a_long_window_holds_no_square_array_by_itself():
    """No array of 4096 x 4096 or more in what is compiled, forward and backward, nor memory for one."""
    length = 4096
    shapes = [jax.ShapeDtypeStruct((1, length, 2, WIDTH), jnp.float32)] * 3
    logit_query_key = (jax.ShapeDtypeStruct((1, length, 2, 3), jnp.float32),) * 2

    def score(qkv, logit_query_key):
        return attend(*qkv, PositionSignal(logit_query_key=logit_query_key)).sum()

    compiled = jax.jit(jax.grad(score, argnums=(0, 1))).lower(shapes, logit_query_key).compile()
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
    sizes = [np.prod([int(side) for side in shape.split(",")]) for shape in shapes]
    assert length * WIDTH < max(sizes) < length * length / 8
    assert compiled.memory_analysis().temp_size_in_bytes < length * length * 4 / 4


def test_sample_i_uses_set_i_mod_p():
    assert broadcast_to_batch(jnp.arange(3)[:, None], 6)[:, 0].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_a_few_queries_at_the_end_see_all_keys_before_them(how):
    query, key, value = QKV
    whole = attend(query, key, value, PositionSignal(), kind="reference")
    found = attend(query[:, -2:], key, value, PositionSignal(), **IMPLEMENTATIONS[how])
    np.testing.assert_allclose(found, whole[:, -2:], atol=1e-6)


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_values_may_be_wider_than_keys(how):
    value = random(40, BATCH, LENGTH, HEADS, 3 * WIDTH)
    parts = [attend(*QKV[:2], part, PositionSignal(), kind="reference") for part in jnp.split(value, 3, axis=-1)]
    found = attend(*QKV[:2], value, PositionSignal(), **IMPLEMENTATIONS[how])
    np.testing.assert_allclose(found, jnp.concatenate(parts, axis=-1), atol=1e-5)


def far_features(places) -> tuple[np.ndarray, np.ndarray]:
    """Features of queries and keys, float64[n, 8] each: logits j - i, as differences of products of up to 10 000."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    places = np.asarray(places, np.float64) / 100
    rest = np.random.default_rng(1).normal(size=(len(places), 6))
    query = np.concatenate([-100 * places[:, None], np.full((len(places), 1), 100.0), rest], axis=1)
    key = np.concatenate([np.ones((len(places), 1)), places[:, None], 0 * rest], axis=1)
    return query @ turn, key @ turn


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_position_products_stay_float32_under_bfloat16(how):
    """At position 10 000 a bfloat16 number is 64 apart from the next."""
    near, far = np.arange(6), np.array([9990, 9995, 9998, 9999, 10000])
    slope = 2.0**-8
    places = np.concatenate([near, far])
    signal = ALiBi(width_model=2, heads_model=1).apply({}, jnp.asarray(places, jnp.int32)[None, :, None], shape=(11,))
    alibi = tuple(np.asarray(field[0, :, 0]) for field in signal.logit_query_key)
    for (query, key), rate in ((alibi, slope), (far_features(places), 1.0)):
        # Far queries meet near keys, whose logits are -10 000 * rate and a little.
        fields = [jnp.asarray(field, jnp.float32)[None, :, None] for field in (query[len(near) :], key[: len(near)])]
        zeros = jnp.zeros((1, len(places), 1, 4), jnp.bfloat16)
        value = jnp.eye(len(near))[None, :, None]
        found = attend(
            zeros[:, : len(far)],
            zeros[:, : len(near)],
            value,
            PositionSignal(logit_query_key=tuple(fields)),
            causal=False,
            **IMPLEMENTATIONS[how],
        )
        logits = -rate * (far[:, None] - near)
        logs = np.log(np.asarray(found[0, :, 0], np.float64))
        np.testing.assert_allclose(
            logs - logs.max(-1, keepdims=True), logits - logits.max(-1, keepdims=True), atol=0.02
        )


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
def test_dropout_keeps_the_mean_and_differs_from_query_to_query(how):
    ones, value = jnp.ones((1, 4, 1, 2)), jnp.ones((1, 4, 1, 2))
    drop = functools.partial(attend, ones, ones, value, PositionSignal(), causal=False, dropout_rate=0.5)
    keys = jax.random.split(KEY, 400)
    outcomes = jax.jit(jax.vmap(lambda key: drop(dropout_key=key, **IMPLEMENTATIONS[how])))(keys)
    assert float(outcomes.mean()) == pytest.approx(1.0, abs=0.05) and float(outcomes.std()) > 0.3
    assert not np.allclose(outcomes[:, :, :2], outcomes[:, :, 2:])
    np.testing.assert_allclose(drop(dropout_key=None), value, atol=1e-6)


def test_dropout_masks_look_random():
    """Each bit of mask is its own: no mean over a row, column, head or sample is far from the rate, no neighbours alike."""
    sample, head, row, column = (jnp.arange(n, dtype=jnp.int32) for n in (3, 4, 64, 64))
    places = sample[:, None, None, None], head[:, None, None], row[:, None], column
    mask = np.asarray(attention_inputs.dropout_mask(jnp.int32(5), *places, 0.25))
    assert mask.shape == (3, 4, 64, 64) and set(np.unique(mask)) == {np.float32(0), np.float32(4 / 3)}
    assert mask.mean() == pytest.approx(1, abs=0.01)
    for axes, spread in (((0, 1, 2), 0.1), ((0, 1, 3), 0.1), ((2, 3), 0.05)):
        assert abs(mask.mean(axis=axes) - 1).max() < spread
    for axis in range(4):
        assert abs(np.corrcoef(mask.ravel(), np.roll(mask, 1, axis).ravel())[0, 1]) < 0.02
    other = np.asarray(attention_inputs.dropout_mask(jnp.int32(6), *places, 0.25))
    assert abs(np.corrcoef(mask.ravel(), other.ravel())[0, 1]) < 0.02
