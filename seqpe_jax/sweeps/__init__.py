"""Sweeps: many training runs defined by one file. The helpers that a sweep file imports are here.

from seqpe_jax.sweeps import product

CONFIG = "configs/stdlib_lm.py"

def runs():
    for overrides in product({"variant": ("seqpe", "rotary"), "seed": (1, 2, 3)}):
        yield f"{overrides['variant']}-{overrides['seed']}", overrides
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpe_jax.sweeps.spec import (
        BestOf,
        FolderOf,
        Range,
        Search,
        choose_parts_then_repeat,
        fair_study,
        product,
        tune_then_repeat,
        zipped,
    )

__all__ = [
    "BestOf",
    "FolderOf",
    "Range",
    "Search",
    "choose_parts_then_repeat",
    "fair_study",
    "product",
    "tune_then_repeat",
    "zipped",
]


def __getattr__(name: str) -> Any:
    """Imports a helper at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.spec"), name)
