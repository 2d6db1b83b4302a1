"""The order of events of a run, and nothing else.

Each turn: evaluate if due -> save if due or told to stop -> fetch -> dispatch -> report the previous step's metrics,
so that the device never waits for the host -> stop when a loss is not finite, with the last good checkpoint kept.
"""

import contextlib
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from seqpe_jax.errors import Failure
from seqpe_jax.runtime import chips, hosts
from seqpe_jax.runtime.checkpoint import Checkpoints
from seqpe_jax.runtime.progress import MetricsWriter, ProgressLine
from seqpe_jax.training.state import TrainState
from seqpe_jax.training.step import TrainStep


class NotFinite(Failure):
    """A loss became infinite or not a number."""


class Stopped(Failure):
    """The run was told to stop; its state is saved."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish to stop while a run is on; a second SIGINT, or SIGTERM if alone, acts at once.

    Among several processes JAX itself listens for SIGTERM and agrees with the others on a step; SIGINT is handed to it.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if hosts.several() else (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(number, self._previous[number])
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)

    def before(self, step: int) -> bool:
        """Whether the run stops before this step, the same in all processes; asked once for each step."""
        return hosts.told_to_stop(step) if hosts.several() else self.number is not None


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[tuple[int, dict[str, jax.Array]]],
    *,
    steps: int,
    units_per_step: int,
    unit: str,
    checkpoints: Checkpoints,
    save_every: int,
    meta: dict[str, Any],
    metrics: MetricsWriter,
    report_every: int,
    flops_per_step: float = 0.0,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    profile: tuple[int, int] | None = None,
    workdir: pathlib.Path,
    seconds_before: float = 0.0,
) -> TrainState:
    """Trains until `steps` and returns the final state, saved.

    Args:
      state: where the run stands; donated.
      train_step: compiled; batches: (step, global batch) from the state's step on.
      units_per_step: what one step reads, in `unit`s ("tokens"), for the rate `train/UNIT_per_second`.
      flops_per_step: of all devices, for `train/mfu` (see `runtime.chips`); 0 = unknown.
      profile: (first, end) of the steps that the JAX profiler records into WORKDIR/profile.
      meta: saved beside each state; seconds_before: training seconds before this start.

    Raises:
      NotFinite: a loss is not finite; checkpoints hold the last state saved before.
      Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    first = int(jax.device_get(state.step))
    progress = ProgressLine(steps)
    began = time.monotonic()
    reported = (first, began)  # steps done and the time then, which steps and nothing else take from there on
    profiling = False
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def report(done: int, values: dict[str, jax.Array]) -> None:
        """Checks the metrics of `done` steps, and writes them when due."""
        nonlocal reported
        loss = float(values["loss"])
        if not math.isfinite(loss):
            last = checkpoints.latest()
            checkpoints.close()
            raise NotFinite(
                f"the loss is {loss} after step {done}; the last checkpoint is of step {last}. Lower "
                "optimizer.learning_rate or set optimizer.clip, then start in a new workdir"
            )
        now = time.monotonic()
        seconds = max(now - reported[1], 1e-9) / (done - reported[0])
        compiled_now = done == first + 1  # a start's first step waits for its compilation
        share = chips.utilisation(flops_per_step, seconds) if flops_per_step and not compiled_now else None
        if done % report_every == 0 or done in (1, steps):
            line = {f"train/{name}": float(value) for name, value in jax.device_get(values).items()}
            line |= {f"train/{unit}_per_second": units_per_step / seconds, "train/step_seconds": seconds}
            if share is not None:
                line["train/mfu"] = share
            if (held := chips.peak_memory()) is not None:
                line["device/memory_bytes"] = held
            metrics.write(done, line, time=seconds_before + now - began)
            reported = (done, now)
        elif compiled_now:
            reported = (done, now)
        rate = "" if compiled_now else f"{units_per_step / seconds:,.0f} {unit}/s"
        progress.update(done, loss=loss, notes=[rate, f"MFU {share:.0%}" if share else ""])

    def settle() -> None:
        nonlocal pending
        if pending is not None:
            report(*pending)
            pending = None

    @contextlib.contextmanager
    def aside() -> Iterator[None]:
        """What happens between steps, which then does not count as their time."""
        nonlocal reported
        settle()
        start = time.monotonic()
        yield
        reported = (reported[0], reported[1] + time.monotonic() - start)

    def save(step: int) -> None:
        checkpoints.save(step, state, meta | {"seconds": seconds_before + time.monotonic() - began})

    def examine(step: int) -> None:
        metrics.write(step, evaluate(state.params), time=seconds_before + time.monotonic() - began)

    def stop_profile() -> None:
        nonlocal profiling
        if profiling:
            profiling = False
            jax.profiler.stop_trace()

    with StopRequest() as stop, contextlib.closing(progress), contextlib.closing(metrics), contextlib.ExitStack() as final:
        final.callback(stop_profile)  # a run may end within the window
        for step in range(first, steps):
            if evaluate is not None and evaluate_every and step > first and step % evaluate_every == 0:
                with aside():
                    examine(step)
            told = stop.before(step)
            if told or (step > first and step % save_every == 0):
                with aside():
                    save(step)
            if told:
                checkpoints.close()
                name = "told to stop" if hosts.several() else signal.Signals(stop.number).name
                raise Stopped(f"{name} at step {step}: saved; the same command goes on from there")
            if profile is not None and step == profile[0]:
                jax.profiler.start_trace(str(workdir / "profile"))
                profiling = True
            number, batch = next(batches)
            if number != step:
                raise AssertionError(f"the loader gave batch {number} for step {step}")
            if step == first and hosts.several():  # Gloo waits half a minute for a process that still compiles
                train_step = train_step.lower(state, batch).compile()
                hosts.sync()
            state, values = train_step(state, batch)
            if pending is not None:
                report(*pending)
            pending = (step + 1, values)
            if profile is not None and step + 1 == profile[1]:
                jax.block_until_ready(state)
                stop_profile()
        settle()
        if evaluate is not None and evaluate_every:
            examine(steps)
        save(steps)
        checkpoints.close()
    return state
