"""Perplexity against a count by hand."""

import math

import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.evaluation.perplexity import perplexity


def batches(lengths):
    for rows, weights in lengths:
        yield {"tokens": np.zeros((rows, 5), np.int32), "weights": np.array(weights, np.float32)}


def test_padding_rows_do_not_count_and_units_are_right():
    table = np.arange(8, dtype=np.float32).reshape(2, 4)
    result = perplexity(
        lambda tokens: table, batches([(2, [1, 1]), (2, [1, 0])]), length=4, tokens_of_split=100, bytes_of_split=400,
        words_of_split=50, put=lambda batch: batch,
    )  # fmt: skip
    loss = (table.sum() + table[0].sum()) / 12
    assert result["tokens"] == 12 and result["loss"] == pytest.approx(loss)
    assert result["perplexity"] == pytest.approx(math.exp(loss))
    assert result["bits_per_byte"] == pytest.approx(loss / 4 / math.log(2))
    assert result["word_perplexity"] == pytest.approx(math.exp(2 * loss))
    assert result["loss_by_position"] == {
        "position": [0.0, 1.0, 2.0, 3.0],
        "loss": pytest.approx([(0 + 4 + 0) / 3, (1 + 5 + 1) / 3, (2 + 6 + 2) / 3, (3 + 7 + 3) / 3]),
    }


def test_nothing_to_read_is_an_error():
    with pytest.raises(InputError, match="no window of 4"):
        perplexity(lambda tokens: tokens, [], length=4, tokens_of_split=3, put=lambda batch: batch)
