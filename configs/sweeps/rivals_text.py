"""Which encoding reads texts past its training length, the rivals of 2017 to 2026: three seeds each.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/rivals_text.py --workdir=runs/rivals_text --jobs=2
    python -m seqpe_jax.report --workdir=runs/rivals_text --output=runs/rivals_text/report

Trained on 64 bytes for 1000 steps as configs/stdlib_lm.py says, evaluated at 64 to 4096 bytes: the other half of
configs/sweeps/extrapolation.py, which has SeqPE, RoPE, ALiBi and the tables. Each encoding is as its paper has it, and the
learning rate is that page's, 4e-3, the best of those tried for SeqPE, RoPE, ALiBi, the learned table and the waves.
Hardware: two CPU cores, one for each of two runs at once; about an hour and a half.
"""

from seqpe_jax.sweeps.points import product

CONFIG = "configs/stdlib_lm.py"
KINDS = ("fire", "fox", "pope", "scale_invariant", "kerple", "t5", "cable")


def runs():
    """Yields (name, overrides) of each run, one seed of all encodings after the other."""
    for seed in (1, 2, 3):
        for point in product({"seed": (seed,), "variant": KINDS}):
            yield f"{point['variant']}-{seed}", point
        yield f"rotary_yarn-{seed}", {"seed": seed, "variant": "rotary", "encoding.scaling": "yarn"}
