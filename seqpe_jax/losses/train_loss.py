"""Training loss: task loss + weighted contrastive and distillation losses, a pure function of (params, batch, key, step)."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqpe_jax.axes import (
    BATCH,
    ENCODER_ROWS,
    POSITIONS,
    all_gather_params,
    copy_per_shard,
    gather_sets,
    shard_map,
    shards,
    with_logical_constraint,
)
from seqpe_jax.config import ContrastiveConfig, DistillationConfig, ObjectiveConfig
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError
from seqpe_jax.losses.image_mixing import crop_and_resize
from seqpe_jax.losses.position import (
    contrastive_logits_loss,
    contrastive_loss,
    distillation_logits_loss,
    distillation_loss,
    dot_products,
)
from seqpe_jax.losses.sample_positions import SampledPositions, may_perturb, sample_positions
from seqpe_jax.losses.task import Z_TERM, ClassificationLoss, NetworkCall, NextTokenLoss
from seqpe_jax.models.build import ModelSpec, Params, dropout_key, stream
from seqpe_jax.models.flops import param_matmul_flops
from seqpe_jax.positions.prefix_trie import PositionStructure

Metrics = dict[str, jax.Array]

BACKWARD_FLOPS = (
    2  # relative to the forward pass: the gradient of each operand of a product is a product of the same size
)


class EncoderRows(NamedTuple):
    """Positions encoded in one call of the encoder.

    Attributes:
      positions: int32[..., A].
      structure: structure used to compute a static bound on distinct digit prefixes.
    """

    positions: jax.Array
    structure: PositionStructure


@dataclasses.dataclass(frozen=True)
class TrainLoss:
    """Task loss + w_c * contrastive loss + w_d * distillation loss (arXiv 2506.13277 section 3) + the task's z-loss.

    Attributes:
      model_spec: encoding and network.
      task_loss: loss of the task; None = losses on position vectors only.
      settings: `objective` section of the config.
      random_bits: generator of dropout masks, see `models.build.dropout_key`.
    """

    model_spec: ModelSpec
    task_loss: NextTokenLoss | ClassificationLoss | None
    settings: Any
    random_bits: str = "threefry"

    def sample(self, key: jax.Array, step: jax.Array) -> SampledPositions:
        """Returns the positions of a step, a pure function of the run's key and the step."""
        return sample_positions(self.settings, self.model_spec, key, step)

    def loss(
        self,
        params: Params,
        batch: dict[str, Any],
        key: jax.Array,
        step: jax.Array,
        microbatch_index: jax.Array | int = 0,
        microbatch_weight: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, Metrics]:
        """Returns (training loss float32[] in nats, metrics: the loss and its unweighted terms).

        Args:
          params: {"encoding": ..., "model": ...}, see `ModelSpec.init`.
          batch: batch of the task, optionally with "sampled_positions": `SampledPositions`.
          key: PRNG key of the run.
          step: int32[].
          microbatch_index: index within an accumulated batch; microbatches differ in their dropout masks.
          microbatch_weight: multiplier of the task loss and its metrics. The losses on position vectors are the same in
            every microbatch and have none.
        """
        positions_from_batch = "sampled_positions" in batch
        sampled = batch["sampled_positions"] if positions_from_batch else self.sample(key, step)
        step_key = jax.random.fold_in(jax.random.fold_in(key, step), microbatch_index)
        terms: Metrics = {}
        if self.model_spec.has_vectors:
            encoding_key = self._dropout_key(step_key, "encoding dropout")
            batch_size = len(jax.tree.leaves(batch)[0])
            signal, terms = self.signal_and_terms(
                params["encoding"], sampled, encoding_key, positions_from_batch, batch_size
            )
        else:
            signal = self.model_spec.signal(params, sampled.positions_PLA, self.model_spec.shape)
        dropout = {"deterministic": False, "rngs": {"dropout": self._dropout_key(step_key, "model dropout")}}
        network = NetworkCall(self.model_spec.network, {"params": params["model"]}, signal, dropout)
        batch = self.task_loss.model_inputs(batch, stream(step_key, "image input"))
        if sampled.crop_boxes_PA2 is not None:
            batch = batch | {"images": crop_and_resize(batch["images"], sampled.crop_boxes_PA2)}
        task, task_metrics = self.task_loss.loss(network, batch, stream(step_key, "task"))
        task = microbatch_weight * task
        total = task
        for name, value in terms.items():
            total = total + term_weight(getattr(self.settings, name), step) * value
        if Z_TERM in task_metrics:
            total = total + self.task_loss.z_loss * microbatch_weight * task_metrics[Z_TERM]
        metrics = {"loss": total, "term/task": task}
        metrics |= {f"term/{name}": value for name, value in terms.items()}
        metrics |= {name: microbatch_weight * value for name, value in task_metrics.items()}
        if may_perturb(self.settings):
            metrics["moved"] = sampled.perturbed.astype(jnp.float32)
        return total, metrics

    def signal_and_terms(
        self,
        params: Params,
        sampled: SampledPositions,
        dropout_key: jax.Array,
        positions_from_batch: bool = False,
        batch_size: int = 0,
    ) -> tuple[PositionSignal, Metrics]:
        """Encodes all positions of a step in one call of the encoder.

        Args:
          params: parameters of the encoding.
          sampled: positions of the step.
          dropout_key: PRNG key of dropout masks.
          positions_from_batch: positions come from the batch; do not assume the window structure used for prefix sharing.
          batch_size: samples of the microbatch on all devices, which read the signal; 0 = none do.

        Returns:
          (signal of the model, unweighted {"contrastive": float32[], "distillation": float32[]} as far as they are on).
        """
        rows = self._encoder_rows(sampled)
        windows_RE, *others = self._encode(params, rows, dropout_key, positions_from_batch)
        positions_PLA = sampled.positions_PLA
        num_sets, length, _ = positions_PLA.shape
        is_split = shards(BATCH) > 1 and num_sets > 1 and not positions_from_batch
        # Where a device has no more samples than there are sets, it reads those of its samples alone.
        per_sample = is_split and batch_size > 0 and num_sets % (batch_size // shards(BATCH)) == 0
        if per_sample:
            vectors_PLE, first_set_SLE = gather_sets(windows_RE, num_sets, length, batch_size)
            positions_PLA = positions_PLA[jnp.arange(batch_size) % num_sets]
            positions_PLA = with_logical_constraint(positions_PLA, BATCH, None, None)
        else:
            vectors_PLE = windows_RE[: num_sets * length].reshape(num_sets, length, -1)
            # Shards the qk map over positions as well.
            vectors_PLE = with_logical_constraint(vectors_PLE, None, POSITIONS, None)
            first_set_SLE = copy_per_shard(vectors_PLE[:1], ENCODER_ROWS)
        signal = self.model_spec.encoding.apply(
            {"params": all_gather_params(params, "encoding")},
            vectors_PLE,
            positions_PLA,
            shape=self.model_spec.shape,
            per_sample=per_sample,
            method="signal",
        )
        terms: Metrics = {}
        if sampled.contrastive is not None:
            labels_B = _pad_to_shards(sampled.contrastive.labels_B)
            arrays = *others[:2], labels_B
            losses_B = self._losses_of_shards(self._contrastive, arrays, params, self.settings.contrastive.space)
            terms["contrastive"] = losses_B[: len(sampled.contrastive.labels_B)].mean()
        if sampled.distillation is not None:
            indices_BM = sampled.distillation.indices_BM
            arrays = first_set_SLE, others[-1], _pad_to_shards(indices_BM)
            losses_B = self._losses_of_shards(self._distillation, arrays, params, self.settings.distillation.space)
            terms["distillation"] = jnp.where(sampled.perturbed, 0.0, losses_B[: len(indices_BM)].mean())
        return signal, terms

    def step_flops(self, example: dict[str, jax.ShapeDtypeStruct], batch_size: int, accumulate: int = 1) -> float:
        """Returns the FLOPs of a train step, forward and backward, on all devices.

        Counts matrix products with parameter-dependent operands: the network with attention of all queries to all keys,
        logit biases of positions once if examples share positions, the position encoder on all positions of the step, and
        the losses on position vectors. Recomputation (`model.remat`) and elementwise operations do not count.

        Args:
          example: shape and dtype of each array of a training example.
          batch_size: examples of a step.
          accumulate: number of microbatches; each encodes its positions again.
        """
        # The reference attention has no loop over blocks and no kernel, whose products a trace does not show.
        network = self.model_spec.network
        network = network.clone(config=dataclasses.replace(network.config, attention_kind="reference"))
        plain = dataclasses.replace(self, model_spec=dataclasses.replace(self.model_spec, network=network))
        microbatch = tuple(
            (name, jax.ShapeDtypeStruct((batch_size // accumulate, *leaf.shape), leaf.dtype))
            for name, leaf in example.items()
        )
        return (1 + BACKWARD_FLOPS) * accumulate * _forward_flops(plain, microbatch)

    def _dropout_key(self, step_key: jax.Array, name: str) -> jax.Array:
        return dropout_key(stream(step_key, name), self.random_bits)

    def _encoder_rows(self, sampled: SampledPositions) -> list[EncoderRows]:
        """Returns the positions to encode: windows, then anchors, candidates and distillation windows if those are on."""
        settings, position_grid, shape = self.settings, self.model_spec.position_grid, self.model_spec.shape
        num_chunks = (settings.skip.chunks or max(shape)) if settings.skip.rate else 1
        spans = position_grid.spans(shape)  # random crops span less
        has_jitter = settings.jitter.rate > 0
        extra = 2 * round(settings.jitter.range * position_grid.position_resolution) if has_jitter else 0
        windows = PositionStructure(
            len(sampled.positions_PLA),
            shape,
            num_chunks,
            spans=tuple(span + extra for span in spans),
            independent_axes=has_jitter,
        )
        rows = [EncoderRows(sampled.positions_PLA.reshape(-1, len(shape)), windows)]
        if sampled.contrastive is not None:
            for positions in (sampled.contrastive.anchors_BA, sampled.contrastive.candidates_BCA):
                rows.append(EncoderRows(positions, PositionStructure(positions.size // positions.shape[-1])))
        if sampled.distillation is not None:
            positions_BMA = sampled.distillation.positions_BMA
            structure = PositionStructure(len(positions_BMA), shape, max_rows=positions_BMA.shape[1], spans=spans)
            rows.append(EncoderRows(positions_BMA, structure))
        return rows

    def _encode(
        self, params: Params, rows: list[EncoderRows], dropout_key: jax.Array, positions_from_batch: bool
    ) -> list[jax.Array]:
        """Returns the vectors [..., E] of each element of `rows`, from one call with rows sharded over the devices.

        Each shard has an equal part of the first dimension of each element, which keeps its padding.
        """
        num_shards = shards(ENCODER_ROWS)
        positions = [_pad_to_shards(part.positions) for part in rows]
        # Groups describe all rows together, not those of one shard.
        structures = () if positions_from_batch or num_shards > 1 else [part.structure for part in rows]

        def encode_shard(shard: jax.Array, key: jax.Array, *arguments: Any) -> tuple[jax.Array, ...]:
            *parts, params = arguments
            if num_shards > 1:
                key = jax.random.fold_in(key, shard[0])
            flat = [part.reshape(-1, part.shape[-1]) for part in parts]
            vectors_RE = self.model_spec.encoding.apply(
                {"params": params},
                jnp.concatenate(flat),
                deterministic=False,
                method="vectors",
                structures=structures,
                rngs={"dropout": key},
            )
            split = jnp.split(vectors_RE, list(itertools.accumulate(map(len, flat)))[:-1])
            return tuple(one.reshape(*part.shape[:-1], -1) for one, part in zip(split, parts, strict=True))

        return shard_map(
            encode_shard,
            (jnp.arange(num_shards), dropout_key, *positions),
            ((ENCODER_ROWS,), (None,) * dropout_key.ndim, *map(_sharded_first, positions)),
            results=[_sharded_first(part) for part in positions],
            params=params,
            root="encoding",
        )

    def _losses_of_shards(
        self, function: Callable[..., jax.Array], arrays: Sequence[jax.Array], params: Params, space: str
    ) -> jax.Array:
        """Returns the losses of samples, float32[B], with samples sharded over the devices; of one shard the mean, float32[1].

        Args:
          function: of the arrays and parameters of a shard and whether it is one of many -> losses.
          arrays: the first dimension of each is split.
          params: parameters of the encoding.
          space: of the term; "logits" needs the parameters.
        """
        is_sharded = shards(ENCODER_ROWS) > 1

        def of_shard(*arguments: Any) -> tuple[jax.Array]:
            parts, own = (arguments[:-1], arguments[-1]) if space == "logits" else (arguments, {})
            return (function(own, is_sharded, *parts),)

        (losses_B,) = shard_map(
            of_shard,
            arrays,
            [_sharded_first(array) for array in arrays],
            results=((ENCODER_ROWS,),),
            params=params if space == "logits" else None,
            root="encoding",
        )
        return losses_B

    def _contrastive(
        self,
        params: Params,
        is_sharded: bool,
        anchors_BE: jax.Array,
        candidates_BCE: jax.Array,
        labels_B: jax.Array,
    ) -> jax.Array:
        settings = self.settings.contrastive
        options = {"label_smoothing": settings.label_smoothing, "floor": settings.floor}

        def loss(anchors_BE: jax.Array, candidates_BCE: jax.Array, labels_B: jax.Array) -> jax.Array:
            if settings.space == "vectors":
                heads = self.model_spec.heads if settings.per_head else None
                return contrastive_loss(
                    anchors_BE, candidates_BCE, labels_B, heads=heads, scale=settings.scale, **options
                )
            query, _ = self._query_key(params, anchors_BE)
            _, key = self._query_key(params, candidates_BCE)
            logits = settings.scale * dot_products("...bhf,...bchf->...hbc", query, key)
            if settings.head_scales:
                logits = logits * jnp.array(settings.head_scales)[:, None, None]
            return contrastive_logits_loss(logits, labels_B, **options)

        return _by_sample(loss, is_sharded, anchors_BE, candidates_BCE, labels_B)

    def _distillation(
        self, params: Params, is_sharded: bool, window_1LE: jax.Array, student_BME: jax.Array, indices_BM: jax.Array
    ) -> jax.Array:
        settings = self.settings.distillation
        options = {"metric": settings.metric, "beta": settings.beta, "reduction": settings.reduction}

        def similarities(vectors_BME: jax.Array) -> jax.Array:
            query, key = self._query_key(params, vectors_BME)
            return settings.scale * dot_products("...bmhf,...bnhf->...bhmn", query, key)

        def loss(teacher_BME: jax.Array, student_BME: jax.Array) -> jax.Array:
            if settings.space == "vectors":
                heads = self.model_spec.heads if settings.per_head else None
                return distillation_loss(teacher_BME, student_BME, heads=heads, scale=settings.scale, **options)
            return distillation_logits_loss(similarities(teacher_BME), similarities(student_BME), **options)

        return _by_sample(loss, is_sharded, window_1LE[0][indices_BM], student_BME)

    def _query_key(self, params: Params, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns position queries and keys [(layers,) ..., heads or 1, F] of vectors [..., E]."""
        return self.model_spec.encoding.apply({"params": params}, vectors, method="query_key")


@functools.lru_cache(maxsize=64)  # all evaluations of a model report them, and a trace takes a second
def _forward_flops(train_loss: TrainLoss, microbatch: tuple[tuple[str, jax.ShapeDtypeStruct], ...]) -> float:
    """Returns the FLOPs of the loss of a batch, given as the items of a dict."""
    key, step = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    return param_matmul_flops(train_loss.loss, train_loss.model_spec.shapes, dict(microbatch), key, step)


def _pad_to_shards(array: jax.Array) -> jax.Array:
    """Returns an array whose first dimension divides over the devices.

    It is replicated: drawn in part on each device, positions would have to be agreed on in every turn of a loop.
    """
    padded = jnp.pad(array, ((0, -len(array) % shards(ENCODER_ROWS)), *((0, 0),) * (array.ndim - 1)))
    return with_logical_constraint(padded, *(None,) * array.ndim)


def _sharded_first(array: jax.Array) -> tuple[str | None, ...]:
    """Returns logical names for an array that is split along its first dimension."""
    return ENCODER_ROWS, *(None,) * (array.ndim - 1)


def _by_sample(loss: Callable[..., jax.Array], is_sharded: bool, *arrays: jax.Array) -> jax.Array:
    """Returns the loss of each sample of a shard, float32[B], so that those of the padding can be left out.

    Args:
      loss: of arrays with a leading dimension of samples -> mean.
      is_sharded: False = there is no other shard, and no padding: the mean of all, float32[1].
      arrays: of the shard.
    """
    if not is_sharded:
        return loss(*arrays)[None]
    return jax.vmap(lambda *sample: loss(*(array[None] for array in sample)))(*arrays)


def term_weight(settings: Any, step: jax.Array) -> jax.Array | float:
    """Returns the weight of a loss term: `weight`, after a linear warm-up from 0 over `warmup_steps` steps."""
    if not settings.warmup_steps:
        return settings.weight
    return settings.weight * jnp.minimum(1.0, (step + 1) / settings.warmup_steps)


def position_losses(
    encoding: SeqPE,
    params: Mapping[str, Any],
    key: jax.Array,
    step: jax.Array | int,
    *,
    window: int | tuple[int, ...],
    max_position: int = 0,
    causal: bool = True,
    settings: ObjectiveConfig | None = None,
) -> dict[str, jax.Array]:
    """Contrastive and distillation losses of a SeqPE encoding in a model of your own; without them it does not extrapolate.

        loss = task_loss + 0.1 * sum(position_losses(encoding, params, key, step, window=64).values())

    Positions are sampled anew in each step, a pure function of key and step.

    Args:
      encoding: mode "attn_scalar", as made by `SeqPE.for_model`; other modes need losses on vectors in `settings`.
      params: variables {"params": ...} of the encoding, as returned by its `init`.
      key: PRNG key of the training run.
      step: int32[], optimizer step.
      window: training length, or sides of the training grid.
      max_position: exclusive limit of sampled coordinates; 0 = all that the digits can represent.
      causal: compare anchors with earlier positions only, as causal attention does; not for grids.
      settings: `objective` section of the config; None = the recipe of `configs/stdlib_lm.py:seqpe_logits`, which needs no
        gates in the model. Weights are not applied, but a term with weight 0 is left out.

    Returns:
      {"contrastive": float32[], "distillation": float32[]}, nats.

    Raises:
      InputError: the number of axes differs between window and encoding, or the window does not fit below max_position.
    """
    shape = (window,) if isinstance(window, int) else tuple(window)
    fields, axes = encoding.config, encoding.dims.axes
    limit = max_position or fields.base**fields.num_digits
    if len(shape) != axes:
        raise InputError(f"window has {len(shape)} axes and the encoding {axes}: give one side per axis")
    if limit < 2 * max(shape):
        raise InputError(
            f"distillation needs positions beyond the training window: max_position={limit} must be at least 2 x "
            f"{max(shape)}; raise it, or give the encoding more digits"
        )
    if settings is None:
        settings = ObjectiveConfig(
            contrastive=ContrastiveConfig(
                batch=4,
                candidates=16,
                window=min(256, limit // 4),
                around_anchor=True,
                causal_only=causal and len(shape) == 1,
                space="logits",
            ),
            distillation=DistillationConfig(batch=4, offsets=min(16, *shape)),
        )
    heads = encoding.dims.heads if fields.per_head else None
    example = jax.ShapeDtypeStruct((1, *shape), jnp.int32)
    model_spec = ModelSpec(encoding, None, example, shape, limit, fields.base, heads)
    train_loss = TrainLoss(model_spec, None, settings)
    sampled = train_loss.sample(key, jnp.asarray(step, jnp.int32))
    _, terms = train_loss.signal_and_terms(params["params"], sampled, jax.random.fold_in(key, step))
    return terms
