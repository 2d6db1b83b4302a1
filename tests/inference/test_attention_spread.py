"""How far and how evenly heads attend: closed forms of equal attention, and of a head that looks back by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.distributed.sharding import make_mesh
from seqpe_jax.inference import attention_spread
from seqpe_jax.inference.compiled import CompiledModel
from seqpe_jax.models.build import DataSpec, ModelSpec
from tests.tiny import ROOT, draw_params, tiny_config


def compiled_without_content(settings, data_spec):
    """A model whose queries and keys are 0, so that it attends equally to all keys."""
    spec = ModelSpec.of(settings, data_spec)
    params = draw_params(spec.shapes, 0.2)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0.0 * leaf if any(getattr(key, "key", "") == "qkv" for key in path) else leaf, params
    )
    return CompiledModel(spec, make_mesh(1, 1, devices=jax.devices()[:1])), params


@pytest.mark.slow
def test_equal_attention_of_a_text_in_stacked_layers():
    """A query at q is q / 2 tokens from its q + 1 keys on average; the second half of twelve are at 6 to 11."""
    compiled, params = compiled_without_content(
        tiny_config(variant="none", model__layers=2, model__scan=True), DataSpec(vocabulary=9)
    )
    spread, weights = compiled.attention_spread(params, np.arange(12, dtype=np.int32) % 9)
    queries = np.arange(6, 12)
    assert weights is None and spread["distance"].shape == spread["entropy"].shape == (2, 2)
    np.testing.assert_allclose(spread["distance"], queries.mean() / 2, rtol=1e-5)
    np.testing.assert_allclose(spread["entropy"], np.log(queries + 1).mean(), rtol=1e-5)
    long, _ = compiled.attention_spread(params, np.zeros(attention_spread.MAX_TOKENS + 8, np.int32))
    assert long["distance"].max() == pytest.approx((attention_spread.MAX_TOKENS * 3 / 4 - 0.5) / 2, rel=1e-5)


def test_equal_attention_of_an_image_leaves_the_class_token_out_of_distances():
    values = {"model.layers": 1, "model.width": 24, "model.heads": 2, "data.size": (4, 8), "eval.sizes": (4,)}
    settings = config.load(f"{ROOT}/configs/digits_vit.py:none", values)
    compiled, params = compiled_without_content(settings, DataSpec(classes=3, channels=1, mean=(0.5,), std=(0.5,)))
    spread, weights = compiled.attention_spread(params, np.zeros((2, 4, 8, 1), np.float32))
    places = np.stack(np.meshgrid(np.arange(2), np.arange(4), indexing="ij"), -1).reshape(8, 2)
    between = np.linalg.norm(places[:, None] - places, axis=-1)
    np.testing.assert_allclose(spread["distance"], np.full((1, 2), between.mean()), rtol=1e-5)
    np.testing.assert_allclose(spread["entropy"], np.log(9), rtol=1e-5)
    np.testing.assert_allclose(weights, np.full((2, 2, 2, 4), 1 / 9), rtol=1e-5)


def test_a_head_that_looks_back_by_one_has_distance_one_and_no_entropy():
    distance_LS = attention_spread.distances_between((6,), 0)
    weights_BHLS = jnp.eye(6, k=-1)[None, None]
    found = attention_spread.measure(distance_LS, np.arange(6) > 0, with_weights=False)(weights_BHLS)
    assert found.distance_H.tolist() == [1.0] and found.entropy_H.tolist() == [0.0] and found.weights_BHS.size == 0
