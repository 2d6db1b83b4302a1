"""Evaluates a checkpoint at any lengths or image sizes, past those of training too.

python -m seqpe_jax.evaluate --checkpoint=runs/first --lengths=64,128,256,512,1024 --output=runs/first/evaluation.json
python -m seqpe_jax.evaluate --checkpoint=runs/digits --sizes=8,12,16,24x32 --output=runs/digits/evaluation.json
"""

import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from absl import flags

from seqpe_jax import command, config
from seqpe_jax.build import saved
from seqpe_jax.errors import InputError
from seqpe_jax.runtime import hosts
from seqpe_jax.runtime.progress import ProgressLine

Scales = tuple[tuple[int, ...], ...]


def run(
    checkpoint: str,
    lengths: Scales = (),
    sizes: Scales = (),
    split: str = "test",
    tokens: int | None = None,
    data: str | None = None,
    paths: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray] | None]]:
    """Returns the evaluation of a run's newest checkpoint, in the form that `--output` stores, and arrays to draw.

    Args:
      checkpoint: a workdir of `train`, or an output of `export`, which is read up to its range.
      lengths: window lengths, each (length,), of a text run; sizes: (height, width) of an image run; none = those of the
        config's eval section, or the training one.
      split: "validation" or "test".
      tokens: read at most that many per length; None = eval.tokens of the config.
      data, paths: another data set than the run's (data.name and data.paths); None = the run's.

    Raises:
      InputError: not a run, no or a damaged checkpoint, a length or size that cannot be evaluated.
    """
    hosts.keep_compiled_programs()
    settings = saved.saved_config(checkpoint)
    if settings.reads_images and (lengths or tokens is not None):
        raise InputError(f"{checkpoint} is a run on images: --lengths and --tokens are for text, use --sizes")
    if sizes and not settings.reads_images:
        raise InputError(f"{checkpoint} is a run on text: --sizes is for images, use --lengths")
    values = config.to_dict(settings)
    if tokens is not None:
        values["eval"]["tokens"] = tokens
    if data is not None:
        values["data"] |= {"name": data, "paths": paths}
    settings = config.from_dict(values)
    for length, *_ in lengths:
        config.check_positions(settings.encoding, length, "evaluation length")
    for size in sizes:
        config.check_size(settings, size, "evaluation size")
    wanted = lengths or sizes
    parts, params, step = saved.open_run(
        checkpoint, settings, lambda run: [run.check_scale(at, split) for at in wanted or run.data.scales()]
    )
    scales, field, results = wanted or parts.data.scales(), parts.data.scale_field, []
    for scale in scales:
        label = f"{field} {'x'.join(map(str, scale))}"
        line = ProgressLine(1, label=label)
        result = parts.evaluate(params, scale, split, lambda done, total, line=line: line.update(done, total=total))
        line.close()
        results.append(result)
        measured = [f"{name} {result[name]:.4g}" for name in parts.data.measured if name in result]
        print(f"{label}: {', '.join(measured)}", flush=True)
    largest = max(scales, key=max)
    report = {
        "checkpoint": str(checkpoint),
        "step": step,
        "task": parts.data.kind,
        "encoding": settings.encoding.kind,
        f"training_{field}": settings.data.length if field == "length" else list(settings.data.size),
        "split": split,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parts.shapes.params)),
        "results": results,
    }
    return report, {
        "similarity": parts.similarity(params, largest),
        "attention": parts.attention(params, largest, split),
    }


_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run, or an export")
_LENGTHS = flags.DEFINE_list("lengths", [], "window lengths, e.g. 512,1024 (default: eval.lengths of the run's config)")
_SIZES = flags.DEFINE_list("sizes", [], "image sizes, e.g. 224,384x512 (default: eval.sizes of the run's config)")
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "which split to read")
_DATA = flags.DEFINE_string("data", None, "read that data set instead of the run's, e.g. text_files (a data.name)")
_PATHS = flags.DEFINE_list("paths", [], "with --data: its data.paths")
_TOKENS = flags.DEFINE_integer("tokens", None, "read at most that many tokens per length (default: eval.tokens)")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; arrays for the report's pictures go beside it")


def scales(items: list[str], flag: str, pattern: str, wanted: str) -> Scales:
    """Returns the numbers of a flag's items. Raises: InputError for an item that the pattern does not fit."""
    for item in items:
        if not re.fullmatch(pattern, item):
            raise InputError(f"{flag} must be {wanted} separated by commas, got '{item}'")
    return tuple(tuple(map(int, item.split("x"))) for item in items)


def main() -> None:
    """The command."""
    lengths = scales(_LENGTHS.value, "--lengths", "0*[1-9][0-9]*", "positive whole numbers")
    sizes = scales(_SIZES.value, "--sizes", "0*[1-9][0-9]*(x0*[1-9][0-9]*)?", "sides in pixels (224) or 384x512")
    sizes = tuple(size * 2 if len(size) == 1 else size for size in sizes)
    if _PATHS.value and not _DATA.value:
        raise InputError("--paths says where --data lies: give both, e.g. --data=text_files --paths=notes.txt")
    report, arrays = run(_CHECKPOINT.value, lengths, sizes, _SPLIT.value, _TOKENS.value, _DATA.value, tuple(_PATHS.value))
    if _OUTPUT.value and hosts.is_lead():
        path = pathlib.Path(_OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, values in arrays.items():
            if values is not None:
                np.savez_compressed(path.parent / f"{name}.npz", **values)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(path)
        print(f"written: {path}")


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    command.run(main)
