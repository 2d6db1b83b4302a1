"""AdamW with learning-rate schedules; the position encoder and the rest of the model are clipped and decayed separately."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

PARAM_GROUPS = ("model", "encoder")


def param_groups(params: Any) -> Any:
    """Returns the tree of group names: "encoder" for the digit encoder, "model" for the rest, with the qk map."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _param_group(path), params)


def _param_group(path: tuple[Any, ...]) -> str:
    names = [getattr(entry, "key", str(entry)) for entry in path]
    return "encoder" if names[:2] == ["encoding", "encoder"] else "model"


def decay_mask(params: Any) -> Any:
    """Returns True for matrices of linear maps; biases, norms, embeddings and tokens have no weight decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") == "kernel", params)


def learning_rate(settings: Any, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up from 0, then constant, linear or cosine to the end value.

    The schedule "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) is constant until its last `decay_steps`,
    in which it falls linearly to the end value.

    Args:
      settings: `optimizer` section of the config.
      steps: length of the run, at which the schedule ends.
    """
    peak, end = settings.learning_rate, settings.end_learning_rate
    rest = max(1, steps - settings.warmup_steps)
    match settings.schedule:
        case "linear":
            after = optax.linear_schedule(peak, end, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=end / peak if peak else 0.0)
        case "wsd":
            decay = decay_steps(settings, steps)
            stable = max(0, rest - decay)
            after = optax.join_schedules(
                [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)], [stable]
            )
        case _:
            after = optax.constant_schedule(peak)
    if not settings.warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, settings.warmup_steps), after], [settings.warmup_steps]
    )


def decay_steps(settings: Any, steps: int) -> int:
    """Returns the number of decay steps at the end of a run with the schedule "wsd"; by default a tenth of the run."""
    return settings.decay_steps or max(1, steps // 10)


def make_optimizer(settings: Any, steps: int) -> optax.GradientTransformation:
    """Returns AdamW over both parameter groups, each with its own gradient clipping and weight decay.

    Args:
      settings: `optimizer` section of the config.
      steps: length of the run, at which the schedule ends.
    """
    schedule = learning_rate(settings, steps)
    mean_dtype = None if settings.state_dtype == "float32" else settings.state_dtype

    def chain(weight_decay: float) -> optax.GradientTransformation:
        adamw = optax.adamw(
            schedule,
            settings.b1,
            settings.b2,
            settings.epsilon,
            mu_dtype=mean_dtype,
            weight_decay=weight_decay,
            mask=decay_mask,
        )
        return optax.chain(optax.clip_by_global_norm(settings.clip), adamw) if settings.clip else adamw

    transforms = {"model": chain(settings.weight_decay), "encoder": chain(settings.encoder_weight_decay)}
    return optax.multi_transform(transforms, param_groups)


def projection(bounds: Mapping[str, tuple[float, float]]) -> Callable[[Any], Any]:
    """Returns a function that projects bounded parameters of the encoding into their bounds.

    Args:
      bounds: (smallest, largest) by name of a parameter of the encoding.
    """

    def project(params: Any) -> Any:
        encoding = {
            name: optax.projections.projection_box(leaf, *bounds[name]) if name in bounds else leaf
            for name, leaf in params["encoding"].items()
        }
        return params | {"encoding": encoding}

    return project if bounds else lambda params: params
