"""Perplexity against a count by hand."""

import math

import numpy as np
import pytest

from seqpe_jax.evaluation.perplexity import perplexity, perplexity_in_context

SPLIT = {"tokens_of_split": 100, "bytes_of_split": 400, "words_of_split": 50}
TABLE = np.arange(8, dtype=np.float32).reshape(2, 4)


def batches(*scored):
    """Batches of two rows, each of which scores its last so many targets."""
    for counts in scored:
        yield {"tokens": np.zeros((2, 5), np.int32), "scored": np.arange(4) >= 4 - np.array(counts)[:, None]}


def test_what_is_not_scored_does_not_count_and_units_are_right():
    table = np.where([[True] * 4, [False, True, True, True]], TABLE, np.nan)  # of a padding row anything may come out
    result = perplexity(lambda tokens: table, batches([4, 3], [4, 0]), length=4, put=lambda batch: batch, **SPLIT)
    loss = (TABLE.sum() - TABLE[1, 0] + TABLE[0].sum()) / 11
    assert result["tokens"] == 11 and result["loss"] == pytest.approx(loss)
    assert result["perplexity"] == pytest.approx(math.exp(loss))
    assert result["bits_per_byte"] == pytest.approx(loss / 4 / math.log(2))
    assert result["word_perplexity"] == pytest.approx(math.exp(2 * loss))
    assert result["loss_by_position"] == {
        "position": [0.0, 1.0, 2.0, 3.0],
        "loss": pytest.approx([(0 + 0) / 2, (1 + 5 + 1) / 3, (2 + 6 + 2) / 3, (3 + 7 + 3) / 3]),
    }


def test_under_a_context_the_last_targets_of_each_window_count():
    result = perplexity_in_context(
        lambda tokens: TABLE, batches([2, 2], [2, 0]), context=4, stride=2, put=lambda batch: batch, **SPLIT
    )
    assert {name: result[name] for name in ("context", "targets", "stride")} == {
        "context": 4,
        "targets": 6,
        "stride": 2,
    }
    assert result["loss"] == pytest.approx((2 * (2 + 3) + 6 + 7) / 6)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / 4 / math.log(2))
