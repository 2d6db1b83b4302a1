"""What each part of SeqPE does: the quickstart's model without it, or with another choice in its place; one seed.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/ablation.py --workdir=runs/ablation --jobs=2
    python -m seqpe_jax.report --workdir=runs/ablation --output=runs/ablation/report

`full` is the quickstart at 600 steps; every other text run changes what its name says. Attention logits, on which `full`
has its contrastive loss, exist under attn_scalar alone: compare the other modes with `contrastive_vectors`. Whether places
are numbered over the whole digit string or anew for each coordinate is void with one coordinate, so these two runs are of
configs/digits_vit.py, whose own choice is `digits-place_global`.
Hardware: two CPU cores, one for each of two runs at once; about 30 minutes.
"""

from seqpe_jax.sweeps.points import product, zipped

CONFIG = "configs/stdlib_lm.py"
BUDGET = {"steps": (600,)}
VECTORS = {"objective.contrastive.space": ("vectors",)}
# What is added to tokens, or read as an angle, has no query and key parts.
MODES = zipped(
    {
        "encoding.mode": ("attn_add", "attn_mul", "input_add", "rotary"),
        "encoding.qk": ("multi", "multi", "none", "none"),
    }
)


def runs():
    """Yields (name, overrides) of each run."""
    [full] = product(BUDGET)
    yield "full", full
    for part in ("contrastive", "distillation"):
        yield f"no_{part}", full | {f"objective.{part}.weight": 0.0}
    yield "no_shift", full | {"objective.shift.rate": 0.0}
    yield "qk_single", full | {"encoding.qk": "single"}
    for base in (2, 16):
        yield f"base_{base}", full | {"encoding.base": base}
    [vectors] = product(BUDGET, VECTORS)
    yield "contrastive_vectors", vectors
    for mode in product(MODES, BUDGET, VECTORS):
        yield f"mode_{mode['encoding.mode']}", mode
    for place in ("global", "coordinate"):
        yield f"digits-place_{place}", {"config": "configs/digits_vit.py", "encoding.place": place}
