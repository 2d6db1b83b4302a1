"""The positions of one training step: what the model reads, and what the terms on position vectors compare."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.models.build import Architecture, stream
from seqpe_jax.positions import sampling


class Draws(NamedTuple):
    """The positions of one step. A batch may carry its own as batch["draws"] and so replace the random ones.

    Attributes:
      positions_PLA: int32, what the model reads: P windows.
      moved: bool[], the windows are not where they would be in evaluation, so that they cannot teach distillation.
      contrastive, distillation: what these terms compare, or None where their weight is 0.
      boxes_PA2: parts of the images that the model reads in place of whole ones, or None.
    """

    positions_PLA: jax.Array
    moved: jax.Array
    contrastive: sampling.Contrastive | None
    distillation: sampling.Distillation | None
    boxes_PA2: jax.Array | None = None


def may_move(settings: Any) -> bool:
    """Whether some steps read windows elsewhere, or windows whose places do not stand where they should."""
    return max(settings.shift.rate, settings.skip.rate, settings.jitter.rate, settings.zoom.rate) > 0


def draw(settings: Any, architecture: Architecture, key: jax.Array, step: jax.Array) -> Draws:
    """Returns the positions of a step, a pure function of the run's key and the step.

    Args:
      settings: the `objective` section of a config.
    """
    now = jax.random.fold_in(key, step)
    positions_PLA, moved, boxes_PA2 = _windows(settings, architecture, key, now)
    return Draws(
        positions_PLA,
        moved,
        _contrastive(settings.contrastive, architecture, key, step),
        _distillation(settings.distillation, architecture, now),
        boxes_PA2,
    )


def _windows(
    settings: Any, architecture: Architecture, key: jax.Array, now: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The windows that the model reads, whether they were moved, and the parts of images that they lie over."""
    shape, spacing = architecture.shape, architecture.spacing
    sets = settings.shift.sets if may_move(settings) else 1
    positions_PLA = jnp.broadcast_to(spacing.grid(shape), (sets, architecture.places, len(shape)))
    moved, boxes_PA2 = jnp.zeros((), bool), None
    if not may_move(settings):
        return positions_PLA, moved, boxes_PA2
    if settings.zoom.rate:
        zoomed = jax.random.uniform(stream(now, "zoom")) < settings.zoom.rate
        boxes_PA2 = sampling.boxes(stream(now, "boxes"), sets=sets, axes=len(shape), smallest=settings.zoom.smallest)
        boxes_PA2 = jnp.where(zoomed, boxes_PA2, jnp.array([0.0, 1.0]))
        positions_PLA = jnp.where(zoomed, spacing.part(shape, boxes_PA2), positions_PLA)
        moved = moved | zoomed
    positions_PLA, elsewhere = _elsewhere(settings, architecture, positions_PLA, key, now)
    moved = moved | elsewhere
    if settings.jitter.rate:
        shaken = jax.random.uniform(stream(now, "shake")) < settings.jitter.rate
        shaken_PLA = sampling.jitter(
            stream(now, "jitter"),
            positions_PLA,
            reach=round(settings.jitter.range * spacing.unit),
            max_position=architecture.max_position,
            ordered=len(shape) == 1,
        )
        positions_PLA, moved = jnp.where(shaken, shaken_PLA, positions_PLA), moved | shaken
    return positions_PLA, moved, boxes_PA2


def _elsewhere(
    settings: Any, architecture: Architecture, positions_PLA: jax.Array, key: jax.Array, now: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The windows, shifted or cut into chunks with gaps where this step draws that, and whether it does."""
    shape, unit, (offset_A, limit) = architecture.shape, architecture.spacing.unit, _room(architecture)
    sets = len(positions_PLA)
    choice = jax.random.uniform(stream(now, "move"))
    shifted, skipped = choice < settings.shift.rate, choice >= 1.0 - settings.skip.rate
    if settings.shift.rate:
        starts_PA = sampling.shift(
            stream(now, "shift"),
            sets=sets,
            shape=shape,
            max_position=limit,
            unit=unit,
            starts=settings.shift.starts,
            subset_key=stream(key, "shift starts"),
        )
        positions_PLA = jnp.where(shifted, positions_PLA + starts_PA[:, None], positions_PLA)
    if settings.skip.rate:
        gaps_PLA = sampling.skip(
            stream(now, "skip"),
            sets=sets,
            shape=shape,
            max_position=limit,
            chunks=settings.skip.chunks,
            range=settings.skip.range * unit or limit,
            unit=unit,
        )
        positions_PLA = jnp.where(skipped, gaps_PLA + offset_A, positions_PLA)
    return positions_PLA, shifted | skipped


def _contrastive(
    settings: Any, architecture: Architecture, key: jax.Array, step: jax.Array
) -> sampling.Contrastive | None:
    if not settings.weight:
        return None
    return sampling.contrastive(
        stream(key, "contrastive"),
        step,
        batch=settings.batch,
        candidates=settings.candidates,
        max_position=architecture.max_position,
        axes=len(architecture.shape),
        base=architecture.base,
        mixture=settings.mixture,
        hard_fraction=settings.hard_fraction,
        window=settings.window * architecture.spacing.unit,
        around_pivot=settings.around_pivot,
        past_only=settings.past_only,
    )


def _distillation(settings: Any, architecture: Architecture, now: jax.Array) -> sampling.Distillation | None:
    if not settings.weight:
        return None
    offset_A, limit = _room(architecture)
    windows = sampling.distillation(
        stream(now, "distillation"),
        batch=settings.batch,
        offsets=settings.offsets,
        shape=architecture.shape,
        max_position=limit,
        unit=architecture.spacing.unit,
    )
    return windows._replace(positions_BMA=windows.positions_BMA + offset_A)


def _room(architecture: Architecture) -> tuple[np.ndarray, int]:
    """Where the training grid begins along each axis, and the positions that are left beyond that for windows to move in.

    Windows are drawn as if they began at 0; what a grid that stands in the middle of its cells begins with is added after.
    """
    axes = range(len(architecture.shape))
    offset_A = np.array([architecture.spacing.offset(axis) for axis in axes], np.int32)
    return offset_A, architecture.max_position - int(offset_A.max())
