"""Attention and GPT-2 over a KV cache equal those over the whole window, for every field of a signal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.models.attention import KVCache, attend, attend_cached, position_logits
from seqpe_jax.models.decoder import Decoder
from seqpe_jax.models.transformer import TransformerConfig
from tests.models.test_attention import BACKENDS, BATCH, HEADS, LENGTH, NAMES, QKV, WIDTH, random, signals
from tests.tiny import draw_params

pytestmark = pytest.mark.usefixtures("small_kernel")

PROMPTS_B = np.array([1, 4, 2, 7, 3, 6])  # tokens of the prompts, of LENGTH; the rest follow one by one
ALL_FIELDS = ("rotation", "multiplicative", "position_query_key", "bias")


def junk_cache(gates: bool = False) -> KVCache:
    """A cache full of values that must never be read."""
    cum_log_gate = jnp.full((BATCH, LENGTH, HEADS), 1e4) if gates else None
    keys = jnp.full((BATCH, LENGTH, HEADS, WIDTH), 50.0)
    return KVCache(keys, jnp.full_like(keys, -1e4), cum_log_gate)


def signal_with(fields: tuple[str, ...]) -> PositionSignal:
    if len(fields) == 1:
        return signals(1)[fields[0]]
    return PositionSignal(**{name: getattr(signals(1)[name], name) for name in fields})


def check_prefill_and_decode(backend: str, signal: PositionSignal, gates: bool) -> None:
    log_gate_BLH = -jnp.abs(random(40, BATCH, LENGTH, HEADS)) if gates else None
    cum_log_gate_BLH = None if log_gate_BLH is None else jnp.cumsum(log_gate_BLH, axis=1)
    whole = np.asarray(attend(*QKV, signal, cum_log_gate_BLH, kind="reference"))
    run = jax.jit(functools.partial(attend_cached, **BACKENDS[backend]))
    length = max(PROMPTS_B) - 1
    gate = (None, log_gate_BLH[:, :length]) if gates else ()
    out, cache = run(*(part[:, :length] for part in QKV), signal, junk_cache(gates), jnp.arange(length)[None], *gate)
    np.testing.assert_allclose(out, whole[:, :length], atol=2e-5)
    # Each sample goes on after its own prompt: what was written past it is written again.
    for step in range(LENGTH - min(PROMPTS_B)):
        index_B1 = np.minimum(PROMPTS_B + step, LENGTH - 1)[:, None]
        token = [np.take_along_axis(np.asarray(part), index_B1[..., None, None], axis=1) for part in QKV]
        gate = (None, jnp.take_along_axis(log_gate_BLH, index_B1[..., None], axis=1)) if gates else ()
        out, cache = run(*token, signal, cache, jnp.asarray(index_B1), *gate)
        np.testing.assert_allclose(out, np.take_along_axis(whole, index_B1[..., None, None], axis=1), atol=2e-5)
    shared = position_logits(signal, jnp.asarray(index_B1), LENGTH)  # as layers share them
    gate_of_token = gate[1] if gates else None
    again, _ = run(*token, signal, cache, jnp.asarray(index_B1), shared, gate_of_token)
    np.testing.assert_allclose(again, out, atol=2e-5)


@pytest.mark.parametrize(
    "backend, cases",
    [
        ("reference", [(name,) for name in NAMES] + [ALL_FIELDS]),
        ("blockwise", [("rotation",), ALL_FIELDS]),
        pytest.param("flash", [("rotation", "position_query_key")], marks=pytest.mark.slow),
    ],
)
def test_prefill_then_decode_equals_the_whole_window(backend, cases):
    for fields in cases:
        check_prefill_and_decode(backend, signal_with(fields), gates=False)
    for fields in [(), cases[-1]]:
        check_prefill_and_decode(backend, signal_with(fields), gates=True)


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
