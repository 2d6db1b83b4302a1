"""SeqPE on text with windows across carries: trials of their share, then five seeds of the best.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/carries.py --workdir=runs/carries --jobs=2 \
        --results=docs/results/study_carries.json
    python -m seqpe_jax.report --results=docs/results/study_carries.json --output=runs/carries/report

From 999 to 1000 all digits change. By chance 6% of the shifted windows of 64 bytes straddle such a carry, and losses rise for
about twenty bytes after it. objective.shift.carries is the share of the shifted windows that do. The loss on the validation split at 4096
bytes, with seed 0, chooses the share. Data, steps, seeds and evaluations are those of study_text.py, the other fields those of
its row `seqpe`, the default of the config.
Hardware: two CPU cores, one for each of two runs at once; about 15 minutes.
"""

from seqpe_jax.sweeps import tune_then_repeat

CONFIG = "configs/stdlib_lm.py"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)


def runs():
    """Yields (name, overrides) of each run."""
    seqpe = {
        "variant": "seqpe",
        "steps": 1000,
        "eval.lengths": LENGTHS,
        "eval.contexts": (64, 256, 1024, 4096),
        "eval.targets": 4096,
    }
    yield from tune_then_repeat(
        {"seqpe_carries": seqpe},
        {"objective.shift.carries": (0.0, 0.25, 0.5, 1.0)},
        tuning_overrides={"seed": 0, "eval.every": 1000, "eval.lengths": (64, 256, 4096)},
        seeds=(1, 2, 3, 4, 5),
        minimise="eval/loss@4096",
    )
