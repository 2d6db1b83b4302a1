"""Builders of data sets by name.

One example of text is a document (or a piece of a long one); of images, an image; of questions, a question.
"""

import importlib

from seqpe_jax.data.datasets.text_base import TextBuilder
from seqpe_jax.errors import InputError, suggest

BUILDERS = {
    "stdlib_text": "stdlib_text.StdlibText",
    "text_files": "text_files.TextFiles",
    "wikitext103": "wikitext103.Wikitext103",
}
IMAGE_BUILDERS = {
    "digit_images": "digits.DigitImages",
    "moving_digits": "digits.MovingDigits",
    "image_folder": "image_folder.ImageFolder",
    "imagenet2012": "imagenet.Imagenet2012",
    "imagenet_resized": "imagenet.ImagenetResized",
}
QUESTION_BUILDERS = {
    "stdlib_qa": "stdlib_qa.StdlibQA",
    "squad_long": "squad_long.SquadLong",
    "qa_jsonl": "qa_jsonl.QaJsonl",
}
KINDS = {"text": BUILDERS, "images": IMAGE_BUILDERS, "questions": QUESTION_BUILDERS}


def builder_class(name: str) -> type[TextBuilder]:
    """Returns the builder of text that `data.name` names. Raises: InputError, no such builder."""
    return _named(name, "text")


def image_builder_class(name: str) -> type:
    """Returns the builder of images that `data.name` names; it has `open_split`. Raises: InputError, no such builder."""
    return _named(name, "images")


def question_builder_class(name: str) -> type:
    """Returns what `data.name` names: a `QABuilder`, or `QaJsonl`. Raises: InputError, no such builder."""
    return _named(name, "questions")


def _named(name: str, kind: str) -> type:
    wanted = KINDS[kind]
    for other_kind, others in KINDS.items():
        if name in others and other_kind != kind:
            known = ", ".join(sorted(wanted))
            raise InputError(
                f"data set '{name}' (data.name) is {other_kind}, but this run needs {kind}: choose {known}"
            )
    if name not in wanted:
        raise InputError(f"unknown data set '{name}' (data.name).{suggest(name, wanted)}")
    module, class_name = wanted[name].split(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
