"""AdamW with learning-rate schedules; the position encoder and the rest of the model are clipped and decayed separately.

Parameters can be frozen, and those of the position encoding can have a learning rate of their own.
"""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from seqpe_jax.errors import InputError

PARAM_GROUPS = ("model", "encoder")
FROZEN = "frozen_"  # before the name of a group
BLOCK_PARTS = (
    "fading",
    "parabola_shape",
)  # what an encoding adds to each block of the model: gates, shapes of parabolas


def param_groups(params: Any) -> Any:
    """Returns the tree of group names: "encoder" for the digit encoder, "model" for the rest, with the qk map."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _param_group(path), params)


def _param_group(path: tuple[Any, ...]) -> str:
    return "encoder" if _names(path)[:2] == ["encoding", "encoder"] else "model"


def _names(path: tuple[Any, ...]) -> list[str]:
    return [getattr(entry, "key", str(entry)) for entry in path]


def is_of_encoding(name: str) -> bool:
    """Returns whether a parameter, such as "model/blocks_0/parabola_shape/kernel", belongs to the position encoding."""
    parts = name.split("/")
    return parts[0] == "encoding" or any(part in BLOCK_PARTS for part in parts)


def is_frozen(name: str, patterns: tuple[str, ...]) -> bool:
    """Returns whether a parameter has a name that one of the patterns matches; * matches any text, / as well."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_selected_params(settings: Any, params: Any) -> None:
    """Refuses a field that selects no parameter.

    Args:
      settings: `optimizer` section of the config.
      params: the parameters, or their shapes.

    Raises:
      InputError: a pattern of `freeze` matches none, all are frozen, or `encoder_learning_rate` is of none that train.
    """
    names = ["/".join(_names(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in settings.freeze:
        if not any(is_frozen(name, (pattern,)) for name in names):
            raise InputError(
                f"optimizer.freeze: '{pattern}' matches no parameter; their names are {', '.join(names[:3])}, ..., "
                f"{names[-1]}: write a pattern of these, such as model/*"
            )
    trained = [name for name in names if settings.freeze_steps or not is_frozen(name, settings.freeze)]
    if not trained or all(is_frozen(name, settings.freeze) for name in names):
        raise InputError(
            f"optimizer.freeze={','.join(settings.freeze)} freezes all {len(names)} arrays of the model: leave some to train"
        )
    if settings.encoder_learning_rate and not any(map(is_of_encoding, trained)):
        raise InputError(
            f"optimizer.encoder_learning_rate={settings.encoder_learning_rate} is for the parameters of the position encoding, "
            "and this model trains none: leave it out, or choose an encoding with parameters"
        )


def stop_frozen(settings: Any, params: Any) -> Any:
    """Returns parameters of which those that are always frozen get no gradient, so that none is computed for them."""
    if not settings.freeze or settings.freeze_steps:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.lax.stop_gradient(leaf) if is_frozen("/".join(_names(path)), settings.freeze) else leaf,
        params,
    )


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

    Frozen parameters are groups of their own, so that their gradients take no part in the clipping of others. Those that are
    frozen in all steps have no state; those that are frozen at first have moments of all steps, which are ready when their
    updates begin.

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
    if settings.freeze_steps:
        begin = optax.scale_by_schedule(lambda count: jnp.where(count < settings.freeze_steps, 0.0, 1.0))
        transforms |= {FROZEN + group: optax.chain(transforms[group], begin) for group in PARAM_GROUPS}
    elif settings.freeze:
        transforms |= {FROZEN + group: optax.set_to_zero() for group in PARAM_GROUPS}

    def label(path: tuple[Any, ...], _: Any) -> str:
        frozen = is_frozen("/".join(_names(path)), settings.freeze)
        return FROZEN * frozen + _param_group(path)

    optimizer = optax.multi_transform(transforms, lambda params: jax.tree_util.tree_map_with_path(label, params))
    if not settings.encoder_learning_rate:
        return optimizer
    return _with_encoding_factor(optimizer, settings.encoder_learning_rate / settings.learning_rate)


def _with_encoding_factor(optimizer: optax.GradientTransformation, factor: float) -> optax.GradientTransformation:
    """Returns an optimizer whose updates of the position encoding are multiplied by a factor, as by its learning rate.

    It has the state of the optimizer alone, so that a run may change the factor when it resumes.
    """

    def scale(path: tuple[Any, ...], update: Any) -> Any:
        return update * factor if is_of_encoding("/".join(_names(path))) else update

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(optimizer.init, update)


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
