"""What each part of SeqPE does on text, questions and images: the shipped model without it; one seed.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/ablation.py --workdir=runs/ablation --jobs=2
    python -m seqpe_jax.report --workdir=runs/ablation --output=runs/ablation/report

Names tell the task and what is missing or in another way; `full` is the page's own choice, of text `seqpe_logits`, but for the encoder of the text
runs, which is as wide as the model (encoder_width.py has it narrower). These take 1000 steps, as in extrapolation.py; the
others take their page's.
Hardware: two CPU cores, one for each of two runs at once; about 75 minutes.
"""

CONFIG = "configs/stdlib_lm.py"
QUESTIONS, IMAGES = "configs/stdlib_qa.py", "configs/digits_vit.py"
TEXT_PARTS = {
    "full": {},
    "no_rotation": {"encoding.rotary_pairs": 0},
    "rotation_alone": {"variant": "rotary_partial"},
    "wide_parts": {"encoding.feature_width": 0},
    "parts_of_4": {"encoding.feature_width": 4},
    "qk_single": {"encoding.qk": "single"},
    "no_contrastive": {"objective.contrastive.weight": 0.0},
    "contrastive_vectors": {"objective.contrastive.space": "vectors"},
    "no_distillation": {"objective.distillation.weight": 0.0},
    "distillation_rows": {"objective.distillation.space": "logits", "objective.distillation.reduction": "rows"},
    "no_shift": {"objective.shift.rate": 0.0},
    "base_2": {"encoding.base": 2},
}
QUESTION_PARTS = {
    "full": {},
    "all_heads": {
        "encoding.position_heads": 4,
        "encoding.rotary_heads": 4,
        "objective.contrastive.head_scales": (1.0, 4.0, 16.0, 64.0),
    },
    "equal_scales": {"objective.contrastive.head_scales": (1.0, 1.0, 1.0)},
    "no_rotation": {"encoding.rotary_pairs": 0, "encoding.rotary_heads": 0},
    "no_shift": {"objective.shift.rate": 0.0},
    "no_log_scaling": {"encoding.log_scaling": False},
}
IMAGE_PARTS = {
    "full": {},
    "no_zoom": {"objective.zoom.rate": 0.0},
    "jitter": {"objective.zoom.rate": 0.0, "objective.jitter.rate": 0.5, "objective.jitter.range": 0.5},
    "no_contrastive": {"objective.contrastive.weight": 0.0},
    "no_seqpe": {"variant": "none"},
}


def runs():
    """Yields (name, overrides) of each run."""
    for part, fields in TEXT_PARTS.items():
        wide = {} if "variant" in fields else {"encoding.width": 96}
        yield f"text-{part}", {"variant": "seqpe_logits", "seed": 1, "steps": 1000} | wide | fields
    for part, fields in IMAGE_PARTS.items():
        yield f"digits-{part}", {"config": IMAGES, "seed": 1} | fields
    for part, fields in QUESTION_PARTS.items():
        yield f"questions-{part}", {"config": QUESTIONS, "seed": 1} | fields
