"""Lengths of other papers: none is absolute, and bounds of parameters hold the parameter, not its gradient."""

import ast
import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqpe_jax import config, encodings
from seqpe_jax.config import KerpleConfig, ModelDims, PoPEConfig
from seqpe_jax.encodings.base import clip_straight_through
from seqpe_jax.encodings.pope import PoPE
from seqpe_jax.encodings.relative_bias import Kerple
from seqpe_jax.training.optimizer import projection
from seqpe_jax.training.step import create_train_state, make_train_step

FOLDER = pathlib.Path(encodings.__file__).parent
OF_SEQPE = "default of SeqPE.for_model: widths and initial weights"
# Numbers that an encoding's code may have, other than counts up to four and a half: file, number -> why.
ALLOWED = {
    ("rope.py", 64): "digit of a position, for exact angles",
    ("rope.py", 5): "digits of a position, for exact angles",
    ("rope.py", 0.1): "YaRN's temperature, of a ratio of lengths",
    ("absolute.py", 0.75): "cubic kernel",
    ("absolute.py", 5): "cubic kernel",
    ("absolute.py", 8): "cubic kernel",
    ("relative_bias.py", 8.0): "exponent of ALiBi's slopes; slope_scale is the field",
    ("relative_bias.py", 1e30): "a masked logit",
    ("relative_bias.py", 1e-6): "against a division by zero",
    ("relative_bias.py", 0.01): "lower bound of KERPLE's parameters",
    ("relative_bias.py", 32): "hidden units of FIRE's network",
    ("relative_bias.py", 1.5): "LookHere's slopes by layer, relative",
    ("relative_bias.py", 0.25): "LookHere's slopes by head; slope_scale is the field",
    ("seqpe.py", 0.8): "fraction of work below which prefixes are shared",
    **{("seqpe.py", number): OF_SEQPE for number in (10, 512, 0.02, 0.1)},
}


def test_no_encoding_has_a_length_of_its_own():
    """Whoever adds a number says here that it is no length in tokens or patches, or makes it a field."""
    found = {
        (path.name, node.value)
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and type(node.value) in (int, float)
        and node.value not in (0, 0.5, 1, 2, 3, 4)
    }
    assert found - ALLOWED.keys() == set(), "make it a field in config/encodings.py, with its share in `resolved`"
    assert ALLOWED.keys() - found == set(), "no longer in the code"


def lengths(page, variant, **fields):
    overrides = {"eval.lengths": ()} if "vit" not in page else {}
    values = overrides | {name.replace("__", "."): value for name, value in fields.items()}
    return dataclasses.asdict(
        config.with_resolved_lengths(config.load(f"configs/{page}.py:{variant}", values)).encoding
    )


def test_shares_are_the_authors_numbers_at_the_authors_lengths():
    at = functools.partial(lengths, "wikitext103_gpt2", encoding__max_position=5000)
    assert at("t5", data__length=512)["t5_buckets"] == 32 and at("t5", data__length=512)["t5_max_distance"] == 128
    assert at("fire", data__length=2048)["fire_threshold"] == 512
    assert at("fire", data__length=2048)["fire_scale"] == pytest.approx(0.1)
    assert at("rotary", data__length=4096)["yarn_beta_fast"] == 32
    assert at("scale_invariant", data__length=4096)["rotary_pairs"] == 16  # half of the pairs of 64 columns
    assert lengths("imagenet_vit", "lookhere", model__heads=12)["directed_heads"] == 8


def test_shares_follow_the_window():
    at = functools.partial(lengths, "stdlib_lm")
    text = at("fire", encoding__fire_threshold=0.0, encoding__fire_scale=0.0)
    assert (text["fire_threshold"], text["fire_scale"]) == (16, 3.2)
    assert (at("t5")["t5_buckets"], at("t5")["t5_max_distance"]) == (32, 32)
    assert at("rotary")["yarn_beta_fast"] == pytest.approx(64 / (2 * math.pi))  # rotations of the fastest pair
    assert at("scale_invariant")["rotary_pairs"] == 4
    assert at("scale_invariant", encoding__rotary_pairs=6)["rotary_pairs"] == 6
    assert at("fire")["fire_threshold"] == 512 and at("t5", encoding__t5_max_distance=64)["t5_max_distance"] == 64
    short = at("t5", data__length=8)
    assert short["t5_buckets"] == short["t5_max_distance"] == 8
    assert lengths("digits_vit", "lookhere")["directed_heads"] == 3
    assert lengths("digits_vit", "fire")["fire_threshold"] == pytest.approx(math.hypot(4, 4) / 4)


def bias(variables, encoding):
    """What logits gain of the first layer; the sum grows with every parameter of PoPE and falls with those of KERPLE."""
    positions = jnp.arange(4)[None, :, None]
    signal = encoding.apply({"params": variables}, positions, shape=(4,))
    if isinstance(encoding, PoPE):
        return signal.polar_key_phase
    own = signal.at_layer(0)
    return own.relative_bias.function(own.bias_params, own.relative_bias.query, own.relative_bias.key, jnp.arange(2))[1]


KERPLE, POPE = Kerple(KerpleConfig(), ModelDims(1, 4, 2)), PoPE(PoPEConfig(), ModelDims(1, 4, 2))


@pytest.mark.parametrize(
    "encoding, name, end, outwards",
    [
        (KERPLE, "slope", 0.01, -1.0),
        (KERPLE, "scale", 0.01, -1.0),
        (POPE, "shift", 0.0, -1.0),
        (POPE, "shift", -2 * math.pi, 1.0),
    ],
)
def test_a_parameter_comes_back_from_its_bound(encoding, name, end, outwards):
    """A step beyond ends on the bound, and the next one that leads inside does so at once."""
    optimizer = optax.sgd(0.05)

    def loss(params, batch, *_):
        value = batch["sign"] * bias(params["encoding"], encoding).sum()
        return value, {"loss": value}

    step = jax.jit(make_train_step(loss, optimizer, lambda _: 0.05, project=projection(encoding.PARAM_BOUNDS)))
    fresh = encoding.init(jax.random.PRNGKey(0), jnp.arange(4)[None, :, None], shape=(4,))["params"]
    params = {"encoding": {key: jnp.full_like(leaf, end if key == name else 1.0) for key, leaf in fresh.items()}}
    states = [create_train_state(params, optimizer, jax.random.PRNGKey(0))]
    for sign in (outwards, -outwards):
        states.append(step(states[-1], {"sign": jnp.float32(sign)})[0])
    at, back = (np.asarray(state.params["encoding"][name]) for state in states[1:])
    np.testing.assert_array_equal(at, np.float32(end))
    low, high = encoding.PARAM_BOUNDS[name]
    assert (low < back).all() and (back < high).all()


def test_parameters_begin_within_their_bounds_and_older_ones_count_as_they_did():
    fresh = Kerple(KerpleConfig(), ModelDims(16, 64, 64)).init(
        jax.random.PRNGKey(0), jnp.arange(4)[None, :, None], shape=(4,)
    )
    smallest = [float(leaf.min()) for leaf in fresh["params"].values()]
    assert smallest == [pytest.approx(0.01)] * 2  # some of so many were drawn below
    value, slope = jax.vmap(jax.value_and_grad(lambda x: clip_straight_through(x, (0.01, math.inf))))(
        jnp.array([-3.0, 0.01, 2.0])
    )
    np.testing.assert_allclose(value, [0.01, 0.01, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(slope, 1.0)
