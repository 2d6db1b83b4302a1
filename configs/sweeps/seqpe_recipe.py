"""SeqPE's best recipe on text, sought with the budget that every encoding has in study_text.py: twelve trials, five seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/seqpe_recipe.py --workdir=runs/seqpe_recipe --jobs=2 \
        --results=docs/results/study_seqpe_recipe.json
    python -m seqpe_jax.report --results=docs/results/study_seqpe_recipe.json --output=runs/seqpe_recipe/report

The first trial has four rotary pairs, forget gates that start open, with the logit, and the paper's contrastive loss, on
vectors. Then come, each alone: six pairs; the logit in two of four heads; positions drawn at random and sorted (Ruoss et
al. 2023, arXiv 2305.16843: `skip` with as many chunks as tokens) in half of the steps; a weaker contrastive loss; and its
candidates from the training length. The best two together, learning rates, and three more values follow, each from the
best trial so far; the loss on the validation split at 256 bytes decides. Data, steps, seeds and evaluations are those of
study_text.py, so that benchmarks/results.py shows the row in the tables of that study.
Hardware: two CPU cores, one for each of two runs at once; about 40 minutes.
"""

from seqpe_jax.sweeps import choose_parts_then_repeat

CONFIG = "configs/stdlib_lm.py"
WEIGHT = "objective.contrastive.weight"
FIRST = {
    "variant": "seqpe_logits",
    "steps": 1000,
    "encoding.rotary_pairs": 4,
    "encoding.gate": "forget",
    "encoding.gate_bias_init": 4.0,
    "objective.contrastive.space": "vectors",
    "eval.lengths": (64, 128, 256, 512, 1024, 2048, 4096),
    "eval.contexts": (64, 256, 1024, 4096),
    "eval.targets": 4096,
}
PARTS = {
    "six_pairs": {"encoding.rotary_pairs": 6},
    "half_heads": {"encoding.position_heads": 2},
    "random_positions": {"objective.skip.rate": 0.5, "objective.skip.chunks": 64},
    "weak_contrastive": {WEIGHT: 0.02},
    "near_candidates": {"objective.contrastive.window": 64},
}
RATES = {"optimizer.learning_rate": (4e-3, 2e-3, 2.8e-3)}
MORE = [{"objective.distillation.weight": 0.0}, {"objective.shift.rate": 0.1}, {"encoding.gate_bias_init": 6.0}]


def runs():
    """Yields (name, overrides) of each run."""
    yield from choose_parts_then_repeat(
        {"seqpe_recipe": FIRST},
        {"seqpe_recipe": PARTS},
        RATES,
        trials=12,
        tuning_overrides={"seed": 0, "eval.every": 1000, "eval.lengths": (64, 256)},
        seeds={"seqpe_recipe": (1, 2, 3, 4, 5)},
        minimise="eval/loss@256",
        constants={"seqpe_recipe": MORE},
    )
