"""Who wins where, and by how many deviations, in sentences that are made from the numbers."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from seqpe_jax.reporting.study import Study
from seqpe_jax.reporting.tables import Metric, number, values_of

ERRORS = 2  # standard errors of a difference, within which two means are called a tie


def verdicts(study: Study, data: str, metric: Metric) -> list[str]:
    """Returns a sentence for each stretch of lengths or sizes with the same winner, the same ties and the same rows judged.

    Two rows tie where their means differ by no more than two standard errors of that difference. Deviations are claimed
    only of rows with several seeds, in units of their pooled standard deviation: where there are two such rows, those of
    one seed are not judged but named; else the best is named without deviations. A single row has no verdict.
    """
    found, extents = values_of(study, data, metric)
    stretches: list[tuple[_Place, list[_Place]]] = []
    for label in extents:
        values = {name: own for (name, at), own in found.items() if at == label and all(map(math.isfinite, own))}
        if len(values) > 1:
            place = _place(label, values, metric)
            if stretches and stretches[-1][0].key == place.key:
                stretches[-1][1].append(place)
            else:
                stretches.append((place, [place]))
    return [_sentence(metric, places) for _, places in stretches]


@dataclasses.dataclass(frozen=True)
class _Place:
    """What is said of one length or size: the winner, what ties with it, the next, and what is not judged.

    `several` says whether the rows judged have several seeds. `margin` is that to the next, `deviations` the same in
    standard deviations, nan where there is none, None where unknown.
    """

    label: str
    first: str
    ties: tuple[str, ...]
    unjudged: tuple[str, ...]
    several: bool
    next: str = ""
    margin: float = 0.0
    deviations: float | None = None

    @property
    def key(self) -> tuple:
        return self.first, set(self.ties), self.unjudged, self.several, bool(self.next)


def _place(label: str, values: dict[str, list[float]], metric: Metric) -> _Place:
    ranked = sorted(values, key=lambda name: statistics.fmean(values[name]), reverse=metric.more_is_better)
    several = [name for name in ranked if len(values[name]) > 1]
    judged = several if len(several) > 1 else ranked
    first, *others = judged
    ties = tuple(name for name in others if _tie(values[first], values[name]))
    unjudged = tuple(name for name in values if name not in judged)
    place = _Place(label, first, ties, unjudged, judged is several)
    behind = next((name for name in others if name not in ties), None)
    if behind is None:
        return place
    margin = abs(statistics.fmean(values[first]) - statistics.fmean(values[behind]))
    deviations = None
    if judged is several:
        pooled = math.sqrt((statistics.variance(values[first]) + statistics.variance(values[behind])) / 2)
        deviations = margin / pooled if pooled else math.nan
    return dataclasses.replace(place, next=behind, margin=margin, deviations=deviations)


def _tie(values: Sequence[float], others: Sequence[float]) -> bool:
    apart = abs(statistics.fmean(values) - statistics.fmean(others))
    if min(len(values), len(others)) < 2:
        return apart == 0
    return apart <= ERRORS * math.sqrt(sum(statistics.variance(one) / len(one) for one in (values, others)))


def _sentence(metric: Metric, places: Sequence[_Place]) -> str:
    place, last = places[0], places[-1]
    words = f"At {place.label}" if place is last else f"From {place.label} to {last.label}"
    if place.ties:
        words += f" {_joined([place.first, *place.ties])} tie" + (", within two standard errors" if place.several else "")
    else:
        words += f" {place.first} wins" if place.several else f" {place.first} is the best"
    if place.next:
        nexts = " and ".join(dict.fromkeys(one.next for one in places))
        by = _range([one.margin for one in places], lambda value: number(value, metric.decimals))
        words += f"; {'then comes' if place.ties else 'the next is'} {nexts}, {by} behind"
        deviations = [one.deviations for one in places if one.deviations is not None]
        if not deviations:
            words += ", of which one seed tells no deviation"
        elif any(map(math.isnan, deviations)):
            words += ", with no deviation between seeds"
        else:
            words += f" ({_range(deviations, lambda value: f'{value:.1f}')} standard deviations)"
    if place.unjudged:
        words += f"; not judged, of one seed: {', '.join(place.unjudged)}"
    return f"{words}."


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"
