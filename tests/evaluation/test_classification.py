"""Accuracy against a count by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.evaluation.classification import accuracy
from seqpe_jax.losses.task import ClassificationLoss, ranks


def test_padding_rows_do_not_count_and_units_are_right():
    ranks = [np.array([0, 4, 7]), np.array([0, 5, 0])]
    losses = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 100.0])]
    answers = iter([{"rank": rank, "loss": loss} for rank, loss in zip(ranks, losses, strict=True)])
    batches = [
        {"images": np.zeros((3, 2, 2, 1)), "labels": np.zeros(3, int), "weights": np.array(weights, np.float32)}
        for weights in ([1, 1, 1], [1, 1, 0])
    ]
    done = []
    result = accuracy(lambda batch: next(answers), batches, size=(2, 4), put=lambda batch: batch, progress=done.append)
    assert result == {"size": [2, 4], "examples": 5, "loss": 3.0, "top1": 40.0, "top5": 60.0}
    assert done == [3, 5]


def test_ties_go_to_the_lower_class_and_nan_is_never_right():
    nan = float("nan")
    logits = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, nan, 2.0], [nan, nan, nan], [nan, 1.0, 0.0]])
    found = ranks(logits, jnp.array([0, 2, 2, 0, 0])).tolist()
    assert found[:3] == [0, 2, 1] and min(found[3:]) > 5


def test_examine_counts_the_classes_above_the_true_one():
    class Table(nn.Module):
        """Logits as they are given."""

        def __call__(self, images, signal):
            return images

    logits = jnp.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.0, 2.0, 1.0]])
    found = ClassificationLoss(0.0, None).eval_step(
        Table(), {}, PositionSignal(), {"images": logits, "labels": jnp.array([2, 2, 2])}
    )
    assert found["rank"].tolist() == [0, 2, 1]
    assert float(found["loss"][0]) == pytest.approx(-0.3 + float(jnp.log(jnp.exp(logits[0]).sum())), rel=1e-5)
