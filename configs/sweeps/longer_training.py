"""Whether longer training costs extrapolation: bits per byte far past the training length against training steps.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/longer_training.py --workdir=runs/longer_training --jobs=2
    python -m seqpe_jax.report --workdir=runs/longer_training --output=runs/longer_training/report

The quickstart's model, trained on 64 bytes for 1000, 3000, 10,000 and 30,000 steps, each run with the schedule of its own
number of steps, evaluated at 8 and 64 times the training length; seed 1. FoX and ALiBi have SeqPE's four rotary pairs, FoX
gates that start open, as `seqpe` has; `seqpe_logits` has none.
Hardware: two CPU cores, one for each of two runs at once; about six hours, the short runs first.
"""

CONFIG = "configs/stdlib_lm.py"
PAIRS = {"encoding.rotary_pairs": 4}
OPEN = {"encoding.gate_bias_init": 4.0}
VARIANTS = {
    "seqpe": {},
    "seqpe_logits": {"variant": "seqpe_logits"},
    "fox": {"variant": "fox", **PAIRS, **OPEN},
    "alibi_pairs": {"variant": "alibi", **PAIRS},
    "rotary": {"variant": "rotary"},
}


def runs():
    """Yields (name, overrides) of each run."""
    for steps in (1000, 3000, 10_000, 30_000):
        for name, variant in VARIANTS.items():
            yield f"{name}_{steps}-1", {"seed": 1, "steps": steps, "eval.lengths": (64, 512, 4096), **variant}
