"""GPT-2 small with SeqPE on WikiText-103: the paper's recipe (arXiv 2506.13277, language modelling).

    python -m seqpe_jax.train --config=configs/wikitext103_gpt2.py --workdir=DIR \
        --config.data.tokenizer=PATH/tokenizer.json [--config.data.paths=PATH/wikitext-103-raw-v1.zip]
    python -m seqpe_jax.evaluate --checkpoint=DIR --which=best --lengths=512,1024,2048,4096,8192,16384,32768

Hardware: written for 8 accelerators of 80 GB. Time and result: not measured by this project yet.
Variants: seqpe (default), seqpe_narrow (for GPUs: parts 8 wide and no dropout of attention weights, so that cuDNN's flash
attention serves, and an encoder in TF32; docs/performance.md), seqpe_extended (as seqpe_logits of stdlib_lm.py, see docs/recipes.md), rotary, alibi, and any
other encoding of texts (docs/encodings.md).
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"seqpe_narrow": "seqpe", "seqpe_extended": "seqpe"}


def get_config(variant=None):
    c = defaults()
    c.steps = 100_000
    c.batch_size = 128
    c.data.name = "wikitext103"
    c.data.length = 512
    c.data.tokenizer = "tokenizer.json"  # GPT-2's, 50 257 entries
    c.eval.every = 5000
    c.eval.lengths = (512, 1024, 2048, 4096, 8192, 16384)
    c.checkpoint.every = 2500
    c.checkpoint.best = "perplexity@512"  # of the validation split, as the authors choose
    c.precision.compute = "bfloat16"

    c.model.layers = 12
    c.model.scan = True  # one layer is compiled, not twelve
    c.model.width = 768
    c.model.heads = 12
    c.model.dropout = 0.1

    c.optimizer.learning_rate = 5e-5
    c.optimizer.schedule = "linear"
    c.optimizer.warmup_steps = 4000
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip = 5.0

    c.encoding.max_position = 20_000
    c.encoding.mode = "attn_scalar"
    c.encoding.qk = "single"
    c.encoding.dropout = 0.1
    c.encoding.attention_dropout = 0.0

    c.objective.contrastive.batch = 64  # over all devices: 16 on each of 4, or 8 on each of 8
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.window = 256
    c.objective.contrastive.mixture = (0.0, 0.4, 0.6)
    c.objective.distillation.batch = 64
    c.objective.distillation.offsets = 32
    c.objective.shift.rate = 0.1
    c.objective.shift.sets = 64  # different windows in one shifted step, each for two samples
    if variant == "seqpe_narrow":
        c.encoding.feature_width = 8
        c.encoding.matmul_precision = "high"  # TF32: float32 has no tensor cores
        c.model.attention_dropout = 0.0
    if variant == "seqpe_extended":
        c.encoding.qk = "multi"
        c.encoding.rotary_pairs = 16  # of 32: those whose period is shorter than the window of 512
        c.encoding.feature_width = 16
        c.objective.contrastive.space = "logits"
        c.objective.contrastive.around_anchor = True
        c.objective.contrastive.causal_only = True
        c.objective.contrastive.window = 4096  # eight windows of training
    return with_encoding(c, variant, FORMS)
