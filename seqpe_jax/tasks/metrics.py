"""Metrics computed over a split: perplexity of text, accuracy of a classifier, scores of generated answers.

Text: a window of L tokens predicts the L that follow its tokens one by one, so windows share one token and every token of
the split but the first is predicted once, whatever the length. A longer window is not a longer context: the mean falls with
the length because fewer tokens are at a window's beginning. `perplexity_in_context` measures the gain from context, on the
same tokens under different contexts.

Answers: a record is {"index", "input": prompt, "question", "outputs": accepted answers, "depth": 0..1 or None, "kind",
"passage": index of the prompt's character where the gold passage begins, or None}, as `data.qa` makes it.
"""

import collections
import dataclasses
import itertools
import json
import math
import os
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from seqpe_jax.data import registry
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_write
from seqpe_jax.tasks.predictions import class_name

Batch = dict[str, np.ndarray]
PutBatch = Callable[[Batch], dict[str, jax.Array]]  # lays a host batch out over the devices
CountProgress = Callable[[int], None]
RecordLosses = Callable[[Batch, np.ndarray], None]  # a batch, and the losses of its tokens in nats, float64[B, L]

# --- Text


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """Size of a whole split of text.

    Bits per byte and word perplexity assume that the part that is scored has the split's average of tokens to a byte or word.

    Attributes:
      tokens: count of tokens.
      bytes: bytes of its UTF-8 text; None = unknown.
      words: separated by white space; None = unknown.
    """

    tokens: int
    bytes: int | None = None
    words: int | None = None


CURVE_POINTS = 64  # of the curve of loss by token index in the window


def perplexity(
    token_losses: Callable[[jax.Array], jax.Array],
    batches: Iterable[Batch],
    *,
    length: int,
    put: PutBatch,
    split_size: SplitSize,
    progress: CountProgress = lambda done: None,
    record: RecordLosses | None = None,
) -> dict[str, Any]:
    """Computes the perplexity of a split in windows of one length.

    Args:
      token_losses: int32[B, L + 1] -> float32[B, L], nats.
      batches: {"tokens": int32[B, L + 1], "scored": bool[B, L]} (`data.loader.eval_windows`); "scored" marks the
        targets that count.
      length: L, tokens of a window.
      put: lays a host batch out over the devices.
      split_size: size of the whole split.
      progress: called with the windows done.
      record: called with each batch and the losses of its tokens.

    Returns:
      {"length", "tokens", "loss", "perplexity", ..., "loss_by_position"}, losses in nats per token.
    """
    return _perplexity(length, *_sums_by_token_index(token_losses, batches, length, put, progress, record), split_size)


def perplexity_by_source(
    token_losses: Callable[[jax.Array], jax.Array],
    batches: Mapping[str, Iterable[Batch]],
    *,
    length: int,
    put: PutBatch,
    split_sizes: Mapping[str, SplitSize],
    progress: CountProgress = lambda done: None,
    records: Mapping[str, RecordLosses | None] | None = None,
) -> dict[str, Any]:
    """Computes the perplexity of a split of several sources, over all their tokens and of each.

    Args:
      token_losses, length, put: see `perplexity`.
      batches: see `perplexity`, by source.
      split_sizes: size of the split of each source.
      progress: called with the windows done.
      records: `record` of `perplexity`, by source.

    Returns:
      As `perplexity`, and "sources": {name: {"tokens", "loss", "perplexity", ...}}.
    """
    sums, counts, found, done = np.zeros(length), np.zeros(length, np.int64), {}, 0
    for name, of_source in batches.items():
        before = done

        def after(windows: int, before: int = before) -> None:
            progress(before + windows)

        own_sums, own_counts = _sums_by_token_index(
            token_losses, of_source, length, put, after, (records or {}).get(name)
        )
        own = _perplexity(length, own_sums, own_counts, split_sizes[name])
        found[name] = {key: value for key, value in own.items() if key not in ("length", "loss_by_position")}
        sums, counts, done = sums + own_sums, counts + own_counts, before + of_source.examples
    sizes = split_sizes.values()
    words = None if any(size.words is None for size in sizes) else sum(size.words for size in sizes)
    total = SplitSize(sum(size.tokens for size in sizes), sum(size.bytes for size in sizes), words)
    return _perplexity(length, sums, counts, total) | {"sources": found}


def _perplexity(length: int, sums_L: np.ndarray, counts_L: np.ndarray, split_size: SplitSize) -> dict[str, Any]:
    """Returns what `perplexity` does, from sums of losses and their counts by token index."""
    tokens = int(counts_L.sum())
    groups = np.array_split(np.arange(length), min(CURVE_POINTS, length))
    groups = [group for group in groups if counts_L[group].any()]  # after the end of a document nothing is scored
    return {
        "length": length,
        "tokens": tokens,
        **loss_metrics(float(sums_L.sum() / tokens), split_size),
        "loss_by_position": {
            "position": [float(group.mean()) for group in groups],
            "loss": [float(sums_L[group].sum() / counts_L[group].sum()) for group in groups],
        },
    }


def perplexity_in_context(
    token_losses: Callable[[jax.Array], jax.Array],
    batches: Iterable[Batch],
    *,
    context: int,
    stride: int,
    put: PutBatch,
    split_size: SplitSize,
    progress: CountProgress = lambda done: None,
    record: RecordLosses | None = None,
) -> dict[str, Any]:
    """Computes the perplexity of the last tokens of windows, which have at least `context - stride` tokens before them.

    Args:
      token_losses: see `perplexity`.
      batches: see `perplexity`, with windows of `context` tokens (`data.loader.context_windows`).
      context: tokens of a window.
      stride: targets of each window, its last ones.
      put: lays a host batch out over the devices.
      split_size: size of the whole split.
      progress: called with the windows done.
      record: see `perplexity`.

    Returns:
      {"context", "targets", "stride", "loss", "perplexity", ..., "target_losses": float64[targets], for `long_perplexity`}.
    """
    losses: list[np.ndarray] = []

    def keep(batch: Batch, losses_BL: np.ndarray) -> None:
        losses.append(losses_BL[batch["scored"]])
        if record is not None:
            record(batch, losses_BL)

    sums_L, counts_L = _sums_by_token_index(token_losses, batches, context, put, progress, keep)
    targets = int(counts_L.sum())
    return {
        "context": context,
        "targets": targets,
        "stride": stride,
        **loss_metrics(float(sums_L.sum() / targets), split_size),
        TARGET_LOSSES: np.concatenate(losses),
    }


TARGET_LOSSES = "target_losses"  # of a result, until `long_perplexity` has read it


def long_perplexity(results: Sequence[dict[str, Any]], least_gain: float, largest_loss: float) -> None:
    """Adds the perplexity of the tokens that gain from context to results under several contexts (LongPPL, arXiv 2410.23771).

    Key tokens are those whose loss falls by more than `least_gain` from the smallest context to the largest, where it is less
    than `largest_loss`: the model itself says so in two passes, in place of the authors' larger model.

    Args:
      results: results of `perplexity_in_context` on the same targets; they lose their losses by target, and get "key_tokens",
        "key_loss" in nats and "long_perplexity" (None without a key token) if there are two contexts or more.
      least_gain: nats (the authors' alpha, 2).
      largest_loss: nats (the negative of the authors' beta, 2).
    """
    losses = {result["context"]: result.pop(TARGET_LOSSES) for result in results}
    if len(losses) < 2:
        return
    short, long = losses[min(losses)], losses[max(losses)]
    is_key = (short - long > least_gain) & (long < largest_loss)
    for result in results:
        count = int(is_key.sum())
        loss = float(losses[result["context"]][is_key].mean()) if count else None
        result |= {"key_tokens": count, "key_loss": loss}
        result["long_perplexity"] = None if loss is None else bounded_exp(loss)


def loss_metrics(loss: float, split_size: SplitSize) -> dict[str, float]:
    """Returns a mean loss in nats per token as "loss", "perplexity" and, where sizes are known, in other units."""
    found = {"loss": loss, "perplexity": bounded_exp(loss)}
    if split_size.bytes:
        found["bits_per_byte"] = loss * split_size.tokens / split_size.bytes / math.log(2)
    if split_size.words:
        found["word_perplexity"] = bounded_exp(loss * split_size.tokens / split_size.words)
    return found


def bounded_exp(value: float) -> float:
    """Returns the exponential, at most e**700, short of what overflows."""
    return math.exp(min(value, 700.0))


def _sums_by_token_index(
    token_losses: Callable[[jax.Array], jax.Array],
    batches: Iterable[Batch],
    length: int,
    put: PutBatch,
    progress: CountProgress,
    record: RecordLosses | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sums of the scored losses, float64[L], and their counts, int64[L], by token index in the window.

    Args:
      token_losses, batches, length, put, progress: see `perplexity`.
      record: called with each batch and the losses of its tokens; None = nobody asks for them.
    """
    sums_L, counts_L = np.zeros(length, np.float64), np.zeros(length, np.int64)
    windows = 0
    dispatched = ((token_losses(put({"tokens": batch["tokens"]})["tokens"]), batch) for batch in batches)
    for losses_BL, batch in _one_behind(dispatched):
        losses_BL, scored_BL = np.asarray(losses_BL, np.float64), batch["scored"]
        sums_L += np.where(scored_BL, losses_BL, 0.0).sum(axis=0)
        counts_L += scored_BL.sum(axis=0)
        windows += int(scored_BL.any(axis=1).sum())
        if record is not None:
            record(batch, losses_BL)
        progress(windows)
    return sums_L, counts_L


def _one_behind(items: Iterable[Any]) -> Iterator[Any]:
    """Yields items one behind: the device computes a batch while the host adds up the one before."""
    pending = []
    for item in items:
        pending.append(item)
        if len(pending) > 1:
            yield pending.pop(0)
    yield from pending


# --- Images

MAX_CONFUSED = 20  # pairs of classes
MAX_MATRIX_CLASSES = 50  # of a confusion matrix


def accuracy(
    eval_step: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    batches: Iterable[Batch],
    *,
    size: tuple[int, ...],
    put: PutBatch,
    progress: CountProgress = lambda done: None,
    class_names: Sequence[str] = (),
    record: Callable[[int, np.ndarray, np.ndarray, int], None] | None = None,
) -> dict[str, Any]:
    """Computes the top-1 and top-5 accuracy of a classifier over a split.

    Args:
      eval_step: a batch -> {"loss": float32[B] in nats, "rank": int32[B], number of classes ahead of the true one, "labels",
        "classes", "probabilities"} (`losses.task.ClassificationLoss.eval_step`).
      batches: {"images", "labels", "weights": float32[B]}; weight 0 marks padding rows.
      size: (height, width), or (frames, height, width) of videos.
      put: lays a host batch out over the devices.
      progress: called with the examples done.
      class_names: label -> name.
      record: called with the index of each example, its likeliest classes int32[K], their probabilities, and its label.

    Returns:
      {"size", "examples", "loss", "top1", "top5"}: nats, and percent of the examples; and the parts of `class_results`.
    """
    loss, ranks = 0.0, []
    labels: list[int] = []
    predicted: list[int] = []
    dispatched = (
        (eval_step(put({name: batch[name] for name in ("images", "labels")})), batch["weights"]) for batch in batches
    )
    for result, weights_B in _one_behind(dispatched):
        real_B = weights_B > 0
        loss += float(np.asarray(result["loss"], np.float64)[real_B].sum())
        found = {name: np.asarray(result[name])[real_B] for name in ("labels", "classes", "probabilities")}
        if record is not None:
            for row, label in enumerate(found["labels"].tolist()):
                record(len(ranks) + row, found["classes"][row], found["probabilities"][row], label)
        ranks.extend(np.asarray(result["rank"])[real_B].tolist())
        labels.extend(found["labels"].tolist())
        predicted.extend(found["classes"][:, 0].tolist())
        progress(len(ranks))
    count = len(ranks)
    return {
        "size": list(size),
        "examples": count,
        "loss": loss / count,
        "top1": 100.0 * sum(rank < 1 for rank in ranks) / count,
        "top5": 100.0 * sum(rank < 5 for rank in ranks) / count,
        **class_results(np.array(labels), np.array(predicted), class_names),
    }


def class_results(labels_N: np.ndarray, predicted_N: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns the accuracy of each class, and which classes are taken for which.

    Args:
      labels_N: true label of each image.
      predicted_N: likeliest class of each image.
      class_names: label -> name; a model may have more classes than names.

    Returns:
      {"by_class": {name: {"examples", "top1": percent}}, "confused": the `MAX_CONFUSED` most frequent errors, each [true class,
      predicted class, images]}; and of at most `MAX_MATRIX_CLASSES` classes "confusion": {"classes": names, "counts": rows of
      the true class, columns of the predicted one}.
    """
    count = int(max(labels_N.max(), predicted_N.max(), len(class_names) - 1)) + 1
    names = [class_name(label, class_names) for label in range(count)]
    examples_C = np.bincount(labels_N, minlength=count)
    right_C = np.bincount(labels_N[labels_N == predicted_N], minlength=count)
    pairs, totals = np.unique(labels_N.astype(np.int64) * count + predicted_N, return_counts=True)
    wrong = [
        [names[pair // count], names[pair % count], total]
        for pair, total in sorted(zip(pairs.tolist(), totals.tolist(), strict=True), key=lambda item: -item[1])
        if pair // count != pair % count
    ]
    found: dict[str, Any] = {
        "by_class": {
            names[label]: {
                "examples": int(examples_C[label]),
                "top1": 100.0 * float(right_C[label] / examples_C[label]),
            }
            for label in np.flatnonzero(examples_C).tolist()
        },
        "confused": wrong[:MAX_CONFUSED],
    }
    if count <= MAX_MATRIX_CLASSES:
        counts = np.zeros(count * count, np.int64)
        counts[pairs] = totals
        found["confusion"] = {"classes": names, "counts": counts.reshape(count, count).tolist()}
    return found


# --- Generated answers

# By the kind of answers of a data set (`data.registry`): in code, punctuation, articles and letter case count.
METRICS_BY_ANSWER_KIND = {
    "prose": ("contains", "exact_match", "f1"),
    "code": ("contains", "exact_match_strict"),
    "any": ("contains", "exact_match", "exact_match_strict", "f1"),
    "parts": ("contains", "contains_all"),
}
METRICS = METRICS_BY_ANSWER_KIND["any"]
DEPTH_BINS = 5
FIRST_DISTANCE_BIN = 32  # tokens; each further bin of distances ends at twice as many

QuestionAnswer = tuple[str, str, Sequence[str]]  # question, kind of question, accepted answers


def contains(hypothesis: str, golds: Iterable[str]) -> float:
    """Returns 1.0 if an accepted answer occurs in the hypothesis, else 0.0.

    The score of the reference (text_seqpe/qa_eval.py), which ignores letter case and white space around an answer; this one
    also ignores Unicode's composed and decomposed forms, kinds and lengths of white space, and curly quotes. An empty
    answer, of a question without one, is found in an empty hypothesis alone.
    """
    text = _canonical(hypothesis)
    return float(any(gold in text if gold else not text for gold in map(_canonical, golds)))


QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"'})


def _canonical(text: str) -> str:
    """Returns the text in NFC, with straight quotes, lower case and single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).translate(QUOTES).lower().split())


def answer_metrics(dataset_name: str) -> tuple[str, ...]:
    """Returns the names of the scores that fit the answers of a data set.

    Args:
      dataset_name: value of `data.name`.
    """
    return METRICS_BY_ANSWER_KIND[registry.get(dataset_name).answers]


def normalize_answer(text: str) -> str:
    """Returns the text as SQuAD compares it: lower case, no ASCII punctuation, no a, an, the, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _normalized_or_lower(text: str) -> str:
    """Returns the normalized text, or its lower case if nothing is left of it: "a", "-" and "" are three answers."""
    return normalize_answer(text) or " ".join(text.lower().split())


def contains_all(hypothesis: str, parts: Sequence[str]) -> float:
    """Returns the share of the parts of an answer that occur in the hypothesis, as `contains` compares (RULER's score)."""
    return float(np.mean([contains(hypothesis, (part,)) for part in parts]))


def exact_match(hypothesis: str, golds: Iterable[str]) -> float:
    """Returns 1.0 if the hypothesis equals an accepted answer, both normalized (SQuAD's evaluation script), else 0.0.

    Unlike in the script, texts of which normalization leaves nothing are equal only if they were before.
    """
    wanted = _normalized_or_lower(hypothesis)
    return float(any(_normalized_or_lower(gold) == wanted for gold in golds))


def exact_match_strict(hypothesis: str, golds: Iterable[str]) -> float:
    """Returns 1.0 if the hypothesis equals an accepted answer up to white space around them, else 0.0."""
    return float(any(gold.strip() == hypothesis.strip() for gold in golds))


def f1(hypothesis: str, golds: Iterable[str]) -> float:
    """Returns the largest F1 in 0..1 over the accepted answers, of common words after the normalization of `exact_match`.

    A word counts as often as it occurs in both. If one side has no words: 1 if neither has any (SQuAD v2's script).
    """
    return max(
        (_f1(_normalized_or_lower(hypothesis).split(), _normalized_or_lower(gold).split()) for gold in golds),
        default=0.0,
    )


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (collections.Counter(found) & collections.Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


SCORES = {
    "contains": contains,
    "contains_all": contains_all,
    "exact_match": exact_match,
    "exact_match_strict": exact_match_strict,
    "f1": f1,
}


def score_answer(hypothesis: str, golds: Sequence[str], metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Returns {metric: score in 0..1} of one answer."""
    return {name: SCORES[name](hypothesis, golds) for name in metrics}


def answer_distances(records: Iterable[Mapping[str, Any]], count_tokens: Callable[[str], int]) -> list[int | None]:
    """Returns the distance of each answer: tokens from its first occurrence in the gold passage to the end of the prompt.

    Args:
      records: see the module's docstring.
      count_tokens: returns the number of tokens of a text.

    Returns:
      One number for each record; None if the passage is unknown or does not hold an accepted answer.
    """
    distances: list[int | None] = []
    for record in records:
        prompt, passage = record["input"], record.get("passage")
        starts = [] if passage is None else [prompt.find(gold, passage) for gold in record["outputs"] if gold]
        starts = [start for start in starts if start >= 0]
        distances.append(count_tokens(prompt[min(starts) :]) if starts else None)
    return distances


def score_answers(
    records: Sequence[Mapping[str, Any]],
    hypotheses: Sequence[str],
    *,
    metrics: Sequence[str] = METRICS,
    depth_bins: int = DEPTH_BINS,
    distances: Sequence[int | None] = (),
) -> dict[str, Any]:
    """Computes the mean scores of answers, in percent.

    Args:
      records: the questions, see the module's docstring.
      hypotheses: generated answers, one per reference.
      metrics: names of scores (`answer_metrics`).
      depth_bins: number of bins of equal width of the depth of the passage.
      distances: `answer_distances` of the records.

    Returns:
      {"examples", the scores by their names, "depth": [{"from", "to", "examples", and the scores, None in an empty bin}],
      "distance": the same by distance}; "depth" and "distance" are left out if unknown.

    Raises:
      InputError: there are no records.
    """
    if not records:
        raise InputError("there are no questions to score: ask for at least one")
    pairs = zip(records, hypotheses, strict=True)
    scores = [score_answer(hypothesis, record["outputs"], metrics) for record, hypothesis in pairs]
    result: dict[str, Any] = _means(scores, metrics)
    if all(record["depth"] is not None for record in records):
        bins = [min(int(record["depth"] * depth_bins), depth_bins - 1) for record in records]
        result["depth"] = [
            {"from": index / depth_bins, "to": (index + 1) / depth_bins}
            | _means([score for score, own in zip(scores, bins, strict=True) if own == index], metrics)
            for index in range(depth_bins)
        ]
    known = [(score, distance) for score, distance in zip(scores, distances, strict=False) if distance is not None]
    if known:
        result["distance"] = _means_by_distance(known, metrics)
    return result


def _means_by_distance(
    scores: Sequence[tuple[Mapping[str, float], int]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    edges = [0, FIRST_DISTANCE_BIN]
    while edges[-1] <= max(distance for _, distance in scores):
        edges.append(2 * edges[-1])
    return [
        {"from": low, "to": high} | _means([score for score, distance in scores if low <= distance < high], metrics)
        for low, high in itertools.pairwise(edges)
    ]


def _means(scores: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> dict[str, Any]:
    means = {name: 100 * float(np.mean([score[name] for score in scores])) if scores else None for name in metrics}
    return {"examples": len(scores)} | means


def no_context_baseline(
    train: Iterable[QuestionAnswer], heldout: Iterable[QuestionAnswer], metrics: Sequence[str] = METRICS
) -> dict[str, Any]:
    """Scores answers that are guessed without the passage, from memory of the training split alone.

    The guess is the most frequent (first accepted) training answer to the same question, else to its kind, else of all.

    Args:
      train: (question, kind, accepted answers) of the training split, as `QASource.questions` yields them.
      heldout: the same of the split that is scored.
      metrics: names of scores.

    Returns:
      The result of `score_answers`.

    Raises:
      InputError: there are no questions.
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
    return score_answers(records, hypotheses, metrics=metrics)


def answer_lines(
    records: Sequence[Mapping[str, Any]], hypotheses: Sequence[str], metrics: Sequence[str] = METRICS
) -> Iterator[dict[str, Any]]:
    """Yields {"index", "question", "kind", "gold", "hypothesis", "depth"} and the scores in 0..1 of each answer.

    Args:
      records: the questions, see the module's docstring.
      hypotheses: generated answers, one per record.
      metrics: names of scores.
    """
    for record, hypothesis in zip(records, hypotheses, strict=True):
        yield {
            "index": record["index"],
            "question": record["question"],
            "kind": record["kind"],
            "gold": list(record["outputs"]),
            "hypothesis": hypothesis,
            "depth": record["depth"],
            **score_answer(hypothesis, record["outputs"], metrics),
        }


def write_answers(
    path: str | os.PathLike,
    records: Sequence[Mapping[str, Any]],
    hypotheses: Sequence[str],
    metrics: Sequence[str] = METRICS,
) -> AnyPath:
    """Writes the lines of `answer_lines` as JSON.

    Args:
      path: file, written atomically.
      records: the questions, see the module's docstring.
      hypotheses: generated answers, one per reference.
      metrics: names of scores.

    Returns:
      The path.

    Raises:
      InputError: it cannot be written.
    """
    path = as_path(path)
    lines = answer_lines(records, hypotheses, metrics)
    try:
        atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise InputError(f"cannot write answers to '{path}' ({error.strerror}): choose another file") from error
    return path
