"""Every config parses with every variant, tells its command, and takes two shrunken steps."""

import functools
import importlib.util
import json
import math
import pathlib
import typing

import jax
import numpy as np
import pytest
from PIL import Image

from seqpe_jax import config
from seqpe_jax.config import GRID_ONLY, TEXT_ONLY
from seqpe_jax.errors import InputError
from seqpe_jax.training.trainer import Trainer
from tests.tiny import train

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@functools.cache
def page(path: pathlib.Path):
    """A config file as a module."""
    spec = importlib.util.spec_from_file_location("page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KINDS = typing.get_args(config.EncodingKind)
GRIDS = [path for path in CONFIGS if path.stem.endswith("_vit")]
REFUSED = [(path, kind) for path in CONFIGS for kind in (TEXT_ONLY if path in GRIDS else GRID_ONLY)]
ALL = [(path, kind) for path in CONFIGS for kind in KINDS if (path, kind) not in REFUSED]
ALL += [(path, name) for path in CONFIGS for name in config.GATED if path not in GRIDS]
FORMS = {path: page(path).FORMS for path in CONFIGS if hasattr(page(path), "FORMS")}
ALL += [(path, form) for path, forms in FORMS.items() for form in forms]
# The fast lane takes the quickstart's pair. Baselines need no run on every config: a model is the same under each.
# Those without parameters differ in positions alone, which no step changes; `none` stands for them.
FAST = [("stdlib_lm", "seqpe"), ("stdlib_lm", "rotary")]
BASELINES = {
    "stdlib_lm": ("rotary", "learned", "none"),
    "digits_vit": ("learned", "rotary_mixed"),
}
RUN = [
    pytest.param(case, marks=() if (case[0].stem, case[1]) in FAST else pytest.mark.slow)
    for case in ALL
    if case[1].startswith("seqpe") or case[1] in BASELINES.get(case[0].stem, ())
]

# Sizes only: what a config computes stays its own.
SHRUNKEN = {
    "steps": 2, "batch_size": 8, "data.length": 16, "data.tokenizer": "bytes", "model.layers": 1, "model.width": 16,
    "model.heads": 2, "optimizer.warmup_steps": 0, "eval.every": 0, "eval.lengths": (16,), "eval.tokens": 256,
    "report.every": 1, "report.tensorboard": False, "mesh.fsdp": 1,
}  # fmt: skip
OF_TEXT = ("data.length", "data.tokenizer", "eval.lengths", "eval.tokens")
SHRUNKEN_SEQPE = {
    "encoding.layers": 1, "encoding.width": 16, "encoding.heads": 2, "encoding.max_position": 100,
    "objective.contrastive.batch": 4, "objective.contrastive.candidates": 4, "objective.contrastive.window": 16,
    "objective.distillation.batch": 2, "objective.distillation.offsets": 4,
}  # fmt: skip


def photos(root: pathlib.Path, classes: int = 2, each: int = 6) -> pathlib.Path:
    """Fills a folder of training images: noise of a colour for each class."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        folder = root / "train" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(0, 256, (30, 40, 3)) // (1 + np.arange(3) * label)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def name(case) -> str:
    return f"{case[0].stem}:{case[1]}"


@pytest.mark.parametrize("case", ALL, ids=name)
def test_a_variant_parses(case):
    path, kind = case
    assert config.load(f"{path}:{kind}").encoding.name == FORMS.get(path, {}).get(kind, kind)


@pytest.mark.parametrize("case", REFUSED, ids=name)
def test_kinds_of_texts_are_refused_on_grids_and_those_of_grids_on_texts(case):
    path, kind = case
    what = "is for texts, .* has grids" if path in GRIDS else "is for grids, .* has text"
    with pytest.raises(InputError, match=f"encoding.kind='{kind}' {what}: choose one of seqpe"):
        config.load(f"{path}:{kind}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_page_tells_its_command(path):
    assert f"python -m seqpe_jax.train --config=configs/{path.name}" in page(path).__doc__
    assert config.load(str(path)) == config.parse(page(path).get_config())


@pytest.mark.parametrize("case", RUN, ids=name)
def test_a_variant_takes_two_steps(case, tmp_path, monkeypatch):
    path, kind = case
    on_one = functools.partial(Trainer.of, devices=jax.devices()[:1])  # compiles sooner than for eight
    monkeypatch.setattr(Trainer, "of", on_one)
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    values = SHRUNKEN | (SHRUNKEN_SEQPE if kind.startswith("seqpe") else {})
    encoding = config.load(f"{path}:{kind}").encoding
    if encoding.position_heads:  # of the two there are here
        values |= {"encoding.position_heads": 1, "objective.contrastive.head_scales": (4.0,)}
    axes = len(config.load(f"{path}:{kind}").grid)  # each has a pair at least
    least = {"rotary_heads": 1, "rotary_pairs": axes}
    values |= {f"encoding.{name}": count for name, count in least.items() if getattr(encoding, name)}
    if config.load(f"{path}:{kind}").reads_images:
        values = {name: value for name, value in values.items() if name not in OF_TEXT} | {"eval.sizes": ()}
        if path.stem == "imagenet_vit":
            values |= {"data.name": "image_folder", "data.paths": (str(photos(tmp_path / "photos")),)}
    elif config.load(f"{path}:{kind}").asks_questions:
        lines = [json.dumps({"index": at, "input": f"ask {at}:", "outputs": [f"no {at}"]}) for at in range(40)]
        (tmp_path / "asked.jsonl").write_text("\n".join(lines) + "\n")
        values |= {"data.name": "qa_jsonl", "data.paths": (str(tmp_path / "asked.jsonl"),)}
    else:
        (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 60)
        values |= {"data.name": "text_files", "data.paths": (str(tmp_path / "text.txt"),)}
    train(config.load(f"{path}:{kind}", values), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["train/loss"]) and line["train/loss"] < 7 for line in lines)
    terms = {key.removeprefix("train/term/") for key in lines[0] if key.startswith("train/term/")}
    assert terms == ({"task", "contrastive", "distillation"} if kind.startswith("seqpe") else {"task"})


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["s16", "b16", "b16-rotary_mixed"])
def test_imagenet_traces_at_full_size(variant, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    values = {"data.name": "image_folder", "data.paths": (str(photos(tmp_path / "photos", 1000, 1)),)}
    settings = config.load(f"{ROOT}/configs/imagenet_vit.py:{variant}", values)
    parts = Trainer.of(settings)
    images = jax.ShapeDtypeStruct((settings.batch_size, 224, 224, 3), np.float32)
    labels = jax.ShapeDtypeStruct((settings.batch_size,), np.int32)
    _, metrics = jax.eval_shape(parts.train_step(), parts.shapes, {"images": images, "labels": labels})
    assert metrics["loss"].shape == ()
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parts.shapes.params["model"]))
    assert size == {"s16": 22_050_664 - 384 * 197, "b16": 86_567_656 - 768 * 197}[variant.split("-")[0]]
    if variant == "s16":
        encoding = parts.shapes.params["encoding"]
        maps, encoder = (
            sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(encoding[part])) for part in ("qk_map", "encoder")
        )
        assert 3.5e6 < maps < 3.6e6 and 3.6e6 < encoder < 3.8e6  # as the paper's ViT-S: 3.5 M and 3.7 M
