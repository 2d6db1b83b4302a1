"""Scores of generated answers: the accepted answer contained in them, exact match, SQuAD's F1; by depth and distance.

A record is {"index", "input": prompt, "question", "outputs": accepted answers, "depth": 0..1 or None, "kind", "passage":
character of the prompt at which the gold passage begins, or None}, as of `data.qa`.
"""

import collections
import itertools
import json
import os
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from seqpe_jax.data import registry
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_write

METRICS = ("contains", "exact_match", "exact_match_strict", "f1")
# By what the answers of a data set are (`data.registry`). In code punctuation, articles and letter case count.
METRICS_OF_ANSWERS = {
    "prose": ("contains", "exact_match", "f1"),
    "code": ("contains", "exact_match_strict"),
    "any": METRICS,
}
DEPTH_BINS = 5
NEAREST = 32  # tokens, of the first bin of distances; each further one ends at twice as many

QuestionAnswer = tuple[str, str, Sequence[str]]  # question, kind, accepted answers


def contains(hypothesis: str, golds: Iterable[str]) -> float:
    """Returns 1.0 where an accepted answer occurs in the hypothesis, however both are typed.

    The reference's score (text_seqpe/qa_eval.py), which sets letter case and white space around an answer aside; so are
    here the ways to write one character (Unicode's composed and decomposed forms), kinds and lengths of white space, and
    curly quotes. An empty answer, which would always occur, does not count.
    """
    text = _typed(hypothesis)
    found = map(_typed, golds)
    return float(any(gold and gold in text for gold in found))


QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"'})


def _typed(text: str) -> str:
    """The text in one way of typing it: NFC, straight quotes, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).translate(QUOTES).lower().split())


def metrics_of(name: str) -> tuple[str, ...]:
    """Returns the scores of the answers of a data set; name: its `data.name`."""
    return METRICS_OF_ANSWERS[registry.get(name).answers]


def normalise(text: str) -> str:
    """Returns the text as SQuAD compares it: lower case, no ASCII punctuation, no a, an, the, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _normalised(text: str) -> str:
    """The normalised text; in lower case where nothing is left of it, so that "a", "-" and "" are three answers."""
    return normalise(text) or " ".join(text.lower().split())


def exact_match(hypothesis: str, golds: Iterable[str]) -> float:
    """Returns 1.0 where the hypothesis equals an accepted answer, both normalised (SQuAD's evaluation script).

    Other than in the script, texts of which normalising leaves nothing are equal only if they were before.
    """
    wanted = _normalised(hypothesis)
    return float(any(_normalised(gold) == wanted for gold in golds))


def exact_match_strict(hypothesis: str, golds: Iterable[str]) -> float:
    """Returns 1.0 where the hypothesis equals an accepted answer as it is, less white space around both."""
    return float(any(gold.strip() == hypothesis.strip() for gold in golds))


def f1(hypothesis: str, golds: Iterable[str]) -> float:
    """Returns the largest F1 in 0..1 over the accepted answers, of words in common after normalising as `exact_match` does.

    A word counts as often as it occurs in both. Where one side has no words, 1 if neither has any (SQuAD v2's script).
    """
    return max((_f1(_normalised(hypothesis).split(), _normalised(gold).split()) for gold in golds), default=0.0)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (collections.Counter(found) & collections.Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


SCORES = {"contains": contains, "exact_match": exact_match, "exact_match_strict": exact_match_strict, "f1": f1}


def scores(hypothesis: str, golds: Sequence[str], metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Returns {metric: score in 0..1} of one answer."""
    return {name: SCORES[name](hypothesis, golds) for name in metrics}


def distances(records: Iterable[Mapping[str, Any]], count: Callable[[str], int]) -> list[int | None]:
    """Returns how far back each answer stands: tokens from its first place in the gold passage to the end of the prompt.

    Args:
      count: returns the tokens of a text.

    Returns:
      One number for each record; None where nobody knows the passage, or it does not hold an accepted answer.
    """
    found: list[int | None] = []
    for record in records:
        prompt, passage = record["input"], record.get("passage")
        places = [] if passage is None else [prompt.find(gold, passage) for gold in record["outputs"] if gold]
        places = [place for place in places if place >= 0]
        found.append(count(prompt[min(places) :]) if places else None)
    return found


def score(
    records: Sequence[Mapping[str, Any]],
    hypotheses: Sequence[str],
    *,
    metrics: Sequence[str] = METRICS,
    bins: int = DEPTH_BINS,
    away: Sequence[int | None] = (),
) -> dict[str, Any]:
    """Returns the mean scores of answers, in percent.

    Args:
      records, hypotheses: as many of each; metrics: which scores (`metrics_of`).
      bins: of equal width, of the depth of the passage; away: `distances` of the records.

    Returns:
      {"examples", the scores by their names, "depth": [{"from", "to", "examples", and the scores, None where there
      are no examples}], "distance": the same, by how many tokens back the answer stands}; "depth" and "distance" are left
      out where they are not known.

    Raises:
      InputError: there are no records.
    """
    if not records:
        raise InputError("there are no questions to score: ask for at least one")
    pairs = zip(records, hypotheses, strict=True)
    found = [scores(hypothesis, record["outputs"], metrics) for record, hypothesis in pairs]
    result: dict[str, Any] = _means(found, metrics)
    if all(record["depth"] is not None for record in records):
        places = [min(int(record["depth"] * bins), bins - 1) for record in records]
        result["depth"] = [
            {"from": place / bins, "to": (place + 1) / bins}
            | _means([one for one, where in zip(found, places, strict=True) if where == place], metrics)
            for place in range(bins)
        ]
    known = [(one, far) for one, far in zip(found, away, strict=False) if far is not None]
    if known:
        result["distance"] = _by_distance(known, metrics)
    return result


def _by_distance(found: Sequence[tuple[Mapping[str, float], int]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    edges = [0, NEAREST]
    while edges[-1] <= max(far for _, far in found):
        edges.append(2 * edges[-1])
    return [
        {"from": low, "to": high} | _means([one for one, far in found if low <= far < high], metrics)
        for low, high in itertools.pairwise(edges)
    ]


def _means(found: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> dict[str, Any]:
    means = {name: 100 * float(np.mean([one[name] for one in found])) if found else None for name in metrics}
    return {"examples": len(found)} | means


def no_context_baseline(
    train: Iterable[QuestionAnswer], heldout: Iterable[QuestionAnswer], metrics: Sequence[str] = METRICS
) -> dict[str, Any]:
    """Returns `score` of answering without reading the passage: what memory of the training split alone is worth.

    The guess is the most frequent (first accepted) training answer to the same question, else to its kind, else of all.

    Args:
      train, heldout: (question, kind, accepted answers), as `QASource.questions` yields them; metrics: as in `score`.
    """
    tables: dict[Any, collections.Counter] = collections.defaultdict(collections.Counter)
    for question, kind, answers in train:
        for key in (("question", question), ("kind", kind), None):
            tables[key][answers[0]] += 1
    if not tables:
        raise InputError("there are no training questions to guess from: ask for at least one")
    guesses = {key: table.most_common(1)[0][0] for key, table in tables.items()}
    records, hypotheses = [], []
    for question, kind, answers in heldout:
        records.append({"outputs": answers, "depth": None})
        known = (key for key in (("question", question), ("kind", kind), None) if key in guesses)
        hypotheses.append(guesses[next(known)])
    return score(records, hypotheses, metrics=metrics)


def write_answers(
    path: str | os.PathLike,
    records: Sequence[Mapping[str, Any]],
    hypotheses: Sequence[str],
    metrics: Sequence[str] = METRICS,
) -> AnyPath:
    """Writes one object per answer and line: index, question, kind, gold, hypothesis, depth and its scores in 0..1.

    The file appears whole or not at all.

    Raises:
      InputError: it cannot be written.
    """
    path = as_path(path)
    lines = []
    for record, hypothesis in zip(records, hypotheses, strict=True):
        line = {
            "index": record["index"],
            "question": record["question"],
            "kind": record["kind"],
            "gold": list(record["outputs"]),
            "hypothesis": hypothesis,
            "depth": record["depth"],
        }
        lines.append(json.dumps(line | scores(hypothesis, record["outputs"], metrics), ensure_ascii=False) + "\n")
    try:
        atomic_write(path, "".join(lines))
    except OSError as error:
        raise InputError(f"cannot write answers to '{path}' ({error.strerror}): choose another file") from error
    return path
