"""Files of a run's folder that a report shows, checked when they are read."""

import dataclasses
import io
import math
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from seqpe_jax.archives import load_npz
from seqpe_jax.axes import size_label
from seqpe_jax.config import ENCODINGS, apply_renames
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, parse_json
from seqpe_jax.metric_registry import HIGHER_IS_BETTER
from seqpe_jax.run_dir import EVALUATION_FILE

FieldTypes = Mapping[str, Any]  # dotted name -> type of its value

CONFIG_FIELDS: FieldTypes = {"seed": int, "data.length": int, "encoding.kind": str}
OPTIONAL_CONFIG_FIELDS: FieldTypes = {"steps": int, "data.size": list, "data.name": str, "encoding.gate": str}
OPTIONAL_EVALUATION_FIELDS: FieldTypes = {
    "step": int,
    "parameters": int,
    "training_flops": (int, float),
    "split": str,
    "without_context": dict,
    "attention": dict,
    "suites": dict,
}
OPTIONAL_RESULT_FIELDS: FieldTypes = dict.fromkeys(("tokens", "examples", *HIGHER_IS_BETTER), (int, float)) | {
    "targets": int,
    "stride": int,
    "key_tokens": int,
    "loss_by_position": dict,
    "by_length": dict,
    "depth": list,
    "distance": list,
    "by_class": dict,
    "confusion": dict,
}
POSITION_TERMS = ("logit", "kernel", "factor", "gate")  # in position_curves.npz
ANCHORS_ARRAY = "pivots"  # in similarity.npz
MAX_ARRAY_BYTES = 1 << 28  # of the arrays of a plot


def get_field(values: Any, name: str) -> Any:
    """Returns the value of a dotted name in nested dicts, None without it."""
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def read_evaluation(folder: AnyPath) -> dict[str, Any]:
    """Reads evaluation.json.

    Args:
      folder: run folder.

    Returns:
      Its object, {} without the file; each result also has the "extent" and "label" of `size_of`.

    Raises:
      InputError: it is no evaluation.
    """
    path = folder / EVALUATION_FILE
    if not path.exists():
        return {}
    return check_evaluation(parse_object(path.read_bytes(), str(path)), str(path))


def check_evaluation(evaluation: dict[str, Any], source: str) -> dict[str, Any]:
    """Returns an evaluation whose results have the "extent" and "label" of `size_of`.

    Args:
      evaluation: object of evaluation.json.
      source: path for messages.

    Raises:
      InputError: it is no evaluation.
    """
    _check_fields(evaluation, source, {"results": list}, OPTIONAL_EVALUATION_FIELDS)
    for number, result in enumerate([*evaluation["results"], *_probe_results(evaluation, source)], 1):
        try:
            result |= size_of(result)
            _check_fields(result, "", {}, OPTIONAL_RESULT_FIELDS)
            if "context" in result:
                _ = result["targets"], result["stride"], float(result["loss"])
            _check_curves(result)
            if "without_context" in evaluation:
                float(evaluation["without_context"]["contains"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            fault = f"{source} has a result without a length, size or context, or without numbers, result {number}"
            raise InputError(f"{fault}: write it with `evaluate --output`") from error
    _check_attention(evaluation, source)
    return evaluation


def _probe_results(evaluation: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """Returns the results of the probes of `evaluate --suite`. Raises: InputError: they have another form."""
    probes = evaluation.get("suites", {}).get("probes", {})
    lists = list(probes.values()) if isinstance(probes, dict) else [None]
    if not all(isinstance(own, list) and all(isinstance(result, dict) for result in own) for own in lists):
        raise InputError(f"{source}: its suites have no list of results for each probe: evaluate it again")
    return [result for own in lists for result in own]


def _check_attention(evaluation: dict[str, Any], source: str) -> None:
    """Checks the mean distance and entropy of attention, each by layer and head. Raises: InputError."""
    spread = evaluation.get("attention")
    if spread is None:
        return
    try:
        distance, entropy = (np.asarray(spread[name], float) for name in ("distance", "entropy"))
        valid = distance.ndim == 2 and distance.shape == entropy.shape and distance.size > 0
        valid = valid and int(spread.get("tokens", spread.get("patches"))) > 0
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise InputError(
            f"{source}: its attention has no distance and entropy by layer and head: evaluate the run again"
        )


def _check_curves(result: dict[str, Any]) -> None:
    """Checks the parts of a result that are drawn. Raises: KeyError, TypeError, ValueError."""
    if curve := result.get("loss_by_position"):
        positions, losses = (np.asarray(curve[name], float) for name in ("position", "loss"))
        if positions.ndim != 1 or positions.shape != losses.shape or not len(positions) or not 0 <= positions.min():
            raise ValueError(positions.shape)
    if "by_length" in result:
        lengths, percentages = (np.asarray(result["by_length"][name], float) for name in ("length", "accuracy"))
        if lengths.ndim != 1 or lengths.shape != percentages.shape or not len(lengths):
            raise ValueError(lengths.shape)
    if confusion := result.get("confusion"):
        counts = np.asarray(confusion["counts"], float)
        if counts.shape != (len(confusion["classes"]),) * 2 or not counts.size or not counts.min() >= 0:
            raise ValueError(counts.shape)
    for part in result.get("depth") or ():
        _ = [float(part[name]) for name in ("from", "to", "contains")]
    for part in result.get("distance") or ():
        _ = [float(part[name]) for name in ("from", "to", "examples")], float(part["contains"] or 0)


def size_of(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the size of an example.

    Args:
      result: object with a "length" or "context" in tokens, or a "size" [height, width] or [frames, height, width].

    Returns:
      {"extent", "label"}: the length, or the side in pixels of a square or cube of equal volume; and its name in tables.
    """
    tokens = result.get("length", result.get("context"))
    sides = (int(tokens),) if tokens is not None else tuple(int(side) for side in result["size"])
    if tokens is None and len(sides) not in (2, 3):
        raise ValueError(sides)
    if not 1 <= min(sides) <= max(sides) < 2**32:
        raise ValueError(sides)
    extent = sides[0] if len(sides) == 1 else math.prod(sides) ** (1 / len(sides))
    return {"extent": extent, "label": size_label(sides)}


def read_similarity(folder: AnyPath) -> dict[str, np.ndarray] | None:
    """Reads similarity.npz.

    Args:
      folder: run folder.

    Returns:
      {"anchors" int[n, A], "positions" int[m, A], "cosine" float[n, m]}; None without the file, and where cosines are not
      finite (a diverged model).

    Raises:
      InputError: it holds other arrays.
    """
    arrays = _read_npz(folder / "similarity.npz", {ANCHORS_ARRAY: 2, "positions": 2, "cosine": 2})
    if arrays and not np.isfinite(arrays["cosine"]).all():
        return None
    if arrays and arrays["cosine"].shape != (len(arrays[ANCHORS_ARRAY]), len(arrays["positions"])):
        raise InputError(f"{folder / 'similarity.npz'}: cosine is not [anchors, positions]: evaluate the run again")
    return arrays and {"anchors": arrays.pop(ANCHORS_ARRAY), **arrays}


def read_position_curves(folder: AnyPath) -> dict[str, np.ndarray] | None:
    """Reads position_curves.npz.

    Args:
      folder: run folder.

    Returns:
      {"distances" [D] or [rows, columns], and some of `POSITION_TERMS`, each float[layers, heads, *distances.shape]}; None
      without the file.

    Raises:
      InputError: it holds other arrays.
    """
    path = folder / "position_curves.npz"
    arrays = _read_npz(path, {"distances": 1}, dict.fromkeys(POSITION_TERMS, 3))
    if arrays is None:
        return None
    distances = arrays.pop("distances")
    is_axis = distances.size and np.isfinite(distances).all() and distances.min() >= 0
    if distances.ndim == 1:
        is_axis = is_axis and (np.diff(distances) > 0).all() and distances[-1] < 2**32
    shapes = {term.shape[2:] for term in arrays.values()}
    if (
        not is_axis
        or distances.ndim > 2
        or shapes != {distances.shape}
        or not all(term.size for term in arrays.values())
    ):
        raise InputError(f"{path}: the terms are not [layers, heads, distances]: evaluate the run again")
    terms = {name: np.where(np.isfinite(term), term, np.nan) for name, term in arrays.items()}
    return {"distances": distances, **terms}


def read_attention(folder: AnyPath) -> dict[str, np.ndarray] | None:
    """Returns {"images", "attention"} of attention.npz, None without the file. Raises: InputError."""
    return _read_npz(folder / "attention.npz", {"images": 4, "attention": 4})


def _read_npz(
    path: AnyPath, min_axes: dict[str, int], optional: Mapping[str, int] | None = None
) -> dict[str, np.ndarray] | None:
    """Reads arrays with at least so many axes each, the optional ones where they are; None without the file."""
    if not path.exists():
        return None
    try:
        found = load_npz(io.BytesIO(path.read_bytes()), MAX_ARRAY_BYTES)
        min_axes = min_axes | {name: axes for name, axes in (optional or {}).items() if name in found}
        arrays = {name: found[name] for name in min_axes}
        if any(arrays[name].ndim < axes or arrays[name].dtype.kind not in "iuf" for name, axes in min_axes.items()):
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
        names = ", ".join(min_axes)
        raise InputError(f"{path} is not an archive of {names} ({error}): evaluate the run again") from error
    return arrays


def checked_config(value: Any, source: str) -> dict[str, Any]:
    """Returns a config that a report can show, under current names.

    Args:
      value: parsed config.json.
      source: path for messages.

    Raises:
      InputError: fields are missing or of another type.
    """
    data = _check_fields(value, source, CONFIG_FIELDS, OPTIONAL_CONFIG_FIELDS)["data"]
    try:
        size_of({"size": data["size"]} if data.get("size") else data)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{source}: its data.size or data.length is none: it is not as this package writes it"
        ) from error
    try:
        config = apply_renames(value)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    encoding = ENCODINGS.get(config["encoding"]["kind"])
    if encoding is not None:  # configs of older versions have the fields of all encodings
        own = {"kind", *(field.name for field in dataclasses.fields(encoding))}
        config["encoding"] = {name: value for name, value in config["encoding"].items() if name in own}
    return config


def parse_object(
    content: bytes, source: str, fields: FieldTypes | None = None, optional: FieldTypes | None = None
) -> dict[str, Any]:
    """Parses a JSON object and checks the types of its fields.

    Args:
      content: JSON.
      source: path for messages.
      fields: fields that it must have.
      optional: fields that it may have.

    Raises:
      InputError: it is no such object.
    """
    try:
        value = parse_json(content)
    except ValueError as error:
        raise InputError(f"{source} is not JSON ({error})") from error
    return _check_fields(value, source, fields or {}, optional or {})


def _check_fields(value: Any, source: str, fields: FieldTypes, optional: FieldTypes) -> Any:
    for name, kind in {**fields, **optional}.items():
        found = get_field(value, name)
        if found is None and name in optional:
            continue
        if not isinstance(found, kind) or isinstance(found, bool) or type(found) is int and abs(found) >= 2**63:
            expected = kind.__name__ if isinstance(kind, type) else "number"
            raise InputError(f"{source} has no {expected} '{name}': it is not as this package writes it")
    return value
