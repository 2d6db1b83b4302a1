"""A GPT of 7.8 billion parameters with SeqPE and a vocabulary of 128k: what a slice of 256 chips or more is for.

    python -m seqpe_jax.train --config=configs/lm_8b.py --workdir=gs://BUCKET/lm_8b \
        --config.data.paths=PATH/corpus --config.data.tokenizer=PATH/tokenizer.json
    python -m seqpe_jax.aot --config=configs/lm_8b.py --topology=v5p:8x8x8 --config.model.vocabulary=128256

Width, heads, vocabulary and peak learning rate are those of Llama 3 8B (arXiv 2407.21783, table 3); the blocks are GPT-2's,
so that 36 of them have as many parameters. A batch has four million tokens; 20 tokens for each parameter (arXiv
2203.15556). Encoder and losses are the paper's (arXiv 2506.13277, language modelling), with narrow position queries.
Hardware: written for 256 TPU chips and more. Time and result: not measured by this project; docs/pods.md has the bounds
of its compiled step.
Variants: seqpe (default), rotary, alibi, and any other encoding of texts (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding


def get_config(variant=None):
    c = defaults()
    c.steps = 37_000
    c.batch_size = 1024
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
    c.mesh.fsdp = 128  # over all chips of a v5e pod libtpu makes no reduce-scatters

    c.model.layers = 36
    c.model.width = 4096
    c.model.heads = 32
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

    c.encoding.max_position = 100_000
    c.encoding.mode = "attn_scalar"
    c.encoding.qk = "single"
    c.encoding.width = 768
    c.encoding.heads = 12
    c.encoding.dropout = 0.1
    c.encoding.feature_width = 16  # with heads of 128, what cuDNN takes and little more than RoPE costs on a TPU

    c.objective.contrastive.batch = 256
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.window = 256
    c.objective.contrastive.mixture = (0.0, 0.4, 0.6)
    c.objective.distillation.batch = 256
    c.objective.distillation.offsets = 32
    c.objective.shift.rate = 0.1
    return with_encoding(c, variant)
