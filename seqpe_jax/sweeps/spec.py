"""Sweep files: named overrides of a base config, read and checked before a run starts."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from seqpe_jax import config
from seqpe_jax.axes import size_label
from seqpe_jax.config import Config
from seqpe_jax.config.io import call_user_code, execute_file, resolve_config_path
from seqpe_jax.errors import InputError, format_value, suggest
from seqpe_jax.metric_registry import with_average
from seqpe_jax.models.build import check_encoding
from seqpe_jax.tasks import task_class
from seqpe_jax.trees import flatten_dict, unflatten_dict

Overrides = dict[str, Any]
CONFIG_KEYS = ("config", "variant")  # keys of overrides that are not config fields
MAX_RUNS = 10_000  # of one file
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=,+-]{0,99}")  # also the name of the run's folder


@dataclasses.dataclass(frozen=True)
class BestOf:
    """Override whose value is that of the same field in the best of other runs, known once these have ended.

    With a `count` above 1 it combines what the best runs change: the value is that of the best of them that differs from
    run `base`, or that of `base` if none does. Two runs that each add a part to `base` so become one with both parts.

    Attributes:
      runs: names of the runs that are compared; those with open fields are yielded before this one.
      minimise: validation metric in metrics.jsonl at a run's last step, e.g. "eval/loss@64"; lower is better.
      maximise: likewise, higher is better. Exactly one of the two is given.
      count: number of the best runs whose changes are combined.
      base: run without these changes; needed with a count above 1.
    """

    runs: tuple[str, ...]
    minimise: str = ""
    maximise: str = ""
    count: int = 1
    base: str = ""

    @property
    def metric(self) -> str:
        """Name of the metric that is compared."""
        return self.minimise or self.maximise


@dataclasses.dataclass(frozen=True)
class FolderOf:
    """Override of `init_from`: the folder of another run of the sweep, which is trained and evaluated before.

    Attributes:
      run: name of that run, which is yielded before this one.
    """

    run: str

    @property
    def runs(self) -> tuple[str, ...]:
        """The run, as `BestOf.runs` names those that a field waits for."""
        return (self.run,)


OPEN = (BestOf, FolderOf)  # values of fields that other runs decide


@dataclasses.dataclass(frozen=True)
class Trial:
    """Name and config of one run of a sweep.

    Attributes:
      name: name of the run and of its folder.
      config: `FILE.py[:variant]`.
      overrides: values by dotted field.
      settings: the complete config; an open field has one of its possible values.
      best: open fields, with the runs that decide each.
    """

    name: str
    config: str
    overrides: Overrides
    settings: Config
    best: Mapping[str, BestOf | FolderOf] = dataclasses.field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Options of `train` that produce this config."""
        return [
            f"--config={self.config}",
            *(f"--config.{field}={_option_value(value)}" for field, value in self.overrides.items()),
        ]


@dataclasses.dataclass(frozen=True)
class Range:
    """Interval of a search.

    Attributes:
      low: smallest value.
      high: largest value; integers are drawn where both ends are integers.
      log: draw on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Search:
    """Hyperparameter search that a sweep file defines as SEARCH.

    Attributes:
      ranges: field -> `Range`, or a tuple of choices.
      overrides: overrides of every trial.
      minimise: validation metric in metrics.jsonl, e.g. "eval/loss@64"; lower is better.
      maximise: likewise, higher is better. Exactly one of the two is given.
      trials: number of runs in total.
    """

    ranges: Mapping[str, Range | tuple]
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    minimise: str = ""
    maximise: str = ""
    trials: int = 20

    @property
    def metric(self) -> str:
        """Name of the metric that is optimised."""
        return self.minimise or self.maximise


@dataclasses.dataclass(frozen=True)
class SweepFile:
    """Content of a sweep file.

    Attributes:
      path: path of the file.
      config: base config file.
      trials: runs that its `runs()` yields, checked.
      search: its SEARCH, or None.
    """

    path: str
    config: str
    trials: tuple[Trial, ...]
    search: Search | None


def product(*parts: Mapping[str, Iterable[Any]] | Iterable[Overrides]) -> list[Overrides]:
    """Returns every combination of the parts, the last one changing fastest.

    Args:
      parts: field -> its values, all combinations of which are taken; or a list of overrides, such as `zipped` returns.

    Raises:
      InputError: a field occurs twice, or its values are no list.
    """
    sets: list[list[Overrides]] = []
    for part in parts:
        if isinstance(part, Mapping):
            sets += [[{field: value} for value in _values(field, values)] for field, values in part.items()]
        else:
            sets.append([dict(overrides) for overrides in part])
    combinations = []
    for combination in itertools.product(*sets):
        fields = [field for overrides in combination for field in overrides]
        twice = next((field for field in fields if fields.count(field) > 1), None)
        if twice is not None:
            raise InputError(f"product: '{twice}' is in two of the parts: leave it in one")
        combinations.append({field: value for overrides in combination for field, value in overrides.items()})
    return combinations


def zipped(part: Mapping[str, Iterable[Any]]) -> list[Overrides]:
    """Returns the first values of all fields, then the second ones, and so on.

    Args:
      part: field -> its values, equally many for all fields.

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


def tune_then_repeat(
    variants: Mapping[str, Overrides],
    grid: Mapping[str, Iterable[Any]],
    *,
    tuning_overrides: Overrides,
    seeds: Iterable[int],
    minimise: str = "",
    maximise: str = "",
    same_as: Mapping[str, str] | None = None,
    extra_values: Mapping[str, Iterable[Any]] | None = None,
    constants: Mapping[str, Mapping[str, Iterable[Any]]] | None = None,
) -> Iterator[tuple[str, Overrides]]:
    """Yields the runs of a study that compares variants, each at its own best value of a field such as the learning rate.

    First come the tuning runs, one for each variant and value, VARIANT-FIELD=VALUE[,CONSTANT=VALUE]; then for each seed
    a run VARIANT-SEED of every variant, at the values of its best tuning run (`BestOf`).

    Args:
      variants: overrides by name.
      grid: one field and the values that the tuning runs take.
      tuning_overrides: overrides of the tuning runs alone, such as their seed and evaluation interval.
      seeds: seeds of the final runs.
      minimise: metric that decides, lower is better; or `maximise`.
      maximise: metric that decides, higher is better.
      same_as: variants without tuning runs, with the variant whose best values they take.
      extra_values: more values for some variants, such as those whose best value is at an end of the grid.
      constants: one more field and its values for some variants, combined with the grid, such as a distance that another
        paper chose for its own context length.

    Raises:
      InputError: the grid is not one field with values, or a name is not that of a variant with tuning runs.
    """
    same_as, extra_values, constants = dict(same_as or {}), dict(extra_values or {}), dict(constants or {})
    if len(grid) != 1:
        raise InputError(f"tune_then_repeat: grid needs one field, got {', '.join(grid) or 'none'}")
    [(field, values)] = grid.items()
    tuned = [name for name in variants if name not in same_as]
    for keyword, names in (("extra_values", extra_values), ("constants", constants)):
        for name in names:
            if name not in tuned:
                raise InputError(f"tune_then_repeat: {keyword} of '{name}', which is no variant with tuning runs")
    for name, other in same_as.items():
        if name not in variants or other not in tuned:
            raise InputError(
                f"tune_then_repeat: '{name}' cannot be the same as '{other}', which must be a variant with tuning runs"
            )
    tuning: dict[str, list[tuple[str, Overrides]]] = {}
    for name in tuned:
        constant = constants.get(name, {})
        if name in constants and len(constant) != 1:
            raise InputError(
                f"tune_then_repeat: constants of '{name}' needs one field, got {', '.join(constant) or 'none'}"
            )
        choices = [*_values(field, values), *_values(field, extra_values.get(name, ()))]
        tuning[name] = [(_tuning_run(name, chosen), chosen) for chosen in product({field: choices}, constant)]
        if not tuning[name]:
            raise InputError(f"tune_then_repeat: '{name}' has no values to try")
    for name, runs in tuning.items():
        for run, chosen in runs:
            yield run, {**variants[name], **tuning_overrides, **chosen}
    for seed in seeds:
        for name, overrides in variants.items():
            runs = tuning[same_as.get(name, name)]
            best = BestOf(tuple(run for run, _ in runs), minimise, maximise)
            yield f"{name}-{seed}", {**overrides, "seed": seed, **dict.fromkeys(runs[0][1], best)}


def choose_parts_then_repeat(
    variants: Mapping[str, Overrides],
    parts: Mapping[str, Mapping[str, Overrides]],
    grid: Mapping[str, Iterable[Any]],
    *,
    trials: int,
    tuning_overrides: Overrides,
    seeds: Mapping[str, Iterable[int]],
    minimise: str = "",
    maximise: str = "",
    constants: Mapping[str, Iterable[Overrides]] | None = None,
) -> Iterator[tuple[str, Overrides]]:
    """Yields the runs of a study that offers each variant the parts that it can take, within the same number of trials.

    The trials of a variant, each of which starts from the best one so far:

    1. without a part, and with each part alone, at the first value of the grid: VARIANT-plain, VARIANT-PART;
    2. the best two parts together: VARIANT-two;
    3. the second and the third value of the grid: VARIANT-FIELD=VALUE;
    4. its constants: VARIANT-constant1, ...;
    5. further values of the grid, until all trials are spent.

    Then for each seed a run VARIANT-SEED, with everything as in the best trial.

    Args:
      variants: overrides by name, without any part.
      parts: for each variant the overrides of each of its parts; several parts of a variant set different fields.
      grid: one field and its values, the most promising ones first.
      trials: number of trials of each variant.
      tuning_overrides: overrides of the trials alone, such as their seed and evaluation interval.
      seeds: seeds of the final runs of each variant.
      minimise: metric that decides, lower is better; or `maximise`.
      maximise: metric that decides, higher is better.
      constants: for some variants, alternatives that set the same fields, such as lengths that other papers chose.

    Raises:
      InputError: the grid is not one field, or has too few values for the trials of a variant.
    """
    if len(grid) != 1:
        raise InputError(f"choose_parts_then_repeat: grid needs one field, got {', '.join(grid) or 'none'}")
    [(field, values)] = grid.items()
    values = _values(field, values)
    finals: dict[str, Overrides] = {}
    for name, overrides in variants.items():
        common = {**overrides, **tuning_overrides, field: values[0]}
        own_parts, own_constants = parts.get(name, {}), list((constants or {}).get(name, ()))
        plain = f"{name}-plain"
        runs = [plain]
        yield plain, common
        for part, changed in own_parts.items():
            runs.append(f"{name}-{part}")
            yield runs[-1], {**common, **changed}
        changing = [each for changed in own_parts.values() for each in changed]
        if len(own_parts) > 1:
            best_two = BestOf(tuple(runs[1:]), minimise, maximise, count=2, base=plain)
            runs.append(f"{name}-two")
            yield runs[-1], {**common, **dict.fromkeys(changing, best_two)}
        rounds: list[list[tuple[str, Overrides]]] = [
            [_grid_run(name, field, value) for value in values[1:3]],
            [(f"{name}-constant{number}", changed) for number, changed in enumerate(own_constants, 1)],
            [_grid_run(name, field, value) for value in values[3:]],
        ]
        changing += [field]
        for one in rounds:
            best = BestOf(tuple(runs), minimise, maximise)
            for run, changed in one[: trials - len(runs)]:
                runs.append(run)
                yield run, {**common, **dict.fromkeys(changing, best), **changed}
            changing += [each for _, changed in one for each in changed if each not in changing]
        if len(runs) != trials:
            raise InputError(
                f"choose_parts_then_repeat: '{name}' has {len(runs)} trials instead of {trials}: give {field} more values"
            )
        best = BestOf(tuple(runs), minimise, maximise)
        finals[name] = {**overrides, **dict.fromkeys(dict.fromkeys(changing), best)}
    for seed in dict.fromkeys(seed for own in seeds.values() for seed in own):
        for name, overrides in finals.items():
            if seed in seeds[name]:
                yield f"{name}-{seed}", {**overrides, "seed": seed}


def fair_study(
    groups: Iterable[tuple[Iterable[str], Iterable[int]]],
    variants: Mapping[str, Overrides],
    parts: Mapping[str, Overrides],
    takes: Mapping[str, Iterable[str]],
    grid: Mapping[str, Iterable[Any]],
    *,
    own_parts: Mapping[str, Mapping[str, Overrides]] | None = None,
    constants: Mapping[str, Iterable[Overrides]] | None = None,
    **options: Any,
) -> Iterator[tuple[str, Overrides]]:
    """Yields the runs of `choose_parts_then_repeat` for groups of variants, one group after another.

    Args:
      groups: names of variants, and the seeds of their final runs.
      variants: overrides by name, without any part.
      parts: overrides of each part.
      takes: names of the parts that each variant can take.
      grid: one field and its values.
      own_parts: for some variants, parts that have other overrides there.
      constants: overrides of a variant's last trials.
      **options: the other arguments of `choose_parts_then_repeat`, but its seeds.

    Raises:
      InputError: see `choose_parts_then_repeat`.
    """
    own_parts, constants = own_parts or {}, constants or {}
    for names, seeds in groups:
        names = list(names)
        offered = {name: {**parts, **own_parts.get(name, {})} for name in names}
        yield from choose_parts_then_repeat(
            {name: variants[name] for name in names},
            {name: {part: offered[name][part] for part in takes[name]} for name in names},
            grid,
            seeds=dict.fromkeys(names, tuple(seeds)),
            constants={name: constants[name] for name in names if name in constants},
            **options,
        )


def _grid_run(variant: str, field: str, value: Any) -> tuple[str, Overrides]:
    return _tuning_run(variant, {field: value}), {field: value}


def _tuning_run(variant: str, chosen: Overrides) -> str:
    """Name of a tuning run."""
    values = {
        field.rpartition(".")[2]: f"{value:g}" if isinstance(value, float) else str(value)
        for field, value in chosen.items()
    }
    return f"{variant}-" + ",".join(f"{field}={value}" for field, value in values.items())


def read_sweep_file(path: str) -> SweepFile:
    """Reads a sweep file and checks all its trials.

    Args:
      path: Python file that defines CONFIG, and `runs()` or SEARCH.

    Raises:
      InputError: no such file, a file that does not run or lacks a part, a trial whose name or config is wrong.
    """
    module = execute_file(resolve_config_path(path), "sweep file defines CONFIG and runs() (see configs/sweeps)")
    base, runs, search = (getattr(module, name, None) for name in ("CONFIG", "runs", "SEARCH"))
    if not isinstance(base, str) or (runs is None and search is None):
        raise InputError(f"{path} must define CONFIG = 'configs/NAME.py', and a generator runs() or a SEARCH")
    trials = call_user_code(path, lambda: _checked_trials(base, runs() if runs is not None else ()))
    if runs is not None and not trials:
        raise InputError(f"{path}: runs() yields nothing: yield (name, overrides) for each run")
    if search is not None:
        call_user_code(path, lambda: _check_search(search, base))
    return SweepFile(path, base, trials, search)


def _checked_trials(base: str, runs: Iterable[tuple[str, Overrides]]) -> tuple[Trial, ...]:
    """Returns the trials of `runs()`. Raises: InputError: one of them is wrong."""
    overrides_of: dict[str, Mapping[str, Any]] = {}
    names: set[str] = set()
    for run in runs:
        if len(overrides_of) == MAX_RUNS:
            raise InputError(
                f"runs() yields more than {MAX_RUNS:,} runs: does it end? Split a larger study into several files"
            )
        if not (isinstance(run, tuple) and len(run) == 2 and isinstance(run[1], Mapping)):
            raise InputError(f"runs() must yield (name, overrides), got {format_value(run)}")
        name, overrides = run
        if not isinstance(name, str) or not RUN_NAME.fullmatch(name):
            raise InputError(f"'{name}' cannot name a run: letters, digits and _.=,+- only, at most 100 (of a folder)")
        if name.casefold() in names:
            raise InputError(f"two runs are named '{name}': give each run a name of its own")
        overrides_of[name] = overrides
        names.add(name.casefold())
    is_open = {
        name: any(isinstance(value, OPEN) for value in overrides.values()) for name, overrides in overrides_of.items()
    }
    closed = {name: make_trial(name, base, own) for name, own in overrides_of.items() if not is_open[name]}
    for name, trial in closed.items():
        try:
            config.check_overrides_used(trial.settings, trial.overrides)
        except InputError as error:
            raise InputError(f"run '{name}': {error}") from error
    possible = _Possible(closed)
    for name, own in overrides_of.items():
        if is_open[name]:
            possible.add(_open_trial(name, base, own, possible))
    return tuple(possible.trials[name] for name in overrides_of)


class _Possible:
    """The trials that others may depend on, and the values that their open fields can get.

    Attributes:
      trials: trials by name.
      checked: for the fixed fields of a trial and the names of its overrides, the pairs of open fields that were found
        valid; other seeds of a variant have the same.
    """

    def __init__(self, trials: Mapping[str, Trial]):
        self.trials = dict(trials)
        self.checked: dict[str, set[tuple[str, str]]] = {}
        self._leaves: dict[str, Overrides] = {}
        self._values: dict[str, list[Overrides]] = {}  # of the open fields of a trial, jointly

    def add(self, trial: Trial) -> None:
        """Adds a trial with open fields."""
        self.trials[trial.name] = trial
        self._values[trial.name] = self.values(trial.best)

    def values(self, best: Mapping[str, BestOf | FolderOf]) -> list[Overrides]:
        """Returns every set of values that open fields can get.

        Args:
          best: the open fields, with the runs that decide each.
        """
        sets: list[list[Overrides]] = []
        for one in dict.fromkeys(best.values()):
            fields = [field for field, other in best.items() if other == one]
            if isinstance(one, FolderOf):
                sets.append([dict.fromkeys(fields, one.run)])  # the folder of the sweep is not known here
                continue
            own = [values for run in one.runs for values in self._of_run(run, fields)]
            if one.count > 1:
                plain = self._of_run(one.base, fields)[0]
                ordered = itertools.permutations(own, one.count)
                own = [{field: _changed(field, plain, chosen) for field in fields} for chosen in ordered]
            sets.append(list({repr(values): values for values in own}.values()))
        return [{field: value for one in chosen for field, value in one.items()} for chosen in itertools.product(*sets)]

    def _of_run(self, run: str, fields: Sequence[str]) -> list[Overrides]:
        """Returns the sets of values that fields of a run can have."""
        if run not in self._leaves:
            self._leaves[run] = flatten_dict(config.to_dict(self.trials[run].settings), ".")
        leaves = self._leaves[run]
        return [
            {field: decided.get(field, leaves[field]) for field in fields} for decided in self._values.get(run, [{}])
        ]


def _changed(field: str, plain: Overrides, runs: Iterable[Overrides]) -> Any:
    """Returns the first value of a field that differs from the plain one, or the plain one."""
    return next((values[field] for values in runs if values[field] != plain[field]), plain[field])


def _open_trial(name: str, base: str, overrides: Mapping[str, Any], possible: _Possible) -> Trial:
    """Returns a trial with open fields, checked with all pairs of values that they can get.

    Args:
      name: name of the run.
      base: config file of the sweep.
      overrides: its overrides, with a `BestOf` or `FolderOf` for each open field.
      possible: the trials that may decide it.
    """
    best = {field: value for field, value in overrides.items() if isinstance(value, OPEN)}
    fixed = {field: value for field, value in overrides.items() if field not in best}
    for field, one in best.items():
        if field not in config.field_names():
            raise InputError(f"run '{name}': {config.unknown_field_message(field)}")
        try:
            if isinstance(one, FolderOf):
                _check_folder(field, one, possible.trials)
            else:
                _check_best(one, possible.trials)
        except InputError as error:
            raise InputError(f"run '{name}': {field}: {error}") from error
    choices = possible.values(best)
    trial = make_trial(name, base, fixed | choices[0])
    leaves = flatten_dict(config.to_dict(trial.settings), ".")
    own = {field: value for field, value in trial.overrides.items() if field not in best}
    # Fields contradict each other two at a time: each pair of values is checked once, not each combination of all.
    fixed_leaves = {field: value for field, value in leaves.items() if field not in best and field != "seed"}
    checked = possible.checked.setdefault(repr((sorted(own), fixed_leaves)), set())
    for values in choices:
        pairs = set(itertools.combinations_with_replacement(map(repr, values.items()), 2))
        if pairs <= checked:
            continue
        checked |= pairs
        try:
            settings = config.from_dict(unflatten_dict(leaves | values, "."))
            config.check_overrides_used(settings, own)
        except InputError as error:
            shown = ", ".join(f"{field} can become {value}" for field, value in values.items())
            raise InputError(f"run '{name}', where {shown}: {error}") from error
    return dataclasses.replace(trial, overrides=own, best=best)


def value_of(settings: Config, field: str) -> Any:
    """Returns the value of a dotted field."""
    return flatten_dict(config.to_dict(settings), ".")[field]


def _check_folder(field: str, folder: FolderOf, trials: Mapping[str, Trial]) -> None:
    """Checks that a run can begin with the parameters of another. Raises: InputError."""
    if field != "init_from":
        raise InputError("FolderOf is the value of init_from alone")
    if folder.run not in trials:
        raise InputError(
            f"it waits for run '{folder.run}', which this sweep does not have, or yields only later."
            f"{suggest(str(folder.run), trials)}"
        )


def _check_best(best: BestOf, trials: Mapping[str, Trial]) -> None:
    """Checks that other runs can decide a field. Raises: InputError."""
    if not isinstance(best.runs, Sequence) or isinstance(best.runs, str) or not best.runs:
        raise InputError(f"BestOf needs the names of the runs that decide, got {best.runs!r}")
    if bool(best.minimise) == bool(best.maximise):
        raise InputError("BestOf needs one metric, either minimise='eval/NAME@LENGTH' or maximise=...")
    if not 1 <= best.count <= len(best.runs) or (best.count > 1) != bool(best.base):
        raise InputError(
            f"BestOf combines 1 to {len(best.runs)} of its runs, with the run `base` if more than 1, got "
            f"count={best.count}, base={best.base!r}"
        )
    for run in (*best.runs, *filter(None, [best.base])):
        if run not in trials:
            raise InputError(
                f"it waits for run '{run}', which this sweep does not have, or yields only later.{suggest(str(run), trials)}"
            )
        settings = trials[run].settings
        check_metric(best.metric, settings)
        if settings.steps % settings.eval.every:
            raise InputError(
                f"run '{run}' does not evaluate at its last step: make steps={settings.steps} a multiple of "
                f"eval.every={settings.eval.every}"
            )


def make_trial(name: str, base: str, overrides: Mapping[str, Any]) -> Trial:
    """Reads and checks the config of a run without open fields.

    Args:
      name: name of the run.
      base: config file of the sweep.
      overrides: values by dotted field; "config" and "variant" replace the base config.

    Raises:
      InputError: no such config, variant or field, or values that do not fit; names the run.
    """
    values = dict(overrides)
    path = values.pop("config", base)
    if "variant" in values:
        path = f"{path.partition(':')[0]}:{values.pop('variant')}"
    for field in values:
        if field not in config.field_names():
            raise InputError(f"run '{name}': {config.unknown_field_message(field, also=CONFIG_KEYS)}")
    try:
        settings = config.load(path, values)
        check_encoding(settings)
        return Trial(name, path, values, settings)
    except InputError as error:
        raise InputError(f"run '{name}': {error}") from error


def _check_search(search: Any, base: str) -> None:
    if not isinstance(search, Search):
        raise InputError(f"SEARCH must be a seqpe_jax.sweeps.Search, got {type(search).__name__}")
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
            trial = make_trial(f"SEARCH with {field}={value}", base, {**search.overrides, field: value})
            check_metric(search.metric, trial.settings)


def check_metric(metric: str, settings: Config) -> None:
    """Checks that a run measures a metric while it trains.

    Args:
      metric: e.g. "eval/loss@64".
      settings: config of the run.

    Raises:
      InputError: it does not.
    """
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
    measured = with_average(task_class(settings).training_metrics(settings), settings.optimizer.ema)
    if name not in measured:
        raise InputError(f"'{metric}' is not measured while training.{suggest(name, measured)}")


def _option_value(value: Any) -> str:
    """Returns a value in the form of a command-line option."""
    if isinstance(value, (tuple, list)):
        return "(" + "".join(f"{item!r}," for item in value) + ")"
    return str(value).lower() if isinstance(value, bool) else str(value)
