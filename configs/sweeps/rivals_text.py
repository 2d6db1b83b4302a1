"""Which encoding reads texts past its training length: SeqPE beside the rivals of 2017 to 2026, three seeds each.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/rivals_text.py --workdir=runs/rivals_text --jobs=2
    python -m seqpe_jax.report --workdir=runs/rivals_text --output=runs/rivals_text/report

Trained on 64 bytes for the 1500 steps of configs/stdlib_lm.py, evaluated at 64 to 1024 bytes. Each encoding is as its paper
has it, and the learning rate is that page's, 4e-3, the best of those tried for SeqPE, RoPE and ALiBi; it was not searched
for the others. `rotary_yarn` is RoPE whose angles are scaled at evaluation.
Hardware: two CPU cores, one for each of two runs at once; about two hours.
"""

from seqpe_jax.sweeps.points import product

CONFIG = "configs/stdlib_lm.py"
KINDS = ("seqpe", "rotary", "alibi", "fire", "fox", "pope", "scale_invariant", "kerple", "t5", "cable")


def runs():
    """Yields (name, overrides) of each run, one seed of all encodings after the other."""
    for seed in (1, 2, 3):
        for point in product({"seed": (seed,), "variant": KINDS}):
            yield f"{point['variant']}-{seed}", point
        yield f"rotary_yarn-{seed}", {"seed": seed, "variant": "rotary", "encoding.scaling": "yarn"}
