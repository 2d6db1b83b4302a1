"""Which encoding reads images larger than it was trained on: all that take grids, three seeds each, on handwritten digits.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/digits.py --workdir=runs/digits_sweep --jobs=2
    python -m seqpe_jax.report --workdir=runs/digits_sweep --output=runs/digits_sweep/report

Trained at 8 x 8 pixels for 800 steps as the config's page says, evaluated at 8 to 32. Encodings that take positions between
whole numbers all train on the same zoomed parts of images; the learned table, which is stretched with the image, has been
tried with and without crops of the same sizes (`learned_crops`). `rotary` numbers the patches row by row.
Hardware: two CPU cores, one for each of two runs at once; about 45 minutes.
"""

from seqpe_jax.sweeps.points import product

CONFIG = "configs/digits_vit.py"
KINDS = ("seqpe", "learned", "rotary_axial", "rotary_mixed", "sinusoidal", "seqpe_paper", "rotary", "none")


def runs():
    """Yields (name, overrides) of each run, one seed of all encodings after the other."""
    for point in product({"seed": (1, 2, 3), "variant": KINDS}):
        yield f"{point['variant']}-{point['seed']}", point
        if point["variant"] == "learned":
            yield f"learned_crops-{point['seed']}", point | {"data.augment.crop_scale": (0.3, 1.0)}
