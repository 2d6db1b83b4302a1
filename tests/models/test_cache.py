"""Attention and GPT-2 over a KV cache equal those over the whole window, for every field of a signal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.position_signal import PositionSignal, RelativeBias
from seqpe_jax.encodings.relative_bias import LogBias
from seqpe_jax.models.attention import KVCache, attend, attend_cached, position_logits
from seqpe_jax.models.decoder import Decoder
from seqpe_jax.models.transformer import TransformerConfig
from tests.models.test_attention import (
    BACKENDS,
    BATCH,
    CASES,
    GROUPED,
    HEADS,
    LENGTH,
    LIMITS,
    QKV,
    WIDTH,
    of_groups,
    random,
    signals,
)
from tests.tiny import draw_params

pytestmark = pytest.mark.usefixtures("small_kernel")

PROMPTS_B = np.array([1, 4, 2, 7, 3, 6])  # tokens of the prompts, of LENGTH; the rest follow one by one
ALL_FIELDS = ("rotation", "multiplicative", "position_query_key", "bias")


def junk_cache(gates: bool = False, rows: int = LENGTH, heads: int = HEADS, key_heads: int = HEADS) -> KVCache:
    """A cache full of values that must never be read."""
    cum_log_gate = jnp.full((BATCH, rows, heads), 1e4) if gates else None
    keys = jnp.full((BATCH, rows, key_heads, WIDTH), 50.0)
    return KVCache(keys, jnp.full_like(keys, -1e4), cum_log_gate)


def signal_with(fields: tuple[str, ...]) -> PositionSignal:
    if len(fields) == 1:
        return signals(1)[fields[0]]
    return PositionSignal(**{name: getattr(signals(1)[name], name) for name in fields})


def check_prefill_and_decode(backend: str, signal: PositionSignal, gates: bool, qkv=QKV, **options) -> KVCache:
    (_, _, heads, _), key_heads, window = qkv[0].shape, qkv[1].shape[2], options.get("window", 0)
    log_gate_BLH = -jnp.abs(random(40, BATCH, LENGTH, heads)) if gates else None
    cum_log_gate_BLH = None if log_gate_BLH is None else jnp.cumsum(log_gate_BLH, axis=1)
    whole = np.asarray(jax.jit(functools.partial(attend, kind="reference", **options))(*qkv, signal, cum_log_gate_BLH))
    run = jax.jit(functools.partial(attend_cached, **BACKENDS[backend], **options))
    cache, start = junk_cache(gates, window or LENGTH, heads, key_heads), 0
    for stop in (3, 6) if window else (max(PROMPTS_B) - 1,):  # a prompt in two parts
        part = slice(start, stop)
        gate = None if log_gate_BLH is None else log_gate_BLH[:, part]
        lengths_B = jnp.clip(PROMPTS_B - start, 0, stop - start) if window else None
        tokens = [array[:, part] for array in qkv]
        out, cache = run(*tokens, signal, cache, jnp.arange(start, stop)[None], None, gate, lengths_B)
        read_B = PROMPTS_B >= (stop if window else 0)  # a part of a prompt says nothing of what is after it
        np.testing.assert_allclose(out[read_B], whole[read_B, part], atol=2e-5)
        start = stop
    # Each sample goes on after its own prompt: what was written past it is written again.
    for step in range(LENGTH - min(PROMPTS_B)):
        index_B1 = np.minimum(PROMPTS_B + step, LENGTH - 1)[:, None]
        token = [np.take_along_axis(np.asarray(part), index_B1[..., None, None], axis=1) for part in qkv]
        gate = (None, jnp.take_along_axis(log_gate_BLH, index_B1[..., None], axis=1)) if gates else ()
        out, cache = run(*token, signal, cache, jnp.asarray(index_B1), *gate)
        np.testing.assert_allclose(out, np.take_along_axis(whole, index_B1[..., None, None], axis=1), atol=2e-5)
    shared = position_logits(signal, jnp.asarray(index_B1), window or LENGTH, window)  # as layers share them
    gate_of_token = gate[1] if gates else None
    again, _ = run(*token, signal, cache, jnp.asarray(index_B1), shared, gate_of_token)
    np.testing.assert_allclose(again, out, atol=2e-5)
    return cache


@pytest.mark.parametrize(
    "backend, cases",
    [
        ("reference", [(name,) for name in dict.fromkeys(name for name, *_ in CASES)] + [ALL_FIELDS]),
        ("blockwise", [("rotation",), ALL_FIELDS]),
        pytest.param("flash", [("rotation", "position_query_key")], marks=pytest.mark.slow),
    ],
)
def test_prefill_then_decode_equals_the_whole_window(backend, cases):
    for fields in cases:
        check_prefill_and_decode(backend, signal_with(fields), gates=False)
    for fields in [(), cases[-1]]:
        check_prefill_and_decode(backend, signal_with(fields), gates=True)


@pytest.mark.slow
def test_the_cache_of_a_window_is_a_ring():
    """Of 3 rows for 7 tokens, with two heads of keys for four of queries, and with every term by the tokens of its rows."""
    signal = of_groups().replace(position_query_key=tuple(part[:1] for part in of_groups().position_query_key))
    inputs = jnp.stack([jnp.arange(LENGTH), jnp.arange(LENGTH), jnp.ones(LENGTH)], axis=-1)[None].astype(jnp.float32)
    signal = signal.replace(
        bias=random(41, 4, LENGTH, LENGTH),
        relative_bias=RelativeBias(inputs, inputs, LogBias()),
        bias_params={"slope": jnp.arange(1.0, 5.0), "scale": jnp.full(4, 0.5)},
    )
    cache = check_prefill_and_decode("blockwise", signal, True, GROUPED, **LIMITS)
    assert cache.key.nbytes == cache.value.nbytes == BATCH * 3 * 2 * WIDTH * 4


@pytest.mark.slow
def test_a_token_attends_to_no_cache_entry_after_it():
    signal = signals(1)["position_query_key"]
    cache = jax.tree.map(lambda field: field.at[:, :3].set(1.0), junk_cache())
    token = [part[:, 3:4] for part in QKV]
    results = []
    for scale in (1.0, -1.0):
        changed = jax.tree.map(lambda field, scale=scale: field.at[:, 4:].multiply(scale), cache)
        results.append(attend_cached(*token, signal, changed, jnp.array([[3]]))[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gpt2_over_a_cache_equals_the_whole_window(remat):
    """For embedded positions, and for fields of each layer together with fields of all layers."""
    model = Decoder(TransformerConfig(2, HEADS * WIDTH, HEADS, init_std=0.3, remat=remat), vocabulary=11)
    tokens_BL = jax.random.randint(jax.random.PRNGKey(3), (3, LENGTH), 0, 11)
    per_layer = PositionSignal(
        position_query_key=tuple(random(side, 2, 1, LENGTH, HEADS, 3) for side in (1, 2)),
        per_layer_fields=("position_query_key",),
    )
    angles, scale = random(4, 1, LENGTH, 1, 1), (jnp.arange(LENGTH) + 1.0)[None, :, None, None]
    one_pair_of_one_head = PositionSignal(rotation=(jnp.cos(angles), jnp.sin(angles))).for_heads(1, HEADS)
    scaled = PositionSignal(multiplicative=(scale, jnp.ones_like(scale)))
    embedded = PositionSignal(input_embedding=random(3, 1, LENGTH, HEADS * WIDTH))
    composed = per_layer.joined(one_pair_of_one_head).joined(scaled)
    for signal in (composed, embedded) if remat == "none" else (composed,):
        shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), tokens_BL, signal)
        variables = draw_params(shapes, 0.3)
        whole = jax.jit(functools.partial(model.apply, method="hidden"))(variables, tokens_BL, signal)
        run = jax.jit(functools.partial(model.apply, variables, method="forward_cached"))
        states, cache = run(tokens_BL[:, :3], signal, model.init_cache(3, LENGTH, signal), jnp.arange(3)[None])
        parts = [states]
        for index in range(3, LENGTH):
            states, cache = run(tokens_BL[:, index : index + 1], signal, cache, jnp.full((3, 1), index))
            parts.append(states)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_the_cache_has_the_dtype_of_the_arithmetic():
    cache = Decoder(TransformerConfig(3, 8, 2, dtype=jnp.bfloat16), vocabulary=11).init_cache(5, 7, PositionSignal())
    assert len(cache) == 3
    assert {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache)} == {((5, 7, 2, 4), jnp.dtype("bfloat16"))}
