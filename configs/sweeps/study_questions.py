"""The study on questions: the six strongest encodings with the parts that they can take, three seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_questions.py --workdir=runs/study_questions --jobs=2 \
        --results=docs/results/study_questions.json
    python -m seqpe_jax.report --workdir=runs/study_questions --output=runs/study_questions/report

Trained on 128 bytes for the 4800 steps of configs/stdlib_qa.py, evaluated at 128 to 1024 on all 519 questions of the test
split. Each encoding has twelve trials of 2400 steps with seed 0, as in study_text.py: without a part, with each part alone,
with the best two together, then learning rates and constants. The loss of the answers on the validation split at 512 bytes,
four times the training length, decides.
Hardware: two CPU cores, one for each of two runs at once; about six hours for 90 runs. SeqPE comes first, then the encodings
that were closest to it in single runs.
"""

from seqpe_jax.sweeps import fair_study, product

CONFIG = "configs/stdlib_qa.py"
KINDS = ("seqpe", "alibi", "cable", "fox", "rotary", "kerple")
PAIRS = {"encoding.rotary_pairs": 4}
OPEN = {"encoding.gate_bias_init": 4.0}
PARTS = {
    "pairs": PAIRS,
    "gate": {"encoding.gate": "forget", **OPEN},
    "open_gate": OPEN,
    "free_head": {"encoding.position_heads": 3},
    "log_scaling": {"encoding.log_scaling": True},
}
USUAL = ("pairs", "gate", "free_head", "log_scaling")
TAKES = dict.fromkeys(("fox", "cable"), ("pairs", "open_gate", "log_scaling"))
RATES = {"optimizer.learning_rate": (3e-3, 1.5e-3, 6e-3, 2.1e-3, 4.2e-3, 8e-4, 1.2e-2)}
SCALES = "objective.contrastive.head_scales"  # of SeqPE's contrastive loss on logits, one for each head with a position
# Lengths of other papers and what derives from one; of SeqPE forms of the contrastive loss.
CONSTANTS = {
    "seqpe": [
        {"objective.contrastive.space": "vectors", SCALES: (), "objective.contrastive.weight": 0.1},
        {"objective.contrastive.space": "vectors", SCALES: (), "objective.contrastive.weight": 0.02},
    ],
    "rotary": product({"encoding.theta": (100.0, 1000.0)}),
    "alibi": product({"encoding.slope_scale": (0.5, 2.0)}),
    "kerple": product({"encoding.kerple_scale": (0.3, 3.0)}),
    "fox": product({"encoding.rotary_pairs": (6, 8)}),
    "cable": product({"encoding.rotary_pairs": (6, 8)}),
}
# Half of the steps of a run, for all alike: 90 runs take six hours instead of ten. It favors what learns to look up early.
TUNING = {"seed": 0, "steps": 2400, "eval.every": 2400, "eval.lengths": (128, 512)}
# SeqPE's page has its parts on; here it begins without them, as the others do.
WITHOUT_PARTS = {
    "encoding.rotary_pairs": 0,
    "encoding.rotary_heads": 0,
    "encoding.position_heads": 0,
    "encoding.log_scaling": False,
    SCALES: (),
}


def runs():
    """Yields (name, overrides) of each run."""
    variants = {kind: {"variant": kind, "eval.examples": 519} for kind in KINDS}
    variants["seqpe"] |= WITHOUT_PARTS
    yield from fair_study(
        ((KINDS, (1, 2, 3)),),
        variants,
        PARTS,
        {kind: TAKES.get(kind, USUAL) for kind in KINDS},
        RATES,
        own_parts={"seqpe": {"free_head": PARTS["free_head"] | {SCALES: (1.0, 4.0, 16.0)}}},
        constants=CONSTANTS,
        trials=12,
        tuning_overrides=TUNING,
        minimise="eval/loss@512",
    )
