"""Evaluates a checkpoint at any lengths, past the training length too.

    python -m seqpe_jax.evaluate --checkpoint=runs/first --lengths=64,128,256,512,1024 --output=runs/first/evaluation.json
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from seqpe_jax import build, command, config
from seqpe_jax.errors import InputError
from seqpe_jax.runtime import hosts
from seqpe_jax.runtime.checkpoint import Checkpoints, read_config
from seqpe_jax.runtime.progress import ProgressLine


def run(checkpoint: str, lengths: tuple[int, ...] = (), split: str = "test", tokens: int | None = None) -> dict[str, Any]:
    """Returns the evaluation of a run's newest checkpoint, in the form that `--output` stores.

    Args:
      checkpoint: a workdir of `train`.
      lengths: window lengths; () = eval.lengths of the config, or the training length.
      split: "validation" or "test".
      tokens: read at most that many per length; None = eval.tokens of the config.

    Raises:
      InputError: not a run, no or a damaged checkpoint, a length that cannot be evaluated.
    """
    if not pathlib.Path(checkpoint).is_dir():
        raise InputError(f"no such directory: {checkpoint} (--checkpoint takes a --workdir of `train`)")
    hosts.keep_compiled_programs()
    settings = config.from_dict(read_config(checkpoint))
    if tokens is not None:
        settings = dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, tokens=tokens))
    settings = dataclasses.replace(settings, mesh=config.MeshConfig())
    settings = build.with_kept_tokenizer(settings, checkpoint)
    lengths = lengths or settings.eval.lengths or (settings.data.length,)
    for length in lengths:
        config.check_positions(settings.encoding, length, "evaluation length")
    saved = Checkpoints(checkpoint, create=False)
    parts = build.build(settings)
    parts.check_lengths(lengths, split)
    params, step = saved.restore_params(parts.shapes.params)
    saved.close()
    results = []
    for length in lengths:
        line = ProgressLine(1, label=f"length {length}, window")
        result = parts.evaluate(params, length, split, lambda done, total, line=line: line.update(done, total=total))
        line.close()
        results.append(result)
        print(f"length {length}: loss {result['loss']:.4f}, perplexity {result['perplexity']:.3f}", flush=True)
    return {
        "checkpoint": str(checkpoint),
        "step": step,
        "task": "language_modelling",
        "encoding": settings.encoding.kind,
        "training_length": settings.data.length,
        "split": split,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parts.shapes.params)),
        "results": results,
        "similarity": parts.similarity(params, max(lengths)),
    }


_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir of a run")
_LENGTHS = flags.DEFINE_list("lengths", [], "window lengths, e.g. 512,1024 (default: eval.lengths of the run's config)")
_SPLIT = flags.DEFINE_enum("split", "test", ["validation", "test"], "which split to read")
_TOKENS = flags.DEFINE_integer("tokens", None, "read at most that many tokens per length (default: eval.tokens)")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write; similarity.npz goes beside it")


def main() -> None:
    """The command."""
    lengths = []
    for item in _LENGTHS.value:
        if not item.isdigit() or int(item) < 1:
            raise InputError(f"--lengths must be positive whole numbers separated by commas, got '{item}'")
        lengths.append(int(item))
    report = run(_CHECKPOINT.value, tuple(lengths), _SPLIT.value, _TOKENS.value)
    maps = report.pop("similarity")
    if _OUTPUT.value:
        path = pathlib.Path(_OUTPUT.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        if maps is not None:
            np.savez_compressed(path.parent / "similarity.npz", **maps)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(path)
        print(f"written: {path}")


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    command.run(main)
