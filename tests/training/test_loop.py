"""What the loop says of a run's speed and memory, and when it records a profile."""

import json
import os
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqpe_jax.distributed import hardware
from seqpe_jax.training import hooks, loop
from seqpe_jax.training.checkpoint import SaveError
from seqpe_jax.training.metrics_writer import MetricsWriter
from seqpe_jax.training.step import TrainState, make_train_step


class Kept:
    """Checkpoints that keep nothing."""

    failed = 0

    def latest_step(self) -> None:
        return None

    def wait(self) -> None:
        pass

    def save(self, *_) -> None:
        pass

    def close(self) -> None:
        pass


def fit(
    workdir, *, first=0, steps=6, bad=-1, batches=None, evaluate=None, every=1, profile=None, flops=0.0
) -> list[dict]:
    """Runs the loop on a step that only counts, and returns the lines of metrics.jsonl; step `bad` has no finite loss."""

    @jax.jit
    def step(state, batch):
        return state.replace(step=state.step + 1), {"loss": jnp.where(state.step == bad, jnp.nan, 1.0)}

    workdir.mkdir(exist_ok=True)
    batches = batches or ((number, {}) for number in range(first, steps))
    metrics, clock = MetricsWriter(workdir, first, tensorboard=False), hooks.TrainingClock()
    report = hooks.MetricsHook(
        metrics, clock, every=every, num_steps=steps, count_per_step=10, count_name="tokens", flops=flops
    )
    save = hooks.CheckpointHook(Kept(), {}, clock, report, every=100)
    stop = hooks.PreemptionHook(save)
    happening = [hooks.EvaluationHook(evaluate, metrics, clock, report, stop, every=2)] if evaluate else []
    happening += [save, stop]
    happening += [hooks.ProfilerHook(profile, workdir)] if profile else []
    loop.run_steps(
        TrainState(jnp.int32(first), None, {}, ()), step, batches, num_steps=steps, hooks=[*happening, report]
    )
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def recorded(workdir) -> bool:
    return any((workdir / "profile").rglob("*.xplane.pb"))


def test_a_line_tells_the_time_of_a_step_without_what_is_done_between_steps(tmp_path):
    def evaluate(*_) -> dict[str, float]:
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
    chip = hardware.Chip("fast", 1e12, 2**30, "this test")
    monkeypatch.setattr(hardware, "find_chip", lambda kind: chip)
    monkeypatch.setattr(hardware, "peak_memory", lambda: 12345)
    lines = fit(tmp_path, flops={"mfu": 1e6, "mfu_full_attention": 2e6})
    assert not {"train/mfu", "train/mfu_full_attention"} & lines[0].keys(), "the first step compiles"
    for line in lines[1:]:
        expected = 1e6 / line["train/step_seconds"] / (1e12 * jax.device_count())
        assert line["train/mfu"] == pytest.approx(expected)
        assert line["train/mfu_full_attention"] == pytest.approx(2 * expected)
    assert {line["device/memory_bytes"] for line in lines} == {12345}


def test_a_window_of_steps_is_recorded(tmp_path):
    fit(tmp_path, profile=(2, 4))
    assert recorded(tmp_path)


def test_a_run_that_ends_within_the_window_leaves_its_record_and_no_open_profile(tmp_path):
    with pytest.raises(hooks.NonFiniteError):
        fit(tmp_path / "a", bad=3, profile=(2, 6))
    assert recorded(tmp_path / "a")
    fit(tmp_path / "b", profile=(2, 4))
    assert recorded(tmp_path / "b")


def test_a_run_that_goes_on_past_the_first_step_of_the_window_records_nothing(tmp_path):
    fit(tmp_path, first=3, profile=(2, 4))
    assert not recorded(tmp_path)


@pytest.mark.parametrize("name", ["loss", "gradient_norm/model"])
def test_a_step_that_is_not_finite_is_named_with_all_its_terms(tmp_path, name):
    @jax.jit
    def step(state, batch):
        values = {"loss": jnp.float32(1), "gradient_norm/model": jnp.float32(2), "term/task": jnp.float32(0.5)}
        bad = jnp.where(state.step == 2, jnp.inf, values[name])
        return state.replace(step=state.step + 1), values | {name: bad, "learning_rate": jnp.float32(0.1)}

    metrics, clock = MetricsWriter(tmp_path, 0, tensorboard=False), hooks.TrainingClock()
    report = hooks.MetricsHook(
        metrics, clock, every=1, num_steps=6, count_per_step=1, count_name="tokens", latest_checkpoint=lambda: 1
    )
    with pytest.raises(hooks.NonFiniteError, match=f"step 3 is not finite.*{name} inf.*term/task 0.5.*of step 1"):
        loop.run_steps(
            TrainState(jnp.int32(0), None, {}, ()), step, ((n, {}) for n in range(6)), num_steps=6, hooks=[report]
        )


class Square:
    """A train step on one number w, whose loss is w * w times what the batch says."""

    def __init__(self, skip):
        def loss(params, batch, key, step, part, share):
            value = params["w"] ** 2 * batch["factor"][0]
            return value, {"loss": value}

        self.optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 10))
        made = make_train_step(loss, self.optimizer, optax.linear_schedule(0.1, 0.0, 10), skip=skip)
        self.state = TrainState(jnp.int32(0), None, {"w": jnp.float32(1)}, self.optimizer.init({"w": jnp.float32(1)}))
        self.step = jax.jit(made)

    def fit(self, folder, factors, skips=2, skipped=0):
        folder.mkdir(exist_ok=True)
        metrics, clock = MetricsWriter(folder, 0, tensorboard=False), hooks.TrainingClock()
        count = len(factors)
        batches = ((n, {"factor": jnp.full((1,), factor, jnp.float32)}) for n, factor in enumerate(factors))
        report = hooks.MetricsHook(
            metrics,
            clock,
            every=1,
            num_steps=count,
            count_per_step=1,
            count_name="tokens",
            max_skips=skips,
            skipped=skipped,
        )
        end = loop.run_steps(self.state, self.step, batches, num_steps=count, hooks=[report])
        return end, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    nan, inf = float("nan"), float("inf")
    state, lines = Square(skip=True).fit(tmp_path / "a", [1.0, nan, inf, 1.0], skipped=3)
    assert [line["train/skipped"] for line in lines] == [3, 4, 5, 5], "those of earlier starts count too"
    assert "train/loss" not in lines[1] and "NaN" not in (tmp_path / "a" / "metrics.jsonl").read_text()
    assert np.isfinite(state.params["w"]) and int(state.step) == 4
    # Adam by hand: moments of the two gradients that count, its count and the learning rate those of the fourth step.
    rates = [line["train/learning_rate"] for line in lines]
    first = 1 - rates[0]
    mean, square = 0.9 * 0.2 + 0.1 * 2 * first, 0.999 * 0.004 + 0.001 * (2 * first) ** 2
    expected = first - rates[3] * mean / (1 - 0.9**4) / np.sqrt(square / (1 - 0.999**4))
    assert float(state.params["w"]) == pytest.approx(expected, abs=1e-5)

    with pytest.raises(hooks.NonFiniteError, match="step 4, 3 in a row, is not finite"):
        Square(skip=True).fit(tmp_path / "b", [1.0, nan, nan, nan, 1.0])
    with pytest.raises(hooks.NonFiniteError, match="step 2 is not finite"):
        Square(skip=False).fit(tmp_path / "c", [1.0, nan], skips=0)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_saved(tmp_path, number):
    saved = []

    class Noting(Kept):
        def save(self, step, *_):
            saved.append(step)

    @jax.jit
    def step(state, batch):
        return state.replace(step=state.step + 1), {"loss": jnp.float32(1)}

    def batches():
        for n in range(6):
            if n == 3:
                os.kill(os.getpid(), number)
            yield n, {}

    def run():
        metrics, clock = MetricsWriter(tmp_path, 0, tensorboard=False), hooks.TrainingClock()
        report = hooks.MetricsHook(metrics, clock, every=1, num_steps=6, count_per_step=1, count_name="tokens")
        save = hooks.CheckpointHook(Noting(), {}, clock, report, every=100)
        happening = [save, hooks.PreemptionHook(save), report]
        return loop.run_steps(TrainState(jnp.int32(0), None, {}, ()), step, batches(), num_steps=6, hooks=happening)

    def heard(*_):
        pass

    before = signal.signal(number, heard)  # whatever who started the tests has the process do with it
    try:
        with pytest.raises(hooks.Preempted, match=f"{number.name} at step 4") as stopped:
            run()
        assert saved == [4] and stopped.value.code == 75 and signal.getsignal(number) == heard
        if number == signal.SIGHUP:  # as under nohup
            signal.signal(number, signal.SIG_IGN)
            assert int(run().step) == 6
    finally:
        signal.signal(number, before)


class Noting(Kept):
    """Checkpoints that note which steps were saved, with what beside them."""

    def __init__(self):
        self.saved = {}

    def save(self, step, state, meta):
        self.saved.setdefault(step, meta)


class Evaluated:
    """A run of four steps, evaluated after each second one in three batches; what happens where a signal comes."""

    def __init__(self, folder, *, first=0, pending_eval=False, signal_in="", steps=4):
        self.folder, self.first, self.pending_eval, self.signal_in, self.steps = (
            folder,
            first,
            pending_eval,
            signal_in,
            steps,
        )
        self.checkpoints, self.batches = Noting(), 0

    def evaluate(self, params, between):
        for batch in range(3):
            if self.signal_in == "evaluation" and batch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)  # the thread that handles it has looked
            between(batch, 3)
            self.batches += 1
        return {"eval/loss@16": 1.5}

    def run(self):
        @jax.jit
        def step(state, batch):
            if self.signal_in == "compilation":
                os.kill(os.getpid(), signal.SIGTERM)
                for _ in range(50):
                    time.sleep(0.1)
                self.compiled = True
            return state.replace(step=state.step + 1), {"loss": jnp.float32(1)}

        metrics, clock = MetricsWriter(self.folder, self.first, tensorboard=False), hooks.TrainingClock()
        report = hooks.MetricsHook(metrics, clock, every=1, num_steps=self.steps, count_per_step=1, count_name="tokens")
        save = hooks.CheckpointHook(self.checkpoints, {}, clock, report, every=2)
        stop = hooks.PreemptionHook(save)
        evaluate = hooks.EvaluationHook(
            self.evaluate, metrics, clock, report, stop, every=2, pending_eval=self.pending_eval
        )
        state, batches = (
            TrainState(jnp.int32(self.first), None, {}, ()),
            ((n, {}) for n in range(self.first, self.steps)),
        )
        loop.run_steps(state, step, batches, num_steps=self.steps, hooks=[evaluate, save, stop, report])

    @property
    def evaluated(self):
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if "eval/loss@16" in line]


def test_what_an_evaluation_found_is_saved_beside_the_state(tmp_path):
    run = Evaluated(tmp_path)
    run.run()
    assert run.evaluated == [2, 4] and list(run.checkpoints.saved) == [2, 4] and run.batches == 6
    assert all(meta["evaluation"] == {"eval/loss@16": 1.5} for meta in run.checkpoints.saved.values())


def test_a_stop_does_not_wait_for_the_end_of_an_evaluation(tmp_path):
    run = Evaluated(tmp_path, signal_in="evaluation")
    with pytest.raises(hooks.Preempted, match="SIGTERM at step 2: saved"):
        run.run()
    time.sleep(0.2)
    assert run.batches == 1 and run.evaluated == [], "the evaluation has ended between two of its batches"
    assert list(run.checkpoints.saved) == [2] and "evaluation" not in run.checkpoints.saved[2]
    again = Evaluated(tmp_path, first=2, pending_eval=True)
    again.run()
    assert again.evaluated == [2, 4], "the next start makes good for it"
    last = Evaluated(tmp_path, first=4, pending_eval=True)
    last.run()
    assert last.evaluated == [2, 4, 4], "also of a run that has no steps left"


def test_a_stop_does_not_wait_for_a_compilation(tmp_path):
    run = Evaluated(tmp_path, first=2, signal_in="compilation", steps=9)
    run.compiled = False
    with pytest.raises(hooks.Preempted, match="SIGTERM at step 2: saved"):
        run.run()
    assert not run.compiled and list(run.checkpoints.saved) == [2]


class Failing(Kept):
    """Checkpoints whose saves fail at some calls, at once or in the background."""

    def __init__(self, at_once=(), later=()):
        self.at_once, self.later, self.calls, self.failed, self.under_way, self.saved = at_once, later, 0, 0, None, []

    def save(self, step, *_):
        self.calls += 1
        if self.calls in self.at_once:
            self.failed += 1
            raise SaveError(f"the save of step {step} failed")
        self.under_way = (self.calls, step)

    def wait(self):
        if self.under_way is None:
            return
        (call, step), self.under_way = self.under_way, None
        if call in self.later:
            self.failed += 1
            raise SaveError(f"the save of step {step} failed")
        self.failed = 0
        self.saved.append(step)


@pytest.mark.parametrize(
    "at_once, later, saved",
    [
        ((2,), (), [1, 3, 4]),
        ((), (2,), [1, 3, 4]),
        ((2, 3), (), [1, 4]),
        ((4,), (), [1, 2, 3, 4]),
        ((), (4, 5), [1, 2, 3, 4]),
        ((2, 3, 4), (), None),
        ((), (3, 4, 5), None),
        ((4, 5, 6), (), None),
    ],
)
def test_a_failed_save_is_tried_again_and_three_in_a_row_end_the_run(
    tmp_path, capsys, monkeypatch, at_once, later, saved
):
    monkeypatch.setattr(hooks.time, "sleep", lambda _: None)
    checkpoints, clock = Failing(at_once, later), hooks.TrainingClock()
    metrics = MetricsWriter(tmp_path, 0, tensorboard=False)
    report = hooks.MetricsHook(metrics, clock, every=1, num_steps=4, count_per_step=1, count_name="tokens")
    save = hooks.CheckpointHook(checkpoints, {}, clock, report, every=1, max_failures=3)
    step = jax.jit(lambda state, batch: (state.replace(step=state.step + 1), {"loss": jnp.float32(1)}))

    def run():
        loop.run_steps(
            TrainState(jnp.int32(0), None, {}, ()), step, ((n, {}) for n in range(4)), num_steps=4, hooks=[save, report]
        )

    if saved is None:
        with pytest.raises(SaveError, match="3 in a row"):
            run()
        return
    run()
    assert checkpoints.saved == saved, "the last state is saved, whatever failed before"
    assert capsys.readouterr().err.count("trying again") == len(at_once) + len(later)


def test_free_memory_is_given_back_between_two_saves(tmp_path, monkeypatch):
    """When the last save has ended, which takes memory in the background, and before the next one begins."""
    told = []
    checkpoints = types.SimpleNamespace(
        failed=0,
        latest_step=lambda: None,
        wait=lambda: told.append("wait"),
        save=lambda *_: told.append("save"),
        close=Kept().close,
    )
    monkeypatch.setattr(hooks.processes, "malloc_trim", lambda: told.append("give back"))
    report = hooks.MetricsHook(
        MetricsWriter(tmp_path, 0, tensorboard=False),
        hooks.TrainingClock(),
        every=1,
        num_steps=2,
        count_per_step=1,
        count_name="",
    )
    save = hooks.CheckpointHook(checkpoints, {}, hooks.TrainingClock(), report, every=1)
    step = jax.jit(lambda state, batch: (state.replace(step=state.step + 1), {"loss": jnp.float32(1)}))
    loop.run_steps(
        TrainState(jnp.int32(0), None, {}, ()), step, ((n, {}) for n in range(2)), num_steps=2, hooks=[save, report]
    )
    assert told == [*["wait", "give back", "save"] * 2, "wait"]


def test_events_come_in_their_order(tmp_path):
    """An evaluation and a save see the state before the next step; a report waits for its step last."""
    told = []

    class Told(hooks.Hook):
        def before_step(self, run):
            told.append(("before", run.step))

        def after_step(self, run, values):
            told.append(("after", run.step))

        def on_end(self, run):
            told.append(("end", run.step))

        def close(self):
            told.append("close")

    @jax.jit
    def step(state, batch):
        return state, {"loss": jnp.float32(1)}

    loop.run_steps(TrainState(jnp.int32(4), None, {}, ()), step, iter([(4, {}), (5, {})]), num_steps=6, hooks=[Told()])
    assert told == [("before", 4), ("after", 5), ("before", 5), ("after", 6), ("end", 6), "close"]
    metrics, clock = MetricsWriter(tmp_path, 0, tensorboard=False), hooks.TrainingClock()
    report = hooks.MetricsHook(metrics, clock, every=1, num_steps=1, count_per_step=1, count_name="tokens")
    save = hooks.CheckpointHook(Kept(), {}, clock, report, every=1)
    with pytest.raises(ValueError, match="EvaluationHook, CheckpointHook, PreemptionHook, ProfilerHook, MetricsHook"):
        loop.run_steps(TrainState(jnp.int32(0), None, {}, ()), step, iter([]), num_steps=0, hooks=[report, save])


def test_a_batch_left_on_the_host_is_refused():
    step = jax.jit(lambda state, batch: (state.replace(step=state.step + batch["one"]), {"loss": jnp.float32(1)}))
    for batch in ({"one": np.int32(1)}, {"one": jnp.int32(1)}):
        state = TrainState(jnp.int32(0), None, {}, ())
        if isinstance(batch["one"], jax.Array):
            assert int(loop.run_steps(state, step, iter([(0, batch)]), num_steps=1).step) == 1
            continue
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            loop.run_steps(state, step, iter([(0, batch)]), num_steps=1)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The loss before an update may be finite, and the update not."""
    saved = []

    class Noting(Kept):
        def save(self, step, *_):
            saved.append(step)

    metrics, clock = MetricsWriter(tmp_path, 0, tensorboard=False), hooks.TrainingClock()
    report = hooks.MetricsHook(metrics, clock, every=1, num_steps=4, count_per_step=1, count_name="tokens")
    save = hooks.CheckpointHook(Noting(), {}, clock, report, every=1)

    @jax.jit
    def step(state, batch):
        return state.replace(step=state.step + 1, params={"w": state.params["w"] * 1e20}), {"loss": jnp.float32(1)}

    state = TrainState(jnp.int32(0), None, {"w": jnp.float32(1)}, ())
    with pytest.raises(hooks.NonFiniteError, match="infinite or not a number after step 2, .* are not saved"):
        loop.run_steps(state, step, ((number, {}) for number in range(4)), num_steps=4, hooks=[save, report])
    assert saved == [1]


def test_time_stands_still_in_a_pause():
    clock = hooks.TrainingClock(100.0)
    before = clock.step_seconds()
    with clock.pause():
        time.sleep(0.2)
    assert clock.step_seconds() - before < 0.1 and 100.2 <= clock.seconds() < 101
