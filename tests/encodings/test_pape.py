"""PaPE against the formula of its paper, written as a loop over pairs of tokens in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.config import ModelDims, PaPEConfig
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.inference.compiled import with_mesh
from seqpe_jax.models.attention import apply_position_signal, attend
from seqpe_jax.models.transformer import Block, TransformerConfig
from seqpe_jax.positions.grids import PositionGrid
from seqpe_jax.training.trainer import Trainer
from tests.tiny import ROOT, draw_params, random_params
from tests.training.test_image_commands import TINY

LAYERS, LAYER, HEADS, WIDTH, PARABOLAS = 2, 1, 3, 12, 2
KEY = jax.random.PRNGKey(0)


def weights_of_the_paper(tokens_LD, coordinates, params, directions, position_heads):
    """The attention weights [H, L, L]; coordinates: of each token, None = it has no position (the class token)."""
    scale, bias = (np.asarray(params["norm_1"][name], np.float64) for name in ("scale", "bias"))
    spread = np.sqrt(tokens_LD.var(axis=-1, keepdims=True) + 1e-5)
    hidden = (tokens_LD - tokens_LD.mean(axis=-1, keepdims=True)) / spread * scale + bias
    kernel, bias = (np.asarray(params["qkv"][name], np.float64) for name in ("kernel", "bias"))
    qkv = np.einsum("ld,dphk->lphk", hidden, kernel) + bias
    shape = np.einsum("ld,dshm->lshm", hidden, np.asarray(params["parabola_shape"]["kernel"], np.float64))
    weights = np.zeros((HEADS, len(hidden), len(hidden)))
    for h, i, j in np.ndindex(weights.shape):
        logit = qkv[i, 0, h] @ qkv[j, 1, h]
        if coordinates[i] is not None and coordinates[j] is not None and h < position_heads:
            for m in range(PARABOLAS):
                here, there = (np.dot(coordinates[token], directions[:, h, m]) for token in (i, j))
                a, b = math.log1p(math.exp(shape[i, 0, h, m])), shape[i, 1, h, m]
                logit += -a * (here - there) ** 2 + b * (here - there)
        weights[h, i, j] = logit / math.sqrt(WIDTH // HEADS)
    weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("shape, fraction_digits, position_heads", [((2, 3), 1, 0), ((2, 2, 2), 0, 2)])
def test_attention_equals_the_paper(shape, fraction_digits, position_heads):
    """On images and videos, between whole positions too, also in some heads alone, as a whole and by blocks."""
    own = PaPEConfig(parabolas=PARABOLAS, fraction_digits=fraction_digits, position_heads=position_heads)
    encoding = own.build(ModelDims(LAYERS, WIDTH, HEADS, shape, prefix_tokens=1))
    draw, unit = np.random.default_rng(0), 10**fraction_digits
    units = np.stack([PositionGrid(unit).positions(shape), draw.integers(0, 3 * unit, (math.prod(shape), len(shape)))])
    units_PLA = jnp.asarray(units, jnp.int32)
    variables = draw_params(jax.eval_shape(lambda: encoding.init(KEY, units_PLA, shape=shape)), 0.5)
    signal = jax.jit(functools.partial(encoding.apply, shape=shape))(variables, units_PLA)  # of two position sets
    sizes = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "parabolas": PARABOLAS, "causal": False}
    block = Block(TransformerConfig(**sizes))
    tokens = draw.normal(size=(4, 1 + math.prod(shape), WIDTH))
    inputs = jnp.asarray(tokens, jnp.float32), signal.at_layer(LAYER)
    params = draw_params(jax.eval_shape(block.init, KEY, *inputs), 0.5)
    found = jax.jit(functools.partial(block.apply, method="attention_weights"))(params, *inputs)
    directions = np.asarray(variables["params"]["directions"][LAYER], np.float64)
    for sample in range(4):
        coordinates = [None, *(units[sample % 2] / unit)]
        expected = weights_of_the_paper(
            tokens[sample], coordinates, params["params"], directions, position_heads or HEADS
        )
        np.testing.assert_allclose(found[sample], expected, atol=1e-5)
    reference, blocks = (
        jax.jit(Block(TransformerConfig(**sizes, attention_kind=kind, attention_block=block)).apply)(params, *inputs)
        for kind, block in (("reference", 0), ("blockwise", 4))
    )
    np.testing.assert_allclose(blocks, reference, atol=1e-5)


def test_a_signal_with_parabolas_is_no_input_of_attention_functions():
    """They would leave the positions out: what the tokens say is not known to them."""
    array = jnp.ones((1, 2, HEADS, 4))
    signal = PositionSignal(parabola=(array, jnp.ones((1, 2, 1, 1))))
    for function in (attend, apply_position_signal):
        with pytest.raises(InputError, match="depends on the queries' tokens: replace signal.parabola"):
            function(array, array, array, signal)


def gradients(settings, devices):
    """Logits of a model, and the gradients of their squares, by name."""
    run = Trainer.of(settings, devices)
    params = random_params(run, 0.3)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)

    def found(params):
        logits = run.model_spec.logits(params, images)
        return (logits**2).mean(), logits

    (_, logits), slopes = jax.jit(with_mesh(run.mesh, jax.value_and_grad(found, has_aux=True)))(params)
    return logits, slopes


@pytest.mark.slow
def test_a_mesh_equals_the_plain_form():
    """Gradients too, of the coordinates and of the parabolas' shapes."""
    values = {name: value for name, value in TINY.items() if not name.startswith(("encoding", "objective"))}
    values |= {"model.layers": 2, "precision.compute": "float32", "encoding.parabolas": 3}
    page = f"{ROOT}/configs/digits_vit.py:pape"
    expected = gradients(config.load(page, values), jax.devices()[:1])
    split = {"mesh.data": 2, "mesh.context": 2, "mesh.tensor": 2, "model.attention_kind": "blockwise"}
    found = gradients(config.load(page, values | split | {"model.attention_block": 8}), jax.devices())
    assert np.abs(expected[1]["encoding"]["directions"]).max() > 0
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5 * max(1.0, float(np.abs(other).max())))
