"""Sweep files: named overrides over a config, read and checked before anything runs."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from seqpe_jax import config
from seqpe_jax.axes import size_label
from seqpe_jax.config import Config
from seqpe_jax.config.scripts import call_user_code, execute_file, resolve_config_path
from seqpe_jax.errors import InputError, suggest
from seqpe_jax.models.build import check_encoding
from seqpe_jax.tasks import task_class
from seqpe_jax.trees import flat, nested

Overrides = dict[str, Any]
CHOSEN = ("config", "variant")  # names beside the fields: another config file than the sweep's, a variant of it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=,+-]{0,99}")  # it becomes a folder


@dataclasses.dataclass(frozen=True)
class Best:
    """As an override: the value that this field has in the best of other runs, once they have ended.

    Attributes:
      runs: their names.
      minimise, maximise: one of them names a metric of validation in metrics.jsonl, e.g. "eval/loss@64"; what a run
        measured at its last step counts.
    """

    runs: tuple[str, ...]
    minimise: str = ""
    maximise: str = ""

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.minimise or self.maximise


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its folder; config: `FILE.py[:variant]`; overrides: values by dotted field.
      settings: the whole config; as long as fields are open, with a value that they may come to have.
      best: what decides the fields that are open.
    """

    name: str
    config: str
    overrides: Overrides
    settings: Config
    best: Mapping[str, Best] = dataclasses.field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The options of `train` that make this config."""
        return [
            f"--config={self.config}",
            *(f"--config.{field}={_word(value)}" for field, value in self.overrides.items()),
        ]


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, whole where both are; `log`: drawn on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Search:
    """What a sweep file may define as SEARCH: fields to choose, and by which metric.

    Attributes:
      ranges: field -> `Range`, or a tuple of choices; overrides: of every trial.
      minimise, maximise: one of them names a metric of validation in metrics.jsonl, e.g. "eval/loss@64".
      trials: how many runs in all.
    """

    ranges: Mapping[str, Range | tuple]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    minimise: str = ""
    maximise: str = ""
    trials: int = 20

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.minimise or self.maximise


@dataclasses.dataclass(frozen=True)
class SweepFile:
    """A sweep file that was read: `points` of its `runs()`, `search` as it defines it."""

    path: str
    config: str
    points: tuple[Point, ...]
    search: Search | None


def product(*parts: Mapping[str, Iterable[Any]] | Iterable[Overrides]) -> list[Overrides]:
    """Returns every combination of the parts, the last one changing fastest.

    Args:
      parts: field -> its values, which are combined with each other too; or overrides, such as `zipped` returns.

    Raises:
      InputError: a field occurs twice, or its values are no list.
    """
    sets: list[list[Overrides]] = []
    for part in parts:
        if isinstance(part, Mapping):
            sets += [[{field: value} for value in _values(field, values)] for field, values in part.items()]
        else:
            sets.append([dict(overrides) for overrides in part])
    found = []
    for chosen in itertools.product(*sets):
        fields = [field for overrides in chosen for field in overrides]
        twice = next((field for field in fields if fields.count(field) > 1), None)
        if twice is not None:
            raise InputError(f"product: '{twice}' is in two of the parts: leave it in one")
        found.append({field: value for overrides in chosen for field, value in overrides.items()})
    return found


def zipped(part: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """Returns the first values of all fields, then the second ones, and so on.

    Raises:
      InputError: fields have different numbers of values, or values are no list.
    """
    lists = {field: _values(field, values) for field, values in part.items()}
    if len({len(values) for values in lists.values()}) > 1:
        sizes = ", ".join(f"{field} {len(values)}" for field, values in lists.items())
        raise InputError(f"zipped: every field needs equally many values, got {sizes}")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _values(field: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"'{field}' needs a list of values, got {values!r}: write ({values!r},)")
    return list(values)


def two_stages(
    ways: Mapping[str, Overrides],
    tried: Mapping[str, Iterable[Any]],
    *,
    trial: Overrides,
    seeds: Iterable[int],
    minimise: str = "",
    maximise: str = "",
    like: Mapping[str, str] | None = None,
    further: Mapping[str, Iterable[Any]] | None = None,
    constants: Mapping[str, Mapping[str, Iterable[Any]]] | None = None,
) -> Iterator[tuple[str, Overrides]]:
    """Yields the runs of a study that compares each way at the value of a field that is its own best.

    First, of each way, a run WAY-FIELD=VALUE for each value, or WAY-FIELD=VALUE,CONSTANT=VALUE for each combination with
    the values of a constant that it has; then, of each seed, a run WAY-SEED of all ways, with the values that did best
    (see `Best`).

    Args:
      ways: overrides by name; tried: one field and its values.
      trial: overrides of the first stage alone, such as its seed and when it measures; seeds: of the second stage.
      minimise, maximise: one of them names the metric that decides.
      like: ways that are not tried themselves, and another one whose best value they take.
      further: more values for some ways, such as those whose best value is at an end of what all have tried.
      constants: of some ways one more field and its values, such as a length that another paper chose for its own windows.

    Raises:
      InputError: not one field, a way that is like none of the others, or further values or a constant for what is not
        tried.
    """
    like, further, constants = dict(like or {}), dict(further or {}), dict(constants or {})
    if len(tried) != 1:
        raise InputError(f"two_stages tries the values of one field, got {', '.join(tried) or 'none'}")
    [(field, given)] = tried.items()
    values = dict.fromkeys(ways, tuple(_values(field, given)))
    for way, more in further.items():
        if way not in ways or way in like:
            raise InputError(f"two_stages: further values of {field} for '{way}', which is no way that is tried itself")
        values[way] += tuple(_values(field, more))
    grids = {way: product({field: values[way]}) for way in ways}
    for way, constant in constants.items():
        if way not in ways or way in like:
            raise InputError(f"two_stages: a constant of '{way}', which is no way that is tried itself")
        if len(constant) != 1:
            raise InputError(f"two_stages tries one constant of '{way}', got {', '.join(constant) or 'none'}")
        grids[way] = product({field: values[way]}, constant)

    def trial_of(way: str, chosen: Overrides) -> str:
        shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in chosen.values())
        return f"{way}-" + ",".join(f"{name.rpartition('.')[2]}={one}" for name, one in zip(chosen, shown, strict=True))

    for way, other in like.items():
        if way not in ways or other not in ways or other in like:
            raise InputError(f"two_stages: '{way}' cannot be like '{other}', which must be a way that is tried itself")
    for way, overrides in ways.items():
        if way not in like:
            for chosen in grids[way]:
                yield trial_of(way, chosen), {**overrides, **trial, **chosen}
    for seed in seeds:
        for way, overrides in ways.items():
            tried_as = like.get(way, way)
            best = Best(tuple(trial_of(tried_as, chosen) for chosen in grids[tried_as]), minimise, maximise)
            yield f"{way}-{seed}", {**overrides, "seed": seed, **dict.fromkeys(grids[tried_as][0], best)}


def read(path: str) -> SweepFile:
    """Returns a sweep file with all its points checked.

    Raises:
      InputError: no such file, a file that does not run or lacks a part, a point whose name or config is wrong.
    """
    module = execute_file(resolve_config_path(path), "sweep file defines CONFIG and runs() (see configs/sweeps)")
    base, runs, search = (getattr(module, name, None) for name in ("CONFIG", "runs", "SEARCH"))
    if not isinstance(base, str) or (runs is None and search is None):
        raise InputError(f"{path} must define CONFIG = 'configs/NAME.py', and a generator runs() or a SEARCH")
    points = call_user_code(path, lambda: list(_points(path, base, runs() if runs is not None else ())))
    if runs is not None and not points:
        raise InputError(f"{path}: runs() yields nothing: yield (name, overrides) for each run")
    if search is not None:
        call_user_code(path, lambda: _check_search(search, base))
    return SweepFile(path, base, tuple(points), search)


def _points(path: str, base: str, runs: Iterable[tuple[str, Overrides]]) -> Iterator[Point]:
    given: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        if not (isinstance(run, tuple) and len(run) == 2 and isinstance(run[1], Mapping)):
            raise InputError(f"runs() must yield (name, overrides), got {run!r}")
        name, overrides = run
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(f"'{name}' cannot name a run: letters, digits and _.=,+- only, at most 100 (of a folder)")
        if name.casefold() in map(str.casefold, given):
            raise InputError(f"two runs are named '{name}': give each point a name of its own")
        given[name] = overrides
    best = {name: _open_fields(overrides) for name, overrides in given.items()}
    made = {name: make(name, base, overrides) for name, overrides in given.items() if not best[name]}
    for name, point in made.items():
        try:
            config.check_overrides_used(point.settings, point.overrides)
        except InputError as error:
            raise InputError(f"run '{name}': {error}") from error
    for name, overrides in given.items():
        yield made[name] if name in made else _open_point(name, base, overrides, best[name], made)


def _open_fields(overrides: Mapping[str, Any]) -> dict[str, Best]:
    return {field: value for field, value in overrides.items() if isinstance(value, Best)}


def _open_point(
    name: str, base: str, overrides: Mapping[str, Any], best: Mapping[str, Best], made: Mapping[str, Point]
) -> Point:
    """Returns a point whose fields other runs decide, checked with every value that they may come to have."""
    given = {field: value for field, value in overrides.items() if field not in best}
    values: dict[str, list[Any]] = {}
    for field, one in best.items():
        if field not in config.field_names():
            raise InputError(f"run '{name}': {config.unknown_field_message(field)}")
        try:
            _check_best(one, made)
        except InputError as error:
            raise InputError(f"run '{name}': {field}: {error}") from error
        values[field] = [value_of(made[run].settings, field) for run in one.runs]
    point = make(name, base, given | {field: found[0] for field, found in values.items()})
    leaves = flat(config.to_dict(point.settings), ".")
    for field, found in values.items():
        for value in found:
            try:
                config.from_dict(nested(leaves | {field: value}, "."))
            except InputError as error:
                raise InputError(f"run '{name}', where {field} may come to be {value}: {error}") from error
    return dataclasses.replace(
        point, overrides={field: value for field, value in point.overrides.items() if field not in best}, best=best
    )


def value_of(settings: Config, field: str) -> Any:
    """Returns the value of a dotted field."""
    return flat(config.to_dict(settings), ".")[field]


def _check_best(best: Best, made: Mapping[str, Point]) -> None:
    """Refuses what cannot decide a field. Raises: InputError."""
    if not isinstance(best.runs, Sequence) or isinstance(best.runs, str) or not best.runs:
        raise InputError(f"Best needs the names of the runs that decide, got {best.runs!r}")
    if bool(best.minimise) == bool(best.maximise):
        raise InputError("Best needs one metric, either minimise='eval/NAME@LENGTH' or maximise=...")
    for run in best.runs:
        if run not in made:
            raise InputError(
                f"it waits for run '{run}', which this sweep does not have, or which waits itself.{suggest(str(run), made)}"
            )
        settings = made[run].settings
        check_metric(best.metric, settings)
        if settings.steps % settings.eval.every:
            raise InputError(
                f"run '{run}' does not measure at its last step: make steps={settings.steps} a multiple of "
                f"eval.every={settings.eval.every}"
            )


def make(name: str, base: str, overrides: Mapping[str, Any]) -> Point:
    """Returns a point with its config read and checked.

    Raises:
      InputError: no such config, variant or field, or values that do not fit; names the point.
    """
    values = dict(overrides)
    path = values.pop("config", base)
    if "variant" in values:
        path = f"{path.partition(':')[0]}:{values.pop('variant')}"
    for field in values:
        if field not in config.field_names():
            raise InputError(f"run '{name}': {config.unknown_field_message(field, also=CHOSEN)}")
    try:
        settings = config.load(path, values)
        check_encoding(settings)
        return Point(name, path, values, settings)
    except InputError as error:
        raise InputError(f"run '{name}': {error}") from error


def _check_search(search: Any, base: str) -> None:
    if not isinstance(search, Search):
        raise InputError(f"SEARCH must be a seqpe_jax.sweeps.spec.Search, got {type(search).__name__}")
    if bool(search.minimise) == bool(search.maximise):
        raise InputError("SEARCH needs one metric, either minimise='eval/NAME@LENGTH' or maximise=...")
    if search.trials < 1 or not search.ranges:
        raise InputError("SEARCH needs ranges, and trials of at least 1")
    for field, values in search.ranges.items():
        if isinstance(values, Range):
            if not values.low < values.high or (values.log and values.low <= 0):
                raise InputError(f"SEARCH: the range of '{field}' must rise, and start above 0 if log, got {values}")
            values = (values.low, values.high)
        for value in _values(field, values):
            if not isinstance(value, (bool, int, float, str)):
                raise InputError(f"SEARCH: choices of '{field}' must be numbers, strings or booleans, got {value!r}")
            made = make(f"SEARCH with {field}={value}", base, {**search.overrides, field: value})
            check_metric(search.metric, made.settings)


def check_metric(metric: str, settings: Config) -> None:
    """Refuses a metric that such a run does not measure while it trains. Raises: InputError."""
    if not 0 < settings.eval.every <= settings.steps:
        raise InputError(
            f"{metric} decides, which is measured while training: set eval.every in the overrides of those runs, at most "
            f"steps={settings.steps}"
        )
    labels = [size_label(scale) for scale in settings.eval_sizes]
    name, label = metric.removeprefix("eval/").partition("@")[::2]
    if not re.fullmatch(r"eval/\w+@[\dx]+", metric) or label not in labels:
        known = ", ".join(f"eval/NAME@{label}" for label in labels)
        raise InputError(f"'{metric}' is not measured while training. Known: {known}")
    measured = task_class(settings).metrics(settings)
    if name not in measured:
        raise InputError(f"'{metric}' is not measured while training.{suggest(name, measured)}")


def _word(value: Any) -> str:
    """Returns a value as an option of the command line writes it."""
    if isinstance(value, (tuple, list)):
        return "(" + "".join(f"{item!r}," for item in value) + ")"
    return str(value).lower() if isinstance(value, bool) else str(value)
