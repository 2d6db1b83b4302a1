"""Which encoding still looks up answers in texts longer than it was trained on: nine encodings, three seeds each.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/questions.py --workdir=runs/questions --jobs=2
    python -m seqpe_jax.report --workdir=runs/questions --output=runs/questions/report

Trained on 128 bytes for 4800 steps as the config's page says, evaluated at 128 to 1024. Knobs were chosen with seed 0 on
the validation split; these are three other seeds, on 400 questions of the test split.
Hardware: two CPU cores, one for each of two runs at once; about four hours.
"""

from seqpe_jax.sweeps import product

CONFIG = "configs/stdlib_qa.py"
# Those that may answer past the training length come first, with all their seeds.
STRONG = ("seqpe", "alibi", "fox", "cable", "kerple", "fire")
OTHER = ("rotary", "rotary_partial", "none")


def runs():
    """Yields (name, overrides) of each run, one seed after the other."""
    for kinds in (STRONG, OTHER):
        for point in product({"seed": (1, 2, 3), "variant": kinds}):
            yield f"{point['variant']}-{point['seed']}", point
