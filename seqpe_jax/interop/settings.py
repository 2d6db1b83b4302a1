"""Settings in the files of other programs: type and range of each, checked before anything is computed from them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from seqpe_jax.config.limits import format_range, within
from seqpe_jax.errors import InputError, format_value

MAX_SIZE = 2**30  # of a whole number
SIZE = {"low": 0, "high": MAX_SIZE}
COUNT = {"low": 1, "high": MAX_SIZE}
KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    str: ("a name", (str,)),
    list: ("a list", (list, tuple)),
    dict: ("a mapping of settings", (dict,)),
}


class Field(NamedTuple):
    """One setting.

    Attributes:
      kind: type, a key of `KINDS`; a whole number is a number too, but true is neither.
      limits: range of a number, as config fields have it (`config.limits`).
      null: whether null is a value of its own.
    """

    kind: type
    limits: Mapping[str, Any] = {}
    null: bool = False

    def check(self, where: str, value: Any) -> Any:
        """Returns a value in the field's type.

        Args:
          where: the file and the name of the field, for messages.
          value: what stands there.

        Raises:
          InputError: another type, a number outside of the range or without an end.
        """
        if isinstance(value, np.generic):
            value = value.item()
        if value is None and self.null:
            return None
        text, kinds = KINDS[self.kind]
        if not isinstance(value, kinds) or isinstance(value, bool) != (self.kind is bool):
            raise InputError(f"{where} must be {text}, got {format_value(value)}")
        if self.kind in (int, float):
            if not abs(value) <= MAX_FLOAT:
                raise InputError(f"{where} must be a finite number, got {format_value(value)}")
            if not within(value, self.limits):
                raise InputError(f"{where} must be {format_range(self.limits)}, got {format_value(value)}")
        return self.kind(value)


MAX_FLOAT = math.ldexp(1.0, 127)  # larger ones are not finite in float32


def check_names(where: str, settings: Mapping[Any, Any]) -> None:
    """Refuses settings whose names are no text, which YAML and pickles allow. Raises: InputError: names one."""
    wrong = next((name for name in settings if not isinstance(name, str)), None)
    if wrong is not None or None in settings:
        raise InputError(f"{where}: the name of a setting must be text, got {format_value(wrong)}")
