"""Each encoding of the quickstart's task at four learning rates, so that all are compared at their own best; one seed.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/learning_rate.py --workdir=runs/learning_rate --jobs=2
    python -m seqpe_jax.report --workdir=runs/learning_rate --output=runs/learning_rate/report

Half of the quickstart's 1500 steps; the rate falls to 0 over them. The quickstart's own rate is 2e-3.
Hardware: two CPU cores, one for each of two runs at once; about 40 minutes.
"""

from seqpe_jax.sweeps.points import product

CONFIG = "configs/stdlib_lm.py"
KINDS = ("seqpe", "alibi", "rotary", "rotary_mixed", "learned", "sinusoidal", "none")
RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def runs():
    """Yields (name, overrides) of each run."""
    for point in product({"variant": KINDS, "optimizer.learning_rate": RATES}, {"steps": (750,)}):
        yield f"{point['variant']}-{point['optimizer.learning_rate']:g}", point
