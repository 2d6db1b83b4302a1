"""The best checkpoint by a metric: it stays, whatever is restarted or damaged, and is found again."""

import json

import jax.numpy as jnp
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import RunDir, check_best_metric
from seqpe_jax.training.checkpoint import BestCheckpointPolicy, Checkpointer, SaveError
from tests.run_files import flip, largest

LOSS, TOP = "eval/loss@16", "eval/top1@8x8"


def save(workdir, values, metric=LOSS, first=2, keep=1):
    """Saves a state for each value of a metric, every second step; None = that one was not evaluated."""
    checkpoints = Checkpointer(workdir, keep=keep, best=BestCheckpointPolicy(workdir, metric))
    for step, value in enumerate(values):
        meta = {} if value is None else {"evaluation": {metric: value}}
        checkpoints.save(first + 2 * step, {"w": jnp.full(4, first + 2.0 * step)}, {"seconds": 1.0} | meta)
    checkpoints.close()


def there(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "metric, values, expected",
    [
        (LOSS, [3.0, 2.0, 2.5, 2.6], (4, 2.0)),
        (TOP, [30.0, 20.0, 25.0, 26.0], (2, 30.0)),
        (LOSS, [2.0, 2.0, 2.0], (2, 2.0)),
        (LOSS, [3.0, float("nan"), None, 4.0], (2, 3.0)),
        (LOSS, [3.0, 2.0, 1.0], (6, 1.0)),
    ],
)
def test_the_best_stays_with_the_newest(tmp_path, metric, values, expected):
    save(tmp_path, values, metric)
    newest = 2 * len(values)
    assert RunDir(tmp_path).best_step(metric) == RunDir(tmp_path).best_step(metric.removeprefix("eval/")) == expected
    assert there(tmp_path) == sorted({str(expected[0]), str(newest)})
    assert RunDir(tmp_path).latest_step() == newest, "a run resumes from the newest, not from the best"


def test_a_second_start_knows_the_best_of_the_first(tmp_path):
    save(tmp_path, [3.0, 1.0, 2.0])
    save(tmp_path, [1.5, 2.5], first=8)
    assert there(tmp_path) == ["10", "4"] and RunDir(tmp_path).best_step(LOSS) == (4, 1.0)
    save(tmp_path, [0.5, 2.5], first=12)
    assert there(tmp_path) == ["12", "14"] and RunDir(tmp_path).best_step(LOSS) == (12, 0.5)


def test_a_state_that_could_not_be_saved_is_not_the_best(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path, keep=1, best=BestCheckpointPolicy(tmp_path, LOSS))
    for step, value, fails in ((2, 2.0, False), (4, 1.0, True), (6, 3.0, False), (8, 4.0, False)):
        with monkeypatch.context() as broken:
            if fails:
                broken.setattr("seqpe_jax.training.checkpoint.write_checksums", lambda *_, **__: 1 / 0)
            checkpoints.save(step, {"w": jnp.ones(4)}, {"evaluation": {LOSS: value}})
            if fails:
                with pytest.raises(SaveError):
                    checkpoints.wait()
            checkpoints.wait()
    checkpoints.close()
    assert there(tmp_path) == ["2", "8"] and RunDir(tmp_path).best_step(LOSS) == (2, 2.0)


def test_a_damaged_best_is_not_read_and_is_quarantined_by_the_next_start(tmp_path):
    save(tmp_path, [1.0, 2.0, 3.0], keep=2)
    flip(largest(tmp_path / "checkpoints" / "2"))
    with pytest.raises(
        InputError, match="checkpoints/2 is damaged .* may be the best: put back a copy .*--which=latest"
    ):
        RunDir(tmp_path).best_step(LOSS)
    assert RunDir(tmp_path).quarantine() == [] and RunDir(tmp_path).latest_step() == 6
    [line] = RunDir(tmp_path).quarantine(LOSS)
    assert "checkpoints/2, the best, is damaged" in line and line.endswith("renamed to 2.damaged")
    assert RunDir(tmp_path).quarantine(LOSS) == []
    save(tmp_path, [4.0], first=8, keep=2)
    assert there(tmp_path) == ["2.damaged", "4", "6", "8"] and RunDir(tmp_path).best_step(LOSS) == (4, 2.0)


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_value_that_is_damaged_does_not_say_which_is_the_best(tmp_path, how):
    """A flipped digit would make another one the best, and a missing one let the best be removed."""
    save(tmp_path, [1.0, 2.0, 3.0], keep=3)
    path = tmp_path / "checkpoints" / "4" / "meta" / "metadata"
    assert json.loads(path.read_text())["evaluation"] == {LOSS: 2.0}
    if how == "flipped":
        path.write_text(path.read_text().replace("2.0", "0.2"))
    else:
        path.unlink()
    with pytest.raises(InputError, match="checkpoints/4 is damaged"):
        RunDir(tmp_path).best_step(LOSS)
    [line] = RunDir(tmp_path).quarantine(LOSS)
    assert "renamed to 4.damaged" in line and RunDir(tmp_path).best_step(LOSS) == (2, 1.0)


def test_where_there_is_no_best_it_says_so(tmp_path):
    save(tmp_path, [None, None], keep=2)
    with pytest.raises(
        InputError, match=f"has no best checkpoint yet: of none was {LOSS} measured; use --which=latest"
    ):
        RunDir(tmp_path).best_step(LOSS)
    with pytest.raises(InputError, match="was trained without checkpoint.best; use --which=latest"):
        RunDir(tmp_path).best_step("")


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are():
    known = [LOSS, "eval/perplexity@16"]
    assert check_best_metric("loss@16", known) == check_best_metric(LOSS, known) == LOSS
    for wrong in ("loss", "loss@32", "f1@16", "train/loss"):
        with pytest.raises(InputError, match=f"'{wrong}' is not measured .*: choose one of loss@16, perplexity@16$"):
            check_best_metric(wrong, known)
