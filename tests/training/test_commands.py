"""Bad input ends a command with exit code 2 and one line that says what is wrong and how to fix it."""

import functools
import json
import os
import pathlib
import shutil

import pytest

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


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([f"--config={QUICKSTART}"], ["workdir"]),
        (["--workdir=DIR"], ["config"]),
        (["--config=configs/nothing.py", "--workdir=DIR"], ["configs/nothing.py"]),
        ([f"--config={QUICKSTART}:rotory", "--workdir=DIR"], ["rotory", "'rotary'"]),
        ([f"--config={QUICKSTART}", "--workdir=DIR", "more"], ["'more'"]),
        ([f"--config={QUICKSTART}", "--workdri=DIR"], ["workdri", "workdir"]),
        (["--config.model.widht=96"], ["model.widht", "'model.width'"]),
        (["--config.modle.width=96"], ["modle.width", "'model.width'"]),
        (["--config.model=96"], ["model"]),
        (["--config.model.width=wide"], ["model.width", "wide"]),
        (["--config.model.width=96.5"], ["model.width", "96.5"]),
        (["--config.model.dropout=1.5"], ["model.dropout", "below 1", "1.5"]),
        (["--config.steps=0"], ["steps", "at least 1"]),
        (
            ["--config.checkpoint.best=f1@64", "--config.eval.every=500", "--config.eval.lengths=(64,)"],
            ["checkpoint.best='f1@64' is not measured", "choose one of loss@64, perplexity@64, bits_per_byte@64"],
        ),
        (["--config.checkpoint.best=loss@64", "--config.eval.every=0"], ["eval.every to be a multiple", "got 0"]),
        (["--config.checkpoint.best=loss@64", "--config.eval.every=50"], ["checkpoint.every=500", "got 50"]),
        (["--start-timeout=nan"], ["--start-timeout", "nan"]),
        (["--num-processes=2147483648"], ["num-processes", "2147483648"]),
        (["--config.encoding.kind=rotory"], ["encoding.kind", "'rotary'"]),
        (["--config.eval.lengths=(64,x)"], ["eval.lengths"]),
        (["--config.encoding.digits=2"], ["largest position possible is 99", "encoding.digits=4"]),
        (["--config.data.length=8192"], ["largest position possible is 4999", "encoding.max_position"]),
        (["--config.eval.lengths=(64,12000)"], ["12000", "largest position possible is 9999", "4 digits"]),
        (
            ["--config.objective.skip.rate=0.5", "--config.objective.skip.range=8192"],
            ["objective.skip.range=8192", "5000", "encoding.max_position"],
        ),
        (
            ["--config.objective.contrastive.weight=0", "--config.objective.contrastive.batch=8"],
            ["objective.contrastive.batch is not read here", "objective.contrastive.weight above 0"],
        ),
        (["--config.data.name=text_files"], ["data.paths"]),
        (["--config.data.name=text_file"], ["data.name", "'text_files'"]),
        (["--config.data.name=text_files", "--config.data.paths=2024"], ["data.paths: '2024' does not exist"]),
    ],
)
def test_train_refuses_arguments(commands, tmp_path, arguments, words):
    if not any(argument.startswith(("--config=", "--workd")) for argument in arguments):
        arguments = [f"--config={QUICKSTART}", "--workdir=DIR", *arguments]
    workdir = tmp_path / "run"
    refused(commands("train", *(a.replace("DIR", str(workdir)) for a in arguments)), *words)
    assert not workdir.exists(), "a refused command leaves no workdir behind"


@pytest.mark.parametrize(
    "content,words",
    [
        (None, ["data.paths", "does not exist"]),
        ({}, ["data.paths", "holds no files"]),
        ({"empty.txt": b""}, ["no text"]),
        ({"good.txt": b"text\n" * 500, "latin.txt": b"caf\xe9\n" * 500}, ["latin.txt", "UTF-8", "3"]),
    ],
)
def test_train_refuses_data(commands, tmp_path, content, words):
    folder = tmp_path / "texts"
    if content is not None:
        folder.mkdir()
        for name, value in content.items():
            (folder / name).write_bytes(value)
    refused(commands("train", *train_arguments(tmp_path / "run", folder)), *words)


def test_paths_that_are_no_files_are_refused_at_once(commands, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    for name, words in (("pipe", "is a pipe"), ("gone", "is a link that leads nowhere (to 'nowhere')")):
        result = commands("train", *train_arguments(tmp_path / "run", tmp_path / name))
        refused(result, f"data.paths: '{tmp_path}/{name}' {words}")


def test_names_of_any_bytes_are_printed_or_refused(commands, text, trained, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    refused(commands("train", *train_arguments(odd, text)), "caf\\udce9' is not UTF-8", "--workdir", "choose another")
    assert not odd.exists()
    refused(commands("train", *train_arguments(tmp_path / "run", odd)), "caf\\udce9' does not exist")
    shutil.copytree(trained, tmp_path / "runs" / odd.name)
    result = commands("report", f"--workdir={tmp_path / 'runs'}", f"--output={odd}")
    assert result.code == 0 and f"{tmp_path}/caf\\udce9/report.html" in result.out, result.err
    assert "caf\\udce9" in (odd / "results.csv").read_text()


def test_train_refuses_a_split_shorter_than_a_window(commands, tmp_path):
    (tmp_path / "short.txt").write_text("short\n" * 2)
    refused(commands("train", *train_arguments(tmp_path / "run", tmp_path / "short.txt")), "16")


@pytest.mark.parametrize("content", [None, "{}", '{"model": 3}', "no json"])
def test_train_refuses_a_file_that_is_no_tokenizer(commands, text, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    arguments = train_arguments(tmp_path / "run", text, data__tokenizer=path)
    refused(commands("train", *arguments), "data.tokenizer", "tokenizer.json")


def word_tokenizer(path: pathlib.Path, words: list[str]) -> None:
    """Writes a tokenizer of whole words."""
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(["[unknown]", *words])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[unknown]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("words", [["line", "of", "text", "more"], ["of", "line", "text"]])
def test_a_tokenizer_that_does_not_fit_the_run_is_refused(commands, text, tmp_path, words):
    path, workdir = tmp_path / "tokenizer.json", tmp_path / "run"
    word_tokenizer(path, ["line", "of", "text"])
    fields = {"steps": 1, "data__tokenizer": path, "data__lossy_tokenizer": True, "eval__lengths": (16,)}
    arguments = train_arguments(workdir, text, config=f"{CONFIG}:rotary", **fields)
    result = commands("train", *arguments)
    assert result.code == 0, result.err
    before = commands("evaluate", f"--checkpoint={workdir}")
    word_tokenizer(path, words)  # another vocabulary, then the same size with other meanings
    refused(commands("train", *arguments), "data.tokenizer")
    after = commands("evaluate", f"--checkpoint={workdir}")  # the run's own tokenizer lies beside its checkpoints
    assert after.code == 0 and after.out == before.out


@pytest.mark.slow
def test_a_tokenizer_that_loses_text_is_refused_until_that_is_accepted(commands, text, tmp_path):
    path, workdir = tmp_path / "tokenizer.json", tmp_path / "run"
    word_tokenizer(path, ["line", "of", "text"])
    fields = {"steps": 1, "data__tokenizer": path, "eval__lengths": (16,), "data__cache_dir": tmp_path / "cache"}
    arguments = train_arguments(workdir, text, config=f"{CONFIG}:rotary", **fields)
    refused(commands("train", *arguments), "loses text", "checked bytes", "data.lossy_tokenizer=True")
    assert not workdir.exists()
    accepted = commands("train", *arguments, "--config.data.lossy_tokenizer=True")
    assert accepted.code == 0 and "the tokenizer loses text: " in accepted.out, accepted.err
    settings = json.loads((workdir / "config.json").read_text())
    del settings["data"]["lossy_tokenizer"]  # as of a run from before there was such a field
    older(workdir)
    (workdir / "config.json").write_text(json.dumps(settings))
    refused(commands("evaluate", f"--checkpoint={workdir}"), "loses text", "--lossy-tokenizer")
    assert commands("evaluate", f"--checkpoint={workdir}", "--lossy-tokenizer").code == 0
    shutil.rmtree(tmp_path / "cache")
    refused(commands("train", *arguments), "data.lossy_tokenizer=True")
    result = commands("train", *arguments, "--config.data.lossy_tokenizer=True")
    assert result.code == 0 and "nothing to do" in result.out, result.err


def test_a_run_from_before_a_field_was_there_goes_on(commands, text, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    settings = json.loads((workdir / "config.json").read_text())
    del settings["data"]["lossy_tokenizer"], settings["encoding"]["fraction_digits"]
    older(workdir)
    (workdir / "config.json").write_text(json.dumps(settings))
    result = commands("train", *train_arguments(workdir, text, steps=2, **PLAIN))
    assert result.code == 0 and "nothing to do" in result.out, result.err


def test_no_output_takes_the_place_of_what_a_run_keeps(commands, trained):
    held = {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    for name, *words in (("evaluate", f"--checkpoint={trained}"), ("benchmark", f"--config={CONFIG}"), ("generate",)):
        for file in ("config.json", "metrics.jsonl", "checkpoints/2/new.json"):
            refused(commands(name, *words, f"--output={trained / file}"), f"--output={trained / file} ", "name another")
    refused(commands("generate", f"--output={trained / 'evaluation.json'}"), "keeps: name another")
    assert held == {path: path.read_bytes() for path in trained.iterdir() if path.is_file()}


def test_train_refuses_a_workdir_of_another_config(commands, text, trained):
    arguments = train_arguments(trained, text, steps=2, model__layers=3, seed=5, **PLAIN)
    refused(commands("train", *arguments), str(trained), "model.layers: 1 -> 3", "seed: 0 -> 5")


def test_a_start_that_fails_claims_no_folder(commands, text, trained, tmp_path):
    """Nothing is written before the parameters to begin with were read; where no step was saved, any config may start."""
    workdir = tmp_path / "tuned"
    start = functools.partial(train_arguments, workdir, text, steps=1, **PLAIN)
    wrong = commands("train", *start(model__vocabulary=300), f"--init-from={trained}")
    assert wrong.code == 2 and "has 256 tokens, and this one 300 (model.vocabulary" in wrong.err
    assert not workdir.exists()
    workdir.mkdir()
    (workdir / "config.json").write_text((trained / "config.json").read_text().replace('"seed": 0', '"seed": 9'))
    right = commands("train", *start(), f"--init-from={trained}")
    assert right.code == 0, right.err
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0


def test_train_refuses_a_folder_of_other_files(commands, text, tmp_path):
    (tmp_path / "letter.txt").write_text("dear reader")
    refused(commands("train", *train_arguments(tmp_path, text)), str(tmp_path), "config.json")


def test_the_same_command_again_has_nothing_to_do(commands, text, trained):
    before = (trained / "metrics.jsonl").read_text()
    result = commands("train", *train_arguments(trained, text, steps=2, **PLAIN))
    assert result.code == 0, result.err
    assert "nothing to do" in result.out
    assert (trained / "metrics.jsonl").read_text() == before


def test_evaluate_writes_its_results(commands, trained, tmp_path):
    output = tmp_path / "deep" / "evaluation.json"
    options = ["--lengths=16,48", "--contexts=48,16", "--targets=30", f"--output={output}"]
    result = commands("evaluate", f"--checkpoint={trained}", *options)
    assert result.code == 0, result.err
    report = json.loads(output.read_text())
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


def test_the_best_checkpoint_is_kept_and_read_where_it_is_asked_for(commands, text, trained, tmp_path):
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
    told = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval/loss@16"] for line in told if "eval/loss@16" in line}
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
        "export", f"--checkpoint={workdir}", f"--output={tmp_path / 'made'}", "--which=best", "--max-length=16"
    )
    assert exported.code == 0, exported.err
    assert json.loads((tmp_path / "made" / "config.json").read_text())["export"]["step"] == best
    refused(
        commands("evaluate", f"--checkpoint={tmp_path / 'made'}", "--which=best"), "is an export", "leave --which out"
    )
    refused(commands("generate", f"--checkpoint={trained}", "--prompt=x", "--which=best"), "without checkpoint.best")


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--lengths=16,many"], ["--lengths", "'many'"]),
        (["--lengths=0"], ["--lengths", "'0'"]),
        (["--lengths=1001"], ["1001", "largest position possible is 999", "3 digits"]),
        (["--lengths=190"], ["190", "longer than the test split"]),
        (["--lengths=64", "--tokens=40"], ["eval.tokens=40 (--tokens) is less than evaluation length 64"]),
        (["--contexts=16,0"], ["--contexts", "'0'"]),
        (["--contexts=16,1"], ["eval.contexts", "at least 2"]),
        (["--contexts=16,32,16"], ["names 16 more than once"]),
        (["--contexts=16,1001"], ["--contexts) 1001", "largest position possible is 999"]),
        (["--contexts=16,190"], ["evaluation context 190 is longer than the test split", "contexts below"]),
        (["--contexts=16,32", "--stride=16"], ["(--stride) must be less than the smallest", "16"]),
        (["--contexts=16,32", "--targets=7"], ["(--targets) is less than the 8 targets of one window"]),
        (["--contexts=16", "--tokens=99"], ["--tokens is for --lengths", "--targets"]),
        (["--stride=8"], ["--stride is for --contexts, which is not set"]),
        (["--split=tests"], ["split", "tests"]),
        (["--lenghts=16"], ["lenghts", "lengths"]),
    ],
)
def test_evaluate_refuses_arguments(commands, trained, arguments, words):
    refused(commands("evaluate", f"--checkpoint={trained}", *arguments), *words)


def damage(workdir: pathlib.Path, how: str) -> None:
    """Breaks a copy of a run."""
    newest = workdir / "checkpoints" / "2"
    if how == "truncated arrays":
        files = [path for path in (newest / "state").rglob("*") if path.is_file() and path.stat().st_size > 2000]
        assert files
        for path in files:
            path.write_bytes(path.read_bytes()[:100])
    elif how == "no state":
        shutil.rmtree(newest / "state")
    elif how == "no state of 3":
        shutil.rmtree(newest.with_name("3") / "state")
    elif how == "no checkpoint":
        for path in (workdir / "checkpoints").iterdir():
            shutil.rmtree(path)
    elif how == "no checkpoints folder":
        shutil.rmtree(workdir / "checkpoints")
    elif how == "no config":
        (workdir / "config.json").unlink()
    elif how == "half a config":
        content = (workdir / "config.json").read_text()
        (workdir / "config.json").write_text(content[: len(content) // 2])
    else:
        shutil.rmtree(workdir)


@pytest.mark.parametrize(
    "how,words",
    [
        ("no checkpoint", ["no finished checkpoint"]),
        ("no checkpoints folder", ["no checkpoints"]),
        ("no config", ["config.json"]),
        ("half a config", ["config.json"]),
        ("nothing at all", ["no such directory"]),
    ],
)
def test_evaluate_refuses_a_broken_run(commands, trained, tmp_path, how, words):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    damage(copy, how)
    refused(commands("evaluate", f"--checkpoint={copy}"), *words)


@pytest.mark.parametrize("how", ["truncated arrays", "no state"])
def test_a_broken_checkpoint_is_left_for_the_one_before(commands, trained, text, tmp_path, how):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    settings = json.loads((copy / "config.json").read_text())
    older(copy)
    (copy / "config.json").write_text(json.dumps(settings | {"steps": 3}))
    damage(copy, how)
    result = commands("evaluate", f"--checkpoint={copy}", "--lengths=16")
    assert (
        result.code == 0 and "checkpoints/2 is damaged (" in result.err and "step 1 is read in its place" in result.err
    )
    assert (copy / "checkpoints" / "2").is_dir()  # who only reads changes nothing
    arguments = train_arguments(copy, text, steps=3, **PLAIN)
    result = commands("train", *arguments)
    assert result.code == 0, result.err
    assert "renamed to 2.damaged, going on from step 1" in result.out
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["2", "2.damaged", "3"]
    shutil.rmtree(copy / "checkpoints" / "2")
    damage(copy, "no state of 3")
    again = commands("train", *train_arguments(copy, text, steps=4, **PLAIN))
    refused(again, "all checkpoints", "checkpoints/3", "damaged")


@pytest.mark.parametrize("name,option", [("train", "workdir"), ("evaluate", "checkpoint"), ("report", "workdir")])
def test_help_tells_what_the_command_does(commands, name, option):
    result = commands(name, "--help")
    assert result.code == 0, result.err
    assert f"python -m seqpe_jax.{name}" in result.out and f"--{option}" in result.out
