"""How wide SeqPE's encoder need be: on text, as wide as the model, half and a quarter of it; three seeds.

    python -m seqpe_jax.sweep --sweep=configs/sweeps/encoder_width.py --workdir=runs/encoder_width --jobs=2
    python -m seqpe_jax.report --workdir=runs/encoder_width --output=runs/encoder_width/report

Trained on 64 bytes for 1000 steps, as extrapolation.py is, evaluated at 64 to 4096 bytes of the test split. The encoder is
what a training step has on top of RoPE's, and half its width is a quarter of its work (docs/performance.md).
Hardware: two CPU cores, one for each of two runs at once; about 25 minutes.
"""

CONFIG = "configs/stdlib_lm.py"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)


def runs():
    """Yields (name, overrides) of each run, one seed of all widths after the other."""
    for seed in (1, 2, 3):
        for width in (96, 48, 24):
            point = {
                "variant": "seqpe_logits",
                "seed": seed,
                "steps": 1000,
                "eval.lengths": LENGTHS,
                "encoding.width": width,
            }
            yield f"width_{width}-{seed}", point
