"""Names the likeliest classes of image files.

    python -m seqpe_jax.predict --checkpoint=runs/digits --images=photo.png
    python -m seqpe_jax.predict --checkpoint=runs/photos --images=new,more/*.jpg --size=320 --top=3 --output=predictions.jsonl

A line for each file: its name, and the classes with their probabilities in percent. The files of folders are found as those
of image folders: at any depth, without hidden ones. --output gets a JSON object for each file: {"file", "top": [[class,
probability], ...]}.
"""

import json

from absl import flags

from seqpe_jax.cli import common, config_flags
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_write

_CHECKPOINT = common.define_path(
    "checkpoint", "workdir of a run on images, an export, or a folder of a Hugging Face vision transformer"
)
_WHICH = common.define_checkpoint_choice()
_IMAGES = flags.DEFINE_list("images", None, "image files, folders or globs, e.g. photo.jpg,holidays")
_SIZE = flags.DEFINE_string(
    "size", None, "size that images are read at, e.g. 224 or 384x512 (default: that of training)"
)
_TOP = flags.DEFINE_integer("top", 5, "number of classes", lower_bound=1)
_IGNORE_FIELDS = common.define_ignore_fields()
_OUTPUT = common.define_path("output", "file to write, one JSON object per image and line", writes="file")
common.define_mesh_flags()


def image_files(paths: list[str]) -> list[str]:
    """Returns the image files that paths lead to, sorted, after a look at each.

    Args:
      paths: files, folders and globs.

    Raises:
      InputError: there is none, a path leads to none, or a file is no image or damaged.
    """
    from seqpe_jax.data.datasets.image_folder import SUFFIXES, check_images
    from seqpe_jax.data.paths import resolve_paths, warn

    if not paths:
        raise InputError("there is no image: name files or folders, as in --images=photo.jpg,holidays")
    found = resolve_paths(paths, suffixes=SUFFIXES)
    if found.unmatched:
        raise InputError(f"--images: there is no image (png, jpg, tif, gif, ...) at '{found.unmatched[0]}'")
    if str(found.skipped):
        warn(f"--images: skipped: {found.skipped}")
    check_images(found.files)
    return found.files


def main() -> None:
    """Prints the classes of each image."""
    from seqpe_jax import loading
    from seqpe_jax.distributed import processes

    processes.enable_compilation_cache()
    files = image_files(_IMAGES.value)
    size = None
    if _SIZE.value:
        pattern = f"0*{common.NUMBER}(x0*{common.NUMBER})?"
        ((height, *rest),) = common.parse_sizes([_SIZE.value], "--size", pattern, "a side in pixels, 224 or 384x512,")
        size = (height, *rest) if rest else height
    model = loading.open_folder(_CHECKPOINT.value, _WHICH.value, config_flags.mesh_overrides(), _IGNORE_FIELDS.value)
    results = model.predict(files, size, top=_TOP.value)
    for result in results:
        classes = ", ".join(f"{name} {100 * probability:.3g}%" for name, probability in result["top"])
        print(f"{result['file']}: {classes}")
    if _OUTPUT.value:
        atomic_write(as_path(_OUTPUT.value), "".join(json.dumps(result) + "\n" for result in results))
        print(f"written: {_OUTPUT.value}")


def run_command() -> None:
    """Runs the command with the arguments of the process, and exits with its code on an error."""
    flags.mark_flags_as_required(["checkpoint", "images"])
    common.run(main)
