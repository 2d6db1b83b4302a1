"""Runs on images: they train, are evaluated at other sizes and reported; bad input ends with one line."""

import json

import numpy as np
import pytest
from PIL import Image

import seqpe_jax
from seqpe_jax import config
from seqpe_jax.data import loader
from seqpe_jax.errors import InputError
from seqpe_jax.loading import load_run_config, open_model
from seqpe_jax.reporting.report import write_report
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks.evaluate import EvalRequest, check_request, evaluate, write
from seqpe_jax.training.loop import train_and_evaluate
from tests.small_models import FewExamples
from tests.tiny import older, tiny_config
from tests.training.test_commands import refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

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
    "report.trackers": (),
    "eval.every": 2,
    "eval.sizes": (8, 12),
}
# Without the terms, which compile longest.
PLAIN = TINY | {"objective.contrastive.weight": 0.0, "objective.distillation.weight": 0.0}


@pytest.fixture(scope="module")
def trained(commands, tmp_path_factory):
    """A workdir of two steps on digits."""
    workdir = tmp_path_factory.mktemp("run") / "digits"
    options = [f"--config.{name}={value}" for name, value in PLAIN.items()]
    result = commands("train", f"--config={DIGITS}", f"--workdir={workdir}", *options)
    assert result.code == 0, result.err
    return workdir


def metric_names(workdir):
    return set().union(*map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


def test_a_run_is_evaluated_at_other_sizes_and_reported(commands, trained, tmp_path):
    names = metric_names(trained)
    assert {"eval/top1@8", "eval/top5@12", "eval/loss@12", "train/images_per_second"} <= names
    output = trained / "evaluation.json"
    predictions = tmp_path / "predictions.jsonl"
    words = ["evaluate", f"--checkpoint={trained}", "--sizes=8,16,8x12", f"--output={output}"]
    result = commands(*words, f"--predictions={predictions}")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    report = json.loads(output.read_text())
    assert (report["step"], report["encoding"], report["task"]) == (2, "seqpe", "image_classification")
    assert [entry["size"] for entry in report["results"]] == [[8, 8], [16, 16], [8, 12]]
    for entry in report["results"]:
        assert entry["examples"] > 200 and 0 <= entry["top1"] <= entry["top5"] <= 100
        own = [line for line in lines if line["size"] == entry["size"]]
        assert [line["index"] for line in own] == list(range(entry["examples"])) and own[0]["checkpoint"] == str(
            trained
        )
        assert all(len(line["top"]) == 5 and line["top"][0][1] >= line["top"][4][1] > 0 for line in own)
        right = sum(line["top"][0][0] == line["label"] for line in own)
        assert right == round(entry["top1"] * entry["examples"] / 100) == np.trace(entry["confusion"]["counts"])
    attention = np.load(trained / "attention.npz")
    assert attention["images"].shape == (4, 16, 16, 1) and attention["attention"].shape == (4, 2, 8, 8)
    assert 0.5 < attention["attention"].sum(axis=(2, 3)).mean() < 1  # the rest is on the class token itself
    assert report["attention"]["patches"] == 64 and np.shape(report["attention"]["entropy"])[1] == 2
    result = commands("report", f"--workdir={trained}", f"--output={tmp_path / 'report'}")
    assert result.code == 0, result.err
    assert "| encoding | 8 (1x) | 8x12 (1.22x) | 16 (2x) |" in result.out
    page = (tmp_path / "report" / "report.md").read_text()
    for name in (
        "similarity_digits",
        "position_curves_digits",
        "attention_digits",
        "attention_spread",
        "confusion_digits",
        "extrapolation_sizes",
    ):
        assert f"({name}.png)" in page and (tmp_path / "report" / f"{name}.png").stat().st_size > 5000


@pytest.fixture
def few_examples(monkeypatch, tmp_path):
    """Evaluations read eight examples."""
    monkeypatch.setattr(loader, "EvalBatches", FewExamples)
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))


def in_one_line(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def refuses(model, words, **request):
    in_one_line(lambda: evaluate(model, EvalRequest(**request)), *words)


def test_videos_are_evaluated_at_more_frames(few_examples, tmp_path):
    workdir = tmp_path / "run"
    fields = {"data.size": (4, 16, 16), "model.patch": (2, 8, 8), "eval.sizes": (16,), "eval.frames": (4, 8)}
    fields |= {"encoding.rotary_pairs": 3, "model.layers": 1}
    settings = config.load("configs/moving_digits_vit.py", PLAIN | fields)
    train_and_evaluate(settings, workdir)
    assert {"eval/top1@4x16x16", "eval/top1@8x16x16"} <= metric_names(workdir)
    model = open_model(workdir)
    refuses(model, ["evaluation size 10x16x16", "the videos have 8"], sizes=((10, 16, 16),))
    refuses(model, ["5x16x16", "multiples of 2x8x8"], sizes=((16, 16), (5, 16, 16)))
    refuses(model, ["largest size possible is 20x80x80"], sizes=((400, 16, 16),))
    report, arrays = evaluate(model, EvalRequest(sizes=((16, 16), (8, 16, 24))))
    assert [entry["size"] for entry in report["results"]] == [[4, 16, 16], [8, 16, 24]]
    write(report, arrays, workdir / "evaluation.json")
    assert "| encoding | 4x16x16 (1x) | 8x16x24 (1.44x) |" in write_report(workdir, tmp_path / "report")


def test_evaluate_refuses_arguments(commands, trained):
    for argument, *words in (
        ("--sizes=8x", "--sizes", "'8x'"),
        ("--sizes=4x8x8x8", "--sizes", "'4x8x8x8'"),
        ("--lengths=16", "images", "--sizes"),
    ):
        refused(commands("evaluate", f"--checkpoint={trained}", argument), *words)


def test_evaluate_refuses_sizes_before_it_reads_parameters(trained, tmp_path):
    model = open_model(trained)
    refuses(model, ["9x9", "patches of 2x2", "multiples"], sizes=((8, 8), (9, 9)))
    refuses(model, ["202x202", "largest size possible is 80x80"], sizes=((202, 202),))
    refuses(model, ["4x8x8", "has frames", "name two sides"], sizes=((4, 8, 8),))
    refuses(model, ["images", "--contexts", "--sizes"], contexts=(16,))
    RunDir(tmp_path).write_config(config.to_dict(tiny_config()))
    text = EvalRequest(sizes=((8, 8),))
    in_one_line(lambda: check_request(load_run_config(tmp_path), str(tmp_path), text), "--sizes", "--lengths")


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
    in_one_line(lambda: config.load(DIGITS, fields), *words)


def folder(root, **classes):
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(files):
            Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(root / name / f"{number}.png")
    return root


def of_folder(root, **fields):
    """A config on a folder of images, without an encoder."""
    own = {name: value for name, value in TINY.items() if not name.startswith(("encoding", "objective"))}
    own |= {"data.name": "image_folder", "data.paths": (str(root),), "model.layers": 1, "eval.every": 0, "steps": 1}
    return config.load(f"{DIGITS}:learned", own | fields)


def test_train_refuses_folders_that_cannot_be_read(tmp_path):
    damaged = folder(tmp_path / "b", cats=3, dogs=3)
    (damaged / "cats" / "1.png").write_bytes(b"no picture")
    for root, words in (
        (tmp_path / "nothing", ["nothing", "there is no folder"]),
        (folder(tmp_path / "a", cats=3, dogs=0), ["dogs"]),
        (damaged, ["1.png"]),
    ):
        settings = of_folder(root, **{"eval.every": 1})
        in_one_line(lambda settings=settings: train_and_evaluate(settings, tmp_path / "run"), *words)
        assert not (tmp_path / "run").exists()


def test_classes_go_by_name(few_examples, tmp_path, capsys):
    def photos(root, *classes):
        for split in ("train", "validation", "test"):
            folder(root / split, **{name: 6 for name in classes})
        return root

    def scores(checkpoint, root):
        request = EvalRequest(data="image_folder", paths=(str(root),), sizes=((8, 8),))
        return evaluate(open_model(checkpoint), request)[0]["results"][0]["top1"]

    root, first, export = photos(tmp_path / "all", "cat", "dog", "fox"), tmp_path / "first", tmp_path / "export"
    train_and_evaluate(of_folder(root), first)
    seqpe_jax.load(first).export(export, max_size=8, platforms=("cpu",))
    some, other = photos(tmp_path / "some", "fox", "cat"), photos(tmp_path / "other", "dog", "fox", "zcat")
    second, tuned = tmp_path / "second", {"init_from": str(first)}
    train_and_evaluate(of_folder(some, **tuned), second)
    for checkpoint in (first, export, second):
        assert json.loads((checkpoint / "classes.json").read_text()) == ["cat", "dog", "fox"]
        unknown = ("zcat", f"unknown to the run of {checkpoint}", "cat, dog, fox")
        assert 0 <= scores(checkpoint, some) <= 100
        in_one_line(lambda checkpoint=checkpoint: scores(checkpoint, other), *unknown)
    third = tmp_path / "third"
    train_and_evaluate(of_folder(other, **tuned), third)
    assert json.loads((third / "classes.json").read_text()) == ["dog", "fox", "zcat"]
    assert f"starting from {first}: keeps " in (printed := capsys.readouterr().out)
    assert "draws 51 (model/head); the head is drawn for 3 classes in place of 3\n" in printed
    older(first)
    (first / "classes.json").unlink()  # as in runs of before: places in sorted order
    assert 0 <= scores(first, other) <= 100
    in_one_line(lambda: scores(first, some), "has 2 classes, and the run of", "put back its classes.json")
    for split in ("train", "validation", "test"):
        (root / split / "cat").rename(root / split / "zcat")
    (export / "classes.json").rename(first / "classes.json")
    in_one_line(lambda: train_and_evaluate(of_folder(root), first), "zcat", f"unknown to the run of {first}")
