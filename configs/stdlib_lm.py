"""The quickstart: a byte-level language model on the standard library's own source text.

    python -m seqpe_jax.train --config=configs/stdlib_lm.py --workdir=runs/seqpe
    python -m seqpe_jax.train --config=configs/stdlib_lm.py:rotary --workdir=runs/rotary

Hardware: two CPU cores; 4 minutes for seqpe, 2 for the others. Result, after 1000 steps: 1.95 bits per byte at 64 bytes and
1.89 at 4096 (five seeds; rotary 1.99 and 4.57, three seeds; docs/results.md).
Variants: seqpe (default), seqpe_logits (without gates, contrastive loss on attention logits), seqpe_paper (the form of the
paper), rotary, alibi, rotary_partial (seqpe's rotary pairs alone), and any other encoding of texts (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"seqpe_logits": "seqpe", "seqpe_paper": "seqpe", "rotary_partial": "rotary"}


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

    c.model.layers = 3
    c.model.width = 96
    c.model.heads = 4
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0

    c.optimizer.learning_rate = 4e-3  # the best of 2e-3, 4e-3 and 8e-3 for every encoding (sweeps/learning_rate.py)
    c.optimizer.warmup_steps = 100
    c.optimizer.clip = 1.0

    c.encoding.max_position = 5000
    c.encoding.width = 96 if variant == "seqpe_paper" else 48  # half the model's is as good (sweeps/encoder_width.py)
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    if variant in (None, "seqpe", "seqpe_logits", "seqpe_paper"):
        # The paper starts weights at std 0.02; at this width and budget the encoder then stays untrained.
        c.encoding.init_std = 0.1
        c.encoding.qk_init_std = 0.1
    # About the size of an initial token embedding: sinusoids of size 1 dominate the tokens (validation, 300 steps).
    c.encoding.amplitude = 0.03

    c.objective.contrastive.batch = 8
    c.objective.contrastive.candidates = 32
    c.objective.distillation.batch = 8
    c.objective.distillation.offsets = 16
    c.objective.shift.rate = 0.3
    if variant != "seqpe_paper":
        # The four highest-frequency pairs of twelve rotate: a training window shows all their angles, so that they
        # extrapolate. SeqPE's logit bias, of narrow query and key parts, carries the rest.
        c.encoding.rotary_pairs = 4 if variant in (None, "seqpe", "seqpe_logits", "rotary_partial") else 0
        c.encoding.feature_width = 8
        c.encoding.qk = "multi"
        # Contrastive loss on attention logits, with candidates around the anchor: it makes heads local.
        c.objective.contrastive.space = "logits"
        c.objective.contrastive.around_anchor = True
        c.objective.contrastive.causal_only = True
        c.objective.contrastive.window = 512
    if variant in (None, "seqpe"):
        # The best of twelve trials (sweeps/study_text.py): gates make heads local, and the loss need not.
        c.encoding.gate = "forget"
        c.encoding.gate_bias_init = 4.0  # they start open
        c.objective.contrastive.space = "vectors"
        c.objective.contrastive.weight = 0.02
    # FIRE's numbers for windows of 2048: better than their share of 64 bytes, 16 and 3.2, in one run of 400 steps each.
    c.encoding.fire_threshold, c.encoding.fire_scale = 512.0, 0.1
    return with_encoding(c, variant, FORMS)
