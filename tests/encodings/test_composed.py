"""Encodings made of parts: what a model sees of them, and what their parameters are called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.encodings.composed import Composed
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.models.attention import apply_position_signal
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.training.trainer import Trainer
from tests.tiny import ROOT, every_part, random_params, tiny_config

ALONE = {"encoding__qk": "multi", "encoding__feature_width": 3, "encoding__position_heads": 1, "model__layers": 2}
SHORT = {"seqpe": {"objective__distillation__weight": 0.0, "objective__contrastive__weight": 0.0}}
PARTS = {"encoding__rotary_pairs": 4, "encoding__rotary_heads": 1, "encoding__log_scaling": True}


@functools.cache
def run_of(*fields):
    off = {"objective__contrastive__weight": 0.0, "objective__distillation__weight": 0.0}
    return Trainer.of(tiny_config(**off, **ALONE, **dict(fields)), jax.devices()[:1])


def shapes(run):
    return jax.tree.map(lambda leaf: leaf.shape, run.abstract_state.params)


@pytest.mark.slow
def test_parts_leave_the_parameters_of_the_first_as_they_are():
    """A checkpoint does not tell whether its encoding stood alone."""
    alone, composed = run_of(), run_of(*PARTS.items())
    assert isinstance(composed.model_spec.encoding, Composed) and not isinstance(alone.model_spec.encoding, Composed)
    assert shapes(alone) == shapes(composed)
    params = random_params(alone, 0.3)
    one, other = (run.compiled.signal(params, (20,)) for run in (alone, composed))
    for found, expected in zip(other.position_query_key, one.position_query_key, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert one.rotation is None and other.rotation[0].shape == (1, 20, 2, 4), "of 6 pairs, in 2 heads"
    assert (other.rotation[0][:, :, 1] == 1).all() and (other.rotation[1][:, :, 1] == 0).all()
    assert one.multiplicative is None and other.multiplicative[0].shape == (1, 20, 1, 1)
    assert other.per_layer_fields == ("position_query_key",)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["learned", "rotary_mixed", "alibi", "sinusoidal", "none"])
def test_scaling_leaves_the_parameters_of_a_baseline_as_they_are(kind):
    plain, scaled = (
        Trainer.of(tiny_config(variant=kind, encoding__log_scaling=on), jax.devices()[:1]) for on in (False, True)
    )
    assert shapes(plain) == shapes(scaled)
    params = random_params(plain, 0.3)
    one, other = (run.compiled.signal(params, (20,)) for run in (plain, scaled))
    assert other.multiplicative is not None
    jax.tree.map(np.testing.assert_array_equal, one, other.replace(multiplicative=None))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rotary", "rotary_axial", "rotary_mixed", "alibi"])
def test_a_baseline_reaches_the_first_heads_alone(kind):
    fields = {"variant": kind, "model__heads": 4, "encoding__position_heads": 3}
    run = Trainer.of(tiny_config(**fields), jax.devices()[:1])
    signal = run.compiled.signal(random_params(run, 0.3), (20,))
    field, neutral = (signal.position_query_key, (0, 0)) if kind == "alibi" else (signal.rotation, (1, 0))
    for part, value in zip(field, neutral, strict=True):
        assert part.shape[-2] == 4 and (part[..., 3, :] == value).all() and (part[..., :3, :] != value).any()


def digits_config(kind, **fields):
    """A model of digits; fields by dotted name."""
    return config.load(f"{ROOT}/configs/digits_vit.py:{kind}", fields)


def shapes_of(settings):
    """Shapes of the parameters, and of the signal of the training window or grid."""
    model_spec = ModelSpec.of(settings, DataSpec(vocabulary=256, classes=10, channels=1))
    signal = jax.eval_shape(lambda key: model_spec.init_encoding(key)[1], jax.ShapeDtypeStruct((2,), jnp.uint32))
    return jax.tree.map(lambda leaf: leaf.shape, model_spec.shapes), signal


@pytest.mark.slow
@pytest.mark.parametrize("kind", config.kinds_for(axes=1))
def test_every_encoding_of_texts_takes_parts(kind):
    """Gates are parameters of the model; pairs, scaling and the choice of heads need none."""
    off = (
        {"encoding__rotary_pairs": 0, "encoding__rotary_heads": 0} if config.ENCODINGS[kind].has("rotary_heads") else {}
    )
    parts = every_part(kind)
    (bare, own), (combined, signal) = (shapes_of(tiny_config(variant=kind, **fields)) for fields in (off, parts))
    gates = combined["model"]["blocks_0"].pop("fading")
    assert gates == {"kernel": (24, 2), "bias": (2,)}
    if kind != "seqpe":  # whose map makes what its heads get, and no more
        assert combined == bare
    assert signal.multiplicative is not None and (signal.relative_bias is None) == (own.relative_bias is None)
    if config.ENCODINGS[kind].has("rotary_heads"):
        assert own.rotation is None and signal.rotation[0].shape == (1, 16, 2, 4)
    if kind == "pope":
        assert signal.polar_num_heads == 1 and own.polar_num_heads is None
    if signal.relative_bias is not None:
        assert signal.relative_bias.heads == 1 and own.relative_bias.heads == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind for kind in config.kinds_for(axes=2) if config.ENCODINGS[kind].has("rotary_heads")]
)
def test_every_encoding_of_grids_takes_rotary_pairs(kind):
    """They rotate along both axes; the class token does not rotate. Gates need an order, which grids lack."""
    pairs = {"encoding.rotary_pairs": 5, "encoding.rotary_heads": 3, "encoding.log_scaling": True}
    _, signal = shapes_of(digits_config(kind, **pairs))
    assert signal.rotation[0].shape == (1, 17, 4, 5) and signal.multiplicative is not None
    with pytest.raises(InputError, match="encoding.gate='?forget'? (needs tokens in causal order|is not read by)"):
        digits_config(kind, **{"encoding.gate": "forget"})


@pytest.mark.parametrize(
    "config_file, kind, fields, message",
    [
        (
            "stdlib_lm",
            "alibi",
            {"gate_bias_init": 4.0},
            "gate_bias_init=4.0 is read by .*'alibi' with encoding.gate alone",
        ),
        (
            "stdlib_lm",
            "alibi",
            {"rotary_heads": 2},
            "rotary_heads=2 is read by .*'alibi' with encoding.rotary_pairs alone",
        ),
        ("stdlib_lm", "none", {"fraction_digits": 1}, "'none' has no positions without encoding.rotary_pairs"),
        ("stdlib_lm", "kerple", {"rotary_pairs": 13}, "rotary_pairs=13 must lie between the 1 axes and the 12 pairs"),
        ("stdlib_lm", "fox", {"gate": "both"}, "'encoding.gate' is 'both'"),
        ("digits_vit", "fox", {}, "encoding.gate='forget' needs tokens in causal order, .* than fox and cable"),
        ("digits_vit", "rotary", {"scaling": "yarn", "log_scaling": True}, "both sharpen attention in longer windows"),
    ],
)
def test_parts_that_an_encoding_cannot_take_are_refused(config_file, kind, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        overrides = {f"encoding.{name}": value for name, value in fields.items()}
        shapes_of(config.load(f"{ROOT}/configs/{config_file}.py:{kind}", overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seqpe", "learned", "alibi", "fire", "pope"])
def test_no_state_reads_the_future(kind):
    """By gradients, of one place in the middle."""
    length, token_index = 6, 3
    run = Trainer.of(
        tiny_config(
            variant=kind, data__length=length, eval__lengths=(length,), **SHORT.get(kind, {}), **every_part(kind)
        ),
        jax.devices()[:1],
    )
    params, network = random_params(run, 0.5), run.model_spec.network
    tokens_BL = jax.random.randint(jax.random.PRNGKey(1), (1, length), 0, 256)
    signal = run.compiled.signal(params, (length,))

    @jax.jit
    def slopes(input_embedding):
        def state(input_embedding):
            own = signal.replace(
                input_embedding=input_embedding
                if signal.input_embedding is None
                else signal.input_embedding + input_embedding
            )
            hidden_BLD = network.apply({"params": params["model"]}, tokens_BL, own, method="hidden")
            return (
                hidden_BLD[0, token_index] * jnp.arange(1.0, 25.0)
            ).sum()  # a plain sum of a LayerNorm's output is constant

        return jnp.abs(jax.grad(state)(input_embedding)).sum(axis=(0, 2))

    reads = np.asarray(slopes(jnp.zeros((1, length, 24))))
    assert (reads[: token_index + 1] > 0).all() and (reads[token_index + 1 :] == 0).all()


def test_log_scaling_multiplies_the_logits_of_pope():
    """Not what they are made of: softplus is no linear function."""
    draw = jax.random.normal(jax.random.PRNGKey(1), (3, 1, 5, 2, 4))
    angles = jax.random.normal(jax.random.PRNGKey(2), (1, 5, 1, 4))
    signal = PositionSignal(polar_phase=(jnp.cos(angles), jnp.sin(angles)), polar_key_phase=jnp.zeros((2, 4)))
    multiplicative = (jnp.full((1, 1, 1, 1), 3.0), jnp.ones((1, 1, 1, 1)))
    query, key, value = draw
    placed, scaled = (
        apply_position_signal(query, key, value, one) for one in (signal, signal.replace(multiplicative=multiplicative))
    )
    np.testing.assert_allclose(scaled[0], 3.0 * placed[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[1], placed[1])


@pytest.mark.slow
def test_scaled_queries_change_what_is_longer_than_in_training_alone():
    scaled, plain = run_of(*PARTS.items()), run_of(*(PARTS | {"encoding__log_scaling": False}).items())
    params = random_params(plain, 0.3)
    tokens_BL = jax.random.randint(jax.random.PRNGKey(1), (2, 32), 0, 256)

    @jax.jit
    def logits(signal):
        return plain.model_spec.network.apply({"params": params["model"]}, tokens_BL, signal)

    with_scaling, without = (run.compiled.signal(params, (32,)) for run in (scaled, plain))
    found = logits(with_scaling)
    seen = np.arange(1, 33)
    multiplicative = np.maximum(1.0, np.log(seen) / np.log(16))[None, :, None, None]
    by_hand = without.replace(multiplicative=(jnp.asarray(multiplicative, jnp.float32), jnp.ones((1, 32, 1, 1))))
    np.testing.assert_allclose(found, logits(by_hand), atol=1e-5)
    difference = np.abs(found - logits(without)).max(axis=(0, 2))
    assert difference[:16].max() < 1e-5 and difference[20:].min() > 1e-4
