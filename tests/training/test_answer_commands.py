"""Questions end to end: trained, answered at other lengths, scored, reported; from another run's parameters too."""

import json
import math
import pathlib

import pytest

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.loading import open_model
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate
from seqpe_jax.training.loop import train_and_evaluate
from tests.commands import CONFIG, train_arguments

pytestmark = pytest.mark.slow

PLAIN = {
    "objective__contrastive__weight": 0,
    "objective__distillation__weight": 0,
    "objective__shift__rate": 0,
    "data__length": 24,
    "eval__lengths": (24, 48),
    "eval__new_tokens": 4,
    "checkpoint__every": 100,
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> pathlib.Path:
    """Forty questions whose answer is a letter of the prompt; ten of them are too long for 24 bytes."""
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    lines = []
    for number in range(40):
        letter, rest = "abcd"[number % 4], " and more" * (number % 4 == 3)
        prompt = f"it is {letter}.{rest}\n\nWhat?"
        lines.append(json.dumps({"index": number, "input": prompt, "outputs": [letter, letter.upper()]}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(commands, asked, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "qa"
    fields = PLAIN | {"data__name": "qa_jsonl", "data__question_weight": 0.5, "steps": 40, "eval__every": 40}
    fields |= {"optimizer__learning_rate": 0.01, "report__every": 20}
    result = commands("train", *train_arguments(workdir, asked, **fields))
    assert result.code == 0, result.err
    assert "30 questions at 24 tokens; skipped: too_long 10" in result.out
    return workdir


def test_scores_by_length_with_every_answer_stored(commands, trained):
    file = trained / "evaluation.json"
    result = commands("evaluate", f"--checkpoint={trained}", "--lengths=24,48", f"--output={file}")
    assert result.code == 0, result.err
    found = json.loads(file.read_text())
    assert found["task"] == "question_answering" and [one["length"] for one in found["results"]] == [24, 48]
    assert [one["examples"] for one in found["results"]] == [30, 40]
    for one in found["results"]:
        lines = [json.loads(line) for line in (trained / f"answers_{one['length']}.jsonl").read_text().splitlines()]
        assert len(lines) == one["examples"]
        assert one["contains"] == pytest.approx(100 * sum(line["contains"] for line in lines) / len(lines))
        assert one["answer_perplexity"] == pytest.approx(math.exp(one["loss"]))
        assert all(0 <= one[name] <= 100 for name in ("contains", "exact_match", "exact_match_strict", "f1"))
        assert all(len(line["hypothesis"]) <= 4 for line in lines)
    assert found["results"][0]["loss"] < 1.5  # three letters and an end: learned
    assert found["without_context"]["examples"] == 30
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"eval/contains@24", "eval/contains@48", "eval/loss@24"} <= set().union(*logged)
    result = commands("report", f"--workdir={trained}", f"--output={trained / 'report'}")
    assert result.code == 0, result.err
    page = (trained / "report" / "report.md").read_text()
    assert "Answers found" in page and "Guessing without the passage" in page
    assert "contains" in (trained / "report" / "results.csv").read_text().splitlines()[0]


def test_at_most_so_many_questions_and_tokens_of_an_answer(commands, trained):
    result = commands("evaluate", f"--checkpoint={trained}", "--lengths=24", "--examples=5", "--new-tokens=1")
    assert result.code == 0, result.err
    assert (
        "length 24: 5 of 5 answers take more than 1 tokens and were cut off: --new-tokens gives them more" in result.out
    )
    for examples in (5, 400):  # two tokens hold a space and a letter
        result = commands(
            "evaluate", f"--checkpoint={trained}", "--lengths=24", f"--examples={examples}", "--new-tokens=2"
        )
        assert result.code == 0 and "cut off" not in result.out, result.out
    result = commands("evaluate", f"--checkpoint={trained}", "--new-tokens=0")
    assert result.code == 2 and "eval.new_tokens" in result.err and "Traceback" not in result.err


def test_limits_of_questions_are_refused_for_text_and_those_of_text_for_questions(trained, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 50)
    model = open_model(trained)
    on_text = {"data": "text_files", "paths": (str(text),), "lengths": ((24,),)}
    for options, words in (
        (on_text | {"examples": 5}, "--examples is for questions, and text_files has none"),
        (on_text | {"new_tokens": 5}, "--new-tokens is for questions, and text_files has none"),
        ({"contexts": (8, 16)}, "--contexts is for text, and qa_jsonl has questions"),
        ({"stride": 5}, "--stride is for text, and qa_jsonl has questions"),
        ({"targets": 9}, "--targets is for text, and qa_jsonl has questions"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(model, EvalRequest(**options))


def test_parameters_of_a_language_model_carry_over(commands, asked, trained, tmp_path):
    """A run on text begins with those of the run on questions and, after a step of warm-up, evaluates like it."""
    fields = PLAIN | {"data__name": "qa_jsonl", "steps": 1, "optimizer__warmup_steps": 1, "eval__new_tokens": 1}
    arguments = train_arguments(tmp_path / "tuned", asked, **fields)
    result = commands("train", *arguments, f"--init-from={trained}")
    assert result.code == 0, result.err
    assert "30 of 30 sampled answers take more than eval.new_tokens=1 tokens" in result.out
    assert f"starting from {trained}" in result.out
    runs = (trained, tmp_path / "tuned")
    options = ("--lengths=24", "--new-tokens=4")
    outputs = [commands("evaluate", f"--checkpoint={run}", *options).out.splitlines()[-1] for run in runs]
    assert outputs[0] == outputs[1] and "contains" in outputs[0]


def test_data_and_fields_of_questions_are_refused(asked, tmp_path):
    malformed = tmp_path / "malformed.jsonl"
    malformed.write_text('{"index": 0, "input": "a", "outputs": ["b"]}\n{"index": 1, "input": "a"\n')
    questions = {"data.name": "qa_jsonl"}
    for fields, words in (
        ({"data.name": "squad_long", "data.paths": ()}, ["data.paths", "SQuAD"]),
        (questions | {"data.length": 10}, ["no question", "10 tokens", "smallest workable length is"]),
        ({"data.question_weight": 1.0}, ["question_weight", "text"]),
        (questions | {"data.paths": (str(malformed),)}, ["line 2"]),
    ):
        values = {name.replace("__", "."): value for name, value in PLAIN.items()}
        values |= {"eval.lengths": (), "data.paths": (str(asked),)} | fields
        with pytest.raises(InputError) as caught:
            train_and_evaluate(config.load(CONFIG, values), tmp_path / "run")
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
