"""Deprecated names of the helpers for sweep files; `seqpe_jax.sweeps` has the current ones."""

import sys
from collections.abc import Iterator
from typing import Any

from seqpe_jax.sweeps.spec import BestOf, Overrides, Range, Search, product, tune_then_repeat, zipped

RENAMED_KEYWORDS = {
    "ways": "variants",
    "tried": "grid",
    "trial": "tuning_overrides",
    "like": "same_as",
    "further": "extra_values",
}


def _with_current_keywords(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Overrides]]:
    """Calls `tune_then_repeat`."""
    return tune_then_repeat(*args, **{RENAMED_KEYWORDS.get(name, name): value for name, value in kwargs.items()})


RENAMED = {"Best": BestOf, "two_stages": _with_current_keywords}
globals().update(RENAMED)
__all__ = ["Range", "Search", "product", "zipped", *RENAMED]

print(
    "warning: seqpe_jax.sweeps.points is deprecated: import product, zipped, tune_then_repeat, BestOf, Range and Search from "
    "seqpe_jax.sweeps (docs/sweeps.md)",
    file=sys.stderr,
)
