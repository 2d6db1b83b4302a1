"""The tiny config as a config file for commands; data.paths must be given. The same on a mixture, in a file of the test."""

import json
import pathlib

import ml_collections

from seqpe_jax import config
from tests.tiny import tiny_config

MIXTURE = """
from tests import tiny_text


def get_config(variant=None):
    c = tiny_text.get_config(variant)
    c.data.name, c.data.paths, c.data.mixture = "text", (), SOURCES
    c.data.tokenizer, c.data.packing = "bytes_eos", "documents"
    return c
"""


def get_config(variant=None):
    c = ml_collections.ConfigDict(config.to_dict(tiny_config(variant=variant or "seqpe")))
    c.data.name = "text_files"
    c.data.paths = ("given-by-the-test",)
    return c


def write_mixture(folder: pathlib.Path, text: pathlib.Path, name: str = "mixture", **few: object) -> str:
    """Returns the path of a config file with two sources of short documents, several of which are in each window.

    Args:
      folder: gets `few.jsonl` and `many.jsonl` with the lines of a text, and the file.
      text: a file of lines.
      name: of the file.
      few: further fields of the first source.
    """
    lines = text.read_text().splitlines(keepends=True)
    sources = {}
    for source, first, last in (("few", 0, 600), ("many", 600, len(lines))):
        path = folder / f"{source}.jsonl"
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[first:last]))
        sources[source] = {"paths": (str(path),), "weight": 1.0}
    sources["few"] |= few
    (folder / f"{name}.py").write_text(MIXTURE.replace("SOURCES", repr(sources)))
    return str(folder / f"{name}.py")
