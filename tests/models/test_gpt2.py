"""GPT-2 with every encoding: causality, shifted windows, recomputation, dropout, initial weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import ENCODINGS, CompatConfig, ModelDims
from seqpe_jax.models.gpt2 import GPT2
from seqpe_jax.models.transformer import TransformerConfig

pytestmark = pytest.mark.slow

LENGTH, WIDTH, HEADS, LAYERS = 6, 8, 2, 2
KEY = jax.random.PRNGKey(0)
TOKENS_BL = jax.random.randint(KEY, (2, LENGTH), 0, 11)
POSITIONS_PLA = jnp.arange(LENGTH, dtype=jnp.int32)[None, :, None]

SEQPE_MODES = (
    ("input_add", "none"),
    ("attn_add", "multi"),
    ("attn_mul", "halves"),
    ("attn_scalar", "single"),
    ("rotary", "none"),
)
ALL = [("learned",), ("rotary",), ("alibi",), ("none",), *(("seqpe", *mode) for mode in SEQPE_MODES)]


def model_of(**fields) -> GPT2:
    vocabulary, tied = fields.pop("vocabulary", 11), fields.pop("tied", True)
    sizes = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "init_std": 0.5}
    return GPT2(TransformerConfig(**(sizes | fields)), vocabulary, tied)


def encoding_from_spec(kind: str, mode: str = "", qk: str = ""):
    fields, halves = {}, qk == "halves"
    if kind == "seqpe":
        fields = {
            "mode": mode,
            "qk": "none" if halves else qk,
            "digits": 4,
            "width": 8,
            "heads": 2,
            "layers": 1,
            "init_std": 0.5,
        }
        fields["qk_init_std"] = 0.5
    return ENCODINGS[kind](**fields).make_module(
        ModelDims(LAYERS, WIDTH, HEADS, (LENGTH,), compat=CompatConfig(qk_halves=halves))
    )


def initial(encoding, model):
    signal_params = encoding.init(KEY, POSITIONS_PLA, shape=(LENGTH,))
    signal = encoding.apply(signal_params, POSITIONS_PLA, shape=(LENGTH,))
    return signal_params, model.init(KEY, TOKENS_BL, signal)


@pytest.fixture(scope="module")
def plain():
    """A model's parameters; they do not depend on the encoding."""
    return jax.jit(lambda: initial(encoding_from_spec("none"), model_of())[1])()


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_no_state_reads_the_future(case, plain):
    encoding, model = encoding_from_spec(*case), model_of()

    @jax.jit
    def gradients():
        signal = encoding.apply(encoding.init(KEY, POSITIONS_PLA, shape=(LENGTH,)), POSITIONS_PLA, shape=(LENGTH,))
        input_embedding = jnp.zeros((1, LENGTH, WIDTH)) if signal.input_embedding is None else signal.input_embedding

        def states(input_embedding):
            weight = jnp.arange(1.0, WIDTH + 1)  # a plain sum of a LayerNorm's output is constant
            hidden_BLD = model.apply(plain, TOKENS_BL, signal.replace(input_embedding=input_embedding), method="hidden")
            return (hidden_BLD * weight).sum(axis=(0, 2))

        return jnp.abs(jax.jacrev(states)(input_embedding)).sum(axis=(1, 3))

    reads = np.asarray(gradients())  # [query index, key index]
    assert (reads[np.triu_indices(LENGTH, 1)] == 0).all()
    assert (reads[np.tril_indices(LENGTH)] > 0).all()


@pytest.mark.parametrize("case", [("rotary",), ("alibi",), ("none",), ("learned",)], ids="-".join)
def test_a_shifted_window_has_the_same_logits(case, plain):
    encoding, model = encoding_from_spec(*case), model_of()
    variables = encoding.init(KEY, POSITIONS_PLA, shape=(LENGTH,))

    @functools.partial(jax.jit, static_argnums=1)
    def logits(first, shape=(LENGTH,)):
        signal = encoding.apply(variables, POSITIONS_PLA + first, shape=shape)
        return model.apply(plain, TOKENS_BL, signal)

    if case == ("learned",):  # the check can fail
        assert np.abs(logits(0, (2 * LENGTH,)) - logits(LENGTH, (2 * LENGTH,))).max() > 1e-2
    else:
        np.testing.assert_allclose(logits(0), logits(1000), atol=1e-4 * np.abs(logits(0)).max())


def test_order_matters_to_each_encoding(plain):
    """Reversed positions change what the last token says, for all encodings but `none`."""
    for case in (("rotary",), ("alibi",), ("sinusoidal",), ("seqpe", "attn_scalar", "multi"), ("none",)):
        encoding, model = encoding_from_spec(*case), model_of()

        @jax.jit
        def logits(positions_PLA, encoding=encoding, model=model):
            signal = encoding.apply(encoding.init(KEY, positions_PLA, shape=(LENGTH,)), positions_PLA, shape=(LENGTH,))
            return model.apply(plain, TOKENS_BL, signal)

        first, second = logits(POSITIONS_PLA), logits(POSITIONS_PLA[:, ::-1])
        assert (np.abs(first - second).max() > 1e-3) == (case != ("none",)), case


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_recomputation_changes_nothing(remat, plain):
    encoding = encoding_from_spec("seqpe", "attn_scalar", "multi")
    variables = jax.jit(lambda: encoding.init(KEY, POSITIONS_PLA, shape=(LENGTH,)))()

    def gradients(model):
        def loss(params, variables):
            signal = encoding.apply(variables, POSITIONS_PLA, shape=(LENGTH,))
            return (model.apply(params, TOKENS_BL, signal) ** 2).mean()

        return jax.value_and_grad(loss, argnums=(0, 1))

    whole, recomputed = gradients(model_of()), gradients(model_of(remat=remat))
    names = ("remat", "checkpoint")
    programs = [str(jax.make_jaxpr(run)(plain, variables)) for run in (whole, recomputed)]
    assert [any(name in program for name in names) for program in programs] == [False, True]
    results = [jax.jit(run)(plain, variables) for run in (whole, recomputed)]
    for found, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "embedding_dropout"])
def test_each_dropout_acts_only_in_training(rate, plain):
    off = {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    model = model_of(**(off | {rate: 0.5}))
    signal = encoding_from_spec("none").apply({}, POSITIONS_PLA, shape=(LENGTH,))

    @functools.partial(jax.jit, static_argnums=0)
    def states(deterministic, seed):
        keys = {"dropout": jax.random.PRNGKey(seed)}
        return model.apply(plain, TOKENS_BL, signal, deterministic, rngs=keys)

    np.testing.assert_array_equal(states(True, 0), states(True, 1))
    np.testing.assert_array_equal(states(False, 0), states(False, 0))
    assert np.abs(states(False, 0) - states(False, 1)).max() > 1e-3
    assert np.abs(states(False, 0) - states(True, 0)).max() > 1e-3


def test_initial_weights():
    params = jax.jit(lambda: initial(encoding_from_spec("none"), model_of(width=64, layers=4, init_std=0.02))[1])()[
        "params"
    ]
    for block in (params[f"blocks_{layer}"] for layer in range(4)):
        assert float(block["qkv"]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
        for name in ("out", "mlp_out"):  # residual projections: 0.02 / sqrt(2 * 4)
            assert float(block[name]["kernel"].std()) == pytest.approx(0.02 / 8**0.5, rel=0.05)
        assert not block["qkv"]["bias"].any() and (block["norm_1"]["scale"] == 1).all()
    assert float(params["token_embedding"]["embedding"].std()) == pytest.approx(0.02, rel=0.1)


def test_bfloat16_arithmetic_keeps_float32_parameters_and_logits(plain):
    model = model_of(dtype=jnp.bfloat16)
    signal = encoding_from_spec("alibi").apply({}, POSITIONS_PLA, shape=(LENGTH,))
    logits_BLV = jax.jit(model.apply)(plain, TOKENS_BL, signal)
    exact_BLV = jax.jit(model_of().apply)(plain, TOKENS_BL, signal)
    assert logits_BLV.dtype == jnp.float32
    states = jax.eval_shape(lambda: model.apply(plain, TOKENS_BL, signal, method="hidden"))
    assert states.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits_BLV, exact_BLV, atol=0.05 * np.abs(exact_BLV).max())
    fresh = jax.eval_shape(model.init, KEY, TOKENS_BL, signal)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
