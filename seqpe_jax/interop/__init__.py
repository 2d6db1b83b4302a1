"""Checkpoints in other formats: the PyTorch reference's and Hugging Face GPT-2, read and written."""

import importlib
from typing import Any

_MODULES = {
    "load_reference": ("seqpe_jax.loading", "load"),
    "from_state_dicts": ("seqpe_jax.interop.torch_model", "from_state_dicts"),
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a function when it is first used, since its module imports this package."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _MODULES[name]
    return getattr(importlib.import_module(module), attribute)
