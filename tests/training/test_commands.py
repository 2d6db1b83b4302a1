"""Bad input ends a command with exit code 2 and one line that says what is wrong and how to fix it."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.loading import open_model
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate
from seqpe_jax.tasks.predictions import check_predictions_path, predictions_file
from seqpe_jax.training.loop import train_and_evaluate
from seqpe_jax.training.trainer import best_metric
from tests.commands import CONFIG, train_arguments
from tests.tiny import older

QUICKSTART = "configs/stdlib_lm.py"
# The terms compile for longer than everything else together, and nothing here depends on them.
PLAIN = {
    "checkpoint__every": 1,
    "objective__contrastive__weight": 0,
    "objective__distillation__weight": 0,
    "objective__shift__rate": 0,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    """3000 bytes of text, of which about 150 are the test split."""
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"line {number:4d} of text\n" for number in range(150)))
    return path


@pytest.fixture(scope="module")
def trained(commands, text, tmp_path_factory) -> pathlib.Path:
    """A workdir of two steps."""
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    result = commands("train", *train_arguments(workdir, text, steps=2, **PLAIN))
    assert result.code == 0, result.err
    return workdir


def refused(result, *words: str) -> None:
    """Asserts exit code 2, no traceback and one line `error: ...` that holds all words."""
    assert result.code == 2, f"exit code {result.code}\n{result.out}\n{result.err}"
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for word in words:
        assert word in lines[0], f"no {word!r} in: {lines[0]}"


def test_train_refuses_arguments(commands, tmp_path):
    both = (f"--config={QUICKSTART}", f"--workdir={tmp_path / 'run'}")
    for arguments, words in (
        (both[:1], ["workdir"]),
        (both[1:], ["config"]),
        ((*both, "more"), ["'more'"]),
        ((*both, "--start-timeout=nan"), ["--start-timeout", "nan"]),
        ((*both, "--num-processes=2147483648"), ["num-processes", "2147483648"]),
        ((*both, "--config.data.name=text_files", "--config.data.paths=2024"), ["data.paths: '2024' does not exist"]),
    ):
        refused(commands("train", *arguments), *words)
    assert not (tmp_path / "run").exists(), "a refused command leaves no workdir behind"


def test_a_best_checkpoint_needs_a_measured_metric():
    best = {"checkpoint.best": "loss@64", "eval.lengths": (64,)}
    for fields, words in (
        (
            {"checkpoint.best": "f1@64", "eval.every": 500},
            "checkpoint.best='f1@64' is not measured .*: choose one of loss@64, .*perplexity@64",
        ),
        ({"eval.every": 0}, "eval.every to be a multiple.* got 0"),
        ({"eval.every": 50}, "checkpoint.every=500.* got 50"),
    ):
        with pytest.raises(InputError, match=words):
            best_metric(config.load(QUICKSTART, best | fields))


def train_refuses(workdir, paths, *words, **fields):
    """Asserts that a config on text files is refused before anything is compiled."""
    values = {"data.paths": (str(paths),)} | {name.replace("__", "."): str(value) for name, value in fields.items()}
    with pytest.raises(InputError) as caught:
        train_and_evaluate(config.load(CONFIG, values), workdir)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not workdir.exists()


def test_train_refuses_data(tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / f"{file}.txt").write_bytes(content)
        return tmp_path / name

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    train_refuses(tmp_path / "run", tmp_path / "nothing", "data.paths", "does not exist")
    train_refuses(tmp_path / "run", tmp_path / "pipe", f"data.paths: '{tmp_path}/pipe' is a pipe")
    train_refuses(tmp_path / "run", tmp_path / "gone", "is a broken link (to 'nowhere')")
    train_refuses(tmp_path / "run", folder("none"), "data.paths", "holds no files")
    train_refuses(tmp_path / "run", folder("empty", empty=b""), "no text")
    latin = folder("latin", good=b"text\n" * 500, latin=b"caf\xe9\n" * 500)
    train_refuses(tmp_path / "run", latin, "latin.txt", "UTF-8", "3")
    train_refuses(tmp_path / "run", folder("short", short=b"short\n" * 2), "16")


@pytest.mark.parametrize("content", [None, "{}", '{"model": 3}', "no json"])
def test_train_refuses_a_file_that_is_no_tokenizer(text, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    train_refuses(tmp_path / "run", text, "data.tokenizer", "tokenizer.json", data__tokenizer=path)


@pytest.mark.slow
def test_names_of_any_bytes_are_printed_or_refused(commands, text, trained, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    refused(commands("train", *train_arguments(odd, text)), "caf\\udce9' is not UTF-8", "--workdir", "choose another")
    assert not odd.exists()
    refused(commands("train", *train_arguments(tmp_path / "run", odd)), "caf\\udce9' does not exist")
    shutil.copytree(trained, tmp_path / "runs" / odd.name)
    result = commands("report", f"--workdir={tmp_path / 'runs'}", f"--output={odd}")
    assert result.code == 0 and f"{tmp_path}/caf\\udce9/report.html" in result.out, result.err
    assert "caf\\udce9" in (odd / "results.csv").read_text()


def word_tokenizer(path: pathlib.Path, words: list[str]) -> None:
    """Writes a tokenizer of whole words."""
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(["[unknown]", *words])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[unknown]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


@pytest.mark.slow
def test_a_tokenizer_that_loses_text_or_does_not_fit_the_run_is_refused(commands, text, tmp_path):
    path, workdir = tmp_path / "tokenizer.json", tmp_path / "run"
    word_tokenizer(path, ["line", "of", "text"])
    fields = {"steps": 1, "data__tokenizer": path, "eval__lengths": (16,), "data__cache_dir": tmp_path / "cache"}
    arguments = train_arguments(workdir, text, config=f"{CONFIG}:rotary", **fields)
    lossy = [*arguments, "--config.data.lossy_tokenizer=True"]
    refused(commands("train", *arguments), "loses text", "checked bytes", "data.lossy_tokenizer=True")
    assert not workdir.exists()
    accepted = commands("train", *lossy)
    assert accepted.code == 0 and "the tokenizer loses text: " in accepted.out, accepted.err

    before = commands("evaluate", f"--checkpoint={workdir}")
    for words in (["line", "of", "text", "more"], ["of", "line", "text"]):  # the second has the same size
        word_tokenizer(path, words)
        refused(commands("train", *lossy), "data.tokenizer")
    after = commands("evaluate", f"--checkpoint={workdir}")  # the run's own tokenizer is in its folder
    assert after.code == 0 and after.out == before.out
    word_tokenizer(path, ["line", "of", "text"])

    settings = json.loads((workdir / "config.json").read_text())
    del settings["data"]["lossy_tokenizer"]  # as of a run from before there was such a field
    older(workdir)
    (workdir / "config.json").write_text(json.dumps(settings))
    refused(commands("evaluate", f"--checkpoint={workdir}"), "loses text", "--lossy-tokenizer")
    assert commands("evaluate", f"--checkpoint={workdir}", "--lossy-tokenizer").code == 0
    shutil.rmtree(tmp_path / "cache")
    refused(commands("train", *arguments), "data.lossy_tokenizer=True")
    result = commands("train", *lossy)
    assert result.code == 0 and "nothing to do" in result.out, result.err


def test_no_output_takes_the_place_of_what_a_run_keeps(commands, trained):
    held = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    for name, *words in (("evaluate", f"--checkpoint={trained}"), ("benchmark", f"--config={CONFIG}"), ("generate",)):
        for file in ("config.json", "metrics.jsonl", "checkpoints/2/new.json"):
            refused(commands(name, *words, f"--output={trained / file}"), f"--output={trained / file} ", "name another")
    refused(commands("generate", f"--output={trained / 'evaluation.json'}"), "keeps: name another")
    assert held == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}


def in_process(workdir, text, **fields) -> None:
    """Does what the command does, without the terms that compile longest."""
    values = {"steps": 2} | PLAIN | {name.replace(".", "__"): value for name, value in fields.items()}
    values = {name.replace("__", "."): value for name, value in values.items()}
    train_and_evaluate(config.load(CONFIG, values | {"data.paths": (str(text),)}), workdir)


@pytest.mark.usefixtures("one_device")
def test_a_folder_of_another_run_or_of_other_files_is_refused(text, trained, tmp_path):
    with pytest.raises(InputError, match=f"{trained}.*model.layers: 1 -> 3.*seed: 0 -> 5"):
        in_process(trained, text, model__layers=3, seed=5)
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(InputError, match=f"{tmp_path} .*config.json"):
        in_process(tmp_path, text)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_start_that_fails_claims_no_folder(text, trained, tmp_path):
    """Nothing is written before the parameters to begin with were read; where no step was saved, any config may start."""
    workdir, start = tmp_path / "tuned", {"steps": 1, "init_from": str(trained)}
    with pytest.raises(InputError, match=r"has 256 tokens, and this one 300 \(model.vocabulary"):
        in_process(workdir, text, **start, model__vocabulary=300)
    assert not workdir.exists()
    workdir.mkdir()
    (workdir / "config.json").write_text((trained / "config.json").read_text().replace('"seed": 0', '"seed": 9'))
    in_process(workdir, text, **start)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0


@pytest.mark.usefixtures("one_device")
def test_the_same_command_again_has_nothing_to_do(text, trained, capsys):
    before = (trained / "metrics.jsonl").read_text()
    in_process(trained, text)
    assert "nothing to do" in capsys.readouterr().out
    assert (trained / "metrics.jsonl").read_text() == before


def check_token_losses(predictions, report):
    """Every scored token is in a line, once, with a loss; the means are those of the report."""
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    for entry in report["results"]:
        name = "length" if "length" in entry else "context"
        own = [line for line in lines if line.get(name) == entry[name]]
        losses = [loss for line in own for loss in line["losses"]]
        assert len(losses) == entry.get("tokens", entry.get("targets"))
        assert sum(losses) / len(losses) == pytest.approx(entry["loss"], rel=1e-5)
        if name == "length":
            starts = [1, *(line["start"] + len(line["tokens"]) for line in own)]
            assert [line["start"] for line in own] == starts[:-1]
        assert all(bytes(line["tokens"]).decode() == line["text"] for line in own)
    by_place = {}
    for line in lines:
        by_place |= {line["start"] + at: token for at, token in enumerate(line["tokens"])}
        assert all(by_place[line["start"] + at] == token for at, token in enumerate(line["tokens"]))


def test_predictions_never_replace_another_runs_or_other_files(tmp_path):
    path, own, other = tmp_path / "predictions.jsonl", str(tmp_path / "a"), str(tmp_path / "b")
    for step in (1, 2):
        check_predictions_path(path, own)
        with predictions_file(path, own, step) as write:
            write({"index": 0})
    assert json.loads(path.read_text()) == {"checkpoint": own, "step": 2, "index": 0}
    with pytest.raises(InputError, match=f"holds the predictions of {own}: choose another name"):
        check_predictions_path(path, other)
    with pytest.raises(RuntimeError), predictions_file(path, own, 3) as write:
        write({"index": 1})
        raise RuntimeError
    assert json.loads(path.read_text())["step"] == 2, "an evaluation that fails leaves the old file"
    path.write_text("my corpus\n")
    with pytest.raises(InputError, match="exists and holds no predictions"):
        check_predictions_path(path, own)


@pytest.mark.slow
def test_evaluate_writes_its_results(commands, trained, tmp_path):
    output, predictions = tmp_path / "deep" / "evaluation.json", tmp_path / "predictions.jsonl"
    options = ["--lengths=16,48", "--contexts=48,16", "--targets=30", f"--output={output}"]
    result = commands("evaluate", f"--checkpoint={trained}", *options, f"--predictions={predictions}")
    assert result.code == 0, result.err
    report = json.loads(output.read_text())
    check_token_losses(predictions, report)
    assert (report["step"], report["encoding"], report["task"]) == (2, "seqpe", "language_modelling")
    assert [[entry.get("length"), entry.get("context")] for entry in report["results"]] == [
        [16, None],
        [48, None],
        [None, 48],
        [None, 16],
    ]
    assert len({entry["tokens"] for entry in report["results"][:2]}) == 1
    assert [(entry["targets"], entry["stride"]) for entry in report["results"][2:]] == [(24, 8), (24, 8)]
    assert all(0 < entry["loss"] < 8 for entry in report["results"])
    assert f"length 48: {report['results'][0]['tokens']} tokens, loss " in result.out
    assert "context 16: 24 targets, loss " in result.out
    assert (output.parent / "similarity.npz").is_file()
    curves = np.load(output.parent / "position_curves.npz")
    assert curves["logit"].shape[2:] == curves["distances"].shape and curves["distances"][-1] == 47
    spread = report["attention"]
    assert spread["tokens"] == 48 and np.shape(spread["distance"]) == np.shape(spread["entropy"]) == (1, 2)
    assert 1 < np.min(spread["distance"]) and np.max(spread["entropy"]) < np.log(48)


@pytest.mark.slow
def test_the_best_checkpoint_is_retained_and_read_on_request(commands, text, trained, tmp_path):
    workdir, output = tmp_path / "run", tmp_path / "evaluation.json"
    # Nothing is learned, so of equal losses the first is the best.
    fields = {
        "config": f"{CONFIG}:none",
        "steps": 6,
        "checkpoint__every": 1,
        "checkpoint__keep": 1,
        "eval__every": 2,
        "eval__lengths": (16,),
        "optimizer__learning_rate": 1e-12,
        "checkpoint__best": "loss@16",
    }
    result = commands("train", *train_arguments(workdir, text, **fields))
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval/loss@16"] for line in lines if "eval/loss@16" in line}
    best = min(losses, key=losses.get)
    assert sorted(losses) == [2, 4, 6] and best != 6, losses
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {str(best), "6"}

    given = [f"--checkpoint={workdir}", "--split=validation", "--lengths=16", f"--output={output}"]
    result = commands("evaluate", *given, "--which=best")
    assert result.code == 0 and f"step {best} is the best, loss@16 {losses[best]:.6g}" in result.out, result.err
    report = json.loads(output.read_text())
    assert report["step"] == best and report["results"][0]["loss"] == pytest.approx(losses[best], abs=1e-5)
    assert commands("evaluate", *given).code == 0 and json.loads(output.read_text())["step"] == 6
    exported = commands(
        "export",
        f"--checkpoint={workdir}",
        f"--output={tmp_path / 'made'}",
        "--which=best",
        "--platforms=cpu",
        "--max-length=16",
    )
    assert exported.code == 0, exported.err
    assert json.loads((tmp_path / "made" / "config.json").read_text())["export"]["step"] == best
    with pytest.raises(InputError, match="is an export, .*leave --which out"):
        open_model(tmp_path / "made", "best")
    with pytest.raises(InputError, match="without checkpoint.best"):
        open_model(trained, "best")


def test_evaluate_refuses_arguments(commands, trained):
    for argument, *words in (
        ("--lengths=16,many", "--lengths", "'many'"),
        ("--lengths=190", "190", "longer than the test split"),
        ("--contexts=16,0", "--contexts", "'0'"),
        ("--split=tests", "split", "tests"),
        ("--config.mesh.fsdp=2", "mesh.fsdp=2", "1 devices"),
        ("--config.mesh.tensor=0", "mesh.tensor", "got 0"),
        ("--config.model.width=2", "--config.model.width is not read here", "--config.mesh.fsdp"),
    ):
        refused(commands("evaluate", f"--checkpoint={trained}", argument), *words)


def test_evaluate_refuses_lengths_and_contexts_before_it_reads_parameters(trained):
    model = open_model(trained)
    for options, words in (
        ({"lengths": ((1001,),)}, ["1001", "largest position possible is 999", "3 digits"]),
        ({"lengths": ((64,),), "tokens": 40}, ["eval.tokens=40 (--tokens) is less than evaluation length 64"]),
        ({"contexts": (16, 1)}, ["eval.contexts", "at least 2"]),
        ({"contexts": (16, 32, 16)}, ["names 16 more than once"]),
        ({"contexts": (16, 1001)}, ["--contexts) 1001", "largest position possible is 999"]),
        ({"contexts": (16, 190)}, ["evaluation context 190 is longer than the test split", "contexts below"]),
        ({"contexts": (16, 32), "stride": 16}, ["(--stride) must be less than the smallest", "16"]),
        ({"contexts": (16, 32), "targets": 7}, ["(--targets) is less than the 8 targets of one window"]),
        ({"contexts": (16,), "tokens": 99}, ["--tokens is for --lengths", "--targets"]),
        ({"stride": 8}, ["--stride is for --contexts, which is not set"]),
    ):
        with pytest.raises(InputError) as caught:
            evaluate(model, EvalRequest(**options))
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
