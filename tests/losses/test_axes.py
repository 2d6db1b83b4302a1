"""Positions with one to four axes: the same encoder, sampling, losses and model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import (
    ContrastiveConfig,
    DistillationConfig,
    MixingConfig,
    ModelDims,
    ObjectiveConfig,
    SeqPEConfig,
    ShiftConfig,
)
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.losses.task import ClassificationLoss
from seqpe_jax.losses.train_loss import TrainLoss
from seqpe_jax.models.build import ModelSpec
from seqpe_jax.models.transformer import TransformerConfig
from seqpe_jax.models.vit import ViT
from tests.tiny import draw_params

pytestmark = pytest.mark.slow

SHAPES = [(6,), (3, 2), (2, 3, 2), (2, 1, 2, 2)]


def train_loss(shape):
    settings = ObjectiveConfig(
        contrastive=ContrastiveConfig(batch=3, candidates=4, mixture=(0.3, 0.3, 0.4), window=3),
        distillation=DistillationConfig(batch=2, offsets=4),
        shift=ShiftConfig(rate=0.5, sets=2),
    )
    config = SeqPEConfig(mode="attn_mul", qk="multi", digits=2, layers=1, width=8, heads=2, init_std=0.5)
    encoding = SeqPE(config, ModelDims(layers=1, width=8, heads=2, grid=shape, prefix_tokens=1))
    network = ViT(TransformerConfig(layers=1, width=8, heads=2), classes=3, patch=(1,) * len(shape))
    inputs = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    model_spec = ModelSpec(encoding, network, inputs, shape, 20, heads=2)
    return TrainLoss(model_spec, ClassificationLoss(0.0, MixingConfig()), settings)


@functools.cache
def parameters(shape):
    return draw_params(train_loss(shape).model_spec.shapes, 0.5)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[-1]], ids=lambda shape: f"{len(shape)}-D")
def test_positions_of_any_number_of_axes(shape):
    parts = train_loss(shape)
    params = parameters(shape)
    images = jax.random.normal(jax.random.PRNGKey(1), (4, *shape, 1))
    batch = {"images": images, "labels": jnp.array([0, 1, 2, 0])}
    gradient = jax.jit(jax.value_and_grad(parts.loss, has_aux=True))
    seen = {}
    for step in range(8):
        (_, metrics), grads = gradient(params, batch, jax.random.PRNGKey(2), jnp.int32(step))
        metrics = {name: float(value) for name, value in metrics.items()}
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["term/contrastive"] > 0
        seen.setdefault(metrics["moved"], []).append(metrics["term/distillation"])
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["encoding"]["encoder"]["digit_embedding"]))
    assert set(seen) == {0.0, 1.0}
    assert all(value > 0 for value in seen[0.0]) and not any(seen[1.0])


def test_several_axes_add_one_parameter():
    def names(shape):
        params = jax.eval_shape(train_loss(shape).model_spec.init, jax.random.PRNGKey(0))["encoding"]
        return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}

    for shape in SHAPES[1:]:
        assert names(shape) - names(SHAPES[0]) == {"['encoder']['axis_embedding']"}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}-D")
def test_each_coordinate_counts(shape):
    parts = train_loss(shape)
    params = parameters(shape)
    axes = len(shape)
    positions_RA = jnp.concatenate([jnp.full((1, axes), 3), 3 + jnp.eye(axes, dtype=jnp.int32)])
    vectors = jax.jit(functools.partial(parts.model_spec.encoding.apply, method="vectors"))
    vectors_RE = np.asarray(vectors({"params": params["encoding"]}, positions_RA))
    distances = np.linalg.norm(vectors_RE[:, None] - vectors_RE[None], axis=-1)
    assert (distances[~np.eye(axes + 1, dtype=bool)] > 1e-3).all()
