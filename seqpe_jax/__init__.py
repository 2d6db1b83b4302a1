"""SeqPE in JAX: position encodings that train short and work long.

    import seqpe_jax

    model = seqpe_jax.load("runs/first")
    print(model.generate("import ", max_new_tokens=40))

`load` opens a run, an export, the authors' PyTorch checkpoints or a Hugging Face GPT-2. `SeqPE`, `attend`,
`apply_position_signal` and `position_losses` add the encoding to a model of your own. Each is imported at its first use.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from seqpe_jax.errors import InputError

if TYPE_CHECKING:
    from seqpe_jax.encodings.seqpe import SeqPE
    from seqpe_jax.loading import load
    from seqpe_jax.losses.train_loss import position_losses
    from seqpe_jax.model import Model
    from seqpe_jax.models.attention import apply_position_signal, attend

__version__ = "0.1.0"
__all__ = ["InputError", "Model", "SeqPE", "apply_position_signal", "attend", "load", "position_losses"]

_MODULES = {
    "Model": "model",
    "SeqPE": "encodings.seqpe",
    "apply_position_signal": "models.attention",
    "attend": "models.attention",
    "load": "loading",
    "position_losses": "losses.train_loss",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name == "place":
        warnings.warn("seqpe_jax.place is now seqpe_jax.apply_position_signal", DeprecationWarning, stacklevel=2)
        name = "apply_position_signal"
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
