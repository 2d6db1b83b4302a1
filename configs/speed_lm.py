"""The language model whose speed the README reports: 4 layers of width 256 on windows of 512 bytes, SeqPE in the recipe
`seqpe_logits` of stdlib_lm.py.

    python -m seqpe_jax.train --config=configs/speed_lm.py --workdir=runs/speed
    python -m seqpe_jax.benchmark --config=configs/speed_lm.py --compare=seqpe,rotary
    python -m seqpe_jax.benchmark --config=configs/speed_lm.py --compare=seqpe,rotary --mode=eval \
        --config.data.length=8192 --config.batch_size=1

Hardware: two CPU cores; a step takes one to two seconds. It is made to be timed; what it
learns in its 1000 steps has not been looked at.
Variants: seqpe (default), rotary, alibi, and any other encoding of texts (docs/encodings.md); llama, a decoder of 9.5 million
parameters with rotary positions and two heads of keys.
"""

from seqpe_jax.config import defaults, with_encoding


def get_config(variant=None):
    c = defaults()
    c.steps = 1000
    c.batch_size = 8
    c.data.name = "stdlib_text"
    c.data.length = 512
    c.eval.lengths = (512, 8192, 65536)
    c.eval.tokens = 65536
    c.checkpoint.every = 500

    c.model.layers = 4
    c.model.width = 256
    c.model.heads = 4
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0

    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.clip = 1.0

    c.encoding.max_position = 100_000
    c.encoding.width = 128  # half the model's, as in stdlib_lm.py
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    c.encoding.feature_width = 8
    c.encoding.qk = "multi"
    if variant in (None, "seqpe"):
        c.encoding.rotary_pairs = 16  # of 32: those with a period within the window

    c.objective.contrastive.batch = 8
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.space = "logits"
    c.objective.contrastive.around_anchor = True
    c.objective.contrastive.causal_only = True
    c.objective.contrastive.window = 4096  # eight windows of training
    c.objective.distillation.batch = 8
    c.objective.distillation.offsets = 16
    c.objective.shift.rate = 0.3
    if variant == "llama":
        c.model.kind = "llama"
        c.model.layers, c.model.width, c.model.heads, c.model.kv_heads, c.model.mlp_width = 6, 384, 6, 2, 1024
    return with_encoding(c, variant, {"llama": "rotary"})
