"""Ranges of fields, kept in their metadata: what a value may be, and how a value outside is told.

`low` and `high` belong to the range, `below` does not; `zero`: 0 may stand beside it, and means "off"; `once`: 0 was taken
by older versions, so that a run which holds it opens, and no new one begins with it.
The ends are far beyond what anybody trains, and short of what overflows, takes all memory or never ends.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from seqpe_jax.errors import InputError

SMALLEST, LARGEST = 2.0**-126, 2.0**127  # numbers below and above are none in float32, in which everything is computed

Fraction = {"low": 0.0, "high": 1.0}
DropRate = {"low": 0.0, "below": 1.0}  # a share that goes; some must stay
Weight = {"low": 0.0, "high": 1e6}  # of a term; also factors
Std = {"low": 0.0, "high": 1e3}
Epsilon = {"low": 1e-12, "high": 0.1, "once": True}  # under the root of a variance
NumSteps = {"low": 1, "high": 10**9}
OptionalSteps = {"low": 0, "high": 10**9}
Batch = {"low": 1, "high": 2**20}
Length = {"low": 1, "high": 2**24}  # tokens, and things of which there is one for each token
OptionalLength = {"low": 0, "high": 2**24}
Units = {"low": 0, "high": 2**30}  # positions, and numbers of examples or tokens to read
ImageSize = {"low": 1, "high": 2**16}  # in pixels
Layers = {"low": 1, "high": 1024}
Heads = {"low": 1, "high": 4096}
OptionalHeads = {"low": 0, "high": 4096}
Width = {"low": 1, "high": 2**16}
OptionalWidth = {"low": 0, "high": 2**20}
Devices = {"low": 1, "high": 2**20}


def field(default: Any, doc: str = "", **metadata: Any) -> Any:
    """Returns a field with limits and, where not every run reads it, who does.

    `doc`: its meaning in one line, with the unit; `--help` and the documentation show it. `reads` names the kinds of encoding that do, `combined` ({field: kinds}) those that do where another field is set, `of`
    the kinds of data whose runs do; `path`: it is one; `choices`: returns the values that it may have.
    """
    return dataclasses.field(default=default, metadata=metadata | {"doc": doc})


def section(kind: type, **metadata: Any) -> Any:
    """Returns a field that holds other fields, `of` as above."""
    return dataclasses.field(default_factory=kind, metadata=metadata)


def check_range(value: Any, limits: Mapping[str, Any], name: str, new: bool = True) -> None:
    """Refuses a number outside of the limits of a field, also as one of several.

    Args:
      new: whether it is of a run that begins.

    Raises:
      InputError: names the field, the range and the number.
    """
    for item in value if isinstance(value, tuple) else (value,):
        number = isinstance(item, (int, float)) and not isinstance(item, bool)
        if number and not _within(item, limits, new):
            raise InputError(f"config field '{name}' must be {format_range(limits)}, got {format_value(value)}")
        if isinstance(item, float) and item and not SMALLEST <= abs(item) <= LARGEST:
            raise InputError(
                f"config field '{name}' must be 0 or from {SMALLEST:.1e} to {LARGEST:.1e} in size, as float32 holds it, "
                f"got {format_value(value)}"
            )


def format_value(value: Any) -> str:
    """Returns a value as messages show it: not more than a line's worth of it."""
    try:
        words = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return words if len(words) <= 120 else f"{words[:80]}... ({len(words)} characters)"


def _within(value: float, limits: Mapping[str, Any], new: bool) -> bool:
    if value == 0 and (limits.get("zero") or limits.get("once") and not new):
        return True
    low, high, below = (limits.get(name) for name in ("low", "high", "below"))
    return (low is None or value >= low) and (high is None or value <= high) and (below is None or value < below)


def format_range(limits: Mapping[str, Any]) -> str:
    """Returns a range as people say it: "at least 1 and at most 64", "0, or at least 1e-06"."""
    ends = {"low": "at least", "high": "at most", "below": "below"}
    words = [f"{said} {_short(limits[name])}" for name, said in ends.items() if limits.get(name) is not None]
    return "0, or " * bool(limits.get("zero")) + " and ".join(words)


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)
