"""The same question at a second scale: trained on 256 bytes with four layers of width 192, evaluated at 256 to 16 384.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation_larger.py --workdir=runs/extrapolation_larger
    python -m seqpe_jax.report --workdir=runs/extrapolation_larger --output=runs/extrapolation_larger/report

One seed, 1000 steps of 8 windows. What stands in proportion to the window or to the width of a head grows with them: all
pairs whose period is shorter than the window turn (ten of the twenty-four), SeqPE's parts are 16 wide, and its candidates
lie within 2048 places. The learning rate is lower by sqrt(2), as the width is larger by 2, for all encodings.
Hardware: two CPU cores; about an hour.
"""

from seqpe_jax.sweeps import product

CONFIG = "configs/stdlib_lm.py"
KINDS = ("seqpe", "rotary", "rotary_partial", "alibi")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
LARGER = {
    "seed": (1,),
    "steps": (1000,),
    "batch_size": (8,),
    "data.length": (256,),
    "eval.lengths": (LENGTHS,),
    "eval.contexts": ((256, 1024, 4096, 16384),),
    "eval.targets": (4096,),
    "model.layers": (4,),
    "model.width": (192,),
    "optimizer.learning_rate": (2.8e-3,),
}
SEQPE = {
    "encoding.max_position": 20_000,
    "encoding.width": 192,
    "encoding.feature_width": 16,
    "objective.contrastive.window": 2048,
}
PARTIAL_ROTARY = {"encoding.rotary_pairs": 10}


def runs():
    """Yields (name, overrides) of each run."""
    for point in product({"variant": KINDS}, LARGER):
        kind = point["variant"]
        point |= (SEQPE if kind == "seqpe" else {}) | (PARTIAL_ROTARY if kind in ("seqpe", "rotary_partial") else {})
        yield f"{kind}-{point['seed']}", point
