"""A decoder of 10 million parameters on code and English: windows of 512 BPE tokens, read up to 32 times as far.

    python benchmarks/midscale_data.py
    python -m seqpe_jax.train --config=configs/midscale_lm.py --workdir=runs/midscale
    python -m seqpe_jax.evaluate --checkpoint=runs/midscale --contexts=512,2048,8192,16384

The first command fetches the text, the sources and the documentation of Django 5.2, and trains its tokenizer.
Hardware: two CPU cores; 45 minutes for seqpe (100 steps took three). Result: not measured yet (sweeps/study_midscale.py).
Variants: seqpe (default; the recipe of stdlib_lm.py), seqpe_paper (the form of the paper), and any other encoding of texts
(docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"seqpe_paper": "seqpe"}


def get_config(variant=None):
    """Returns the config; a variant is an encoding kind, or a form of seqpe."""
    c = defaults()
    c.steps = 1500
    c.batch_size = 8
    c.data.name = "text"
    c.data.paths = ("runs/corpus/code", "runs/corpus/english")
    c.data.tokenizer = "runs/corpus/tokenizer.json"
    c.data.length = 512
    c.eval.lengths = (512,)
    c.eval.contexts = (512, 2048, 8192, 16384)
    c.eval.targets = 4096
    c.eval.tokens = 32768
    c.checkpoint.every = 300
    c.report.every = 10

    c.model.layers = 6
    c.model.width = 320
    c.model.heads = 5
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0

    c.optimizer.learning_rate = 2.2e-3  # 4e-3 of stdlib_lm.py, less by the root of the ratio of widths
    c.optimizer.warmup_steps = 150
    c.optimizer.clip = 1.0

    c.encoding.max_position = 20_000
    c.encoding.width = 320 if variant == "seqpe_paper" else 96
    c.encoding.heads = 5 if variant == "seqpe_paper" else 4
    c.encoding.dropout = 0.0
    if variant in (None, "seqpe", "seqpe_paper"):
        # As in stdlib_lm.py: the paper's 0.02 leaves a small encoder untrained within these steps.
        c.encoding.init_std = 0.1
        c.encoding.qk_init_std = 0.1
    c.encoding.amplitude = 0.03
    c.objective.contrastive.batch = 8
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.window = 4096  # eight windows of training
    c.objective.distillation.batch = 8
    c.objective.distillation.offsets = 32
    c.objective.shift.rate = 0.3
    if variant in (None, "seqpe"):
        c.encoding.qk = "multi"
        c.encoding.rotary_pairs = 16  # of 32: those whose period is shorter than the window of 512
        c.encoding.feature_width = 16
        c.encoding.gate = "forget"
        c.encoding.gate_bias_init = 4.0  # gates start open
        c.objective.contrastive.space = "vectors"
        c.objective.contrastive.around_anchor = True
        c.objective.contrastive.causal_only = True
        c.objective.contrastive.weight = 0.02
    return with_encoding(c, variant, FORMS)
