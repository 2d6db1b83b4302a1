"""What attention gains by distance: closed forms, and the attention of queries and keys without content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.distributed.sharding import make_mesh
from seqpe_jax.encodings.relative_bias import alibi_slopes
from seqpe_jax.inference import position_curves
from seqpe_jax.inference.compiled import CompiledModel
from seqpe_jax.models.attention import attention_weights
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.positions.grids import PositionGrid
from tests.encodings.test_relative_bias import HEADS, LAYERS, WIDTH, make
from tests.tiny import draw_params, tiny_config

DISTANCES = np.arange(24)


def signal_of(kind, shape=(24,), prefix_tokens=0, **fields):
    """The signal of all layers with random parameters."""
    module = make(kind, shape, prefix_tokens, **fields)
    positions_PLA = jnp.asarray(PositionGrid().positions(shape))[None]
    variables = jax.eval_shape(lambda: module.init(jax.random.PRNGKey(0), positions_PLA, shape=shape))
    return module.apply(draw_params(variables, 0.5, 3), positions_PLA, shape=shape)


def terms_of(signal, shape, prefix_tokens=0):
    query, keys = position_curves.query_and_keys(shape, prefix_tokens)
    return position_curves.position_terms(signal, query, keys, LAYERS, HEADS)


@pytest.mark.slow
def test_alibi_falls_by_its_slopes_and_a_rotation_by_its_cosines():
    assert position_curves.distances_of((24,)).tolist() == DISTANCES.tolist()
    terms = terms_of(signal_of("alibi"), (24,))
    assert terms.keys() == {"logit"}
    expected = np.broadcast_to(-alibi_slopes(HEADS)[:, None] * DISTANCES, (LAYERS, HEADS, 24))
    np.testing.assert_allclose(terms["logit"], expected, atol=1e-5)
    terms = terms_of(signal_of("rotary", theta=100.0, rotary_pairs=0), (24,))
    assert terms.keys() == {"kernel"}
    angles = DISTANCES[:, None] * 100.0 ** (-2 * np.arange(WIDTH // 2) / WIDTH)
    np.testing.assert_allclose(terms["kernel"], np.broadcast_to(np.cos(angles).mean(1), (LAYERS, HEADS, 24)), atol=1e-5)
    polar = terms_of(signal_of("pope"), (24,))["kernel"]
    assert np.abs(polar).max() <= 1 + 1e-6 and not np.allclose(polar[0], polar[1])
    assert terms_of(signal_of("sinusoidal"), (24,)) == {}
    some = terms_of(signal_of("alibi").for_layers((False, True, True)[:LAYERS]), (24,))
    assert (some["logit"][0] == 0).all()
    np.testing.assert_allclose(some["logit"][1:], expected[1:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("kerple", {}),
        ("scale_invariant", {}),
        ("seqpe", {"mode": "attn_scalar", "qk": "multi", "position_heads": 3}),
        ("seqpe", {"mode": "attn_add", "qk": "multi"}),
    ],
)
def test_attention_without_content_is_the_softmax_of_the_curve(kind, fields):
    sizes = {"width": 16, "heads": 2, "layers": 1, "max_position": 99} if kind == "seqpe" else {}
    signal = signal_of(kind, **fields, **sizes)
    logits = terms_of(signal, (24,))["logit"]
    content = jnp.zeros((1, 24, HEADS, WIDTH))
    for layer in range(LAYERS):
        weights = attention_weights(content, content, signal.at_layer(layer), causal=True)
        np.testing.assert_allclose(jax.nn.softmax(logits[layer]), weights[0, :, -1, ::-1], atol=1e-5)
    assert np.abs(logits).max() > 0.1


@pytest.mark.slow
def test_a_map_surrounds_the_patch_at_the_centre():
    """Keys that a directed head does not see are marked; the class token is no part of a map; a video's frames neither."""
    distances = position_curves.distances_of((5, 6))
    assert distances.shape == (5, 6) and distances[2, 3] == 0 and distances[0, 0] == pytest.approx(13**0.5)
    found = terms_of(signal_of("alibi_grid", (5, 6), 1), (5, 6), 1)["logit"].reshape(LAYERS, HEADS, 5, 6)
    np.testing.assert_allclose(found[0], -alibi_slopes(HEADS)[:, None, None] * distances, rtol=1e-5)
    seen = np.isfinite(terms_of(signal_of("lookhere", (5, 6), 1, directed_heads=4), (5, 6), 1)["logit"])
    assert seen[..., 15].all() and 0.2 < seen.mean() < 0.9
    query, keys = position_curves.query_and_keys((3, 2, 4), 1)
    assert (query, keys.tolist()) == (1 + 8 + 4 + 2, list(range(9, 17)))


def test_gates_that_let_one_share_through_multiply():
    """Of stacked layers, which are run one by one to read their gates."""
    settings = tiny_config(variant="fox", model__layers=2, model__scan=True, encoding__rotary_pairs=0)
    spec = ModelSpec.of(settings, DataSpec(vocabulary=9))
    params = draw_params(spec.shapes, 0.2)
    gates = params["model"]["blocks"]["layers"]["fading"]
    gates |= {"kernel": 0.0 * gates["kernel"], "bias": jnp.array([[2.0, -1.0]] * 2)}
    compiled = CompiledModel(spec, make_mesh(1, 1, devices=jax.devices()[:1]))
    found = compiled.position_curves(params, (24,), np.arange(20) % 9)
    assert found.keys() == {"distances", "gate"}
    expected = (1 / (1 + np.exp([[-2.0], [1.0]]))) ** DISTANCES[:20]
    np.testing.assert_allclose(found["gate"][..., :20], np.broadcast_to(expected, (2, 2, 20)), rtol=1e-4)
    assert np.isnan(found["gate"][..., 20:]).all(), "no token of the text is so far from another"
    assert compiled.position_curves(params, (24,)) is None


def test_the_mean_product_of_gates_is_over_all_queries():
    gates = np.random.default_rng(0).uniform(0.2, 1.0, (7,))
    found = position_curves.mean_gate_products(jnp.log(gates)[None, :, None], jnp.arange(7))
    expected = [np.mean([np.prod(gates[q - d + 1 : q + 1]) for q in range(d, 7)]) for d in range(7)]
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-5)
