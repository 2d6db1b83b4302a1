"""Evaluation of question answering, with answers that no model generated."""

import dataclasses
import json
import types

import numpy as np

from seqpe_jax.tasks import evaluate
from seqpe_jax.tasks.base import EvalContext
from seqpe_jax.tasks.question_answering import QuestionAnswering
from tests.data.test_squad_long import squad, written
from tests.tiny import tiny_config


def test_every_length_asks_the_same_questions(tmp_path):
    """Those that fit into the shortest of the lengths; another choice of lengths may ask more."""
    content = squad(*range(30))
    for paragraph in content["data"][13]["paragraphs"]:  # of the test split
        paragraph["context"] += " It rains there."
    path = written(tmp_path / "one.json", content)
    settings = tiny_config(
        variant="alibi",
        data__name="squad_long",
        data__paths=(str(path),),
        data__length=512,
        data__cache_dir=str(tmp_path / "cache"),
        eval__lengths=(512, 140),
        objective__shift__rate=0.0,
    )

    def asked(settings, length):
        nothing = [types.SimpleNamespace(content=[])]
        model = EvalContext(
            lambda batch: {"loss": np.zeros((2, length))},
            lambda prompts, *_, **__: nothing * len(prompts),
            lambda batch: batch,
            batch_size=2,
        )
        records, _ = QuestionAnswering(settings).evaluate(model, (length,), "test")["answers"]
        return [record["question"] for record in records]

    longer = dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, lengths=(512,)))
    assert 0 < len(asked(settings, 140)) < len(asked(longer, 512))
    assert asked(settings, 512) == asked(settings, 140)


def test_answers_read_the_window_of_the_evaluated_length(tmp_path):
    """If positions depend on its length, whatever eval.new_tokens is; other encodings have no such window."""
    path = written(tmp_path / "one.json", squad(*range(30)))
    for kind, length, window in (
        ("learned", 512, 512),
        ("learned", 256, 256),
        ("learned", 150, 200),
        ("alibi", 512, None),
    ):
        settings = tiny_config(
            variant=kind,
            data__name="squad_long",
            data__paths=(str(path),),
            data__length=200,
            data__cache_dir=str(tmp_path / "cache"),
            eval__lengths=(length,),
            eval__examples=2,
            eval__new_tokens=40,
            objective__shift__rate=0.0,
        )
        asked, options = QuestionAnswering(settings), []

        def generate(prompts, *_, options=options, **arguments):
            options.append({name: arguments[name] for name in ("window", "cut")})
            return [types.SimpleNamespace(content=[])] * len(prompts)

        ask = EvalContext(
            lambda batch, length=length: {"loss": np.zeros((2, length))}, generate, lambda batch: batch, batch_size=2
        )
        asked.evaluate(ask, (length,), "test")
        assert options == [{"window": window, "cut": window is not None}]
        assert asked.positions_at((length,)) == (length if window else length + 40,)


def test_answers_are_scored_by_their_distance(tmp_path):
    """A model that knows each year finds all answers; each is within the prompt, and all are counted."""
    path = written(tmp_path / "one.json", squad(*range(30)))
    settings = tiny_config(
        variant="alibi",
        data__name="squad_long",
        data__paths=(str(path),),
        data__length=512,
        data__cache_dir=str(tmp_path / "cache"),
        eval__lengths=(512,),
        eval__examples=8,
        objective__shift__rate=0.0,
    )
    task = QuestionAnswering(settings)
    source = task.questions("test", 512)

    def generate(prompts, *_, **__):
        years = [source[index]["outputs"][0] for index in range(len(prompts))]
        return [types.SimpleNamespace(content=list(f" {year}".encode())) for year in years]

    asked = EvalContext(lambda batch: {"loss": np.zeros((2, 512))}, generate, lambda batch: batch, batch_size=2)
    found = task.evaluate(asked, (512,), "test")
    assert found["contains"] == 100.0 and found["examples"] == 8
    assert sum(part["examples"] for part in found["distance"]) == 8
    assert [part["to"] for part in found["distance"]][-1] in (64, 128, 256, 512)
    assert all(part["contains"] == 100.0 for part in found["distance"] if part["examples"])
    # The year of the question's town comes before the end of its own passage and the question: never within 32 bytes of the end.
    assert found["distance"][0] == {
        "from": 0,
        "to": 32,
        "examples": 0,
        "contains": None,
        "exact_match": None,
        "f1": None,
    }


def test_evaluations_in_one_folder_have_files_of_their_own(tmp_path):
    """The run's own have the names that a report reads; those of others begin with the output's name."""
    asked = {"index": 0, "question": "q", "kind": "k", "outputs": ("yes",), "depth": None}
    for name, answer in (("evaluation.json", "yes"), ("longer.json", "no"), ("other.json", "maybe")):
        report = {"results": [{"length": 64, "answers": ([asked], [answer])}]}
        evaluate.write(report, {"similarity": {"cosine": np.ones(2)}, "attention": None}, tmp_path / name)
    files = {path.name: path for path in tmp_path.iterdir()}
    found = {
        name: json.loads(path.read_text())["hypothesis"] for name, path in files.items() if name.endswith(".jsonl")
    }
    assert found == {
        "answers_64.jsonl": "yes",
        "longer_answers_64.jsonl": "no",
        "other_answers_64.jsonl": "maybe",
    }
    assert {"similarity.npz", "longer_similarity.npz", "other_similarity.npz"} < files.keys()
