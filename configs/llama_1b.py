"""The blocks of Llama 3.2 1B with rotary positions, on text of your own: 1.2 billion parameters from scratch.

    python -m seqpe_jax.train --config=configs/llama_1b.py --workdir=DIR \
        --config.data.paths=PATH/corpus --config.data.tokenizer=PATH/tokenizer.json
    python -m seqpe_jax.aot --config=configs/llama_1b.py --topology=v5e:16x16 --config.model.vocabulary=128256

Sizes, vocabulary and base of the rotary angles are those of the published model's config.json; a batch has a million tokens, and there
are 20 for each parameter (arXiv 2203.15556). Learning rate and its schedule are those of configs/lm_1b.py.
Hardware: written for 64 to 256 TPU chips. Time and result: not measured by this project; docs/pods.md has the bounds of its
compiled step.
Variants: rotary (default), seqpe, alibi, and any other encoding of texts (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding


def get_config(variant=None):
    c = defaults()
    c.steps = 24_000
    c.batch_size = 256
    c.data.name = "text_files"
    c.data.paths = ("corpus",)
    c.data.length = 4096
    c.data.tokenizer = "tokenizer.json"  # sized for Llama 3's, 128 256 entries
    c.data.threads = 8
    c.eval.every = 2500
    c.eval.lengths = (4096, 8192, 16384, 32768)
    c.eval.tokens = 4_194_304
    c.checkpoint.every = 1000
    c.precision.compute = "bfloat16"
    c.mesh.fsdp = 16  # a side of a v5e pod

    c.model.kind = "llama"
    c.model.layers = 16
    c.model.width = 2048
    c.model.heads = 32
    c.model.kv_heads = 8
    c.model.mlp_width = 8192
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0
    c.model.remat = "dots"  # half of the memory of a v5e chip
    c.model.scan = True

    c.optimizer.learning_rate = 2e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.end_learning_rate = 2e-5
    c.optimizer.warmup_steps = 375
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip = 1.0

    if variant in (None, "rotary"):
        c.encoding.theta = 500_000.0
    c.encoding.max_position = 100_000
    c.encoding.mode = "attn_scalar"
    c.encoding.qk = "single"
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
    return with_encoding(c, variant or "rotary")
