"""Which row is better, worse or a tie at each length or size, in sentences that are made from tests of the numbers."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from seqpe_jax.reporting import t_tests
from seqpe_jax.reporting.load_run import field
from seqpe_jax.reporting.study import COMPARED, Run, Study
from seqpe_jax.reporting.tables import Metric, number, values_of

TEST_NOTE = (
    "*: worse than the row with the best mean, by a t-test two-sided at 0.05, paired by seed where two rows have the same "
    "seeds and data and else Welch's, with the p of the best of so many rows, Holm-corrected over all other rows of a "
    "column. Rows of several seeds without it tie with the best one: their seeds do not tell them apart, and three seeds "
    "tell few rows apart. Rows of one seed are not judged."
)


@dataclasses.dataclass(frozen=True)
class TestResult:
    """The tests of one length or size: each judged row against the one with the best mean.

    Attributes:
      label: the length or size.
      best: the row with the best mean among those judged, or among all where `judged` is False.
      worse: row -> adjusted p of those that are worse than the best row.
      ties: row -> adjusted p of those that are not told apart from it.
      unjudged: row -> why it is not tested.
      next: the row whose mean is next to the best, "" without one.
      margin: the difference of their means, at least 0.
      judged: whether two rows have several seeds; else nothing is tested.
    """

    label: str
    best: str
    worse: dict[str, float]
    ties: dict[str, float]
    unjudged: dict[str, str]
    next: str
    margin: float
    judged: bool = True

    @property
    def key(self) -> tuple:
        """Equal of verdicts that one sentence can tell together."""
        return self.best, set(self.worse), set(self.ties), self.unjudged, self.next, self.judged


def significance_tests(study: Study, data: str, metric: Metric) -> list[TestResult]:
    """Returns the verdict of each length or size at which two rows or more have a finite value.

    Rows of one seed are not judged, nor those with a seed whose value is not finite. Runs of a row with the same seed count
    once, with their mean.
    """
    found, extents = values_of(study, data, metric)
    judged = [_verdict(study, label, found, metric) for label in extents]
    return [one for one in judged if one is not None]


def worse(found: Sequence[TestResult]) -> set[tuple[str, str]]:
    """Returns the (row, label) that are worse than the best row of a length or size."""
    return {(row, one.label) for one in found for row in one.worse}


def _verdict(study: Study, label: str, found: dict[tuple[str, str], list[float]], metric: Metric) -> TestResult | None:
    there = {name: own for (name, at), own in found.items() if at == label}
    finite = {name: own for name, own in there.items() if all(map(math.isfinite, own))}
    if len(finite) < 2:
        return None
    means = {name: statistics.fmean(own) for name, own in finite.items()}
    seeds = {name: _seeds(study, name, label, metric) for name in finite}
    several = [name for name in finite if len(seeds[name]) > 1]
    judged = len(several) > 1
    choose = max if metric.higher_is_better else min
    best = choose(several if judged else finite, key=means.__getitem__)
    others = [name for name in (several if judged else finite) if name != best]
    following = choose(others, key=means.__getitem__)
    verdict = TestResult(label, best, {}, {}, {}, following, abs(means[best] - means[following]), judged)
    if not judged:
        return verdict
    measured = {name: _measured(study, name, label) for name in several}
    adjusted = t_tests.against(best, {name: seeds[name] for name in several}, measured)
    for name in sorted(others, key=means.__getitem__, reverse=metric.higher_is_better):
        if math.isnan(adjusted[name]):
            verdict.unjudged[name] = "seeds that do not differ"
        else:
            (verdict.worse if adjusted[name] <= t_tests.LEVEL else verdict.ties)[name] = adjusted[name]
    for name in there:
        if name not in several:
            verdict.unjudged[name] = "one seed" if name in finite else "a value that is not finite"
    return verdict


def _results(study: Study, row: str, label: str) -> list[tuple[Run, dict[str, Any]]]:
    """The runs of a row that count, with their results at a length or size."""
    return [
        (run, result) for run in study.counted if run.row == row for result in run.results if result["label"] == label
    ]


def _seeds(study: Study, row: str, label: str, metric: Metric) -> dict[int, float]:
    values: dict[int, list[float]] = collections.defaultdict(list)
    for run, result in _results(study, row, label):
        if metric.name in result:
            values[run.seed].append(result[metric.name])
    return {seed: statistics.fmean(own) for seed, own in values.items()}


def _measured(study: Study, row: str, label: str) -> Hashable:
    """What rows must have in common to be paired: seeds, training data, the split and the number of examples read."""
    found = set()
    for run, result in _results(study, row, label):
        trained = tuple(repr(field(run.config, name)) for name in COMPARED)
        count = result.get("examples", result.get("tokens"))
        found.add((run.seed, trained, run.evaluation.get("split"), count))
    return frozenset(found)


def sentences(found: Sequence[TestResult], metric: Metric) -> list[str]:
    """Returns a sentence for each stretch of lengths or sizes with the same verdict."""
    stretches: list[list[TestResult]] = []
    for verdict in found:
        if stretches and stretches[-1][0].key == verdict.key:
            stretches[-1].append(verdict)
        else:
            stretches.append([verdict])
    return [_sentence(stretch, metric) for stretch in stretches]


def _sentence(stretch: Sequence[TestResult], metric: Metric) -> str:
    first, last = stretch[0], stretch[-1]
    words = f"At {first.label}" if first is last else f"From {first.label} to {last.label}"
    by = _range([one.margin for one in stretch], lambda value: number(value, metric.decimals))
    if not first.judged:
        return (
            f"{words} {first.best} has the best value, {by} ahead of {first.next}; one seed each, so nothing is judged."
        )
    words += f" {first.best} has the best mean, {by} ahead of {first.next}"
    if first.worse:
        largest = max(p for one in stretch for p in one.worse.values())
        words += f"; it is better than {_joined(list(first.worse))} (adjusted p at most {largest:.2g})"
    if first.ties:
        words += f"; {_joined(list(first.ties))} {'tie' if len(first.ties) > 1 else 'ties'} with it"
    reasons: dict[str, list[str]] = {}
    for name, reason in first.unjudged.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        words += f"; not judged, {reason}: {', '.join(names)}"
    return f"{words}."


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"
