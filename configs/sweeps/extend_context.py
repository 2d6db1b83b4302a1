"""How a trained RoPE model reads eight times its training length: YaRN, NTK, DroPE, fewer pairs and SeqPE, three seeds each.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/extend_context.py --workdir=runs/extend_context --results=docs/results/extend_context.json
    python -m seqpe_jax.report --workdir=runs/extend_context --output=runs/extend_context/report

First `rope`, the first stage of the config's page, for each seed; then each variant from the model of its seed. Nothing was
tuned. Hardware: one CPU core; about 20 minutes.
"""

from seqpe_jax.sweeps import FolderOf

CONFIG = "configs/extend_context.py"
VARIANTS = ("yarn", "ntk", "drope", "seqpe", "rotary_partial", "seqpe_partial")
SEEDS = (1, 2, 3)


def runs():
    """Yields (name, overrides) of each run, first those that the others begin with."""
    for seed in SEEDS:
        yield f"rope-{seed}", {"seed": seed, "variant": "rotary"}
    for seed in SEEDS:
        for variant in VARIANTS:
            yield f"{variant}-{seed}", {"seed": seed, "variant": variant, "init_from": FolderOf(f"rope-{seed}")}
