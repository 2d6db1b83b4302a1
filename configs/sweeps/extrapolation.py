"""Which encoding reads texts longer than it was trained on: seven encodings, three seeds each, on the quickstart's task.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation.py --workdir=runs/extrapolation --jobs=2
    python -m seqpe_jax.report --workdir=runs/extrapolation --output=runs/extrapolation/report

Trained on 64 bytes as the quickstart is, for 1000 of its 1500 steps, evaluated at 64 to 1024. `rotary_axial` is left
out: along one axis it is `rotary`. `rotary_mixed` differs from it there too, since its frequencies are learned.
Hardware: two CPU cores, one for each of two runs at once; about 40 minutes.
"""

from seqpe_jax.sweeps.points import product

CONFIG = "configs/stdlib_lm.py"
KINDS = ("seqpe", "alibi", "rotary", "rotary_mixed", "learned", "sinusoidal", "none")


def runs():
    """Yields (name, overrides) of each run, one seed of all encodings after the other."""
    for point in product({"seed": (0, 1, 2), "variant": KINDS}, {"steps": (1000,)}):
        yield f"{point['variant']}-{point['seed']}", point
