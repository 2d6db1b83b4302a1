"""The blocks of Llama 3 8B with rotary positions, on text of your own: 8.0 billion parameters from scratch.

    python -m seqpe_jax.train --config=configs/llama_8b.py --workdir=gs://BUCKET/llama_8b \
        --config.data.paths=PATH/corpus --config.data.tokenizer=PATH/tokenizer.json
    python -m seqpe_jax.aot --config=configs/llama_8b.py --topology=v5p:4x4x4 --config.model.vocabulary=128256

Sizes, vocabulary, base of the rotary angles and peak learning rate are those of the published model (arXiv 2407.21783, table 3). A
batch has four million tokens, and there are 20 for each parameter (arXiv 2203.15556).
Hardware: written for 64 TPU chips and more. Time and result: not measured by this project; docs/pods.md has the bounds of its
compiled step.
Variants: rotary (default), seqpe, alibi, and any other encoding of texts (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding


def get_config(variant=None):
    c = defaults()
    c.steps = 38_000
    c.batch_size = 512
    c.data.name = "text_files"
    c.data.paths = ("corpus",)
    c.data.length = 8192
    c.data.tokenizer = "tokenizer.json"  # sized for Llama 3's, 128 256 entries
    c.data.threads = 8
    c.eval.every = 2500
    c.eval.lengths = (8192, 16384, 32768)
    c.eval.tokens = 4_194_304
    c.checkpoint.every = 1000
    c.precision.compute = "bfloat16"
    c.mesh.fsdp = 128  # over all chips of a v5e pod libtpu makes no reduce-scatters

    c.model.kind = "llama"
    c.model.layers = 32
    c.model.width = 4096
    c.model.heads = 32
    c.model.kv_heads = 8
    c.model.mlp_width = 14336
    c.model.tied = False
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0
    c.model.remat = "full"
    c.model.scan = True

    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.end_learning_rate = 3e-5
    c.optimizer.warmup_steps = 2000
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
