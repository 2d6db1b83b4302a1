"""Writes a run's model as a folder for serving, which runs with JAX alone: no Flax, no encoder, nothing of this package.

    python -m seqpe_jax.export --checkpoint=runs/first --output=exports/first --max-length=4096
    python -m seqpe_jax.export --checkpoint=runs/digits --output=exports/digits --max-size=32 --platforms=cpu,tpu

The folder holds model.stablehlo (any batch, any length or size up to the largest), params.safetensors, config.json, the
tokenizer, and README.md, which says how to load it. `evaluate --checkpoint` takes it like a run.
"""

import math
import pathlib
import signal
import sys

import jax
from absl import flags

from seqpe_jax import command, config, serving
from seqpe_jax.build import Images, Params, Run, Text, saved
from seqpe_jax.config import Config
from seqpe_jax.errors import InputError
from seqpe_jax.evaluation import runs, tables
from seqpe_jax.runtime import hosts
from seqpe_jax.runtime.checkpoint import read_config, write_config
from seqpe_jax.runtime.progress import ProgressLine


def run(checkpoint: str, output: str, max_length: int | None, max_size: int | None, platforms: list[str]) -> None:
    """Writes the export of a run's newest checkpoint.

    Args:
      checkpoint: a workdir of `train`; output: a new or empty folder.
      max_length, max_size: largest window in tokens, or side in pixels, that is served; None = the largest that the
        config trains on or evaluates.
      platforms: of `serving.PLATFORMS`.

    Raises:
      InputError: not a run, no or a damaged checkpoint, a range that the positions do not reach, `output` is taken.
    """
    hosts.keep_compiled_programs()
    serving.check_output(output)
    platforms = serving.check_platforms(platforms)
    settings = saved.saved_config(checkpoint)
    if saved.export_section(checkpoint) is not None:
        raise InputError(f"{checkpoint} is an export already: give the --workdir of its run")
    scale = largest_scale(settings, max_length, max_size)
    trained, params, step = saved.open_run(checkpoint, settings)
    results, reach = measured(checkpoint, trained.data), trained.data.grid_of(scale)
    line = ProgressLine(1, label="positions")
    params = trained.stored_params(params, reach, lambda done, total: line.update(done, total=total))
    line.close()
    served = trained.stored(reach)
    print(f"lowering for {', '.join(platforms)}", flush=True)
    signature = trained.data.served(reach)
    function = serving.serialise(served.logits, params, signature, platforms)
    section = {
        "step": step,
        "reach": reach,
        "input": {"name": signature.name, "dtype": signature.dtype, "shape": signature.shape, "limits": signature.limits},
        "output": {"name": "logits", "dtype": "float32", "shape": signature.output},
        "platforms": platforms,
        "jax": jax.__version__,
    }
    facts = described(served, params, scale, step, platforms)
    card = serving.card(pathlib.Path(output).resolve().name, facts, signature, memory(served, scale), results)
    with serving.new_folder(output) as folder:
        serving.write_params(folder, params)
        (folder / serving.FUNCTION).write_bytes(function)
        (folder / serving.CARD).write_text(card, encoding="utf-8", errors="backslashreplace")  # a name may be any bytes
        trained.data.keep(folder)
        write_config(folder, read_config(checkpoint) | {serving.SECTION: section})


def described(served: Run, params: Params, scale: tuple[int, ...], step: int, platforms: tuple[str, ...]) -> dict[str, str]:
    """Returns the table of the model card."""
    settings, field = served.config, served.data.scale_field
    encoding = settings.encoding.kind
    if encoding == "learned":
        encoding += ", stretched past its table"
    elif settings.encoding.resize == "stretch":
        encoding += ", past training between its positions"
    count, stored = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (served.shapes.params, params))
    replaced = f" trained, {stored:,} here: a table of vectors for the encoder" if stored != count else ""
    return {
        "task": served.data.kind,
        "data": settings.data.name,
        "steps": f"{step:,}",
        "encoding": encoding,
        "parameters": f"{count:,}{replaced}",
        f"training {field}": "x".join(map(str, settings.data.size or (settings.data.length,))),
        f"{field}s served": f"up to {'x'.join(map(str, scale))}",
        "arithmetic": settings.precision.compute,
        "platforms": ", ".join(platforms),
        "JAX": f"{jax.__version__} or later",
    }


def memory(served: Run, scale: tuple[int, ...]) -> list[str]:
    """Returns what the largest arrays take, in words."""
    model, tokens = served.objective.model, served.data.prefix + math.prod(served.reach)
    rows = served.served_block(tokens)
    words = "all queries" if rows == tokens else f"{rows} queries and keys"
    arrays = {f"attention logits ({words} at a time)": rows * rows * model.heads}
    if not served.config.reads_images:
        arrays["returned logits"] = tokens * served.data.model_fields["vocabulary"]
    taken = " and ".join(f"{count * 4 / 2**20:.3g} MiB of {what}" for what, count in arrays.items())
    return [f"Memory for each example at {served.data.scale_field} {'x'.join(map(str, scale))}: {taken}."]


def largest_scale(settings: Config, max_length: int | None, max_size: int | None) -> tuple[int, ...]:
    """Returns the largest window, (length,), or image, (height, width), that is served. Raises: InputError: cannot be."""
    if settings.reads_images:
        if max_length is not None:
            raise InputError("--max-length is for runs on text, and this one reads images: use --max-size")
        side = max(settings.eval.sizes, default=0)
        size = (max_size,) * 2 if max_size else tuple(max(side, trained) for trained in settings.data.size[-2:])
        config.check_size(settings, size, "--max-size")
        return size
    if max_size is not None:
        raise InputError("--max-size is for runs on images, and this one reads text: use --max-length")
    length = max_length or max((settings.data.length, *settings.eval.lengths))
    config.check_positions(settings, length, "--max-length")
    return (length,)


def measured(checkpoint: str, data: Text | Images) -> str:
    """Returns what a run's metrics.jsonl and evaluation.json say, markdown, or "". Raises: InputError: unreadable."""
    found, lines = runs.read_run(pathlib.Path(checkpoint)), []
    last = {name: (line[name], line["step"]) for line in found.metrics for name in line if name not in ("step", "time")}
    for name in sorted(name for name in last if name == "train/loss" or name.startswith("eval/")):
        lines.append(f"- {name}: {last[name][0]:.4g} (step {last[name][1]:,})\n")
    if found.results:
        shown = [name for name in data.measured if all(name in result for result in found.results)]
        rows = [[result["label"], *(tables.number(result[name]) for name in shown)] for result in found.results]
        where = f"{found.evaluation.get('split', 'test')} split, step {found.evaluation.get('step', '?')}"
        lines.append(f"\nOn the {where}:\n\n" + tables.markdown_of([data.scale_field, *shown], rows))
    return "".join(lines)


_CHECKPOINT = command.define_path("checkpoint", "workdir of a run")
_OUTPUT = command.define_path("output", "new or empty folder to write", writes="folder")
_MAX_LENGTH = flags.DEFINE_integer(
    "max-length", None, "text: longest window in tokens (default: the longest that the run's config names)", lower_bound=1
)
_MAX_SIZE = flags.DEFINE_integer(
    "max-size", None, "images: largest side in pixels (default: the largest that the run's config names)", lower_bound=1
)
_PLATFORMS = flags.DEFINE_list("platforms", list(serving.PLATFORMS), f"some of {','.join(serving.PLATFORMS)}")


def main() -> None:
    """The command."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the unfinished folder goes as the stack unwinds
    run(_CHECKPOINT.value, _OUTPUT.value, _MAX_LENGTH.value, _MAX_SIZE.value, _PLATFORMS.value)
    print(f"written: {_OUTPUT.value}, see {pathlib.Path(_OUTPUT.value) / serving.CARD}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "output"])
    command.run(main)
