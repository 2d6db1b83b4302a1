"""Whether longer training costs extrapolation: bits per byte far past the training length against training steps.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/longer_training.py --workdir=runs/longer_training --jobs=2 \
        --results=docs/results/study_longer_training.json
    python -m seqpe_jax.report --results=docs/results/study_longer_training.json --output=runs/longer_training/report

The quickstart's model, trained on 64 bytes for 1000, 3000, 10,000 and 30,000 steps, each run with the schedule of its own
number of steps, evaluated at 1, 8 and 64 times the training length; seed 1. Each encoding has the fields that it chose in
study_text.py; `alibi_pairs` and `rotary_plain` have no gate.
Hardware: two CPU cores, one for each of two runs at once; about three hours, the short runs first.
"""

CONFIG = "configs/stdlib_lm.py"
RATE = "optimizer.learning_rate"
PAIRS = {"encoding.rotary_pairs": 4}
OPEN = {"encoding.gate_bias_init": 4.0}
GATE = {"encoding.gate": "forget", **OPEN}
VARIANTS = {
    "seqpe": {},
    "fox": {"variant": "fox", RATE: 5.6e-3, **PAIRS, **OPEN},
    "alibi": {"variant": "alibi", **PAIRS, **GATE},
    "rotary": {"variant": "rotary", RATE: 2.8e-3, "encoding.theta": 100.0, **GATE},
    "alibi_pairs": {"variant": "alibi", **PAIRS},
    "rotary_plain": {"variant": "rotary"},
}


def runs():
    """Yields (name, overrides) of each run."""
    for steps in (1000, 3000, 10_000, 30_000):
        for name, variant in VARIANTS.items():
            yield f"{name}_{steps}-1", {"seed": 1, "steps": steps, "eval.lengths": (64, 512, 4096), **variant}
