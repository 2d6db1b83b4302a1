"""The quickstart's text in the blocks of today's decoders: RMSNorm, gated MLPs, shared heads of keys, rotary positions.

    python -m seqpe_jax.train --config=configs/decoder_lm.py --workdir=runs/llama
    python -m seqpe_jax.train --config=configs/decoder_lm.py:gemma2 --workdir=runs/gemma2
    python -m seqpe_jax.train --config=configs/decoder_lm.py:seqpe --workdir=runs/llama_seqpe

Hardware: two CPU cores. A variant of a family has its blocks and rotary positions; a variant of an encoding has llama's blocks.
Result: not measured by this project.
Variants: llama (default), mistral, qwen2, qwen3, smollm3, olmo2, gemma2, gpt_neox, granite (docs/models.md has the parts of each), and
any encoding of texts (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "gemma2", "gpt_neox", "granite")
FORMS = dict.fromkeys(FAMILIES, "rotary")


def get_config(variant=None):
    c = defaults()
    c.steps = 1500
    c.batch_size = 16
    c.data.name = "stdlib_text"
    c.data.length = 64
    c.eval.lengths = (64, 128, 256, 512, 1024)
    c.eval.tokens = 65536
    c.checkpoint.every = 500
    c.report.every = 25

    c.model.kind = variant if variant in FAMILIES else "llama"
    c.model.layers = 4
    c.model.width = 96
    c.model.heads = 4
    c.model.kv_heads = 4 if variant in ("olmo2", "gpt_neox") else 2
    c.model.mlp_width = (
        384 if variant == "gpt_neox" else 256
    )  # 8/3 of the width, so that a gated MLP has as many weights
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0
    if variant in ("mistral", "gemma2"):
        c.model.window = 32
    if variant == "gpt_neox":
        c.model.activation = "gelu"
        c.model.tied = False
        c.encoding.rotary_share = 0.25
    if variant == "smollm3":
        c.encoding.layers_with = (1, 1, 1, 0)

    c.optimizer.learning_rate = 4e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.clip = 1.0

    c.encoding.max_position = 5000
    c.encoding.width = 48
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    if variant == "seqpe":  # as in configs/stdlib_lm.py:seqpe_logits
        c.encoding.init_std = 0.1
        c.encoding.qk_init_std = 0.1
        c.encoding.rotary_pairs = 4
        c.encoding.feature_width = 8
    c.encoding.qk = "multi"
    c.objective.contrastive.batch = 8
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.space = "logits"
    c.objective.contrastive.around_anchor = True
    c.objective.contrastive.causal_only = True
    c.objective.contrastive.window = 512
    c.objective.distillation.batch = 8
    c.objective.distillation.offsets = 16
    c.objective.shift.rate = 0.3
    return with_encoding(c, variant or "llama", FORMS)
