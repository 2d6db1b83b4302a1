"""TFDS builders of text data sets: one example is one document (or one piece of a long one)."""

import importlib

from seqpe_jax.data.builders.documents import DocumentBuilder
from seqpe_jax.errors import InputError, suggest

BUILDERS = {
    "stdlib_text": "StdlibText",
    "text_files": "TextFiles",
    "wikitext103": "Wikitext103",
}


def builder_class(name: str) -> type[DocumentBuilder]:
    """Returns the builder that `data.name` names. Raises: InputError, no such builder."""
    if name not in BUILDERS:
        raise InputError(f"unknown data set '{name}' (data.name).{suggest(name, BUILDERS)}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), BUILDERS[name])
