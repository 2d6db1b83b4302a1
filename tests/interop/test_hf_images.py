"""Folders of vision transformers against the public definition, written out in NumPy in float64."""

import json
import math
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import seqpe_jax
from seqpe_jax.errors import InputError
from seqpe_jax.interop import convert
from seqpe_jax.training.trainer import Trainer
from seqpe_jax.training.warm_start import check_source, open_source
from tests.inference.test_export import vit_config

pytestmark = pytest.mark.usefixtures("one_device")

LAYERS, WIDTH, HEADS, MLP, CLASSES, PATCH, SIDE, CHANNELS = 2, 12, 3, 20, 5, 2, 8, 1
PATCHES = (SIDE // PATCH) ** 2
MEAN, STD = (0.25,), (0.5,)
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": CLASSES,
    "num_features": WIDTH,
    "model_args": {"img_size": SIDE, "reg_tokens": 3},
    "global_pool": "avg",
    "pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": [CHANNELS, SIDE, SIDE], "tag": "any"},
}
HF = {
    "model_type": "deit",
    "architectures": ["DeiTForImageClassification"],
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "hidden_act": "gelu",
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_channels": CHANNELS,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "id2label": {},
}
# Names of Hugging Face, from timm's, written out here once more.
HF_NAMES = (
    (r"^(cls_token)", r"deit.embeddings.\1"),
    (r"^reg_token", "deit.embeddings.distillation_token"),
    (r"^pos_embed", "deit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "deit.embeddings.patch_embeddings.projection"),
    (r"^norm", "deit.layernorm"),
    (r"^head", "classifier"),
    (r"^blocks", "deit.encoder.layer"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"attn\.proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


def timm_state(registers: int, rows: int, norm: str = "norm", layer_scale: bool = False) -> dict[str, np.ndarray]:
    """Random arrays under timm's names; rows: of the table of positions."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, rows, WIDTH),
        "patch_embed.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        f"{norm}.weight": (WIDTH,),
        f"{norm}.bias": (WIDTH,),
        "head.weight": (CLASSES, WIDTH),
        "head.bias": (CLASSES,),
    }
    if registers:
        shapes["reg_token"] = (1, registers, WIDTH)
    maps = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (MLP, WIDTH),
        "mlp.fc2": (WIDTH, MLP),
    }
    for layer in range(LAYERS):
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{layer}.{name}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
        for name, shape in maps.items():
            shapes |= {f"blocks.{layer}.{name}.weight": shape, f"blocks.{layer}.{name}.bias": shape[:1]}
        if layer_scale:
            shapes |= {f"blocks.{layer}.ls{branch}.gamma": (WIDTH,) for branch in (1, 2)}
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def expected_logits(state: dict[str, np.ndarray], images: np.ndarray, mean: bool = False) -> np.ndarray:
    """Logits [B, classes] of images [B, H, W, C]; mean: of the patches, normalized after it."""
    s = {name: array.astype(np.float64) for name, array in state.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    batch, grid = len(images), SIDE // PATCH
    patches = images.reshape(batch, grid, PATCH, grid, PATCH, CHANNELS)
    x = np.einsum("bhpwqc,dcpq->bhwd", patches, s["patch_embed.proj.weight"]).reshape(batch, PATCHES, WIDTH)
    x = x + s["patch_embed.proj.bias"]
    first = [s[name] for name in ("cls_token", "reg_token") if name in s]
    prefix, table = sum(one.shape[1] for one in first), s["pos_embed"]
    if table.shape[1] == PATCHES:
        x = x + table
    x = np.concatenate([*(np.repeat(one, batch, axis=0) for one in first), x], axis=1)
    if table.shape[1] > PATCHES:
        x = x + table
    for layer in range(LAYERS):
        name = f"blocks.{layer}"
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").reshape(batch, -1, 3, HEADS, WIDTH // HEADS)
        query, key, value = np.moveaxis(qkv, 2, 0)
        logits = np.einsum("blhk,bshk->bhls", query, key) / math.sqrt(WIDTH // HEADS)
        attention = np.exp(logits - logits.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        attended = np.einsum("bhls,bshk->blhk", attention, value).reshape(x.shape)
        x = x + s.get(f"{name}.ls1.gamma", 1.0) * linear(attended, f"{name}.attn.proj")
        hidden = gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + s.get(f"{name}.ls2.gamma", 1.0) * linear(hidden, f"{name}.mlp.fc2")
    read = norm(x[:, prefix:].mean(1), "fc_norm") if mean else norm(x, "norm")[:, 0]
    return linear(read, "head")


def folder_of(path, settings, state):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path / "model.safetensors")
    return path


def to_hf(state):
    found = {}
    for name, array in state.items():
        for pattern, replacement in HF_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for part, one in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = one
        else:
            found[name] = array
    return found


def check(folder, expected, images):
    """Checks the logits of normalized images and of the same as bytes."""
    model = seqpe_jax.load(folder)
    pixels = np.round((images * np.array(STD) + np.array(MEAN)) * 255).astype(np.uint8)
    np.testing.assert_allclose(model.logits(images.astype(np.float32)), expected(images), atol=1e-5)
    mean, std = (np.array(values) for values in (model.data_spec.mean, model.data_spec.std))
    np.testing.assert_allclose(model.logits(pixels), expected((pixels / 255 - mean) / std), atol=1e-5)
    return model


IMAGES = np.random.default_rng(1).uniform(-0.5, 1.5, (2, SIDE, SIDE, CHANNELS))


@pytest.mark.slow
def test_a_folder_of_hugging_face_with_a_distillation_token(tmp_path):
    """A token of its own with a row in the table of positions; one head reads the class token."""
    state = timm_state(registers=1, rows=2 + PATCHES)
    folder = folder_of(tmp_path / "deit", HF, to_hf(state))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    model = check(folder, lambda images: expected_logits(state, images), IMAGES)
    assert (model.config.model.registers, model.config.model.pooling) == (1, "class_token")
    assert (model.task.data_spec.mean, model.task.data_spec.std) == (MEAN, STD), (
        "an evaluation normalizes as it was trained"
    )


@pytest.mark.slow
def test_a_folder_of_timm_is_converted_and_begins_a_run_with_other_classes(tmp_path):
    """Registers without a position, LayerScale, and the mean of the patches."""
    state = timm_state(registers=3, rows=PATCHES, norm="fc_norm", layer_scale=True)
    folder = folder_of(tmp_path / "timm", TIMM, state)
    report = convert.convert_to_run(str(folder), str(tmp_path / "run"))
    assert report["mapped"]["model/blocks_1/layer_scale_2"] == ["blocks.1.ls2.gamma"]
    model = check(tmp_path / "run", lambda images: expected_logits(state, images, mean=True), IMAGES)
    assert model.data_spec.mean == MEAN
    fields = {name: getattr(model.config.model, name) for name in ("width", "heads", "layers", "mlp_width", "patch")}
    fields |= {"pooling": "mean", "registers": 3, "layer_scale": 1e-5, "layer_norm_epsilon": 1e-6, "activation": "gelu"}
    settings = vit_config(
        "learned", init_from=str(folder), **{f"model__{name}": value for name, value in fields.items()}
    )
    trainer = Trainer.of(settings, jax.devices()[:1], run_dir=str(folder))
    check_source(trainer.config, trainer.task, str(folder))
    begun = open_source(trainer.config, trainer.abstract_state.params, trainer.task.new_classes)
    assert f"the head is drawn for {trainer.task.data_spec.classes} classes in place of {CLASSES}" in begun.describe()
    params = begun.params(jax.tree.map(lambda leaf: np.zeros(leaf.shape), trainer.abstract_state.params))
    np.testing.assert_array_equal(params["model"]["registers"], state["reg_token"][0])


@pytest.mark.parametrize(
    "settings, arrays, words",
    [
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, {}, "none of the vision transformers of timm"),
        ({"global_pool": "map"}, {}, "field 'global_pool' is 'map', only token and avg are known"),
        ({"model_args": {"qk_norm": True}}, {}, "field 'qk_norm' is unknown"),
        ({"head_bias": 1}, {}, "field 'head_bias' is unknown.*--ignore-fields=head_bias"),
        ({"model_args": {"img_size": 6}}, {}, "the table of positions has 16 rows, not the 9 of the patches"),
        ({"model_args": {"num_heads": 5}}, {}, "do not fit the 5 heads"),
        ({}, {"norm_pre.weight": np.zeros(3)}, "has tensors that this model does not use: norm_pre.weight"),
        ({}, {"head_dist.weight": np.zeros(3)}, "has two heads"),
        ({}, {"patch_embed.proj.weight": None}, "lack patch_embed.proj.weight"),
        (HF | {"architecture": None, "hidden_act": "glu"}, {}, "field 'hidden_act' is 'glu'"),
    ],
)
def test_other_models_are_refused_by_the_name_of_what_they_have(tmp_path, settings, arrays, words):
    state = timm_state(registers=3, rows=PATCHES, norm="fc_norm", layer_scale=True) | arrays
    settings = {name: value for name, value in (TIMM | settings).items() if value is not None}
    if settings.get("model_type"):
        settings = {name: value for name, value in settings.items() if name not in TIMM}
    folder = folder_of(
        tmp_path / "folder", settings, {name: array for name, array in state.items() if array is not None}
    )
    with pytest.raises(InputError, match=words) as caught:
        seqpe_jax.load(folder)
    assert "\n" not in str(caught.value)


def test_features_without_a_head_get_one_of_zeros(tmp_path, capsys):
    state = timm_state(registers=0, rows=1 + PATCHES)
    features = {name: array for name, array in state.items() if not name.startswith("head.")}
    model = seqpe_jax.load(
        folder_of(
            tmp_path / "features",
            TIMM | {"global_pool": "token", "num_classes": 0, "model_args": {"img_size": SIDE}},
            features,
        )
    )
    assert "has no head of classes: it gets one of 1000" in capsys.readouterr().err
    assert not np.any(model.params["model"]["head"]["kernel"]) and model.data_spec.classes == 1000
