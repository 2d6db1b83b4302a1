"""Significance tests of a study: at each length or size the best row against the others, and their results in sentences."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from seqpe_jax.metric_registry import Metric
from seqpe_jax.reporting import t_tests
from seqpe_jax.reporting.load_run import get_field
from seqpe_jax.reporting.study import COMPARED_FIELDS, Run, Study
from seqpe_jax.reporting.tables import number, values_of

TEST_NOTE = (
    "*: significantly worse than the row with the best mean, by a two-sided t-test at 0.05, paired by seed where two rows "
    "have the same seeds and data and else Welch's, with the p of the best of so many rows, Holm-corrected over all other "
    "rows of a column. Rows of several seeds without a star tie with the best one: the test does not distinguish them, and "
    "three seeds distinguish few rows. Rows of one seed are not tested."
)
UNTESTED = "untested"  # state of a outcome


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Tests of one length or size: each row with several seeds against the best of them.

    Attributes:
      label: the length or size.
      best: row with the best mean, among those that are tested, or among all where `tested` is False.
      worse: row -> adjusted p of rows that are significantly worse.
      ties: row -> adjusted p of rows without a significant difference.
      untested: row -> reason for which it is not tested.
      second: row with the second best mean.
      margin: difference of these two means, at least 0.
      tested: whether at least two rows have several seeds.
    """

    label: str
    best: str
    worse: dict[str, float]
    ties: dict[str, float]
    untested: dict[str, str]
    second: str
    margin: float
    tested: bool = True

    @property
    def key(self) -> tuple:
        """Equal for results that one sentence can state together."""
        return self.best, set(self.worse), set(self.ties), self.untested, self.second, self.tested


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A row against the strongest row of another kind of encoding, at one length or size.

    Attributes:
      label: the length or size.
      row: the row.
      other: row with the best mean among the other kinds.
      state: "ahead" or "behind", significantly; "tied"; or "untested", with one seed.
      margin: difference of the two means, positive where `row` is better.
      p: adjusted p of the difference, NaN where it is not tested.
    """

    label: str
    row: str
    other: str
    state: str
    margin: float
    p: float


def significance_tests(study: Study, kind: str, metric: Metric) -> list[Comparison]:
    """Returns the tests of each length or size at which at least two rows have finite values.

    Rows with one seed, or with a value that is not finite, are not tested. Runs of a row with the same seed count once,
    with their mean.

    Args:
      study: the runs.
      kind: kind of data.
      metric: metric that is compared.
    """
    values, extents = values_of(study, kind, metric)
    results = [_test(study, label, values, metric) for label in extents]
    return [one for one in results if one is not None]


def worse_cells(results: Sequence[Comparison]) -> set[tuple[str, str]]:
    """Returns the (row, label) that are significantly worse than the best row."""
    return {(row, one.label) for one in results for row in one.worse}


def _test(study: Study, label: str, values: dict[tuple[str, str], list[float]], metric: Metric) -> Comparison | None:
    at_label = {row: own for (row, at), own in values.items() if at == label}
    finite = {row: own for row, own in at_label.items() if all(map(math.isfinite, own))}
    if len(finite) < 2:
        return None
    means = {row: statistics.fmean(own) for row, own in finite.items()}
    seeds = {row: _by_seed(study, row, label, metric) for row in finite}
    repeated = [row for row in finite if len(seeds[row]) > 1]
    tested = len(repeated) > 1
    choose = max if metric.higher_is_better else min
    best = choose(repeated if tested else finite, key=means.__getitem__)
    others = [row for row in (repeated if tested else finite) if row != best]
    second = choose(others, key=means.__getitem__)
    result = Comparison(label, best, {}, {}, {}, second, abs(means[best] - means[second]), tested)
    if not tested:
        return result
    conditions = {row: _conditions(study, row, label) for row in repeated}
    adjusted = t_tests.compare_with_best(best, {row: seeds[row] for row in repeated}, conditions)
    for row in sorted(others, key=means.__getitem__, reverse=metric.higher_is_better):
        if math.isnan(adjusted[row]):
            result.untested[row] = "seeds without variance"
        else:
            (result.worse if adjusted[row] <= t_tests.LEVEL else result.ties)[row] = adjusted[row]
    for row in at_label:
        if row not in repeated:
            result.untested[row] = "one seed" if row in finite else "a value that is not finite"
    return result


def _results(study: Study, row: str, label: str) -> list[tuple[Run, dict[str, Any]]]:
    """Runs of a row that count, with their results at a length or size."""
    return [
        (run, result) for run in study.counted if run.row == row for result in run.results if result["label"] == label
    ]


def _by_seed(study: Study, row: str, label: str, metric: Metric) -> dict[int, float]:
    values: dict[int, list[float]] = collections.defaultdict(list)
    for run, result in _results(study, row, label):
        if metric.name in result:
            values[run.seed].append(result[metric.name])
    return {seed: statistics.fmean(own) for seed, own in values.items()}


def _conditions(study: Study, row: str, label: str) -> Hashable:
    """Seeds, training data, split and number of evaluated examples; rows are paired where these are equal."""
    conditions = set()
    for run, result in _results(study, row, label):
        training = tuple(repr(get_field(run.config, name)) for name in COMPARED_FIELDS)
        count = result.get("examples", result.get("tokens"))
        conditions.add((run.seed, training, run.evaluation.get("split"), count))
    return frozenset(conditions)


def outcomes(study: Study, kind: str, metric: Metric, row: str) -> list[Outcome]:
    """Returns the outcome for a row at each length or size at which it and another kind of encoding were evaluated.

    The tests are those of `significance_tests`, without other rows of the row's own kind of encoding. Where rows with
    several seeds are there, the strongest other is one of them.

    Args:
      study: the runs.
      kind: kind of data.
      metric: metric that is compared.
      row: row of the study.
    """
    own = {run.config["encoding"]["kind"] for run in study.runs_of(row)}
    runs = [run for run in study.runs if run.row == row or run.config["encoding"]["kind"] not in own]
    study = dataclasses.replace(study, runs=runs)
    values, _ = values_of(study, kind, metric)
    sign = 1 if metric.higher_is_better else -1
    found = []
    for test in significance_tests(study, kind, metric):
        if (row, test.label) not in values:
            continue
        other = test.second if test.best == row else test.best
        margin = sign * (statistics.fmean(values[row, test.label]) - statistics.fmean(values[other, test.label]))
        tested = other if test.best == row else row
        p = (test.worse | test.ties).get(tested, math.nan)
        state = (
            UNTESTED if math.isnan(p) else "tied" if tested in test.ties else "ahead" if tested == other else "behind"
        )
        found.append(Outcome(test.label, row, other, state, margin, p))
    return found


def outcome_sentence(found: Sequence[Outcome], metric: Metric) -> str:
    """Returns outcomes for one row in words; neighbouring lengths or sizes with the same outcome are one range.

    Args:
      found: outcomes for one row, by ascending length or size; at least one.
      metric: the metric.
    """
    ranges: list[list[Outcome]] = []
    for one in found:
        before = ranges[-1][0] if ranges else None
        if before and (before.state, before.other, before.margin > 0) == (one.state, one.other, one.margin > 0):
            ranges[-1].append(one)
        else:
            ranges.append([one])
    return (
        f"{found[0].row} against the strongest other encoding: {'; '.join(_outcome(same, metric) for same in ranges)}."
    )


def _outcome(same: Sequence[Outcome], metric: Metric) -> str:
    first, last = same[0], same[-1]
    at = f"at {first.label}" if first is last else f"from {first.label} to {last.label}"
    margin = _format_range([abs(one.margin) for one in same], lambda value: number(value, metric.decimals))
    side = "ahead" if first.margin > 0 else "behind"
    p = _format_range([one.p for one in same], lambda value: f"{value:.2g}")
    if first.state == "tied":
        return f"tied with {first.other} {at} ({margin} {side}, p {p})"
    evidence = "one seed, so no test" if first.state == UNTESTED else f"p {p}"
    return f"{side}{' of' * (side == 'ahead')} {first.other} {at}, by {margin} ({evidence})"


def sentences(results: Sequence[Comparison], metric: Metric) -> list[str]:
    """Returns a sentence for each range of lengths or sizes with the same test result.

    Args:
      results: tests of a metric, by ascending length.
      metric: the metric.
    """
    ranges: list[list[Comparison]] = []
    for result in results:
        if ranges and ranges[-1][0].key == result.key:
            ranges[-1].append(result)
        else:
            ranges.append([result])
    return [_sentence(same, metric) for same in ranges]


def _sentence(same: Sequence[Comparison], metric: Metric) -> str:
    first, last = same[0], same[-1]
    words = f"At {first.label}" if first is last else f"From {first.label} to {last.label}"
    margin = _format_range([one.margin for one in same], lambda value: number(value, metric.decimals))
    if not first.tested:
        return f"{words} {first.best} has the best value, {margin} ahead of {first.second}; one seed each, so no test."
    words += f" {first.best} has the best mean, {margin} ahead of {first.second}"
    if first.worse:
        largest = max(p for one in same for p in one.worse.values())
        words += f"; it is significantly better than {_enumerate(list(first.worse))} (adjusted p at most {largest:.2g})"
    if first.ties:
        words += f"; {_enumerate(list(first.ties))} {'tie' if len(first.ties) > 1 else 'ties'} with it"
    reasons: dict[str, list[str]] = {}
    for name, reason in first.untested.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        words += f"; not tested, {reason}: {', '.join(names)}"
    return f"{words}."


def _enumerate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _format_range(values: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"
