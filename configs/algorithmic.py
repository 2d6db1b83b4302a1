"""Strings of symbols and what follows from them, at lengths far beyond those of training: fifteen tasks and three more.

    python -m seqpe_jax.train --config=configs/algorithmic.py --workdir=runs/reverse --config.data.task=reverse_string
    python -m seqpe_jax.evaluate --checkpoint=runs/reverse --output=runs/reverse/evaluation.json

Trained on inputs of length 1 to 40; each row of the evaluation has the lengths above those of the row before, up to 500. The
tasks are those of Deletang et al. (arXiv 2207.02098), the lengths those of Ruoss et al. (arXiv 2305.16843), whose model this
is, with 32 examples in place of 128 to a step. Right outputs by chance: 50% of binary ones, 20% of five.
--config.data.form=encoder reads outputs at blanks, with attention in both directions, as theirs does.
Random positions, in training and evaluation: --config.objective.skip.rate=1.0 --config.objective.skip.chunks=0
--config.objective.skip.range=2048 --config.eval.positions=random, and of a learned table
--config.encoding.table_length=2048.
Hardware: one CPU core; docs/results.md has the times of the study (configs/sweeps/study_algorithmic.py).
Variants: seqpe (default), rotary, alibi, fox, learned, sinusoidal, none, and any other encoding of texts (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding


def get_config(variant=None):
    """Returns the config; a variant is an encoding kind."""
    c = defaults()
    c.steps = 3000
    c.batch_size = 32
    c.data.name = "algorithmic"
    c.data.task = "parity_check"
    c.data.length = 40
    c.eval.lengths = (40, 100, 200, 300, 400, 500)
    c.eval.examples = 200
    c.checkpoint.every = 1000
    c.report.every = 50

    c.model.layers = 5
    c.model.width = 64
    c.model.heads = 8
    c.model.dropout = 0.1
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0
    c.model.activation = "relu"

    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.clip = 1.0

    c.encoding.max_position = 2048
    c.encoding.width = 64
    c.encoding.heads = 4
    c.encoding.dropout = 0.0
    c.encoding.qk = "multi"
    if variant in (None, "seqpe"):
        c.encoding.init_std = 0.1  # as in stdlib_lm.py: the paper's 0.02 leaves a small encoder untrained
        c.encoding.qk_init_std = 0.1
    c.objective.contrastive.batch = 4
    c.objective.contrastive.candidates = 16
    c.objective.contrastive.around_anchor = True
    c.objective.contrastive.window = 512
    c.objective.distillation.batch = 4
    c.objective.distillation.offsets = 8
    c.objective.shift.rate = 0.3
    return with_encoding(c, variant)
