"""Lengths beyond training on five algorithmic tasks: seven encodings, each also with random positions (Ruoss et al.).

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_algorithmic.py --workdir=runs/study_algorithmic --jobs=2 \
        --results=docs/results/study_algorithmic.json
    python -m seqpe_jax.report --workdir=runs/study_algorithmic --output=runs/study_algorithmic/report

The decoder's form of configs/algorithmic.py, 3,000 steps on inputs of length 1 to 40, one seed; 200 inputs of each range of
lengths up to 500, and the mean over lengths 41 to 500 is that of five of them. RANDOM rows draw positions in rising order from
2048, in training and evaluation; no position needs none. Tasks one after the other, the strongest encodings first.
Hardware: two CPU cores, one for each of two runs at once. A step of `rotary` on duplicate_string, the longest one, took 0.85 CPU
seconds for 7 GFLOP (two steps on a loaded machine); the 60 runs have 0.73 PFLOP without SeqPE's encoder, so about 25 CPU hours, 12 hours
on two cores.
"""

CONFIG = "configs/algorithmic.py"
TASKS = ("missing_duplicate", "parity_check", "reverse_string", "bucket_sort", "duplicate_string")
ENCODINGS = ("seqpe", "rotary", "alibi", "fox", "none", "sinusoidal", "learned")
RANGE = 2048
RANDOM = {
    "objective.skip.rate": 1.0,
    "objective.skip.chunks": 0,
    "objective.skip.range": RANGE,
    "objective.shift.rate": 0.0,
    "eval.positions": "random",
}


def runs():
    """Yields (name, overrides) of each run, task after task."""
    for task in TASKS:
        for kind in ENCODINGS:
            own = {"variant": kind, "data.task": task, "seed": 1}
            yield f"{task}-{kind}", own
            if kind in ("none", "fox"):  # FoX decays by its gates alone, and has no positions either
                continue
            table = {"encoding.table_length": RANGE} if kind == "learned" else {}
            yield f"{task}-{kind}_random", own | RANDOM | table
