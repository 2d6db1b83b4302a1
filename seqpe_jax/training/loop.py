"""The steps of a run, one after the other, with what happens around them.

Each turn: evaluate if due -> save if due or told to stop -> fetch -> dispatch -> report the previous step's metrics
(`training.events`). A loss that is not finite stops the run; checkpoints hold the last state saved before.
"""

import contextlib
from collections.abc import Iterator, Sequence

import jax

from seqpe_jax.distributed import processes
from seqpe_jax.distributed.waiting import patiently
from seqpe_jax.training.hooks import Event, Standing, check_order
from seqpe_jax.training.state import TrainState
from seqpe_jax.training.step import TrainStep


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[tuple[int, dict[str, jax.Array]]],
    *,
    steps: int,
    events: Sequence[Event] = (),
) -> TrainState:
    """Trains until `steps` and returns the final state.

    Args:
      state: where the run stands; donated.
      train_step: compiled; batches: (step, global batch) from the state's step on.
      events: in the order of `events.ORDER`; closed at the end in that order, however the run ends.

    Raises:
      events.NotFinite, events.Stopped: as these events say.
    """
    check_order(events)
    first = int(jax.device_get(state.step))
    run = Standing(state, first, first, steps)
    with contextlib.ExitStack() as closing:
        for event in reversed(events):  # the first closes first: a save under way ends before signals act at once again
            closing.callback(event.close)
        for step in range(first, steps):
            for event in events:
                event.before(run)
            number, batch = next(batches)
            if number != step:
                raise AssertionError(f"the loader gave batch {number} for step {step}")
            if step == first:
                train_step = _compiled(train_step, run, batch, events)
            with jax.transfer_guard(
                "disallow"
            ):  # an array that lies on the host by mistake would be sent in every step
                run.state, values = train_step(run.state, batch)
            run.step = step + 1
            for event in events:
                event.after(run, values)
        for event in events:
            event.end(run)
    return run.state


def _compiled(train_step: TrainStep, run: Standing, batch: dict[str, jax.Array], events: Sequence[Event]) -> TrainStep:
    """The step compiled for a batch, which takes minutes where the model is large: a signal is answered meanwhile."""

    def look() -> None:
        for event in events:
            event.meanwhile(run)

    compiled = patiently(lambda: train_step.lower(run.state, batch).compile(), look)
    processes.barrier()  # Gloo waits half a minute for a process that still compiles
    return compiled
