"""Lengths beyond training on five algorithmic tasks: seven encodings, each also with random positions (Ruoss et al.).

    python -m seqpe_jax.sweep --sweep=configs/sweeps/study_algorithmic.py --workdir=runs/study_algorithmic --jobs=2 \
        --results=docs/results/study_algorithmic.json
    python -m seqpe_jax.report --workdir=runs/study_algorithmic --output=runs/study_algorithmic/report

The decoder's form of configs/algorithmic.py, 3,000 steps on inputs of length 1 to 40, one seed. Evaluated on 600 inputs of 1 to 40, of 41 to
200 and of 201 to 500 symbols, every length equally often: three programs are compiled and not one for each hundred. RANDOM rows
draw positions in rising order from 2048, in training and evaluation; no position needs none, and FoX decays by its gates alone.
First come, task after task, SeqPE, RoPE, ALiBi and random positions of a learned table; then the others. Tasks whose
output is a string come first: those with a single output are hardly learned in 3,000 steps, even within 40 symbols. After a
kill or a stop the same command resumes the study.
Hardware: two CPU cores, one for each of two runs at once. A step of `rotary` on missing_duplicate, 2.4 GFLOP, takes 0.17 CPU
seconds on a loaded machine, of which dropout has 9%, eight heads instead of one a quarter, and the examples 10%; the rest is
products of the network, half of them on padding, since lengths are mixed. That is 9 minutes for a run of missing_duplicate or parity_check, and by FLOPs about 17 for reverse_string and
bucket_sort and 26 for duplicate_string: 16 CPU hours for 60 runs, 8 for the first 30.
"""

CONFIG = "configs/algorithmic.py"
TASKS = ("bucket_sort", "reverse_string", "duplicate_string", "missing_duplicate", "parity_check")
FIRST = ("seqpe", "seqpe_random", "rotary", "rotary_random", "alibi", "learned_random")
OTHERS = ("alibi_random", "fox", "none", "sinusoidal", "sinusoidal_random", "learned")
RANGE = 2048
RANDOM = {
    "objective.skip.rate": 1.0,
    "objective.skip.chunks": 0,
    "objective.skip.range": RANGE,
    "objective.shift.rate": 0.0,
    "eval.positions": "random",
}
EVALUATED = {"eval.lengths": (40, 200, 500), "eval.examples": 600}


def runs():
    """Yields (name, overrides) of each run."""
    for rows in (FIRST, OTHERS):
        for task in TASKS:
            for row in rows:
                kind = row.removesuffix("_random")
                own = {"variant": kind, "data.task": task, "seed": 1} | EVALUATED
                if kind != row:
                    own |= RANDOM | ({"encoding.table_length": RANGE} if kind == "learned" else {})
                yield f"{task}-{row}", own
