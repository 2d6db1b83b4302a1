"""Hooks of the training loop: evaluation, checkpoints, preemption, profiler, metrics.

To add one: subclass `Hook`, give it a position in `HOOK_ORDER`, and create it in `training.loop.make_hooks`.
"""

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from seqpe_jax.distributed import hardware, processes
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import EXIT_PREEMPTED, Failure
from seqpe_jax.files import AnyPath, staged_dir
from seqpe_jax.metric_registry import (
    DATA_SECONDS,
    GOODPUT,
    MEDIAN_HOST_SECONDS,
    SAVE_SECONDS,
    SLOWEST_HOST_SECONDS,
    SLOWEST_PROCESS,
    STEP_SECONDS,
)
from seqpe_jax.run_dir import EVALUATION_KEY
from seqpe_jax.training import clock as phases
from seqpe_jax.training.checkpoint import Checkpointer, SaveError
from seqpe_jax.training.clock import TrainingClock
from seqpe_jax.training.metrics_writer import MetricsWriter
from seqpe_jax.training.step import Metrics, TrainState, all_finite
from seqpe_jax.training.watchdog import Watchdog

POLL_SECONDS = 0.1  # between two polls for a signal during long work
RETRY_SECONDS = 1.0  # between two attempts to save the last state, while somebody may be making room on the disk

_all_finite = jax.jit(all_finite)


class NonFiniteError(Failure):
    """A loss, a gradient norm or a parameter is infinite or not a number."""


class Preempted(Failure):
    """The run was asked to stop and its state is saved; the exit code lets a scheduler start it again."""

    code = EXIT_PREEMPTED


@dataclasses.dataclass
class LoopState:
    """State of the training loop, shared by its hooks.

    Attributes:
      state: train state after `step` steps.
      step: steps done.
      start_step: steps done before this start of the run.
      num_steps: length of the run.
      last_eval: (step, metrics) of the newest evaluation.
    """

    state: TrainState
    step: int
    start_step: int
    num_steps: int
    last_eval: tuple[int, dict[str, float]] = (-1, {})


class Hook:
    """Callbacks of the training loop, called for each hook in the order of `HOOK_ORDER`; each does nothing by default."""

    def before_step(self, loop: LoopState) -> None:
        """Called before each step."""

    def poll(self, loop: LoopState) -> None:
        """Called every `POLL_SECONDS` while the train step compiles in another thread."""

    def after_step(self, loop: LoopState, metrics: Metrics) -> None:
        """Called after a step is dispatched; reading its metrics waits for the device."""

    def on_end(self, loop: LoopState) -> None:
        """Called after the last step."""

    def close(self) -> None:
        """Called at the end of the loop, also after an error."""


class MetricsHook(Hook):
    """Writes the metrics of each step one step later, so that the device never waits for the host; stops on non-finite ones.

    Args:
      writer: metrics.jsonl and trackers of the run.
      clock: clock of the run.
      every: steps between two lines of metrics; the first and the last step are always written.
      num_steps: length of the run.
      count_per_step: tokens or images of a step.
      count_name: "tokens" or "images", for the rate `train/COUNT_NAME_per_second`.
      flops: floating-point operations of a step on all devices, by name of the utilization, such as "mfu".
      latest_checkpoint: returns the newest saved step, for the error message.
      max_skips: consecutive non-finite steps that the train step may skip; 0: the first one ends the run.
      skipped: non-finite steps of earlier starts.

    Attributes:
      skipped: non-finite steps of the run so far.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        clock: TrainingClock,
        *,
        every: int,
        num_steps: int,
        count_per_step: int,
        count_name: str,
        flops: Mapping[str, float] | None = None,
        latest_checkpoint: Callable[[], int | None] = lambda: None,
        max_skips: int = 0,
        skipped: int = 0,
    ):
        self.skipped = skipped
        self._writer = writer
        self._clock = clock
        self._every = every
        self._count_per_step = count_per_step
        self._count_name = count_name
        self._flops = flops or {}
        self._latest_checkpoint = latest_checkpoint
        self._max_skips = max_skips
        self._consecutive_skips = 0
        self._progress = ProgressLine(num_steps)
        self._pending: tuple[int, Metrics] | None = None
        self._last_flush = self._last_written = clock_reading(clock, -1)  # set before the first step
        self._last_saves = 0.0  # seconds in saves up to the last line
        self._slowest = ""  # host of a multi-process run, for the progress line

    def before_step(self, loop: LoopState) -> None:
        """Starts the first interval of the step time."""
        if self._last_written.step < 0:
            self._last_flush = self._last_written = clock_reading(self._clock, loop.step)

    def after_step(self, loop: LoopState, metrics: Metrics) -> None:
        """Reports the step before this one."""
        self.flush(loop)
        self._pending = (loop.step, metrics)

    def on_end(self, loop: LoopState) -> None:
        """Reports the last step."""
        self.flush(loop)
        self._writer.write_figures(loop.step)
        self._writer.complete = True

    def flush(self, loop: LoopState) -> None:
        """Waits for the pending step and reports it. Raises: NonFiniteError."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        with self._clock.phase(phases.DEVICE):
            loss = self._check_finite(step, metrics)
        now = clock_reading(self._clock, step)
        compiled_now = step == loop.start_step + 1  # the first step of a start waits for its compilation
        if not compiled_now:
            self._clock.finish_step(now.since(self._last_flush).seconds)
        self._last_flush = now
        mean = now.since(self._last_written)
        utilization = {}
        if not compiled_now:
            utilization = {name: hardware.utilisation(flops, mean.seconds) for name, flops in self._flops.items()}
        due = step % self._every == 0 or step in (1, loop.num_steps)
        if due:
            self._write(step, metrics, mean, utilization)
        if due or compiled_now:
            self._last_written = now
        rate = "" if compiled_now else f"{self._count_per_step / mean.seconds:,.0f} {self._count_name}/s"
        mfu = utilization.get("mfu")
        skipped = f"{self.skipped} skipped" if self.skipped else ""
        notes = [rate, f"MFU {mfu:.0%}" if mfu else "", skipped, self._slowest]
        self._progress.update(step, loss=loss, notes=notes)

    @contextlib.contextmanager
    def paused_clock(self, loop: LoopState, phase: str) -> Iterator[None]:
        """Excludes work between two steps, a phase of the clock, from the step time, after the pending step is reported."""
        self.flush(loop)
        with self._clock.pause(phase):
            yield

    def print_line(self, text: str) -> None:
        """Prints a message without breaking the progress line."""
        self._progress.say(text)

    def close(self) -> None:
        """Ends the progress line and closes the files."""
        self._progress.close()
        self._writer.close()

    def _check_finite(self, step: int, metrics: Metrics) -> float:
        """Returns the loss of a step and counts skipped steps. Raises: NonFiniteError."""
        names = [name for name in metrics if name in ("loss", "skipped") or name.startswith("gradient_norm/")]
        values = {name: float(value) for name, value in jax.device_get({name: metrics[name] for name in names}).items()}
        non_finite = bool(values["skipped"]) if self._max_skips else not all(map(math.isfinite, values.values()))
        self._consecutive_skips = self._consecutive_skips + 1 if non_finite else 0
        if self._consecutive_skips > self._max_skips:
            raise NonFiniteError(self._non_finite_message(step, metrics))
        self.skipped += non_finite
        return values["loss"]

    def _non_finite_message(self, step: int, metrics: Metrics) -> str:
        numbers = ", ".join(f"{name} {float(value):.3g}" for name, value in sorted(jax.device_get(metrics).items()))
        in_a_row = f", {self._consecutive_skips} in a row," if self._max_skips else ""
        checkpoint = describe_saved(self._latest_checkpoint())
        cure = "lower optimizer.learning_rate or set optimizer.clip in a new workdir"
        if not self._max_skips:
            cure = f"resume with optimizer.non_finite=skip, or {cure}"
        return f"step {step}{in_a_row} is not finite ({numbers}); {checkpoint}. {cure[0].upper()}{cure[1:]}"

    def _write(
        self, step: int, metrics: Metrics, mean: "ClockReading", utilization: Mapping[str, float | None]
    ) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        # JSON has no non-finite numbers: those of a skipped step are left out.
        line = {f"train/{name}": value for name, value in values.items() if math.isfinite(value)}
        if self._max_skips:
            line["train/skipped"] = self.skipped
        line[f"train/{self._count_name}_per_second"] = self._count_per_step / mean.seconds
        saves = self._clock.phase_seconds(phases.SAVE)
        line |= {
            STEP_SECONDS: mean.seconds,
            DATA_SECONDS: mean.data,
            SAVE_SECONDS: saves - self._last_saves,
            GOODPUT: self._clock.goodput(),
        }
        self._last_saves = saves
        line |= self._compare_hosts(max(0.0, mean.seconds - mean.device))
        line |= {f"train/{name}": share for name, share in utilization.items() if share is not None}
        if (peak_bytes := hardware.peak_memory()) is not None:
            line["device/memory_bytes"] = peak_bytes
        self._writer.write(step, line, time=self._clock.seconds())

    def _compare_hosts(self, seconds: float) -> dict[str, float]:
        """Sends the time of a step that the devices do not account for; returns metrics of the slowest process, once all did."""
        own = {
            process: status["host_seconds"]
            for process, status in processes.share_status({"host_seconds": seconds}).items()
        }
        if len(own) < max(2, jax.process_count()):
            return {}
        slowest = max(own, key=lambda process: own[process])
        self._slowest = f"slowest host {processes.hosts()[slowest]} (process {slowest}): {own[slowest]:.3g} s a step"
        return {
            SLOWEST_PROCESS: slowest,
            SLOWEST_HOST_SECONDS: own[slowest],
            MEDIAN_HOST_SECONDS: statistics.median(own.values()),
        }


@dataclasses.dataclass(frozen=True)
class ClockReading:
    """A reading of a run's clock, or the mean of a step between two.

    Attributes:
      step: steps done.
      seconds: step time.
      data: seconds in which the process waited for data.
      device: seconds in which it waited for the devices.
    """

    step: int
    seconds: float
    data: float
    device: float

    def since(self, earlier: "ClockReading") -> "ClockReading":
        """Returns the mean of a step since an earlier reading."""
        steps = self.step - earlier.step
        return ClockReading(
            steps,
            max(self.seconds - earlier.seconds, 1e-9) / steps,
            (self.data - earlier.data) / steps,
            (self.device - earlier.device) / steps,
        )


def clock_reading(clock: TrainingClock, step: int) -> ClockReading:
    """Returns the present reading of a clock."""
    return ClockReading(
        step, clock.step_seconds(), clock.phase_seconds(phases.DATA), clock.phase_seconds(phases.DEVICE)
    )


class EvaluationHook(Hook):
    """Evaluates every `every` steps and after the last one; preemption interrupts an evaluation between two batches.

    Args:
      evaluate: (state, callback between batches) -> metrics.
      writer: metrics.jsonl and trackers of the run.
      clock: clock of the run.
      metrics_hook: pauses the step time.
      preemption: ends the run during an evaluation.
      every: steps between two evaluations.
      pending_eval: the evaluation of the restored state was interrupted by preemption and is done first.
    """

    def __init__(
        self,
        evaluate: Callable[[Any, Callable[..., None]], dict[str, float]],
        writer: MetricsWriter,
        clock: TrainingClock,
        metrics_hook: MetricsHook,
        preemption: "PreemptionHook",
        *,
        every: int,
        pending_eval: bool = False,
    ):
        self._evaluate = evaluate
        self._writer = writer
        self._clock = clock
        self._metrics_hook = metrics_hook
        self._preemption = preemption
        self._every = every
        self._pending_eval = pending_eval

    def before_step(self, loop: LoopState) -> None:
        """Evaluates if due."""
        due = loop.step % self._every == 0 if loop.step > loop.start_step else self._pending_eval
        if due:
            self.on_end(loop)

    def on_end(self, loop: LoopState) -> None:
        """Evaluates and writes the metrics."""

        def evaluate(between_batches: Callable[..., None]) -> dict[str, float]:
            def after_batch(*done: int) -> None:
                self._clock.progress()
                between_batches(*done)

            return self._evaluate(loop.state, after_batch)

        with self._metrics_hook.paused_clock(loop, phases.EVALUATION):
            metrics = self._preemption.run_preemptible(loop, evaluate)
            self._writer.write(loop.step, metrics, time=self._clock.seconds())
            self._writer.write_evaluation(loop.step, metrics)
        loop.last_eval = loop.step, metrics


class CheckpointHook(Hook):
    """Saves the state every `every` steps and after the last one, in the background.

    After a failed save the next due state is saved instead, until `max_failures` saves in a row have failed. In a
    multi-process run the first failure ends the run.

    Args:
      checkpointer: checkpointer of the run.
      metadata: stored with each state.
      clock: clock of the run.
      metrics_hook: pauses the step time.
      every: steps between two saves.
      max_failures: failed saves in a row that end the run.
      check_owned: called before each save, after a failed one and after the last one; raises if the folder of the run now
        belongs to another process.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        metadata: dict[str, Any],
        clock: TrainingClock,
        metrics_hook: MetricsHook,
        *,
        every: int,
        max_failures: int = 1,
        check_owned: Callable[[], None] = lambda: None,
    ):
        self._checkpointer = checkpointer
        self._metadata = metadata
        self._clock = clock
        self._metrics_hook = metrics_hook
        self._every = every
        self._max_failures = max_failures
        self._check_owned = check_owned

    def before_step(self, loop: LoopState) -> None:
        """Saves if due."""
        if loop.step > loop.start_step and loop.step % self._every == 0:
            self.save(loop)

    def on_end(self, loop: LoopState) -> None:
        """Saves the last state."""
        self.save_and_wait(loop)

    def save(self, loop: LoopState) -> None:
        """Starts to save the state, unless it is saved already. Raises: NonFiniteError, SaveError."""
        with self._metrics_hook.paused_clock(loop, phases.SAVE):
            if not bool(_all_finite(loop.state.params)):
                raise NonFiniteError(
                    f"parameters are infinite or not a number after step {loop.step}, though the loss before was finite: "
                    f"they are not saved, {describe_saved(self._checkpointer.saved_step())}. Lower "
                    "optimizer.learning_rate or set optimizer.clip, then start in a new workdir"
                )
            metadata = self._metadata | {
                "seconds": self._clock.seconds(),
                "productive_seconds": self._clock.productive,
                "skipped": self._metrics_hook.skipped,
            }
            eval_step, eval_metrics = loop.last_eval
            if eval_step == loop.step:
                metadata[EVALUATION_KEY] = eval_metrics
            self._wait()
            processes.malloc_trim()  # memory of the last save
            self._check_owned()
            try:
                self._checkpointer.save(loop.step, loop.state, metadata)
            except SaveError as error:
                self._handle_failure(error)

    def save_and_wait(self, loop: LoopState) -> None:
        """Saves the state and waits until that is done. Raises: NonFiniteError, SaveError."""
        while True:
            self.save(loop)
            with self._clock.phase(phases.SAVE):
                self._wait()
            if not self._checkpointer.failed:
                self._check_owned()  # the folder may have been removed during the save
                return
            time.sleep(RETRY_SECONDS)

    def close(self) -> None:
        """Waits for a save in progress."""
        with self._clock.phase(phases.SAVE):
            self._checkpointer.close()

    def _wait(self) -> None:
        try:
            self._checkpointer.wait()
        except SaveError as error:
            self._handle_failure(error)

    def _handle_failure(self, error: SaveError) -> None:
        """Prints a warning about a failed save. Raises: SaveError: too many have failed."""
        self._check_owned()  # a removed folder makes every further save fail
        failures = self._checkpointer.failed
        if processes.is_multiprocess() or failures >= self._max_failures:
            raise SaveError(
                f"{error}, {failures} in a row; {describe_saved(self._checkpointer.saved_step())}. Once the cause is fixed, "
                "the same command resumes from there"
            ) from error
        self._metrics_hook.print_line(
            f"{error}: trying again, {self._max_failures - failures} more before the run ends"
        )


def describe_saved(step: int | None) -> str:
    """Returns which step the last checkpoint is of, in words; None = there is none."""
    return "no checkpoint is saved yet" if step is None else f"the last checkpoint is of step {step}"


class _Interrupted(Exception):
    """Work in another thread has ended early because of a signal."""


class PreemptionHook(Hook):
    """Saves and ends the run before the next step after SIGTERM, SIGINT or SIGHUP; a second signal acts at once.

    In a multi-process run JAX listens for SIGTERM and lets all processes agree on a step; the other two signals are
    converted to SIGTERM. A run under `nohup`, which ignores SIGHUP, keeps ignoring it.

    Args:
      checkpoint_hook: saves the state.
    """

    def __init__(self, checkpoint_hook: CheckpointHook):
        self._checkpoint_hook = checkpoint_hook
        self._signal: int | None = None
        self._previous_handlers: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGHUP, *(() if processes.is_multiprocess() else (signal.SIGTERM,))):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)

    def _handle_signal(self, number: int, _: Any) -> None:
        self._signal = number
        signal.signal(number, self._previous_handlers[number])
        if processes.is_multiprocess():
            os.kill(os.getpid(), signal.SIGTERM)

    def before_step(self, loop: LoopState) -> None:
        """Saves and ends the run after a signal; all processes call this at the same steps. Raises: Preempted."""
        stop = processes.reached_preemption() if processes.is_multiprocess() else self._signal is not None
        if stop:
            self._checkpoint_hook.save_and_wait(loop)
            name = "preempted" if processes.is_multiprocess() else signal.Signals(self._signal).name
            raise Preempted(f"{name} at step {loop.step}: saved; the same command resumes from there")

    def poll(self, loop: LoopState) -> None:
        """Does the same in a single-process run; several processes would not poll at the same moments."""
        if not processes.is_multiprocess():
            self.before_step(loop)

    def run_preemptible(self, loop: LoopState, work: Callable[[Callable[..., None]], Any]) -> Any:
        """Returns work(callback), where the long work between two steps calls the callback often. Raises: Preempted."""
        if processes.is_multiprocess():
            return work(lambda *_: self.before_step(loop))

        def interrupt(*_: Any) -> None:
            if self._signal is not None:
                raise _Interrupted

        try:
            return run_interruptible(lambda: work(interrupt), lambda: self.poll(loop))
        except _Interrupted:  # the signal came after the last poll
            self.before_step(loop)
            raise

    def close(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)


class ProfilerHook(Hook):
    """Records a range of steps with the JAX profiler into WORKDIR/profile.

    Args:
      window: (first step, end step).
      workdir: folder of the run.
    """

    def __init__(self, window: tuple[int, int], workdir: AnyPath):
        self._start_step, self._end_step = window
        self._folder = workdir / "profile"
        self._running = False
        self._staged = contextlib.ExitStack()

    def before_step(self, loop: LoopState) -> None:
        """Starts the trace at the first step."""
        if loop.step == self._start_step:
            folder = self._staged.enter_context(staged_dir(self._folder))
            jax.profiler.start_trace(str(folder))
            self._running = True

    def after_step(self, loop: LoopState, metrics: Metrics) -> None:
        """Stops the trace when the last step is done on the device."""
        if loop.step == self._end_step:
            jax.block_until_ready(loop.state)
            self.close()

    def close(self) -> None:
        """Stops the trace of a run that ends before the end step."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._staged.close()


class WatchdogHook(Hook):
    """Reports finished steps to the watchdog, until the loop ends.

    Args:
      watchdog: watchdog of the run.
    """

    def __init__(self, watchdog: Watchdog):
        self._watchdog = watchdog

    def after_step(self, loop: LoopState, metrics: Metrics) -> None:
        """Counts a step that is dispatched."""
        self._watchdog.step = loop.step

    def close(self) -> None:
        """Stops the watchdog."""
        self._watchdog.stop()


# Evaluation and checkpoint see the state before the next step, an evaluation is stored with its checkpoint, a preempted run
# saves first, and metrics are last because they wait for the device. Hooks are closed in this order: the watchdog watches
# until nothing is left that could hang.
HOOK_ORDER = (EvaluationHook, CheckpointHook, PreemptionHook, ProfilerHook, MetricsHook, WatchdogHook)


def check_hook_order(hooks: Sequence[Hook]) -> None:
    """Raises ValueError unless hooks are in the order of `HOOK_ORDER`."""
    ranks = [HOOK_ORDER.index(type(hook)) for hook in hooks if type(hook) in HOOK_ORDER]
    if ranks != sorted(ranks):
        raise ValueError(f"hooks must be in the order {', '.join(kind.__name__ for kind in HOOK_ORDER)}")


def run_interruptible(work: Callable[[], Any], poll: Callable[[], None]) -> Any:
    """Returns work(), computed in another thread while this thread polls for signals.

    Python handles a signal only in its main thread and only between two bytecode instructions: a main thread inside the
    compiler or waiting for a device would react to no signal.

    Args:
      work: called in another thread; its exception is raised here.
      poll: called in this thread every `POLL_SECONDS` and once at the end. Its exception is raised at once; the work then
        continues in a daemon thread, which does not keep the process alive.
    """
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # also SystemExit and KeyboardInterrupt are raised in the polling thread
            future.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()
    while not future.done():
        concurrent.futures.wait([future], POLL_SECONDS)
        poll()
    return future.result()
