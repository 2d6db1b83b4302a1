"""The study on questions: every encoding that texts can take, each at the learning rate that is its own best, three seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_questions.py --workdir=runs/study_questions --jobs=2
    python -m seqpe_jax.report --workdir=runs/study_questions --output=runs/study_questions/report

Trained on 128 bytes for the 4800 steps of configs/stdlib_qa.py, evaluated at 128 to 1024 on 400 questions of the test
split. In the first stage each encoding trains at three rates with seed 0; the loss of the answers on the validation split
at the end decides, at 128 bytes. An encoding with a constant that its authors chose for their own windows tries three
values of it at each rate. Then come seeds 1 to 3 at the best rate and constant. questions.py is a smaller study, of nine
encodings at one rate for all, whose results are stored. Left out are `rotary_axial`, which over one axis is `rotary`, and
the forms of scaled RoPE.
Hardware: two CPU cores, one for each of two runs at once; by the times of questions.py about thirty-two hours for 156
runs, fifteen of them for the 78 of the seven strongest encodings, which come first.
"""

from seqpe_jax.sweeps import tune_then_repeat

CONFIG = "configs/stdlib_qa.py"
STRONG = ("seqpe", "alibi", "rotary", "fox", "kerple", "cable", "fire")
OTHER = ("rotary_partial", "scale_invariant", "pope", "t5", "rotary_mixed", "learned", "sinusoidal", "none")
RATES = {"optimizer.learning_rate": (1.5e-3, 3e-3, 6e-3)}
# Lengths of other papers and what derives from one, from the authors' share (config/lengths.py) to their number.
CONSTANTS = {
    "rotary": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "rotary_mixed": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "sinusoidal": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "pope": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "alibi": {"encoding.slope_scale": (0.5, 1.0, 2.0)},
    "kerple": {"encoding.kerple_scale": (0.3, 1.0, 3.0)},
    "fire": {"encoding.fire_threshold": (32.0, 128.0, 512.0)},
    "t5": {"encoding.t5_max_distance": (32, 64, 128)},
    "scale_invariant": {"encoding.scale_invariant_tau": (1.0, 3.0, 10.0)},
    "fox": {"encoding.gate_bias_init": (0.0, 2.0, 4.0)},  # how open the gates begin
    "cable": {"encoding.gate_bias_init": (0.0, 2.0, 4.0)},
}
TUNING = {"seed": 0, "eval.every": 4800, "eval.lengths": (128,)}


def runs():
    """Yields (name, overrides) of each run: of the strong encodings both stages, then of the others."""
    strong, other = ({kind: {"variant": kind} for kind in kinds} for kinds in (STRONG, OTHER))
    for variants in (strong, other):
        constants = {kind: values for kind, values in CONSTANTS.items() if kind in variants}
        yield from tune_then_repeat(
            variants, RATES, minimise="eval/loss@128", tuning_overrides=TUNING, seeds=(1, 2, 3), constants=constants
        )
