"""Random positions of one train step: perturbed windows of the model, contrastive positions, distillation windows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.models.build import ModelSpec, stream
from seqpe_jax.positions import contrastive_sampling, sampling


class SampledPositions(NamedTuple):
    """Positions of one train step. A batch may hold its own as batch["sampled_positions"] instead of random ones.

    Attributes:
      positions_PLA: int32, positions of P windows of the model.
      perturbed: bool[], positions differ from those of evaluation, so that the windows cannot teach distillation.
      contrastive: anchors and candidates, or None if the weight of the loss is 0.
      distillation: windows out of range, or None if the weight of the loss is 0.
      crop_boxes_PA2: float32, image crops that the windows cover, or None without random crops.
    """

    positions_PLA: jax.Array
    perturbed: jax.Array
    contrastive: contrastive_sampling.ContrastivePositions | None
    distillation: sampling.DistillationPositions | None
    crop_boxes_PA2: jax.Array | None = None


def may_perturb(settings: Any) -> bool:
    """Returns True if some steps perturb positions: random offset, PoSE skips, jitter or random crops.

    Args:
      settings: `objective` section of the config.
    """
    return max(settings.shift.rate, settings.skip.rate, settings.jitter.rate, settings.zoom.rate) > 0


def sample_positions(settings: Any, model_spec: ModelSpec, key: jax.Array, step: jax.Array) -> SampledPositions:
    """Returns the positions of a step, a pure function of key and step.

    Args:
      settings: `objective` section of the config.
      model_spec: ModelSpec of the model.
      key: PRNG key of the run.
      step: int32[].
    """
    step_key = jax.random.fold_in(key, step)
    if may_perturb(settings):
        positions_PLA, perturbed, crop_boxes_PA2 = _perturbed_windows(settings, model_spec, key, step_key)
    else:
        positions_PLA, perturbed, crop_boxes_PA2 = _windows(model_spec, 1), jnp.zeros((), bool), None
    return SampledPositions(
        positions_PLA,
        perturbed,
        _contrastive(settings.contrastive, model_spec, key, step),
        _distillation(settings.distillation, model_spec, step_key),
        crop_boxes_PA2,
    )


def _windows(model_spec: ModelSpec, num_sets: int) -> jax.Array:
    """Returns `num_sets` copies of the training grid, int32[P, L, A]."""
    shape = model_spec.shape
    grid_LA = model_spec.position_grid.positions(shape)
    return jnp.broadcast_to(grid_LA, (num_sets, model_spec.num_positions, len(shape)))


def _perturbed_windows(
    settings: Any, model_spec: ModelSpec, key: jax.Array, step_key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns (positions_PLA, perturbed, crop_boxes_PA2) of a step; each perturbation happens in a share of the steps."""
    positions_PLA, perturbed = _windows(model_spec, settings.shift.sets), jnp.zeros((), bool)
    crop_boxes_PA2 = None
    if settings.zoom.rate:
        positions_PLA, cropped, crop_boxes_PA2 = _random_crop(settings.zoom, model_spec, positions_PLA, step_key)
        perturbed = perturbed | cropped
    positions_PLA, displaced = _offset_or_skip(settings, model_spec, positions_PLA, key, step_key)
    perturbed = perturbed | displaced
    if settings.jitter.rate:
        positions_PLA, jittered = _jitter(settings.jitter, model_spec, positions_PLA, step_key)
        perturbed = perturbed | jittered
    return positions_PLA, perturbed, crop_boxes_PA2


def _random_crop(
    settings: Any, model_spec: ModelSpec, positions_PLA: jax.Array, step_key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (positions_PLA of random crops, bool[] whether this step crops, crop_boxes_PA2)."""
    shape = model_spec.shape
    cropped = jax.random.uniform(stream(step_key, "zoom")) < settings.rate
    boxes_PA2 = sampling.crop_boxes(
        stream(step_key, "boxes"), num_sets=len(positions_PLA), axes=len(shape), smallest=settings.smallest
    )
    boxes_PA2 = jnp.where(cropped, boxes_PA2, jnp.array([0.0, 1.0]))
    crop_PLA = model_spec.position_grid.crop_positions(shape, boxes_PA2)
    return jnp.where(cropped, crop_PLA, positions_PLA), cropped, boxes_PA2


def _offset_or_skip(
    settings: Any, model_spec: ModelSpec, positions_PLA: jax.Array, key: jax.Array, step_key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (positions_PLA with a random offset or PoSE skips, bool[] whether this step has either)."""
    first_A, max_position = _movable_range(model_spec)
    grid = {
        "num_sets": len(positions_PLA),
        "shape": model_spec.shape,
        "max_position": max_position,
        "position_resolution": model_spec.position_grid.position_resolution,
    }
    choice = jax.random.uniform(stream(step_key, "move"))
    has_offset, has_skips = choice < settings.shift.rate, choice >= 1.0 - settings.skip.rate
    if settings.shift.rate:
        offsets_PA = sampling.random_offsets(
            stream(step_key, "shift"),
            **grid,
            num_start_positions=settings.shift.starts,
            subset_key=stream(key, "shift starts"),
            carry_share=settings.shift.carries,
            base=model_spec.base,
            grid_start_A=first_A,
        )
        positions_PLA = jnp.where(has_offset, positions_PLA + offsets_PA[:, None], positions_PLA)
    if settings.skip.rate:
        grid["position_range"] = settings.skip.range * grid["position_resolution"] or max_position
        if settings.skip.chunks:
            skips_PLA = sampling.pose_skip(stream(step_key, "skip"), **grid, num_chunks=settings.skip.chunks)
        else:
            skips_PLA = sampling.random_positions(stream(step_key, "skip"), **grid)
        positions_PLA = jnp.where(has_skips, skips_PLA + first_A, positions_PLA)
    return positions_PLA, has_offset | has_skips


def _jitter(
    settings: Any, model_spec: ModelSpec, positions_PLA: jax.Array, step_key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (jittered positions_PLA, bool[] whether this step jitters)."""
    jittered = jax.random.uniform(stream(step_key, "shake")) < settings.rate
    jittered_PLA = sampling.jitter(
        stream(step_key, "jitter"),
        positions_PLA,
        max_distance=round(settings.range * model_spec.position_grid.position_resolution),
        max_position=model_spec.max_position,
        ordered=len(model_spec.shape) == 1,
    )
    return jnp.where(jittered, jittered_PLA, positions_PLA), jittered


def _contrastive(
    settings: Any, model_spec: ModelSpec, key: jax.Array, step: jax.Array
) -> contrastive_sampling.ContrastivePositions | None:
    if not settings.weight:
        return None
    return contrastive_sampling.sample_contrastive_positions(
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


def _distillation(settings: Any, model_spec: ModelSpec, step_key: jax.Array) -> sampling.DistillationPositions | None:
    if not settings.weight:
        return None
    first_A, max_position = _movable_range(model_spec)
    sampled = sampling.distillation_positions(
        stream(step_key, "distillation"),
        batch=settings.batch,
        offsets=settings.offsets,
        shape=model_spec.shape,
        max_position=max_position,
        position_resolution=model_spec.position_grid.position_resolution,
    )
    return sampled._replace(positions_BMA=sampled.positions_BMA + first_A)


def _movable_range(model_spec: ModelSpec) -> tuple[np.ndarray, int]:
    """Returns (first position of the training grid int32[A], limit of positions relative to it).

    Windows are sampled as if the grid began at 0; the first position, which is above 0 for a grid whose patches are at
    cell centers, is added afterwards.
    """
    axes = range(len(model_spec.shape))
    first_A = np.array([model_spec.position_grid.first_position(axis) for axis in axes], np.int32)
    return first_A, model_spec.max_position - int(first_A.max())
