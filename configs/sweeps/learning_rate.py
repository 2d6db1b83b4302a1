"""Each encoding of the quickstart's task at three learning rates, so that all are compared at their own best.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/learning_rate.py --workdir=runs/learning_rate --jobs=2
    python -m seqpe_jax.report --workdir=runs/learning_rate --output=runs/learning_rate/report

One seed, which no study reports; 1000 of the quickstart's 1500 steps, as in extrapolation.py. The rate falls to 0 over
them. What decides is the loss on the validation split at the end (`eval/loss@64` in each run's metrics.jsonl).
Hardware: two CPU cores, one for each of two runs at once; about 45 minutes.
"""

from seqpe_jax.sweeps import product

CONFIG = "configs/stdlib_lm.py"
KINDS = ("seqpe_logits", "rotary", "rotary_partial", "alibi", "learned", "sinusoidal", "none")
RATES = (2e-3, 4e-3, 8e-3)


def runs():
    """Yields (name, overrides) of each run."""
    for point in product(
        {"variant": KINDS, "optimizer.learning_rate": RATES}, {"steps": (1000,), "eval.every": (1000,)}
    ):
        yield f"{point['variant']}-{point['optimizer.learning_rate']:g}", point
