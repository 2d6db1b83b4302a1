"""Checkpoints of others: the PyTorch reference's and Hugging Face GPT-2, read and written."""

import importlib
from typing import Any

_PLACES = {
    "load_reference": ("seqpe_jax.loading", "load"),
    "from_state_dicts": ("seqpe_jax.interop.torch_model", "from_state_dicts"),
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    """Finds the functions above when they are first used, since what they return is made of rooms that import this one."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
