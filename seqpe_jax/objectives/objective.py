"""Draws + one encoder call + model + terms -> loss and metrics, as a pure function of (params, batch, key, step)."""

import dataclasses
import functools
import itertools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from seqpe_jax.axes import POSITIONS, ROWS, by_device, gathered, lay_out, shards
from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.objectives.contrastive import contrastive_logits_loss, contrastive_loss
from seqpe_jax.objectives.distillation import distillation_logits_loss, distillation_loss
from seqpe_jax.objectives.task import Classification, LanguageModelling
from seqpe_jax.objectives.zoom import zoom
from seqpe_jax.positions import sampling
from seqpe_jax.positions.grids import Spacing
from seqpe_jax.positions.prefixes import Group

Params = Any
Metrics = dict[str, jax.Array]


class Draws(NamedTuple):
    """The positions of one step. A batch may carry its own as batch["draws"] and so replace the random ones."""

    positions_PLA: jax.Array  # int32, what the model reads: P windows
    moved: jax.Array  # bool, the windows are shifted or skipped: no teacher for distillation
    contrastive: sampling.Contrastive | None
    distillation: sampling.Distillation | None
    boxes_PA2: jax.Array | None = None  # parts of the images that the model reads, in place of whole ones


def stream(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of a named stream, the same in every process and version."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


def initial_encoding(
    encoding: nn.Module, shape: tuple[int, ...], spacing: Spacing, key: jax.Array
) -> tuple[Any, PositionSignal]:
    """Returns fresh variables of an encoding and its signal of the first grid of a shape; key: of the run."""
    positions_PLA = spacing.grid(shape)[None]
    variables = encoding.init(stream(key, "encoding"), positions_PLA, shape=shape)
    return variables, encoding.apply(variables, positions_PLA, shape=shape)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Task loss + w_c * contrastive + w_d * distillation (METHOD: paper section 3; reference's train loop).

    Attributes:
      model: module of (inputs, signal, deterministic) -> logits.
      task: what the model is trained for; inputs: shape and type of one example for the model, [1, ...].
      encoding: module of (positions) -> signal; with vectors of its own when `has_vectors`.
      shape: the window or grid that the model trains on, one int per coordinate axis.
      max_position, base: coordinates lie below, in units of the spacing; base of their digits.
      heads: heads of the position vectors, or None when one vector serves them all.
      settings: the frozen `objective` section of the config.
      has_vectors: the encoding has vectors (SeqPE) that contrastive and distillation terms shape.
      spacing: where the places of windows and grids stand.
    """

    model: nn.Module
    task: LanguageModelling | Classification
    inputs: jax.ShapeDtypeStruct
    encoding: nn.Module
    shape: tuple[int, ...]
    max_position: int
    base: int
    heads: int | None
    settings: Any
    has_vectors: bool
    spacing: Spacing = Spacing()

    @property
    def length(self) -> int:
        """Positions of one window."""
        return math.prod(self.shape)

    @property
    def may_move(self) -> bool:
        """Whether some steps read windows elsewhere, or whose places do not stand where they should."""
        settings = self.settings
        return max(settings.shift.rate, settings.skip.rate, settings.jitter.rate, settings.zoom.rate) > 0

    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters {"encoding": ..., "model": ...}."""
        encoding, signal = initial_encoding(self.encoding, self.shape, self.spacing, key)
        model = self.model.init(stream(key, "model"), jnp.zeros(self.inputs.shape, self.inputs.dtype), signal)
        return {"encoding": encoding.get("params", {}), "model": model["params"]}

    def draw(self, key: jax.Array, step: jax.Array) -> Draws:
        """Returns the positions of a step: a pure function of the run's key and the step."""
        settings, shape, unit = self.settings, self.shape, self.spacing.unit
        # Windows are drawn as if they began at 0; those of a grid that stands in the middle of its cells come after.
        offset_A = np.array([self.spacing.offset(axis) for axis in range(len(shape))], np.int32)
        limit = self.max_position - int(offset_A.max())
        now = jax.random.fold_in(key, step)
        axes = len(shape)
        sets = settings.shift.sets if self.may_move else 1
        positions_PLA = jnp.broadcast_to(self.spacing.grid(shape), (sets, self.length, axes))
        moved, boxes_PA2 = jnp.zeros((), bool), None
        if self.may_move:
            if settings.zoom.rate:
                zoomed = jax.random.uniform(stream(now, "zoom")) < settings.zoom.rate
                boxes_PA2 = sampling.boxes(stream(now, "boxes"), sets=sets, axes=axes, smallest=settings.zoom.smallest)
                boxes_PA2 = jnp.where(zoomed, boxes_PA2, jnp.array([0.0, 1.0]))
                positions_PLA = jnp.where(zoomed, self.spacing.part(shape, boxes_PA2), positions_PLA)
                moved = moved | zoomed
            choice = jax.random.uniform(stream(now, "move"))
            shifted = choice < settings.shift.rate
            skipped = choice >= 1.0 - settings.skip.rate
            moved = moved | shifted | skipped
            if settings.shift.rate:
                starts_PA = sampling.shift(
                    stream(now, "shift"), sets=sets, shape=shape, max_position=limit, unit=unit,
                    starts=settings.shift.starts, subset_key=stream(key, "shift starts"),
                )  # fmt: skip
                positions_PLA = jnp.where(shifted, positions_PLA + starts_PA[:, None], positions_PLA)
            if settings.skip.rate:
                gaps_PLA = sampling.skip(
                    stream(now, "skip"), sets=sets, shape=shape, max_position=limit, chunks=settings.skip.chunks,
                    range=settings.skip.range * unit or limit, unit=unit,
                )  # fmt: skip
                positions_PLA = jnp.where(skipped, gaps_PLA + offset_A, positions_PLA)
            if settings.jitter.rate:
                shaken = jax.random.uniform(stream(now, "shake")) < settings.jitter.rate
                moved = moved | shaken
                shaken_PLA = sampling.jitter(
                    stream(now, "jitter"), positions_PLA, reach=round(settings.jitter.range * unit),
                    max_position=self.max_position, ordered=axes == 1,
                )  # fmt: skip
                positions_PLA = jnp.where(shaken, shaken_PLA, positions_PLA)
        contrastive, distillation = settings.contrastive, settings.distillation
        windows = None
        if distillation.weight:
            windows = sampling.distillation(
                stream(now, "distillation"), batch=distillation.batch, offsets=distillation.offsets, shape=shape,
                max_position=limit, unit=unit,
            )  # fmt: skip
            windows = windows._replace(positions_BMA=windows.positions_BMA + offset_A)
        return Draws(
            positions_PLA,
            moved,
            sampling.contrastive(
                stream(key, "contrastive"), step, batch=contrastive.batch, candidates=contrastive.candidates,
                max_position=self.max_position, axes=axes, base=self.base, mixture=contrastive.mixture,
                hard_fraction=contrastive.hard_fraction, window=contrastive.window * unit,
                around_pivot=contrastive.around_pivot, past_only=contrastive.past_only,
            ) if contrastive.weight else None,
            windows,
            boxes_PA2,
        )  # fmt: skip

    def loss(
        self, params: Params, batch: dict[str, Any], key: jax.Array, step: jax.Array, part: jax.Array | int = 0,
        share: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, Metrics]:  # fmt: skip
        """Returns the training loss (scalar float32, nats) and the raw value of each term.

        Args:
          params: as returned by `init`.
          batch: what the task reads, and optionally "draws" (`Draws`).
          key: the run's key; step: the step; part: which part of an accumulated batch this is; share: see
            `training.step.make_train_step`. Terms on position vectors are the same in every part and have none.
        """
        draws = batch["draws"] if "draws" in batch else self.draw(key, step)
        now = jax.random.fold_in(jax.random.fold_in(key, step), part)
        terms: Metrics = {}
        if self.has_vectors:
            encoding = gathered(params["encoding"], "encoding")
            own = "draws" in batch  # of which nothing is known
            signal, terms = self.vectors_and_terms(encoding, draws, stream(now, "encoding dropout"), own)
        else:
            signal = self.signal(params, draws.positions_PLA, self.shape)
        apply = functools.partial(
            self.model.apply, {"params": params["model"]}, signal=signal, deterministic=False,
            rngs={"dropout": stream(now, "model dropout")},
        )  # fmt: skip
        if draws.boxes_PA2 is not None:
            batch = batch | {"images": zoom(batch["images"], draws.boxes_PA2)}
        mean, further = self.task.loss(apply, batch, stream(now, "task"))
        task, further = share * mean, {name: share * value for name, value in further.items()}
        total = task
        for name, value in terms.items():
            total = total + term_weight(getattr(self.settings, name), step) * value
        metrics = {"loss": total, "term/task": task, **{f"term/{name}": value for name, value in terms.items()}, **further}
        if self.may_move:
            metrics["moved"] = draws.moved.astype(jnp.float32)
        return total, metrics

    def signal(self, params: Params, positions_PLA: jax.Array, shape: tuple[int, ...]) -> PositionSignal:
        """Returns the signal of given windows as evaluation uses it (no dropout)."""
        return self.encoding.apply({"params": gathered(params["encoding"], "encoding")}, positions_PLA, shape=shape)

    def examine(self, params: Params, signal: PositionSignal, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Returns what evaluation needs to know of each example, without dropout (see the task's `examine`)."""
        return self.task.examine(self.model, {"params": params["model"]}, signal, batch)

    def vectors_and_terms(
        self, params: Params, draws: Draws, dropout_key: jax.Array, own: bool
    ) -> tuple[PositionSignal, Metrics]:
        """Encodes all positions of the step in one call, split at sizes that are the same in every step."""
        sets, length, axes = draws.positions_PLA.shape
        pairs, windows = draws.contrastive, draws.distillation
        parts = [draws.positions_PLA.reshape(-1, axes)]
        pieces = self.settings.skip.chunks if self.settings.skip.rate else 1
        # Zoomed windows lie in the span of whole ones, each on lines of its own.
        spans, shaken = self.spacing.spans(self.shape), self.settings.jitter.rate > 0
        reach = 2 * round(self.settings.jitter.range * self.spacing.unit) if shaken else 0
        groups = [Group(sets, self.shape, pieces, spans=tuple(span + reach for span in spans), apart=shaken)]
        if pairs is not None:
            parts += [pairs.pivots_BA, pairs.candidates_BCA.reshape(-1, axes)]
            groups += [Group(len(parts[-2])), Group(len(parts[-1]))]
        if windows is not None:
            parts += [windows.positions_BMA.reshape(-1, axes)]
            groups += [Group(len(windows.positions_BMA), self.shape, rows=windows.positions_BMA.shape[1], spans=spans)]
        rows_RA = jnp.concatenate(parts)
        count = len(rows_RA)
        devices = shards(ROWS)
        rows_RA = jnp.pad(rows_RA, ((0, -count % devices), (0, 0)))
        known = () if own or devices > 1 else groups  # which rows lie together is known of all of them alone
        leaves, tree = jax.tree.flatten(params)

        def read(rows_RA: jax.Array, device: jax.Array, key: jax.Array, *leaves: jax.Array) -> jax.Array:
            if devices > 1:
                key = jax.random.fold_in(key, device[0])
            return self.encoding.apply(
                {"params": tree.unflatten(leaves)}, rows_RA, deterministic=False, method="vectors", groups=known,
                rngs={"dropout": key},
            )  # fmt: skip

        vectors_RE = by_device(
            read,
            (rows_RA, jnp.arange(devices), dropout_key, *leaves),
            ((ROWS, None), (ROWS,), (None,) * dropout_key.ndim, *((None,) * leaf.ndim for leaf in leaves)),
        )
        ends = list(itertools.accumulate(len(part) for part in parts))[:-1]
        vectors_RE = lay_out(lay_out(vectors_RE, ROWS, None)[:count], None, None)
        main_RE, *rest = jnp.split(vectors_RE, ends)
        main_PLE = lay_out(main_RE.reshape(sets, length, -1), None, POSITIONS, None)  # the qk map is shared out as well
        signal = self.encoding.apply(
            {"params": params}, main_PLE, draws.positions_PLA, shape=self.shape, method="signal"
        )
        terms: Metrics = {}
        if pairs is not None:
            terms["contrastive"] = self._contrastive(params, rest[0], rest[1], pairs.labels_B)
        if windows is not None:
            students_BME = rest[-1].reshape(*windows.indices_BM.shape, -1)
            value = self._distillation(params, main_PLE[0][windows.indices_BM], students_BME)
            terms["distillation"] = jnp.where(draws.moved, 0.0, value)
        return signal, terms

    def _contrastive(
        self, params: Params, pivots_BE: jax.Array, candidates_RE: jax.Array, labels_B: jax.Array
    ) -> jax.Array:
        settings = self.settings.contrastive
        batch = pivots_BE.shape[0]
        if settings.space == "vectors":
            return contrastive_loss(
                pivots_BE, candidates_RE.reshape(batch, -1, pivots_BE.shape[-1]), labels_B,
                heads=self.heads if settings.per_head else None, label_smoothing=settings.label_smoothing,
                scale=settings.scale,
            )  # fmt: skip
        query, _ = self._qk(params, pivots_BE)
        _, key = self._qk(params, candidates_RE)
        key = key.reshape(*key.shape[:-3], batch, -1, *key.shape[-2:])
        logits = settings.scale * jnp.einsum("...bhf,...bchf->...hbc", query, key)
        if settings.head_scales:
            logits = logits * jnp.array(settings.head_scales)[:, None, None]
        return contrastive_logits_loss(logits, labels_B, label_smoothing=settings.label_smoothing)

    def _distillation(self, params: Params, teacher_BME: jax.Array, student_BME: jax.Array) -> jax.Array:
        settings = self.settings.distillation
        options = {"metric": settings.metric, "beta": settings.beta, "reduction": settings.reduction}
        if settings.space == "vectors":
            heads = self.heads if settings.per_head else None
            return distillation_loss(teacher_BME, student_BME, heads=heads, scale=settings.scale, **options)

        def similarities(vectors_BME: jax.Array) -> jax.Array:
            query, key = self._qk(params, vectors_BME)
            return settings.scale * jnp.einsum("...bmhf,...bnhf->...bhmn", query, key)

        return distillation_logits_loss(similarities(teacher_BME), similarities(student_BME), **options)

    def _qk(self, params: Params, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Position queries and keys [(layers,) ..., heads or 1, F] of vectors [..., E]."""
        return self.encoding.apply({"params": params}, vectors, method="query_key")


def term_weight(settings: Any, step: jax.Array) -> jax.Array | float:
    """Returns a term's weight at a step: `weight`, reached linearly over `warmup_steps`."""
    if not settings.warmup_steps:
        return settings.weight
    return settings.weight * jnp.minimum(1.0, (step + 1) / settings.warmup_steps)
