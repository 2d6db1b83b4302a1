"""Writes the model of a run as a folder for serving, which needs JAX alone: no Flax, no encoder, nothing of this package.

    python -m seqpe_jax.export --checkpoint=runs/first --output=exports/first --max-length=4096
    python -m seqpe_jax.export --checkpoint=runs/digits --output=exports/digits --max-size=32 --platforms=cpu,tpu

The folder holds model.stablehlo (any batch, any length or size up to the largest), params.safetensors, config.json, the
tokenizer, and README.md, which shows how to load it. `evaluate --checkpoint` takes it like a run.
"""

import signal
import sys

from absl import flags

from seqpe_jax.cli import common, config_flags
from seqpe_jax.files import as_path, require_empty

_CHECKPOINT = common.define_path("checkpoint", "workdir of a run, or a folder of Hugging Face or the PyTorch reference")
_IGNORE_FIELDS = common.define_ignore_fields()
_WHICH = common.define_checkpoint_choice()
_WEIGHTS = common.define_weights_choice()
_OUTPUT = common.define_path("output", "new or empty folder to write", writes="folder")
_MAX_LENGTH = flags.DEFINE_integer(
    "max-length", None, "text: longest window in tokens (default: the longest that the run's config names)", 1, 2**24
)
_MAX_SIZE = flags.DEFINE_integer(
    "max-size", None, "images: largest side in pixels (default: the largest that the run's config names)", 1, 2**16
)
_PLATFORMS = flags.DEFINE_list("platforms", None, "some of cpu,cuda,tpu (default: all of them)")
common.define_mesh_flags()


def main() -> None:
    """Writes the folder."""
    from seqpe_jax import loading
    from seqpe_jax.distributed import processes
    from seqpe_jax.inference import export
    from seqpe_jax.inference.export import MODEL_CARD_FILE, PLATFORMS

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves the context that removes the unfinished folder
    processes.enable_compilation_cache()
    require_empty(_OUTPUT.value)
    options = config_flags.mesh_overrides(), _IGNORE_FIELDS.value, _WEIGHTS.value or ""
    model = loading.open_folder(_CHECKPOINT.value, _WHICH.value, *options)
    platforms = list(PLATFORMS) if _PLATFORMS.value is None else _PLATFORMS.value
    export.write_export(model, _OUTPUT.value, _MAX_LENGTH.value, _MAX_SIZE.value, platforms)
    print(f"written: {_OUTPUT.value}, see {as_path(_OUTPUT.value) / MODEL_CARD_FILE}")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["checkpoint", "output"])
    common.run(main, reads_checkpoints=True)
