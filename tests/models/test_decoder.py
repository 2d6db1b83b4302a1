"""A decoder with every encoding: causality, shifted windows, recomputation, dropout, initial weights; parts that differ by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import ENCODINGS, ModelDims
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.models.decoder import Decoder
from seqpe_jax.models.transformer import TransformerConfig, stack_layers
from tests.tiny import draw_params

pytestmark = pytest.mark.slow

LENGTH, WIDTH, HEADS, LAYERS = 6, 8, 2, 2
KEY = jax.random.PRNGKey(0)
TOKENS_BL = jax.random.randint(KEY, (2, LENGTH), 0, 11)
POSITIONS_PLA = jnp.arange(LENGTH, dtype=jnp.int32)[None, :, None]


def model_of(**fields) -> Decoder:
    vocabulary, tied = fields.pop("vocabulary", 11), fields.pop("tied", True)
    sizes = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "init_std": 0.5}
    return Decoder(TransformerConfig(**(sizes | fields)), vocabulary, tied)


def encoding_of(kind: str, **fields):
    sizes = {"digits": 4, "width": 8, "heads": 2, "layers": 1, "init_std": 0.5, "qk_init_std": 0.5}
    own = sizes | {"mode": "attn_scalar", "qk": "multi"} if kind == "seqpe" else {}
    return ENCODINGS[kind](**own | fields).make_module(ModelDims(LAYERS, WIDTH, HEADS, (LENGTH,)))


def signal_of(kind: str, positions_PLA=POSITIONS_PLA, shape=(LENGTH,)):
    """The signal of a kind, with parameters that are drawn."""
    encoding = encoding_of(kind)
    variables = jax.eval_shape(functools.partial(encoding.init, shape=(LENGTH,)), KEY, POSITIONS_PLA)
    return encoding.apply(draw_params(variables, 0.5), positions_PLA, shape=shape)


def random(number: int, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, number), (1, LENGTH, *shape))


@pytest.fixture(scope="module")
def plain():
    """A model's parameters; they do not depend on the encoding."""
    shapes = jax.eval_shape(model_of().init, KEY, TOKENS_BL, PositionSignal())
    return draw_params(shapes, 0.5)


def test_no_state_reads_the_future(plain):
    """Whatever positions add to tokens, queries, keys and logits."""
    angles = random(0, 1, 1)
    signal = PositionSignal(
        rotation=(jnp.cos(angles), jnp.sin(angles)),
        multiplicative=(random(1, HEADS, 4), random(2, HEADS, 4)),
        additive=(random(3, 1, 4), random(4, 1, 4)),
        position_query_key=(random(5, HEADS, 3), random(6, HEADS, 3)),
    )

    @jax.jit
    def gradients(input_embedding):
        def states(input_embedding):
            weight = jnp.arange(1.0, WIDTH + 1)  # a plain sum of a LayerNorm's output is constant
            own = signal.replace(input_embedding=input_embedding)
            return (model_of().apply(plain, TOKENS_BL, own, method="hidden") * weight).sum(axis=(0, 2))

        return jnp.abs(jax.jacrev(states)(input_embedding)).sum(axis=(1, 3))

    reads = np.asarray(gradients(random(7, WIDTH)))  # [query index, key index]
    assert (reads[np.triu_indices(LENGTH, 1)] == 0).all()
    assert (reads[np.tril_indices(LENGTH)] > 0).all()


@functools.cache
def compiled_logits():
    return jax.jit(model_of().apply)


@pytest.mark.parametrize("kind", ["rotary", "alibi", "none", "learned"])
def test_a_shifted_window_has_the_same_logits(kind, plain):
    shape = (2 * LENGTH,) if kind == "learned" else (LENGTH,)
    first = LENGTH if kind == "learned" else 1000
    here, there = (
        compiled_logits()(plain, TOKENS_BL, signal_of(kind, positions, shape))
        for positions in (POSITIONS_PLA, POSITIONS_PLA + first)
    )
    if kind == "learned":  # the check can fail
        assert np.abs(here - there).max() > 1e-2
    else:
        np.testing.assert_allclose(here, there, atol=1e-4 * np.abs(here).max())


@pytest.mark.parametrize("kind", ["rotary", "alibi", "sinusoidal", "seqpe", "none"])
def test_order_matters_to_each_encoding(kind, plain):
    """Reversed positions change what the last token says, for all encodings but `none`."""
    first, second = (
        compiled_logits()(plain, TOKENS_BL, signal_of(kind, positions))
        for positions in (POSITIONS_PLA, POSITIONS_PLA[:, ::-1])
    )
    assert (np.abs(first - second).max() > 1e-3) == (kind != "none")


def test_recomputation_changes_nothing(plain):
    encoding = encoding_of("seqpe")
    init = functools.partial(encoding.init, shape=(LENGTH,))
    variables = draw_params(jax.eval_shape(init, KEY, POSITIONS_PLA), 0.5)

    def gradients(model):
        def loss(params, variables):
            signal = encoding.apply(variables, POSITIONS_PLA, shape=(LENGTH,))
            return (model.apply(params, TOKENS_BL, signal) ** 2).mean()

        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(plain, variables)
        recomputes = any(name in str(traced.jaxpr) for name in ("remat", "checkpoint"))
        return recomputes, jax.tree.leaves(traced.lower().compile()(plain, variables))

    recomputes, expected = gradients(model_of())
    assert not recomputes
    for remat in ("full", "dots", "offload"):
        recomputes, results = gradients(model_of(remat=remat))
        assert recomputes
        for found, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "embedding_dropout"])
def test_each_dropout_acts_only_in_training(rate, plain):
    off = {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    model = model_of(**(off | {rate: 0.5}))

    @functools.partial(jax.jit, static_argnums=0)
    def states(deterministic, seed):
        keys = {"dropout": jax.random.PRNGKey(seed)}
        return model.apply(plain, TOKENS_BL, PositionSignal(), deterministic, rngs=keys)

    np.testing.assert_array_equal(states(True, 0), states(True, 1))
    np.testing.assert_array_equal(states(False, 0), states(False, 0))
    assert np.abs(states(False, 0) - states(False, 1)).max() > 1e-3
    assert np.abs(states(False, 0) - states(True, 0)).max() > 1e-3


def test_initial_weights():
    model = model_of(width=64, layers=4, init_std=0.02)
    params = jax.jit(lambda: model.init(KEY, TOKENS_BL, PositionSignal()))()["params"]
    for block in (params[f"blocks_{layer}"] for layer in range(4)):
        assert float(block["qkv"]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
        for name in ("out", "mlp_out"):  # residual projections: 0.02 / sqrt(2 * 4)
            assert float(block[name]["kernel"].std()) == pytest.approx(0.02 / 8**0.5, rel=0.05)
        assert not block["qkv"]["bias"].any() and (block["norm_1"]["scale"] == 1).all()
    assert float(params["token_embedding"]["embedding"].std()) == pytest.approx(0.02, rel=0.1)


def test_bfloat16_arithmetic_keeps_float32_parameters_and_logits(plain):
    model = model_of(dtype=jnp.bfloat16)
    signal = signal_of("alibi")
    logits_BLV = jax.jit(model.apply)(plain, TOKENS_BL, signal)
    exact_BLV = compiled_logits()(plain, TOKENS_BL, signal)
    assert logits_BLV.dtype == jnp.float32
    states = jax.eval_shape(lambda: model.apply(plain, TOKENS_BL, signal, method="hidden"))
    assert states.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits_BLV, exact_BLV, atol=0.05 * np.abs(exact_BLV).max())
    fresh = jax.eval_shape(model.init, KEY, TOKENS_BL, signal)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_layers_that_differ_are_scanned_together_and_decoded_over_rings():
    """Windows in every other layer, no positions in the last of four, shared heads of keys, and all other parts of Gemma 2."""
    fields = {"norm": "rms_norm_plus_one", "norm_placement": "both", "mlp": "geglu", "bias": "none", "qk_norm": "all"}
    fields |= {"attention_cap": 2.0, "logit_cap": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}
    fields |= {"layers": 4, "kv_heads": 1, "head_width": 6, "window": 3, "window_layers": (True, False) * 2}
    angles = random(0, 1, 1)
    rotation = PositionSignal(rotation=(jnp.cos(angles), jnp.sin(angles)))
    signal = rotation.for_layers((True, True, True, False))
    model, scanned = model_of(**fields), model_of(**fields, scan=True, remat="full")
    variables = draw_params(jax.eval_shape(model.init, KEY, TOKENS_BL, signal), 0.5)
    stacked = {"params": stack_layers(variables["params"], 4)}
    whole = jax.jit(model.apply)(variables, TOKENS_BL, signal)
    np.testing.assert_allclose(jax.jit(scanned.apply)(stacked, TOKENS_BL, signal), whole, atol=2e-6)
    program = jax.make_jaxpr(scanned.apply)(stacked, TOKENS_BL, rotation)
    assert [one.params["length"] for one in program.eqns if one.primitive.name == "scan"] == [2]  # of two layers each

    cache = scanned.init_cache(2, LENGTH, signal)
    assert [one.key.shape for one in cache] == [(2, rows, 1, 6) for rows in (3, LENGTH, 3, LENGTH)]
    run = jax.jit(functools.partial(scanned.apply, stacked, method="forward_cached"))
    states, cache = run(TOKENS_BL[:, :4], signal, cache, jnp.arange(4)[None])
    parts = [states]
    for index in range(4, LENGTH):
        states, cache = run(TOKENS_BL[:, index : index + 1], signal, cache, jnp.full((1, 1), index))
        parts.append(states)
    logits = model.apply(variables, jnp.concatenate(parts, axis=1), method="logits")
    np.testing.assert_allclose(logits, whole, atol=2e-5)
