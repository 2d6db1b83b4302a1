"""Which checkpoint of a run is the best by a metric of its evaluations, each of which is stored beside its state."""

import math
import os
from collections.abc import Sequence
from typing import Any

from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, parse_json
from seqpe_jax.metrics import HIGHER_IS_BETTER
from seqpe_jax.training.checkpoint import CHECKPOINTS_DIR, checkpoint_error, quarantine_step, steps_of
from seqpe_jax.training.checksums import META_FILE, checksum_error

EVALUATION_KEY = "evaluation"  # what was measured of a state, in what lies beside it


def check_best_metric(metric: str, known: Sequence[str]) -> str:
    """Returns the metric as metrics.jsonl calls it, `eval/NAME@SCALE`.

    Raises:
      InputError: it is none of those that the run measures while it trains.
    """
    full = f"eval/{metric.removeprefix('eval/')}"
    if full not in known:
        names = ", ".join(name.removeprefix("eval/") for name in known)
        raise InputError(f"checkpoint.best='{metric}' is not measured while this run trains: choose one of {names}")
    return full


class BestCheckpointPolicy:
    """Tells Orbax which checkpoint not to remove, however old it is: the best one, of equals the first."""

    def __init__(self, workdir: str | os.PathLike, metric: str):
        """Reads what is there, of which nothing may be damaged (`quarantine_best`)."""
        self._metric, self._values = metric, _values(_folder(workdir), metric)

    def note(self, step: int, meta: dict[str, Any]) -> None:
        """Takes in a state that is about to be saved, with what lies beside it."""
        value = _number(meta, self._metric)
        if value is not None:
            self._values[step] = value

    def forget(self, step: int | None) -> None:
        """Leaves a state out that could not be saved."""
        self._values.pop(step, None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it stays; Orbax asks, with the steps that it has."""
        there = [info.step for info in checkpoints]
        best = _best({step: value for step, value in self._values.items() if step in there}, self._metric)
        return [step == best for step in there]


def best_step(workdir: str | os.PathLike, metric: str) -> tuple[int, float]:
    """Returns the step of the best of a run's checkpoints, and its value.

    Args:
      metric: as the run's config has it; "" = it has none.

    Raises:
      InputError: there is no such checkpoint, or one is damaged that may be it.
    """
    if not metric:
        raise InputError(
            f"{workdir} has no best checkpoint: it was trained without checkpoint.best; use --which=latest"
        )
    folder, full = _folder(workdir), f"eval/{metric.removeprefix('eval/')}"
    for path in steps_of(folder):
        if wrong := checkpoint_error(path):
            raise InputError(
                f"checkpoint {path} is damaged ({wrong}) and may be the best: put back a copy of it, or use --which=latest"
            )
    values = _values(folder, full)
    step = _best(values, full)
    if step is None:
        raise InputError(f"{workdir} has no best checkpoint yet: of none was {full} measured; use --which=latest")
    return step, values[step]


def quarantine_best(workdir: str | os.PathLike, metric: str) -> list[str]:
    """Renames the best checkpoint where it is damaged, or one of which it is not known any more whether it is that.

    Returns:
      What was done, in words.
    """
    folder, told = _folder(workdir), []
    for path in steps_of(folder):
        wrong = checksum_error(path, within=META_FILE.parts[0]) or (
            "" if (path / META_FILE).is_file() else f"{META_FILE} is missing"
        )
        if wrong:
            told.append(f"checkpoint {path} is damaged ({wrong}): renamed to {quarantine_step(path)}")
    while (step := _best(_values(folder, metric), metric)) is not None and (
        wrong := checkpoint_error(folder / str(step))
    ):
        name = quarantine_step(folder / str(step))
        told.append(f"checkpoint {folder / str(step)}, the best, is damaged ({wrong}): renamed to {name}")
    return told


def _folder(workdir: str | os.PathLike) -> AnyPath:
    return (as_path(workdir) / CHECKPOINTS_DIR).absolute()


def _values(folder: AnyPath, metric: str) -> dict[int, float]:
    """The metric of each saved state of which it was measured, by step."""
    values = {int(path.name): _number(_meta(path), metric) for path in steps_of(folder)}
    return {step: value for step, value in values.items() if value is not None}


def _meta(step: AnyPath) -> dict[str, Any]:
    """What lies beside a state. Raises: InputError: it is damaged."""
    try:
        return parse_json((step / META_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {step} is damaged ({META_FILE} cannot be read: {error})") from error


def _number(meta: dict[str, Any], metric: str) -> float | None:
    value = meta.get(EVALUATION_KEY, {}).get(metric)
    return value if value is not None and math.isfinite(value) else None


def _best(values: dict[int, float], metric: str) -> int | None:
    """The step with the best value, of equals the first; None where there is none."""
    sign = 1 if HIGHER_IS_BETTER[metric.removeprefix("eval/").partition("@")[0]] else -1
    return max(sorted(values), key=lambda step: sign * values[step], default=None)
