"""What the loop says of a run's speed and memory, and when it records a profile."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.runtime import chips
from seqpe_jax.runtime.progress import MetricsWriter
from seqpe_jax.training import events, loop
from seqpe_jax.training.state import TrainState


class Kept:
    """Checkpoints that keep nothing."""

    def latest(self) -> None:
        return None

    def save(self, *_) -> None:
        pass

    def close(self) -> None:
        pass


def fit(workdir, *, first=0, steps=6, bad=-1, batches=None, evaluate=None, every=1, profile=None, flops=0.0) -> list[dict]:
    """Runs the loop on a step that only counts, and returns the lines of metrics.jsonl; step `bad` has no finite loss."""

    @jax.jit
    def step(state, batch):
        return state.replace(step=state.step + 1), {"loss": jnp.where(state.step == bad, jnp.nan, 1.0)}

    workdir.mkdir(exist_ok=True)
    batches = batches or ((number, {}) for number in range(first, steps))
    metrics, clock = MetricsWriter(workdir, first, tensorboard=False), events.Clock()
    report = events.Report(metrics, clock, every=every, steps=steps, units=10, unit="tokens", flops=flops)
    happening = [events.Evaluate(evaluate, metrics, clock, report, every=2)] if evaluate else []
    happening += [events.Save(Kept(), {}, clock, report, every=100)]
    happening += [events.Profile(profile, workdir)] if profile else []
    loop.fit(TrainState(jnp.int32(first), None, {}, ()), step, batches, steps=steps, events=[*happening, report])
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def recorded(workdir) -> bool:
    return any((workdir / "profile").rglob("*.xplane.pb"))


def test_a_line_tells_the_time_of_a_step_without_what_is_done_between_steps(tmp_path):
    def evaluate(_) -> dict[str, float]:
        time.sleep(0.5)
        return {"eval/loss": 1.0}

    lines = [line for line in fit(tmp_path, evaluate=evaluate) if "train/loss" in line]
    assert len(lines) == 6
    for line in lines[1:]:
        assert 0 < line["train/step_seconds"] < 0.5
        assert line["train/tokens_per_second"] == pytest.approx(10 / line["train/step_seconds"])
        assert not {"train/mfu", "device/memory_bytes"} & line.keys(), "the CPU is no chip of the table"


def test_the_first_step_of_a_start_compiles_and_spoils_no_average(tmp_path):
    def batches():
        for number in range(40, 50):
            time.sleep(0.6 if number == 40 else 0.0)  # stands for the compilation
            yield number, {}

    lines = fit(tmp_path, first=40, steps=50, batches=batches(), every=5)
    assert [line["step"] for line in lines] == [45, 50]
    assert lines[0]["train/step_seconds"] < 0.1


def test_mfu_and_memory_where_the_chip_is_known(tmp_path, monkeypatch):
    chip = chips.Chip("fast", 1e12, 2**30, "this test")
    monkeypatch.setattr(chips, "chip_of", lambda kind: chip)
    monkeypatch.setattr(chips, "peak_memory", lambda: 12345)
    lines = fit(tmp_path, flops=1e6)
    assert "train/mfu" not in lines[0], "the first step compiles"
    for line in lines[1:]:
        expected = 1e6 / line["train/step_seconds"] / (1e12 * jax.device_count())
        assert line["train/mfu"] == pytest.approx(expected)
    assert {line["device/memory_bytes"] for line in lines} == {12345}


def test_a_window_of_steps_is_recorded(tmp_path):
    fit(tmp_path, profile=(2, 4))
    assert recorded(tmp_path)


def test_a_run_that_ends_within_the_window_leaves_its_record_and_no_open_profile(tmp_path):
    with pytest.raises(events.NotFinite):
        fit(tmp_path / "a", bad=3, profile=(2, 6))
    assert recorded(tmp_path / "a")
    fit(tmp_path / "b", profile=(2, 4))
    assert recorded(tmp_path / "b")


def test_a_run_that_goes_on_past_the_first_step_of_the_window_records_nothing(tmp_path):
    fit(tmp_path, first=3, profile=(2, 4))
    assert not recorded(tmp_path)


def test_events_come_in_their_order(tmp_path):
    """An evaluation and a save see the state before the next step; a report waits for its step last."""
    told = []

    class Told(events.Event):
        def before(self, run):
            told.append(("before", run.step))

        def after(self, run, values):
            told.append(("after", run.step))

        def end(self, run):
            told.append(("end", run.step))

        def close(self):
            told.append("close")

    @jax.jit
    def step(state, batch):
        return state, {"loss": jnp.float32(1)}

    loop.fit(TrainState(jnp.int32(4), None, {}, ()), step, iter([(4, {}), (5, {})]), steps=6, events=[Told()])
    assert told == [("before", 4), ("after", 5), ("before", 5), ("after", 6), ("end", 6), "close"]
    metrics, clock = MetricsWriter(tmp_path, 0, tensorboard=False), events.Clock()
    report = events.Report(metrics, clock, every=1, steps=1, units=1, unit="tokens")
    save = events.Save(Kept(), {}, clock, report, every=1)
    with pytest.raises(ValueError, match="Evaluate, Save, Stop, Profile, Report"):
        loop.fit(TrainState(jnp.int32(0), None, {}, ()), step, iter([]), steps=0, events=[report, save])


def test_a_batch_left_on_the_host_is_refused():
    step = jax.jit(lambda state, batch: (state.replace(step=state.step + batch["one"]), {"loss": jnp.float32(1)}))
    for batch in ({"one": np.int32(1)}, {"one": jnp.int32(1)}):
        state = TrainState(jnp.int32(0), None, {}, ())
        if isinstance(batch["one"], jax.Array):
            assert int(loop.fit(state, step, iter([(0, batch)]), steps=1).step) == 1
            continue
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            loop.fit(state, step, iter([(0, batch)]), steps=1)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The loss before an update may be finite, and the update not."""
    saved = []

    class Noting(Kept):
        def save(self, step, *_):
            saved.append(step)

    metrics, clock = MetricsWriter(tmp_path, 0, tensorboard=False), events.Clock()
    report = events.Report(metrics, clock, every=1, steps=4, units=1, unit="tokens")
    save = events.Save(Noting(), {}, clock, report, every=1)

    @jax.jit
    def step(state, batch):
        return state.replace(step=state.step + 1, params={"w": state.params["w"] * 1e20}), {"loss": jnp.float32(1)}

    state = TrainState(jnp.int32(0), None, {"w": jnp.float32(1)}, ())
    with pytest.raises(events.NotFinite, match="infinite or not a number after step 2, .* are not saved"):
        loop.fit(state, step, ((number, {}) for number in range(4)), steps=4, events=[save, report])
    assert saved == [1]


def test_time_stands_still_in_a_pause():
    clock = events.Clock(100.0)
    before = clock.stepping()
    with clock.pause():
        time.sleep(0.2)
    assert clock.stepping() - before < 0.1 and 100.2 <= clock.seconds() < 101
