"""Checkpoints of others: the PyTorch reference's and Hugging Face GPT-2, read and written."""

from seqpe_jax.interop.reference import ReferenceModel, from_state_dicts, load_reference

__all__ = ["ReferenceModel", "from_state_dicts", "load_reference"]
