"""A control for study_text.py: two of its strongest baselines with as many parameters as SeqPE, five seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/equal_parameters.py --workdir=runs/equal_parameters --jobs=2 \
        --results=docs/results/study_equal_parameters.json
    python -m seqpe_jax.report --results=docs/results/study_equal_parameters.json --output=runs/equal_parameters/report

SeqPE's encoder adds 80,688 parameters to the 361,452 of the others in study_text.py. Here ALiBi and CABLE have them in the
MLPs, 523 hidden features instead of 384. All other fields are those of their best trials in that study.
Hardware: two CPU cores, one for each of two runs at once; about ten minutes.
"""

CONFIG = "configs/stdlib_lm.py"
PARTS = {"encoding.rotary_pairs": 4, "encoding.gate_bias_init": 4.0, "optimizer.learning_rate": 4e-3}
ROWS = {"alibi": PARTS | {"encoding.gate": "forget"}, "cable": PARTS}
WIDER = {"model.mlp_width": 523}
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)


def runs():
    """Yields (name, overrides) of each run, one seed of both encodings after the other."""
    for seed in (1, 2, 3, 4, 5):
        for kind, parts in ROWS.items():
            yield (
                f"{kind}_wide-{seed}",
                {"variant": kind, "seed": seed, "steps": 1000, "eval.lengths": LENGTHS} | parts | WIDER,
            )
