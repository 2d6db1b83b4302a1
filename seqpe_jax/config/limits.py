"""Limits of config fields: ranges of numbers, stored in the metadata of each field, and their messages.

A range has `low` and `high`, which belong to it, and `below`, which does not. `zero`: 0 is allowed too, and means "off".
`once`: older versions allowed 0, so a stored run with it opens, but no new run may have it. The ends are far beyond common
values, and short of what overflows, takes all memory or never ends.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from seqpe_jax.errors import InputError, format_value

# Size of numbers in float32, the type of all arithmetic: smaller ones are denormal, larger ones may overflow.
SMALLEST = 2.0**-126
LARGEST = 2.0**127

FRACTION = {"low": 0.0, "high": 1.0}
DROP_RATE = {"low": 0.0, "below": 1.0}
WEIGHT = {"low": 0.0, "high": 1e6}  # of a loss; factors too
OPTIONAL_FACTOR = {"zero": True, "low": 1e-6, "high": 1e6}
STD = {"low": 0.0, "high": 1e3}
EPSILON = {"low": 1e-12, "high": 0.1, "once": True}  # added to a variance
NUM_STEPS = {"low": 1, "high": 10**9}
OPTIONAL_STEPS = {"low": 0, "high": 10**9}
BATCH = {"low": 1, "high": 2**20}
LENGTH = {"low": 1, "high": 2**24}  # in tokens
OPTIONAL_LENGTH = {"low": 0, "high": 2**24}
UNITS = {"low": 0, "high": 2**30}  # counts of positions, examples or tokens
IMAGE_SIZE = {"low": 1, "high": 2**16}  # in pixels
LAYERS = {"low": 1, "high": 1024}
HEADS = {"low": 1, "high": 4096}
REGISTERS = {"low": 0, "high": 256}
OPTIONAL_HEADS = {"low": 0, "high": 4096}
WIDTH = {"low": 1, "high": 2**16}
OPTIONAL_WIDTH = {"low": 0, "high": 2**20}
DEVICES = {"low": 1, "high": 2**20}
KERNEL_BLOCK = {"low": 0, "high": 2**13}  # queries or keys

# Precision of products of float32 arrays, as `jax.default_matmul_precision` names it. TPU: 1, 3 or 6 bfloat16 passes;
# NVIDIA GPU: TF32, TF32 or float32; CPU: float32.
MatmulPrecision = Literal["default", "high", "highest"]


def field(default: Any, doc: str = "", **metadata: Any) -> Any:
    """Returns a field of a config section.

    Args:
      default: value where no config sets the field.
      doc: its meaning in one line, with the unit; `--help` and the documentation show it.
      **metadata: the limits of its numbers; `of`: kinds of data whose runs read it; `path`: it is a path, or several;
        `choices`: function that returns the allowed values.
    """
    return dataclasses.field(default=default, metadata=metadata | {"doc": doc})


def section(kind: type, **metadata: Any) -> Any:
    """Returns a field that holds a section of fields.

    Args:
      kind: class of the section.
      **metadata: `of`, as for `field`.
    """
    return dataclasses.field(default_factory=kind, metadata=metadata)


@functools.cache
def fields_of(section: type) -> Mapping[str, dataclasses.Field]:
    """Returns the fields of a section by name; a sweep asks for them a hundred thousand times."""
    return {field.name: field for field in dataclasses.fields(section)}


def check_range(value: Any, limits: Mapping[str, Any], name: str, new: bool = True) -> None:
    """Refuses a number outside of the limits of a field, alone or as an item of a tuple.

    Args:
      value: value of the field.
      limits: metadata of the field.
      name: dotted name of the field.
      new: the value is for a new run, not a stored one.

    Raises:
      InputError: names the field, the range and the number.
    """
    for item in value if isinstance(value, tuple) else (value,):
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
        if is_number and not within(item, limits, new):
            raise InputError(f"config field '{name}' must be {format_range(limits)}, got {format_value(value)}")
        if isinstance(item, float) and item and not SMALLEST <= abs(item) <= LARGEST:
            raise InputError(
                f"config field '{name}' must be 0 or from {SMALLEST:.1e} to {LARGEST:.1e} in size, as float32 holds it, "
                f"got {format_value(value)}"
            )


def within(value: float, limits: Mapping[str, Any], new: bool = True) -> bool:
    """Returns whether a number is within limits; new: it is for a new run, not a stored one."""
    if value == 0 and (limits.get("zero") or limits.get("once") and not new):
        return True
    low, high, below = (limits.get(name) for name in ("low", "high", "below"))
    return (low is None or value >= low) and (high is None or value <= high) and (below is None or value < below)


def format_range(limits: Mapping[str, Any]) -> str:
    """Returns a range in words, such as "at least 1 and at most 64" or "0, or at least 1e-06"."""
    ends = {"low": "at least", "high": "at most", "below": "below"}
    words = [f"{bound} {_short(limits[name])}" for name, bound in ends.items() if limits.get(name) is not None]
    return "0, or " * bool(limits.get("zero")) + " and ".join(words)


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
