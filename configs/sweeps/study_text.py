"""The study on text: every encoding with the parts that it can take, all chosen by the same number of trials.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_text.py --workdir=runs/study_text --jobs=2 \
        --results=docs/results/study_text_fair.json
    python -m seqpe_jax.report --workdir=runs/study_text --output=runs/study_text/report

Trained on 64 bytes for 1000 steps, evaluated at 64 to 4096 bytes of the test split, in windows of each length and on the
same bytes under each context. Each encoding has twelve trials with seed 0: without a part; with rotary pairs, gates that
start open, a head without position, or log scaling; with the best two of these together; at other learning rates; and with
other values of the constant that its authors chose for their own windows. SeqPE has the same twelve, and its constants are
forms of the contrastive loss. Each trial starts from the best one so far; the loss on the validation split at 256 bytes,
four times the training length, decides. Then come five seeds of the encodings in the README's plot, of the others three.
The forms of scaled RoPE train as RoPE does; extend_context.py compares them.
Hardware: two CPU cores, one for each of two runs at once; about seven hours, the strongest encodings first.
"""

from seqpe_jax.sweeps import fair_study, product

CONFIG = "configs/stdlib_lm.py"
SHOWN = ("seqpe", "fox", "cable", "alibi", "rotary", "scale_invariant")
OTHER = ("rope_id", "kerple", "fire", "t5", "pope", "rotary_mixed", "learned", "sinusoidal", "none", "seqpe_paper")
SEEDS = {"kerple": (1, 2, 3, 4, 5)}  # it has the best mean of three seeds, and so a place in the plot
PAIRS = {"encoding.rotary_pairs": 4}
OPEN = {"encoding.gate_bias_init": 4.0}
GATE = {"encoding.gate": "forget", **OPEN}
FREE_HEAD = {"encoding.position_heads": 3}
LOG_SCALING = {"encoding.log_scaling": True}
PARTS = {"pairs": PAIRS, "gate": GATE, "open_gate": OPEN, "free_head": FREE_HEAD, "log_scaling": LOG_SCALING}
USUAL = ("pairs", "gate", "free_head", "log_scaling")
# Of those that cannot take all: a second rotation or gate, or heads without position where it is added to the tokens.
TAKES = {
    "fox": ("pairs", "open_gate", "log_scaling"),
    "cable": ("pairs", "open_gate", "log_scaling"),
    "none": ("pairs", "log_scaling"),  # with a gate it is FoX
    "learned": ("pairs", "gate", "log_scaling"),
    "sinusoidal": ("pairs", "gate", "log_scaling"),
    "pope": ("gate", "free_head", "log_scaling"),
    "rope_id": ("pairs", "gate", "free_head"),  # it scales logits by length itself
    "rotary_mixed": ("gate", "free_head", "log_scaling"),
}
RATES = {"optimizer.learning_rate": (4e-3, 2e-3, 8e-3, 2.8e-3, 5.6e-3, 1e-3, 1.6e-2, 1.4e-3, 1.1e-2)}


# Lengths of other papers and what derives from one, from the authors' share (config/encodings.py) to their number.
CONSTANTS = {
    "seqpe": [
        {"objective.contrastive.space": "vectors", "objective.contrastive.weight": 0.1},
        {"objective.contrastive.space": "vectors", "objective.contrastive.weight": 0.02},
        {"objective.contrastive.space": "logits", "objective.contrastive.weight": 0.02},
    ],
    "fox": product({"encoding.rotary_pairs": (6, 8)}),
    "none": product({"encoding.rotary_pairs": (6, 8)}),
    "cable": product({"encoding.rotary_pairs": (6, 8)}),
    "rotary": product({"encoding.theta": (100.0, 1000.0)}),
    "rotary_mixed": product({"encoding.theta": (100.0, 1000.0)}),
    "sinusoidal": product({"encoding.theta": (100.0, 1000.0)}),
    "pope": product({"encoding.theta": (100.0, 1000.0)}),
    "rope_id": product({"encoding.slowest_period": (16.0, 64.0)}),
    "alibi": product({"encoding.slope_scale": (0.5, 2.0)}),
    "kerple": product({"encoding.kerple_scale": (0.3, 3.0)}),
    "fire": product({"encoding.fire_threshold": (16.0, 128.0)}),
    "t5": product({"encoding.t5_max_distance": (64, 128)}),
    "scale_invariant": product({"encoding.scale_invariant_tau": (1.0, 3.0)}),
}
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
EVALUATED = {"eval.lengths": LENGTHS, "eval.contexts": (64, 256, 1024, 4096), "eval.targets": 4096}
TUNING = {"seed": 0, "eval.every": 1000, "eval.lengths": (64, 256)}


def runs():
    """Yields (name, overrides) of each run: both stages of the shown encodings, then of one other after the other."""
    names = (*SHOWN, *OTHER)
    variants = {name: {"variant": name, "steps": 1000, **EVALUATED} for name in names}
    variants["seqpe"] |= {"variant": "seqpe_logits", "encoding.rotary_pairs": 0}  # pairs are a part, as for the others
    yield from fair_study(
        ((SHOWN, (1, 2, 3, 4, 5)), *(((name,), SEEDS.get(name, (1, 2, 3))) for name in OTHER)),
        variants,
        PARTS,
        {name: TAKES.get(name, USUAL) for name in names},
        RATES,
        constants=CONSTANTS,
        trials=12,
        tuning_overrides=TUNING,
        minimise="eval/loss@256",
    )
