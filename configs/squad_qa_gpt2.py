"""Long-context question answering as in the paper: GPT-2 small from a WikiText-103 checkpoint, fine-tuned on SQuAD.

    python -m seqpe_jax.train --config=configs/squad_qa_gpt2.py --workdir=runs/squad --init-from=runs/wt103 \
        --config.data.paths=path/to/train-v1.1.json --config.data.tokenizer=path/to/tokenizer.json
    python -m seqpe_jax.evaluate --checkpoint=runs/squad --which=best --lengths=1024,2048,4096,8192 \
        --output=runs/squad/evaluation.json

Hardware: 8 accelerators, or fewer with --config.optimizer.accumulate. Variants: the encoding of the checkpoint,
`configs/squad_qa_gpt2.py:rotary`; seqpe_narrow is that of wikitext103_gpt2.py for GPUs, seqpe_extended is as stdlib_qa.py has
it (see docs/recipes.md). Never run at full size by this project. Source of the numbers: the authors' script
text_seqpe/runs/ours_gpt2_qa.sh (4 devices, one accumulation) and the defaults of qa_sft.py. There the best checkpoint is
looked for every 250 steps, by the perplexity of the answers at the training length; here each evaluation asks and answers
at all lengths, so that it comes every 1000. With --config.optimizer.accumulate=N also --config.objective.shift.sets must
divide a part, 64 / N.
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"seqpe_narrow": "seqpe", "seqpe_extended": "seqpe"}


def get_config(variant=None):
    """Returns the config; a variant is an encoding kind, or one of `FORMS`."""
    c = defaults()
    c.steps = 10_000
    c.batch_size = 64
    c.data.name = "squad_long"
    c.data.paths = ("train-v1.1.json",)
    c.data.tokenizer = "tokenizer.json"
    c.data.length = 1024
    c.eval.lengths = (1024, 2048, 4096, 8192)
    c.eval.new_tokens = 16
    c.eval.every = 1000
    c.checkpoint.every = 1000
    c.checkpoint.best = "loss@1024"  # of the answers of the validation split
    c.precision.compute = "bfloat16"

    c.model.layers = 12
    c.model.scan = True  # one layer is compiled, not twelve
    c.model.width = 768
    c.model.heads = 12

    c.optimizer.learning_rate = 5e-5
    c.optimizer.schedule = "linear"
    c.optimizer.warmup_steps = 100
    c.optimizer.clip = 5.0

    c.encoding.mode = "attn_scalar"
    c.encoding.qk = "single"
    c.encoding.max_position = 20_000
    c.encoding.width = 768
    c.encoding.heads = 12

    c.objective.contrastive.batch = 64  # over all devices: 16 on each of 4
    c.objective.contrastive.candidates = 32
    c.objective.contrastive.window = 256
    c.objective.distillation.batch = 64
    c.objective.distillation.offsets = 32
    c.objective.shift.rate = 0.1
    c.objective.shift.sets = 64  # each sample of a shifted step has a window of its own
    if variant == "seqpe_narrow":
        c.encoding.feature_width = 8
        c.encoding.matmul_precision = "high"  # TF32: float32 has no tensor cores
        c.model.attention_dropout = 0.0
    if variant == "seqpe_extended":
        c.encoding.qk = "multi"
        c.encoding.position_heads = 9  # three near, three middle, three far; three more see no position
        c.encoding.rotary_heads = 9
        c.encoding.rotary_pairs = 16
        c.encoding.feature_width = 32
        c.encoding.log_scaling = True
        c.objective.contrastive.space = "logits"
        c.objective.contrastive.head_scales = (1.0, 4.0, 16.0) * 3
        c.objective.contrastive.around_anchor = True
        c.objective.contrastive.causal_only = True
        c.objective.contrastive.window = 4096
        c.objective.shift.rate = 0.6
    return with_encoding(c, variant, FORMS)
