"""FLOPs of a training step are those of formulas written out, with the position encoder, its losses and its features."""

import pytest

from seqpe_jax.training.trainer import Trainer
from tests.tiny import tiny_config

LENGTH, BATCH, WIDTH, HEADS, VOCABULARY = 16, 8, 24, 2, 256
# Forward, of a token: projections and MLP of a layer 24 W^2, its attention 4 L W, logits 2 W V.
LAYER, LOGITS = 24 * WIDTH**2 + 4 * LENGTH * WIDTH, 2 * WIDTH * VOCABULARY
# Three digits and CLS, one layer, of which CLS alone is read: keys and values of all, the rest of CLS, the projection.
POSITION = 4 * 6 * WIDTH**2 + 18 * WIDTH**2 + 4 * 4 * WIDTH + 2 * WIDTH**2
WITHOUT_LOSSES = {"objective.contrastive.weight": 0.0, "objective.distillation.weight": 0.0}


def flops_per_step(**overrides) -> float:
    trainer = Trainer.of(tiny_config(**overrides))
    return trainer.train_loss.step_flops(trainer.task.example, BATCH)


@pytest.mark.parametrize(
    "overrides", [{}, {"model.attention_kind": "blockwise", "model.scan": True, "model.remat": "full"}]
)
def test_a_network_needs_three_times_its_forward_products(overrides):
    """Whichever attention runs, in a loop over layers or not, and whatever is computed again."""
    overrides = {"variant": "rotary", "model.layers": 2} | overrides
    assert flops_per_step(**overrides) == 3 * BATCH * LENGTH * (2 * LAYER + LOGITS)


def test_the_position_encoder_its_losses_and_its_features_count():
    parts = {"encoding.share_prefixes": False, "encoding.feature_width": 4}
    maps = 2 * WIDTH * 2 * HEADS * 4  # a vector's queries and keys, four features wide
    windows = LENGTH * (POSITION + maps) + 2 * LENGTH**2 * HEADS * 4  # features' logits, once for all examples
    model = BATCH * LENGTH * (LAYER + LOGITS) + windows
    assert flops_per_step(**parts, **WITHOUT_LOSSES) == 3 * model
    contrastive = (4 + 4 * 6) * (POSITION + maps) + 2 * 4 * 6 * HEADS * 4  # four anchors, six candidates each
    distillation = 4 * 6 * POSITION + 2 * 2 * 4 * 6 * 6 * WIDTH  # four windows of six, similarities of both sides
    assert flops_per_step(**parts) == 3 * (model + contrastive + distillation)
