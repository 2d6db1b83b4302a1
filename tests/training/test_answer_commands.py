"""Questions end to end: trained, answered at other lengths, scored, reported; from another run's parameters too."""

import json
import math
import pathlib

import pytest

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.loading import open_model
from seqpe_jax.reporting.report import write_report
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate, write
from seqpe_jax.tasks.question_answering import QuestionAnswering
from seqpe_jax.training.loop import train_and_evaluate
from tests.commands import CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

PLAIN = {
    "objective.contrastive.weight": 0.0,
    "objective.distillation.weight": 0.0,
    "objective.shift.rate": 0.0,
    "data.name": "qa_jsonl",
    "data.length": 24,
    "eval.lengths": (24, 48),
    "eval.new_tokens": 4,
    "checkpoint.every": 100,
}


def settings(path, **fields):
    return config.load(CONFIG, PLAIN | {"data.paths": (str(path),)} | fields)


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
def trained(one_device, asked, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "qa"
    fields = {"data.question_weight": 0.5, "steps": 40, "eval.every": 40, "report.every": 20}
    learns = settings(asked, **fields, **{"optimizer.learning_rate": 0.01})
    assert "30 questions at 24 tokens; skipped: too_long 10" in QuestionAnswering(learns).describe()
    train_and_evaluate(learns, workdir)
    return workdir


def test_scores_by_length_with_every_answer_stored(trained):
    found, arrays = evaluate(open_model(trained), EvalRequest(lengths=((24,), (48,))))
    write(found, arrays, trained / "evaluation.json")
    found = json.loads((trained / "evaluation.json").read_text())
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
    write_report(trained, trained / "report")
    page = (trained / "report" / "report.md").read_text()
    assert "Answers found" in page and "Guessing without the passage" in page
    assert "contains" in (trained / "report" / "results.csv").read_text().splitlines()[0]


def test_at_most_so_many_questions_and_tokens_of_an_answer(commands, trained, tmp_path, capsys):
    predictions = tmp_path / "predictions.jsonl"
    words = ["evaluate", f"--checkpoint={trained}", "--lengths=24", "--examples=5", "--new-tokens=1"]
    few = commands(*words, f"--predictions={predictions}")
    words = "length 24: 5 of 5 answers take more than 1 tokens and were cut off: --new-tokens gives them more"
    assert few.code == 0 and words in few.out, few.err
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [(line["length"], line["gold"][0]) for line in lines] == [(24, letter) for letter in "abcab"]
    assert all(
        line["prompt"].endswith("What?") and line["contains"] == 0 and len(line["hypothesis"]) <= 1 for line in lines
    )
    evaluate(open_model(trained), EvalRequest(lengths=((24,),), new_tokens=2))  # they hold a space and a letter
    assert "cut off" not in capsys.readouterr().out
    with pytest.raises(InputError, match="eval.new_tokens"):
        evaluate(open_model(trained), EvalRequest(new_tokens=0))


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


def test_parameters_of_a_language_model_carry_over(asked, trained, tmp_path, capsys):
    """A run begins with those of another and, after a step of warm-up, evaluates like it."""
    fields = {"steps": 1, "optimizer.warmup_steps": 1, "eval.new_tokens": 1, "init_from": str(trained)}
    train_and_evaluate(settings(asked, **fields), tmp_path / "tuned")
    out = capsys.readouterr().out
    assert "30 of 30 sampled answers take more than eval.new_tokens=1 tokens" in out
    assert f"starting from {trained}" in out
    request = EvalRequest(lengths=((24,),), new_tokens=4)
    first, second = (evaluate(open_model(run), request)[0]["results"] for run in (trained, tmp_path / "tuned"))
    assert first == second and "contains" in first[0]


def test_data_and_fields_of_questions_are_refused(asked, tmp_path):
    malformed = tmp_path / "malformed.jsonl"
    malformed.write_text('{"index": 0, "input": "a", "outputs": ["b"]}\n{"index": 1, "input": "a"\n')
    for fields, words in (
        ({"data.name": "squad_long", "data.paths": ()}, ["data.paths", "SQuAD"]),
        ({"data.length": 10}, ["no question", "10 tokens", "smallest workable length is"]),
        ({"data.name": "text_files", "data.question_weight": 1.0}, ["question_weight", "text"]),
        ({"data.paths": (str(malformed),)}, ["line 2"]),
    ):
        with pytest.raises(InputError) as caught:
            train_and_evaluate(settings(asked, **{"eval.lengths": ()} | fields), tmp_path / "run")
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
