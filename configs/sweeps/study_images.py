"""The study on images: every encoding that grids can take, each at the learning rate that is its own best, three seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_images.py --workdir=runs/study_images --jobs=2
    python -m seqpe_jax.report --workdir=runs/study_images --output=runs/study_images/report

Trained at 8 x 8 pixels for the 800 steps of configs/digits_vit.py, evaluated at 8 to 32 on the 269 images of the test
split. In the first stage each encoding trains at three rates with seed 0; the loss on the validation split at the end
decides, at 8 x 8. Then come seeds 1 to 3 at that rate. `learned_crops` is the stretched table trained on crops of the sizes
that the others see as zoomed parts; `rotary` numbers the patches row by row.
Hardware: two CPU cores, one for each of two runs at once; about an hour and a half for 72 runs, the strongest encodings
first. What they have measured stands in docs/results/study_images.json, with which --results goes on.
"""

from seqpe_jax.sweeps.points import two_stages

CONFIG = "configs/digits_vit.py"
STRONG = ("seqpe", "rotary_mixed", "rotary_axial", "sinusoidal", "lookhere", "fire", "alibi_grid")
OTHER = ("learned", "seqpe_paper", "rotary", "none")
RATES = {"optimizer.learning_rate": (1e-3, 2e-3, 4e-3)}
TRIAL = {"seed": 0, "eval.every": 800, "eval.sizes": (8,)}


def runs():
    """Yields (name, overrides) of each run: of the strong encodings both stages, then of the others."""
    strong, other = ({kind: {"variant": kind} for kind in kinds} for kinds in (STRONG, OTHER))
    other |= {"learned_crops": {"variant": "learned", "data.augment.crop_scale": (0.3, 1.0)}}
    for ways in (strong, other):
        yield from two_stages(ways, RATES, minimise="eval/loss@8", trial=TRIAL, seeds=(1, 2, 3))
