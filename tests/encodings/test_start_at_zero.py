"""Encodings and gates that begin without an effect, next to the rotations of a trained model, which stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import ENCODINGS, ModelDims, RotaryConfig
from seqpe_jax.encodings.position_signal import IDENTITY_VALUES, PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.inference.position_curves import position_terms
from seqpe_jax.models.build import DataSpec, ModelSpec
from tests.tiny import draw_params, tiny_config

LAYERS, HEADS, LENGTH, KEY = 2, 4, 6, jax.random.PRNGKey(0)
LLAMA = RotaryConfig(
    theta=500.0, rotary_share=0.5, scaling="llama3", scaling_factor=4.0, original_length=8, layers_with=(1, 0)
)


def spec_of(variant, **encoding):
    sizes = {"model.layers": 2, "model.width": 32}
    if variant == "seqpe":
        sizes |= {f"objective.{loss}.weight": 0.0 for loss in ("contrastive", "distillation")}
    fields = sizes | {f"encoding.{name}": value for name, value in encoding.items()}
    settings = tiny_config(variant=variant, **{name.replace(".", "__"): value for name, value in fields.items()})
    return ModelSpec.of(settings, DataSpec(vocabulary=256))


@pytest.mark.slow
def test_a_trained_model_computes_what_it_did_and_learns_the_added_parts():
    """SeqPE and forget gates, next to scaled rotations of a part of each head in some of the layers."""
    before = spec_of("rotary", **{name: getattr(LLAMA, name) for name in (*RotaryConfig.rope_fields(), "layers_with")})
    added = {"start_at_zero": True, "gate": "forget", "qk": "multi", "init_std": 0.3, "qk_init_std": 0.3}
    after = spec_of("seqpe", **LLAMA.as_part(16), **added)
    tokens_BL = jax.random.randint(KEY, (2, 16), 0, 256)
    trained = draw_params(jax.eval_shape(before.init, KEY), 0.3)
    expected = np.asarray(jax.jit(before.logits)(trained, tokens_BL))
    params = jax.jit(after.init)(KEY)
    for name, own in trained["model"].items():
        params["model"][name] = params["model"][name] | own if name.startswith("blocks") else own

    @jax.jit
    def step(params):
        def loss(params):
            logits_BLV = after.logits(params, tokens_BL)
            return -jax.nn.log_softmax(logits_BLV[:, :-1])[..., 0].mean(), logits_BLV

        gradients, logits_BLV = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, gradients), gradients, logits_BLV

    params, gradients, found = step(params)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    assert (gradients["encoding"]["start_scale"] != 0).all() and gradients["encoding"]["start_scale"].shape == (2, 2)
    assert all((gradients["model"][f"blocks_{layer}"]["fading"]["scale"] != 0).all() for layer in range(2))
    assert not gradients["encoding"]["qk_map"]["kernel"].any()  # until the factor has moved
    params, gradients, _ = step(params)
    assert gradients["encoding"]["qk_map"]["kernel"].any() and (params["encoding"]["start_scale"] != 0).all()
    trained_again = {"encoding": {}, "model": {name: params["model"][name] for name in trained["model"]}}
    without = jax.jit(before.logits)(trained_again, tokens_BL)
    assert np.abs(step(params)[2] - without).max() > 1e-5


def signal_of(kind, start_scale=None, **fields):
    """The signal with drawn parameters, and a factor."""
    encoding = ENCODINGS[kind](**fields).build(ModelDims(LAYERS, 16, HEADS, (LENGTH,)))
    positions_PLA = jnp.arange(LENGTH)[None, :, None]
    variables = jax.eval_shape(lambda: encoding.init(KEY, positions_PLA, shape=(LENGTH,)))
    params = dict(variables.get("params", {}))
    factors = params.pop("start_scale", None)
    variables = {"params": draw_params(params, 0.5)}
    if factors is not None:
        variables["params"]["start_scale"] = jnp.full(factors.shape, start_scale)
    return encoding.apply(variables, positions_PLA, shape=(LENGTH,))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alibi", "t5", "kerple", "fire"])
def test_biases_grow_from_nothing(kind):
    fields = {"rotary_pairs": 2}
    query, keys, sizes = LENGTH - 1, jnp.arange(LENGTH), (LAYERS, HEADS)
    plain = position_terms(signal_of(kind, **fields), query, keys, *sizes)
    for scale in (0.0, 0.25, 1.0):
        found = position_terms(signal_of(kind, scale, start_at_zero=True, **fields), query, keys, *sizes)
        np.testing.assert_allclose(found["logit"], scale * plain["logit"], atol=1e-5)
        np.testing.assert_array_equal(found["kernel"], plain["kernel"])  # rotations stay


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, qk", [("attn_add", "multi"), ("attn_mul", "single"), ("rotary", "none"), ("input_add", "none")]
)
def test_each_mode_of_seqpe_grows_from_nothing(mode, qk):
    fields = {"mode": mode, "qk": qk, "width": 16, "heads": 2, "layers": 1, "max_position": 9, "dropout": 0.0}
    name = {"attn_add": "additive", "attn_mul": "multiplicative", "rotary": "rotation", "input_add": "input_embedding"}[
        mode
    ]
    plain, none, half = (
        getattr(signal, name)
        for signal in (
            signal_of("seqpe", **fields),
            *(signal_of("seqpe", scale, start_at_zero=True, **fields) for scale in (0.0, 0.5)),
        )
    )
    pairs = (
        [(plain, none, half, 0.0)]
        if mode == "input_add"
        else zip(plain, none, half, IDENTITY_VALUES[name], strict=True)
    )
    for own, nothing, between, identity in pairs:
        np.testing.assert_array_equal(nothing, np.full(own.shape, identity))
        np.testing.assert_allclose(between, (own + identity) / 2, atol=1e-6)


def test_it_is_refused_where_nothing_starts():
    for kind in ("rotary", "scale_invariant"):
        with pytest.raises(
            InputError, match=f"start_at_zero=True is read by encoding.kind='{kind}' with encoding.gate alone"
        ):
            tiny_config(variant=kind, encoding__start_at_zero=True)
    assert PositionSignal().scaled(jnp.zeros(2)) == PositionSignal()
