"""The tiny config as a config file for commands; data.paths must be given."""

import ml_collections

from seqpe_jax import config
from tests.tiny import tiny_config


def get_config(variant=None):
    c = ml_collections.ConfigDict(config.to_dict(tiny_config(variant=variant or "seqpe")))
    c.data.name = "text_files"
    c.data.paths = ("given-by-the-test",)
    return c
