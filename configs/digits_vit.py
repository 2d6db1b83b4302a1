"""A small vision transformer on scikit-learn's 1797 handwritten digits, read at 8 x 8 pixels in patches of 2.

    python -m seqpe_jax.train --config=configs/digits_vit.py --workdir=runs/digits
    python -m seqpe_jax.evaluate --checkpoint=runs/digits --sizes=8,12,16,24,32 --output=runs/digits/evaluation.json

Hardware: one CPU core; 2 to 5 minutes, evaluation included. Result: 97.5% top-1 at 8 x 8 and about 91% at 32 x 32 (three
seeds; all encodings: docs/results.md).
Variants: seqpe (default), seqpe_paper (the form of the paper), rotary_mixed, learned, and any other
encoding of grids (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"seqpe_paper": "seqpe"}


def get_config(variant=None):
    """Returns the config; a variant is an encoding kind."""
    c = defaults()
    c.steps = 800
    c.batch_size = 64
    c.data.name = "digit_images"
    c.data.size = (8, 8)
    c.data.augment.crop_scale = (0.85, 1.0)
    c.eval.sizes = (8, 12, 16, 24, 32)
    c.checkpoint.every = 400
    c.report.every = 25

    c.model.kind = "vit"
    c.model.patch = (2, 2)
    c.model.layers = 4
    c.model.width = 96
    c.model.heads = 4
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0
    c.model.activation = "gelu"
    c.model.layer_norm_epsilon = 1e-6

    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 100
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip = 1.0

    paper = variant == "seqpe_paper"
    c.encoding.max_position = 100 if paper else 20
    c.encoding.mode = (
        "attn_scalar"  # the paper's images use attn_mul, which learns more slowly: 94% instead of 98% here
    )
    c.encoding.qk = "multi"
    c.encoding.width = 96
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    if variant in (None, "seqpe", "seqpe_paper"):
        c.encoding.init_std = 0.1  # as in stdlib_lm.py: the paper's 0.02 leaves a small encoder untrained
        c.encoding.qk_init_std = 0.1
    if not paper and variant not in ("learned", "rotary", "none"):
        # Larger images are interpolated between the positions of training, so positions have a digit after the point. Every
        # other step reads enlarged crops, whose patches keep their positions in the image: a patch of a larger image looks
        # like that, and has such a position.
        c.encoding.fraction_digits = 1
        c.encoding.resize = "interpolate"
        c.objective.zoom.rate = 0.5
        c.objective.zoom.smallest = 0.3
        c.objective.shift.sets = 8

    c.objective.contrastive.batch = 8
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.mixture = (0.5, 0.3, 0.2)
    c.objective.contrastive.hard_fraction = 0.2
    c.objective.contrastive.window = 14
    c.objective.distillation.batch = 8
    c.objective.distillation.offsets = 16
    c.objective.shift.rate = 0.1 if paper else 0.0
    c = with_encoding(c, variant, FORMS)
    if c.encoding.kind in ("rotary_axial", "rotary_mixed", "sinusoidal"):
        c.encoding.theta = 100.0  # grids are short: lower frequencies would hardly rotate
    return c
