"""Who wins where: ties within two standard errors, deviations of several seeds alone, sentences from the numbers."""

import pytest

from seqpe_jax.reporting import tables
from seqpe_jax.reporting.study import Run, Study
from seqpe_jax.reporting.verdicts import verdicts

BITS, TOP1 = tables.METRICS["text"][0], tables.METRICS["images"][0]


def study(values, key="bits_per_byte"):
    """Row -> label -> values of its seeds."""
    runs = []
    for row, places in values.items():
        for seed in range(max(map(len, places.values()))):
            results = [
                {"extent": place, "label": str(place), key: own[seed]} for place, own in places.items() if seed < len(own)
            ]
            sides = {"size": [8, 8]} if key == "top1" else {"length": 64}
            config = {"seed": seed, "data": {"name": "x", **sides}, "encoding": {"kind": row}}
            runs.append(Run(f"{row}-{seed}", config, [], {"results": results}, None, None, row=row))
    return Study("study", runs)


def told(values, metric=BITS, data="text", key="bits_per_byte"):
    return verdicts(study(values, key), data, metric)


def test_a_winner_is_told_with_its_margin_in_deviations():
    # Deviations of 0.1 each; the pooled one is 0.1, margins 1.0 and 2.0.
    values = {
        "a": {64: [1.9, 2.1], 128: [1.9, 2.1]},
        "b": {64: [2.9, 3.1], 128: [3.9, 4.1]},
        "c": {64: [5, 6], 128: [5, 6]},
    }
    [line] = told(values)
    assert line == "From 64 to 128 a wins; the next is b, 1.000 to 2.000 behind (7.1 to 14.1 standard deviations)."


def test_means_within_two_standard_errors_tie():
    """sd 0.1 of two seeds each: the error of the difference is 0.1, so 0.2 is a tie and 0.21 is none."""
    deviation = 0.1 / 2**0.5  # values m ± d have the deviation d * sqrt(2)
    row = lambda mean: {64: [mean - deviation, mean + deviation]}  # noqa: E731
    assert told({"a": row(2.0), "b": row(2.199)}) == ["At 64 a and b tie, within two standard errors."]
    assert told({"a": row(2.0), "b": row(2.21)}) == ["At 64 a wins; the next is b, 0.210 behind (2.1 standard deviations)."]
    [line] = told({"a": row(2.0), "b": row(2.1), "c": row(3.0)})
    assert line == "At 64 a and b tie, within two standard errors; then comes c, 1.000 behind (10.0 standard deviations)."


def test_one_seed_claims_no_deviation():
    [line] = told({"a": {64: [2.0]}, "b": {64: [2.5]}})
    assert line == "At 64 a is the best; the next is b, 0.500 behind, of which one seed tells no deviation."
    [line] = told({"a": {64: [2.0, 2.1]}, "b": {64: [2.5, 2.6]}, "c": {64: [1.0]}})
    assert line.startswith("At 64 a wins; the next is b, 0.500 behind (7.1 standard") and line.endswith("of one seed: c.")
    assert told({"a": {64: [2.0]}, "b": {64: [2.0]}}) == ["At 64 a and b tie."]
    assert "with no deviation between seeds" in told({"a": {64: [2.0, 2.0]}, "b": {64: [2.5, 2.5]}})[0]


def test_more_may_be_better_and_stretches_are_apart_where_the_winner_changes():
    values = {"a": {8: [90.0, 91.0], 16: [50.0, 51.0]}, "b": {8: [80.0, 81.0], 16: [70.0, 71.0]}}
    first, second = told(values, TOP1, "images", "top1")
    assert first.startswith("At 8 a wins; the next is b, 10.0 behind (14.1 standard") and second.startswith("At 16 b wins")


@pytest.mark.parametrize("values", [{}, {"a": {64: [2.0, 2.1]}}, {"a": {64: [2.0]}, "b": {128: [2.0]}}])
def test_where_nothing_can_be_compared_nothing_is_said(values):
    assert told(values) == []


def test_what_is_missing_or_no_number_is_not_judged():
    [line] = told({"a": {64: [2.0]}, "b": {64: [2.5]}, "c": {64: [float("nan")]}, "d": {128: [1.0]}})
    assert "c" not in line.replace("which", "").split() and "a is the best; the next is b" in line
