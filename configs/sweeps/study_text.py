"""The study on text: every encoding that texts can take, each at the learning rate that is its own best, three seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_text.py --workdir=runs/study_text --jobs=2
    python -m seqpe_jax.report --workdir=runs/study_text --output=runs/study_text/report

Trained on 64 bytes for 1000 steps, as extrapolation.py is, evaluated at 64 to 4096 bytes of the test split, in windows of
each length and on the same bytes under each context. In the first stage each encoding trains at three rates with seed 0,
and at a fourth where the best is at an end; the loss on the validation split at the end decides, at 64 bytes, as for
somebody who has no longer texts. An encoding with a constant that its authors chose for their own windows tries three
values of it at each rate, and one with gates how open they begin. Then come seeds 1 to 3 at the best rate and constant. The
forms of scaled RoPE train as RoPE does, so they take its rate. Over one axis `rotary_axial` is `rotary`, so it is left out.
Hardware: two CPU cores, one for each of two runs at once; about three and a half hours for 196 runs, the
strongest encodings first.
"""

from seqpe_jax.sweeps import tune_then_repeat

CONFIG = "configs/stdlib_lm.py"
STRONG = ("seqpe", "rotary", "alibi", "fox", "cable", "kerple", "fire")
OTHER = (
    "rotary_partial",
    "scale_invariant",
    "pope",
    "t5",
    "rotary_mixed",
    "seqpe_paper",
    "learned",
    "sinusoidal",
    "none",
)
SCALED = ("linear", "ntk", "yarn")
RATES = {"optimizer.learning_rate": (2e-3, 4e-3, 8e-3)}
# Of those whose best of the three is at an end.
EXTRA_RATES = {"fox": (1e-3,), "cable": (1e-3,), "seqpe_paper": (1e-3,), "kerple": (1.6e-2,), "t5": (1.6e-2,)}
# Lengths of other papers and what derives from one, from the authors' share (config/lengths.py) to their number.
CONSTANTS = {
    "rotary": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "rotary_log": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "rotary_mixed": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "sinusoidal": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "pope": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "alibi": {"encoding.slope_scale": (0.5, 1.0, 2.0)},
    "kerple": {"encoding.kerple_scale": (0.3, 1.0, 3.0)},
    "fire": {"encoding.fire_threshold": (16.0, 128.0, 512.0)},
    "t5": {"encoding.t5_max_distance": (32, 64, 128)},
    "scale_invariant": {"encoding.scale_invariant_tau": (1.0, 3.0, 10.0)},
    "fox": {"encoding.gate_bias_init": (0.0, 2.0, 4.0)},  # how open the gates begin
    "cable": {"encoding.gate_bias_init": (0.0, 2.0, 4.0)},
}
TUNING = {"seed": 0, "eval.every": 1000, "eval.lengths": (64,)}
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
EVALUATED = {"eval.lengths": LENGTHS, "eval.contexts": (64, 256, 1024, 4096), "eval.targets": 4096}


def runs():
    """Yields (name, overrides) of each run: of the strong encodings both stages, then of the others."""
    strong = {kind: {"variant": kind} for kind in STRONG}
    strong |= {"rotary_log": {"variant": "rotary", "encoding.log_scaling": True}}
    scaled = {f"rotary_{form}": {"variant": "rotary", "encoding.scaling": form} for form in SCALED}
    other = {kind: {"variant": kind} for kind in OTHER}
    same_as = dict.fromkeys(scaled, "rotary")
    for variants, own in ((strong | scaled, same_as), (other, {})):
        variants = {name: {"steps": 1000, **EVALUATED, **variant} for name, variant in variants.items()}
        extra_values = {name: rates for name, rates in EXTRA_RATES.items() if name in variants}
        constants = {name: values for name, values in CONSTANTS.items() if name in variants}
        yield from tune_then_repeat(
            variants,
            RATES,
            minimise="eval/loss@64",
            tuning_overrides=TUNING,
            seeds=(1, 2, 3),
            same_as=own,
            extra_values=extra_values,
            constants=constants,
        )
