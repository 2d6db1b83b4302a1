"""Converts checkpoints of the PyTorch reference and of Hugging Face into runs, and models into their formats.

python -m seqpe_jax.convert --source=released/text --output=runs/released
python -m seqpe_jax.convert --source=downloads/SmolLM2-135M --output=runs/smollm2
python -m seqpe_jax.convert --source=runs/rotary --output=for_transformers --to=huggingface
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
    ["run", "reference", "huggingface"],
    "run: a folder that train, evaluate and export take; reference: the layout of the PyTorch reference; huggingface: a "
    "folder that transformers.AutoModelForCausalLM opens",
)
_TOKENIZER = common.define_path("tokenizer", "tokenizer.json, for a text model that has none")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "--to=huggingface: dtype of the stored weights (default: float32)",
)
_IGNORE_FIELDS = common.define_ignore_fields()


def main() -> None:
    """Converts the checkpoint, and prints the names of its arrays."""
    from seqpe_jax.distributed import processes
    from seqpe_jax.interop import convert

    processes.enable_compilation_cache()
    to = _TO.value
    for flag, allowed in ((_TOKENIZER, ("run",)), (_DTYPE, ("huggingface",)), (_IGNORE_FIELDS, ("run", "huggingface"))):
        if flag.value and to not in allowed:
            raise InputError(f"--{flag.name} is for --to={' and --to='.join(allowed)}: leave it out")
    if to == "reference":
        report = convert.convert_to_reference(_SOURCE.value, _OUTPUT.value)
    elif to == "huggingface":
        dtype = _DTYPE.value or "float32"
        report = convert.convert_to_huggingface(_SOURCE.value, _OUTPUT.value, dtype, _IGNORE_FIELDS.value)
    else:
        report = convert.convert_to_run(_SOURCE.value, _OUTPUT.value, _TOKENIZER.value or "", _IGNORE_FIELDS.value)
    for ours, theirs in report["mapped"].items():
        left, right = (", ".join(theirs), ours) if to == "run" else (ours, ", ".join(theirs))
        print(f"  {left} -> {right}")
    for name, why in report.get("left_out", {}).items():
        print(f"  {name} left out: {why}")
    print(
        f"{report['encoding']}, {report['parameters']:,} parameters, {len(report['mapped'])} arrays, every source tensor "
        f"used once\nwritten: {_OUTPUT.value}"
    )
    if to == "huggingface":
        print(f"it is a {report['architecture']} of transformers")
    if report.get("text", True) and not report.get("tokenizer", True):
        print("note: the source has no tokenizer; put its tokenizer.json into that folder to read text with it")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["source", "output"])
    common.run(main)
