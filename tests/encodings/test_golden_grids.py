"""Every array of the PyTorch reference's image tables: encodings of grids, interpolation, digits, masks, weights."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import ENCODINGS, CompatConfig, ModelDims, SeqPEConfig
from seqpe_jax.encodings.absolute import resize_table
from seqpe_jax.encodings.digit_encoder import DigitEncoder
from seqpe_jax.interop.weights import mixed_rule
from seqpe_jax.losses.train_loss import term_weight
from seqpe_jax.models.attention import rotate_pairs
from seqpe_jax.positions.counting import count_digits
from seqpe_jax.positions.digits import significant_mask, to_digits
from seqpe_jax.positions.grids import PositionGrid
from tests.goldens import close, load, under


@pytest.fixture(scope="module")
def arrays(goldens):
    return load(goldens, "tables", "tables_image")[1]


def numbers(name: str) -> list[int]:
    """The numbers in an array's name: n64_d48_b10000 -> 64, 48, 10000."""
    return [int(part) for part in re.findall(r"\d+", name)]


def window(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)[None, :, None]


def make(kind, width, heads=1, layers=1, grid=(64,), compat=CompatConfig(), **fields):  # noqa: B008
    return ENCODINGS[kind](**fields).make_module(ModelDims(layers, width, heads, grid, compat=compat))


@functools.partial(jax.jit, static_argnums=(0, 2))
def signal(encoding, positions_PLA, shape):
    return encoding.apply({}, positions_PLA, shape=shape)


def sin(arrays):
    for name, table in under(arrays, "out/sin/").items():
        count, width, theta = numbers(name)
        close(
            signal(make("sinusoidal", width, theta=theta), window(count), (count,)).input_embedding[0],
            table,
            2e-6,
            name,
        )


def rotary(arrays):
    for name, table in under(arrays, "out/rotary/").items():
        count, width, theta = numbers(name)
        rows = arrays.get(f"in/rotary_rows/{name}", np.arange(count))
        positions_PLA = jnp.asarray(rows, jnp.int32)[None, :, None]
        cos, sin = signal(make("rotary", width, theta=theta), positions_PLA, (count,)).rotation
        close(np.concatenate([sin, cos], -1)[0, :, 0], table, 2e-6, name)  # the reference keeps sines first


def sin2d(arrays):
    """The reference's table of 100 entries is one axis of a 10 x 10 grid."""
    encoding = make("sinusoidal", 8, grid=(10, 10), compat=CompatConfig(flatten=True))
    found = signal(encoding, jnp.asarray(arrays["in/sin2d_pos"], jnp.int32)[None], (10, 10)).input_embedding
    close(found[0], arrays["out/sin2d_n100_d8_b10000"], 2e-6)


def rotary2d(arrays):
    for name, cosines in under(arrays, "out/rotary2d_re/").items():
        count, width, theta = numbers(name)
        side = int(count**0.5)
        encoding = make("rotary_axial", width, grid=(4, 4), theta=theta)
        cos, sin = signal(encoding, jnp.asarray(arrays["in/rotary2d_pos"], jnp.int32)[None], (4, 4)).rotation
        close(cos[0, :, 0], cosines, 2e-6, name)
        close(sin[0, :, 0], arrays[f"out/rotary2d_im/{name}"], 2e-6, name)
        if f"out/rotary2d_table_re/{name}" in arrays:
            every = PositionGrid().positions((side, side))[None]
            cos, sin = signal(encoding, every, (side, side)).rotation
            close(cos[0, :, 0], arrays[f"out/rotary2d_table_re/{name}"], 2e-6, name)
            close(sin[0, :, 0], arrays[f"out/rotary2d_table_im/{name}"], 2e-6, name)


def mixed(arrays):
    for name, freqs in under(arrays, "param/mixed_freqs/").items():
        depth, heads, width, _ = numbers(name)
        encoding = make("rotary_mixed", heads * width, heads, depth, (4, 5), theta=10.0)
        positions_PLA = jnp.asarray(arrays[f"in/mixed_pos/{name}"], jnp.int32)[None]

        def weighted(params, encoding=encoding, positions_PLA=positions_PLA, name=name):
            rotation = encoding.apply({"params": params}, positions_PLA, shape=(4, 5)).rotation
            cos, sin = (part[:, 0].swapaxes(1, 2) for part in rotation)
            weights = arrays[f"in/mixed_w/{name}"]  # the stored gradient's scalar turns the layers around for the sines
            return (cos * weights + sin * weights[::-1]).sum(), (cos, sin)

        params = {"frequencies": jnp.asarray(mixed_rule(heads).to_ours(freqs))}
        (_, (cos, sin)), grads = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
        close(cos, arrays[f"out/mixed_re/{name}"], 2e-6, name)
        close(sin, arrays[f"out/mixed_im/{name}"], 2e-6, name)
        close(grads["frequencies"], mixed_rule(heads).to_ours(arrays[f"grad/mixed_freqs/{name}"]), 1e-5, name)


def rot(arrays):
    def compare(cos, sin, found):
        cos, sin = (jnp.swapaxes(part, 1, 2) for part in (cos, sin))
        for name, expected in found.items():
            rotated = rotate_pairs(jnp.swapaxes(arrays[f"in/{name}"], 1, 2), cos, sin)
            close(jnp.swapaxes(rotated, 1, 2), expected, 2e-6, name)

    sin, cos = np.split(arrays["in/rot_pe"], 2, axis=-1)
    compare(cos, sin, under(arrays, "out/rot_"))
    compare(arrays["in/rot2d_re"], arrays["in/rot2d_im"], under(arrays, "out/rot2d_"))


def interp(arrays):
    stretch = jax.jit(resize_table, static_argnums=(1, 2))
    for name, expected in under(arrays, "out/interp1d_").items():
        close(stretch(jnp.asarray(arrays["in/interp1d"]), (numbers(name)[1],), "linear"), expected, 2e-6, name)
    for name, expected in under(arrays, "out/interp2d_").items():
        table = jnp.asarray(arrays["in/interp2d"]).reshape(7, 7, -1)
        found = stretch(table, tuple(numbers(name)[2:]), "cubic" if name.startswith("bicubic") else "linear")
        close(found.reshape(1, -1, table.shape[-1]), expected, 2e-6, name)


def digits(arrays):
    for side, padding in ("left1", "left"), ("left0", "right"):
        for axes, name, count in ("", "digit_positions", 5), ("2d", "digit_positions2d", 3):
            positions_RA = jnp.asarray(arrays[f"in/{name}"], jnp.int32).reshape(len(arrays[f"in/{name}"]), -1)
            written = {"base": 10, "digits": count, "padding": padding}
            np.testing.assert_array_equal(to_digits(positions_RA, **written), arrays[f"out/digits{axes}_{side}"])
            np.testing.assert_array_equal(
                significant_mask(positions_RA, **written), arrays[f"out/padmask{axes}_{side}"] > 0
            )
    for limit, count in arrays["out/get_digit_num"]:
        assert count_digits(limit, 10) == count


def mask(arrays):
    """The masks that the encoder's blocks receive."""
    positions_RA = jnp.asarray(arrays["in/digit_positions"], jnp.int32)[:, None]
    for name, expected in under(arrays, "out/mask_").items():
        padded, cls = (bool(value) for value in numbers(name))
        config = SeqPEConfig(direction=name.split("_")[0], cls=cls, mask_padding=padded, digits=5)
        found = DigitEncoder(config, axes=1, output_width=2)._mask(positions_RA)
        np.testing.assert_array_equal(np.broadcast_to(found[:, 0], expected.shape), expected > 0, name)


def pos2d(arrays):
    np.testing.assert_array_equal(jnp.array([2, 3]) + PositionGrid().positions((3, 4)), arrays["out/pos2d_2_3_5_7"])


def pe_weight_schedule(arrays):
    for name, expected in under(arrays, "out/pe_weight_schedule/").items():
        warmup = int(name.split("warm")[1])
        for column, weight in enumerate(float(part) for part in re.findall(r"[a-z]([\d.]+)_", name)):
            settings = types.SimpleNamespace(weight=weight, warmup_steps=warmup)
            found = [term_weight(settings, step) for step in range(len(expected))]
            close(found, expected[:, column], 1e-6, name)


CHECKS = {
    sin: ("sin/",),
    rotary: ("rotary/",),
    sin2d: ("sin2d_",),
    rotary2d: ("rotary2d_",),
    mixed: ("mixed_",),
    rot: ("rot_", "rot2d_"),
    interp: ("interp",),
    digits: ("digits", "padmask", "get_digit_num"),
    mask: ("mask_",),
    pos2d: ("pos2d_",),
    pe_weight_schedule: ("pe_weight_schedule/",),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_table(check, arrays):
    check(arrays)


def test_every_array_has_a_check(arrays):
    prefixes = tuple(prefix for group in CHECKS.values() for prefix in group)
    outputs = [name for name in arrays if not name.startswith(("in/", "param/"))]
    assert outputs and all(name.partition("/")[2].startswith(prefixes) for name in outputs)
