"""Runs on images: they train, are evaluated at other sizes and reported; bad input ends with one line."""

import json

import numpy as np
import pytest
from PIL import Image

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.loading import open_model
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate
from seqpe_jax.training.loop import train_and_evaluate
from tests.tiny import older, tiny_config
from tests.training.test_commands import refused

pytestmark = pytest.mark.slow

DIGITS = "configs/digits_vit.py"
TINY = {
    "steps": 2,
    "batch_size": 8,
    "model.layers": 2,
    "model.width": 16,
    "model.heads": 2,
    "optimizer.warmup_steps": 0,
    "encoding.layers": 1,
    "encoding.width": 16,
    "encoding.heads": 2,
    "objective.shift.rate": 0,
    "report.tensorboard": False,
    "eval.every": 2,
    "eval.sizes": (8, 12),
}


def options(**fields):
    """The tiny sizes as flags; without the terms, which compile longest."""
    own = {name.replace("__", "."): value for name, value in fields.items()}
    values = TINY | {"objective.contrastive.weight": 0, "objective.distillation.weight": 0} | own
    return [f"--config.{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def trained(commands, tmp_path_factory):
    """A workdir of two steps on digits."""
    workdir = tmp_path_factory.mktemp("run") / "digits"
    result = commands("train", f"--config={DIGITS}", f"--workdir={workdir}", *options())
    assert result.code == 0, result.err
    return workdir


def test_a_run_is_evaluated_at_other_sizes_and_reported(commands, trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"eval/top1@8", "eval/top5@12", "eval/loss@12"} <= {name for line in lines for name in line}
    assert lines[0]["train/images_per_second"] > 0
    output = trained / "evaluation.json"
    result = commands("evaluate", f"--checkpoint={trained}", "--sizes=8,16,8x12", f"--output={output}")
    assert result.code == 0, result.err
    report = json.loads(output.read_text())
    assert (report["step"], report["encoding"], report["task"]) == (2, "seqpe", "image_classification")
    assert [entry["size"] for entry in report["results"]] == [[8, 8], [16, 16], [8, 12]]
    for entry in report["results"]:
        assert entry["examples"] > 200 and 0 <= entry["top1"] <= entry["top5"] <= 100
    attention = np.load(trained / "attention.npz")
    assert attention["images"].shape == (4, 16, 16, 1) and attention["attention"].shape == (4, 2, 8, 8)
    assert 0.5 < attention["attention"].sum(axis=(2, 3)).mean() < 1  # the rest is on the class token itself
    result = commands("report", f"--workdir={trained}", f"--output={tmp_path / 'report'}")
    assert result.code == 0, result.err
    assert "| encoding | 8 (1x) | 8x12 (1.22x) | 16 (2x) |" in result.out
    page = (tmp_path / "report" / "report.md").read_text()
    for name in ("similarity_digits", "attention_digits", "extrapolation_sizes"):
        assert f"({name}.png)" in page and (tmp_path / "report" / f"{name}.png").stat().st_size > 5000


def test_videos_are_evaluated_at_more_frames(commands, tmp_path):
    workdir = tmp_path / "run"
    fields = {"data__size": "(4,16,16)", "model__patch": "(2,8,8)", "eval__sizes": "(16,)", "eval__frames": "(4,8)"}
    fields["encoding__rotary_pairs"] = "3"
    result = commands("train", "--config=configs/moving_digits_vit.py", f"--workdir={workdir}", *options(**fields))
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"eval/top1@4x16x16", "eval/top1@8x16x16"} <= {name for line in lines for name in line}
    ask = ("evaluate", f"--checkpoint={workdir}")
    refused(commands(*ask, "--sizes=10x16x16"), "evaluation size 10x16x16", "the videos have 8")
    refused(commands(*ask, "--sizes=16,5x16x16"), "5x16x16", "multiples of 2x8x8")
    refused(commands(*ask, "--sizes=400x16x16"), "largest size possible is 20x80x80")
    result = commands(*ask, "--sizes=16,8x16x24", f"--output={workdir / 'evaluation.json'}")
    assert result.code == 0, result.err
    report = json.loads((workdir / "evaluation.json").read_text())
    assert [entry["size"] for entry in report["results"]] == [[4, 16, 16], [8, 16, 24]]
    result = commands("report", f"--workdir={workdir}", f"--output={tmp_path / 'report'}")
    assert result.code == 0, result.err
    assert "| encoding | 4x16x16 (1x) | 8x16x24 (1.44x) |" in result.out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--sizes=0"], ["--sizes", "'0'"]),
        (["--sizes=8x"], ["--sizes", "'8x'"]),
        (["--sizes=4x8x8x8"], ["--sizes", "'4x8x8x8'"]),
        (["--lengths=16"], ["images", "--sizes"]),
    ],
)
def test_evaluate_refuses_arguments(commands, trained, arguments, words):
    refused(commands("evaluate", f"--checkpoint={trained}", *arguments), *words)


def named(caught, words):
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_evaluate_refuses_sizes_before_it_reads_parameters(trained):
    model = open_model(trained)
    for options, words in (
        ({"sizes": ((8, 8), (9, 9))}, ["9x9", "patches of 2x2", "multiples"]),
        ({"sizes": ((202, 202),)}, ["202x202", "largest size possible is 80x80"]),
        ({"sizes": ((4, 8, 8),)}, ["4x8x8", "has frames", "name two sides"]),
        ({"contexts": (16,)}, ["images", "--contexts", "--sizes"]),
    ):
        with pytest.raises(InputError) as caught:
            evaluate(model, EvalRequest(**options))
        named(caught, words)


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"data.size": (9, 8)}, ["data.size", "9x8", "patches of 2x2"]),
        ({"data.size": (8,)}, ["data.size", "(height, width)"]),
        ({"model.patch": (2, 2, 2)}, ["model.patch", "(height, width)"]),
        ({"eval.sizes": (8, 11)}, ["eval.sizes", "11x11"]),
        ({"eval.sizes": (8, 300)}, ["300x300", "largest size possible is 80x80"]),
        ({"model.kind": "gpt2"}, ["model.kind", "'vit'"]),
        ({"data.name": "stdlib_text"}, ["model.kind='vit'", "stdlib_text"]),
        ({"data.name": "image_folder"}, ["data.paths"]),
        ({"data.augment.crop_scale": (0.5, 1.5)}, ["crop_scale", "at most 1"]),
        ({"eval.frames": (4,)}, ["eval.frames", "is for videos", "leave it out"]),
        ({"objective.contrastive.causal_only": True}, ["causal_only"]),
    ],
)
def test_a_config_of_images_is_refused(fields, words):
    with pytest.raises(InputError) as caught:
        config.load(DIGITS, fields)
    named(caught, words)


def folder(root, **classes):
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(files):
            Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(root / name / f"{number}.png")
    return root


def test_train_refuses_folders_that_cannot_be_read(tmp_path):
    damaged = folder(tmp_path / "b", cats=3, dogs=3)
    (damaged / "cats" / "1.png").write_bytes(b"no picture")
    for root, words in (
        (tmp_path / "nothing", ["nothing", "there is no folder"]),
        (folder(tmp_path / "a", cats=3, dogs=0), ["dogs"]),
        (damaged, ["1.png"]),
    ):
        settings = config.load(DIGITS, TINY | {"data.name": "image_folder", "data.paths": (str(root),)})
        with pytest.raises(InputError) as caught:
            train_and_evaluate(settings, tmp_path / "run")
        named(caught, words)
        assert not (tmp_path / "run").exists()


def test_classes_go_by_name(commands, tmp_path):
    def photos(root, *classes):
        for split in ("train", "validation", "test"):
            folder(root / split, **{name: 6 for name in classes})
        return root

    def train(workdir, root, *arguments):
        fields = options(data__name="image_folder", data__paths=root, eval__every=0)
        return commands("train", f"--config={DIGITS}", f"--workdir={workdir}", *fields, *arguments)

    def evaluate(checkpoint, root):
        read = ("--data=image_folder", f"--paths={root}", "--sizes=8")
        return commands("evaluate", f"--checkpoint={checkpoint}", *read)

    root, first = photos(tmp_path / "all", "cat", "dog", "fox"), tmp_path / "first"
    result = train(first, root)
    assert result.code == 0 and "3 classes" in result.out, result.err
    export = tmp_path / "export"
    result = commands("export", f"--checkpoint={first}", f"--output={export}", "--max-size=8")
    assert result.code == 0, result.err
    some, other = photos(tmp_path / "some", "fox", "cat"), photos(tmp_path / "other", "dog", "fox", "zcat")
    second = tmp_path / "second"
    result = train(second, some, f"--init-from={first}")
    assert result.code == 0 and "3 classes" in result.out, result.err
    for checkpoint in (first, export, second):
        assert json.loads((checkpoint / "classes.json").read_text()) == ["cat", "dog", "fox"]
    for checkpoint in (first, export):
        result = evaluate(checkpoint, some)
        assert result.code == 0 and "top1" in result.out, result.err
        refused(evaluate(checkpoint, other), "zcat", f"unknown to the run of {checkpoint}", "cat, dog, fox")
    refused(train(tmp_path / "third", other, f"--init-from={first}"), "zcat", f"unknown to the run of {first}")
    older(first)
    (first / "classes.json").unlink()  # as in runs of before: places in sorted order
    assert evaluate(first, other).code == 0
    refused(evaluate(first, some), "has 2 classes, and the run of", "put back its classes.json")
    for split in ("train", "validation", "test"):
        (root / split / "cat").rename(root / split / "zcat")
    (export / "classes.json").rename(first / "classes.json")
    refused(train(first, root), "zcat", f"unknown to the run of {first}")


def test_a_run_on_text_has_no_sizes(commands, tmp_path):
    RunDir(tmp_path).write_config(config.to_dict(tiny_config()))
    refused(commands("evaluate", f"--checkpoint={tmp_path}", "--sizes=8"), "--sizes", "--lengths")
