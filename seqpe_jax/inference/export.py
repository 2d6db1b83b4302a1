"""Export: a model as a folder that runs with JAX alone, and needs neither this package nor Flax.

The folder holds the logits function as StableHLO, its parameters under flat names (safetensors), a model card, and the run's
config and assets, with which `loading` opens it again. SeqPE's encoder is replaced by a table of its vectors.
"""

import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
import safetensors.numpy

from seqpe_jax import config
from seqpe_jax.checksums import DIGESTS_FILE, write_checksums
from seqpe_jax.config import Config
from seqpe_jax.distributed.progress import ProgressLine
from seqpe_jax.errors import InputError
from seqpe_jax.files import apply_umask, as_path, atomic_dir, is_remote, require_empty
from seqpe_jax.models.attention_dispatch import DEFAULT_BLOCK
from seqpe_jax.models.build import Params, Shape
from seqpe_jax.reporting import study, tables
from seqpe_jax.run_dir import EXPORT_SECTION, RunDir
from seqpe_jax.tasks import Task
from seqpe_jax.tasks.base import ExportSignature
from seqpe_jax.trees import Tree, flatten_dict, num_params, unflatten_dict

PARAMS_FILE = "params.safetensors"
STABLEHLO_FILE = "model.stablehlo"
MODEL_CARD_FILE = "README.md"
PLATFORMS = ("cpu", "cuda", "tpu")


def write_export(
    model: Any, output: str | os.PathLike, max_length: int | None, max_size: int | None, platforms: Sequence[str]
) -> None:
    """Writes the export of a model.

    Args:
      model: a `seqpe_jax.Model` of a run.
      output: a new or empty folder.
      max_length: longest window to serve, tokens; None = the longest that the config trains on or evaluates.
      max_size: largest side of an image to serve, pixels; None = the largest that the config trains on or evaluates.
      platforms: some of `PLATFORMS`.

    Raises:
      InputError: an export already, a range beyond the positions, an unknown platform, or `output` is taken.
    """
    require_empty(output)
    platforms = check_platforms(platforms)
    if model.model_spec.max_grid is not None:
        raise InputError(f"{model.folder} is an export already: give the --workdir of its run")
    eval_size = largest_eval_size(model.config, max_length, max_size)
    results = card_results(model.folder, model.task) if model.folder else ""
    max_grid = model.task.grid_of(eval_size)
    line = ProgressLine(1, label="positions")
    params = model.compiled.params_with_table(
        model.params, max_grid, lambda done, total: line.update(done, total=total)
    )
    line.close()
    print(f"lowering for {', '.join(platforms)}", flush=True)
    signature = model.task.export_signature(max_grid)
    logits = model.model_spec.with_precomputed_table(max_grid).logits
    stablehlo = export_stablehlo(logits, params, signature, platforms)
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
    facts, notes = card_facts(model, params, eval_size, platforms), card_notes(model, max_grid, eval_size)
    card = model_card(as_path(output).resolve().name, facts, signature, notes, results)
    with atomic_dir(output) as folder:
        write_params(folder, params)
        (folder / STABLEHLO_FILE).write_bytes(stablehlo)
        # The name of the folder, the title, may be any bytes.
        (folder / MODEL_CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
        model.task.copy_assets(folder)
        written = RunDir(folder)
        written.write_data_spec(model.data_spec)
        written.write_config(config.to_dict(model.config) | {EXPORT_SECTION: section})
        if model.folder and (fingerprints := RunDir(model.folder).fingerprints):
            written.write_fingerprints(fingerprints)
        write_checksums(folder, exclude=(MODEL_CARD_FILE,))  # which people may add to


def check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    """Returns the platforms without duplicates. Raises: InputError: none, or one that is not in `PLATFORMS`."""
    for platform in platforms or [""]:
        if platform not in PLATFORMS:
            raise InputError(
                f"--platforms: '{platform}' is not one of {', '.join(PLATFORMS)}; give some, e.g. cpu,cuda"
            )
    return tuple(dict.fromkeys(platforms))


def largest_eval_size(settings: Config, max_length: int | None, max_size: int | None) -> Shape:
    """Returns the largest size that an export serves: (length,), (height, width) or (frames, height, width).

    Args:
      settings: config of the run.
      max_length: tokens; None = the longest window that the config trains on or evaluates, with the generated answer.
      max_size: pixels; None = the largest side that the config trains on or evaluates.

    Raises:
      InputError: an option of the other kind of data, or a size beyond the positions.
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
    length = (
        max_length
        or max(map(settings.window_of, (settings.data.length, *settings.eval.lengths, *settings.eval.contexts)))
        + answer
    )
    config.check_positions(settings, length, "--max-length")
    return (length,)


def export_stablehlo(
    function: Callable[[Tree, jax.Array], jax.Array], params: Tree, signature: ExportSignature, platforms: Sequence[str]
) -> bytes:
    """Returns the serialized StableHLO of ({flat name: parameter}, input) -> logits, for `jax.export.deserialize`.

    Args:
      function: a function of nested parameters and the input.
      params: nested parameters, or their shapes and dtypes.
      signature: shape and limits of the input.
      platforms: some of `PLATFORMS`.
    """
    leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flatten_dict(params).items()}
    limits = [f"{letter} <= {limit}" for letter, limit in signature.limits.items()]
    shape = jax.export.symbolic_shape(", ".join(signature.shape), constraints=limits)
    jitted = jax.jit(lambda leaves, inputs: function(_with_empty_dicts(params, unflatten_dict(leaves)), inputs))
    exported = jax.export.export(jitted, platforms=platforms)(leaves, jax.ShapeDtypeStruct(shape, signature.dtype))
    return bytes(exported.serialize())


def write_params(folder: pathlib.Path, params: Tree) -> None:
    """Writes parameters into the folder of an export."""
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(params).items()}
    safetensors.numpy.save_file(leaves, folder / PARAMS_FILE)
    apply_umask(folder / PARAMS_FILE)  # safetensors makes it readable for its owner alone


def read_params(folder: str | os.PathLike, expected: Tree, put: Callable[[np.ndarray, Any], Any]) -> Tree:
    """Returns the parameters of an export in nested dicts; on a disk, one array at a time is in this process's memory.

    Args:
      folder: folder of the export.
      expected: their shapes and dtypes.
      put: (array, its element of `expected`) -> the array as it is returned.

    Raises:
      InputError: the file cannot be read, or holds other parameters.
    """
    path = as_path(folder) / PARAMS_FILE
    try:
        if is_remote(path):
            arrays = safetensors.numpy.load(path.read_bytes())
            names, read = arrays.keys(), arrays.pop
        else:
            file = safetensors.safe_open(path, "numpy")
            names, read = set(file.keys()), file.get_tensor
        wanted, found = flatten_dict(expected), {}
        for name in sorted(wanted.keys() | names):
            array = read(name) if name in names else None
            has, right = _dtype_and_shape(array), _dtype_and_shape(wanted.get(name))
            if has != right:
                raise InputError(f"{path}: {name} is {has}, but config.json asks for {right}: export the run again")
            found[name] = put(array, wanted[name])
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): export the run again") from error
    return _with_empty_dicts(expected, unflatten_dict(found))


def _with_empty_dicts(like: Tree, tree: Tree) -> Tree:
    """A tree with the empty dicts of another, which flat names cannot represent."""
    empty = {name: {} for name, value in like.items() if isinstance(value, dict) and not value}
    return empty | tree


def _dtype_and_shape(leaf: Any) -> str:
    return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}[{', '.join(map(str, leaf.shape))}]"


def model_card(
    title: str, facts: dict[str, str], signature: ExportSignature, notes: Sequence[str], results: str
) -> str:
    """Returns the model card, markdown.

    Args:
      title: heading.
      facts: rows of the table at the top.
      signature: input and output of the function.
      notes: sentences for a list.
      results: markdown for a section of results, or "".
    """
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    ranges = ", ".join(f"{letter} 1 to {limit}" for letter, limit in signature.limits.items())
    listed = "".join(f"- {note}\n" for note in notes)
    section = f"\n## Measured\n{results}" if results else ""
    return f"""# {title}

| | |
| --- | --- |
{table}
## Use
`pip install jax flatbuffers safetensors`; then, in this folder:
```python
import jax, jax.export, numpy, safetensors.numpy
params = safetensors.numpy.load_file("{PARAMS_FILE}")
model = jax.export.deserialize(open("{STABLEHLO_FILE}", "rb").read())
inputs = {signature.example}
logits = jax.jit(model.call)(params, inputs)
```
- `inputs`: {signature.name}, {signature.dtype}[{", ".join(signature.shape)}], any batch, {ranges}:
  {signature.meaning}. Other sizes are refused ("Error refining shapes").
- `logits`: float32[{", ".join(signature.output)}].
{listed}{section}"""


def card_facts(model: Any, params: Params, eval_size: Shape, platforms: tuple[str, ...]) -> dict[str, str]:
    """Returns the rows of the table at the top of the model card."""
    settings, field = model.config, model.task.size_name
    encoding = settings.encoding.name
    if settings.encoding.kind == "learned":
        encoding += ", interpolated past its table"
    elif settings.encoding.resize == "interpolate":
        encoding += ", past training between its positions"
    trained, stored = num_params(model.model_spec.shapes), num_params(params)
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


def card_notes(model: Any, max_grid: Shape, eval_size: Shape) -> list[str]:
    """Returns sentences for the model card: memory of the largest arrays, dependence of logits on the input length."""
    settings, tokens = model.config.model, model.model_spec.prefix_tokens + math.prod(max_grid)
    rows = tokens if settings.attention_kind == "reference" else min(tokens, settings.attention_block or DEFAULT_BLOCK)
    words = "all queries" if rows == tokens else f"{rows} queries and keys"
    arrays = {f"attention logits ({words} at a time)": rows * rows * settings.heads}
    if not model.config.is_image:
        arrays["returned logits"] = tokens * model.data_spec.vocabulary
    taken = " and ".join(f"{count * 4 / 2**20:.3g} MiB of {name}" for name, count in arrays.items())
    notes = [f"Memory for each example at {model.task.size_name} {'x'.join(map(str, eval_size))}: {taken}."]
    field = model.config.encoding.window_dependence
    if field and not model.config.is_image:
        notes.append(
            f"Past {model.config.encoding.one_signal_until(model.config.grid[0])} tokens all logits depend on the length of the input ({field}): pad inputs "
            "of one text to one length."
        )
    return notes


def card_results(checkpoint: str, task: Task) -> str:
    """Returns the results in a run's metrics.jsonl and evaluation.json, markdown, or "". Raises: InputError: unreadable."""
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
