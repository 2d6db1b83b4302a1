"""Encodings that some layers get: the signal of each layer, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import ENCODINGS, ModelDims
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.models.decoder import Decoder
from seqpe_jax.models.transformer import TransformerConfig, stack_layers
from tests.tiny import draw_params, tiny_config

LAYERS, HEADS, LENGTH = 4, 2, 5
POSITIONS_PLA = jnp.arange(LENGTH)[None, :, None]


def signal_of(kind, **fields):
    encoding = ENCODINGS[kind](**fields).build(ModelDims(LAYERS, 24, HEADS, (LENGTH,)))
    return encoding.init_with_output(jax.random.PRNGKey(0), POSITIONS_PLA, shape=(LENGTH,))[0]


def present(signal):
    return {
        name
        for name in ("rotation", "position_query_key", "relative_bias", "bias_params", "multiplicative")
        if getattr(signal, name) is not None
    }


@pytest.mark.slow
def test_each_part_reaches_its_layers_alone():
    """Layer by layer as the encoding of all layers has it, for those that get it; in periods as `scan` takes them."""
    own = {"rotary_pairs": 3, "log_scaling": True}
    every, some = signal_of("kerple", **own), signal_of("kerple", layers_with=(1, 0), rotary_layers=(0, 0, 1, 1), **own)
    for layer in range(LAYERS):
        expected, found = every.at_layer(layer), some.at_layer(layer)
        fields = {"multiplicative", "relative_bias", "bias_params"} if layer % 2 == 0 else {"multiplicative"}
        fields |= {"rotation"} if layer > 1 else set()
        assert present(found) == fields and not found.field_layers and not found.per_layer_fields
        for name in fields:
            jax.tree.map(np.testing.assert_array_equal, getattr(found, name), getattr(expected, name))
        (shared, own_layers), turn = some.at_layers(layer, LAYERS).split_by_layer(), lambda leaf: leaf[0]
        jax.tree.map(np.testing.assert_array_equal, shared.joined(jax.tree.map(turn, own_layers)), found)
    with pytest.raises(ValueError, match="do not share the others' structure"):
        some.split_by_layer()


def test_layers_of_a_period_are_scanned_together():
    some = signal_of("kerple", layers_with=(0, 1))
    assert not some.absent(1) and some.absent(0) == some.absent(2) == {"relative_bias", "bias_params"}
    assert present(some.at_layers(0, 2)) == set()
    of_two, every = some.at_layers(1, 2), signal_of("kerple")
    assert of_two.per_layer_fields == ("bias_params",)
    np.testing.assert_array_equal(of_two.bias_params["slope"], every.bias_params["slope"][1::2])


@pytest.mark.slow
def test_scanned_layers_see_what_they_see_one_by_one():
    """Distances in every other layer, rotations in the rest: the layers of a period are scanned together."""
    signal = signal_of("kerple", layers_with=(1, 0), rotary_layers=(0, 1), rotary_pairs=3)
    tokens_BL = jax.random.randint(jax.random.PRNGKey(1), (2, LENGTH), 0, 11)
    config = TransformerConfig(layers=LAYERS, width=24, heads=HEADS, init_std=0.5, gate="forget")
    plain, scanned = Decoder(config, 11), Decoder(dataclasses.replace(config, scan=True, remat="full"), 11)
    params = draw_params(jax.eval_shape(plain.init, jax.random.PRNGKey(0), tokens_BL, signal), 0.5)["params"]
    found = jax.jit(plain.apply)({"params": params}, tokens_BL, signal)
    stacked = stack_layers(params, LAYERS)
    assert jax.eval_shape(scanned.init, jax.random.PRNGKey(0), tokens_BL, signal)["params"].keys() == stacked.keys()
    np.testing.assert_allclose(jax.jit(scanned.apply)({"params": stacked}, tokens_BL, signal), found, atol=2e-5)


INPUT_ADD = {"encoding__mode": "input_add", "encoding__qk": "none"}
INPUT_ADD |= {f"objective__{loss}__weight": 0.0 for loss in ("contrastive", "distillation")}
REFUSED = [
    (
        "learned",
        {"encoding__layers_with": (1, 0)},
        "layers_with=.* is not read by encoding.kind='learned', only by seqpe, ",
    ),
    (
        "seqpe",
        INPUT_ADD | {"encoding__layers_with": (1,)},
        "reaches all layers",
    ),
    ("alibi", {"encoding__layers_with": (1, 0)}, "layers_with has 2 flags, and model.layers=1"),
    ("alibi", {"encoding__layers_with": (0,)}, r"layers_with=\(0,\) leaves no layer with positions"),
    ("alibi", {"encoding__layers_with": (2,)}, "layers_with' must be at least 0 and at most 1"),
    (
        "none",
        {"encoding__rotary_layers": (1,)},
        "rotary_layers=.* is read by encoding.kind='none' with encoding.rotary_pairs",
    ),
    ("none", {"encoding__rotary_layers": (0,), "encoding__rotary_pairs": 2}, "rotary_layers=.* leaves no layer"),
]


@pytest.mark.parametrize("kind, fields, message", REFUSED)
def test_flags_that_do_nothing_are_refused_by_name(kind, fields, message):
    with pytest.raises(InputError, match=message):
        settings = tiny_config(variant=kind, **fields)
        settings.encoding.build(settings.dims)


def test_losses_see_the_position_logits_of_the_layers_that_have_them():
    """Of heads with a width of their own, too."""
    own = {"qk": "multi", "width": 16, "heads": 2, "layers_with": (1, 0)}
    encoding = ENCODINGS["seqpe"](**own).build(ModelDims(LAYERS, 24, HEADS, (LENGTH,), head_width=8))
    shape = {"shape": (LENGTH,)}
    params = jax.eval_shape(lambda: encoding.init(jax.random.PRNGKey(0), POSITIONS_PLA, **shape))
    vectors_RE = jax.ShapeDtypeStruct((3, 16), jnp.float32)
    apply = lambda params, vectors: encoding.apply(params, vectors, method="query_key")  # noqa: E731
    query, key = jax.eval_shape(apply, params, vectors_RE)
    assert query.shape == key.shape == (2, 3, HEADS, 8)


def test_what_is_added_to_tokens_reaches_all_layers():
    with pytest.raises(ValueError, match="reaches all layers"):
        PositionSignal(input_embedding=jnp.zeros((1, 2, 3))).for_layers((True, False))
