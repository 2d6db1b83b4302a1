"""Config -> everything that trains: the task, the train_loss, the optimiser, their layout over devices, and a run's folder.

from seqpe_jax.training.trainer import Trainer
Trainer.of(config).fit("runs/first")
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax import axes, config
from seqpe_jax.config import Config
from seqpe_jax.distributed import processes
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.distributed.progress import MetricsWriter, read_metrics
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, tmp_dir
from seqpe_jax.inference.compiled import CompiledModel, Progress, no_progress, use_sharding
from seqpe_jax.losses.train_loss import TrainLoss
from seqpe_jax.models.attention_dispatch import dispatch
from seqpe_jax.models.attention_inputs import AttentionInputs
from seqpe_jax.models.build import ModelSpec, Params, Shape, check_encoding, model_flops
from seqpe_jax.tasks import Task, evaluate_at, task_class
from seqpe_jax.tasks.data_spec import write_data_spec
from seqpe_jax.tasks.fingerprints import (
    available_fingerprints,
    check_same_data,
    describe,
    fingerprints,
    read_fingerprints,
    write_fingerprints,
)
from seqpe_jax.training import hooks, loop, warm_start
from seqpe_jax.training import optimizer as optimizers
from seqpe_jax.training.best_checkpoint import BestCheckpointPolicy, check_best_metric, quarantine_best
from seqpe_jax.training.checkpoint import (
    Checkpointer,
    check_finite,
    checkpoint_bytes,
    local_bytes,
    quarantine,
    read_config,
    saved_step,
    write_config,
)
from seqpe_jax.training.checksums import DIGESTS_FILE, SIDE_FILES, clear_cache, write_side_files
from seqpe_jax.training.state import TrainState, create_train_state, key_from_seed
from seqpe_jax.training.step import TrainStep, make_train_step
from seqpe_jax.training.workdir import (
    check_owned,
    check_same_run,
    check_space,
    clear,
    owned,
    random_bits_of,
    slow_save,
    with_random_bits,
)
from seqpe_jax.trees import count


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The parts that train, linked; nothing is compiled or written yet.

    Attributes:
      config, task, train_loss, optimizer: what is trained, on what, and how.
      mesh: the devices; whole: dimensions that could not be split as the mesh asks.
      initial: draws the state at step 0, the same function for its shapes and for itself, so that JAX traces it once.
      shapes: of the state, with shardings.
    """

    config: Config
    mesh: jax.sharding.Mesh
    task: Task
    train_loss: TrainLoss
    optimizer: Any
    initial: Callable[[], TrainState]
    shapes: TrainState
    whole: tuple[layout.UnshardedDim, ...] = ()

    @classmethod
    def of(
        cls,
        config: Config,
        devices: list[jax.Device] | None = None,
        *,
        data_there: bool = True,
        kept: str | os.PathLike = "",
    ) -> "Trainer":
        """Returns the trainer of a config on all devices, or on those given.

        Args:
          data_there: whether the data can be read; without them a step can only be compiled, and sizes that they would
            tell (vocabulary, classes) come from the config or the tokenizer's file.
          kept: folder of the run that this one goes on from: what it keeps of its data (tokenizer, class names) holds
            here too; "" = a new run.

        Raises:
          InputError: fields contradict each other or the machine, the data cannot be read, or are not those of the run
            kept; found before compiling.
        """
        sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.context, config.mesh.tensor)
        mesh = layout.make_mesh(*sizes, devices, config.mesh.slices)
        layout.check_batch(mesh, config.batch_size, config.optimizer.accumulate)
        config = with_random_bits(config, "threefry" if mesh.devices.flat[0].platform == "cpu" else "rbg")
        check_encoding(config)  # reading the data may take minutes
        _best_metric(config)
        task = task_class(config)(config, data_there, kept)
        bits = config.precision.random_bits
        train_loss = TrainLoss(ModelSpec.of(config, task.data_spec), task.task_loss, config.objective, bits)
        _check_attention(config, train_loss.model_spec, layout.MeshSharding(mesh))
        optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
        initial = _initial(train_loss.model_spec, optimizer, config.seed)
        shapes, whole = layout.with_shardings(mesh, jax.eval_shape(initial))
        return cls(config, mesh, task, train_loss, optimizer, initial, shapes, tuple(whole))

    @classmethod
    def for_workdir(cls, config: Config, workdir: str | os.PathLike, *, extend: bool = False) -> "Trainer":
        """Returns the trainer of a config whose run stands, or is to begin, in a folder.

        Args:
          extend: see `workdir.check_same_run`.

        Raises:
          InputError: as `of`; the folder is of another run; the checkpoint to begin with was made for something else.
        """
        clear_cache()  # files may have changed since this process read them last
        first = saved_step(workdir)
        check_same_run(config, as_path(workdir), first, extend)
        if first is not None:
            stored = read_config(workdir)
            config = with_random_bits(config, random_bits_of(stored))
            config = dataclasses.replace(config, init_from=stored.get("init_from", ""))  # a run keeps its origin
        begins = bool(config.init_from) and first is None
        trainer = cls.of(config, kept=config.init_from if begins else workdir if first is not None else "")
        if begins:
            warm_start.check_source(config, trainer.task, config.init_from)
        return trainer

    @property
    def model_spec(self) -> ModelSpec:
        """What the model is."""
        return self.train_loss.model_spec

    @functools.cached_property
    def compiled(self) -> CompiledModel:
        """The model under this mesh as evaluation asks it."""
        return CompiledModel(self.model_spec, self.mesh)

    @property
    def flops_per_step(self) -> dict[str, float]:
        """Floating-point operations of a training step on all devices (see `models.build.model_flops`)."""
        tokens = self.config.batch_size * self.model_spec.num_positions
        return model_flops(self.config, self.task.data_spec.vocabulary, tokens=tokens, training=True)

    @property
    def _options(self) -> dict[str, bool] | None:
        """Of the compiler: each TPU draws its own part of a mask of rbg, instead of all of it; so it differs by mesh."""
        on_tpu = self.mesh.devices.flat[0].platform == "tpu"
        own = on_tpu and self.mesh.size > 1 and self.config.precision.random_bits == "rbg"
        return {"xla_tpu_spmd_rng_bit_generator_unsafe": True} if own else None

    def init_state(self) -> TrainState:
        """Returns the state at step 0, each part made on the devices that hold it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        return jax.jit(self.initial, out_shardings=shardings)()

    def first_state(self) -> TrainState:
        """Returns the state at step 0, with the parameters of `init_from` where the config names one.

        Raises:
          InputError: no or a damaged checkpoint there, or one of other sizes.
        """
        state = self.init_state()
        if not self.config.init_from:
            return state
        return state.replace(params=warm_start.first_params(self.config, self.mesh, self.shapes.params))

    def train_step(self) -> TrainStep:
        """Returns the compiled-on-first-call train step; the state that goes in is donated."""
        step = make_train_step(
            use_sharding(self.mesh, self.train_loss.loss),
            self.optimizer,
            optimizers.learning_rate(self.config.optimizer, self.config.steps),
            accumulate=self.config.optimizer.accumulate,
            weight=self.task.task_loss.weight,
            skip=self.config.optimizer.non_finite == "skip",
            project=optimizers.projection(self.model_spec.param_bounds),
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        outputs = (shardings, layout.replicated(self.mesh))
        return jax.jit(step, donate_argnums=0, out_shardings=outputs, compiler_options=self._options)

    def batches(self, first: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields (step, global batch) from a step on, read ahead in the background."""
        rows = layout.rows_by_process(self.mesh, self.config.batch_size)[jax.process_index()]
        train = self.task.train_loader(rows)
        for step, batch in train.prefetch(first):
            yield step, layout.from_local_rows(self.mesh, batch)

    def evaluate(self, params: Params, progress: Progress = no_progress) -> dict[str, float]:
        """Returns what is measured while training, on the validation split, e.g. {"eval/loss@512": nats}.

        Args:
          progress: called after each batch.
        """
        results = {}
        for eval_size in self.task.eval_sizes():
            result = evaluate_at(self.task, self.compiled, params, eval_size, "validation", progress)
            results |= {_measured(name, eval_size): result[name] for name in self.task.metrics(self.config)}
        return results

    def describe(self, workdir: AnyPath) -> str:
        """Returns what is about to be trained, where and on what, in words."""
        settings = self.config
        lines = [
            f"seqpe_jax: {processes.describe()}",
            f"{settings.encoding.name} on {settings.data.name}: {count(self.shapes.params):,} parameters, "
            f"{self.task.describe()}",
            processes.describe_batch(settings.batch_size, layout.batch_shards(self.mesh)),
            f"workdir {workdir}",
        ]
        return "\n  ".join(lines + ([layout.describe_unsharded(self.whole)] if self.whole else []))

    def fit(self, workdir: str | os.PathLike, *, extend: bool = False) -> None:
        """Trains, or goes on training, the run of a folder until `steps`.

        Args:
          extend: see `workdir.check_same_run`.

        Raises:
          InputError: a folder of another config, bad data, a damaged checkpoint.
        """
        folder, settings = as_path(workdir), self.config
        first = saved_step(folder)
        check_same_run(settings, folder, first, extend)
        if first is not None:
            self.task.check_assets(folder)
        if settings.eval.every:
            for eval_size in self.task.eval_sizes():
                self.task.check_eval_size(eval_size, "validation")
        data = fingerprints(self.task, ("train", "validation") if settings.eval.every else ("train",))
        processes.check_equal({f"{split} split of {settings.data.name}": describe(one) for split, one in data.items()})
        if first is not None:
            check_same_data(folder, data)
        if first != settings.steps:
            # A new checkpoint is whole before an old one goes. A run that goes on has the others already.
            saves = math.ceil(settings.steps / settings.checkpoint.every)
            stay = settings.checkpoint.keep + bool(settings.checkpoint.best)
            check_space(folder, checkpoint_bytes(self.shapes), min(stay + 1, saves) if first is None else 1)
        _say(self.describe(folder))
        # Parameters that a run begins with are read before it claims its folder, since they may not fit.
        state = self.first_state() if first is None else None
        with owned(folder) if processes.is_main_process() else contextlib.nullcontext("") as taken_over:
            if taken_over:
                _say(f"  {taken_over}")
            if saved_step(folder) != first:
                raise InputError(f"another process has trained in {folder} just now: give the command again to go on")
            self._go_on(folder, first, state)

    def _go_on(self, folder: AnyPath, first: int | None, state: TrainState | None) -> None:
        """Trains in a folder that is this process's, from the step that is saved there, or from a state where none is."""
        settings = self.config
        planned = read_config(folder)["steps"] if first is not None else settings.steps
        self._claim(folder, anew=first is None)
        if planned != settings.steps:
            _say(f"  planned for {planned} steps, going on to {settings.steps}")
        pending_eval = processes.broadcast_from_main(
            processes.is_main_process() and _owes_an_evaluation(settings, folder, first)
        )
        if first == settings.steps and not pending_eval:
            _say(f"  nothing to do: step {first} is saved")
            return
        metric = _best_metric(settings)
        checkpoints = Checkpointer(
            folder,
            keep=settings.checkpoint.keep,
            keep_every=settings.checkpoint.keep_every,
            best=BestCheckpointPolicy(folder, metric) if metric else None,
        )
        if processes.is_main_process() and (warning := slow_save(folder, local_bytes(self.shapes))):
            _say(f"  {warning}")
        if state is None:
            state = checkpoints.restore(self.shapes)
            check_finite(checkpoints.folder / str(first), state.params)
        before = checkpoints.meta() if first is not None else {}
        if first is None and (told := read_metrics(folder)):
            _say(f"  no step is saved, though {told[-1]['step']} were done: beginning anew")
        if first is not None or settings.init_from:
            _say(f"  begins with {settings.init_from}" if first is None else f"  going on from step {first}")
        happening = self._events(folder, checkpoints, first or 0, before, pending_eval)
        loop.fit(state, self.train_step(), self.batches(first or 0), steps=settings.steps, hooks=happening)

    def _events(
        self, folder: AnyPath, checkpoints: Checkpointer, first: int, before: dict, pending_eval: bool
    ) -> list[hooks.Hook]:
        """What happens beside the steps of a run that has done `first` of them.

        Args:
          before: was saved beside its state; owed: that was not evaluated, though it should have been.
        """
        settings, clock = self.config, hooks.Clock(before.get("seconds", 0.0))
        metrics = MetricsWriter(folder, first, tensorboard=settings.report.tensorboard)
        checkpoints.first = metrics.flush  # who goes on from a step has the lines up to it
        report = hooks.MetricsHook(
            metrics,
            clock,
            every=settings.report.every,
            steps=settings.steps,
            units=self.task.count_per_step,
            unit=self.task.count_name,
            flops=self.flops_per_step,
            saved=checkpoints.latest_step,
            skips=settings.optimizer.skips if settings.optimizer.non_finite == "skip" else 0,
            skipped=before.get("skipped", 0),
        )
        meta = {"config": json.loads(json.dumps(config.to_dict(settings))), SIDE_FILES: DIGESTS_FILE}
        save = hooks.CheckpointHook(
            checkpoints,
            meta,
            clock,
            report,
            every=settings.checkpoint.every,
            failures=settings.checkpoint.failed_saves,
            before_each=functools.partial(check_owned, folder) if processes.is_main_process() else None,
        )
        found: list[hooks.Hook] = []
        stop = hooks.PreemptionHook(save)
        if settings.eval.every:
            evaluate = hooks.EvaluationHook(
                self.evaluate, metrics, clock, report, stop, every=settings.eval.every, pending_eval=pending_eval
            )
            found.append(evaluate)
        found += [save, stop]
        window = config.profile_window(settings)
        if window is not None and window[0] < first:
            _say(f"  profile.steps={settings.profile.steps} has passed: nothing is recorded")
        elif window is not None:
            found.append(hooks.ProfilerHook(window, folder))
        return [*found, report]

    def _claim(self, folder: AnyPath, anew: bool) -> None:
        """Writes what a run's folder begins with, once all hosts have looked at it."""
        processes.barrier()
        if processes.is_main_process():
            if anew:
                clear(folder)
            metric = _best_metric(self.config)
            for line in [*quarantine(folder), *(quarantine_best(folder, metric) if metric else ())]:
                _say(f"  {line}")
            known = read_fingerprints(folder)
            if not known and not anew:
                _say(
                    "  an older version kept no fingerprints of the data: from now on it resumes with these data alone"
                )
            with tmp_dir() as staged:
                write_config(staged, config.to_dict(self.config))
                write_data_spec(staged, self.task.data_spec)
                write_fingerprints(staged, known or available_fingerprints(self.task))
                self.task.save_assets(staged)
                write_side_files(staged, folder)
        processes.barrier()
        processes.check_shared(folder / "config.json")


def _measured(name: str, eval_size: Shape) -> str:
    return f"eval/{name}@{axes.size_label(eval_size)}"


def _best_metric(settings: Config) -> str:
    """The metric that says which checkpoint is the best, as metrics.jsonl calls it, or "". Raises: InputError."""
    if not settings.checkpoint.best:
        return ""
    measured = task_class(settings).metrics(settings)
    return check_best_metric(
        settings.checkpoint.best, [_measured(name, at) for at in settings.eval_sizes for name in measured]
    )


def _owes_an_evaluation(settings: Config, folder: AnyPath, step: int | None) -> bool:
    """Whether a run that goes on was told to stop while it evaluated the state of this step."""
    if not settings.eval.every or not step or (step % settings.eval.every and step != settings.steps):
        return False
    lines = read_metrics(folder)
    return bool(lines) and not any(line["step"] == step and any(map(_is_measured, line)) for line in lines)


def _is_measured(name: str) -> bool:
    return name.startswith("eval/")


def _say(words: str) -> None:
    if processes.is_main_process():
        print(words, flush=True)


def _check_attention(settings: Config, model_spec: ModelSpec, used: layout.MeshSharding) -> None:
    """Refuses an implementation of attention that cannot serve what the config trains, before anything is compiled.

    Raises:
      InputError: as `models.choice.dispatch`.
    """
    model, tokens = settings.model, model_spec.prefix + model_spec.num_positions
    shape = (settings.batch_size, tokens, model.heads, model.width // model.heads)
    array = jax.ShapeDtypeStruct(shape, jnp.dtype(settings.precision.compute))
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    signal = jax.eval_shape(lambda key: model_spec.init_encoding(key)[1].at_layer(0), key)
    inputs = AttentionInputs(
        array,
        array,
        array,
        signal.logit_query_key,
        signal.bias,
        causal_offset=None if settings.is_image else number,
        dropout_seed=number if model.attention_dropout else None,
    )
    dispatch(
        model.attention_kind, model.attention_block, inputs, device=used.device, split=used.shards(axes.LENGTH) > 1
    )


def _initial(model_spec: ModelSpec, optimizer: Any, seed: int) -> Callable[[], TrainState]:
    def initial() -> TrainState:
        key = key_from_seed(seed)
        return create_train_state(model_spec.init(key), optimizer, key)

    return initial
