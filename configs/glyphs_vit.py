"""A small vision transformer on letters and digits, trained at 32 x 32 pixels and read at sizes up to four times that.

    python -m seqpe_jax.train --config=configs/glyphs_vit.py --workdir=runs/glyphs
    python -m seqpe_jax.evaluate --checkpoint=runs/glyphs --output=runs/glyphs/evaluation.json
    python -m seqpe_jax.evaluate --checkpoint=runs/glyphs --sizes=32x64,64x32,48x96

The 36 characters are drawn from outlines of the fonts that Matplotlib ships, at each size anew: nothing is resized, so that
a larger image shows the same shape in more patches. The families of the test split are in no other.
Hardware: two CPU cores. At 128 pixels an image has 1,024 patches, 16 times those of training.
Variants: seqpe (default), seqpe_paper (the form of the paper), rotary_axial, rotary_mixed, learned, sinusoidal, lookhere,
pape, and any other encoding of grids (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"seqpe_paper": "seqpe"}


def get_config(variant=None):
    """Returns the config; a variant is an encoding kind."""
    c = defaults()
    c.steps = 1500
    c.batch_size = 64
    c.data.name = "glyphs"
    c.data.size = (32, 32)
    c.eval.sizes = (32, 48, 64, 96, 128)
    c.checkpoint.every = 500
    c.report.every = 25

    c.model.kind = "vit"
    c.model.patch = (4, 4)
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
    c.encoding.max_position = 100 if paper else 40
    c.encoding.mode = "attn_scalar"
    c.encoding.qk = "multi"
    # Half of the model's width is as good and costs less (sweeps/glyphs_encoder_width.py, docs/recipes.md).
    c.encoding.width = 96 if paper else 48
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    if variant in (None, "seqpe", "seqpe_paper"):
        c.encoding.init_std = 0.1  # as in digits_vit.py
        c.encoding.qk_init_std = 0.1
    if not paper and variant not in ("learned", "rotary", "none"):
        # As in digits_vit.py: larger images lie between the positions of training, and every other step reads enlarged crops
        # whose patches keep their positions.
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
