"""The steps of a run, one after the other, with what happens around them.

Each turn: evaluate if due -> save if due or told to stop -> fetch -> dispatch -> report the previous step's metrics
(`training.hooks`). A loss that is not finite stops the run; checkpoints hold the last state saved before.
"""

import contextlib
from collections.abc import Iterator, Sequence

import jax

from seqpe_jax.distributed import processes
from seqpe_jax.distributed.waiting import run_interruptible
from seqpe_jax.training.hooks import Hook, LoopState, check_hook_order
from seqpe_jax.training.state import TrainState
from seqpe_jax.training.step import TrainStep


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[tuple[int, dict[str, jax.Array]]],
    *,
    steps: int,
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Trains until `steps` and returns the final state.

    Args:
      state: where the run stands; donated.
      train_step: compiled; batches: (step, global batch) from the state's step on.
      hooks: in the order of `hooks.HOOK_ORDER`; closed at the end in that order, however the run ends.

    Raises:
      hooks.NotFinite, hooks.Stopped: as these hooks say.
    """
    check_hook_order(hooks)
    first = int(jax.device_get(state.step))
    run = LoopState(state, first, first, steps)
    with contextlib.ExitStack() as closing:
        for hook in reversed(hooks):  # the first closes first: a save under way ends before signals act at once again
            closing.callback(hook.close)
        for step in range(first, steps):
            for hook in hooks:
                hook.before_step(run)
            number, batch = next(batches)
            if number != step:
                raise AssertionError(f"the loader gave batch {number} for step {step}")
            if step == first:
                train_step = _compiled(train_step, run, batch, hooks)
            with jax.transfer_guard(
                "disallow"
            ):  # an array that lies on the host by mistake would be sent in every step
                run.state, values = train_step(run.state, batch)
            run.step = step + 1
            for hook in hooks:
                hook.after_step(run, values)
        for hook in hooks:
            hook.on_end(run)
    return run.state


def _compiled(train_step: TrainStep, run: LoopState, batch: dict[str, jax.Array], hooks: Sequence[Hook]) -> TrainStep:
    """The step compiled for a batch, which takes minutes where the model is large: a signal is answered meanwhile."""

    def look() -> None:
        for hook in hooks:
            hook.poll(run)

    compiled = run_interruptible(lambda: train_step.lower(run.state, batch).compile(), look)
    processes.barrier()  # Gloo waits half a minute for a process that still compiles
    return compiled
