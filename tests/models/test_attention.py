"""Attention against a loop over samples, heads and places in float64; blocks, sets, precision, dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.fixed import ALiBi
from seqpe_jax.encodings.signal import PositionSignal, fit_batch
from seqpe_jax.models.attention import attend
from tests.programs import holds

BATCH, LENGTH, HEADS, WIDTH = 6, 7, 2, 4  # 6 samples: with 2 sets, i mod 2 is not i // 2
KEY = jax.random.PRNGKey(0)


def random(name: int, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, name), shape)


def pair(name: int, sets: int, heads: int, width: int):
    return tuple(random(name + side, sets, LENGTH, heads, width) for side in (0, 1))


def signals(sets: int) -> dict[str, PositionSignal]:
    angles = random(9, sets, LENGTH, 1, WIDTH // 2)
    return {
        "rotation": PositionSignal(rotation=(jnp.cos(angles), jnp.sin(angles))),
        "factors": PositionSignal(factors=pair(10, sets, HEADS, WIDTH)),
        "shifts": PositionSignal(shifts=pair(12, sets, 1, WIDTH)),
        "features": PositionSignal(features=pair(14, sets, HEADS, 3)),
        "shared features": PositionSignal(features=pair(16, sets, 1, 3)),
        "bias": PositionSignal(bias=random(18, HEADS, LENGTH, LENGTH)),
    }


QKV = tuple(random(side, BATCH, LENGTH, HEADS, WIDTH) for side in (1, 2, 3))
NAMES = list(signals(1))


def turn(array, cos, sin):
    turned = np.empty_like(array)
    turned[0::2] = array[0::2] * cos - array[1::2] * sin
    turned[1::2] = array[0::2] * sin + array[1::2] * cos
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
        if signal.factors is not None:
            vector = vector * of(signal.factors[side], *at)
        if signal.shifts is not None:
            vector = vector + of(signal.shifts[side], *at)
        return vector

    for sample, i, head in np.ndindex(BATCH, LENGTH, HEADS):
        logits = np.full(LENGTH, -np.inf)
        for j in range(i + 1 if causal else LENGTH):
            logits[j] = placed(query, 0, sample, i, head) @ placed(key, 1, sample, j, head) / np.sqrt(WIDTH)
            if signal.features is not None:
                logits[j] += of(signal.features[0], sample, i, head) @ of(signal.features[1], sample, j, head)
            if signal.bias is not None:
                logits[j] += np.asarray(signal.bias)[head, i, j]
        weights = np.exp(logits - logits.max())
        result[sample, i, head] = weights / weights.sum() @ value[sample, :, head]
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sets", [1, 2])
def test_equals_the_loop(name, sets):
    signal = signals(sets)[name]
    for causal in (True, False):
        found = jax.jit(functools.partial(attend, causal=causal))(*QKV, signal)
        np.testing.assert_allclose(found, loop(*QKV, signal, causal), atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_equal_the_whole_with_gradients(name):
    signal, weight = signals(2)[name], random(30, BATCH, LENGTH, HEADS, WIDTH)

    def score(qkv, signal, block):
        return (attend(*qkv, signal, block=block) * weight).sum()

    run = jax.jit(jax.value_and_grad(score, argnums=(0, 1)), static_argnums=2)
    whole, blocked = run(QKV, signal, 0), run(QKV, signal, 3)  # 7 is no multiple of 3
    for found, expected in zip(jax.tree.leaves(blocked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_blocks_hold_no_square_array():
    length = 32
    qkv = tuple(random(side, 1, length, 1, WIDTH) for side in (1, 2, 3))
    signal = PositionSignal(features=(random(4, 1, length, 1, 2), random(5, 1, length, 1, 2)))

    def program(block):
        return jax.make_jaxpr(jax.grad(lambda q: attend(q, *qkv[1:], signal, block=block).sum()))(qkv[0]).jaxpr

    assert holds(program(0), length * length) and not holds(program(8), length * length)


def test_sample_i_uses_set_i_mod_p():
    assert fit_batch(jnp.arange(3)[:, None], 6)[:, 0].tolist() == [0, 1, 2, 0, 1, 2]


def test_a_few_queries_at_the_end_see_all_keys_before_them():
    query, key, value = QKV
    whole = attend(query, key, value, PositionSignal())
    np.testing.assert_allclose(attend(query[:, -2:], key, value, PositionSignal()), whole[:, -2:], atol=1e-6)


@pytest.mark.parametrize("block", [0, 2])
def test_position_products_stay_float32_under_bfloat16(block):
    """At position 10 000 a bfloat16 number is 64 apart from the next."""
    places = np.array([0, 1, 9990, 9998, 9999, 10000])
    signal = ALiBi(width_model=2, heads_model=1).apply({}, jnp.asarray(places, jnp.int32)[None, :, None], shape=(6,))
    slope = 2.0**-8
    large = jnp.asarray(places, jnp.float32)[None, :, None, None] / 100
    query = jnp.concatenate([large, jnp.ones_like(large)], -1)
    key = jnp.concatenate([jnp.ones_like(large), -large], -1)  # as a trained attn_scalar: a difference of large terms
    zeros = jnp.zeros((1, 6, 1, 6), jnp.bfloat16)
    for features, rate in (signal.features, slope), ((-query, key), None):
        found = attend(zeros, zeros, jnp.eye(6)[None, :, None], PositionSignal(features=features), block=block)
        difference = places[:, None] - places[None]
        logits = -slope * difference if rate else np.asarray(-query[0, :, 0] @ key[0, :, 0].T, np.float64)
        logits = np.where(difference >= 0, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        np.testing.assert_allclose(found[0, :, 0], weights / weights.sum(-1, keepdims=True), atol=1e-4)


def test_dropout_keeps_the_mean_and_differs_by_block():
    ones = jnp.ones((1, 4, 1, 2))
    value = jnp.ones((1, 4, 1, 4096))
    drop = functools.partial(attend, ones, ones, value[..., :2], PositionSignal(), causal=False, dropout_rate=0.5)
    keys = jax.random.split(KEY, 400)
    outcomes = jax.jit(jax.vmap(lambda key: drop(dropout_key=key)))(keys)
    assert float(outcomes.mean()) == pytest.approx(1.0, abs=0.05) and float(outcomes.std()) > 0.3
    blocked = jax.jit(jax.vmap(lambda key: drop(dropout_key=key, block=2)))(keys)
    assert float(blocked.mean()) == pytest.approx(1.0, abs=0.05)
    assert not np.allclose(blocked[:, :, :2], blocked[:, :, 2:])
    np.testing.assert_allclose(drop(dropout_key=None), value[..., :2], atol=1e-6)
