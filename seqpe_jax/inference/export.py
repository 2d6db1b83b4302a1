"""A model written as a folder that runs with JAX alone: what is served, and what its card says."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from seqpe_jax import config
from seqpe_jax.checksums import DIGESTS_FILE, write_checksums
from seqpe_jax.config import Config
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_dir, require_empty
from seqpe_jax.inference import exported
from seqpe_jax.models.attention_dispatch import DEFAULT_BLOCK
from seqpe_jax.models.build import Params, Shape
from seqpe_jax.reporting import study, tables
from seqpe_jax.run_dir import EXPORT_SECTION, RunDir
from seqpe_jax.tasks import Task
from seqpe_jax.trees import count


def write(
    model: Any, output: str | os.PathLike, max_length: int | None, max_size: int | None, platforms: Sequence[str]
) -> None:
    """Writes the export of a model.

    Args:
      model: a `seqpe_jax.Model` of a run; output: a new or empty folder.
      max_length, max_size: largest window in tokens, or side in pixels, that is served; None = the largest that the
        config trains on or evaluates.
      platforms: of `serving.exported.PLATFORMS`.

    Raises:
      InputError: an export already, a range that the positions do not reach, an unknown platform, `output` is taken.
    """
    require_empty(output)
    platforms = exported.check_platforms(platforms)
    if model.model_spec.max_grid is not None:
        raise InputError(f"{model.folder} is an export already: give the --workdir of its run")
    eval_size = largest_eval_size(model.config, max_length, max_size)
    results = measured(model.folder, model.task) if model.folder else ""
    max_grid = model.task.grid_of(eval_size)
    line = ProgressLine(1, label="positions")
    params = model.compiled.params_with_table(
        model.params, max_grid, lambda done, total: line.update(done, total=total)
    )
    line.close()
    print(f"lowering for {', '.join(platforms)}", flush=True)
    signature = model.task.export_signature(max_grid)
    function = exported.serialise(
        model.model_spec.with_precomputed_table(max_grid).logits, params, signature, platforms
    )
    section = {
        "step": model.step,
        "reach": max_grid,
        "input": {
            "name": signature.name,
            "dtype": signature.dtype,
            "shape": signature.shape,
            "limits": signature.limits,
        },
        "output": {"name": "logits", "dtype": "float32", "shape": signature.output},
        "platforms": platforms,
        "jax": jax.__version__,
        "digests": DIGESTS_FILE,
    }
    facts, notes = described(model, params, eval_size, platforms), notes_of(model, max_grid, eval_size)
    card = exported.card(as_path(output).resolve().name, facts, signature, notes, results)
    with atomic_dir(output) as folder:
        exported.write_params(folder, params)
        (folder / exported.FUNCTION).write_bytes(function)
        (folder / exported.CARD).write_text(
            card, encoding="utf-8", errors="backslashreplace"
        )  # a name may be any bytes
        model.task.copy_assets(folder)
        written = RunDir(folder)
        written.write_data_spec(model.data_spec)
        written.write_config(config.to_dict(model.config) | {EXPORT_SECTION: section})
        if model.folder and (fingerprints := RunDir(model.folder).fingerprints):
            written.write_fingerprints(fingerprints)
        write_checksums(folder, exclude=(exported.CARD,))  # which people may add to


def described(model: Any, params: Params, eval_size: Shape, platforms: tuple[str, ...]) -> dict[str, str]:
    """Returns the table of the model card."""
    settings, field = model.config, model.task.size_name
    encoding = settings.encoding.name
    if settings.encoding.kind == "learned":
        encoding += ", stretched past its table"
    elif settings.encoding.resize == "interpolate":
        encoding += ", past training between its positions"
    trained, stored = count(model.model_spec.shapes), count(params)
    replaced = f" trained, {stored:,} here: a table of vectors for the encoder" if stored != trained else ""
    return {
        "task": model.task.kind,
        "data": settings.data.name,
        "steps": f"{model.step:,}",
        "encoding": encoding,
        "parameters": f"{trained:,}{replaced}",
        f"training {field}": "x".join(map(str, settings.data.size or (settings.data.length,))),
        f"{field}s served": f"up to {'x'.join(map(str, eval_size))}",
        "arithmetic": settings.precision.compute,
        "platforms": ", ".join(platforms),
        "JAX": f"{jax.__version__} or later",
    }


def notes_of(model: Any, max_grid: Shape, eval_size: Shape) -> list[str]:
    """Returns what the largest arrays take, and whether logits depend on the length of the input, in words."""
    settings, tokens = model.config.model, model.model_spec.prefix + math.prod(max_grid)
    rows = tokens if settings.attention_kind == "reference" else min(tokens, settings.attention_block or DEFAULT_BLOCK)
    words = "all queries" if rows == tokens else f"{rows} queries and keys"
    arrays = {f"attention logits ({words} at a time)": rows * rows * settings.heads}
    if not model.config.is_image:
        arrays["returned logits"] = tokens * model.data_spec.vocabulary
    taken = " and ".join(f"{count * 4 / 2**20:.3g} MiB of {what}" for what, count in arrays.items())
    notes = [f"Memory for each example at {model.task.size_name} {'x'.join(map(str, eval_size))}: {taken}."]
    field = model.config.encoding.window_dependence
    if field and not model.config.is_image:
        notes.append(
            f"Past {model.config.data.length} tokens all logits depend on the length of the input ({field}): pad inputs "
            "of one text to one length."
        )
    return notes


def largest_eval_size(settings: Config, max_length: int | None, max_size: int | None) -> Shape:
    """Returns the largest window, (length,), image, (height, width), or clip, (frames, height, width), that is served.

    None = the largest that the config trains on or evaluates, with the answers that are generated past it.

    Raises:
      InputError: it cannot be.
    """
    if settings.is_image:
        if max_length is not None:
            raise InputError("--max-length is for runs on text, and this one reads images: use --max-size")
        side = max(settings.eval.sizes, default=0)
        size = (max_size,) * 2 if max_size else tuple(max(side, trained) for trained in settings.data.size[-2:])
        frames = tuple(max((trained, *settings.eval.frames)) for trained in settings.data.size[:-2])
        config.check_size(settings, (*frames, *size), "--max-size")
        return *frames, *size
    if max_size is not None:
        raise InputError("--max-size is for runs on images, and this one reads text: use --max-length")
    answer = settings.eval.new_tokens if settings.is_qa and not settings.encoding.window_dependence else 0
    length = max_length or max((settings.data.length, *settings.eval.lengths, *settings.eval.contexts)) + answer
    config.check_positions(settings, length, "--max-length")
    return (length,)


def measured(checkpoint: str, task: Task) -> str:
    """Returns what a run's metrics.jsonl and evaluation.json say, markdown, or "". Raises: InputError: unreadable."""
    found, lines = study.read_run(as_path(checkpoint)), []
    last = {name: (line[name], line["step"]) for line in found.metrics for name in line if name not in ("step", "time")}
    for name in sorted(name for name in last if name == "train/loss" or name.startswith("eval/")):
        lines.append(f"- {name}: {last[name][0]:.4g} (step {last[name][1]:,})\n")
    if found.results:
        shown = [name for name in task.metric_names if all(name in result for result in found.results)]
        rows = [[result["label"], *(tables.number(result[name]) for name in shown)] for result in found.results]
        where = f"{found.evaluation.get('split', 'test')} split, step {found.evaluation.get('step', '?')}"
        lines.append(f"\nOn the {where}:\n\n" + tables.markdown_of_rows([task.size_name, *shown], rows))
    return "".join(lines)
