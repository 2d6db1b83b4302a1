"""What happens beside the steps of a run: evaluations, saves, the wish to stop, profiles, reports."""

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from seqpe_jax.distributed import hardware, processes
from seqpe_jax.distributed.progress import MetricsWriter, ProgressLine
from seqpe_jax.distributed.waiting import run_interruptible
from seqpe_jax.errors import EXIT_PREEMPTED, Failure
from seqpe_jax.files import AnyPath, staged_dir
from seqpe_jax.training.best_checkpoint import EVALUATION_KEY
from seqpe_jax.training.checkpoint import Checkpointer, SaveError
from seqpe_jax.training.clock import Clock
from seqpe_jax.training.state import TrainState, all_finite

Values = dict[str, jax.Array]


class NonFiniteError(Failure):
    """A loss, or a parameter, became infinite or not a number."""


_all_finite = jax.jit(all_finite)


class Preempted(Failure):
    """The run was told to stop; its state is saved, and a scheduler may start it again on the exit code alone."""

    code = EXIT_PREEMPTED


@dataclasses.dataclass
class LoopState:
    """Where a run stands.

    Attributes:
      state: after `step` steps; first: steps done before this start; steps: in all.
      last_eval: (step, what the newest evaluation found of the state then).
    """

    state: TrainState
    step: int
    first: int
    steps: int
    last_eval: tuple[int, dict[str, float]] = (-1, {})


class Hook:
    """Something that may happen around each step; the loop calls its hooks in their order."""

    def before_step(self, run: LoopState) -> None:
        """Called before each step."""

    def poll(self, run: LoopState) -> None:
        """Called now and then while something takes long that another thread does, such as compiling a step."""

    def after_step(self, run: LoopState, values: Values) -> None:
        """Called when a step has been dispatched; its metrics need not be there yet."""

    def on_end(self, run: LoopState) -> None:
        """Called after the last step."""

    def close(self) -> None:
        """Called however the run ends."""


class MetricsHook(Hook):
    """Tells each step's metrics one step later, so that the device never waits for the host.

    Args:
      metrics: where lines go, every `every` steps; clock: of the run.
      units: that a step reads, for the rate `train/UNIT_per_second`.
      flops: of a step on all devices, by the name of the utilisation that they make, such as "mfu" for `train/mfu`.
      saved: returns the newest saved step, for the message where a step is not finite.
      skips: steps that are not finite and may be skipped in a row, where the train step skips them; 0 = the first ends the
        run. skipped: those of earlier starts.

    Attributes:
      skipped: steps that were skipped so far.
    """

    def __init__(
        self,
        metrics: MetricsWriter,
        clock: Clock,
        *,
        every: int,
        steps: int,
        units: int,
        unit: str,
        flops: Mapping[str, float] | None = None,
        saved: Callable[[], int | None] = lambda: None,
        skips: int = 0,
        skipped: int = 0,
    ):
        self._metrics, self._clock, self._every, self._saved = metrics, clock, every, saved
        self._units, self._unit, self._flops = units, unit, flops or {}
        self._skips, self._in_a_row, self.skipped = skips, 0, skipped
        self._progress = ProgressLine(steps)
        self._pending: tuple[int, Values] | None = None
        self._reported: tuple[int, float] | None = None  # steps done and the time then

    def before_step(self, run: LoopState) -> None:
        """Begins to take the time at the first step."""
        if self._reported is None:
            self._reported = (run.step, self._clock.stepping())

    def after_step(self, run: LoopState, values: Values) -> None:
        """Tells the step before this one."""
        self.flush(run)
        self._pending = (run.step, values)

    def on_end(self, run: LoopState) -> None:
        """Tells the last step."""
        self.flush(run)

    def flush(self, run: LoopState) -> None:
        """Tells a step that has not been told yet; waits for it. Raises: NotFinite."""
        if self._pending is None:
            return
        (done, values), self._pending = self._pending, None
        told = {
            name: values[name] for name in values if name in ("loss", "skipped") or name.startswith("gradient_norm/")
        }
        numbers = {name: float(value) for name, value in jax.device_get(told).items()}
        loss = numbers["loss"]
        lost = bool(numbers["skipped"]) if self._skips else not all(map(math.isfinite, numbers.values()))
        self._in_a_row = self._in_a_row + 1 if lost else 0
        if lost and self._in_a_row > self._skips:
            raise NonFiniteError(self._reason(done, values))
        self.skipped += lost
        before, since = self._reported
        now, compiled_now = (
            self._clock.stepping(),
            done == run.first + 1,
        )  # a start's first step waits for its compilation
        seconds = max(now - since, 1e-9) / (done - before)
        shares = (
            {} if compiled_now else {name: hardware.utilisation(flops, seconds) for name, flops in self._flops.items()}
        )
        due = done % self._every == 0 or done in (1, run.steps)
        if due:
            self._write(done, values, seconds, shares)
        if due or compiled_now:
            self._reported = (done, now)
        rate = "" if compiled_now else f"{self._units / seconds:,.0f} {self._unit}/s"
        skipped = f"{self.skipped} skipped" if self.skipped else ""
        share = shares.get("mfu")
        self._progress.update(done, loss=loss, notes=[rate, f"MFU {share:.0%}" if share else "", skipped])

    def _reason(self, done: int, values: Values) -> str:
        numbers = ", ".join(f"{name} {float(value):.3g}" for name, value in sorted(jax.device_get(values).items()))
        row = f", {self._in_a_row} in a row," if self._skips else ""
        saved = self._saved()
        kept = "nothing is saved yet" if saved is None else f"the last checkpoint is of step {saved}"
        skip = "" if self._skips else "Go on with optimizer.non_finite=skip, or "
        cure = f"{skip}lower optimizer.learning_rate or set optimizer.clip in a new workdir"
        return f"step {done}{row} is not finite ({numbers}); {kept}. {cure[0].upper()}{cure[1:]}"

    def _write(self, done: int, values: Values, seconds: float, shares: Mapping[str, float | None]) -> None:
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}
        # JSON has no number that is not finite: what a skipped step has none of is left out.
        line = {f"train/{name}": value for name, value in numbers.items() if math.isfinite(value)}
        if self._skips:
            line["train/skipped"] = self.skipped
        line |= {f"train/{self._unit}_per_second": self._units / seconds, "train/step_seconds": seconds}
        line |= {f"train/{name}": share for name, share in shares.items() if share is not None}
        if (held := hardware.peak_memory()) is not None:
            line["device/memory_bytes"] = held
        self._metrics.write(done, line, time=self._clock.seconds())

    def say(self, words: str) -> None:
        """Says something on a line of its own."""
        self._progress.say(words)

    @contextlib.contextmanager
    def paused_clock(self, run: LoopState) -> Iterator[None]:
        """What happens between steps, once the last of them has been told; it does not count as their time."""
        self.flush(run)
        with self._clock.pause():
            yield

    def close(self) -> None:
        """Ends the line and the files."""
        self._progress.close()
        self._metrics.close()


class EvaluationHook(Hook):
    """Evaluates every `every` steps and after the last one; a run that is told to stop does not end the evaluation first.

    Args:
      evaluate: (parameters, what to call between batches) -> what was measured.
      stop: says whether the run is told to stop.
      owed: the state that this start goes on from was to be evaluated, when the run was told to stop.
    """

    def __init__(
        self,
        evaluate: Callable[[Any, Callable[..., None]], dict[str, float]],
        metrics: MetricsWriter,
        clock: Clock,
        report: MetricsHook,
        stop: "PreemptionHook",
        *,
        every: int,
        pending_eval: bool = False,
    ):
        self._evaluate, self._metrics, self._clock, self._report, self._every = evaluate, metrics, clock, report, every
        self._stop, self._pending_eval = stop, pending_eval

    def before_step(self, run: LoopState) -> None:
        """Evaluates where it is time to."""
        if run.step % self._every == 0 if run.step > run.first else self._pending_eval:
            self.on_end(run)

    def on_end(self, run: LoopState) -> None:
        """Evaluates."""
        with self._report.paused_clock(run):
            values = self._stop.run_preemptible(run, lambda between: self._evaluate(run.state.params, between))
            self._metrics.write(run.step, values, time=self._clock.seconds())
        run.last_eval = run.step, values


class CheckpointHook(Hook):
    """Saves every `every` steps and after the last one, in the background; `meta` lies beside each state.

    A save that fails is tried again with the state of the next one, until `failures` in a row have failed; among several
    processes the first one ends the run.

    Args:
      before_each: called before a save, after one that failed and after the last one; what it raises ends the run.
    """

    def __init__(
        self,
        checkpoints: Checkpointer,
        meta: dict[str, Any],
        clock: Clock,
        report: MetricsHook,
        *,
        every: int,
        failures: int = 1,
        before_each: Callable[[], None] | None = None,
    ):
        self._checkpoints, self._meta, self._clock, self._report, self._every = checkpoints, meta, clock, report, every
        self._failures, self._before_each = failures, before_each or (lambda: None)

    def before_step(self, run: LoopState) -> None:
        """Saves where it is time to."""
        if run.step > run.first and run.step % self._every == 0:
            self.now(run)

    def now(self, run: LoopState) -> None:
        """Begins to save the state of this step, if that is not saved already. Raises: NotFinite: it is of no use."""
        with self._report.paused_clock(run):
            if not bool(_all_finite(run.state.params)):
                raise NonFiniteError(
                    f"parameters are infinite or not a number after step {run.step}, though the loss before was not: they "
                    f"are not saved, the last checkpoint is of step {self._checkpoints.latest()}. Lower "
                    "optimizer.learning_rate or set optimizer.clip, then start in a new workdir"
                )
            beside = {"seconds": self._clock.seconds(), "skipped": self._report.skipped}
            if run.last_eval[0] == run.step:
                beside[EVALUATION_KEY] = run.last_eval[1]
            try:
                self._checkpoints.wait()
            except SaveError as error:
                self._tell(error)
            processes.malloc_trim()  # what the last save took
            self._before_each()
            try:
                self._checkpoints.save(run.step, run.state, self._meta | beside)
            except SaveError as error:
                self._tell(error)

    def _tell(self, error: SaveError) -> None:
        """Says that a save failed. Raises: SaveFailed: it was one too many."""
        self._before_each()  # it failed since the folder is gone, which no other try would mend
        failed = self._checkpoints.failed
        if processes.is_multiprocess() or failed >= self._failures:
            raise SaveError(
                f"{error}, {failed} in a row; the last checkpoint is of step {self._checkpoints.latest()}. When that is "
                "mended, the same command goes on from there"
            ) from error
        self._report.say(f"{error}: trying again, {self._failures - failed} more before the run ends")

    def finish(self, run: LoopState) -> None:
        """Saves the state of this step and waits until it is there. Raises: SaveFailed, NotFinite."""
        while True:
            self.now(run)
            try:
                self._checkpoints.wait()
            except SaveError as error:
                self._tell(error)
            if not self._checkpoints.failed:
                self._before_each()  # the folder may have gone during the save
                return
            time.sleep(1)  # somebody may be making room

    def on_end(self, run: LoopState) -> None:
        """Saves the last state."""
        self.finish(run)

    def close(self) -> None:
        """Waits for saves under way."""
        self._checkpoints.close()


class _Left(Exception):
    """Work in another thread has ended early, since the run is told to stop."""


class PreemptionHook(Hook):
    """Ends the run, saved, before the next step when SIGTERM, SIGINT or SIGHUP comes; a second one acts at once.

    Among several processes JAX itself listens for SIGTERM and agrees with the others on a step; the other two are handed to
    it. A run under `nohup`, which ignores SIGHUP, goes on ignoring it.
    """

    def __init__(self, save: CheckpointHook):
        self._save, self._number = save, None
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGHUP, *(() if processes.is_multiprocess() else (signal.SIGTERM,))):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        self._number = number
        signal.signal(number, self._previous[number])
        if processes.is_multiprocess():
            os.kill(os.getpid(), signal.SIGTERM)

    def before_step(self, run: LoopState) -> None:
        """Asks; among several processes all do at the same places. Raises: Stopped."""
        if processes.reached_preemption() if processes.is_multiprocess() else self._number is not None:
            self._save.finish(run)
            name = "told to stop" if processes.is_multiprocess() else signal.Signals(self._number).name
            raise Preempted(f"{name} at step {run.step}: saved; the same command goes on from there")

    def poll(self, run: LoopState) -> None:
        """Asks where there is only one process: several would not ask at the same places. Raises: Stopped."""
        if not processes.is_multiprocess():
            self.before_step(run)

    def run_preemptible(self, run: LoopState, work: Callable[[Callable[..., None]], Any]) -> Any:
        """Returns work(between), long work beside the steps, which calls `between` now and then. Raises: Stopped."""
        if processes.is_multiprocess():
            return work(lambda *_: self.before_step(run))

        def between(*_: Any) -> None:
            if self._number is not None:
                raise _Left

        try:
            return run_interruptible(lambda: work(between), lambda: self.poll(run))
        except _Left:  # the signal came after the last look
            self.before_step(run)
            raise

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class ProfilerHook(Hook):
    """Records the steps of a window, (first, end), with the JAX profiler into WORKDIR/profile."""

    def __init__(self, window: tuple[int, int], workdir: AnyPath):
        self._window, self._folder, self._on = window, workdir / "profile", False
        self._here = contextlib.ExitStack()

    def before_step(self, run: LoopState) -> None:
        """Begins at the first step of the window."""
        if run.step == self._window[0]:
            folder = self._here.enter_context(staged_dir(self._folder))
            jax.profiler.start_trace(str(folder))
            self._on = True

    def after_step(self, run: LoopState, values: Values) -> None:
        """Ends with the last step of the window, when that is done."""
        if run.step == self._window[1]:
            jax.block_until_ready(run.state)
            self.close()

    def close(self) -> None:
        """Ends the record: a run may end within the window."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            self._here.close()


# What of a turn comes before what: an evaluation and a save see the state before the next step, a run that is told to stop
# is saved first, and a report waits for its step last.
HOOK_ORDER = (EvaluationHook, CheckpointHook, PreemptionHook, ProfilerHook, MetricsHook)


def check_hook_order(hooks: Sequence[Hook]) -> None:
    """Refuses hooks in another order than `HOOK_ORDER`. Raises: ValueError."""
    places = [HOOK_ORDER.index(type(hook)) for hook in hooks if type(hook) in HOOK_ORDER]
    if places != sorted(places):
        raise ValueError(f"hooks must come in the order {', '.join(kind.__name__ for kind in HOOK_ORDER)}")
