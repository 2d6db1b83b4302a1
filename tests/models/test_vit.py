"""The vision transformer: patches, videos, non-square images, attention, stochastic depth."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.config import ModelDims, RotaryAxialConfig
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.encodings.rope import RotaryAxial
from seqpe_jax.errors import InputError
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.models.transformer import Block, TransformerConfig
from seqpe_jax.models.vit import ViT, extract_patches
from seqpe_jax.positions.grids import PositionGrid
from tests.tiny import draw_params

pytestmark = pytest.mark.slow

KEY = jax.random.PRNGKey(0)
CLASSES, LAYERS, WIDTH, HEADS, PATCH, GRID = 5, 2, 8, 2, (2, 3), (2, 3)
IMAGES = jax.random.normal(KEY, (4, 4, 9, 3))  # not square, and neither are the patches
NOTHING = PositionSignal()


def model_of(**fields) -> ViT:
    patch = fields.pop("patch", PATCH)
    return ViT(config_of(**fields), CLASSES, patch)


def config_of(**fields) -> TransformerConfig:
    sizes = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "init_std": 0.5}
    return TransformerConfig(**(sizes | {"activation": "gelu", "layer_norm_epsilon": 1e-6} | fields))


def signal_of(shape) -> PositionSignal:
    encoding = RotaryAxial(RotaryAxialConfig(theta=100.0), ModelDims(1, WIDTH, HEADS, prefix_tokens=1))
    return encoding.apply({}, PositionGrid().positions(shape)[None], shape=shape)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, images, signal):
    return model.apply(params, images, signal)


@pytest.fixture(scope="module")
def params():
    return draw_params(jax.eval_shape(model_of().init, KEY, IMAGES, NOTHING), 0.5)


def test_patches_against_a_loop():
    for sides, patch in ((4, 9), (2, 3)), ((4, 2, 6), (2, 1, 3)), ((6,), (2,)):
        images = np.random.default_rng(0).normal(size=(2, *sides, 3))
        found = extract_patches(jnp.asarray(images, jnp.float32), patch)
        corners = itertools.product(*(range(0, side, part) for side, part in zip(sides, patch, strict=True)))
        for index, corner in enumerate(corners):
            box = tuple(slice(first, first + part) for first, part in zip(corner, patch, strict=True))
            np.testing.assert_allclose(found[:, index], images[(slice(None), *box)].reshape(2, -1), rtol=1e-6)
        assert found.shape[1] == index + 1


@pytest.mark.parametrize(("sides", "patch"), [((4, 8), (2, 3)), ((4, 9), (2, 3, 1)), ((2, 4, 9), (2, 3))])
def test_images_that_do_not_divide_are_refused(sides, patch):
    with pytest.raises(InputError, match=f"images of {' x '.join(map(str, sides))} do not divide into patches"):
        extract_patches(jnp.zeros((1, *sides, 3)), patch)


def test_every_patch_reaches_the_class_and_only_its_own_sample(params):
    plain, signal = logits(model_of(), params, IMAGES, signal_of(GRID)), signal_of(GRID)
    assert plain.shape == (4, CLASSES) and plain.dtype == jnp.float32
    for row, column in np.ndindex(*GRID):
        changed = IMAGES.at[1, 2 * row, 3 * column, 0].add(1.0)
        moved = np.abs(logits(model_of(), params, changed, signal) - plain).max(axis=1)
        assert moved[1] > 1e-3 and (moved[[0, 2, 3]] == 0).all()


def test_without_positions_patches_have_no_order(params):
    mirrored = IMAGES.reshape(4, 2, 2, 9, 3)[:, ::-1].reshape(IMAGES.shape)  # whole rows of patches change order
    plain = logits(model_of(), params, IMAGES, NOTHING)
    np.testing.assert_allclose(logits(model_of(), params, mirrored, NOTHING), plain, atol=1e-4)
    rotated = [logits(model_of(), params, images, signal_of(GRID)) for images in (IMAGES, mirrored)]
    assert np.abs(rotated[0] - rotated[1]).max() > 1e-2


def test_videos():
    videos = jax.random.normal(KEY, (2, 4, 4, 9, 1))
    model, signal = model_of(patch=(2, *PATCH), width=12, layers=1), PositionSignal()
    params = draw_params(jax.eval_shape(model.init, KEY, videos, signal), 0.5)
    assert params["params"]["projection"]["kernel"].shape == (2 * 2 * 3, 12)
    plain = logits(model, params, videos, signal)
    assert np.abs(logits(model, params, videos.at[:, 3, 3, 8].add(1.0), signal) - plain).max() > 1e-3
    dims = ModelDims(1, 12, HEADS, prefix_tokens=1)  # one pair for each of three axes
    encoding = RotaryAxial(RotaryAxialConfig(theta=100.0), dims)
    positions_PLA = PositionGrid().positions((2, *GRID))[None]
    placed = logits(model, params, videos, encoding.apply({}, positions_PLA, shape=(2, *GRID)))
    assert np.abs(placed - plain).max() > 1e-3


def test_larger_images_read_the_same_weights(params):
    images = jax.random.normal(KEY, (1, 6, 12, 3))
    assert logits(model_of(), params, images, signal_of((3, 4))).shape == (1, CLASSES)


def test_attention_weights_are_those_of_the_last_layer(params):
    """They mix the last layer's values into what its output projection read."""
    signal = signal_of(GRID)
    weights = jax.jit(
        lambda: model_of().apply(params, IMAGES, signal, lambda of_layer: of_layer, method="attention")
    )()[-1]
    assert weights.shape == (4, HEADS, 7, 7) and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    assert (weights > 0).all()  # nothing is hidden from anybody
    last = f"blocks_{LAYERS - 1}"

    def seen(module, method):
        return module.path in ((last, "qkv"), (last, "out"))

    _, state = model_of().apply(params, IMAGES, signal, capture_intermediates=seen)
    between = state["intermediates"][last]
    value = np.asarray(between["qkv"]["__call__"][0])[:, :, 2]
    mixed = np.einsum("bhls,bshk->blhk", weights, value)
    out = params["params"][last]["out"]
    expected = np.einsum("blhk,hkd->bld", mixed, out["kernel"]) + out["bias"]
    np.testing.assert_allclose(expected, between["out"]["__call__"][0], atol=1e-5)


def block_of(rate: float) -> Block:
    return Block(config_of(layers=1, mlp_width=WIDTH, causal=False, scale_residual=False), rate)


def test_drop_path_leaves_out_whole_branches_of_single_samples():
    rate, samples = 0.25, 2000
    x_BLD = jnp.broadcast_to(jax.random.normal(KEY, (1, 2, WIDTH)), (samples, 2, WIDTH))
    variables = draw_params(jax.eval_shape(block_of(rate).init, KEY, x_BLD, NOTHING), 0.5)
    for name in ("mlp_out", "out"):  # one branch at a time: the other adds nothing
        params = dict(variables["params"])
        params[name] = jax.tree.map(jnp.zeros_like, params[name])

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def branch(rate, deterministic, params=params):
            keys = {"dropout": jax.random.PRNGKey(1)}
            return block_of(rate).apply({"params": params}, x_BLD, NOTHING, deterministic, rngs=keys) - x_BLD

        whole, dropped = branch(rate, True), branch(rate, False)
        np.testing.assert_array_equal(whole, branch(0.0, False))
        live = np.abs(dropped).max(axis=(1, 2)) > 0
        assert live.mean() == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / samples) ** 0.5)
        np.testing.assert_allclose(dropped[live], whole[live] / (1 - rate), rtol=1e-3, atol=1e-5)


def test_drop_path_grows_with_depth(params):
    def rates(layers=3, **fields):
        return [block.drop_path for block in model_of(layers=layers, **fields).bind(params).blocks]

    assert rates(drop_path=0.3) == pytest.approx([0.0, 0.15, 0.3]) and rates() == [0.0] * 3
    assert rates(drop_path=0.3, layers=1) == [0.0]


@pytest.mark.parametrize("rate", ["embedding_dropout", "drop_path"])
def test_each_rate_acts_only_in_training(rate, params):
    model = model_of(layers=2 if rate == "drop_path" else 1, **{rate: 0.5})  # the first block drops no path

    @functools.partial(jax.jit, static_argnums=0)
    def features(deterministic, seed):
        keys = {"dropout": jax.random.PRNGKey(seed)}
        return model.apply(params, IMAGES, NOTHING, deterministic, method="features", rngs=keys)

    np.testing.assert_array_equal(features(True, 0), features(True, 1))
    assert np.abs(features(False, 0) - features(True, 0)).max() > 1e-3


def test_initial_weights():
    images = jnp.zeros((1, 8, 8, 3))
    model = model_of(width=64, patch=(4, 4), init_std=0.02, layers=1)
    params = jax.jit(lambda: model.init(KEY, images, NOTHING))()["params"]
    for name in ("qkv", "out", "mlp_in", "mlp_out"):  # residual projections are no smaller
        assert float(params["blocks_0"][name]["kernel"].std()) == pytest.approx(0.02, rel=0.05)
    kernel = params["projection"]["kernel"]
    assert float(jnp.abs(kernel).max()) == pytest.approx(48**-0.5, rel=0.01)  # 4 x 4 x 3 values
    assert float(kernel.std()) == pytest.approx((3 * 48) ** -0.5, rel=0.05)
    assert float(params["class_token"].std()) == pytest.approx(0.02, rel=0.3)


def test_bfloat16_arithmetic_keeps_float32_parameters_and_logits(params):
    model, signal = model_of(dtype=jnp.bfloat16), signal_of(GRID)
    found, exact = logits(model, params, IMAGES, signal), logits(model_of(), params, IMAGES, signal)
    assert found.dtype == jnp.float32
    assert jax.eval_shape(lambda: model.apply(params, IMAGES, signal, method="features")).dtype == jnp.bfloat16
    np.testing.assert_allclose(found, exact, atol=0.05 * np.abs(exact).max())
    fresh = jax.eval_shape(model.init, KEY, IMAGES, signal)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_blocks_of_images_have_the_parts_of_a_config():
    parts = {"model.norm": "rms_norm", "model.norm_placement": "both", "model.mlp": "swiglu", "model.bias": "none"}
    parts |= {"model.kv_heads": 1, "model.qk_norm": "head", "model.residual": "parallel", "model.attention_cap": 5.0}
    model_spec = ModelSpec.of(
        config.load("configs/digits_vit.py:rotary_axial", parts), DataSpec(classes=10, channels=1)
    )
    block = {name: set(part) for name, part in model_spec.shapes["model"]["blocks_0"].items()}
    maps, norms = "q kv out mlp_in mlp_gate mlp_out", "norm_1 norm_2 post_norm_1 post_norm_2 q_norm k_norm"
    assert block == dict.fromkeys(maps.split(), {"kernel"}) | dict.fromkeys(norms.split(), {"scale"})
    traced = jax.make_jaxpr(model_spec.logits)(model_spec.shapes, model_spec.inputs)
    assert traced.out_avals[0].shape == (1, 10) and str(traced).count("tanh") == model_spec.network.config.layers
