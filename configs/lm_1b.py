"""A GPT of 1.3 billion parameters with SeqPE, on text of your own: what this code base does at scale.

    python -m seqpe_jax.train --config=configs/lm_1b.py --workdir=DIR \
        --config.data.paths=PATH/corpus --config.data.tokenizer=PATH/tokenizer.json
    python -m seqpe_jax.aot --config=configs/lm_1b.py --topology=v5p:4x4x4 --config.model.vocabulary=50257

The sizes and the batch of a million tokens are those of GPT-3 XL (arXiv 2005.14165, table 2.1), with heads of width 128;
20 tokens for each parameter (arXiv 2203.15556). Encoder and losses are the paper's (arXiv 2506.13277, language modelling), with position queries and keys 16 wide.
Hardware: written for a pod of 64 to 256 TPU chips. Time and result: not measured by this project; `aot` says what fits.
Variants: seqpe (default), rotary, alibi, and any other encoding of texts (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding


def get_config(variant=None):
    c = defaults()
    c.steps = 25_000
    c.batch_size = 512
    c.data.name = "text_files"
    c.data.paths = ("corpus",)
    c.data.length = 2048
    c.data.tokenizer = "tokenizer.json"  # sized for GPT-2's, 50 257 entries
    c.data.threads = 8
    c.eval.every = 2500
    c.eval.lengths = (2048, 4096, 8192, 16384, 32768)
    c.eval.tokens = 4_194_304
    c.checkpoint.every = 1000
    c.precision.compute = "bfloat16"
    c.mesh.fsdp = 16  # a side of a v5e pod, which is a ring: gathering takes half as long as along a part of it

    c.model.layers = 24
    c.model.width = 2048
    c.model.heads = 16
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0
    c.model.remat = "dots"  # half of a v5e chip's memory; "full" computes a sixth more
    c.model.scan = True

    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.end_learning_rate = 2e-5
    c.optimizer.warmup_steps = 375
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip = 1.0

    c.encoding.max_position = 100_000
    c.encoding.mode = "attn_scalar"
    c.encoding.qk = "single"
    # With heads of 128, features that cuDNN's attention takes on Hopper and later: 128 + 6 x 16 of 256.
    c.encoding.feature_width = 16
    c.encoding.width = 768
    c.encoding.heads = 12
    c.encoding.dropout = 0.1

    c.objective.contrastive.batch = 256
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.window = 256
    c.objective.contrastive.mixture = (0.0, 0.4, 0.6)
    c.objective.distillation.batch = 256
    c.objective.distillation.offsets = 32
    c.objective.shift.rate = 0.1
    return with_encoding(c, variant)
