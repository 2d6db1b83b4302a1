"""Builders of data sets by name: of text, one example is a document (or a piece of a long one); of images, an image."""

import importlib

from seqpe_jax.data.builders.documents import DocumentBuilder
from seqpe_jax.errors import InputError, suggest

BUILDERS = {
    "stdlib_text": "StdlibText",
    "text_files": "TextFiles",
    "wikitext103": "Wikitext103",
}
IMAGE_BUILDERS = {
    "digit_images": "DigitImages",
    "moving_digits": "MovingDigits",
    "image_folder": "ImageFolder",
    "imagenet2012": "Imagenet2012",
    "imagenet_resized": "ImagenetResized",
}


def builder_class(name: str) -> type[DocumentBuilder]:
    """Returns the builder of text that `data.name` names. Raises: InputError, no such builder."""
    return _named(name, BUILDERS, "text", IMAGE_BUILDERS, "images")


def image_builder_class(name: str) -> type:
    """Returns the builder of images that `data.name` names; it has `open_split`. Raises: InputError, no such builder."""
    return _named(name, IMAGE_BUILDERS, "images", BUILDERS, "text")


def _named(name: str, wanted: dict[str, str], kind: str, others: dict[str, str], other_kind: str) -> type:
    if name in others:
        known = ", ".join(sorted(wanted))
        raise InputError(f"data set '{name}' (data.name) is {other_kind}, but this run needs {kind}: choose {known}")
    if name not in wanted:
        raise InputError(f"unknown data set '{name}' (data.name).{suggest(name, wanted)}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), wanted[name])
