"""A better recipe for SeqPE on questions, sought after study_questions.py: nine trials, three seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/seqpe_questions_recipe.py --workdir=runs/seqpe_questions_recipe --jobs=2 \
        --results=docs/results/study_questions_recipe.json
    python -m seqpe_jax.report --results=docs/results/study_questions_recipe.json --output=runs/seqpe_questions_recipe/report

The first trial is the recipe that SeqPE chose in study_questions.py: forget gates that start open, and one head of four
without a position. There the contrastive loss on logits leaves no head with a position flat enough to find answers far
away: at 505 tokens the flattest loses 9 nats, where KERPLE's loses 0.02, and one seed of three has no other head that looks
so far. Tried, each alone: factors of the heads that differ more; a weaker contrastive loss; log scaling; rotary pairs in
the heads with a position. Then the best two together, a lower learning rate, and a position in two heads or in one, without
pairs, each from the best trial so far. Data, steps, seeds, evaluations and the loss that decides are those of
study_questions.py.
Hardware: two CPU cores, one for each of two runs at once; about an hour.
"""

from seqpe_jax.sweeps import choose_parts_then_repeat

CONFIG = "configs/stdlib_qa.py"
SCALES = "objective.contrastive.head_scales"
FIRST = {
    "variant": "seqpe",
    "eval.examples": 519,
    "encoding.rotary_pairs": 0,
    "encoding.rotary_heads": 0,
    "encoding.position_heads": 3,
    "encoding.log_scaling": False,
    "encoding.gate": "forget",
    "encoding.gate_bias_init": 4.0,
    SCALES: (1.0, 4.0, 16.0),
}
PARTS = {
    "wide_scales": {SCALES: (1.0, 16.0, 256.0)},
    "weak_contrastive": {"objective.contrastive.weight": 0.02},
    "log_scaling": {"encoding.log_scaling": True},
    "pairs": {"encoding.rotary_pairs": 4, "encoding.rotary_heads": 3},
}
RATES = {"optimizer.learning_rate": (3e-3, 2.1e-3)}
MORE = [
    {"encoding.position_heads": 2, "encoding.rotary_heads": 0, "encoding.rotary_pairs": 0, SCALES: (1.0, 16.0)},
    {"encoding.position_heads": 1, "encoding.rotary_heads": 0, "encoding.rotary_pairs": 0, SCALES: (16.0,)},
]


def runs():
    """Yields (name, overrides) of each run."""
    yield from choose_parts_then_repeat(
        {"seqpe_recipe": FIRST},
        {"seqpe_recipe": PARTS},
        RATES,
        trials=9,
        tuning_overrides={"seed": 0, "steps": 2400, "eval.every": 2400, "eval.lengths": (128, 512)},
        seeds={"seqpe_recipe": (1, 2, 3)},
        minimise="eval/loss@512",
        constants={"seqpe_recipe": MORE},
    )
