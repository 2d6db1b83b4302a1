"""Training and evaluation batches: functions of seed and step, every token scored once."""

import threading
import time

import numpy as np
import pytest

from seqpe_jax.data.loader import (
    EvalBatches,
    TrainLoader,
    context_windows,
    eval_windows,
    target_ends,
    training_windows,
)
from seqpe_jax.errors import InputError

LENGTH = 8
TOKENS = np.arange(8 * 50 + 5, dtype=np.uint16)  # 50 windows and a rest


def loader(**changes):
    return TrainLoader(training_windows(TOKENS, LENGTH), **{"batch_size": 12, "seed": 3, **changes})


def starts(batch):
    return (batch["tokens"][:, 0] // LENGTH).tolist()


def test_windows_overlap_by_the_predicted_token_only():
    source = training_windows(TOKENS, LENGTH)
    assert len(source) == 50
    np.testing.assert_array_equal(source[3]["tokens"], np.arange(24, 33))
    assert len(training_windows(np.arange(17), 8)) == 2 and len(training_windows(np.arange(16), 8)) == 1


def test_batch_is_a_function_of_seed_and_step():
    one, two = loader(), loader()
    expected = [one.batch(step)["tokens"] for step in range(20)]
    assert expected[0].shape == (12, LENGTH + 1) and expected[0].dtype == np.int32
    for step in reversed(range(20)):
        np.testing.assert_array_equal(two.batch(step)["tokens"], expected[step])
    assert any((loader(seed=4).batch(step)["tokens"] != expected[step]).any() for step in range(3))
    for row in expected[5]:
        np.testing.assert_array_equal(np.diff(row), 1)


def test_every_window_once_per_epoch_and_each_epoch_in_another_order():
    one = loader()
    seen = [start for step in range(25) for start in starts(one.batch(step))]
    epochs = [seen[50 * epoch : 50 * (epoch + 1)] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_batch_larger_than_the_data():
    seen = starts(loader(batch_size=120).batch(0))
    assert sorted(seen[:50]) == sorted(seen[50:100]) == list(range(50))


SPLITS = {  # rows of each process
    "alone": [list(range(12))],
    "blocks": [list(range(n, n + 3)) for n in range(0, 12, 3)],
    "as on a torus": [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 10, 11]],
    "of other sizes": [[3], [0, 1, 2, *range(4, 12)]],
    "shared": [[0, 6], [0, 6], list(range(12))],
}


def noisy(record, rng):
    return record | {"noise": rng.random(3)}


@pytest.mark.parametrize("split", SPLITS)
def test_a_row_has_the_same_example_whoever_reads_it(split):
    """Windows, and what is drawn for each, depend on the seed, the step and the row alone."""
    for step in (0, 4, 9, 17):
        whole = loader(example=noisy).batch(step)
        for rows in SPLITS[split]:
            part = loader(example=noisy, rows=rows).batch(step)
            for name, value in whole.items():
                np.testing.assert_array_equal(part[name], value[rows])
        assert len(np.unique(whole["noise"])) == whole["noise"].size  # another draw for each example
        assert (loader(example=noisy, seed=4).batch(step)["noise"] != whole["noise"]).all()
    assert (loader(example=noisy).batch(0)["noise"] != loader(example=noisy).batch(9)["noise"]).all()


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("threads", [1, 4])
def test_prefetch_resumes_anywhere_and_stops(start, threads):
    one = loader(example=noisy, threads=threads, rows=[0, 1, 6, 7])
    before = threading.active_count()
    batches = one.prefetch(start)
    for step in range(start, start + 6):
        found, batch = next(batches)
        assert found == step
        for name, value in one.batch(step).items():
            np.testing.assert_array_equal(batch[name], value)
    assert threading.active_count() > before
    batches.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_prefetch_hands_on_what_goes_wrong():
    def broken(record, rng):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        next(loader(example=broken).prefetch(0))


@pytest.mark.parametrize("rows", [[], [12], [-1, 3]])
def test_rows_that_a_batch_does_not_have(rows):
    with pytest.raises(ValueError, match="rows must be some of 0 to 11"):
        loader(rows=rows)


@pytest.mark.parametrize(
    "length, message",
    [(405, "needs 406, but the split has 405: lower data.length"), (0, "data.length must be at least 1")],
)
def test_windows_that_cannot_be(length, message):
    with pytest.raises(InputError, match=message):
        training_windows(TOKENS, length)


def test_no_examples():
    with pytest.raises(InputError, match="no examples"):
        TrainLoader([], batch_size=2, seed=0)


def scored(batches):
    """The targets that count, in order, and the first token of the window of each; tokens are their own indices."""
    read = list(batches)
    assert len(read) == len(batches) and len(list(batches)) == len(read)
    targets = [batch["tokens"][:, 1:][batch["scored"]] for batch in read]
    firsts = [np.repeat(batch["tokens"][:, 0], batch["scored"].sum(axis=1)) for batch in read]
    assert {batch["tokens"].dtype for batch in read} == {np.dtype(np.int32)}
    return np.concatenate(targets), np.concatenate(firsts)


@pytest.mark.parametrize("length", [1, LENGTH, 100, 403, 404])
def test_evaluation_scores_every_token_but_the_first_once_at_every_length(length):
    """The last window ends where the split ends and reads on from the one before."""
    batches = eval_windows(TOKENS, length, 12)
    assert next(iter(batches))["tokens"].shape == (12, length + 1) and batches.examples == -(-404 // length)
    targets, firsts = scored(batches)
    assert targets.tolist() == list(range(1, 405))
    assert firsts.tolist() == [min((target - 1) // length * length, 404 - length) for target in targets]


def test_evaluation_of_a_part():
    for limit, count in ((80, 80), (83, 83), (8, 8), (10**9, 404)):
        assert scored(eval_windows(TOKENS, LENGTH, 4, max_tokens=limit))[0].tolist() == list(range(1, count + 1))
    with pytest.raises(InputError, match=r"needs 501, but the split has 405: lower eval.lengths"):
        eval_windows(TOKENS, 500, 4)
    with pytest.raises(
        InputError, match=r"eval.tokens=7 \(--tokens\) is less than a window of 8 tokens: raise it to 8"
    ):
        eval_windows(TOKENS, LENGTH, 4, max_tokens=7)


def test_every_context_scores_the_same_targets():
    stride, largest = 6, 300
    ends = target_ends(len(TOKENS), largest=largest, stride=stride, targets=10**6)
    found = {context: scored(context_windows(TOKENS, context, 4, ends, stride)) for context in (7, 40, largest)}
    assert ends[0] - stride < largest <= ends[0]
    for context, (targets, firsts) in found.items():
        assert targets.tolist() == list(range(405 - 18 * stride, 405))  # one block more and a window would not reach
        assert (targets - firsts).min() == context - stride + 1 and (targets - firsts).max() == context
    some = target_ends(len(TOKENS), largest=largest, stride=stride, targets=6 * stride + 5)
    assert some.tolist() == [404 - stride * block for block in (16, 13, 10, 7, 4, 1)]  # in the middle of sixths
    assert target_ends(largest + 1, largest=largest, stride=stride, targets=stride).tolist() == [largest]


def test_evaluation_makes_examples():
    batches = EvalBatches(range(5), 2, 5, lambda number: {"square": np.float32(number**2)})
    read = list(batches)
    assert np.concatenate([batch["square"] for batch in read]).tolist() == [0, 1, 4, 9, 16, 0]
    assert np.concatenate([batch["weights"] for batch in read]).tolist() == [1, 1, 1, 1, 1, 0]


def square(number):
    return {"square": np.float32(number**2)}


def squares(count=7, **options):
    """Batches of three and their rows 0 to 2 of each, as a host with those rows reads them."""
    return list(EvalBatches(range(count), 3, count, square, **options))


def test_each_host_evaluates_its_own_rows():
    whole = squares()
    made = []
    for rows in ([0, 2], [1]):
        part = list(EvalBatches(range(7), 3, 7, lambda number: (made.append(number), square(number))[1], rows=rows))
        for one, other in zip(part, whole, strict=True):
            np.testing.assert_array_equal(one["square"], other["square"][rows])
            np.testing.assert_array_equal(one["weights"], other["weights"])
    assert sorted(made) == [0, 1, 2, 3, 4, 5, 6, 6, 6], "each by its host; the last one more for the shape of padding"


@pytest.mark.slow
def test_workers_and_threads_change_nothing():
    """Batches come from other processes, in the same order; a batch is a function of seed and step, not of their number."""
    alone = loader(example=noisy)
    batches = loader(example=noisy, workers=2, threads=2).prefetch(5)
    for step in range(5, 10):
        found, batch = next(batches)
        assert found == step
        for name, value in alone.batch(step).items():
            np.testing.assert_array_equal(batch[name], value)
    batches.close()
    for one, other in zip(squares(), squares(threads=3), strict=True):
        np.testing.assert_array_equal(one["square"], other["square"])


def test_seeds_that_share_their_last_32_bits_have_orders_of_their_own():
    orders = {tuple(starts(loader(seed=seed).batch(0))) for seed in (7, 2**32 + 7, 2**33 + 7, 2**63 - 1)}
    assert len(orders) == 4
