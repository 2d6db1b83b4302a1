"""Attention and GPT-2 over a cache equal those over the whole window, for every field of a signal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.models.attention import KVCache, attend, attend_cached, position_logits
from seqpe_jax.models.gpt2 import GPT2
from seqpe_jax.models.transformer import TransformerConfig
from tests.models.test_attention import BATCH, HEADS, IMPLEMENTATIONS, LENGTH, NAMES, QKV, WIDTH, random, signals

pytestmark = pytest.mark.usefixtures("small_kernel")

PROMPTS_B = np.array([1, 4, 2, 7, 3, 6])  # tokens read at once, of LENGTH; the rest follow one by one


def junk_cache(gates: bool = False) -> KVCache:
    """A cache whose every place holds what must never be read."""
    fade = jnp.full((BATCH, LENGTH, HEADS), 1e4) if gates else None
    return KVCache(jnp.full((BATCH, LENGTH, HEADS, WIDTH), 50.0), jnp.full((BATCH, LENGTH, HEADS, WIDTH), -1e4), fade)


@pytest.mark.parametrize("name", [*NAMES, "everything", "gates", "gates, logit_query_key", "gates, everything"])
@pytest.mark.parametrize("how", ["reference", "blockwise", pytest.param("flash", marks=pytest.mark.slow)])
def test_prompts_at_once_then_token_by_token_equal_the_whole(name, how):
    gates, name = name.startswith("gates"), name.removeprefix("gates").removeprefix(", ")
    if how == "flash" and name in ("bias", "everything"):
        pytest.skip("the kernels read no bias")
    signal = (
        signals(1)[name]
        if name in NAMES
        else PositionSignal(
            **{
                field: getattr(signals(1)[field], field)
                for field in ("rotation", "multiplicative", "logit_query_key", "bias")
                if name
            }
        )
    )
    log_gate_BLH = -jnp.abs(random(40, BATCH, LENGTH, HEADS)) if gates else None
    whole = attend(*QKV, signal, None if log_gate_BLH is None else jnp.cumsum(log_gate_BLH, axis=1), kind="reference")
    prompt = max(PROMPTS_B) - 1
    run = jax.jit(functools.partial(attend_cached, **IMPLEMENTATIONS[how]))
    steps = () if log_gate_BLH is None else (None, log_gate_BLH[:, :prompt])
    mixed, cache = run(*(part[:, :prompt] for part in QKV), signal, junk_cache(gates), jnp.arange(prompt)[None], *steps)
    np.testing.assert_allclose(mixed, whole[:, :prompt], atol=2e-5)
    # Each sample goes on from its own place: what was written past it is written again.
    for step in range(LENGTH - min(PROMPTS_B)):
        places_B = np.minimum(PROMPTS_B + step, LENGTH - 1)
        token = [np.take_along_axis(np.asarray(part), places_B[:, None, None, None], axis=1) for part in QKV]
        steps = (None, jnp.take_along_axis(log_gate_BLH, places_B[:, None, None], axis=1)) if gates else ()
        mixed, cache = run(*token, signal, cache, jnp.asarray(places_B)[:, None], *steps)
        expected = np.take_along_axis(np.asarray(whole), places_B[:, None, None, None], axis=1)
        np.testing.assert_allclose(mixed, expected, atol=2e-5)
    if how == "reference":  # what the signal adds, given
        places_P1 = jnp.asarray(PROMPTS_B)[:, None]
        token = [jnp.take_along_axis(part, places_P1[..., None, None], axis=1) for part in QKV]
        results = [
            attend_cached(*token, signal, cache, places_P1, input_embedding, log_gate_BLH[:, :1] if gates else None)[0]
            for input_embedding in (None, position_logits(signal, places_P1, LENGTH))
        ]
        np.testing.assert_allclose(*results, atol=2e-5)


def test_a_token_reads_no_place_past_its_own():
    signal = signals(1)["logit_query_key"]
    cache = jax.tree.map(lambda field: field.at[:, :3].set(1.0), junk_cache())
    token = [part[:, 3:4] for part in QKV]
    results = []
    for scale in (1.0, -1.0):
        changed = jax.tree.map(lambda field, scale=scale: field.at[:, 4:].multiply(scale), cache)
        results.append(attend_cached(*token, signal, changed, jnp.array([[3]]))[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_model_goes_on_where_its_cache_ends(remat):
    """A signal with tokens added, and one of parts: another in each layer, and what all layers share."""
    model = GPT2(TransformerConfig(2, HEADS * WIDTH, HEADS, init_std=0.3, remat=remat), vocabulary=11)
    layered = tuple(random(side, 2, 1, LENGTH, HEADS, 3) for side in (1, 2))
    input_embedding = random(3, 1, LENGTH, HEADS * WIDTH)
    tokens_BL = jax.random.randint(jax.random.PRNGKey(3), (3, LENGTH), 0, 11)
    angles, grown = random(4, 1, LENGTH, 1, 1), (jnp.arange(LENGTH) + 1.0)[None, :, None, None]
    turned = PositionSignal(rotation=(jnp.cos(angles), jnp.sin(angles))).for_heads(1, HEADS)  # one pair of one head
    grown = PositionSignal(multiplicative=(grown, jnp.ones_like(grown)))
    composed = (
        PositionSignal(logit_query_key=layered, per_layer_fields=("logit_query_key",)).joined(turned).joined(grown)
    )
    for signal in (composed, PositionSignal(input_embedding=input_embedding)):
        variables = model.init(jax.random.PRNGKey(0), tokens_BL, signal)
        whole = model.apply(variables, tokens_BL, signal, method="hidden")
        forward_cached = jax.jit(functools.partial(model.apply, variables, method="forward_cached"))
        states, cache = forward_cached(
            tokens_BL[:, :3], signal, model.init_cache(3, LENGTH, signal), jnp.arange(3)[None]
        )
        parts = [states]
        for place in range(3, LENGTH):
            states, cache = forward_cached(tokens_BL[:, place : place + 1], signal, cache, jnp.full((3, 1), place))
            parts.append(states)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_the_cache_has_the_type_of_the_arithmetic():
    cache = GPT2(TransformerConfig(3, 8, 2, dtype=jnp.bfloat16), vocabulary=11).init_cache(5, 7, PositionSignal())
    assert len(cache) == 3
    assert {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache)} == {((5, 7, 2, 4), jnp.dtype("bfloat16"))}
