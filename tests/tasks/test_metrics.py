"""Metrics against values worked out by hand: scores of answers, perplexity, accuracy."""

import json
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from seqpe_jax import tasks
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.losses.task import ClassificationLoss, ranks
from seqpe_jax.reporting import plots
from seqpe_jax.tasks import metrics


@pytest.mark.parametrize(
    "hypothesis, golds, expected",
    [
        ("It was in 1066, I think", ["1066"], 1.0),
        ("the NORMANS ruled", ["  Normans "], 1.0),
        ("the Normans", ["Saxons", "normans"], 1.0),
        ("Norman", ["Normans"], 0.0),
        ("", ["x"], 0.0),
        ("anything", [""], 0.0),
        ("", [""], 1.0),  # of a question without an answer
        ("anything", [], 0.0),
        ("Été à ZÜRICH", ["zürich"], 1.0),
    ],
)
def test_contains(hypothesis, golds, expected):
    assert metrics.contains(hypothesis, golds) == expected


def test_normalization_is_that_of_squad():
    assert metrics.normalize_answer("  The Cat's  (a) hat,\tan—other ") == "cats hat —other"
    assert metrics.normalize_answer("theatre another a.n") == "theatre another"
    assert metrics.normalize_answer("the a an !?") == ""


@pytest.mark.parametrize(
    "hypothesis, golds, exact, f1",
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("Eiffel Tower in Paris", ["the Eiffel Tower"], 0.0, 2 * 0.5 * 1 / 1.5),
        ("Paris", ["London", "Paris, France"], 0.0, 2 / 3),  # precision 1, recall 1/2; London gives 0
        ("rose is a rose is a rose", ["rose rose"], 0.0, 2 * (2 / 5) / (7 / 5)),  # 2 common of 5 and of 2
        ("very very very", ["very"], 0.0, 2 * (1 / 3) / (4 / 3)),
        ("", ["x"], 0.0, 0.0),
        ("x", ["the"], 0.0, 0.0),
        ("the", ["The"], 1.0, 1.0),  # of these nothing is left: they are compared as they were
        ("!", ["the"], 0.0, 0.0),
        ("", ["a"], 0.0, 0.0),
        ("a", [""], 0.0, 0.0),
        ("a", ["A"], 1.0, 1.0),
        ("", [""], 1.0, 1.0),  # SQuAD v2's question without an answer
        ("?", ["!"], 0.0, 0.0),
        ("Çà et là", ["çà et là."], 1.0, 1.0),
        ("anything", [], 0.0, 0.0),
    ],
)
def test_exact_match_and_f1(hypothesis, golds, exact, f1):
    assert metrics.exact_match(hypothesis, golds) == exact
    assert metrics.f1(hypothesis, golds) == pytest.approx(f1)


@pytest.mark.parametrize(
    "hypothesis, gold, strict",
    [
        ("1", "-1", 0.0),
        ("selfx", "self._x", 0.0),
        ("none", "None", 0.0),
        ("a", "the a", 0.0),
        ("x  y", "x y", 0.0),
        (" -1\n", "-1", 1.0),
        ("self._x", " self._x", 1.0),
        ("", "a", 0.0),
        ("", "", 1.0),
    ],
)
def test_code_is_compared_as_it_is_written(hypothesis, gold, strict):
    assert metrics.exact_match_strict(hypothesis, ["no", gold]) == strict


def test_each_data_set_has_the_scores_of_its_answers():
    """SQuAD's normalisation is for SQuAD's prose; of a user's own questions both exact matches are reported."""
    assert metrics.answer_metrics("stdlib_qa") == ("contains", "exact_match_strict")
    assert metrics.answer_metrics("squad_long") == ("contains", "exact_match", "f1")
    assert (
        metrics.answer_metrics("qa_jsonl")
        == metrics.METRICS
        == tuple(name for name in metrics.SCORES if name != "contains_all")
    )
    for name in ("stdlib_qa", "squad_long", "qa_jsonl"):
        settings = types.SimpleNamespace(data=types.SimpleNamespace(name=name))
        assert tasks.QuestionAnswering.training_metrics(settings) == ("loss", *metrics.answer_metrics(name))


def record(depth, *golds, index=0):
    return {"index": index, "question": "q", "outputs": golds, "depth": depth, "kind": "k"}


def test_score_in_percent_and_by_depth():
    records = [record(0.0, "a b"), record(0.19, "c"), record(0.2, "d"), record(1.0, "é", "e")]
    found = metrics.score_answers(records, ["b", "c", "not it", "it is É"])
    # f1: "b" against "b" (the article goes) 1; 1; 0; "it is é" against "é" 1/2
    assert {name: found[name] for name in ("examples", *metrics.METRICS)} == {
        "examples": 4,
        "contains": 50.0,
        "exact_match": 50.0,
        "exact_match_strict": 25.0,
        "f1": 62.5,
    }
    assert [(part["from"], part["to"], part["examples"]) for part in found["depth"]] == [
        (0.0, 0.2, 2),
        (0.2, 0.4, 1),
        (0.4, 0.6, 0),
        (0.6, 0.8, 0),
        (0.8, 1.0, 1),
    ]
    assert [part["contains"] for part in found["depth"]] == [50.0, 0.0, None, None, 100.0]
    assert [part["f1"] for part in found["depth"]] == [100.0, 0.0, None, None, 50.0]
    halves = metrics.score_answers(records, ["b"] * 4, metrics=("exact_match_strict",), depth_bins=2)
    assert [set(part) for part in halves["depth"]] == [{"from", "to", "examples", "exact_match_strict"}] * 2
    assert set(halves) == {"examples", "exact_match_strict", "depth"}
    assert "depth" not in metrics.score_answers([record(None, "a")], ["b"])
    with pytest.raises(InputError, match="no questions to score"):
        metrics.score_answers([], [])
    with pytest.raises(ValueError):
        metrics.score_answers(records, ["b"])


def test_score_by_distance_to_the_answer():
    """From the answer in the gold passage, not one before it, to the end of the prompt; each bin ends at twice as many."""
    near = record(0.0, "5") | {"input": "z = 5\n\nx = 5\n\nx =", "passage": 7}  # of bytes: "5\n\nx ="
    far = record(0.0, "yes", "7") | {"input": "a = 7" + " " * 60 + "a =", "passage": 0}
    unknown = record(None, "q") | {"input": "q", "passage": None}
    in_another_passage = record(0.0, "7") | {"input": "7 x", "passage": 1}
    records = [near, far, unknown, in_another_passage, near]
    distances = metrics.answer_distances(records, len)
    assert distances == [6, 64, None, None, 6]
    found = metrics.score_answers(records, ["5", "no", "q", "7", "no"], distances=distances)["distance"]
    assert [(part["from"], part["to"], part["examples"], part["contains"]) for part in found] == [
        (0, 32, 2, 50.0),
        (32, 64, 0, None),
        (64, 128, 1, 0.0),
    ]
    assert "distance" not in metrics.score_answers([unknown], ["q"], distances=[None])


def test_guess_without_context():
    train = [("q1", "who", ["Ann"]), ("q2", "who", ["Bob"]), ("q3", "who", ["Bob"]), ("q4", "when", ["1999"])]
    heldout = [
        ("q1", "who", ["Ann"]),  # the same question
        ("q9", "who", ["Bob"]),  # the most frequent of its kind
        ("q9", "who", ["Ann"]),  # which is wrong here
        ("q9", "where", ["bob"]),  # a kind never seen: the most frequent of all
        ("q4", "when", ["1998"]),
    ]
    found = metrics.no_context_baseline(train, heldout)
    expected = dict.fromkeys(metrics.METRICS, pytest.approx(60)) | {"exact_match_strict": pytest.approx(40)}
    assert found == {"examples": 5} | expected
    with pytest.raises(InputError, match="no training questions"):
        metrics.no_context_baseline([], heldout)


def test_answers_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    records = [record(0.25, "é", "e", index=7), record(None, "b\n")]
    assert metrics.write_answers(path, records, ["É", "no"]) == path
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert first == {
        "index": 7,
        "question": "q",
        "kind": "k",
        "gold": ["é", "e"],
        "hypothesis": "É",
        "depth": 0.25,
        "contains": 1.0,
        "exact_match": 1.0,
        "exact_match_strict": 0.0,
        "f1": 1.0,
    }
    assert second["depth"] is None and second["gold"] == ["b\n"] and second["f1"] == 0.0
    before = path.read_bytes()
    with pytest.raises(KeyError):
        metrics.write_answers(path, [{"index": 0}], ["x"])
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write answers to .*choose another file"):
        metrics.write_answers(tmp_path / "file" / "metrics.jsonl", records, ["É", "no"])
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="cannot write answers"):
        metrics.write_answers(path, records, ["É", "no"])
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-written is left"


def test_heat_map():
    records = [record(depth, "x") for depth in (0.0, 0.1, 0.5, 0.9)]
    results = [
        {"extent": length, "label": str(length)} | metrics.score_answers(records, hypotheses)
        for length, hypotheses in ((512, ["x", "x", "", ""]), (256, ["x"] * 4))
    ]
    run = types.SimpleNamespace(name="seqpe", results=results, training_size={"extent": 256, "label": "256"})
    plot = plots.answer_depth(run)
    assert len(plot.png()) > 5000 and plot.alt.endswith("256 tokens: 100, -, 100, -, 100; 512 tokens: 100, -, 0, -, 0.")
    run.results = [{"extent": 1, "label": "1", "contains": 1.0}]
    assert plots.answer_depth(run) is None


@pytest.mark.parametrize(
    "hypothesis, gold",
    [
        ("in the cafe\u0301 there", "caf\u00e9"),
        ("caf\u00e9", "cafe\u0301"),
        ("10\u00a0000 people", "10 000"),
        ("it\u2019s \u201cso\u201d", 'it\'s "so"'),
        ("two\n  words", "two words"),
        ("A\tB", "a b"),
    ],
)
def test_an_answer_is_found_however_it_is_typed(hypothesis, gold):
    """By `contains` alone: exact match and F1 are SQuAD's own script."""
    assert metrics.contains(hypothesis, [gold]) == 1.0
    assert metrics.contains(hypothesis, [gold + "x"]) == 0.0
    assert metrics.exact_match("caf\u00e9", ["cafe\u0301"]) == 0.0


SPLIT_SIZE = metrics.SplitSize(tokens=100, bytes=400, words=50)
TABLE = np.arange(8, dtype=np.float32).reshape(2, 4)


def batches(*scored):
    """Batches of two rows, each of which scores its last so many targets."""
    for counts in scored:
        yield {"tokens": np.zeros((2, 5), np.int32), "scored": np.arange(4) >= 4 - np.array(counts)[:, None]}


def test_only_scored_targets_count():
    table = np.where([[True] * 4, [False, True, True, True]], TABLE, np.nan)  # of a padding row anything may come out
    result = metrics.perplexity(
        lambda tokens: table, batches([4, 3], [4, 0]), length=4, put=lambda batch: batch, split_size=SPLIT_SIZE
    )
    loss = (TABLE.sum() - TABLE[1, 0] + TABLE[0].sum()) / 11
    assert result["tokens"] == 11 and result["loss"] == pytest.approx(loss)
    assert result["perplexity"] == pytest.approx(math.exp(loss))
    assert result["bits_per_byte"] == pytest.approx(loss / 4 / math.log(2))
    assert result["word_perplexity"] == pytest.approx(math.exp(2 * loss))
    assert result["loss_by_position"] == {
        "position": [0.0, 1.0, 2.0, 3.0],
        "loss": pytest.approx([(0 + 0) / 2, (1 + 5 + 1) / 3, (2 + 6 + 2) / 3, (3 + 7 + 3) / 3]),
    }


def test_last_targets_of_each_window_count_under_a_context():
    result = metrics.perplexity_in_context(
        lambda tokens: TABLE,
        batches([2, 2], [2, 0]),
        context=4,
        stride=2,
        put=lambda batch: batch,
        split_size=SPLIT_SIZE,
    )
    assert {name: result[name] for name in ("context", "targets", "stride")} == {
        "context": 4,
        "targets": 6,
        "stride": 2,
    }
    assert result["loss"] == pytest.approx((2 * (2 + 3) + 6 + 7) / 6)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / 4 / math.log(2))
    assert result[metrics.TARGET_LOSSES].tolist() == [2.0, 3.0, 6.0, 7.0, 2.0, 3.0]  # in the order of the windows


def test_key_tokens_are_those_that_gain_from_context():
    """The first alone: the second gains too little, the third is certain without context, the fourth is not certain with it."""
    losses = {
        64: np.array([1.0, 4.0, 0.5, 3.0]),
        16: np.array([5.0, 5.0, 1.0, 6.0]),
        32: np.array([2.0, 4.5, 0.7, 5.0]),
    }
    results = [{"context": context, metrics.TARGET_LOSSES: own} for context, own in losses.items()]
    metrics.long_perplexity(results, 2.0, 2.0)
    assert results == [
        {"context": context, "key_tokens": 1, "key_loss": loss, "long_perplexity": pytest.approx(math.exp(loss))}
        for context, loss in ((64, 1.0), (16, 5.0), (32, 2.0))
    ]
    alone = [{"context": 16, metrics.TARGET_LOSSES: losses[16]}]
    metrics.long_perplexity(alone, 2.0, 2.0)
    assert alone == [{"context": 16}]
    nobody = [{"context": context, metrics.TARGET_LOSSES: losses[16]} for context in (16, 32)]
    metrics.long_perplexity(nobody, 2.0, 2.0)
    assert nobody[0] == {"context": 16, "key_tokens": 0, "key_loss": None, "long_perplexity": None}


def test_padding_rows_do_not_count():
    ranks = [np.array([0, 4, 7]), np.array([0, 5, 0])]
    losses = [np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 100.0])]
    true, guessed = [np.array([0, 1, 1]), np.array([3, 0, 2])], [np.array([0, 0, 0]), np.array([3, 1, 2])]
    answers = iter(
        [
            {"rank": rank, "loss": loss, "labels": label, "classes": guess[:, None], "probabilities": loss[:, None] / 8}
            for rank, loss, label, guess in zip(ranks, losses, true, guessed, strict=True)
        ]
    )
    batches = [
        {"images": np.zeros((3, 2, 2, 1)), "labels": np.zeros(3, int), "weights": np.array(weights, np.float32)}
        for weights in ([1, 1, 1], [1, 1, 0])
    ]
    done, records = [], []
    result = metrics.accuracy(
        lambda batch: next(answers),
        batches,
        size=(2, 4),
        put=lambda batch: batch,
        progress=done.append,
        class_names=("a", "b", "c"),
        record=lambda *record: records.append(record),
    )
    by_class, confused, confusion = (result.pop(name) for name in ("by_class", "confused", "confusion"))
    assert result == {"size": [2, 4], "examples": 5, "loss": 3.0, "top1": 40.0, "top5": 60.0}
    assert done == [3, 5]
    assert [(index, int(classes[0]), label) for index, classes, _, label in records] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 0, 1),
        (3, 3, 3),
        (4, 1, 0),
    ]
    assert by_class["a"] == {"examples": 2, "top1": 50.0} and by_class["b"] == {"examples": 2, "top1": 0.0}
    assert set(by_class) == {"a", "b", "class 3"} and confused == [["b", "a", 2], ["a", "b", 1]]
    assert confusion["counts"] == [[1, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_ties_go_to_the_lower_class_and_nan_is_never_right():
    nan = float("nan")
    logits = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, nan, 2.0], [nan, nan, nan], [nan, 1.0, 0.0]])
    found = ranks(logits, jnp.array([0, 2, 2, 0, 0])).tolist()
    assert found[:3] == [0, 2, 1] and min(found[3:]) > 5


@pytest.mark.slow
def test_eval_step_counts_the_classes_above_the_true_one():
    class Table(nn.Module):
        """Returns its inputs as logits."""

        def __call__(self, images, signal):
            return images

    logits = jnp.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.0, 2.0, 1.0]])
    found = ClassificationLoss(0.0, None).eval_step(
        Table(), {}, PositionSignal(), {"images": logits, "labels": jnp.array([2, 2, 2])}
    )
    assert found["rank"].tolist() == [0, 2, 1] and found["classes"].tolist() == [[2, 1, 0], [0, 1, 2], [1, 2, 0]]
    np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1.0, rtol=1e-6)
    assert float(found["loss"][0]) == pytest.approx(-0.3 + float(jnp.log(jnp.exp(logits[0]).sum())), rel=1e-5)
