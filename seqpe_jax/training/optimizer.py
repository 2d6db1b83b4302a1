"""Optimizers and learning-rate schedules; the position encoder and the rest of the model are clipped and decayed separately.

Parameters can be frozen, and those of the position encoding and embeddings can have learning rates of their own. Averages of
the parameters: an exponential moving average next to any optimizer, and the one that schedule-free AdamW evaluates.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from seqpe_jax.errors import InputError

PARAM_GROUPS = ("model", "encoder")
FROZEN = "frozen_"  # before the name of a group
BLOCK_PARTS = (
    "fading",
    "parabola_shape",
)  # what an encoding adds to each block of the model: gates, shapes of parabolas
EMBEDDINGS = ("model/token_embedding/embedding", "model/output_embedding/embedding")
# Kernels of a block: (dimensions of the input, dimensions of the output); layers of a loop come before both. Outputs of queries,
# keys and values together have a dimension for which of them, and two of the heads.
BLOCK_KERNELS = {
    "qkv": (1, 3),
    "q": (1, 2),
    "kv": (1, 3),
    "out": (2, 1),
    "mlp_in": (1, 1),
    "mlp_gate": (1, 1),
    "mlp_out": (1, 1),
}
# Root mean square of Muon's updates, as AdamW's have it, so that learning rates mean the same (Liu et al. 2025, arXiv 2502.16982).
MUON_RMS = 0.2
AVERAGE, INNER = "ema", "inner"  # parts of an optimizer state with an average of the parameters


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
      InputError: a pattern of `freeze` matches none, all are frozen, or `encoder_learning_rate` or `embedding_learning_rate`
        is of none that train.
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
    if settings.embedding_learning_rate and not set(EMBEDDINGS) & set(trained):
        raise InputError(
            f"optimizer.embedding_learning_rate={settings.embedding_learning_rate} is for embeddings of tokens, and this model "
            "trains none: leave it out"
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
    """Returns the optimizer over both parameter groups, each with its own gradient clipping and weight decay.

    Frozen parameters are groups of their own, so that their gradients take no part in the clipping of others. Those that are
    frozen in all steps have no state; those that are frozen at first have moments of all steps, which are ready when their
    updates begin.

    Args:
      settings: `optimizer` section of the config.
      steps: length of the run, at which the schedule ends.
    """
    schedule = learning_rate(settings, steps)

    def chain(weight_decay: float) -> optax.GradientTransformation:
        optimizer = _of_kind(settings, schedule, weight_decay)
        return optax.chain(optax.clip_by_global_norm(settings.clip), optimizer) if settings.clip else optimizer

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
    return _with_average(optimizer) if settings.ema else optimizer


def _of_kind(settings: Any, schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Returns the optimizer of one parameter group; weight decay is the learning rate times the parameter in each kind.

    Args:
      settings: `optimizer` section of the config.
      schedule: learning rate by step.
      weight_decay: of the group's matrices.
    """
    mean_dtype = None if settings.state_dtype == "float32" else settings.state_dtype
    adam = {"b1": settings.b1, "b2": settings.b2, "eps": settings.epsilon}
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    match settings.kind:
        case "muon":
            direction = optax.partition(
                {"matrices": _muon(settings, mean_dtype), "others": optax.scale_by_adam(**adam, mu_dtype=mean_dtype)},
                lambda params: jax.tree_util.tree_map_with_path(
                    lambda path, _: "others" if _block_kernel(path) is None else "matrices", params
                ),
            )
            optimizer = optax.chain(direction, decay, optax.scale_by_learning_rate(schedule))
        case "lion":
            optimizer = optax.lion(
                schedule, settings.b1, settings.b2, mean_dtype, weight_decay=weight_decay, mask=decay_mask
            )
        case "adafactor":
            # Without a learning rate it ends with the sign of a descent, which weight decay follows.
            decay = optax.add_decayed_weights(-weight_decay, mask=decay_mask)
            rate = optax.scale_by_learning_rate(schedule, flip_sign=False)
            optimizer = optax.chain(_as_matrices(optax.adafactor(None)), decay, rate)
        case "sgd":
            momentum = [optax.trace(settings.momentum, accumulator_dtype=mean_dtype)] if settings.momentum else []
            optimizer = optax.chain(*momentum, decay, optax.scale_by_learning_rate(schedule))
        case "schedule_free_adamw":
            rms = optax.scale_by_rms(settings.b2, settings.epsilon, eps_in_sqrt=False, bias_correction=True)
            base = _with_factors(optax.chain(rms, decay, optax.scale_by_learning_rate(schedule)), settings)
            return contrib.schedule_free(base, schedule, settings.b1)
        case _:
            optimizer = optax.adamw(schedule, **adam, mu_dtype=mean_dtype, weight_decay=weight_decay, mask=decay_mask)
    return _with_factors(optimizer, settings)


def _block_kernel(path: tuple[Any, ...]) -> tuple[int, int] | None:
    """Returns the dimensions of input and output of a hidden kernel of the model (`BLOCK_KERNELS`), or None for the rest."""
    names = _names(path)
    if names[0] != "model" or not names[1].startswith("blocks") or names[-1] != "kernel":
        return None
    return BLOCK_KERNELS.get(names[-2])


def _muon(settings: Any, mean_dtype: str | None) -> optax.GradientTransformation:
    """Returns Muon's direction for kernels of blocks; queries, keys and values of one kernel are matrices of their own."""

    def dimensions(params: Any) -> Any:
        def of_kernel(path: tuple[Any, ...], _: Any) -> contrib.MuonDimensionNumbers:
            inputs, outputs = _block_kernel(path)
            return contrib.MuonDimensionNumbers(
                tuple(range(-inputs - outputs, -outputs)), tuple(range(-min(outputs, 2), 0))
            )

        return jax.tree_util.tree_map_with_path(of_kernel, params)

    def scale(updates: Any, params: Any) -> Any:
        del params

        def of_kernel(update: jax.Array, dims: contrib.MuonDimensionNumbers) -> jax.Array:
            sides = [math.prod(update.shape[axis] for axis in axes) for axes in dims]
            return update * (MUON_RMS * math.sqrt(max(sides)))

        return jax.tree.map(of_kernel, updates, dimensions(updates))

    direction = contrib.scale_by_muon(
        beta=settings.momentum, eps=settings.epsilon, mu_dtype=mean_dtype, weight_dimension_numbers=dimensions
    )
    return optax.chain(direction, optax.stateless(scale))


def _as_matrices(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer that sees the kernels of blocks as matrices, of which Adafactor stores sums of rows and columns."""

    def reshape(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
        dimensions = _block_kernel(path)
        if dimensions is None or array.ndim < 3:
            return array
        inputs, outputs = dimensions
        layers = array.shape[: array.ndim - inputs - outputs]
        return array.reshape(*layers, math.prod(array.shape[-inputs - outputs : -outputs]), -1)

    def as_matrices(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(reshape, tree)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(as_matrices(gradients), state, as_matrices(params))
        return jax.tree.map(lambda update, like: update.reshape(like.shape), updates, gradients), state

    return optax.GradientTransformation(lambda params: optimizer.init(as_matrices(params)), update)


def _with_factors(optimizer: optax.GradientTransformation, settings: Any) -> optax.GradientTransformation:
    """Returns an optimizer in which the position encoding and embeddings have their own learning rates, if they have.

    It has the state of the optimizer alone, so that a run may change the rates when it resumes.
    """
    encoding, embedding = settings.encoder_learning_rate, settings.embedding_learning_rate
    if not encoding and not embedding:
        return optimizer

    def scale(path: tuple[Any, ...], update: Any) -> Any:
        name = "/".join(_names(path))
        own = encoding if is_of_encoding(name) else embedding if name in EMBEDDINGS else 0.0
        return update * (own / settings.learning_rate) if own else update

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(optimizer.init, update)


# --- Averages of parameters


def _with_average(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer whose state also holds an average of the parameters, which `update_average` moves."""

    def init(params: Any) -> dict[str, Any]:
        return {AVERAGE: jax.tree.map(jnp.copy, params), INNER: optimizer.init(params)}

    def update(gradients: Any, state: dict[str, Any], params: Any = None) -> tuple[Any, dict[str, Any]]:
        updates, inner = optimizer.update(gradients, state[INNER], params)
        return updates, state | {INNER: inner}

    return optax.GradientTransformation(init, update)


def update_average(settings: Any) -> Callable[[Any, Any, jax.Array], Any]:
    """Returns a function (optimizer state, new parameters, steps done before) -> optimizer state with the average moved.

    The decay begins low, at 1/10, so that the first parameters, which are random, are soon forgotten.

    Args:
      settings: `optimizer` section of the config.
    """

    def move(state: Any, params: Any, step: jax.Array) -> Any:
        decay = jnp.minimum(settings.ema, (1.0 + step) / (10.0 + step))
        average = jax.tree.map(lambda old, new: new + decay * (old - new), state[AVERAGE], params)
        return state | {AVERAGE: average}

    return move if settings.ema else lambda state, params, step: state


def has_average(settings: Any) -> bool:
    """Returns whether a run has an average of its parameters."""
    return bool(settings.ema) or settings.kind == "schedule_free_adamw"


def evaluates_average(settings: Any) -> bool:
    """Returns whether the average alone is what a run trains: schedule-free AdamW computes gradients at other points."""
    return settings.kind == "schedule_free_adamw"


def is_of_average(path: tuple[Any, ...]) -> bool:
    """Returns whether an array of the optimizer state is what `averaged_params` reads."""
    return bool({AVERAGE, "z"} & set(_state_names(path)))


def averaged_params(settings: Any, opt_state: Any, params: Any) -> Any:
    """Returns the average of a run's parameters: the moving one (`ema`), or the one of schedule-free AdamW.

    Args:
      settings: `optimizer` section of the config.
      opt_state: its state, in which arrays other than those of `is_of_average` are not read.
      params: parameters, of which frozen ones are their own average.
    """
    if settings.ema:
        return opt_state[AVERAGE]
    ends = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        names = _state_names(path)
        if "z" in names:
            ends["/".join(names[names.index("z") + 1 :])] = leaf

    def average(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
        end = ends.get("/".join(_names(path)))
        return param if end is None else (param - (1.0 - settings.b1) * end) / settings.b1

    return jax.tree_util.tree_map_with_path(average, params)


def _state_names(path: tuple[Any, ...]) -> list[str]:
    return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


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
