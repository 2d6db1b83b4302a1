"""Three dimensions: videos of a handwritten digit that moves over a canvas; the label is the digit and its direction.

    python -m seqpe_jax.train --config=configs/moving_digits_vit.py --workdir=runs/moving
    python -m seqpe_jax.evaluate --checkpoint=runs/moving --output=runs/moving/evaluation.json

Trained on four frames in a row of 16 x 16 pixels, evaluated on four and on eight, at 16 to 32 pixels. Hardware: one CPU
core; 5 minutes. Result, five seeds: 84, 74 and 49% top-1 at 16, 24 and 32 pixels on four frames, and 84, 80 and 48% on
eight (all encodings: docs/results.md, configs/sweeps/moving_digits.py).
Variants: seqpe (default), seqpe_paper (the form of the paper), rotary_mixed, learned, and any other
encoding of grids (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"seqpe_paper": "seqpe"}


def get_config(variant=None):
    """Returns the config; a variant is an encoding kind."""
    c = defaults()
    c.steps = 2500
    c.batch_size = 32
    c.data.name = "moving_digits"
    c.data.size = (4, 16, 16)
    c.eval.sizes = (16, 24, 32)
    c.eval.frames = (4, 8)
    c.checkpoint.every = 1250
    c.report.every = 25

    c.model.kind = "vit"
    c.model.patch = (2, 4, 4)  # two frames in a patch: what moves is seen in it, and training takes half as long
    c.model.layers = 4
    c.model.width = 96
    c.model.heads = 4
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0
    c.model.activation = "gelu"
    c.model.layer_norm_epsilon = 1e-6

    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 100
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip = 1.0

    paper = variant == "seqpe_paper"
    c.encoding.max_position = 100 if paper else 10
    c.encoding.mode = "attn_scalar"
    c.encoding.qk = "multi"
    # The encoder's work does not shrink with the videos: at the model's width it is as much as all of RoPE's step.
    c.encoding.width = 96 if variant == "seqpe_paper" else 24
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    if variant in (None, "seqpe", "seqpe_paper"):
        c.encoding.init_std = 0.1
        c.encoding.qk_init_std = 0.1
    if variant in (None, "seqpe"):
        # SeqPE's logit begins near nothing, and an anchor whose loss is below half a nat is near enough: the more the logit
        # asks for at first, the worse what is seen on frames of the training size is learned.
        c.encoding.qk_init_std = 0.02
        c.objective.contrastive.floor = 0.5
        # All twelve pairs of a head rotate, four for each axis: zoomed crops show them every angle of a larger frame.
        c.encoding.rotary_pairs = 12
    if not paper and variant not in ("learned", "rotary", "none"):
        # As in digits_vit.py: a larger frame is read between the positions of training, and every other step reads parts
        # of the frames, enlarged. Time is not interpolated: a longer video continues.
        c.encoding.fraction_digits = 1
        c.encoding.resize = "interpolate"
        c.objective.zoom.rate = 0.5
        c.objective.zoom.smallest = 0.6  # smaller parts often hold no digit at all
        c.objective.shift.sets = 8

    c.objective.contrastive.batch = 8
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.mixture = (0.5, 0.3, 0.2)
    c.objective.contrastive.hard_fraction = 0.2
    c.objective.contrastive.window = 8
    c.objective.distillation.batch = 8
    c.objective.distillation.offsets = 16
    c.objective.shift.rate = 0.1
    c = with_encoding(c, variant, FORMS)
    if variant in (None, "seqpe") or c.encoding.kind in ("rotary_axial", "rotary_mixed", "sinusoidal"):
        c.encoding.theta = 100.0
    return c
