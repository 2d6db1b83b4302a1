"""The training loop and its hooks, around a train step that only counts."""

import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqpe_jax.distributed import hardware, processes
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import RunDir
from seqpe_jax.training import hooks, loop, watchdog
from seqpe_jax.training.checkpoint import SaveError
from seqpe_jax.training.metrics_writer import MetricsWriter
from seqpe_jax.training.step import TrainState, make_train_step
from seqpe_jax.training.watchdog import Watchdog, describe_stall
from tests.tiny import tiny_config


class FakeCheckpointer:
    """Checkpoints in memory: {step: metadata}. Saves fail at some calls, at once or in the background."""

    def __init__(self, fail_at_once=(), fail_later=()):
        self.fail_at_once, self.fail_later = fail_at_once, fail_later
        self.calls = self.failed = 0
        self.pending = None
        self.saved, self.log = {}, []

    def saved_step(self):
        return max(self.saved, default=None)

    def save(self, step, state, metadata):
        if step == self.saved_step():
            return
        self.calls += 1
        self.log.append("save")
        if self.calls in self.fail_at_once:
            self.failed += 1
            raise SaveError(f"the save of step {step} failed")
        self.pending = (self.calls, step, metadata)

    def wait(self):
        self.log.append("wait")
        if self.pending is None:
            return
        (call, step, metadata), self.pending = self.pending, None
        if call in self.fail_later:
            self.failed += 1
            raise SaveError(f"the save of step {step} failed")
        self.failed = 0
        self.saved[step] = metadata

    def close(self):
        self.wait()


@jax.jit
def count_step(state, batch):
    return state.replace(step=state.step + 1), {"loss": jnp.float32(1)}


class Run:
    """A run with all hooks.

    Args:
      folder: of the run.
      num_steps: length of the run.
      step: train step.
      state: initial state.
      evaluate: (state, callback between batches) -> metrics; None: no evaluation.
      checkpointer: of the run.
      eval_every, save_every: steps between two evaluations or saves.
      pending_eval: the evaluation of the initial state was interrupted.
      profile: window of the profiler.
      max_failures: failed saves in a row that end the run.
      clock: of the run.
      watchdog: seconds without progress that end the run; 0 = no watchdog.
      options: of the metrics hook.
    """

    def __init__(
        self,
        folder,
        *,
        num_steps=6,
        start=0,
        step=count_step,
        state=None,
        evaluate=None,
        checkpointer=None,
        eval_every=2,
        save_every=100,
        pending_eval=False,
        profile=None,
        max_failures=1,
        clock=None,
        watchdog=0.0,
        **options,
    ):
        folder.mkdir(exist_ok=True)
        self.folder, self.num_steps, self.step, self.start = folder, num_steps, step, start
        self.state = state or TrainState(jnp.int32(start), None, {}, ())
        self.checkpointer = checkpointer or FakeCheckpointer()
        self.clock = clock = clock or hooks.TrainingClock()
        writer = MetricsWriter(folder, start)
        options = {"every": 1, "num_steps": num_steps, "count_per_step": 10, "count_name": "tokens"} | options
        metrics = hooks.MetricsHook(writer, clock, latest_checkpoint=self.checkpointer.saved_step, **options)
        save = hooks.CheckpointHook(self.checkpointer, {}, clock, metrics, every=save_every, max_failures=max_failures)
        stop = hooks.PreemptionHook(save)
        self.hooks = [save, stop, metrics]
        if evaluate:
            options = {"every": eval_every, "pending_eval": pending_eval}
            self.hooks.insert(0, hooks.EvaluationHook(evaluate, writer, clock, metrics, stop, **options))
        if profile:
            self.hooks.insert(-1, hooks.ProfilerHook(profile, folder))
        if watchdog:
            watch = Watchdog(RunDir(folder), clock, seconds=watchdog, saved_step=self.checkpointer.saved_step)
            self.hooks.append(hooks.WatchdogHook(watch))

    def __call__(self, batches=None):
        batches = batches or ((step, {}) for step in range(self.start, self.num_steps))
        return loop.run_steps(
            self.state, self.step, batches, num_steps=self.num_steps, hooks=self.hooks, clock=self.clock
        )

    @property
    def lines(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def steps_with(self, name):
        return [line["step"] for line in self.lines if name in line]

    @property
    def has_profile(self):
        return any((self.folder / "profile").rglob("*.xplane.pb"))


def test_hooks_are_called_in_their_order(tmp_path):
    calls = []

    class Recorder(hooks.Hook):
        def before_step(self, loop):
            calls.append(("before", loop.step))

        def after_step(self, loop, metrics):
            calls.append(("after", loop.step))

        def on_end(self, loop):
            calls.append(("end", loop.step))

        def close(self):
            calls.append("close")

    state = TrainState(jnp.int32(4), None, {}, ())
    loop.run_steps(state, count_step, iter([(4, {}), (5, {})]), num_steps=6, hooks=[Recorder()])
    assert calls == [("before", 4), ("after", 5), ("before", 5), ("after", 6), ("end", 6), "close"]
    run = Run(tmp_path)
    run.hooks.reverse()
    with pytest.raises(ValueError, match="EvaluationHook, CheckpointHook, PreemptionHook, ProfilerHook, MetricsHook"):
        run()


def test_a_batch_left_on_the_host_is_refused():
    step = jax.jit(lambda state, batch: (state.replace(step=state.step + batch["one"]), {"loss": jnp.float32(1)}))

    def take_step(one):
        return loop.run_steps(TrainState(jnp.int32(0), None, {}, ()), step, iter([(0, {"one": one})]), num_steps=1)

    assert int(take_step(jnp.int32(1)).step) == 1
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        take_step(np.int32(1))


def test_step_time_excludes_evaluation(tmp_path):
    def evaluate(*_):
        time.sleep(0.5)
        return {"eval/loss": 1.0}

    run = Run(tmp_path, evaluate=evaluate)
    run()
    lines = [line for line in run.lines if "train/loss" in line]
    assert len(lines) == 6
    for line in lines[1:]:
        assert 0 < line["train/step_seconds"] < 0.5
        assert line["train/tokens_per_second"] == pytest.approx(10 / line["train/step_seconds"])
        assert not {"train/mfu", "device/memory_bytes"} & line.keys(), "the CPU is not in the table of chips"


def test_step_time_excludes_the_compilation(tmp_path):
    def batches():
        for step in range(40, 50):
            time.sleep(0.6 if step == 40 else 0.0)  # a slow compilation
            yield step, {}

    run = Run(tmp_path, start=40, num_steps=50, every=5)
    run(batches())
    assert [line["step"] for line in run.lines] == [45, 50]
    assert run.lines[0]["train/step_seconds"] < 0.1


def test_mfu_and_memory_of_a_known_chip(tmp_path, monkeypatch):
    chip = hardware.Chip("fast", 1e12, 2**30, "this test")
    monkeypatch.setattr(hardware, "find_chip", lambda kind: chip)
    monkeypatch.setattr(hardware, "peak_memory", lambda: 12345)
    run = Run(tmp_path, flops={"mfu": 1e6, "mfu_full_attention": 2e6})
    run()
    assert not {"train/mfu", "train/mfu_full_attention"} & run.lines[0].keys(), "the first step compiles"
    for line in run.lines[1:]:
        expected = 1e6 / line["train/step_seconds"] / (1e12 * jax.device_count())
        assert line["train/mfu"] == pytest.approx(expected)
        assert line["train/mfu_full_attention"] == pytest.approx(2 * expected)
    assert {line["device/memory_bytes"] for line in run.lines} == {12345}


def test_the_clock_excludes_pauses():
    clock = hooks.TrainingClock(100.0)
    before = clock.step_seconds()
    with clock.pause("save"):
        time.sleep(0.2)
    assert clock.step_seconds() - before < 0.1 and 100.2 <= clock.seconds() < 101


class Hour:
    """A clock that the test sets, in place of the module `time`, and a device that takes 3 seconds for a step."""

    def __init__(self):
        self.now = self.ready = 1000.0

    def monotonic(self):
        return self.now

    time = monotonic

    def sleep(self, seconds):
        self.now += seconds

    def dispatch(self, state, batch):
        self.ready = max(self.ready, self.now) + 3.0
        return count_step(state, batch)[0], {"loss": Later(self, self.ready)}


class Later:
    """A number that is there at a time."""

    def __init__(self, hour, ready):
        self.hour, self.ready = hour, ready

    def __array__(self):
        self.hour.now = max(self.hour.now, self.ready)
        return np.float32(1)


def test_where_the_time_went(tmp_path, monkeypatch):
    """Waiting for data, saves and evaluations; what is productive, of all time since the run's first start."""
    hour, checkpointer = Hour(), FakeCheckpointer()
    checkpointer.wait = lambda: hour.sleep(4.0)
    monkeypatch.setattr("seqpe_jax.training.clock.time", hour)
    monkeypatch.setattr(loop, "_compile", lambda *_: hour.sleep(30.0) or hour.dispatch)
    sent = []
    monkeypatch.setattr(processes, "share_status", lambda status: sent.append(status["host_seconds"]) or {})

    def batches():
        for step in range(8, 16):
            hour.sleep(0.5)
            yield step, {}

    clock = hooks.TrainingClock(60.0, productive=50.0, first_start=hour.now - 100.0)
    run = Run(
        tmp_path,
        start=8,
        num_steps=16,
        every=4,
        save_every=14,
        eval_every=100,
        checkpointer=checkpointer,
        clock=clock,
        evaluate=lambda *_: hour.sleep(10.0) or {"eval/loss": 1.0},
    )
    run(batches())
    first, last = [line for line in run.lines if "train/loss" in line]
    # The first step has compiled and does not count; of the others one batch is fetched while the device works.
    assert first["train/step_seconds"] == pytest.approx(3.0) and first["train/data_seconds"] == pytest.approx(0.5)
    assert first["train/save_seconds"] == 0.0 and last["train/save_seconds"] == 4.0
    assert last["train/step_seconds"] == pytest.approx(3.0, abs=0.25), "a save is no part of a step"
    assert last["train/data_seconds"] == pytest.approx(0.5, abs=0.125)
    assert sent[0] == pytest.approx(0.5), "the device accounts for the rest of the step"
    assert clock.productive == pytest.approx(50.0 + 7 * 3.0, abs=1.0) and clock.median_step == pytest.approx(3.0)
    assert last["train/goodput"] == pytest.approx(clock.productive / (last["time"] - 60.0 + 100.0), abs=0.01)


def test_the_slowest_host_is_named(tmp_path, monkeypatch, capsys):
    """That whose step has the most time in which it does not wait for the devices."""
    sent = []

    def share(status):
        sent.append(status)
        return {0: status, 1: {"host_seconds": 7.0}, 2: {"host_seconds": 0.5}}

    monkeypatch.setattr(processes, "share_status", share)
    monkeypatch.setattr(processes, "hosts", lambda: {0: "a", 1: "b", 2: "c"})
    run = Run(tmp_path, num_steps=3)
    run((step, time.sleep(0.1) or {}) for step in range(3))
    assert "slowest host b (process 1): 7 s a step" in capsys.readouterr().err
    assert 0.1 <= max(status["host_seconds"] for status in sent) < 0.5, "it waits for data, and hardly for the device"
    line = run.lines[-1]
    names = ("slowest_process", "slowest_seconds", "median_seconds")
    assert [line[f"hosts/{name}"] for name in names] == [1, 7.0, 0.5]


def test_a_run_without_progress_ends_with_its_stacks(tmp_path, monkeypatch, capsys):
    """Exit code 75: the state of the last save is safe, and a scheduler starts the command again."""
    ended, woken = [], threading.Event()

    def exit_process(code):
        ended.append(code)
        woken.set()
        raise SystemExit  # of the watchdog's thread alone

    def a_loader_that_sleeps():
        for step in range(6):
            if step == 4:
                woken.wait(60)
            yield step, {}

    monkeypatch.setattr(processes.roll_call, "exit_process", exit_process)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    run = Run(tmp_path, watchdog=1.0, save_every=2)
    run(a_loader_that_sleeps())
    assert ended == [75]
    said = capsys.readouterr().err
    assert "after step 4" in said and "this process waits for a batch of data since 1 s" in said, said
    assert "the same command resumes from step 2" in said, "the save of step 4 is not known to be done"
    stacks = (tmp_path / "stacks" / "process_0.txt").read_text()
    assert "a_loader_that_sleeps" in stacks and "run_steps" in stacks


def test_a_worker_whose_coordinator_does_not_answer_ends_alone(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(processes, "is_main_process", lambda: False)
    monkeypatch.setattr(processes, "report_stall", lambda status: ended.append(status["phase"]) or len(ended) < 3)
    monkeypatch.setattr(processes, "exit_alone", lambda *given: ended.append(given))
    clock = hooks.TrainingClock()
    clock.finish_step(0.01)
    with clock.phase("device"):
        watch = Watchdog(RunDir(tmp_path), clock, seconds=1.0, saved_step=lambda: 4)
        while len(ended) < 4:
            time.sleep(0.01)
        watch.stop()
    assert ended[:3] == ["device"] * 3 and ended[3][0] == 75, "it asks until it gets no answer"
    assert "process 0, the coordinator, does not answer" in ended[3][1] and "resumes from step 4" in ended[3][1]
    assert "finish_step" not in (tmp_path / "stacks" / "process_0.txt").read_text()


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_a_run_that_compiles_evaluates_or_saves(tmp_path, monkeypatch):
    """Which may take long, as long as everybody answers; then no stacks are written."""
    ended, asked = [], []

    def ask_all(with_stacks):
        asked.append(with_stacks)
        return {1: None if len(asked) > 2 else {"phase": "save", "seconds": 1.0, "step": 0, "over": False}}

    monkeypatch.setattr(processes, "ask_all", ask_all)
    monkeypatch.setattr(processes, "hosts", lambda: {0: "a", 1: "b"})
    monkeypatch.setattr(processes, "abort", lambda *given: ended.append((*given, (tmp_path / "stacks").exists())))
    clock = hooks.TrainingClock()
    with clock.phase("save"):
        watch = Watchdog(RunDir(tmp_path), clock, seconds=1.0)
        while not ended and len(asked) < 9:
            assert not (tmp_path / "stacks").exists() or len(asked) > 2
            time.sleep(0.01)
        watch.stop()
    [(code, reason, has_stacks)] = ended
    assert code == 75 and has_stacks and asked == [False, False, False, True]
    assert "process 1 (on b) does not answer" in reason


def test_only_chosen_processes_trace(monkeypatch):
    settings = tiny_config(profile__steps="1:2", profile__processes=(1, 3))
    with pytest.raises(InputError, match="profile.processes names process 1, but this run has 1 .0 to 0.: name some"):
        loop.check_profile(settings)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    loop.check_profile(settings)
    everybody = tiny_config(profile__steps="1:2", profile__processes=())
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert loop.is_profiled(settings) == (process in (1, 3)) and loop.is_profiled(everybody)
    assert not loop.is_profiled(tiny_config())


def test_the_watchdog_waits_ten_steps_and_longer_for_what_takes_long(tmp_path):
    clock = hooks.TrainingClock()
    watch = Watchdog(RunDir(tmp_path), clock, seconds=300.0, save_timeout=9000.0)
    watch.stop()
    assert watch.limit("device") == watchdog.LONG_SECONDS, "the first step compiles"
    for seconds in (1.0, 2.0, 50.0):
        clock.finish_step(seconds)
    assert watch.limit("device") == watch.limit("data") == watch.limit("step") == 300.0
    for _ in range(9):
        clock.finish_step(50.0)
    assert watch.limit("data") == 500.0
    assert watch.limit("evaluation") == watch.limit("compile") == watchdog.LONG_SECONDS
    assert watch.limit("save") == 9000.0


def test_who_holds_up_a_run_is_named():
    hosts = {process: f"host{process // 4}" for process in range(64)}
    waiting = {process: {"phase": "device", "seconds": 31.0, "step": 7} for process in range(64)}
    assert describe_stall(waiting | {5: {"phase": "data", "seconds": 32.0, "step": 6}}, hosts) == (
        "process 5 (on host1) waits for a batch of data since 32 s; 63 other(s) wait for the devices"
    )
    assert describe_stall(waiting | {9: None}, hosts).startswith("process 9 (on host2) does not answer")
    late = waiting | {5: {"phase": "device", "seconds": 30.0, "step": 6}}
    assert describe_stall(late, hosts).startswith("process 5 (on host1) waits for the devices since 30 s; 63 other")
    assert describe_stall(waiting, hosts).endswith("process 4 (on host1) and 59 more waits for the devices since 31 s")


@pytest.mark.slow
def test_a_profile_of_a_window_of_steps(tmp_path):
    @jax.jit
    def bad_at_3(state, batch):
        return state.replace(step=state.step + 1), {"loss": jnp.where(state.step == 3, jnp.nan, 1.0)}

    early = Run(tmp_path / "early", step=bad_at_3, profile=(2, 6))
    with pytest.raises(hooks.NonFiniteError):
        early()
    assert early.has_profile, "a run that ends within the window leaves its profile"
    complete = Run(tmp_path / "complete", profile=(2, 4))
    complete()
    assert complete.has_profile, "no profile of the earlier run is still open"
    past = Run(tmp_path / "past", start=3, profile=(2, 4))
    past()
    assert not past.has_profile


@pytest.mark.parametrize("name", ["loss", "gradient_norm/model"])
def test_a_non_finite_step_is_reported_with_all_metrics(tmp_path, name):
    @jax.jit
    def step(state, batch):
        metrics = {"loss": jnp.float32(1), "gradient_norm/model": jnp.float32(2), "term/task": jnp.float32(0.5)}
        bad = jnp.where(state.step == 2, jnp.inf, metrics[name])
        return state.replace(step=state.step + 1), metrics | {name: bad, "learning_rate": jnp.float32(0.1)}

    run = Run(tmp_path, step=step, save_every=1)
    with pytest.raises(hooks.NonFiniteError, match=f"step 3 is not finite.*{name} inf.*term/task 0.5.*of step 1"):
        run()


class Square:
    """A train step on one number w, whose loss is w * w * factor of the batch."""

    def __init__(self, skip):
        def loss(params, batch, key, step, microbatch_index, microbatch_weight):
            value = params["w"] ** 2 * batch["factor"][0]
            return value, {"loss": value}

        schedule = optax.linear_schedule(0.1, 0.0, 10)
        optimizer, params = optax.adam(schedule), {"w": jnp.float32(1)}
        self.state = TrainState(jnp.int32(0), None, params, optimizer.init(params))
        self.step = jax.jit(make_train_step(loss, optimizer, schedule, skip=skip))

    def train(self, folder, factors, **options):
        batches = ((n, {"factor": jnp.full((1,), factor, jnp.float32)}) for n, factor in enumerate(factors))
        run = Run(folder, step=self.step, state=self.state, num_steps=len(factors), **options)
        return run(batches), run.lines


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    nan, inf = float("nan"), float("inf")
    state, lines = Square(skip=True).train(tmp_path / "a", [1.0, nan, inf, 1.0], max_skips=2, skipped=3)
    assert [line["train/skipped"] for line in lines] == [3, 4, 5, 5], "those of earlier starts count too"
    assert "train/loss" not in lines[1] and "NaN" not in (tmp_path / "a" / "metrics.jsonl").read_text()
    assert np.isfinite(state.params["w"]) and int(state.step) == 4
    # Adam by hand: moments of the two finite gradients; count and learning rate of the fourth step.
    rates = [line["train/learning_rate"] for line in lines]
    first = 1 - rates[0]
    mean, square = 0.9 * 0.2 + 0.1 * 2 * first, 0.999 * 0.004 + 0.001 * (2 * first) ** 2
    expected = first - rates[3] * mean / (1 - 0.9**4) / np.sqrt(square / (1 - 0.999**4))
    assert float(state.params["w"]) == pytest.approx(expected, abs=1e-5)

    with pytest.raises(hooks.NonFiniteError, match="step 4, 3 in a row, is not finite"):
        Square(skip=True).train(tmp_path / "b", [1.0, nan, nan, nan, 1.0], max_skips=2)
    with pytest.raises(hooks.NonFiniteError, match="step 2 is not finite"):
        Square(skip=False).train(tmp_path / "c", [1.0, nan])


def test_non_finite_parameters_are_not_saved(tmp_path):
    """The loss before an update may be finite, and the update not."""

    @jax.jit
    def step(state, batch):
        return state.replace(step=state.step + 1, params={"w": state.params["w"] * 1e20}), {"loss": jnp.float32(1)}

    run = Run(tmp_path, step=step, state=TrainState(jnp.int32(0), None, {"w": jnp.float32(1)}, ()), save_every=1)
    with pytest.raises(hooks.NonFiniteError, match="infinite or not a number after step 2, .* are not saved"):
        run()
    assert list(run.checkpointer.saved) == [1]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(tmp_path, number):
    """A second one does what it would without us: SIGINT interrupts, others end the process."""
    seen = []

    def batches(count=1):
        for step in range(6):
            for _ in range(count if step == 3 else 0):
                os.kill(os.getpid(), number)
            yield step, {}

    def handler(*_):
        seen.append(number)

    before = signal.signal(number, handler)
    try:
        run = Run(tmp_path)
        with pytest.raises(hooks.Preempted, match=f"{number.name} at step 4") as caught:
            run(batches())
        assert list(run.checkpointer.saved) == [4] and caught.value.code == 75
        assert signal.getsignal(number) == handler and not seen, "the previous handler is restored"
        with pytest.raises(hooks.Preempted):
            Run(tmp_path / "twice")(batches(2))
        assert seen == [number]
        if number == signal.SIGHUP:  # as under nohup
            signal.signal(number, signal.SIG_IGN)
            assert int(Run(tmp_path)(batches()).step) == 6
    finally:
        signal.signal(number, before)


class Evaluation:
    """Three batches of evaluation; SIGTERM comes during the second one if `interrupt`."""

    def __init__(self, interrupt=False):
        self.interrupt, self.batches = interrupt, 0

    def __call__(self, params, between_batches):
        for batch in range(3):
            if self.interrupt and batch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)  # the main thread polls meanwhile
            between_batches(batch, 3)
            self.batches += 1
        return {"eval/loss@16": 1.5}


def test_metrics_of_an_evaluation_are_stored_with_its_checkpoint(tmp_path):
    evaluation = Evaluation()
    run = Run(tmp_path, num_steps=4, evaluate=evaluation, save_every=2)
    run()
    assert run.steps_with("eval/loss@16") == [2, 4] and evaluation.batches == 6
    assert list(run.checkpointer.saved) == [2, 4]
    assert all(metadata["evaluation"] == {"eval/loss@16": 1.5} for metadata in run.checkpointer.saved.values())


def test_a_signal_interrupts_an_evaluation_which_the_next_start_repeats(tmp_path):
    evaluation = Evaluation(interrupt=True)
    run = Run(tmp_path, num_steps=4, evaluate=evaluation, save_every=2)
    with pytest.raises(hooks.Preempted, match="SIGTERM at step 2: saved"):
        run()
    time.sleep(0.2)
    assert evaluation.batches == 1 and not run.steps_with("eval/loss@16")
    assert list(run.checkpointer.saved) == [2] and "evaluation" not in run.checkpointer.saved[2]
    for start, evaluated in ((2, [2, 4]), (4, [2, 4, 4])):  # 4: no steps are left
        run = Run(tmp_path, start=start, num_steps=4, evaluate=Evaluation(), pending_eval=True)
        run()
        assert run.steps_with("eval/loss@16") == evaluated


def test_a_signal_interrupts_the_compilation(tmp_path):
    compiled = []

    @jax.jit
    def step(state, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        compiled.append(True)
        return state.replace(step=state.step + 1), {"loss": jnp.float32(1)}

    run = Run(tmp_path, start=2, num_steps=9, step=step)
    with pytest.raises(hooks.Preempted, match="SIGTERM at step 2: saved"):
        run()
    assert not compiled and list(run.checkpointer.saved) == [2]
    while not compiled:  # Python must not exit while the compiler runs
        time.sleep(0.1)


@pytest.mark.parametrize(
    "fail_at_once, fail_later, saved",
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
def test_a_failed_save_is_retried_and_three_in_a_row_end_the_run(
    tmp_path, capsys, monkeypatch, fail_at_once, fail_later, saved
):
    monkeypatch.setattr(hooks, "RETRY_SECONDS", 0.0)
    checkpointer = FakeCheckpointer(fail_at_once, fail_later)
    run = Run(tmp_path, num_steps=4, checkpointer=checkpointer, save_every=1, max_failures=3)
    if saved is None:
        with pytest.raises(SaveError, match="3 in a row"):
            run()
        return
    run()
    assert list(checkpointer.saved) == saved, "the last state is saved, whatever failed before"
    assert capsys.readouterr().err.count("trying again") == len(fail_at_once) + len(fail_later)


def test_free_memory_is_returned_between_two_saves(tmp_path, monkeypatch):
    """After the last save has ended, which takes memory in the background, and before the next one begins."""
    run = Run(tmp_path, num_steps=2, save_every=1)
    monkeypatch.setattr(hooks.processes, "malloc_trim", lambda: run.checkpointer.log.append("trim"))
    run()
    assert run.checkpointer.log[:6] == ["wait", "trim", "save"] * 2
