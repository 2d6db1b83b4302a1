"""Compiles the training step for a TPU slice, on a machine without one: does it fit, and how fast could it be?

    python -m seqpe_jax.aot --config=configs/stdlib_lm.py --topology=v5e:2x2
    python -m seqpe_jax.aot --config=configs/lm_1b.py --topology=v5p:4x4x4 --config.mesh.fsdp=16 --output=fits.json
    python -m seqpe_jax.aot --config=configs/lm_1b.py --topology=2xv5e:16x16

Needs libtpu (pip install libtpu), no TPU and no data: a text config needs its tokenizer's file or its model.vocabulary.
Prints memory by use, what devices send each other in a step, the step's FLOPs, and its roofline: how long arithmetic,
memory and each link are busy at their peaks, which of them bounds the step, and the MFU and rate that it cannot exceed.
Exit code 0: it fits; 1: it does not, and how many bytes are missing; 2: bad input.
"""

import json
import sys

from absl import flags

from seqpe_jax.cli import common, config_flags
from seqpe_jax.files import as_path, atomic_write

config_flags.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice, GENERATION:SIZES, e.g. v5e:4x4 or v5p:4x4x4; 2xv5e:4x4: two"
)
_OUTPUT = common.define_path("output", "JSON file to write", writes="file")


def main() -> None:
    """The command."""
    import jax

    from seqpe_jax.profiling.aot import compile_step, topology_devices
    from seqpe_jax.training.trainer import Trainer

    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine, or another accelerator, is left alone
    trainer = Trainer.of(config_flags.read_config(), topology_devices(_TOPOLOGY.value), data_available=False)
    print(
        f"seqpe_jax: compiling for {_TOPOLOGY.value}, {trainer.mesh.size} device(s): one to several minutes", flush=True
    )
    found = {"topology": _TOPOLOGY.value} | compile_step(trainer)
    if _OUTPUT.value:
        path = as_path(_OUTPUT.value)
        atomic_write(path, json.dumps(found, indent=1) + "\n")
        print(f"written: {path}")
    print(table(found))
    if short := found["memory"]["shortfall"]:
        print(
            f"does not fit: {short:,} bytes short on each device; split parameters over more devices (mesh.fsdp), take "
            "smaller batches (batch_size, optimizer.accumulate), or keep less for the backward pass (model.remat='full')",
            file=sys.stderr,
        )
        sys.exit(1)


def table(found: dict) -> str:
    """Returns a compiled step's memory and collectives as markdown tables, and the rest in lines."""
    from seqpe_jax.distributed import sharding as layout
    from seqpe_jax.reporting.tables import markdown_of_rows

    memory = found["memory"]
    parts = [name for name in memory if name not in ("total", "hbm", "shortfall")]
    rows = [[name, f"{memory[name] / 2**20:,.1f}", f"{100 * memory[name] / memory['hbm']:.1f}%"] for name in parts]
    rows.append(["total needed", f"{memory['total'] / 2**20:,.1f}", f"{100 * memory['total'] / memory['hbm']:.1f}%"])
    axes = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    read = " or ".join(map(str, sorted(set(found["rows"].values()))))
    lines = [
        f"{found['topology']}: {found['devices']} device(s) ({found['chip']}), {axes}",
        f"{len(found['rows'])} process(es), each of which reads {read} row(s) of a batch",
        markdown_of_rows(["memory of a device", "MiB", f"of {memory['hbm'] / 2**30:.2f} GiB"], rows),
    ]
    if found["collectives"] is not None:
        sent = [[kind, str(one["count"]), f"{one['bytes'] / 2**20:,.2f}"] for kind, one in found["collectives"].items()]
        lines.append(markdown_of_rows(["a step sends", "times", "MiB of a device"], sent or [["nothing", "0", "0"]]))
        lines.append(bound_of(found["roofline"], found["unit"]))
    if found["open_loops"]:
        lines.append(
            f"{found['open_loops']} loop(s) with collectives turn as often as the data ask: counted for one turn"
        )
    if found["whole"]:
        lines.append(layout.describe_unsharded([layout.UnshardedDim(**one) for one in found["whole"]]))
    lines.append(f"a step: {found['flops']:.3e} FLOPs of the model; compiled in {found['compile_seconds']:.0f} s")
    return "\n".join(lines)


def bound_of(roofline: dict, unit: str) -> str:
    """Returns a roofline as a markdown table of busy times by resource, and lines of conclusions."""
    from seqpe_jax.reporting.tables import markdown_of_rows

    def ms(seconds: float | None) -> str:
        return "-" if seconds is None else f"{1000 * seconds:,.3f}"

    def row(name: str, amount: str, seconds: float | None) -> list[str]:
        return [name, amount, ms(seconds), "-" if seconds is None else f"{100 * seconds / roofline['seconds']:.0f}%"]

    rows = [
        row("arithmetic", f"{roofline['flops']:.3e} FLOPs", roofline["arithmetic_s"]),
        row("HBM", f"{roofline['hbm_bytes'] / 2**20:,.0f} MiB", roofline["memory_s"]),
    ]
    for one in roofline["collectives"]:
        name = f"{one['kind']} over {' x '.join(one['axes'])} ({', '.join(one['over']) or 'in a chip'})"
        waits = "" if one["hidden"] else ", the device waits"
        rows.append(row(name + waits, f"{one['received'] / 2**20:,.0f} MiB", one["seconds"]))
    rows.append(row("collectives that nothing hides, in all", "", roofline["exposed_s"]))
    rows += [row(f"link {name}, in all", "", seconds) for name, seconds in roofline["links"].items()]
    lines = [
        markdown_of_rows(["at its peak", "of a device", "ms", "of the bound"], rows),
        f"bound: {roofline['bound']}; a step takes {ms(roofline['seconds'])} ms at least, {roofline['per_second']:,.0f} "
        f"{unit}/s and {100 * roofline['mfu']:.1f}% MFU at most ({100 * roofline['mfu_full_attention']:.1f}% with "
        "full attention counted)",
    ]
    if any(one["seconds"] is None for one in roofline["collectives"]):
        lines.append("what goes over the network, whose rate is not known, is not in the bound")
    if roofline["compiler_s"]:
        lines.append(f"the compiler's own estimate, without collectives and kernels: {ms(roofline['compiler_s'])} ms")
    if roofline["kernels"]:
        lines.append(f"{roofline['kernels']} call(s) of kernels do not say what they compute: their FLOPs are missing")
    if roofline["open_loops"]:
        lines.append(
            f"{roofline['open_loops']} loop(s) that compute turn as often as the data ask: counted for one turn"
        )
    return "\n".join(lines)


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["config", "topology"])
    common.run(main)
