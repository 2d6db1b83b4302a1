"""RoPE with the fields of checkpoints, alone and added to another encoding: shares, windows, exports, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from seqpe_jax.config import ENCODINGS, ModelDims, RotaryConfig
from seqpe_jax.encodings.rope import scaled_rotation
from seqpe_jax.errors import InputError
from tests.tiny import tiny_config

WIDTH, TRAINED = 16, 8
DIMS = ModelDims(2, 2 * WIDTH, 2, (TRAINED,))
LONGROPE = {
    "scaling": "longrope",
    "scaling_factor": 4.0,
    "original_length": 6,
    "short_factor": (1.0, 1.1, 1.2, 1.3),
    "long_factor": (2.0, 2.5, 3.0, 9.0),
    "rotary_share": 0.5,
}


def signal_of(length, kind="rotary", **fields):
    encoding = ENCODINGS[kind](**fields).build(DIMS)
    return encoding.apply({}, jnp.arange(length)[None, :, None], shape=(length,))


def angles_of(signal):
    cos, sin = (np.asarray(part[0, :, 0], np.float64) for part in signal.rotation)
    return cos + 1j * sin


def expected_of(length, **fields):
    frequencies, factor = scaled_rotation(RotaryConfig(**fields).resolved(DIMS), WIDTH, TRAINED, length)
    return factor * np.exp(1j * np.arange(length)[:, None] * frequencies)


def test_a_fixed_factor_serves_all_lengths_and_multiplies_what_rotates():
    yarn = {"scaling": "yarn", "scaling_factor": 4.0, "yarn_ramp": "pairs", "yarn_beta_fast": 4.0, "rotary_share": 0.5}
    short, long = signal_of(5, **yarn), signal_of(40, **yarn)
    assert long.rotation[0].shape == (1, 40, 1, 4) and long.multiplicative is None
    np.testing.assert_array_equal(short.rotation, [part[:, :5] for part in long.rotation])
    np.testing.assert_allclose(np.abs(angles_of(long)), 0.1 * np.log(4) + 1, rtol=1e-6)
    np.testing.assert_allclose(angles_of(long), expected_of(40, **yarn), atol=1e-5)
    config = RotaryConfig(**yarn)
    assert not config.window_dependence and config.one_signal_until(TRAINED) == TRAINED
    added = signal_of(40, "none", **config.as_part(WIDTH))  # the same rotations, of another encoding
    np.testing.assert_array_equal(added.rotation, long.rotation)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [LONGROPE, {"scaling": "dynamic", "scaling_factor": 2.0, "original_length": 6}])
def test_the_length_of_the_window_decides_for_all_its_tokens(fields):
    config = RotaryConfig(**fields)
    assert config.window_dependence == f"encoding.scaling='{config.scaling}'" and config.one_signal_until(TRAINED) == 6
    within, at, beyond = (angles_of(signal_of(length, **fields)) for length in (4, 6, 12))
    np.testing.assert_array_equal(within, at[:4])
    assert np.abs(beyond[:4] - within).max() > 0.01
    for length, found in ((4, within), (12, beyond)):
        np.testing.assert_allclose(found, expected_of(length, **fields), atol=1e-5)


def test_an_export_of_longrope_chooses_its_factors_by_the_length():
    (length,) = export.symbolic_shape("n", constraints=["n >= 2", "n <= 32"])

    def exported(config):
        def rotation(tokens_BL):
            shape = tokens_BL.shape[1:]
            return config.build(DIMS).apply({}, jnp.arange(shape[0])[None, :, None], shape=shape).rotation

        return export.export(jax.jit(rotation))(jax.ShapeDtypeStruct((1, length), jnp.int32))

    longrope = exported(RotaryConfig(**LONGROPE))
    for count in (6, 7):
        found = longrope.call(jnp.zeros((1, count), jnp.int32))
        np.testing.assert_allclose(found, signal_of(count, **LONGROPE).rotation, atol=1e-6)
    with pytest.raises(InputError, match="encoding.scaling='dynamic' has other angles for every length"):
        exported(RotaryConfig(scaling="dynamic", scaling_factor=2.0))


REFUSED = [
    ({"scaling_factor": 2.0}, "scaling_factor=2.0 is not read without encoding.scaling='linear' or 'ntk' or "),
    ({"low_freq_factor": 2.0, "scaling": "yarn"}, "low_freq_factor=2.0 is not read without encoding.scaling='llama3'"),
    ({"yarn_truncate": False, "scaling": "yarn"}, "yarn_truncate=False is not read without encoding.yarn_ramp='pairs'"),
    ({"scaling": "dynamic"}, "encoding.scaling='dynamic' needs encoding.scaling_factor"),
    (
        {"scaling": "linear", "scaling_factor": 2.0, "original_length": 8},
        "original_length=8 is not read by .*'linear' with",
    ),
    ({"scaling": "yarn", "yarn_mscale": 1.0}, "yarn_mscale=1.0 and encoding.yarn_mscale_all_dim=0.0 make"),
    (
        {"scaling": "llama3", "high_freq_factor": 0.5},
        "high_freq_factor=0.5 must be more than encoding.low_freq_factor=1.0",
    ),
    ({"scaling": "longrope", "short_factor": (1.0,)}, "short_factor has 1 numbers, and a head has 6 rotary pairs"),
    ({"rotary_share": 0.3}, "encoding.rotary_share=0.3 of 12 columns = 3 must be even"),
]


@pytest.mark.parametrize("fields, message", REFUSED)
def test_fields_that_contradict_each_other_or_do_nothing_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        settings = tiny_config(variant="rotary", **{f"encoding__{name}": value for name, value in fields.items()})
        settings.encoding.build(settings.dims)


def test_scaled_rotations_of_another_encoding_are_of_text():
    with pytest.raises(InputError, match="encoding.rotary_share=0.5 of added rotary pairs is for text"):
        ENCODINGS["fire"](rotary_pairs=2, rotary_share=0.5).build(ModelDims(1, 32, 2, (4, 4)))
    with pytest.raises(InputError, match="scaling='yarn' without encoding.scaling_factor and encoding.mode='attn_mul'"):
        ENCODINGS["seqpe"](mode="attn_mul", rotary_pairs=2, scaling="yarn").check(1)
