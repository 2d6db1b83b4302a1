"""Converts checkpoints of the PyTorch reference (text, images) and Hugging Face GPT-2 into runs, and runs back.

python -m seqpe_jax.convert --source=released/text --output=runs/released
python -m seqpe_jax.convert --source=runs/first --output=for_the_authors --to=reference
"""

from absl import flags

from seqpe_jax.cli import common
from seqpe_jax.errors import InputError

_SOURCE = common.define_path("source", "a folder or .pth file of the reference or of Hugging Face; or a run")
_OUTPUT = common.define_path("output", "folder to write; must be new or empty", writes="folder")
_TO = flags.DEFINE_enum(
    "to",
    "run",
    ["run", "reference"],
    "run: a folder that train, evaluate and export take; reference: the layout of the PyTorch reference",
)
_TOKENIZER = common.define_path("tokenizer", "tokenizer.json, for a text model that has none")


def main() -> None:
    """Converts the checkpoint, and prints the names of its arrays."""
    from seqpe_jax.distributed import processes
    from seqpe_jax.interop import convert

    processes.enable_compilation_cache()
    to_reference = _TO.value == "reference"
    if to_reference and _TOKENIZER.value:
        raise InputError("--tokenizer is for --to=run: a run has its own tokenizer")
    if to_reference:
        report = convert.convert_to_reference(_SOURCE.value, _OUTPUT.value)
    else:
        report = convert.convert_to_run(_SOURCE.value, _OUTPUT.value, _TOKENIZER.value or "")
    for ours, theirs in report["mapped"].items():
        left, right = (ours, ", ".join(theirs)) if to_reference else (", ".join(theirs), ours)
        print(f"  {left} -> {right}")
    for name, why in report.get("left_out", {}).items():
        print(f"  {name} left out: {why}")
    print(
        f"{report['encoding']}, {report['parameters']:,} parameters, {len(report['mapped'])} arrays, every source tensor "
        f"used once\nwritten: {_OUTPUT.value}"
    )
    if not to_reference and report["tokenizer"] is None and report["text"]:
        print("note: the source has no tokenizer; put its tokenizer.json into that folder to read text with it")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["source", "output"])
    common.run(main)
