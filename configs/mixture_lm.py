"""A language model on two sources of text, drawn by weight; documents in a window do not see each other.

    python -m seqpe_jax.train --config=configs/mixture_lm.py --workdir=runs/mixture

Replace the paths by your own: files, folders and globs of any format that data.name=text reads. Three of four training windows
are of `network` here, whatever the sizes of the two; the first lines of a run say how often each is read. Metrics are those of
all sources together and of each. A resumed run takes other weights from there on with --change=data.mixture.

Hardware: two CPU cores, 3 minutes. Variants: seqpe (default) and any other encoding of texts (docs/encodings.md).
"""

import sysconfig

from seqpe_jax.config import defaults, with_encoding

STDLIB = sysconfig.get_paths()["stdlib"]


def get_config(variant=None):
    c = defaults()
    c.steps = 1000
    c.batch_size = 16
    c.data.name = "text"
    c.data.mixture = {
        "network": {"paths": (f"{STDLIB}/email/*.py", f"{STDLIB}/http/*.py"), "weight": 3.0},
        "async": {"paths": (f"{STDLIB}/asyncio/*.py",), "weight": 1.0},
    }
    c.data.tokenizer = "bytes_eos"
    c.data.packing = "documents"
    c.data.length = 64
    c.eval.lengths = (64, 256)
    c.eval.every = 500
    c.checkpoint.every = 500
    c.report.every = 25

    c.model.layers = 3
    c.model.width = 96
    c.model.heads = 4
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0

    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.clip = 1.0

    c.encoding.max_position = 5000
    c.encoding.width = 48
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    c.encoding.init_std = 0.1
    c.encoding.qk_init_std = 0.1
    c.encoding.amplitude = 0.03

    c.objective.contrastive.batch = 8
    c.objective.contrastive.candidates = 32
    c.objective.distillation.batch = 8
    c.objective.distillation.offsets = 16
    c.objective.shift.rate = 0.3
    return with_encoding(c, variant)
