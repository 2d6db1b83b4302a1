"""Times training steps, evaluation or decoding; several encodings take turns in one run.

    python -m seqpe_jax.benchmark --config=configs/stdlib_lm.py --compare=seqpe,rotary,rotary_partial,alibi
    python -m seqpe_jax.benchmark --config=configs/stdlib_lm.py --compare=seqpe,rotary --mode=decode --output=decode.json

Modes: train (a step), eval (a batch; the position table is computed before), decode (a new token of each sample), encode
(forward and backward pass of SeqPE's encoder on the positions of a step, against each string of digits by itself).
Prints the median, 10th and 90th percentile of a step (of a batch; of one new token), the rate, MFU (model FLOPs over the
device's peak, with half of causal attention and with all of it; see `models.build.model_flops`), the shortest time that the
program could take on these devices (its roofline) and the share of it that is reached, the memory of the compiled program,
and the time of the position encoding alone as a share; of a training step also the attention kernel. --compare names variants of the config file, each in the form that
it is trained in; of the --config.FIELD options each takes those that it reads. Ratios are of the first to each other one:
medians over turns.
"""

import dataclasses
import json

from absl import flags

from seqpe_jax import config
from seqpe_jax.cli import common, config_flags
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_write
from seqpe_jax.trees import flatten_dict

config_flags.define_config()
_COMPARE = flags.DEFINE_list(
    "compare", [], "variants of the config file that take turns, e.g. seqpe,rotary (default: its own)"
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "decode", "encode"], "what to time")
_STEPS = flags.DEFINE_integer("steps", 20, "timed calls of each", lower_bound=1, upper_bound=10**6)
_OUTPUT = common.define_path("output", "JSON file to write", writes="file")


def main() -> None:
    """The command."""
    from seqpe_jax.distributed import processes
    from seqpe_jax.distributed.progress import ProgressLine
    from seqpe_jax.profiling.benchmark import benchmark

    processes.enable_compilation_cache()
    if _COMPARE.value:
        settings = _compared(_COMPARE.value)
    else:
        one = config_flags.read_config()
        settings = {one.encoding.name: one}
    if _MODE.value == "encode":
        [name, one] = next(iter(settings.items()))
        by_itself = dataclasses.replace(one, encoding=dataclasses.replace(one.encoding, share_prefixes=False))
        settings[f"{name}, each string by itself"] = by_itself
    line = ProgressLine(1, label=_MODE.value)
    found = benchmark(settings, _MODE.value, _STEPS.value, lambda done, total: line.update(done, total=total))
    line.close()
    print(table(found))
    if _OUTPUT.value and processes.is_main_process():
        path = as_path(_OUTPUT.value)
        atomic_write(path, json.dumps(found, indent=1) + "\n")
        print(f"written: {path}")


def _compared(names: list[str]) -> dict[str, config.Config]:
    """Returns the configs of variants of the config file. Raises: InputError: names or options that do not fit together."""
    if len(set(names)) < len(names):
        raise InputError(f"--compare names an encoding twice: {','.join(names)}")
    path = config_flags.config_path()
    page, variant = config.split_folder(path)
    if not page:
        page, _, variant = path.partition(":")
    overrides = config_flags.config_overrides()
    if variant or "encoding.kind" in overrides:
        chosen = f"'{variant}'" if variant else "--config.encoding.kind"
        raise InputError(f"--compare names the variants that are timed: give --config={page}, and leave {chosen} out")
    settings = {name: config.load_variant(page, name, overrides) for name in names}
    read = [flatten_dict(config.to_dict(one), ".") for one in settings.values()]
    for field, value in overrides.items():  # of what an encoding does not read its default is left
        if field.startswith(("encoding.", "objective.")) and all(own.get(field) != value for own in read):
            raise InputError(f"--config.{field} is read by none of {', '.join(names)}: leave it out")
    return settings


def table(found: dict) -> str:
    """Returns the runs of a benchmark as a markdown table, and its ratios in a line each."""
    from seqpe_jax.reporting.tables import markdown_of_rows

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f}%"

    rows = [
        [
            run["encoding"],
            f"{1000 * run['median_s']:.2f}",
            f"{1000 * run['p10_s']:.2f} .. {1000 * run['p90_s']:.2f}",
            f"{run['per_second']:,.0f}",
            share(run["mfu"]),
            share(run["mfu_full_attention"]),
            f"{1000 * run['roofline']['seconds']:.2f}",
            share(run["reached"]),
            f"{run['peak_bytes'] / 1e6:,.0f}",
            share(run["encoding_share"]),
        ]
        for run in found["runs"]
    ]
    header = [
        "encoding",
        "median ms",
        "10th .. 90th",
        "per second",
        "MFU",
        "MFU, full attention",
        "bound ms",
        "reached",
        "MB",
        "encoding alone",
    ]
    lines = [
        f"{pair}: time {ratio['time']:.3f}, memory {ratio['memory']:.3f}" for pair, ratio in found["ratios"].items()
    ]
    if any(run["attention"] for run in found["runs"]):
        lines.append("attention: " + ", ".join(f"{run['encoding']} {run['attention']}" for run in found["runs"]))
    bound = found["runs"][0]["roofline"]
    lines.append(
        f"bound: {bound['bound']}, at {bound['peaks']['flops']:.3g} FLOP/s of a device ({bound['peaks']['source']})"
    )
    return f"{found['device']}, {_MODE.value}\n" + markdown_of_rows(header, rows) + "\n".join(lines)


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flag_as_required("config")
    common.run(main)
