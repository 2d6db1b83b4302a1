"""Suites of probes, asked of models that need no training: scores, effective lengths, files."""

import dataclasses
import functools
import json
import types

import numpy as np
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.tasks import evaluate, suites
from seqpe_jax.tasks.base import EvalContext
from seqpe_jax.tasks.question_answering import QuestionAnswering
from seqpe_jax.tasks.suites import SuiteRequest
from tests.tiny import tiny_config


@dataclasses.dataclass
class Reader:
    """A model that finds what is within so many bytes of the end of its prompt."""

    config: object
    reach: int = 600
    load_params: object = None
    folder: str = "runs/reader"
    step: int = 3

    @property
    def model_spec(self):
        return types.SimpleNamespace(max_grid=None)

    @functools.cached_property
    def task(self):
        return QuestionAnswering(self.config)

    def answer(self, prompt):
        text = bytes(np.asarray(prompt, np.uint8)).decode()
        needle = text.rfind("The pass key is ", 0, len(text) - 60)
        near = needle >= max(0, len(text) - self.reach)
        found = text[needle + 16 :].partition(".")[0] if near else "none"
        return types.SimpleNamespace(content=list(f" {found}".encode()))


def ask(model, evaluator, eval_size, split, *_):
    (length,) = eval_size
    ctx = EvalContext(
        lambda batch: {"loss": np.zeros((len(batch["tokens"]), length))},
        lambda prompts, *_, **__: [model.answer(prompt) for prompt in prompts],
        lambda batch: batch,
        batch_size=4,
    )
    return evaluator.evaluate(ctx, eval_size, split)


@pytest.mark.slow
def test_a_suite_says_the_effective_length_and_is_added_to_the_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_evaluate_and_print", ask)
    model = Reader(tiny_config(variant="alibi"))
    request = SuiteRequest(("passkey", "induction"), (512, 1024, 2048), examples=10)
    report, arrays = evaluate.evaluate(model, evaluate.EvalRequest(suites=request))
    found = report["suites"]
    assert [result["score"] for result in found["probes"]["passkey"]] == [100.0, 60.0, 40.0]
    assert (
        found["suites"]["passkey"]["effective_length"] == 512
        and found["suites"]["induction"]["effective_length"] is None
    )
    assert [part["contains"] for part in found["probes"]["passkey"][1]["depth"]] == [0.0, 0.0, 100.0, 100.0, 100.0]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"checkpoint": model.folder, "step": 3, "results": [{"length": 16, "loss": 1.0}]}))
    evaluate.write(report, arrays, path)
    written = json.loads(path.read_text())
    assert written["results"] == [{"length": 16, "loss": 1.0}] and written["suites"]["examples"] == 10
    lines = (tmp_path / "answers_passkey_1024.jsonl").read_text().splitlines()
    assert len(lines) == 10 and json.loads(lines[0])["contains_all"] == 0.0
    for examples, names in ((10, ["passkey", "induction", "mqar"]), (4, ["mqar"])):
        asked = dataclasses.replace(request, suites=("mqar",), examples=examples)
        evaluate.write(evaluate.evaluate(model, evaluate.EvalRequest(suites=asked))[0], arrays, path)
        suites_ = json.loads(path.read_text())["suites"]
        assert list(suites_["suites"]) == list(suites_["probes"]) == names, "the same settings, then others"
    path.write_text(json.dumps({"checkpoint": model.folder, "step": 2, "results": [{"length": 16, "loss": 1.0}]}))
    evaluate.write(evaluate.evaluate(model, evaluate.EvalRequest(suites=request))[0], arrays, path)
    assert json.loads(path.read_text())["results"] == []  # those of another step are dropped


def test_probes_that_do_not_fit_a_length_are_left_out_of_it(monkeypatch):
    model, lines = Reader(tiny_config(variant="alibi")), []
    request = SuiteRequest(("passkey", "mqar"), (200, 512), examples=2)
    found = suites.evaluate_suites(
        model, request, lambda asked, size: ask(asked, asked.task, size, "test"), lines.append
    )
    assert [result["length"] for result in found["probes"]["passkey"]] == [512] and len(found["probes"]["mqar"]) == 2
    assert list(found["suites"]["passkey"]["score"]) == ["512"]
    (line,) = lines
    assert line.startswith("length 200: left out, no prompt of data.probe='passkey' fits 200 tokens: the smallest")


def test_an_effective_length_has_no_gap_before_it():
    assert suites.effective_length((512, 1024, 2048), (90.0, 80.0, 95.0), 85.6) == 512
    assert suites.effective_length((512, 1024), (90.0, 85.6), 85.6) == 1024
    assert suites.effective_length((512,), (10.0,), 85.6) is None


def test_answers_have_room_and_wrong_requests_are_refused():
    settings = tiny_config(variant="alibi")
    request = SuiteRequest(("ruler",), (4096,))
    assert [probe for _, probe in request.probes()][-1] == "fwe" and len(list(request.probes())) == 7
    assert list(dataclasses.replace(request, paths=("dev.json",)).probes())[-1] == ("ruler", "qa")
    asked = suites.probe_config(settings, request, "niah_multivalue")
    model = Reader(asked)
    assert (
        suites._with_new_tokens(model, asked, request).eval.new_tokens == len(" 1234567, 1234567, 1234567, 1234567") + 8
    )
    assert asked.data.probe == "niah_multivalue" and asked.eval.lengths == (4096,) and asked.seed == 0
    for settings_, names, message in (
        (settings, ("rular",), "'rular', which is none of passkey, ruler.*Did you mean 'ruler'"),
        (types.SimpleNamespace(is_image=True, data_kind="images"), ("mqar",), "this is a run on images"),
    ):
        with pytest.raises(InputError, match=message):
            suites.check_suites(settings_, SuiteRequest(names, (64,)))
    with pytest.raises(InputError, match="--paths with --suite is the file of SQuAD of --suite=ruler"):
        suites.check_suites(settings, SuiteRequest(("mqar",), (64,), paths=("dev.json",)))
