"""Checkpoints at s3://: Orbax's own arguments for TensorStore, with the s3 driver.

Orbax 0.12.8 takes a path for TensorStore as gs:// or as one of a disk, and refuses any other ("should be absolute"), whatever
`temporary_path_class` is. All else that it does with a path is epath's, which knows s3://. So this module replaces the one
function that makes the arguments (`build_kvstore_tspec`): those of an s3:// folder are made as for gs://, with the same sizes
of files and reads, and name the other driver.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

from orbax.checkpoint import path as orbax_path

from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath
from seqpe_jax.stores import S3, STORES

MODULE, FUNCTION = "orbax.checkpoint._src.serialization.tensorstore_utils", "build_kvstore_tspec"
SCHEME = S3.scheme


def temporary_path_class(folder: AnyPath) -> Any:
    """Returns the class by which Orbax completes a checkpoint of a folder: None = its default for the folder.

    A bucket has no renames: a file is written last, as on gs://. For s3:// this also makes Orbax able to save at all.

    Args:
      folder: the folder of checkpoints.

    Raises:
      InputError: the installed Orbax cannot save to s3:// in this way.
    """
    if not str(folder).startswith(SCHEME):
        return None
    enable()
    return orbax_path.atomicity.CommitFileTemporaryPath


@functools.cache
def enable() -> None:
    """Lets Orbax read and write arrays at s3://, in this process.

    Raises:
      InputError: the installed Orbax makes TensorStore's arguments in another function.
    """
    try:
        module = importlib.import_module(MODULE)
        original = getattr(module, FUNCTION)
    except (ImportError, AttributeError):
        version = importlib.metadata.version("orbax-checkpoint")
        raise InputError(
            f"checkpoints cannot be saved to s3:// with orbax-checkpoint {version}: install 0.12.8, give gs://BUCKET/NAME, or "
            "mount the bucket (s3fs, mountpoint-s3)"
        ) from None
    setattr(module, FUNCTION, _with_s3(original))


def _with_s3(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(directory: str, *args: Any, **options: Any) -> Any:
        if not directory.startswith(SCHEME):
            return original(directory, *args, **options)
        store = STORES[SCHEME]
        assert isinstance(store, S3)
        return _on_s3(original("gs://" + directory.removeprefix(SCHEME), *args, **options), store.tensorstore_driver())

    return build


def _on_s3(spec: Any, driver: dict[str, Any]) -> Any:
    """TensorStore's arguments with the s3 driver in the place of that of gs://."""
    if not isinstance(spec, dict):
        return spec
    if spec.get("driver") in ("gcs", "gcs_grpc"):
        return spec | driver
    return {name: _on_s3(value, driver) for name, value in spec.items()}
