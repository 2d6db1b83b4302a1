"""Training loop: starts or resumes a run and trains it to `config.steps`.

from seqpe_jax import config
from seqpe_jax.training.loop import train_and_evaluate
train_and_evaluate(config.load("configs/stdlib_lm.py:seqpe", {"steps": 200}), "runs/first")
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence

import jax

from seqpe_jax import config as configs
from seqpe_jax.checksums import DIGESTS_FILE
from seqpe_jax.config import Config
from seqpe_jax.distributed import processes
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import SIDE_FILES_KEY, RunDir, describe_fingerprint
from seqpe_jax.training import clock as phases
from seqpe_jax.training import hooks as hooks_lib
from seqpe_jax.training import warm_start
from seqpe_jax.training.checkpoint import (
    BestCheckpointPolicy,
    Checkpointer,
    check_finite,
    check_together,
    checkpoint_bytes,
    local_bytes,
    save_timeout,
)
from seqpe_jax.training.clock import TrainingClock
from seqpe_jax.training.hooks import Hook, LoopState
from seqpe_jax.training.memory import check_memory
from seqpe_jax.training.metrics_writer import MetricsWriter
from seqpe_jax.training.resume import (
    check_same_run,
    check_space,
    clear_assets,
    random_bits_of,
    slow_save_warning,
    with_random_bits,
)
from seqpe_jax.training.step import Batch, TrainState, TrainStep
from seqpe_jax.training.trackers import check_installed
from seqpe_jax.training.trainer import Trainer, best_metric
from seqpe_jax.training.watchdog import Watchdog


def train_and_evaluate(
    config: Config, workdir: str | os.PathLike, *, extend: bool = False, change: Collection[str] = ()
) -> None:
    """Trains a run until `config.steps`; resumes it if its folder has a checkpoint.

    Args:
      config: config of the run.
      workdir: folder of the run, local or in a bucket; new, empty, or of a run with the same config.
      extend: allow more steps although the learning rate so far depends on their number.
      change: dotted names of fields that a resumed run may change, such as "optimizer.learning_rate"
        (`resume.CHANGEABLE`); config_history.jsonl records them.

    Raises:
      InputError: config, data, folder or checkpoints do not fit; nothing is written then.
      Preempted: a signal came; the state is saved.
      NonFiniteError, SaveError: the run cannot continue; earlier checkpoints remain.
    """
    run = RunDir(workdir)

    # Checks, before anything is written.
    check_profile(config)
    check_installed(config.report.trackers)
    check_together(run)
    # None: no checkpoint. The folder as process 0 sees it: a network file system may show another host less.
    saved = processes.from_main("saved step", run.latest_step() if processes.is_main_process() else None)
    changed = check_same_run(config, run, saved, extend, change)
    trainer = make_trainer(config, run, saved)
    _check_data(trainer, run, saved)
    batches = trainer.batches(saved or 0)
    _check_space(trainer, run, saved)
    _print(f"{trainer.describe()}\n  workdir {run}")
    # A warm start reads its parameters before the folder is claimed, since they may not fit.
    state, start_lines = trainer.init_or_warm_start() if saved is None else (None, ())

    lock = (
        run.lock(functools.partial(processes.abort, 1)) if processes.is_main_process() else contextlib.nullcontext("")
    )
    with lock as previous_owner:
        if previous_owner:
            _print(f"  {previous_owner}")
        run.reload()
        if processes.is_main_process() and run.latest_step() != saved:
            raise InputError(f"another process has just trained in {run}: run the command again to resume")
        planned_steps = run.config.steps if saved is not None else trainer.config.steps
        first_start = _write_run_files(trainer, run, saved)
        if changed:
            _print(f"  changed from step {saved} on: {'; '.join(changed)}")
        if planned_steps != trainer.config.steps:
            _print(f"  planned for {planned_steps} steps, training to {trainer.config.steps}")
        pending_eval = processes.broadcast_from_main(
            processes.is_main_process() and _eval_was_interrupted(trainer.config, run, saved)
        )
        if saved == trainer.config.steps and not pending_eval:
            _print(f"  nothing to do: step {saved} is saved")
            return

        # Restore.
        checkpointer = _make_checkpointer(trainer, run)
        metadata = {}
        if saved is None:
            if lines := run.read_metrics():
                _print(f"  no checkpoint, though {lines[-1]['step']} steps were done: starting anew")
            for line in start_lines:
                _print(f"  {line}")
        else:
            state = checkpointer.restore(trainer.abstract_state, saved)
            check_finite(run.step_dir(saved), state.params)
            metadata = checkpointer.meta(saved)
            _print(f"  resuming at step {saved}")

        # Train.
        clock = TrainingClock(
            metadata.get("seconds", 0.0),
            productive=metadata.get("productive_seconds", 0.0),
            first_start=first_start,
        )
        hooks = make_hooks(trainer, run, checkpointer, saved or 0, metadata, pending_eval, clock)
        steps = trainer.config.steps
        run_steps(state, trainer.jit_train_step(), batches, num_steps=steps, hooks=hooks, clock=clock)


def run_steps(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[tuple[int, Batch]],
    *,
    num_steps: int,
    hooks: Sequence[Hook] = (),
    clock: TrainingClock | None = None,
) -> TrainState:
    """Runs the training loop and returns the final state.

    Each iteration: evaluate if due, save if due, end if preempted, fetch the batch, dispatch the step, report the metrics of
    the previous step, end on a non-finite loss.

    Args:
      state: initial state, at any step; donated.
      train_step: jitted train step.
      batches: (step, global batch), starting at the step of the state.
      num_steps: step at which training ends.
      hooks: hooks in the order of `HOOK_ORDER`.
      clock: clock of the run, which the hooks read; None = nobody reads it.

    Raises:
      NonFiniteError, Preempted, SaveError: raised by hooks.
    """
    hooks_lib.check_hook_order(hooks)
    clock = clock or TrainingClock()
    start_step = int(jax.device_get(state.step))
    loop = LoopState(state, start_step, start_step, num_steps)
    with contextlib.ExitStack() as closing:
        for hook in reversed(hooks):  # close in list order: finish pending saves before restoring signal handlers
            closing.callback(hook.close)
        closing.enter_context(clock.phase(phases.STEP))
        for step in range(start_step, num_steps):
            for hook in hooks:
                hook.before_step(loop)
            with clock.phase(phases.DATA):
                batch_step, batch = next(batches)
            if batch_step != step:
                raise AssertionError(f"expected the batch of step {step}, got that of step {batch_step}")
            if step == start_step:
                with clock.phase(phases.COMPILE):
                    train_step = _compile(train_step, loop, batch, hooks)
            # A CPU computes small steps before this returns. An array left on the host would be sent in every step.
            with clock.phase(phases.DEVICE), jax.transfer_guard("disallow"):
                loop.state, metrics = train_step(loop.state, batch)
            loop.step = step + 1
            for hook in hooks:
                hook.after_step(loop, metrics)
        for hook in hooks:
            hook.on_end(loop)
    return loop.state


def _compile(train_step: TrainStep, loop: LoopState, batch: Batch, hooks: Sequence[Hook]) -> TrainStep:
    """Returns the compiled step; hooks poll for signals meanwhile, since a large model compiles for minutes."""

    def poll() -> None:
        for hook in hooks:
            hook.poll(loop)

    compiled = hooks_lib.run_interruptible(lambda: train_step.lower(loop.state, batch).compile(), poll)
    processes.barrier()  # Gloo waits only half a minute for a process that still compiles
    return compiled


def make_hooks(
    trainer: Trainer,
    run: RunDir,
    checkpointer: Checkpointer,
    start_step: int,
    metadata: dict,
    pending_eval: bool,
    clock: TrainingClock,
) -> list[Hook]:
    """Returns the hooks of a run.

    Args:
      trainer: trainer of the run.
      run: folder of the run.
      checkpointer: checkpointer of the run.
      start_step: steps done before.
      metadata: stored with the restored checkpoint; {} for a new run.
      pending_eval: the evaluation of the restored state was interrupted.
      clock: clock of the run.
    """
    config = trainer.config
    config_json = json.loads(json.dumps(configs.to_dict(config)))
    writer = MetricsWriter(run, start_step, trackers=config.report.trackers, config=config_json)
    checkpointer.before_save = writer.flush  # the metrics of a saved step are written before its checkpoint
    metrics_hook = hooks_lib.MetricsHook(
        writer,
        clock,
        every=config.report.every,
        num_steps=config.steps,
        count_per_step=trainer.task.count_per_step,
        count_name=trainer.task.count_name,
        flops=trainer.flops_per_step,
        latest_checkpoint=checkpointer.saved_step,
        max_skips=config.optimizer.skips if config.optimizer.non_finite == "skip" else 0,
        skipped=metadata.get("skipped", 0),
    )
    checkpoint_hook = hooks_lib.CheckpointHook(
        checkpointer,
        {"config": config_json, SIDE_FILES_KEY: DIGESTS_FILE},
        clock,
        metrics_hook,
        every=config.checkpoint.every,
        max_failures=config.checkpoint.failed_saves,
        check_owned=run.check_owned if processes.is_main_process() else lambda: None,
    )
    preemption_hook = hooks_lib.PreemptionHook(checkpoint_hook)
    hooks: list[Hook] = [checkpoint_hook, preemption_hook]
    if config.eval.every:
        evaluation_hook = hooks_lib.EvaluationHook(
            trainer.evaluate,
            writer,
            clock,
            metrics_hook,
            preemption_hook,
            every=config.eval.every,
            pending_eval=pending_eval,
        )
        hooks.insert(0, evaluation_hook)
    profile_window = configs.profile_window(config)
    if profile_window is not None and profile_window[0] < start_step:
        _print(f"  profile.steps={config.profile.steps} is in the past: no profile is recorded")
    elif profile_window is not None and is_profiled(config):
        hooks.append(hooks_lib.ProfilerHook(profile_window, run.path))
    hooks.append(metrics_hook)
    if config.report.watchdog:
        watchdog = Watchdog(
            run,
            clock,
            seconds=config.report.watchdog,
            save_timeout=save_timeout(local_bytes(trainer.abstract_state)),
            saved_step=checkpointer.saved_step,
            is_saving=checkpointer.is_saving,
        )
        hooks.append(hooks_lib.WatchdogHook(watchdog))
    return hooks


def is_profiled(config: Config) -> bool:
    """Returns whether this process records a trace (`config.profile`)."""
    chosen = config.profile.processes
    return bool(config.profile.steps) and (not chosen or jax.process_index() in chosen)


def check_profile(config: Config) -> None:
    """Raises InputError if a process is to be profiled that the run does not have."""
    if not config.profile.steps:
        return
    beyond = [process for process in config.profile.processes if process >= jax.process_count()]
    if beyond:
        raise InputError(
            f"profile.processes names process {beyond[0]}, but this run has {jax.process_count()} (0 to "
            f"{jax.process_count() - 1}): name some of these, or () for all"
        )


def make_trainer(config: Config, run: RunDir, saved: int | None) -> Trainer:
    """Returns the trainer of a new or resumed run.

    Args:
      config: config of the run.
      run: folder of the run.
      saved: step of its newest checkpoint, or None.

    Raises:
      InputError: see `Trainer.of`; what the config asks for cannot fit into the memory of all devices; or `config.init_from`
        holds parameters of another model.
    """
    check_memory(config, jax.devices())
    if saved is None:
        trainer = Trainer.of(config, run_dir=config.init_from)
        if config.init_from:
            warm_start.check_source(config, trainer.task, config.init_from)
        return trainer
    config = with_random_bits(config, random_bits_of(run))
    began = {name: getattr(run.config, name) for name in ("init_from", "ignore_fields")}  # only a new run reads them
    config = dataclasses.replace(config, **began)
    return Trainer.of(config, run_dir=run.path)


def _check_data(trainer: Trainer, run: RunDir, saved: int | None) -> None:
    """Raises InputError if the data cannot be evaluated, differ between processes, or have changed since the run began."""
    config, task = trainer.config, trainer.task
    if saved is not None:
        task.check_assets(run.path)
    if config.eval.every:
        for eval_size in task.eval_sizes():
            task.check_eval_size(eval_size, "validation")
    prints = task.fingerprints(("train", "validation") if config.eval.every else ("train",))
    processes.check_equal(
        {
            f"{split} split of {config.data.name}": describe_fingerprint(fingerprint)
            for split, fingerprint in prints.items()
        }
    )
    if saved is not None:
        run.check_same_data(prints)


def _check_space(trainer: Trainer, run: RunDir, saved: int | None) -> None:
    """Raises InputError if the disk has no space for the checkpoints of the run."""
    config = trainer.config
    if saved == config.steps:
        return
    count = 1  # a resumed run has the other ones already
    if saved is None:
        # A new checkpoint is finished before an old one is removed.
        max_checkpoints = config.checkpoint.keep + bool(config.checkpoint.best) + 1
        count = min(max_checkpoints, math.ceil(config.steps / config.checkpoint.every))
    check_space(run, checkpoint_bytes(trainer.abstract_state), count)


def _write_run_files(trainer: Trainer, run: RunDir, saved: int | None) -> float:
    """Writes config, data spec, fingerprints and assets into the folder, and quarantines damaged checkpoints.

    Returns:
      Unix time of the run's first start.
    """
    processes.barrier()  # every process has read the folder
    check_together(run, best_metric(trainer.config))
    first_start = time.time()
    if processes.is_main_process():
        anew = saved is None and not run.has_config(trainer.config)
        if saved is None:
            clear_assets(run)
        for line in run.quarantine(best_metric(trainer.config)):
            _print(f"  {line}")
        stored = run.fingerprints
        if not stored and saved is not None:
            _print("  an older version stored no fingerprints of the data: from now on they must stay the same")
        prints = stored or trainer.task.available_fingerprints()
        if saved is not None:
            run.record_change(saved, trainer.config)
        run.write_files(trainer.config, trainer.task.data_spec, prints, trainer.task.save_assets)
        first_start = run.record_start(saved or 0, jax.process_count(), anew=anew)
    processes.barrier()
    processes.check_shared(run.path / "config.json")
    return first_start


def _make_checkpointer(trainer: Trainer, run: RunDir) -> Checkpointer:
    config = trainer.config
    size = local_bytes(trainer.abstract_state)
    if processes.is_main_process() and (warning := slow_save_warning(run, size)):
        _print(f"  {warning}")
    metric = best_metric(config)
    return Checkpointer(
        run,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        best=BestCheckpointPolicy(run, metric) if metric else None,
        size=size,
    )


def _eval_was_interrupted(config: Config, run: RunDir, saved: int | None) -> bool:
    """Returns True if an evaluation of the saved state was due and its metrics are missing, because of preemption."""
    if not config.eval.every or not saved or (saved % config.eval.every and saved != config.steps):
        return False
    lines = run.read_metrics()
    evaluated = any(line["step"] == saved and any(name.startswith("eval/") for name in line) for line in lines)
    return bool(lines) and not evaluated


def _print(text: str) -> None:
    if processes.is_main_process():
        print(text, flush=True)
