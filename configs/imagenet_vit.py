"""ViT-S/16 or ViT-B/16 with SeqPE on ImageNet-1k: the paper's recipe (arXiv 2506.13277, image classification).

    python -m seqpe_jax.train --config=configs/imagenet_vit.py --workdir=DIR
    python -m seqpe_jax.train --config=configs/imagenet_vit.py:b16-rotary_mixed --workdir=DIR

Put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar where the first start says; nothing is downloaded.
Hardware: written for 8 accelerators of 80 GB. Time and result: not measured by this project yet.
Variants: s16 (default), b16 or b16_pod (b16 in batches of 4096 on 256 TPU chips, with the learning rate of arXiv
2010.11929, table 3, for that batch), and after a dash the encoding: seqpe (default), seqpe_extended (positions with a fraction
and zoom, as digits_vit.py has them; see docs/recipes.md), rotary_mixed, learned, and any other encoding of
grids (docs/encodings.md). An encoding alone means s16.
"""

from seqpe_jax.config import defaults, with_encoding

FORMS = {"seqpe_extended": "seqpe"}

IMAGES = 1_281_167
EPOCHS, WARMUP_EPOCHS = 400, 20


def get_config(variant=None):
    c = defaults()
    parts = [part for part in (variant or "").split("-") if part]
    model = parts.pop(0) if parts and parts[0] in ("s16", "b16", "b16_pod") else "s16"
    small, pod = model == "s16", model == "b16_pod"

    c.batch_size = 4096 if pod else 1024
    batch = c.get_oneway_ref("batch_size")  # what is computed from it follows --config.batch_size
    c.steps = EPOCHS * IMAGES // batch
    c.data.name = "imagenet2012"
    c.data.size = (224, 224)
    c.data.crop_ratio = 0.875
    c.data.threads = 16
    c.data.augment.crop_scale = (0.08, 1.0)
    c.data.augment.flip = 0.5
    c.data.augment.randaugment_layers = 2
    c.data.augment.randaugment_magnitude = 9.0
    c.data.augment.randaugment_std = 0.5
    c.data.augment.color_jitter = 0.0  # the recipe names 0.4, but its library leaves jitter out with RandAugment
    c.data.augment.erasing = 0.25
    c.objective.mixing.mixup = 0.8
    c.objective.mixing.cutmix = 1.0
    c.objective.mixing.switch = 0.5
    c.objective.label_smoothing = 0.1
    c.eval.every = 2 * (5 * IMAGES // batch)  # of checkpoint.every a multiple
    c.eval.sizes = (224, 320, 384, 448, 512, 640, 672)
    c.checkpoint.every = 5 * IMAGES // batch
    c.checkpoint.best = "top1@224"  # as the authors choose, who look after every epoch
    c.precision.compute = "bfloat16"

    c.model.kind = "vit"
    c.model.patch = (16, 16)
    c.model.layers = 12
    c.model.scan = True  # one layer is compiled, not twelve
    c.model.width = 384 if small else 768
    c.model.heads = 6 if small else 12
    c.model.dropout = 0.0
    c.model.attention_dropout = 0.0
    c.model.embedding_dropout = 0.0
    c.model.drop_path = 0.0 if small else 0.1
    c.model.activation = "gelu"
    c.model.layer_norm_epsilon = 1e-6

    c.optimizer.learning_rate = 3e-3 if pod else 6e-4 * batch.to_float() / 512
    c.mesh.fsdp = 16 if pod else 1  # weights and moments are most of the memory that such small parts of a batch read
    c.optimizer.schedule = "cosine"
    c.optimizer.end_learning_rate = 5e-6
    c.optimizer.warmup_steps = WARMUP_EPOCHS * IMAGES // batch
    c.optimizer.weight_decay = 0.05
    c.optimizer.encoder_weight_decay = 0.0
    c.optimizer.clip = 5.0

    c.encoding.max_position = 100
    c.encoding.mode = "attn_mul"
    c.encoding.qk = "multi"
    c.encoding.width = 384
    c.encoding.heads = 6
    c.encoding.dropout = 0.1 if small else 0.3
    c.encoding.init_distribution = "truncated_normal"

    c.objective.contrastive.batch = 128  # over all devices: 32 on each of 4, or 16 on each of 8
    c.objective.contrastive.candidates = 64
    c.objective.contrastive.mixture = (0.5, 0.3, 0.2)
    c.objective.contrastive.hard_fraction = 0.2
    c.objective.contrastive.window = 14
    c.objective.distillation.batch = 128
    c.objective.distillation.offsets = 64
    c.objective.shift.rate = 0.1
    c.objective.shift.sets = 128  # different grids in one shifted step, each for eight images
    if parts == ["seqpe_extended"]:
        c.encoding.max_position = 40
        c.encoding.fraction_digits = 1
        c.encoding.resize = "interpolate"
        c.objective.zoom.rate = 0.5
        c.objective.zoom.smallest = 0.3
        c.objective.shift.rate = 0.0
        c.objective.shift.sets = 8  # parts of one step
    return with_encoding(c, "-".join(parts), FORMS)
