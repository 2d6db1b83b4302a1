"""Deprecated names of the helpers for sweep files; `seqpe_jax.sweeps` has the current ones."""

import sys
from collections.abc import Iterator
from typing import Any

from seqpe_jax.sweeps.spec import BestOf as Best
from seqpe_jax.sweeps.spec import Overrides, Range, Search, product, tune_then_repeat, zipped

__all__ = ["Best", "Range", "Search", "product", "two_stages", "zipped"]

_KEYWORDS = {
    "ways": "variants",
    "tried": "grid",
    "trial": "tuning_overrides",
    "like": "same_as",
    "further": "extra_values",
}

print(
    "warning: seqpe_jax.sweeps.points is deprecated: write `from seqpe_jax.sweeps import product` "
    "(two_stages is now tune_then_repeat, Best is BestOf; docs/sweeps.md has their arguments)",
    file=sys.stderr,
)


def two_stages(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Overrides]]:
    """Calls `tune_then_repeat` with the current keywords."""
    return tune_then_repeat(*args, **{_KEYWORDS.get(name, name): value for name, value in kwargs.items()})
