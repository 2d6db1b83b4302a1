"""The strongest encodings of texts at a second scale: trained on 256 bytes with four layers of width 192.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/extrapolation_larger.py --workdir=runs/extrapolation_larger
    python -m seqpe_jax.report --workdir=runs/extrapolation_larger --output=runs/extrapolation_larger/report

Evaluated at 256 to 16,384 bytes; 1000 steps of 8 windows, three seeds, seed by seed. Fields in proportion to the window or
the width of a head grow with them: rotary pairs are those whose period is shorter than the window (ten of 24), SeqPE's
features are 16 wide, and its candidates lie within 2048 tokens. The learning rate is lower by sqrt(2), since the width is
larger by 2, for all encodings. FoX, CABLE and ALiBi have the rotary pairs, FoX and CABLE gates that start open,
as `seqpe` has; `seqpe_logits` has none.
Hardware: two CPU cores; about fifteen minutes a run, nine hours in all. docs/results/extrapolation_larger.csv holds seed 1
of four of them; its `seqpe` is `seqpe_logits`.
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
    "optimizer.learning_rate": (2.8e-3,),
}
SEQPE = {
    "encoding.max_position": 20_000,
    "encoding.width": 192,
    "encoding.feature_width": 16,
    "objective.contrastive.window": 2048,
}
PAIRS = {"encoding.rotary_pairs": 10}
OPEN = {"encoding.gate_bias_init": 4.0}
VARIANTS = {
    "seqpe": {"variant": "seqpe", **SEQPE, **PAIRS},
    "seqpe_logits": {"variant": "seqpe_logits", **SEQPE, **PAIRS},
    "fox": {"variant": "fox", **PAIRS, **OPEN},
    "cable": {"variant": "cable", **PAIRS, **OPEN},
    "alibi_pairs": {"variant": "alibi", **PAIRS},
    "rotary": {"variant": "rotary"},
    "rotary_partial": {"variant": "rotary_partial", **PAIRS},
    "kerple": {"variant": "kerple"},
    "alibi": {"variant": "alibi"},
}


def runs():
    """Yields (name, overrides) of each run."""
    for point in product({"seed": (1, 2, 3)}, LARGER):
        for name, variant in VARIANTS.items():
            yield f"{name}-{point['seed']}", point | variant
