"""Which encoding reads texts longer than it was trained on: eight encodings, three seeds each, on the quickstart's task.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation.py --workdir=runs/extrapolation --jobs=2
    python -m seqpe_jax.report --workdir=runs/extrapolation --output=runs/extrapolation/report

Trained on 64 bytes as the quickstart is, for 1000 of its 1500 steps, evaluated at 64 to 4096, in windows of each length and
on the same 4096 bytes under each context. Knobs were chosen with seed
0 on the validation split; these are three other seeds, on the test split. `rotary_partial` has the rotary pairs of `seqpe_logits`
alone; `seqpe_paper` is the form of the paper.
Hardware: two CPU cores, one for each of two runs at once; about 45 minutes.
"""

from seqpe_jax.sweeps import product

CONFIG = "configs/stdlib_lm.py"
KINDS = ("seqpe_logits", "rotary", "rotary_partial", "alibi", "seqpe_paper", "learned", "sinusoidal", "none")
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
EVALUATED = {"eval.lengths": (LENGTHS,), "eval.contexts": ((64, 256, 1024, 4096),), "eval.targets": (4096,)}


def runs():
    """Yields (name, overrides) of each run, one seed of all encodings after the other."""
    for point in product({"seed": (1, 2, 3), "variant": KINDS}, {"steps": (1000,)} | EVALUATED):
        yield f"{point['variant']}-{point['seed']}", point
