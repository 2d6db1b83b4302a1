"""The training loss: its terms computed by hand, dropout masks, and its floating-point operations."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from seqpe_jax.distributed import sharding as layout
from seqpe_jax.models.build import dropout_key
from seqpe_jax.training.trainer import Trainer
from tests.tiny import random_params, tiny_config

LOGITS = {"objective__contrastive__space": "logits", "objective__distillation__weight": 0.0, "model__layers": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("scales", "floor"), [((1.0, 4.0), 0.0), ((), 0.0), ((1.0, 4.0), 3.0)])
def test_contrastive_logits_have_a_scale_per_head(scales, floor):
    fields = {"encoding__qk": "multi", "model__heads": 3, "encoding__position_heads": 2, "encoding__feature_width": 5}
    fields |= LOGITS | {"objective__contrastive__scale": 1.5, "encoding__scalar_scale": 10.0}
    fields |= {"objective__contrastive__head_scales": scales, "objective__contrastive__floor": floor}
    run = Trainer.of(tiny_config(**fields), jax.devices()[:1])
    train_loss, params = run.train_loss, random_params(run, 0.5)["encoding"]
    sampled = jax.jit(train_loss.sample)(jax.random.PRNGKey(2), 5)

    @jax.jit
    def terms_and_vectors(params):
        terms = train_loss.signal_and_terms(params, sampled, jax.random.PRNGKey(0), True)[1]
        pairs = sampled.contrastive.anchors_BA, sampled.contrastive.candidates_BCA.reshape(-1, 1)
        return terms, [
            train_loss.model_spec.encoding.apply({"params": params}, part, method="vectors") for part in pairs
        ]

    terms, (anchors_BE, candidates_RE) = terms_and_vectors(params)
    kernel, bias = (np.asarray(params["qk_map"][name], np.float64) for name in ("kernel", "bias"))
    batch, labels, losses = len(anchors_BE), np.asarray(sampled.contrastive.labels_B), []
    for layer, head, anchor in np.ndindex(2, 2, batch):
        columns = slice(5 * head, 5 * head + 5)
        query = (np.asarray(anchors_BE[anchor]) @ kernel[layer] + bias[layer])[:10][columns]
        near = np.asarray(candidates_RE).reshape(batch, -1, 24)[anchor]
        keys = (near @ kernel[layer] + bias[layer])[:, 10:][:, columns]
        logits = 1.5 * (scales[head] if scales else 1.0) * 10.0 * keys @ query / np.sqrt(24 // 3)
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[labels[anchor]])
    assert np.ptp(losses) > 0.1 and min(losses) < 3.0 < max(losses)
    assert float(terms["contrastive"]) == pytest.approx(np.mean(np.maximum(losses, floor)), rel=1e-4)


def mask(bits, sharding=None):
    """Dropout mask of an array with a sharding."""
    drop = nn.Dropout(0.5, deterministic=False)

    def drawn(key):
        ones = (
            jax.lax.with_sharding_constraint(jax.numpy.ones((8, 4, 16)), sharding) if sharding else np.ones((8, 4, 16))
        )
        return drop.apply({}, ones, rngs={"dropout": dropout_key(key, bits)})

    return np.asarray(jax.jit(drawn)(jax.random.PRNGKey(3))) > 0


@pytest.mark.parametrize("bits", ["threefry", "rbg"])
def test_dropout_masks_do_not_depend_on_the_sharding(bits):
    """With rbg only on CPU and GPU, where each device generates the complete mask; on TPU each generates its part."""
    alone, meshes = mask(bits), ((8, 1, 1), (2, 2, 2))
    assert 0.4 < alone.mean() < 0.6 and len({row.tobytes() for row in alone}) == 8
    for data, fsdp, context in meshes:
        mesh = layout.make_mesh(data, fsdp, context)
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(layout.BATCH_AXES, "context"))
        np.testing.assert_array_equal(mask(bits, sharding), alone)


def test_the_generator_of_random_bits_changes_dropout_masks_only():
    assert (mask("threefry") != mask("rbg")).mean() > 0.3
    ours, auto = (Trainer.of(tiny_config(precision__random_bits=bits), jax.devices()[:1]) for bits in ("rbg", "auto"))
    assert (ours.train_loss.random_bits, auto.train_loss.random_bits) == ("rbg", "threefry"), "a CPU's default"
    assert auto.config.precision.random_bits == "threefry", "config.json says which"
    key = jax.random.PRNGKey(1)
    sampled = [jax.jit(run.train_loss.sample)(key, 5) for run in (ours, auto)]
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, sampled), strict=True)), "positions stay"
    keys = [run.train_loss._dropout_key(key, "model dropout") for run in (ours, auto)]
    assert "rbg" in str(keys[0].dtype) and keys[1].shape == (2,)


LENGTH, BATCH, WIDTH, HEADS, VOCABULARY = 16, 8, 24, 2, 256  # of the tiny config
# Forward FLOPs of a token: projections and MLP of a layer 24 W^2, its attention 4 L W, logits 2 W V.
LAYER_FLOPS, LOGIT_FLOPS = 24 * WIDTH**2 + 4 * LENGTH * WIDTH, 2 * WIDTH * VOCABULARY
# Three digits and CLS, one layer whose output is CLS alone: keys and values of all, the rest of CLS, the projection.
POSITION_FLOPS = 4 * 6 * WIDTH**2 + 18 * WIDTH**2 + 4 * 4 * WIDTH + 2 * WIDTH**2
WITHOUT_LOSSES = {"objective.contrastive.weight": 0.0, "objective.distillation.weight": 0.0}


def flops_per_step(**overrides) -> float:
    trainer = Trainer.of(tiny_config(**overrides))
    return trainer.train_loss.step_flops(trainer.task.example, BATCH)


@pytest.mark.parametrize(
    "overrides", [{}, {"model.attention_kind": "blockwise", "model.scan": True, "model.remat": "full"}]
)
def test_flops_of_a_network_are_three_times_its_forward_products(overrides):
    """With any attention backend, with and without a loop over layers and recomputation."""
    overrides = {"variant": "rotary", "model.layers": 2} | overrides
    assert flops_per_step(**overrides) == 3 * BATCH * LENGTH * (2 * LAYER_FLOPS + LOGIT_FLOPS)


def test_flops_of_the_position_encoder_its_losses_and_logit_biases():
    parts = {"encoding.share_prefixes": False, "encoding.feature_width": 4}
    maps = 2 * WIDTH * 2 * HEADS * 4  # a vector's queries and keys, four features wide
    windows = LENGTH * (POSITION_FLOPS + maps) + 2 * LENGTH**2 * HEADS * 4  # features' logits, once for all examples
    model = BATCH * LENGTH * (LAYER_FLOPS + LOGIT_FLOPS) + windows
    assert flops_per_step(**parts, **WITHOUT_LOSSES) == 3 * model
    contrastive = (4 + 4 * 6) * (POSITION_FLOPS + maps) + 2 * 4 * 6 * HEADS * 4  # four anchors, six candidates each
    distillation = 4 * 6 * POSITION_FLOPS + 2 * 2 * 4 * 6 * 6 * WIDTH  # four windows of six, similarities of both sides
    assert flops_per_step(**parts) == 3 * (model + contrastive + distillation)
