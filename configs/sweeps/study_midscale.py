"""Nine encodings of text at a middle scale: ten million parameters, trained on 512 tokens, read at 512 to 16,384.

    python benchmarks/midscale_data.py
    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_midscale.py --workdir=runs/study_midscale --jobs=1 \
        --results=docs/results/study_midscale.json
    python -m seqpe_jax.report --workdir=runs/study_midscale --output=runs/study_midscale/report

The same 1500 steps for all, in which SeqPE takes 45 minutes on two cores. Each row has the parts that its encoding chose in
study_text.py, in the numbers that go with a window of 512 and a head of 64; `rotary` is RoPE as others use it, `rotary_gate`
has the gate that it chose, `rotary_nope` attends to windows of 512 tokens with RoPE in five layers of six, and without positions
to all tokens in the sixth. `seqpe_paper` is the form of the paper. All have one learning rate: in
study_text.py, where each chose its own, most chose the same. First the four rows of the headline with seed 1, then the others, then
seed 2.
Hardware: two CPU cores, one run at a time on both; about three hours for the first four, 13 for all 18.
"""

CONFIG = "configs/midscale_lm.py"
PAIRS = {"encoding.rotary_pairs": 16}
OPEN = {"encoding.gate_bias_init": 4.0}
GATE = {"encoding.gate": "forget", **OPEN}
FIRST = {
    "seqpe": {"variant": "seqpe"},
    "fox": {"variant": "fox", **PAIRS, **OPEN},
    "alibi": {"variant": "alibi", **PAIRS, **GATE},
    "rotary": {"variant": "rotary"},
}
OTHERS = {
    "kerple": {"variant": "kerple", **PAIRS, **GATE},
    "cable": {"variant": "cable", **PAIRS, **OPEN},
    "seqpe_paper": {"variant": "seqpe_paper"},
    "rotary_gate": {"variant": "rotary", **GATE},
    "rotary_nope": {
        "variant": "rotary",
        "encoding.layers_with": (1, 1, 1, 1, 1, 0),
        "model.window": 512,
        "model.window_layers": (1, 1, 1, 1, 1, 0),
    },
}


def runs():
    """Yields (name, overrides) of each run."""
    for seed, rows in ((1, FIRST), (1, OTHERS), (2, FIRST | OTHERS)):
        for name, variant in rows.items():
            yield f"{name}-{seed}", {"seed": seed, **variant}
