"""Files of a run's folder that a report shows, read and checked value by value."""

import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqpe_jax.archives import read_arrays
from seqpe_jax.axes import size_label
from seqpe_jax.config import apply_renames
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, parse_json

CONFIG = {"seed": int, "data.length": int, "encoding.kind": str}  # what a config must have to be shown
# What it need not have, but of this kind.
IF_THERE = {"steps": int, "data.size": list, "data.name": str, "encoding.gate": str}
EVALUATION = {"step": int, "parameters": int, "split": str, "without_context": dict}  # likewise, of an evaluation
EVALUATION |= {"training_flops": (int, float)}
NUMBERS = (
    "tokens examples loss perplexity bits_per_byte word_perplexity answer_perplexity contains f1 exact_match "
    "exact_match_strict top1 top5"
)
RESULT = dict.fromkeys(NUMBERS.split(), (int, float)) | {
    "targets": int,
    "stride": int,
    "loss_by_position": dict,
    "depth": list,
    "distance": list,
}  # likewise
Fields = Mapping[str, Any]  # dotted name -> the kind of its value
NONE: Fields = {}
LARGEST_DRAWN = 1 << 28  # bytes of the arrays of a plot


def field(values: Any, name: str) -> Any:
    """Returns the value of a dotted name in nested dicts; None without."""
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def read_evaluation(folder: AnyPath) -> dict[str, Any]:
    """Returns what `evaluate` wrote, {} where it did not; each result has its `scale_of` too. Raises: InputError."""
    path = folder / "evaluation.json"
    if not path.exists():
        return {}
    evaluation = object_of(path.read_bytes(), str(path), {"results": list}, EVALUATION)
    for number, result in enumerate(evaluation["results"], 1):
        try:
            result |= scale_of(result)
            _checked(result, "", {}, RESULT)
            if "context" in result:
                _ = result["targets"], result["stride"], float(result["loss"])
            _check_curves(result)
            if "without_context" in evaluation:
                float(evaluation["without_context"]["contains"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{path} has a result without a length, size or context, or without numbers, result {number}"
            raise InputError(f"{what}: write it with `evaluate --output`") from error
    return evaluation


def _check_curves(result: dict[str, Any]) -> None:
    """Refuses parts of a result that cannot be drawn. Raises: KeyError, TypeError, ValueError."""
    if curve := result.get("loss_by_position"):
        places, losses = (np.asarray(curve[name], float) for name in ("position", "loss"))
        if places.ndim != 1 or places.shape != losses.shape or not len(places) or not 0 <= places.min():
            raise ValueError(places.shape)
    for part in result.get("depth") or ():
        _ = [float(part[name]) for name in ("from", "to", "contains")]
    for part in result.get("distance") or ():
        _ = [float(part[name]) for name in ("from", "to", "examples")], float(part["contains"] or 0)


def scale_of(result: dict[str, Any]) -> dict[str, Any]:
    """Returns {"extent", "label"} of a length, a context, a [height, width] or a [frames, height, width]."""
    tokens = result.get("length", result.get("context"))
    sides = (int(tokens),) if tokens is not None else tuple(int(side) for side in result["size"])
    if tokens is None and len(sides) not in (2, 3):
        raise ValueError(sides)
    if not 1 <= min(sides) <= max(sides) < 2**32:
        raise ValueError(sides)
    extent = sides[0] if len(sides) == 1 else math.prod(sides) ** (1 / len(sides))
    return {"extent": extent, "label": size_label(sides)}


def read_similarity(folder: AnyPath) -> dict[str, np.ndarray] | None:
    """Returns pivots, positions and their cosines; None where there are none. Raises: InputError."""
    arrays = _arrays(folder / "similarity.npz", pivots=2, positions=2, cosine=2)
    if arrays and not np.isfinite(arrays["cosine"]).all():
        return None  # the vectors of a model that has come to nothing
    if arrays and arrays["cosine"].shape != (len(arrays["pivots"]), len(arrays["positions"])):
        raise InputError(f"{folder / 'similarity.npz'}: cosine is not [pivots, positions]: evaluate the run again")
    return arrays


def read_attention(folder: AnyPath) -> dict[str, np.ndarray] | None:
    """Returns images and where they were looked at; None where there are none. Raises: InputError."""
    return _arrays(folder / "attention.npz", images=4, attention=4)


def _arrays(path: AnyPath, **axes: int) -> dict[str, np.ndarray] | None:
    """Reads arrays that have at least so many axes each."""
    if not path.exists():
        return None
    try:
        found = read_arrays(io.BytesIO(path.read_bytes()), LARGEST_DRAWN)
        arrays = {name: found[name] for name in axes}
        if any(arrays[name].ndim < count or arrays[name].dtype.kind not in "iuf" for name, count in axes.items()):
            raise ValueError({name: value.shape for name, value in arrays.items()})
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{path} is not an archive of {', '.join(axes)} ({error}): evaluate the run again") from error
    return arrays


def config_of(value: Any, where: str) -> dict[str, Any]:
    """A config that can be shown, with the names of today (`config.apply_renames`). Raises: InputError."""
    data = _checked(value, where, CONFIG, IF_THERE)["data"]
    try:
        scale_of({"size": data["size"]} if data.get("size") else data)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where}: its data.size or data.length is none: it is not as this package writes it"
        ) from error
    try:
        return apply_renames(value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def object_of(text: bytes, where: str, fields: Fields = NONE, others: Fields = NONE) -> Any:
    """Parses a JSON object that must have some fields, given by dotted names, and may have others."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error})") from error
    return _checked(value, where, fields, others)


def _checked(value: Any, where: str, fields: Fields, others: Fields) -> Any:
    for name, kind in (fields | others).items():
        found = field(value, name)
        if found is None and name in others:
            continue
        if not isinstance(found, kind) or isinstance(found, bool) or type(found) is int and abs(found) >= 2**63:
            what = kind.__name__ if isinstance(kind, type) else "number"
            raise InputError(f"{where} has no {what} '{name}': it is not as this package writes it")
    return value
