"""Every config parses with every variant, tells its command, and takes two shrunken steps."""

import importlib.util
import json
import math
import pathlib
import typing

import pytest

from seqpe_jax import config

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
KINDS = typing.get_args(config.EncodingKind)
ALL = [(path, kind) for path in CONFIGS for kind in KINDS]
# The fast lane takes the quickstart's pair.
RUN = [
    pytest.param(case, marks=() if case[0].stem == "stdlib_lm" and case[1] in ("seqpe", "rotary") else pytest.mark.slow)
    for case in ALL
]

# Sizes only: what a config computes stays its own.
SHRUNKEN = {
    "steps": 2, "batch_size": 8, "data.length": 16, "data.tokenizer": "bytes", "model.layers": 1, "model.width": 16,
    "model.heads": 2, "optimizer.warmup_steps": 0, "eval.every": 0, "eval.lengths": (16,), "eval.tokens": 256,
    "report.every": 1, "report.tensorboard": False,
}  # fmt: skip
SHRUNKEN_SEQPE = {
    "encoding.layers": 1, "encoding.width": 16, "encoding.heads": 2, "encoding.max_position": 120,
    "objective.contrastive.batch": 4, "objective.contrastive.candidates": 4, "objective.contrastive.window": 16,
    "objective.distillation.batch": 2, "objective.distillation.offsets": 4,
}  # fmt: skip


def name(case) -> str:
    return f"{case[0].stem}:{case[1]}"


@pytest.mark.parametrize("case", ALL, ids=name)
def test_a_variant_parses(case):
    path, kind = case
    assert config.load(f"{path}:{kind}").encoding.kind == kind


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_page_tells_its_command(path):
    spec = importlib.util.spec_from_file_location("page", path)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert f"python -m seqpe_jax.train --config=configs/{path.name}" in page.__doc__
    assert config.load(str(path)) == config.parse(page.get_config())


@pytest.mark.parametrize("case", RUN, ids=name)
def test_a_variant_takes_two_steps(case, tmp_path, monkeypatch):
    from seqpe_jax import train

    path, kind = case
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 60)
    values = SHRUNKEN | {"data.name": "text_files", "data.paths": (str(tmp_path / "text.txt"),)}
    if kind == "seqpe":
        values |= SHRUNKEN_SEQPE
    train.run(config.load(f"{path}:{kind}", values), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["train/loss"]) and line["train/loss"] < 7 for line in lines)
    terms = {key.removeprefix("train/term/") for key in lines[0] if key.startswith("train/term/")}
    assert terms == ({"task", "contrastive", "distillation"} if kind == "seqpe" else {"task"})
