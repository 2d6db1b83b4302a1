"""Sizes beyond training on drawn letters and digits: eight encodings of grids, three seeds each.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_glyphs.py --workdir=runs/study_glyphs --jobs=2 \
        --results=docs/results/study_glyphs.json
    python -m seqpe_jax.report --workdir=runs/study_glyphs --output=runs/study_glyphs/report

Trained at 32 x 32 pixels for the 1,500 steps of configs/glyphs_vit.py, evaluated at 32 to 128 on the 1,512 drawings of the test
split, whose font families are in no other split. Every encoding that has positions between whole numbers trains half of its
steps on enlarged crops (zoom); `learned` is interpolated, and trained on crops of the same sizes; `fire_signed` is FIRE with the
signed displacement along each axis. Settings are those of the config, with one learning rate for all.
Hardware: two CPU cores, one for each of two runs at once. All 24 runs took 2.6 hours on an AMD EPYC.
"""

from seqpe_jax.sweeps import product

CONFIG = "configs/glyphs_vit.py"
ENCODINGS = ("seqpe", "rotary_mixed", "rotary_axial", "lookhere", "pape", "fire_signed", "learned", "sinusoidal")
OF_ROW = {
    "learned": {"data.augment.crop_scale": (0.3, 1.0)},
    "fire_signed": {"encoding.fire_signed": True},
}


def runs():
    """Yields (name, overrides) of each run, one seed after the other."""
    for point in product({"seed": (1, 2, 3), "variant": ENCODINGS}):
        row = point["variant"]
        yield f"{row}-{point['seed']}", point | {"variant": row.removesuffix("_signed")} | OF_ROW.get(row, {})
