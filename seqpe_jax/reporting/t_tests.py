"""Statistics over seeds: confidence intervals of means, t-tests against the best of several rows, Holm's correction."""

import functools
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import special, stats

LEVEL = 0.05  # two-sided significance level of a family of tests; 1 - LEVEL is the confidence of an interval
ROUNDING = 1e-12  # a standard deviation below this fraction of the values is rounding
MAX_DEVIATIONS = 12.0  # range of a normal variable in numerical integrals

Seeds = Mapping[int, float]  # seed -> value


def interval(values: Sequence[float]) -> float:
    """Returns half the width of the confidence interval of a mean, by Student's t with n - 1 degrees of freedom.

    Args:
      values: sample; the result is NaN for fewer than two values, or where one is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    quantile = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def compare_with_best(best: str, rows: Mapping[str, Seeds], conditions: Mapping[str, Hashable]) -> dict[str, float]:
    """Returns the two-sided p of each other row against the one with the best mean, Holm-corrected over these tests.

    The best row is found in the same numbers that are tested, so p is that of the best of so many equal rows (`p_of_best`).
    With the p of two rows chosen beforehand, one of twenty equal rows is called worse in 11% of the cases with three seeds
    and in 19% with ten; with this one in at most 5%.

    Args:
      best: row with the best mean.
      rows: row -> finite values of at least two seeds; with the best row.
      conditions: row -> its seeds, data and split; rows with equal conditions are paired.
    """
    tests = {
        name: t_test(rows[best], row, conditions[best] == conditions[name])
        for name, row in rows.items()
        if name != best
    }
    return holm({name: p_of_best(t, degrees, len(rows)) for name, (t, degrees) in tests.items()})


def t_test(one: Seeds, other: Seeds, paired: bool) -> tuple[float, float]:
    """Returns |t| of equal means and its degrees of freedom, of the paired t-test by seed or of Welch's.

    Where all differences of a pair are equal, the paired test has no t, and Welch's is taken. Where neither row varies
    between its seeds, t is 0 for equal means, and else NaN.

    Args:
      one: values of at least two seeds.
      other: likewise; the same seeds where `paired`.
      paired: whether a seed's values belong together.
    """
    first, second = (np.array([row[seed] for seed in sorted(row)]) for row in (one, other))
    if paired and _varies(first - second, first):
        result = stats.ttest_rel(first, second)
    elif _varies(first, first) or _varies(second, second):
        result = stats.ttest_ind(first, second, equal_var=False)
    else:
        return (0.0 if math.isclose(first.mean(), second.mean(), rel_tol=ROUNDING) else math.nan), 1.0
    return abs(float(result.statistic)), float(result.df)


def _varies(values: np.ndarray, size: np.ndarray) -> bool:
    return bool(values.std() > ROUNDING * np.abs(size).max())


def p_of_best(t: float, degrees: float, rows: int) -> float:
    """Returns the p of |t| for the difference between the best of several equal rows and any other one of them.

    Student's t divides a normal difference D of variance 1 by an independent deviation, so its p is the expectation of
    P(chi2 < degrees D^2 / t^2). Here D is the difference between the largest of `rows` standard normal variables and
    another one, over sqrt(2). With two rows D is normal but for its sign, and p is that of a t-test.

    Args:
      t: statistic of the test.
      degrees: its degrees of freedom.
      rows: number of rows, with the best one.
    """
    if rows == 2 or math.isnan(t):
        return float(2 * stats.t.sf(t, degrees))
    if t == 0:
        return 1.0
    squares, weights = _squared_differences(rows)
    return float(np.sum(weights * special.gammainc(degrees / 2, degrees * squares / (2 * t**2))))


@functools.cache
def _squared_differences(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of D^2 of `p_of_best` and their weights.

    The largest m of k normal variables and another one m - r have the joint density k phi(m) phi(m - r) Phi(m)^(k - 2),
    integrated over m by the trapezoidal rule and over r by Gauss-Legendre quadrature.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    distances = MAX_DEVIATIONS * (nodes + 1) / 2
    largest, step = np.linspace(-MAX_DEVIATIONS, MAX_DEVIATIONS, 481, retstep=True)
    others = stats.norm.pdf(largest - distances[:, None])
    densities = stats.norm.pdf(largest) * special.ndtr(largest) ** (rows - 2) * others
    return distances**2 / 2, MAX_DEVIATIONS * weights / 2 * rows * step * densities.sum(axis=1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns the adjusted p of each test of a family; a NaN counts as a test and stays NaN.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.

    Args:
      p_values: test -> its p.
    """
    adjusted, largest = dict(p_values), 0.0
    valid = sorted((name for name, p in p_values.items() if not math.isnan(p)), key=p_values.__getitem__)
    for rank, name in enumerate(valid):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted
