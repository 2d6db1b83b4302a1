"""Better, worse or a tie: t-tests over seeds, Holm's correction of a family, intervals, sentences from the numbers."""

import math

import numpy as np
import pytest
from scipy import optimize

from seqpe_jax.metric_registry import METRICS
from seqpe_jax.reporting import t_tests, tables
from seqpe_jax.reporting.significance import TEST_NOTE, sentences, significance_tests, worse_cells
from seqpe_jax.reporting.study import Run, Study

BITS, TOP1 = METRICS["text"][0], METRICS["images"][0]
# Three seeds each. By hand: the differences b - a are 1.1, 0.8, 0.8, so t = 0.9 / (0.173205 / sqrt(3)) = 9, and with two
# degrees of freedom p = 1 - t / sqrt(t^2 + 2) = 0.0121217. Of c - a: 0.1, -0.1, 0.3, t = 0.8660254, p = 0.4777670.
# Welch's t are 11.022704 with 4 degrees of freedom and 0.6123724 with 2.56; their p are integrals of the density of t by
# the trapezoidal rule, two million steps.
ROWS = {"a": (2.0, 2.1, 2.2), "b": (3.1, 2.9, 3.0), "c": (2.1, 2.0, 2.5)}
PAIRED = {"b": (9.0, 2.0, 0.0121217), "c": (0.8660254, 2.0, 0.4777670)}
WELCH = {"b": (11.0227038, 4.0, 0.000385068), "c": (0.6123724, 2.56, 0.5903318)}


def study(values, key="bits_per_byte", **trained):
    """Row -> label -> values of its seeds; trained: row -> what its training data has in place of the others'."""
    runs = []
    for row, places in values.items():
        for seed in range(max(map(len, places.values()))):
            results = [
                {"extent": place, "label": str(place), key: own[seed]}
                for place, own in places.items()
                if seed < len(own)
            ]
            sides = {"size": [8, 8]} if key == "top1" else {"length": 64}
            data = {"name": "x", **sides} | trained.get(row, {})
            config = {"seed": seed, "data": data, "encoding": {"kind": row}}
            runs.append(Run(f"{row}-{seed}", config, [], {"results": results}, None, None, row=row))
    return Study("study", runs)


def sentences_of(values, metric=BITS, data="text", key="bits_per_byte", **trained):
    return sentences(significance_tests(study(values, key, **trained), data, metric), metric)


@pytest.mark.parametrize("paired,expected", [(True, PAIRED), (False, WELCH)])
def test_t_and_p_are_those_computed_by_hand(paired, expected):
    rows = {name: dict(enumerate(values)) for name, values in ROWS.items()}
    for name, (t, degrees, p) in expected.items():
        found = t_tests.t_test(rows["a"], rows[name], paired)
        assert found == pytest.approx((t, degrees), rel=1e-6)
        assert t_tests.p_of_best(*found, rows=2) == pytest.approx(p, rel=1e-5)


def test_p_of_the_best_of_many_rows_and_holms_correction():
    """Far out, p grows by the mean of D^2, which is by order statistics: with two degrees of freedom it is D^2 / t^2.

    Of three normal numbers the mean square of the largest is q = 1 + sqrt(3) / (2 pi), of each other one (3 - q) / 2, and
    the mean of the largest times the sum of all is 1. So D^2 = (q + (3 - q) / 2 - (1 - q)) / 2.
    """
    square = 1 + math.sqrt(3) / (2 * math.pi)
    factor = (square + (3 - square) / 2 - (1 - square)) / 2
    p = {rows: t_tests.p_of_best(100.0, 2.0, rows) for rows in (2, 3)}
    assert p[3] / p[2] == pytest.approx(factor, rel=1e-4)
    squares, weights = t_tests._squared_differences(2)  # whose D is normal
    assert [np.sum(weights), np.sum(weights * squares)] == pytest.approx([1, 1])
    # The smallest of three p counts three times, the next twice, the largest once, and none less than one before it.
    adjusted = t_tests.holm({"a": 0.3, "b": 0.01, "c": 0.02, "d": math.nan})
    assert adjusted == pytest.approx({"a": 0.6, "b": 0.04, "c": 0.06, "d": math.nan}, nan_ok=True)
    assert t_tests.holm({"a": 0.04, "b": 0.03}) == pytest.approx({"a": 0.06, "b": 0.06})
    # t of 0.975 with two degrees of freedom is 4.302653.
    assert t_tests.interval((2.0, 2.1, 2.2)) == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert math.isnan(t_tests.interval((2.0,))) and math.isnan(t_tests.interval((2.0, math.inf)))


def test_a_row_is_better_only_where_the_adjusted_p_allows_it():
    values = {name: {64: row, 128: row} for name, row in ROWS.items()}
    [line] = sentences_of(values)
    best = "From 64 to 128 a has the best mean, 0.100 ahead of c; "
    assert line == best + "it is significantly better than b (adjusted p at most 0.029); c ties with it."
    assert worse_cells(significance_tests(study(values), "text", BITS)) == {("b", "64"), ("b", "128")}
    # Two standard errors of the difference would call b worse than a: 0.2 ± 0.058. Its p is 0.13.
    assert sentences_of({"a": {64: (2.0, 2.1, 2.2)}, "b": {64: (2.3, 2.2, 2.4)}}) == [
        "At 64 a has the best mean, 0.200 ahead of b; b ties with it."
    ]


def test_rows_are_paired_where_seeds_and_data_agree():
    """The same values: a difference by seed that pairs show, and that Welch's test does not."""
    values = {"a": {64: (1.0, 2.0, 3.0)}, "b": {64: (1.1, 2.11, 3.09)}}
    assert "it is significantly better than b" in sentences_of(values)[0]
    assert "b ties with it" in sentences_of(values, b={"tokenizer": "other"})[0]
    other = study(values)
    other.runs[-1].evaluation["results"][0]["tokens"] = 7
    assert "b ties with it" in sentences(significance_tests(other, "text", BITS), BITS)[0]
    fewer = {"a": {64: (1.0, 2.0, 3.0)}, "b": {64: (1.1, 2.11)}}
    assert "tie" in sentences_of(fewer)[0]  # Welch's, of three and two seeds


def test_a_family_of_equal_rows_has_a_false_loser_in_at_most_one_of_twenty_cases():
    cases, equal, seeds = 60_000, 8, 3
    values = np.random.default_rng(7).standard_normal((cases, equal, seeds))
    values = np.take_along_axis(values, values.mean(axis=2).argsort(axis=1)[:, :, None], axis=1)
    differences = values[:, 1:] - values[:, :1]
    largest = (differences.mean(axis=2) / differences.std(axis=2, ddof=1)).max(axis=1) * seeds**0.5

    def limit(rows):  # t of the first of Holm's tests
        return optimize.brentq(lambda t: t_tests.p_of_best(t, seeds - 1, rows) - 0.05 / (equal - 1), 1, 1000)

    assert (largest >= limit(equal)).mean() <= 0.05
    assert (largest >= limit(2)).mean() > 0.08  # the p of two rows that were named before is not enough
    losers, at = {True: 0, False: 0}, limit(equal)
    for case, own in enumerate(values[:40]):
        rows = {str(row): dict(enumerate(map(float, one))) for row, one in enumerate(own)}
        for alike in losers:
            found = min(t_tests.compare_with_best("0", rows, {row: alike or row for row in rows}).values()) <= 0.05
            assert not alike or found == (largest[case] >= at)
            losers[alike] += found
    assert losers[False] <= 2  # by Welch's test


def test_seeds_that_do_not_vary():
    assert sentences_of({"a": {64: (2.0, 2.0)}, "b": {64: (2.5, 2.5)}}) == [
        "At 64 a has the best mean, 0.500 ahead of b; not tested, seeds without variance: b."
    ]
    assert sentences_of({"a": {64: (2.0, 2.0)}, "b": {64: (2.0, 2.0)}})[0].endswith("; b ties with it.")
    # Differences that are equal have no t of pairs: Welch's takes its place, and rounding is no variation.
    equal = {"a": {64: (1.1, 2.3, 3.7)}, "b": {64: (1.2, 2.4, 3.8000000000000003)}}
    assert sentences_of(equal) == ["At 64 a has the best mean, 0.100 ahead of b; b ties with it."]


def test_one_seed_is_not_results():
    [line] = sentences_of({"a": {64: [2.0]}, "b": {64: [2.5]}})
    assert line == "At 64 a has the best value, 0.500 ahead of b; one seed each, so no test."
    [line] = sentences_of({"a": {64: [2.0, 2.1, 2.05]}, "b": {64: [2.5, 2.61, 2.54]}, "c": {64: [1.0]}})
    assert line.startswith(
        "At 64 a has the best mean, 0.500 ahead of b; it is significantly better than b (adjusted p at most 0.000"
    )
    assert line.endswith("; not tested, one seed: c.")
    same = study({"a": {64: (2.0, 2.1)}, "b": {64: (2.5, 2.6)}})
    for run in same.runs:
        run.config["seed"] = 0
    assert "so no test" in sentences(significance_tests(same, "text", BITS), BITS)[0]


def test_higher_may_be_better_and_a_new_best_row_begins_a_new_sentence():
    values = {"a": {8: [90.0, 91.0], 16: [50.0, 51.5]}, "b": {8: [80.0, 81.1], 16: [70.0, 71.0]}}
    first, second = sentences_of(values, TOP1, "images", "top1")
    assert first.startswith(
        "At 8 a has the best mean, 10.0 ahead of b; it is significantly better than b (adjusted p at most 0.003"
    )
    assert second.startswith("At 16 b has the best mean, 19.8 ahead of a")


@pytest.mark.parametrize("values", [{}, {"a": {64: [2.0, 2.1]}}, {"a": {64: [2.0]}, "b": {128: [2.0]}}])
def test_nothing_is_said_where_nothing_can_be_compared(values):
    assert sentences_of(values) == []


def test_a_value_that_is_not_finite_is_named_and_not_results():
    rows = {"a": {64: [2.0, 2.1]}, "b": {64: [2.5, 2.7]}, "c": {64: [1.0, math.nan]}, "d": {128: [1.0]}}
    [line] = sentences_of(rows)
    assert line.endswith("b ties with it; not tested, a value that is not finite: c.")


def test_the_table_marks_what_is_worse_and_its_note_says_by_which_test():
    found = study({name: {64: row} for name, row in ROWS.items()})
    results = significance_tests(found, "text", BITS)
    table = tables.by_size(found, "text", BITS, worse_cells(results), TEST_NOTE, work=True)
    assert tables.markdown(table).splitlines()[2:] == [
        "| a | **2.100** ± 0.248 | - | - |",
        "| b | 3.000 ± 0.248\\* | - | - |",
        "| c | 2.200 ± 0.657 | - | - |",
    ]
    for part in (
        "95% confidence interval (Student's t), over 3 seeds",
        "paired by seed",
        "Welch",
        "Holm",
        "best of so many rows",
    ):
        assert part in table.note
