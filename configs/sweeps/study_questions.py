"""The study on questions: every encoding that texts can take, each at the learning rate that is its own best, three seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_questions.py --workdir=runs/study_questions --jobs=2
    python -m seqpe_jax.report --workdir=runs/study_questions --output=runs/study_questions/report

Trained on 128 bytes for the 4800 steps of configs/stdlib_qa.py, evaluated at 128 to 1024 on 400 questions of the test
split. In the first stage each encoding trains at three rates with seed 0; the loss of the answers on the validation split
at the end decides, at 128 bytes. Then come seeds 1 to 3 at that rate. questions.py is a smaller study, of nine encodings at
one rate for all, whose results are stored. Left out are `rotary_axial`, which over one axis is `rotary`, and the forms of
scaled RoPE.
Hardware: two CPU cores, one for each of two runs at once; by the times of questions.py about eighteen hours for 90 runs,
eight of them for the 42 of the seven strongest encodings, which come first.
"""

from seqpe_jax.sweeps.points import two_stages

CONFIG = "configs/stdlib_qa.py"
STRONG = ("seqpe", "alibi", "rotary", "fox", "kerple", "cable", "fire")
OTHER = ("rotary_partial", "scale_invariant", "pope", "t5", "rotary_mixed", "learned", "sinusoidal", "none")
RATES = {"optimizer.learning_rate": (1.5e-3, 3e-3, 6e-3)}
TRIAL = {"seed": 0, "eval.every": 4800, "eval.lengths": (128,)}


def runs():
    """Yields (name, overrides) of each run: of the strong encodings both stages, then of the others."""
    strong, other = ({kind: {"variant": kind} for kind in kinds} for kinds in (STRONG, OTHER))
    for ways in (strong, other):
        yield from two_stages(ways, RATES, minimise="eval/loss@128", trial=TRIAL, seeds=(1, 2, 3))
