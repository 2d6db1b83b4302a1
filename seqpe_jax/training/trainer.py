"""Trainer: config -> task, loss, optimizer, shardings and the compiled train step. Reads data, writes no file."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax import axes
from seqpe_jax.config import Config
from seqpe_jax.distributed import compiler_options, processes
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.inference.compiled import CompiledModel, Progress, compiled_model, no_progress, with_mesh
from seqpe_jax.losses.train_loss import TrainLoss
from seqpe_jax.metric_registry import EMA, with_average
from seqpe_jax.models.attention_context import make_plan
from seqpe_jax.models.attention_inputs import AttentionInputs
from seqpe_jax.models.build import ModelSpec, Params, Shape, check_encoding, matmul_precision, model_flops
from seqpe_jax.run_dir import check_best_metric
from seqpe_jax.tasks import Task, evaluate_at, task_class
from seqpe_jax.training import optimizer as optimizers
from seqpe_jax.training import warm_start
from seqpe_jax.training.resume import with_random_bits
from seqpe_jax.training.step import TrainState, TrainStep, create_train_state, key_from_seed, make_train_step
from seqpe_jax.trees import num_params


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Everything that a training run computes with; nothing is compiled yet.

    Attributes:
      config: config of the run.
      mesh: devices.
      task: data, task loss and evaluation.
      train_loss: model and training loss.
      optimizer: optax transformation.
      init_fn: () -> state at step 0; one function for its shapes and its values, so that JAX traces it once.
      abstract_state: shapes, dtypes and shardings of the state.
      unsharded_dims: dimensions that the mesh was to split and cannot.
      notes: lines for the user about what the machine does not offer.
    """

    config: Config
    mesh: jax.sharding.Mesh
    task: Task
    train_loss: TrainLoss
    optimizer: Any
    init_fn: Callable[[], TrainState]
    abstract_state: TrainState
    unsharded_dims: tuple[layout.UnshardedDim, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        config: Config,
        devices: list[jax.Device] | None = None,
        *,
        data_available: bool = True,
        run_dir: str | os.PathLike = "",
    ) -> "Trainer":
        """Returns the trainer of a config.

        Args:
          config: config of the run.
          devices: None: all devices.
          data_available: False: compile only; vocabulary and classes come from the config or the tokenizer file.
          run_dir: folder of an earlier run whose tokenizer or class names are reused; "": a new run.

        Raises:
          InputError: fields contradict each other or the machine, or the data cannot be read or differ from the data of
            the earlier run. Raised before anything is compiled.
        """
        mesh_config = config.mesh
        mesh = layout.make_mesh(
            mesh_config.data, mesh_config.fsdp, mesh_config.context, mesh_config.tensor, devices, mesh_config.slices
        )
        layout.check_batch(mesh, config.batch_size, config.optimizer.accumulate)
        config = with_random_bits(config, "threefry" if mesh.devices.flat[0].platform == "cpu" else "rbg")
        check_encoding(config)  # before the data are read, which may take minutes
        best_metric(config)
        task = task_class(config)(config, data_available, run_dir)
        model_spec = ModelSpec.of(config, task.data_spec)
        train_loss = TrainLoss(model_spec, task.task_loss, config.objective, config.precision.random_bits)
        attention_backend(config, model_spec, mesh)
        optimizers.check_selected_params(config.optimizer, model_spec.shapes)
        optimizer = optimizers.make_optimizer(config.optimizer, config.steps)
        init_fn = _make_init_fn(model_spec, optimizer, config.seed)
        abstract_state, unsharded_dims = layout.abstract_state_with_shardings(mesh, jax.eval_shape(init_fn))
        config, note = _with_compiler_options(config, mesh, abstract_state.params["model"])
        notes = (note,) if note else ()
        return cls(config, mesh, task, train_loss, optimizer, init_fn, abstract_state, tuple(unsharded_dims), notes)

    @property
    def model_spec(self) -> ModelSpec:
        """The model."""
        return self.train_loss.model_spec

    @functools.cached_property
    def compiled(self) -> CompiledModel:
        """The model compiled for evaluation on the mesh."""
        return compiled_model(self.model_spec, self.mesh)

    @property
    def flops_per_step(self) -> dict[str, float]:
        """Floating-point operations of a train step on all devices, by name of the utilization (`model_flops`)."""
        tokens = self.config.batch_size * self.model_spec.num_positions
        return model_flops(self.config, self.task.data_spec.vocabulary, tokens=tokens, training=True)

    def init_state(self) -> TrainState:
        """Returns the state at step 0, initialized in its sharding."""
        return jax.jit(self.init_fn, out_shardings=self._state_shardings)()

    def init_or_warm_start(self) -> tuple[TrainState, tuple[str, ...]]:
        """Returns the state at step 0, with the parameters of `config.init_from` if set, and lines for the user on these.

        Raises:
          InputError: that checkpoint is missing, damaged or of other sizes.
        """
        if not self.config.init_from:
            return self.init_state(), ()
        start = warm_start.open_source(self.config, self.abstract_state.params, self.task.new_classes)
        _ = start.source.params  # before anything is drawn, since they may be damaged
        state = self.init_state()
        state = state.replace(params=start.params(state.params))
        lines, losses = [start.describe()], None
        if start.losses_differ:
            _, batch = next(self.batches(0))
            losses = start.losses(self.task, batch, self.model_spec, state.params)
        if losses is not None:
            moved = losses[1] - losses[0]
            lines.append(
                f"loss of the first batch, without dropout: {losses[0]:.4f} of {self.config.init_from}, {losses[1]:.4f} as this "
                f"run begins ({moved:+.4f})"
            )
        return state, tuple(lines)

    def jit_train_step(self) -> TrainStep:
        """Returns the jitted train step with its shardings; it donates the state."""

        def loss(params: Params, *arguments: Any) -> Any:
            return self.train_loss.loss(optimizers.stop_frozen(self.config.optimizer, params), *arguments)

        step = make_train_step(
            with_mesh(self.mesh, loss),
            self.optimizer,
            optimizers.learning_rate(self.config.optimizer, self.config.steps),
            accumulate=self.config.optimizer.accumulate,
            weight=self.task.task_loss.weight,
            skip=self.config.optimizer.non_finite == "skip",
            project=optimizers.projection(self.model_spec.param_bounds),
            average=optimizers.update_average(self.config.optimizer),
        )

        @functools.wraps(step)
        def precise_step(state: TrainState, batch: dict[str, jax.Array]) -> Any:
            # `Network.apply` does so too, but the backward pass of flash attention is traced outside of it.
            with jax.default_matmul_precision(matmul_precision(self.config)):
                return step(state, batch)

        outputs = (self._state_shardings, layout.replicated(self.mesh))
        return jax.jit(precise_step, donate_argnums=0, out_shardings=outputs, compiler_options=self._compiler_options)

    def batches(self, start_step: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Returns an iterator over (step, global batch) from a step on, prefetched in the background.

        Raises:
          InputError: the data hold no batch; raised at once.
        """
        rows = layout.rows_by_process(self.mesh, self.config.batch_size)[jax.process_index()]
        loader = self.task.train_loader(rows)
        return ((step, layout.from_local_rows(self.mesh, batch)) for step, batch in loader.prefetch(start_step))

    def evaluate(self, state: TrainState, progress: Progress = no_progress) -> dict[str, float]:
        """Returns the metrics of the validation split, e.g. {"eval/loss@512": nats}.

        With `optimizer.ema` also those of the average, "eval/ema_loss@512"; schedule-free AdamW evaluates its average alone.

        Args:
          state: state of the run.
          progress: called after each batch.
        """
        settings, metrics = self.config.optimizer, {}
        weights = {"": state.params}
        if optimizers.has_average(settings):
            weights["" if optimizers.evaluates_average(settings) else EMA] = self._average(state)
        for prefix, params in weights.items():
            for eval_size in self.task.eval_sizes():
                result = evaluate_at(self.task, self.compiled, params, eval_size, "validation", progress)
                names = self.task.training_metrics(self.config)
                metrics |= {_metric_key(prefix + name, eval_size): result[name] for name in names}
                for source, own in result.get("sources", {}).items():
                    label = axes.size_label(eval_size)
                    metrics |= {f"source/{source}/{prefix}{name}@{label}": own[name] for name in names if name in own}
        return metrics

    @functools.cached_property
    def _average(self) -> Callable[[TrainState], Params]:
        """The function that returns the average of the parameters of a state, within their bounds."""
        settings, project = self.config.optimizer, optimizers.projection(self.model_spec.param_bounds)

        def average(state: TrainState) -> Params:
            return optimizers.averaged_params(settings, state.opt_state, state.params)

        if not optimizers.evaluates_average(settings):  # it is a part of the state
            return average
        return jax.jit(lambda state: project(average(state)), out_shardings=self._state_shardings.params)

    def describe(self) -> str:
        """Returns a summary of devices, data, model and batch, one item per line."""
        config = self.config
        lines = [
            f"seqpe_jax: {processes.describe()}",
            f"{config.encoding.name} on {config.data.name}: {num_params(self.abstract_state.params):,} parameters, "
            f"{self.task.describe()}",
            processes.describe_batch(config.batch_size, layout.batch_shards(self.mesh)),
            self._describe_optimizer(),
        ]
        if self.unsharded_dims:
            lines.append(layout.describe_unsharded(self.unsharded_dims))
        if self.config.mesh.compiler_options:
            lines.append(f"XLA options: {' '.join(self.config.mesh.compiler_options)}")
        lines += self.notes
        return "\n  ".join(lines)

    def _describe_optimizer(self) -> str:
        """Returns a line on the optimizer and the memory of its state."""
        settings, state = self.config.optimizer, self.abstract_state.opt_state
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        words = f"optimizer {settings.kind}: {size / 2**20:,.1f} MiB of state"
        if self.mesh.size > 1:
            words += f", {layout.device_bytes(state) / 2**20:,.1f} on each device"
        return f"{words}, an average of the parameters among it" if optimizers.has_average(settings) else words

    @property
    def _state_shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @property
    def _compiler_options(self) -> compiler_options.Options | None:
        """Those of the config, and one with which each TPU generates only its part of an rbg dropout mask.

        Masks then depend on the mesh.
        """
        options = compiler_options.parse_options(self.config.mesh.compiler_options)
        on_tpu = self.mesh.devices.flat[0].platform == "tpu"
        if on_tpu and self.mesh.size > 1 and self.config.precision.random_bits == "rbg":
            options = {"xla_tpu_spmd_rng_bit_generator_unsafe": True} | options
        return options or None


def best_metric(config: Config) -> str:
    """Returns the metric that selects the best checkpoint, e.g. "eval/loss@512", or "".

    Raises:
      InputError: `checkpoint.best` is not measured during training.
    """
    if not config.checkpoint.best:
        return ""
    names = with_average(task_class(config).training_metrics(config), config.optimizer.ema)
    return check_best_metric(
        config.checkpoint.best, [_metric_key(name, size) for size in config.eval_sizes for name in names]
    )


def _metric_key(name: str, eval_size: Shape) -> str:
    return f"eval/{name}@{axes.size_label(eval_size)}"


def _make_init_fn(model_spec: ModelSpec, optimizer: Any, seed: int) -> Callable[[], TrainState]:
    def init_fn() -> TrainState:
        key = key_from_seed(seed)
        return create_train_state(model_spec.init(key), optimizer, key)

    return init_fn


def _with_compiler_options(config: Config, mesh: jax.sharding.Mesh, params: Params) -> tuple[Config, str]:
    """Returns a config with the compiler options of its mesh in place of "auto", and a line about those left out, or "".

    Raises:
      InputError: the compiler refuses an option.
    """
    device = mesh.devices.flat[0]
    blocks = {name: value for name, value in params.items() if name.startswith("blocks")}
    automatic = compiler_options.platform_options(
        device.platform,
        device.device_kind,
        devices=mesh.size,
        slices=len({getattr(one, "slice_index", 0) for one in mesh.devices.flat}),
        layer_params=num_params(blocks) // config.model.layers,
        compute_bytes=jnp.dtype(config.precision.compute).itemsize,
    )
    options, note = compiler_options.resolve(config.mesh.compiler_options, automatic, device)
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, compiler_options=options)), note


def attention_backend(config: Config, model_spec: ModelSpec, mesh: jax.sharding.Mesh) -> str:
    """Returns the name of the attention backend of a training step; compiles nothing.

    Raises:
      InputError: the backend that the config asks for cannot serve it.
    """
    sharding = layout.MeshSharding(mesh)
    model, tokens = config.model, model_spec.prefix_tokens + model_spec.num_positions
    network, dtype = model_spec.network.config, jnp.dtype(config.precision.compute)
    shape, kv_shape = (
        (config.batch_size, tokens, heads, network.head_width) for heads in (network.heads, network.kv_heads)
    )
    query, key_or_value = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(kv_shape, dtype)
    number, positions = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    has_padding = config.is_sequences and not config.is_causal
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def signal_of_layer(key: jax.Array) -> Any:
        signal = model_spec.init_encoding(key)[1]
        return signal.at_layer(min(range(network.layers), key=lambda layer: len(signal.absent(layer))))

    signal = jax.eval_shape(signal_of_layer, key)
    position_query_key = signal.position_query_key
    if signal.parabola is not None:  # as `models.transformer.parabola_query_key` makes them of each sample
        features = jax.ShapeDtypeStruct((*shape[:-1], 2 * signal.parabola[0].shape[-1] + 1), jnp.float32)
        position_query_key = features, features
    inputs = AttentionInputs(
        query,
        key_or_value,
        key_or_value,
        position_query_key,
        signal.bias,
        signal.relative_bias,
        documents=(positions, positions) if config.data.packing == "documents" or has_padding else None,
        causal_offset=number if config.is_causal else None,
        dropout_seed=number if model.attention_dropout else None,
        window=network.window,
        cap=network.attention_cap,
    )
    plan = make_plan(
        inputs,
        kind=model.attention_kind,
        block=model.attention_block,
        kernel_blocks=network.kernel_blocks,
        mode=network.context_attention,
        device=sharding.device,
        context_axes=sharding.mesh_axes(axes.LENGTH),
        shards=(sharding.shards(axes.LENGTH), sharding.shards(axes.BATCH), sharding.shards(axes.HEADS)),
    )
    return plan.backend.name
