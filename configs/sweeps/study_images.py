"""The study on images: every encoding that grids can take, each at the learning rate that is its own best, three seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_images.py --workdir=runs/study_images --jobs=2
    python -m seqpe_jax.report --workdir=runs/study_images --output=runs/study_images/report

Trained at 8 x 8 pixels for the 800 steps of configs/digits_vit.py, evaluated at 8 to 32 on the 269 images of the test
split. In the first stage each encoding trains at three rates with seed 0; the loss on the validation split at the end
decides, at 8 x 8. An encoding with a constant that its authors chose for their own grids tries three values of it at each
rate. Then come seeds 1 to 3 at the best rate and constant. `learned_crops` is the interpolated table trained on crops of the
sizes that the others see as zoomed parts; `rotary` numbers the patches row by row.
Hardware: two CPU cores, one for each of two runs at once; about two and a half hours for 114 runs, the strongest encodings
first. docs/results/study_images.json holds the runs of the study before it searched constants.
"""

from seqpe_jax.sweeps import tune_then_repeat

CONFIG = "configs/digits_vit.py"
STRONG = ("seqpe", "rotary_mixed", "rotary_axial", "sinusoidal", "lookhere", "fire", "alibi_grid")
OTHER = ("learned", "seqpe_paper", "rotary", "none")
RATES = {"optimizer.learning_rate": (1e-3, 2e-3, 4e-3)}
# Lengths of other papers and what derives from one, from the authors' number to their share of a 4 x 4 grid.
CONSTANTS = {
    "rotary_mixed": {"encoding.theta": (10.0, 30.0, 100.0)},
    "rotary_axial": {"encoding.theta": (10.0, 30.0, 100.0)},
    "sinusoidal": {"encoding.theta": (10.0, 30.0, 100.0)},
    "rotary": {"encoding.theta": (100.0, 1000.0, 10000.0)},
    "alibi_grid": {"encoding.slope_scale": (0.5, 1.0, 2.0)},
    "lookhere": {"encoding.directed_heads": (2, 3, 4)},
    "fire": {"encoding.fire_scale": (0.1, 3.0, 36.0)},
}
TUNING = {"seed": 0, "eval.every": 800, "eval.sizes": (8,)}


def runs():
    """Yields (name, overrides) of each run: of the strong encodings both stages, then of the others."""
    strong, other = ({kind: {"variant": kind} for kind in kinds} for kinds in (STRONG, OTHER))
    other |= {"learned_crops": {"variant": "learned", "data.augment.crop_scale": (0.3, 1.0)}}
    for variants in (strong, other):
        constants = {kind: values for kind, values in CONSTANTS.items() if kind in variants}
        yield from tune_then_repeat(
            variants, RATES, minimise="eval/loss@8", tuning_overrides=TUNING, seeds=(1, 2, 3), constants=constants
        )
