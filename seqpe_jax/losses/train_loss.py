"""Draws + one encoder call + model + terms -> loss and metrics, as a pure function of (params, batch, key, step)."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqpe_jax.axes import ENCODER_ROWS, POSITIONS, all_gather_params, shard_map, shards, with_logical_constraint
from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.losses.contrastive import contrastive_logits_loss, contrastive_loss
from seqpe_jax.losses.distillation import distillation_logits_loss, distillation_loss
from seqpe_jax.losses.sample_positions import SampledPositions, may_perturb, sample_positions
from seqpe_jax.losses.task import ClassificationLoss, NextTokenLoss
from seqpe_jax.losses.zoom import zoom
from seqpe_jax.models.build import ModelSpec, Params, dropout_key, stream
from seqpe_jax.positions.prefix_trie import RowGroup

Metrics = dict[str, jax.Array]


class Rows(NamedTuple):
    """One part of what the encoder reads in a step: positions int32[..., A], and what is known of how they lie."""

    positions: jax.Array
    group: RowGroup


@dataclasses.dataclass(frozen=True)
class TrainLoss:
    """Task loss + w_c * contrastive + w_d * distillation (paper, section 3; the reference's train loop).

    Attributes:
      model_spec: of the model; criterion: what it is trained for, or None for the terms on position vectors alone.
      settings: the frozen `objective` section of the config; random_bits: of dropout's masks (`models.build.dropout_key`).
    """

    model_spec: ModelSpec
    task_loss: NextTokenLoss | ClassificationLoss | None
    settings: Any
    random_bits: str = "threefry"

    def sample(self, key: jax.Array, step: jax.Array) -> SampledPositions:
        """Returns the positions of a step: a pure function of the run's key and the step."""
        return sample_positions(self.settings, self.model_spec, key, step)

    def loss(
        self,
        params: Params,
        batch: dict[str, Any],
        key: jax.Array,
        step: jax.Array,
        part: jax.Array | int = 0,
        share: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, Metrics]:
        """Returns the training loss (scalar float32, nats) and the raw value of each term.

        Args:
          params: as returned by `ModelSpec.init`.
          batch: what the task reads, and optionally "sampled_positions" (`SampledPositions`).
          key: the run's key; step: the step; part: which part of an accumulated batch this is; share: see
            `training.step.make_train_step`. Terms on position vectors are the same in every part and have none.
        """
        sampled = batch["sampled_positions"] if "sampled_positions" in batch else self.sample(key, step)
        now = jax.random.fold_in(jax.random.fold_in(key, step), part)
        terms: Metrics = {}
        if self.model_spec.has_vectors:
            encoding = all_gather_params(params["encoding"], "encoding")
            own = "sampled_positions" in batch  # of which nothing is known
            signal, terms = self.signal_and_terms(encoding, sampled, self._masks(now, "encoding dropout"), own)
        else:
            signal = self.model_spec.signal(params, sampled.positions_PLA, self.model_spec.shape)
        apply = functools.partial(
            self.model_spec.network.apply,
            {"params": params["model"]},
            signal=signal,
            deterministic=False,
            rngs={"dropout": self._masks(now, "model dropout")},
        )
        if sampled.crop_boxes_PA2 is not None:
            batch = batch | {"images": zoom(batch["images"], sampled.crop_boxes_PA2)}
        mean, further = self.task_loss.loss(apply, batch, stream(now, "task"))
        task, further = share * mean, {name: share * value for name, value in further.items()}
        total = task
        for name, value in terms.items():
            total = total + term_weight(getattr(self.settings, name), step) * value
        metrics = {
            "loss": total,
            "term/task": task,
            **{f"term/{name}": value for name, value in terms.items()},
            **further,
        }
        if may_perturb(self.settings):
            metrics["moved"] = sampled.perturbed.astype(jnp.float32)
        return total, metrics

    def signal_and_terms(
        self, params: Params, sampled: SampledPositions, dropout_key: jax.Array, own: bool = False
    ) -> tuple[PositionSignal, Metrics]:
        """Encodes all positions of the step in one call, and returns the model's signal and each term's raw value.

        Args:
          params: of the encoding; own: the draws are not those of `draw`, so that nothing is known of how they lie.
        """
        rows = self._rows(sampled)
        main, *rest = self._encoded(params, rows, dropout_key, own)
        sets, length, _ = sampled.positions_PLA.shape
        main_PLE = with_logical_constraint(
            main.reshape(sets, length, -1), None, POSITIONS, None
        )  # the qk map is shared out as well
        signal = self._encoding.apply(
            {"params": params}, main_PLE, sampled.positions_PLA, shape=self.model_spec.shape, method="signal"
        )
        terms: Metrics = {}
        if sampled.contrastive is not None:
            terms["contrastive"] = self._contrastive(params, rest[0], rest[1], sampled.contrastive.labels_B)
        if sampled.distillation is not None:
            indices_BM = sampled.distillation.indices_BM
            value = self._distillation(params, main_PLE[0][indices_BM], rest[-1].reshape(*indices_BM.shape, -1))
            terms["distillation"] = jnp.where(sampled.perturbed, 0.0, value)
        return signal, terms

    def _masks(self, now: jax.Array, name: str) -> jax.Array:
        return dropout_key(stream(now, name), self.random_bits)

    @property
    def _encoding(self) -> Any:
        return self.model_spec.encoding

    def _rows(self, sampled: SampledPositions) -> list[Rows]:
        """What the encoder reads: the model's windows first, then pivots, candidates and students, where there are such."""
        settings, position_grid, shape = self.settings, self.model_spec.position_grid, self.model_spec.shape
        num_chunks = settings.skip.chunks if settings.skip.rate else 1
        # Zoomed windows lie in the span of whole ones, each on lines of its own.
        spans, jittered = position_grid.spans(shape), settings.jitter.rate > 0
        reach = 2 * round(settings.jitter.range * position_grid.position_resolution) if jittered else 0
        wide = tuple(span + reach for span in spans)
        sets = len(sampled.positions_PLA)
        rows = [Rows(sampled.positions_PLA, RowGroup(sets, shape, num_chunks, spans=wide, independent_axes=jittered))]
        if sampled.contrastive is not None:
            for positions in (sampled.contrastive.anchors_BA, sampled.contrastive.candidates_BCA):
                rows.append(Rows(positions, RowGroup(positions.size // positions.shape[-1])))
        if sampled.distillation is not None:
            students_BMA = sampled.distillation.positions_BMA
            group = RowGroup(len(students_BMA), shape, rows=students_BMA.shape[1], spans=spans)
            rows.append(Rows(students_BMA, group))
        return rows

    def _encoded(self, params: Params, rows: list[Rows], dropout_key: jax.Array, own: bool) -> list[jax.Array]:
        """The vectors [R, E] of each part, computed in one call, its rows laid out over the devices like a batch."""
        parts = [part.positions.reshape(-1, part.positions.shape[-1]) for part in rows]
        rows_RA = jnp.concatenate(parts)
        count, devices = len(rows_RA), shards(ENCODER_ROWS)
        rows_RA = jnp.pad(rows_RA, ((0, -count % devices), (0, 0)))
        # Which rows lie together is known of all of them alone, not of one device's.
        known = () if own or devices > 1 else [part.group for part in rows]
        leaves, tree = jax.tree.flatten(params)

        def read(rows_RA: jax.Array, device: jax.Array, key: jax.Array, *leaves: jax.Array) -> jax.Array:
            if devices > 1:
                key = jax.random.fold_in(key, device[0])
            return self._encoding.apply(
                {"params": tree.unflatten(leaves)},
                rows_RA,
                deterministic=False,
                method="vectors",
                groups=known,
                rngs={"dropout": key},
            )

        vectors_RE = shard_map(
            read,
            (rows_RA, jnp.arange(devices), dropout_key, *leaves),
            (
                (ENCODER_ROWS, None),
                (ENCODER_ROWS,),
                (None,) * dropout_key.ndim,
                *((None,) * leaf.ndim for leaf in leaves),
            ),
        )
        ends = list(itertools.accumulate(len(part) for part in parts))[:-1]
        return jnp.split(
            with_logical_constraint(with_logical_constraint(vectors_RE, ENCODER_ROWS, None)[:count], None, None), ends
        )

    def _contrastive(
        self, params: Params, anchors_BE: jax.Array, candidates_RE: jax.Array, labels_B: jax.Array
    ) -> jax.Array:
        settings = self.settings.contrastive
        batch = anchors_BE.shape[0]
        if settings.space == "vectors":
            return contrastive_loss(
                anchors_BE,
                candidates_RE.reshape(batch, -1, anchors_BE.shape[-1]),
                labels_B,
                heads=self.model_spec.heads if settings.per_head else None,
                label_smoothing=settings.label_smoothing,
                scale=settings.scale,
                floor=settings.floor,
            )
        query, _ = self._qk(params, anchors_BE)
        _, key = self._qk(params, candidates_RE)
        key = key.reshape(*key.shape[:-3], batch, -1, *key.shape[-2:])
        logits = settings.scale * jnp.einsum("...bhf,...bchf->...hbc", query, key)
        if settings.head_scales:
            logits = logits * jnp.array(settings.head_scales)[:, None, None]
        options = {"label_smoothing": settings.label_smoothing, "floor": settings.floor}
        return contrastive_logits_loss(logits, labels_B, **options)

    def _distillation(self, params: Params, teacher_BME: jax.Array, student_BME: jax.Array) -> jax.Array:
        settings = self.settings.distillation
        options = {"metric": settings.metric, "beta": settings.beta, "reduction": settings.reduction}
        if settings.space == "vectors":
            heads = self.model_spec.heads if settings.per_head else None
            return distillation_loss(teacher_BME, student_BME, heads=heads, scale=settings.scale, **options)

        def similarities(vectors_BME: jax.Array) -> jax.Array:
            query, key = self._qk(params, vectors_BME)
            return settings.scale * jnp.einsum("...bmhf,...bnhf->...bhmn", query, key)

        return distillation_logits_loss(similarities(teacher_BME), similarities(student_BME), **options)

    def _qk(self, params: Params, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Position queries and keys [(layers,) ..., heads or 1, F] of vectors [..., E]."""
        return self._encoding.apply({"params": params}, vectors, method="query_key")


def term_weight(settings: Any, step: jax.Array) -> jax.Array | float:
    """Returns a term's weight at a step: `weight`, reached linearly over `warmup_steps`."""
    if not settings.warmup_steps:
        return settings.weight
    return settings.weight * jnp.minimum(1.0, (step + 1) / settings.warmup_steps)
