"""The study on images: every encoding that grids can take, all with the same parts to choose from and equal trials.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_images.py --workdir=runs/study_images --jobs=2 \
        --results=docs/results/study_images_fair.json
    python -m seqpe_jax.report --workdir=runs/study_images --output=runs/study_images/report

Trained at 8 x 8 pixels for the 800 steps of configs/digits_vit.py, evaluated at 8 to 32 on the 269 images of the test
split. Each encoding has twelve trials with seed 0, as in study_text.py: without a part; with zoom (enlarged crops whose
patches keep their positions), rotary pairs, a head without position, or log scaling; with the best two of these together;
then learning rates and constants. The loss on the validation split at 16 x 16, twice the training size, decides. Then come
five seeds of the first encodings, three of the others. `learned_crops` is the interpolated table trained on crops of the
sizes that others see as zoomed parts; `rotary` numbers the patches row by row; `fire_signed` is FIRE with the signed
displacement along each axis.
Hardware: two CPU cores, one for each of two runs at once; two to five hours for 220 runs, the strongest encodings first.
docs/results/study_images.json holds the runs of a study that offered these parts to some encodings alone.
"""

from seqpe_jax.sweeps import fair_study, product

CONFIG = "configs/digits_vit.py"
SHOWN = ("seqpe", "rotary_mixed", "rotary_axial", "sinusoidal", "lookhere")
OTHER = ("pape", "fire_signed", "fire", "alibi_grid", "learned", "learned_crops", "seqpe_paper", "rotary", "none")
PARTS = {
    "zoom": {"objective.zoom.rate": 0.5},
    "pairs": {"encoding.rotary_pairs": 6},
    "free_head": {"encoding.position_heads": 3},
    "log_scaling": {"encoding.log_scaling": True},
}
# Of those that cannot take all: integer positions only, pairs of their own, or added to the tokens.
TAKES = {
    "rotary_mixed": ("zoom", "free_head", "log_scaling"),
    "sinusoidal": ("zoom", "pairs", "log_scaling"),
    "learned": ("pairs", "log_scaling"),
    "learned_crops": ("pairs", "log_scaling"),
    "seqpe_paper": ("pairs", "free_head"),  # its attn_mul scales the queries already
    "rotary": ("pairs", "free_head", "log_scaling"),
    "none": ("pairs", "log_scaling"),
}
RATES = {"optimizer.learning_rate": (2e-3, 1e-3, 4e-3, 1.4e-3, 2.8e-3, 5e-4, 8e-3, 7e-4, 5.6e-3)}


# Lengths of other papers and what derives from one, from the authors' number to their share of a 4 x 4 grid.
CONSTANTS = {
    "seqpe": product({"objective.contrastive.weight": (0.02, 0.5)}),
    "rotary_mixed": product({"encoding.theta": (10.0, 30.0)}),
    "rotary_axial": product({"encoding.theta": (10.0, 30.0)}),
    "sinusoidal": product({"encoding.theta": (10.0, 30.0)}),
    "rotary": product({"encoding.theta": (100.0, 1000.0)}),
    "alibi_grid": product({"encoding.slope_scale": (0.5, 2.0)}),
    "lookhere": product({"encoding.directed_heads": (2, 4)}),
    "pape": product({"encoding.parabolas": (4, 10)}),
    "fire_signed": product({"encoding.fire_scale": (3.0, 36.0)}),
    "fire": product({"encoding.fire_scale": (3.0, 36.0)}),
}
TUNING = {"seed": 0, "eval.every": 800, "eval.sizes": (8, 16)}


def runs():
    """Yields (name, overrides) of each run: both stages of the first encodings, then of one other after the other."""
    names = (*SHOWN, *OTHER)
    takes = {name: TAKES.get(name, PARTS) for name in names}
    variants = {name: {"variant": name.removesuffix("_crops").removesuffix("_signed")} for name in names}
    variants["fire_signed"]["encoding.fire_signed"] = True
    variants["learned_crops"]["data.augment.crop_scale"] = (0.3, 1.0)
    for name in names:
        if "zoom" in takes[name]:  # the config file has it on
            variants[name]["objective.zoom.rate"] = 0.0
    yield from fair_study(
        ((SHOWN, (1, 2, 3, 4, 5)), *(((name,), (1, 2, 3)) for name in OTHER)),
        variants,
        PARTS,
        takes,
        RATES,
        constants=CONSTANTS,
        trials=12,
        tuning_overrides=TUNING,
        minimise="eval/loss@16",
    )
