import threading
import time

import numpy as np
import pytest

from seqpe_jax.data.loader import TrainLoader, evaluation_windows, shuffled, windows
from seqpe_jax.errors import InputError

LENGTH = 8
TOKENS = np.arange(8 * 50 + 5, dtype=np.uint16)  # 50 windows and a rest


def loader(**changes):
    return TrainLoader(TOKENS, **{"length": LENGTH, "batch_size": 12, "seed": 3, **changes})


def starts(batch):
    return (batch["tokens"][:, 0] // LENGTH).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 10, 49, 50, 1000, 1025])
def test_order_is_a_bijection_of_each_epoch(count):
    index = np.arange(count)
    orders = [shuffled(index, epoch, count, seed) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == index.tolist()
    if count >= 10:
        assert len({tuple(order.tolist()) for order in orders}) == 4


def test_order_of_huge_counts():
    count = 10**12
    order = shuffled(np.arange(10_000), 0, count, 0)
    assert order.min() >= 0 and order.max() < count and len(set(order.tolist())) == 10_000
    assert abs(order.mean() / count - 0.5) < 0.02


def test_order_looks_random():
    count, epochs = 100, 2000
    orders = np.stack([shuffled(np.arange(count), epoch, count, 7) for epoch in range(epochs)])
    table = np.zeros((count, count))
    np.add.at(table, (np.tile(np.arange(count), epochs), orders.reshape(-1)), 1)
    chi_square = ((table - epochs / count) ** 2 / (epochs / count)).sum() / (count - 1) ** 2
    assert 0.9 < chi_square < 1.1  # each window equally often at each place
    step = np.diff(orders, axis=1)
    assert np.bincount((step % count).reshape(-1), minlength=count)[1:].max() < 1.15 * step.size / (count - 1)


def test_windows_overlap_by_the_predicted_token_only():
    source = windows(TOKENS, LENGTH)
    assert len(source) == 50
    np.testing.assert_array_equal(source[3], np.arange(24, 33))
    assert source[np.array([0, 49])].shape == (2, LENGTH + 1)
    assert len(windows(np.arange(17), 8)) == 2 and len(windows(np.arange(16), 8)) == 1


def test_windows_are_a_grain_source():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(windows(TOKENS, LENGTH)).batch(2)
    np.testing.assert_array_equal(dataset[1][0], np.arange(16, 25))


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
    assert one.steps_per_epoch == pytest.approx(50 / 12)


def test_batch_larger_than_the_data():
    seen = starts(loader(batch_size=120).batch(0))
    assert sorted(seen[:50]) == sorted(seen[50:100]) == list(range(50))


@pytest.mark.parametrize("hosts", [2, 3, 4, 12])
def test_hosts_together_read_the_batch_of_one(hosts):
    for step in (0, 4, 17):
        parts = [loader(host_index=host, host_count=hosts).batch(step)["tokens"] for host in range(hosts)]
        assert all(len(part) == 12 // hosts for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), loader().batch(step)["tokens"])


@pytest.mark.parametrize("start", [0, 7])
def test_prefetch_resumes_anywhere_and_stops(start):
    one = loader()
    before = threading.active_count()
    batches = one.prefetch(start)
    for step in range(start, start + 6):
        found, batch = next(batches)
        assert found == step
        np.testing.assert_array_equal(batch["tokens"], one.batch(step)["tokens"])
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_prefetch_hands_on_what_goes_wrong():
    one = loader()
    one.windows = None
    with pytest.raises(TypeError):
        next(one.prefetch(0))


def test_a_batch_takes_well_under_a_millisecond():
    one = TrainLoader(np.zeros(1_000_000, np.uint8), length=512, batch_size=32, seed=0)
    times = []
    for step in range(200):
        begin = time.perf_counter()
        one.batch(step)
        times.append(time.perf_counter() - begin)
    assert np.median(times) < 1e-3  # 0.07 ms on an idle core


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"length": 405}, "needs 406, but the split has 405: lower data.length"),
        ({"length": 0}, "data.length must be at least 1"),
        ({"host_count": 5}, "batch_size=12 must be a positive multiple of the 5 hosts"),
        ({"host_count": 2, "host_index": 2}, "host 2 of 2 does not exist"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(InputError, match=message):
        loader(**changes)


def test_evaluation_reads_every_window_once_in_order():
    batches = evaluation_windows(TOKENS, LENGTH, 12)
    assert (batches.windows, len(batches)) == (50, 5)
    read = list(batches)
    assert len(read) == 5 and len(list(batches)) == 5
    for batch in read:
        assert batch["tokens"].shape == (12, LENGTH + 1) and batch["tokens"].dtype == np.int32
        assert batch["weights"].shape == (12,) and batch["weights"].dtype == np.float32
    weights = np.concatenate([batch["weights"] for batch in read])
    rows = np.concatenate([batch["tokens"] for batch in read])
    assert weights.tolist() == [1.0] * 50 + [0.0] * 10
    assert (rows[:50, 0] // LENGTH).tolist() == list(range(50)) and not rows[50:].any()


def test_evaluation_of_a_part():
    assert evaluation_windows(TOKENS, LENGTH, 4, max_tokens=80).windows == 10
    assert evaluation_windows(TOKENS, LENGTH, 4, max_tokens=3).windows == 1
    assert evaluation_windows(TOKENS, LENGTH, 4, max_tokens=10**9).windows == 50
    with pytest.raises(InputError, match=r"needs 501, but the split has 405: lower eval.lengths"):
        evaluation_windows(TOKENS, 500, 4)
