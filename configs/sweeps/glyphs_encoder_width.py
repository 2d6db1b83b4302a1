"""How wide SeqPE's encoder need be on drawn letters and digits: as wide as the model, half and a quarter of it.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/glyphs_encoder_width.py --workdir=runs/glyphs_encoder_width --jobs=2 \
        --results=docs/results/study_glyphs_encoder_width.json

A step of configs/glyphs_vit.py encodes 904 positions whatever its batch: with an encoder of width 96 it has 1.31 times the FLOPs of
RoPE's, with 48 1.11 times, with 24 1.05 times. Half of the steps of study_glyphs.py, a seed that it does not use, scored on
the validation split.
Hardware: two CPU cores, one for each of two runs at once.
"""

from seqpe_jax.sweeps import tune_then_repeat

CONFIG = "configs/glyphs_vit.py"


def runs():
    """Yields (name, overrides) of each run."""
    yield from tune_then_repeat(
        {"seqpe": {}},
        {"encoding.width": (24, 96, 48)},
        tuning_overrides={"seed": 0, "steps": 750, "eval.every": 750, "eval.sizes": (32, 48, 64, 96)},
        seeds=(),
        minimise="eval/loss@64",
    )
