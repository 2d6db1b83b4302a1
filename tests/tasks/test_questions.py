"""What the evaluation of a run on questions tells, of answers that no model had to give."""

import json
import types

import numpy as np

from seqpe_jax.tasks import measure
from seqpe_jax.tasks.questions import Questions
from seqpe_jax.tasks.task import Asked
from tests.data.test_squad_long import squad, written
from tests.tiny import tiny_config


def test_answers_are_told_by_their_distance(tmp_path):
    """Whoever knows each year finds all answers; each stands within the prompt, and all are counted."""
    path = written(tmp_path / "one.json", squad(*range(30)))
    settings = tiny_config(
        variant="alibi", data__name="squad_long", data__paths=(str(path),), data__length=512,
        data__cache_dir=str(tmp_path / "cache"), eval__lengths=(512,), eval__examples=8, objective__shift__rate=0.0,
    )  # fmt: skip
    task = Questions(settings)
    source = task.questions("test", 512)

    def generate(prompts, *_, **__):
        years = [source[index]["outputs"][0] for index in range(len(prompts))]
        return [types.SimpleNamespace(content=list(f" {year}".encode())) for year in years]

    asked = Asked(lambda batch: {"loss": np.zeros((2, 512))}, generate, lambda batch: batch, batch=2)
    found = task.evaluate(asked, (512,), "test")
    assert found["contains"] == 100.0 and found["examples"] == 8
    assert sum(part["examples"] for part in found["distance"]) == 8
    assert [part["to"] for part in found["distance"]][-1] in (64, 128, 256, 512)
    assert all(part["contains"] == 100.0 for part in found["distance"] if part["examples"])
    # The asked town's year stands before the end of its own passage and the question: never within 32 bytes of the end.
    assert found["distance"][0] == {"from": 0, "to": 32, "examples": 0, "contains": None, "exact_match": None, "f1": None}


def test_two_evaluations_in_one_folder_keep_what_lies_beside_them(tmp_path):
    """The run's own has the names that a report reads; those of others begin with the output's."""
    asked = {"index": 0, "question": "q", "kind": "k", "outputs": ("yes",), "depth": None}
    for name, answer in (("evaluation.json", "yes"), ("longer.json", "no"), ("other.json", "maybe")):
        report = {"results": [{"length": 64, "answers": ([asked], [answer])}]}
        measure.write(report, {"similarity": {"cosine": np.ones(2)}, "attention": None}, tmp_path / name)
    kept = {path.name: path for path in tmp_path.iterdir()}
    found = {name: json.loads(path.read_text())["hypothesis"] for name, path in kept.items() if name.endswith(".jsonl")}
    assert found == {
        "answers_64.jsonl": "yes", "longer_answers_64.jsonl": "no", "other_answers_64.jsonl": "maybe",
    }  # fmt: skip
    assert {"similarity.npz", "longer_similarity.npz", "other_similarity.npz"} < kept.keys()
