import threading
import time

import numpy as np
import pytest

from seqpe_jax.data.loader import (
    EvaluationBatches,
    TrainLoader,
    context_windows,
    evaluation_windows,
    target_ends,
    windows,
)
from seqpe_jax.errors import InputError

LENGTH = 8
TOKENS = np.arange(8 * 50 + 5, dtype=np.uint16)  # 50 windows and a rest


def loader(**changes):
    return TrainLoader(windows(TOKENS, LENGTH), **{"batch_size": 12, "seed": 3, **changes})


def starts(batch):
    return (batch["tokens"][:, 0] // LENGTH).tolist()


def test_windows_overlap_by_the_predicted_token_only():
    source = windows(TOKENS, LENGTH)
    assert len(source) == 50
    np.testing.assert_array_equal(source[3]["tokens"], np.arange(24, 33))
    assert len(windows(np.arange(17), 8)) == 2 and len(windows(np.arange(16), 8)) == 1


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


@pytest.mark.parametrize("hosts", [2, 3, 4, 12])
def test_hosts_together_read_the_batch_of_one(hosts):
    for step in (0, 4, 17):
        parts = [loader(host_index=host, host_count=hosts).batch(step)["tokens"] for host in range(hosts)]
        assert all(len(part) == 12 // hosts for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), loader().batch(step)["tokens"])


def noisy(record, rng):
    return record | {"noise": rng.random(3)}


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_what_an_example_draws_depends_on_seed_and_place_only(hosts):
    for step in (0, 9):
        whole = loader(example=noisy).batch(step)["noise"]
        parts = [loader(example=noisy, host_index=h, host_count=hosts).batch(step)["noise"] for h in range(hosts)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert len(np.unique(whole)) == whole.size  # another draw for each example
        assert (loader(example=noisy, seed=4).batch(step)["noise"] != whole).all()
    assert (loader(example=noisy).batch(0)["noise"] != loader(example=noisy).batch(9)["noise"]).all()


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("threads", [1, 4])
def test_prefetch_resumes_anywhere_and_stops(start, threads):
    one = loader(example=noisy, threads=threads)
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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"host_count": 5}, "batch_size=12 must be a positive multiple of the 5 hosts"),
        ({"host_count": 2, "host_index": 2}, "host 2 of 2 does not exist"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(InputError, match=message):
        loader(**changes)


@pytest.mark.parametrize(
    "length, message",
    [(405, "needs 406, but the split has 405: lower data.length"), (0, "data.length must be at least 1")],
)
def test_windows_that_cannot_be(length, message):
    with pytest.raises(InputError, match=message):
        windows(TOKENS, length)


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
    batches = evaluation_windows(TOKENS, length, 12)
    assert next(iter(batches))["tokens"].shape == (12, length + 1) and batches.examples == -(-404 // length)
    targets, firsts = scored(batches)
    assert targets.tolist() == list(range(1, 405))
    assert firsts.tolist() == [min((target - 1) // length * length, 404 - length) for target in targets]


def test_evaluation_of_a_part():
    for limit, count in ((80, 80), (83, 83), (8, 8), (10**9, 404)):
        assert scored(evaluation_windows(TOKENS, LENGTH, 4, max_tokens=limit))[0].tolist() == list(range(1, count + 1))
    with pytest.raises(InputError, match=r"needs 501, but the split has 405: lower eval.lengths"):
        evaluation_windows(TOKENS, 500, 4)
    with pytest.raises(InputError, match=r"eval.tokens=7 \(--tokens\) is less than a window of 8 tokens: raise it to 8"):
        evaluation_windows(TOKENS, LENGTH, 4, max_tokens=7)


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
    batches = EvaluationBatches(range(5), 2, 5, lambda number: {"square": np.float32(number**2)})
    read = list(batches)
    assert np.concatenate([batch["square"] for batch in read]).tolist() == [0, 1, 4, 9, 16, 0]
    assert np.concatenate([batch["weights"] for batch in read]).tolist() == [1, 1, 1, 1, 1, 0]
