"""The positions of one training step: what the model reads, and what the terms on position vectors compare."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.models.build import ModelSpec, stream
from seqpe_jax.positions import sampling


class SampledPositions(NamedTuple):
    """The positions of one step. A batch may carry its own as batch["sampled_positions"] and so replace the random ones.

    Attributes:
      positions_PLA: int32, what the model reads: P windows.
      perturbed: bool[], the windows are not where they would be in evaluation, so that they cannot teach distillation.
      contrastive, distillation: what these terms compare, or None where their weight is 0.
      boxes_PA2: parts of the images that the model reads in place of whole ones, or None.
    """

    positions_PLA: jax.Array
    perturbed: jax.Array
    contrastive: sampling.ContrastivePositions | None
    distillation: sampling.DistillationPositions | None
    crop_boxes_PA2: jax.Array | None = None


def may_perturb(settings: Any) -> bool:
    """Whether some steps read windows displaced, or windows whose places do not stand where they should."""
    return max(settings.shift.rate, settings.skip.rate, settings.jitter.rate, settings.zoom.rate) > 0


def sample_positions(settings: Any, model_spec: ModelSpec, key: jax.Array, step: jax.Array) -> SampledPositions:
    """Returns the positions of a step, a pure function of the run's key and the step.

    Args:
      settings: the `objective` section of a config.
    """
    now = jax.random.fold_in(key, step)
    positions_PLA, perturbed, crop_boxes_PA2 = _windows(settings, model_spec, key, now)
    return SampledPositions(
        positions_PLA,
        perturbed,
        _contrastive(settings.contrastive, model_spec, key, step),
        _distillation(settings.distillation, model_spec, now),
        crop_boxes_PA2,
    )


def _windows(
    settings: Any, model_spec: ModelSpec, key: jax.Array, now: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The windows that the model reads, whether they were perturbed, and the parts of images that they lie over."""
    shape, position_grid = model_spec.shape, model_spec.position_grid
    sets = settings.shift.sets if may_perturb(settings) else 1
    positions_PLA = jnp.broadcast_to(position_grid.positions(shape), (sets, model_spec.num_positions, len(shape)))
    perturbed, crop_boxes_PA2 = jnp.zeros((), bool), None
    if not may_perturb(settings):
        return positions_PLA, perturbed, crop_boxes_PA2
    if settings.zoom.rate:
        zoomed = jax.random.uniform(stream(now, "zoom")) < settings.zoom.rate
        crop_boxes_PA2 = sampling.crop_boxes(
            stream(now, "boxes"), sets=sets, axes=len(shape), smallest=settings.zoom.smallest
        )
        crop_boxes_PA2 = jnp.where(zoomed, crop_boxes_PA2, jnp.array([0.0, 1.0]))
        positions_PLA = jnp.where(zoomed, position_grid.crop_positions(shape, crop_boxes_PA2), positions_PLA)
        perturbed = perturbed | zoomed
    positions_PLA, displaced = _offset_or_skipped(settings, model_spec, positions_PLA, key, now)
    perturbed = perturbed | displaced
    if settings.jitter.rate:
        shaken = jax.random.uniform(stream(now, "shake")) < settings.jitter.rate
        shaken_PLA = sampling.jitter(
            stream(now, "jitter"),
            positions_PLA,
            reach=round(settings.jitter.range * position_grid.position_resolution),
            max_position=model_spec.max_position,
            ordered=len(shape) == 1,
        )
        positions_PLA, perturbed = jnp.where(shaken, shaken_PLA, positions_PLA), perturbed | shaken
    return positions_PLA, perturbed, crop_boxes_PA2


def _offset_or_skipped(
    settings: Any, model_spec: ModelSpec, positions_PLA: jax.Array, key: jax.Array, now: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The windows, shifted or cut into chunks with gaps where this step draws that, and whether it does."""
    shape, unit, (offset_A, limit) = (
        model_spec.shape,
        model_spec.position_grid.position_resolution,
        _room(model_spec),
    )
    sets = len(positions_PLA)
    choice = jax.random.uniform(stream(now, "move"))
    shifted, skipped = choice < settings.shift.rate, choice >= 1.0 - settings.skip.rate
    if settings.shift.rate:
        starts_PA = sampling.random_offsets(
            stream(now, "shift"),
            sets=sets,
            shape=shape,
            max_position=limit,
            position_resolution=unit,
            num_start_positions=settings.shift.starts,
            subset_key=stream(key, "shift starts"),
        )
        positions_PLA = jnp.where(shifted, positions_PLA + starts_PA[:, None], positions_PLA)
    if settings.skip.rate:
        gaps_PLA = sampling.pose_skip(
            stream(now, "skip"),
            sets=sets,
            shape=shape,
            max_position=limit,
            num_chunks=settings.skip.chunks,
            range=settings.skip.range * unit or limit,
            position_resolution=unit,
        )
        positions_PLA = jnp.where(skipped, gaps_PLA + offset_A, positions_PLA)
    return positions_PLA, shifted | skipped


def _contrastive(
    settings: Any, model_spec: ModelSpec, key: jax.Array, step: jax.Array
) -> sampling.ContrastivePositions | None:
    if not settings.weight:
        return None
    return sampling.contrastive_positions(
        stream(key, "contrastive"),
        step,
        batch=settings.batch,
        candidates=settings.candidates,
        max_position=model_spec.max_position,
        axes=len(model_spec.shape),
        base=model_spec.base,
        mixture=settings.mixture,
        hard_fraction=settings.hard_fraction,
        window=settings.window * model_spec.position_grid.position_resolution,
        around_anchor=settings.around_anchor,
        causal_only=settings.causal_only,
    )


def _distillation(settings: Any, model_spec: ModelSpec, now: jax.Array) -> sampling.DistillationPositions | None:
    if not settings.weight:
        return None
    offset_A, limit = _room(model_spec)
    windows = sampling.distillation_positions(
        stream(now, "distillation"),
        batch=settings.batch,
        offsets=settings.offsets,
        shape=model_spec.shape,
        max_position=limit,
        position_resolution=model_spec.position_grid.position_resolution,
    )
    return windows._replace(positions_BMA=windows.positions_BMA + offset_A)


def _room(model_spec: ModelSpec) -> tuple[np.ndarray, int]:
    """Where the training grid begins along each axis, and the positions that are left beyond that for windows to move in.

    Windows are drawn as if they began at 0; what a grid that stands in the middle of its cells begins with is added after.
    """
    axes = range(len(model_spec.shape))
    offset_A = np.array([model_spec.position_grid.first_position(axis) for axis in axes], np.int32)
    return offset_A, model_spec.max_position - int(offset_A.max())
