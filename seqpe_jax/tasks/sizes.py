"""What a model takes from its data, stored with a run: whoever opens the run needs no data."""

import dataclasses
import json
import os

from seqpe_jax.architecture import Sizes
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, write_whole

FILE = "sizes.json"  # of a run's folder


def read_sizes(folder: str | os.PathLike) -> Sizes | None:
    """Returns the sizes that a run's folder keeps, or None: it is older than the file.

    Raises:
      InputError: the file is damaged.
    """
    path = as_path(folder) / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        known = Sizes(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        numbers = (known.vocabulary, known.classes, known.channels)
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"sizes are {numbers}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}): put back the file that the run wrote, or remove it") from error
    return known


def write_sizes(folder: str | os.PathLike, sizes: Sizes) -> None:
    """Writes the sizes into a run's folder, whole or not at all."""
    write_whole(as_path(folder) / FILE, json.dumps(dataclasses.asdict(sizes)) + "\n")
