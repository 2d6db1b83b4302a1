"""The strongest encodings of the fair study on text at a second scale: four layers of width 192, windows of 256 bytes.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation_larger.py --workdir=runs/extrapolation_larger --jobs=2 \
        --results=docs/results/study_second_scale.json
    python -m seqpe_jax.report --results=docs/results/study_second_scale.json --output=runs/extrapolation_larger/report

Each encoding has the parts and constants that it chose in study_text.py; nothing is chosen again. 1000 steps of 8 windows,
three seeds, seed by seed, evaluated at 256 to 16,384 bytes. Fields in proportion to the window or the width of a head grow
with them: ten rotary pairs of 24 have a period shorter than the window, SeqPE's features are 16 wide and its
candidates lie within 2048 bytes, and RoPE's longest wavelength is four times as long. Learning rates are those that the
encodings chose, lower by sqrt(2), since the width is larger by 2.
Hardware: two CPU cores, one for each of two runs at once; five to fifteen minutes a run, two to three hours in all.
"""

from seqpe_jax.sweeps import product

CONFIG = "configs/stdlib_lm.py"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
LARGER = {
    "steps": (1000,),
    "batch_size": (8,),
    "data.length": (256,),
    "eval.lengths": (LENGTHS,),
    "eval.contexts": ((256, 1024, 4096, 16384),),
    "eval.targets": (4096,),
    "model.layers": (4,),
    "model.width": (192,),
}
RATE = "optimizer.learning_rate"
PAIRS = {"encoding.rotary_pairs": 10}
OPEN = {"encoding.gate_bias_init": 4.0}
GATE = {"encoding.gate": "forget", **OPEN}
VARIANTS = {
    "seqpe": {
        RATE: 2.8e-3,
        "encoding.max_position": 20_000,
        "encoding.width": 96,
        "encoding.feature_width": 16,
        "objective.contrastive.window": 2048,
        **PAIRS,
    },
    "kerple": {RATE: 2.8e-3, "encoding.kerple_scale": 0.3, **PAIRS, **GATE},
    "alibi": {RATE: 2.8e-3, **PAIRS, **GATE},
    "cable": {RATE: 2.8e-3, **PAIRS, **OPEN},
    "fox": {RATE: 4e-3, **PAIRS, **OPEN},
    "rotary": {RATE: 2e-3, "encoding.theta": 400.0, **GATE},
}


def runs():
    """Yields (name, overrides) of each run."""
    for point in product({"seed": (1, 2, 3)}, LARGER):
        for name, variant in VARIANTS.items():
            yield f"{name}-{point['seed']}", point | {"variant": name} | variant
