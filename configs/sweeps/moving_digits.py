"""Which encoding reads videos that are longer and larger than those of training: all that take grids, three seeds or five.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/moving_digits.py --workdir=runs/moving --jobs=2
    python -m seqpe_jax.report --workdir=runs/moving --output=runs/moving/report

Trained on four frames of 16 x 16 pixels as the config's page says, evaluated on four and eight frames of 16, 24 and 32.
Encodings that take positions between whole numbers all train on the same zoomed parts of frames; the learned table is
interpolated with the video, in time and space. Seeds differ by up to ten points here, so the first four encodings have five.
Hardware: two CPU cores, one for each of two runs at once.
"""

from seqpe_jax.sweeps import product

CONFIG = "configs/moving_digits_vit.py"
# Those that know the grid and can be read between its places come first, with all their seeds.
STRONG, OTHER = ("seqpe", "rotary_axial", "rotary_mixed", "learned"), ("lookhere", "sinusoidal", "seqpe_paper", "none")


def runs():
    """Yields (name, overrides) of each run, one seed of all encodings after the other."""
    for kinds, seeds in ((STRONG, (1, 2, 3, 7, 8)), (OTHER, (1, 2, 3))):
        for point in product({"seed": seeds, "variant": kinds}):
            yield f"{point['variant']}-{point['seed']}", point
