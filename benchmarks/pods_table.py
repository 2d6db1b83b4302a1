"""Writes the table of docs/pods.md: what the compiled steps of the large recipes need, send and cannot exceed.

python benchmarks/pods_table.py                     writes the table from docs/results/pods.json
python benchmarks/pods_table.py --check             says whether page and rows agree with the stored results; changes nothing
python benchmarks/pods_table.py --compile [ROW...]  compiles rows (default: all that are not stored) and stores them

Compiling needs libtpu and takes minutes for each row, on any Linux machine.
"""

import argparse
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seqpe_jax.files import atomic_write  # noqa: E402

PAGE, STORED = ROOT / "docs" / "pods.md", ROOT / "docs" / "results" / "pods.json"
TABLE = re.compile(r"^\| row \|.*\n(?:\|.*\n)*", re.MULTILINE)
GPT2_VOCABULARY, LLAMA_VOCABULARY = {"model.vocabulary": "50257"}, {"model.vocabulary": "128256"}


class Row(NamedTuple):
    """A step to compile.

    Attributes:
      config: config file, with a variant.
      topology: TPU slice.
      fields: values of config fields.
    """

    config: str
    topology: str
    fields: Mapping[str, str] = {}

    @property
    def arguments(self) -> list[str]:
        """Arguments of the command `aot`."""
        options = [f"--config.{name}={value}" for name, value in self.fields.items()]
        return [f"--config=configs/{self.config}", f"--topology={self.topology}", *options]


ROWS = {
    "lm_1b, v5e:4x4": Row("lm_1b.py", "v5e:4x4", GPT2_VOCABULARY | {"batch_size": "64"}),
    "lm_1b, v5e:16x16": Row("lm_1b.py", "v5e:16x16", GPT2_VOCABULARY),
    "lm_1b, v5p:4x4x4": Row("lm_1b.py", "v5p:4x4x4", GPT2_VOCABULARY),
    "lm_1b, 2xv5e:16x16": Row("lm_1b.py", "2xv5e:16x16", GPT2_VOCABULARY | {"batch_size": "1024"}),
    "llama_1b, v5e:16x16": Row("llama_1b.py", "v5e:16x16", LLAMA_VOCABULARY),
    "llama_1b, v5p:4x4x4": Row("llama_1b.py", "v5p:4x4x4", LLAMA_VOCABULARY),
    "llama_8b, v5e:16x16": Row("llama_8b.py", "v5e:16x16", LLAMA_VOCABULARY),
    "llama_8b, v5p:4x4x4": Row("llama_8b.py", "v5p:4x4x4", LLAMA_VOCABULARY | {"mesh.fsdp": "16"}),
    "lm_8b, v5e:16x16": Row("lm_8b.py", "v5e:16x16", LLAMA_VOCABULARY),
    "lm_8b, v5p:8x8x4": Row("lm_8b.py", "v5p:8x8x4", LLAMA_VOCABULARY),
    "ViT-B/16, v5e:4x4": Row("imagenet_vit.py:b16", "v5e:4x4"),
    "ViT-B/16 for pods, v5e:16x16": Row("imagenet_vit.py:b16_pod", "v5e:16x16"),
}


def compile_row(row: Row) -> dict[str, Any]:
    """Returns what the command `aot` says of a row; its exit code 1, for a step that does not fit, is a result too."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "found.json"
        command = [sys.executable, "-m", "seqpe_jax.aot", *row.arguments, f"--output={output}"]
        done = subprocess.run(command, cwd=ROOT)
        if done.returncode not in (0, 1) or not output.exists():
            raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}")
        found = json.loads(output.read_text())
    stored = {name: found[name] for name in ("mesh", "memory", "collectives", "open_loops", "unit")}
    stored["libtpu"] = importlib.metadata.version("libtpu")
    bound = found["roofline"] and {name: found["roofline"][name] for name in BOUND}
    return {"arguments": row.arguments, **stored, "roofline": bound}


BOUND = (
    "arithmetic_s",
    "memory_s",
    "interconnect_s",
    "exposed_s",
    "bound",
    "seconds",
    "mfu",
    "mfu_full_attention",
    "per_second",
    "collectives",
)


def table(stored: Mapping[str, Any]) -> str:
    """Returns the markdown table of the stored rows, in the order of `ROWS`."""
    head = (
        "row",
        "mesh",
        "parameters + optimizer",
        "temporaries",
        "total of",
        "a device sends",
        "waits",
        "largest all-reduce",
        "bound",
        "MFU",
    )
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * 3 + "---|---:|---:|---|---:|"]
    lines += [f"| {' | '.join(cells(name, stored[name]))} |" for name in ROWS if name in stored]
    return "\n".join(lines) + "\n"


def cells(name: str, found: Mapping[str, Any]) -> list[str]:
    """Returns the cells of a row; MiB of one device."""
    memory, bound = found["memory"], found["roofline"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    total = f"{memory['total'] / 2**20:,.0f} of {memory['hbm'] / 2**20:,.0f}"
    stored = f"{(memory['parameters'] + memory['optimizer']) / 2**20:,.0f}"
    if bound is None:
        return [name, mesh, stored, "-", f"{total}: does not fit", "-", "-", "-", "-", "-"]
    sent = ", ".join(f"{kind} {one['bytes'] / 2**20:,.0f}" for kind, one in found["collectives"].items())
    return [
        name,
        mesh,
        stored,
        f"{memory['temporaries'] / 2**20:,.0f}",
        total,
        sent,
        f"{1000 * bound['exposed_s']:,.1f} ms",
        f"{largest_all_reduce(bound['collectives']) / 2**20:,.2f}",
        f"{bound['bound']}, {1000 * bound['seconds']:,.0f} ms",
        f"{100 * bound['mfu']:.1f}%",
    ]


def largest_all_reduce(collectives: Iterable[Mapping[str, Any]]) -> int:
    """Returns the bytes of the largest all-reduce over fsdp or context for which devices wait."""
    return max(
        (
            one["largest"]
            for one in collectives
            if one["kind"] == "all-reduce" and not one["hidden"] and {"fsdp", "context"} & set(one["axes"])
        ),
        default=0,
    )


def faults(stored: Mapping[str, Any], page: str) -> list[str]:
    """Returns how rows, stored results and page disagree, one line each."""
    found = [f"{name}: stored, but no row" for name in stored if name not in ROWS]
    found += [
        f"{name}: stored from other options, run --compile '{name}'"
        for name, row in ROWS.items()
        if name in stored and stored[name]["arguments"] != row.arguments
    ]
    if TABLE.findall(page) != [table(stored)]:
        found.append(f"{PAGE} differs from {STORED}: run python benchmarks/pods_table.py")
    return found


def main() -> int:
    """Returns the exit code: 1 if `--check` finds a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--compile", nargs="*", metavar="ROW", choices=list(ROWS), help="rows to compile")
    options = parser.parse_args()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if options.check:
        found = faults(stored, PAGE.read_text())
        print("\n".join(found), file=sys.stderr, end="\n" if found else "")
        return bool(found)
    if options.compile is not None:
        for name in options.compile or [name for name in ROWS if name not in stored]:
            stored[name] = compile_row(ROWS[name])
            atomic_write(STORED, json.dumps(stored, indent=1) + "\n")
    PAGE.write_text(TABLE.sub(lambda _: table(stored), PAGE.read_text(), count=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
