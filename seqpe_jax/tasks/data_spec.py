"""What a model takes from its data, stored with a run: whoever opens the run needs no data."""

import dataclasses
import json
import math
import os

from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_write, parse_json
from seqpe_jax.models.build import DataSpec

SIZES_FILE = "sizes.json"  # of a run's folder
LARGEST = 1 << 24  # of a vocabulary, or classes


def read_data_spec(folder: str | os.PathLike) -> DataSpec | None:
    """Returns the sizes that a run's folder keeps, or None: it is older than the file.

    Raises:
      InputError: the file is damaged.
    """
    path = as_path(folder) / SIZES_FILE
    if not path.exists():
        return None
    try:
        values = parse_json(path.read_text())
        known = DataSpec(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        numbers = (known.vocabulary, known.classes, known.channels)
        if not all(type(number) is int and 0 <= number <= LARGEST for number in numbers):
            raise ValueError(f"sizes are {numbers}")
        for colours in (known.mean, known.std):  # none, or one of each channel; images are divided by the second
            if not isinstance(colours, tuple) or len(colours) not in (0, known.channels):
                raise ValueError(f"{known.channels} channels have {colours}")
            if not all(type(colour) in (int, float) and math.isfinite(colour) for colour in colours):
                raise ValueError(f"means and deviations are {colours}")
        if min(known.std, default=1.0) <= 0:
            raise ValueError(f"deviations are {known.std}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): put back the file that the run wrote, or remove it"
        ) from error
    return known


def write_data_spec(folder: str | os.PathLike, data_spec: DataSpec) -> None:
    """Writes the sizes into a run's folder, whole or not at all."""
    atomic_write(as_path(folder) / SIZES_FILE, json.dumps(dataclasses.asdict(data_spec)) + "\n")
