"""A search, not a grid: learning rate and SeqPE's weights on the quickstart's task, by validation at 4 times the length.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/search.py --workdir=runs/search --executor=optuna --jobs=2

Sixteen trials of 600 steps at most; those that do worse than the median at the same step are stopped. The best is
evaluated on the test split. Needs `pip install optuna`.
Hardware: two CPU cores, one for each of two trials at once; about 20 minutes.
"""

from seqpe_jax.sweeps import Range, Search

CONFIG = "configs/stdlib_lm.py"
SEARCH = Search(
    ranges={
        "optimizer.learning_rate": Range(5e-4, 8e-3, log=True),
        "objective.contrastive.weight": Range(0.01, 1.0, log=True),
        "objective.shift.rate": Range(0.0, 0.6),
        "encoding.qk": ("single", "multi"),
    },
    overrides={"steps": 600, "eval.every": 100, "eval.lengths": (64, 256), "eval.tokens": 16384},
    minimise="eval/bits_per_byte@256",
    trials=16,
)
