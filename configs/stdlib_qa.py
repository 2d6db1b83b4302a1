"""Questions about the standard library's own source, answered from the text before them: bytes, minutes on a CPU.

    python -m seqpe_jax.train --config=configs/stdlib_qa.py --workdir=runs/qa
    python -m seqpe_jax.evaluate --checkpoint=runs/qa --lengths=128,256,512 --output=runs/qa/evaluation.json

Hardware: 2 CPU cores. Variants: the encoding, `configs/stdlib_qa.py:rotary`.
"""

from seqpe_jax import config
from seqpe_jax.config import defaults


def get_config(variant=None):
    """Returns the config; a variant is an encoding kind."""
    c = defaults()
    c.steps = 1500
    c.batch_size = 16

    c.data.name = "stdlib_qa"
    c.data.tokenizer = "bytes"
    c.data.length = 128

    c.model.kind = "gpt2"
    c.model.layers = 3
    c.model.width = 96
    c.model.heads = 4
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0

    return config.with_encoding(c, variant)
