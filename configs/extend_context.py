"""Longer contexts for a trained RoPE model: it is trained at 64 bytes, changed, trained for 200 steps more, and read at 512.

    python -m seqpe_jax.train --config=configs/extend_context.py --workdir=runs/rope
    python -m seqpe_jax.train --config=configs/extend_context.py:drope --workdir=runs/drope --init-from=runs/rope
    python -m seqpe_jax.train --config=configs/extend_context.py:seqpe --workdir=runs/rope_seqpe --init-from=runs/rope

Variants: rotary (default, the first stage: the quickstart's model, 800 steps); yarn and ntk (RoPE with the scalings of longer
windows; ntk needs no training: its one step has the learning rate 0); drope (no encoding, with a short recalibration, arXiv
2512.12167); seqpe (SeqPE next to all rotary pairs, which begins without an effect); rotary_partial (only the four fastest pairs
remain) and seqpe_partial (SeqPE in place of the others); and any other encoding of texts. Hardware: one CPU core; about three minutes for the first stage, one for each of the others.
Result: docs/results.md; all variants with three seeds: configs/sweeps/extend_context.py.
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"yarn": "rotary", "ntk": "rotary", "drope": "none", "rotary_partial": "none", "seqpe_partial": "seqpe"}
PAIRS = {"seqpe": 12, "seqpe_partial": 4, "rotary_partial": 4}  # of the twelve pairs of a head


def get_config(variant=None):
    variant = variant or "rotary"
    first = variant == "rotary"
    c = defaults()
    c.steps = 800 if first else 200
    c.batch_size = 16
    c.data.name = "stdlib_text"
    c.data.length = 64
    c.eval.lengths = (64, 128, 256, 512)
    c.eval.tokens = 65536
    c.checkpoint.every = 200
    c.report.every = 25

    c.model.layers = 3
    c.model.width = 96
    c.model.heads = 4
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0

    c.optimizer.learning_rate = 4e-3 if first else 2e-3
    c.optimizer.warmup_steps = 100 if first else 20
    c.optimizer.clip = 1.0
    if variant == "ntk":
        c.steps, c.optimizer.warmup_steps = 1, 1

    if variant in ("yarn", "ntk"):
        c.encoding.scaling = variant
    if variant == "drope":
        c.encoding.log_scaling = True  # in windows longer than those of training, attention stays as sharp as there

    c.encoding.rotary_pairs = PAIRS.get(variant, 0)

    # SeqPE as in configs/stdlib_lm.py:seqpe_logits.
    c.encoding.max_position = 5000
    c.encoding.width = 48
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    if FORMS.get(variant, variant) == "seqpe":
        c.encoding.init_std = 0.1
        c.encoding.qk_init_std = 0.1
        c.encoding.start_at_zero = True
    c.encoding.feature_width = 8
    c.encoding.qk = "multi"
    c.objective.shift.rate = 0.3
    c.objective.contrastive.batch = 8
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.space = "logits"
    c.objective.contrastive.around_anchor = True
    c.objective.contrastive.causal_only = True
    c.objective.contrastive.window = 512
    c.objective.distillation.batch = 8
    c.objective.distillation.offsets = 16
    return with_encoding(c, variant, FORMS)
