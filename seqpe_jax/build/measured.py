"""A run's folder, evaluated: what `evaluate` reports and what `report` draws."""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from seqpe_jax import config
from seqpe_jax.build import saved
from seqpe_jax.errors import InputError
from seqpe_jax.evaluation.answers import write_answers
from seqpe_jax.runtime import hosts
from seqpe_jax.runtime.progress import ProgressLine

Scales = tuple[tuple[int, ...], ...]


def measure(
    checkpoint: str,
    lengths: Scales = (),
    sizes: Scales = (),
    split: str = "test",
    tokens: int | None = None,
    examples: int | None = None,
    data: str | None = None,
    paths: tuple[str, ...] = (),
    lossy: bool = False,
) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray] | None]]:
    """Returns the evaluation of a run's newest checkpoint, in the form that `--output` stores, and arrays to draw.

    Args:
      checkpoint: a workdir of `train`, or an output of `export`, which is read up to its range.
      lengths: window lengths, each (length,), of a text run; sizes: (height, width) of an image run; none = those of the
        config's eval section, or the training one.
      split: "validation" or "test".
      tokens, examples: read at most that many tokens, ask at most that many questions, per length; None = eval.tokens and
        eval.examples of the config.
      data, paths: another data set than the run's (data.name and data.paths); None = the run's.
      lossy: text that does not come back from its tokens is accepted, whatever the config says.

    Returns:
      The results of a run on questions hold their "answers" too, (records, hypotheses).

    Raises:
      InputError: not a run, no or a damaged checkpoint, a length or size that cannot be evaluated.
    """
    hosts.keep_compiled_programs()
    settings = saved.saved_config(checkpoint)
    if settings.reads_images and (lengths or tokens is not None or examples is not None):
        raise InputError(f"{checkpoint} is a run on images: --lengths, --tokens and --examples are for text, use --sizes")
    if sizes and not settings.reads_images:
        raise InputError(f"{checkpoint} is a run on text: --sizes is for images, use --lengths")
    values = config.to_dict(settings)
    values["eval"] |= {name: limit for name, limit in (("tokens", tokens), ("examples", examples)) if limit is not None}
    if data is not None:
        values["data"] |= {"name": data, "paths": paths, "prompt_weight": 0.0, "question_weight": 0.0}
    values["data"]["lossy_tokenizer"] |= lossy
    settings = config.from_dict(values)
    for length, *_ in lengths:
        config.check_positions(settings, length, "evaluation length")
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
        if hosts.is_lead():
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
        **({"without_context": parts.data.without_context(split)} if settings.asks_questions else {}),
    }
    return report, {
        "similarity": parts.similarity(params, largest),
        "attention": parts.attention(params, largest, split),
    }


def write(
    report: dict[str, Any], arrays: dict[str, dict[str, np.ndarray] | None], path: pathlib.Path
) -> list[pathlib.Path]:
    """Writes what `measure` returned: the report as JSON, arrays and answers beside it; returns the files, the report last.

    Raises:
      InputError: answers cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for result in report["results"]:
        if "answers" in result:
            files.append(write_answers(path.parent / f"answers_{result['length']}.jsonl", *result["answers"]))
    for name, values in arrays.items():
        if values is not None:
            np.savez_compressed(path.parent / f"{name}.npz", **values)
    results = [{name: value for name, value in result.items() if name != "answers"} for result in report["results"]]
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")
    part.replace(path)
    return [*files, path]
