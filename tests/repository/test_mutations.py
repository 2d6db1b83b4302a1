"""Any command line and any file gives a result or one line that names the fault: no traceback, no hang, no memory flood.

MUTATIONS=2000 draws that many command lines in place of the few of every day, and FUZZ=20000 that many settings, configs and
files, which are read in this process; MUTATION_SEED=N repeats a draw. launch/fuzz.sh does so for hours, with other seeds.
FUZZ_RESULTS=FILE adds how many of each kind there were, and what they found, to a JSON file.
"""

import collections
import copy
import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import time
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save_file

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.files import atomic_write
from seqpe_jax.models.build import DataSpec, ModelSpec
from tests.commands import Commands
from tests.mutations import (
    COMMANDS,
    VALUES,
    Case,
    cases,
    damaged,
    device,
    foreign_cases,
    foreign_weights,
    read_foreign,
    read_weights,
    right_settings,
    weight_cases,
    write_inputs,
    write_readable,
)
from tests.tiny import tiny_config
from tests.without_compiling import FOLDER, STOPPED

EXAMPLES = int(os.environ.get("MUTATIONS", "24"))
ROOT = pathlib.Path(__file__).parents[2]
SEED = int(os.environ.get("MUTATION_SEED", random.SystemRandom().randrange(2**32)))
SECONDS = float(os.environ.get("MUTATION_SECONDS", "60"))  # of one command; far more than any of them needs
BYTES = 2 << 30  # likewise
FUZZ = int(os.environ.get("FUZZ", "60"))
MANY = 500  # of them
READ_SECONDS, READ_BYTES = 30.0, 1 << 30  # CPU time and memory of one read in this process
RESULTS = pathlib.Path(os.environ["FUZZ_RESULTS"]).absolute() if os.environ.get("FUZZ_RESULTS") else None
MAX_MESSAGE = 10_000  # characters; commands cut what is longer than a fifth of that
# Output of commands that come to their end without a compiled model.
FINISHED = {"report": "the whole report", "convert": "written: ", "sweep": "python -m seqpe_jax"}


def drawn_cases(folder: pathlib.Path) -> list[Case]:
    """Returns a command that works, and `EXAMPLES` different cases that follow from `SEED`."""
    works = Case(next(iter(COMMANDS)), {})
    found = {works.key: works}

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases(folder))
    def draw(case: Case) -> None:
        hypothesis.assume(case.key not in found)
        found[case.key] = case

    draw()
    return list(found.values())


def run_case(commands: Commands, folder: pathlib.Path, case: Case) -> tuple[bool, str]:
    """Returns (whether the command accepted its input, the fault of its answer or "")."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    result = commands.wait(commands.start(*case.words, **{FOLDER: str(folder), "HOME": str(folder)}), SECONDS)
    accepted, errors = result.code == 0, result.err.strip()
    last = errors.rpartition("\n")[2]
    if result.code < 0:
        return accepted, f"ended by signal {-result.code}"
    if result.peak > BYTES:
        return accepted, f"took {result.peak / 2**20:,.0f} MiB"
    if "Traceback" in errors + result.out:
        return accepted, f"traceback: {last}"
    if accepted:
        done = STOPPED in result.out or FINISHED.get(case.words[0], STOPPED) in result.out
        return accepted, "" if done else f"did nothing: {errors}"
    if result.code != 2 or not last.startswith("error: ") or len(last) < 20:
        return accepted, f"exit code {result.code}: {errors}"
    return accepted, ""


def run_anew(commands: Commands, inputs: pathlib.Path, folder: pathlib.Path, case: Case) -> bool:
    """Returns whether a case fails in a folder of its own."""
    shutil.copytree(inputs, folder, symlinks=True)
    device(folder / "zero")
    try:
        return bool(run_case(commands, folder, case)[1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def smallest(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Returns a case of which no change can be left out without its fault."""
    while (smaller := next(filter(fails, case.smaller()), None)) is not None:
        case = smaller
    return case


def test_the_smallest_case_has_the_changes_that_matter():
    base = ("train", "--a=1", "--b=2")
    case = Case(("train", "--a=9", "--b=8", "--c=3"), {"one": b"1", "two": b"2"}, base)
    assert smallest(case, lambda one: "--b=8" in one.words and "two" in one.files) == Case(
        ("train", "--b=8"), {"two": b"2"}, base
    )
    assert smallest(case, lambda one: "two" in one.files) == Case(base, {"two": b"2"}, base)


def draw_settings(count: int) -> Callable:
    """Decorator of a test of Hypothesis with the seed of this run, which looks for the smallest input that fails."""
    fixed = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=True,
    )
    return lambda test: hypothesis.seed(SEED)(fixed(test))


def accepts_or_refuses(read: Callable[[], object]) -> bool:
    """Returns whether input is accepted; it may be refused in one line, and neither fail nor take long or much memory."""
    cpu, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
        accepted = True
    except InputError as error:
        accepted, message = False, str(error)
        assert "\n" not in message and 10 < len(message) < MAX_MESSAGE, message[:MAX_MESSAGE]
    assert time.process_time() - cpu < READ_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < READ_BYTES
    return accepted


def keep(kind: str, counts: collections.Counter[bool], faults: int) -> None:
    """Adds the counts of some inputs to the results file, if there is one; counts: by whether they were accepted."""
    if not RESULTS:
        return
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    before = stored.get(kind, {})
    new = {"rounds": 1, "inputs": counts.total(), "refused": counts[False], "accepted": counts[True], "faults": faults}
    stored[kind] = {name: before.get(name, 0) + count for name, count in new.items()}
    atomic_write(RESULTS, json.dumps(stored, indent=1) + "\n")


def fuzz(kind: str, strategy: st.SearchStrategy, read: Callable[[object], object]) -> None:
    """Reads what a strategy draws; of many, some must be accepted, and some not, that the draws are worth something."""
    counts: collections.Counter[bool] = collections.Counter()

    @draw_settings(FUZZ)
    @hypothesis.given(strategy)
    def check(case: object) -> None:
        counts[accepts_or_refuses(lambda: read(case))] += 1

    print(f"MUTATION_SEED={SEED} FUZZ={FUZZ}")
    try:
        check()
    except BaseException:
        keep(kind, counts, 1)
        raise
    keep(kind, counts, 0)
    print(f"{counts[False]} refused, {counts[True]} accepted")
    # A few draws may happen to be all of one sort.
    assert FUZZ < MANY or (counts[True] and counts[False]), f"MUTATION_SEED={SEED}: {counts}"


@pytest.mark.slow
def test_settings_of_other_programs(tmp_path):
    def read(case):
        kind, files = case
        for name, content in files.items():
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / name).write_bytes(content)
        read_foreign(kind, tmp_path / kind)

    for case in right_settings():
        read(case)
    fuzz("settings of other programs", foreign_cases(), read)


@pytest.mark.slow
def test_weights_of_other_programs(tmp_path):
    for kind, (settings, files) in foreign_weights().items():
        (tmp_path / kind).mkdir()
        for name, content in settings.items():
            (tmp_path / kind / name).write_bytes(content)
        for name, arrays in files.items():
            save_file(arrays, tmp_path / kind / name)
        read_weights(tmp_path / kind)  # the folder is right before it is changed

    def read(case):
        kind, files = case
        for name, arrays in files.items():
            save_file({array: np.ascontiguousarray(values) for array, values in arrays.items()}, tmp_path / kind / name)
        read_weights(tmp_path / kind)

    fuzz("weights of other programs", weight_cases(), read)


def stored_configs() -> dict[str, dict]:
    """Returns configs of runs on each kind of data, and with each encoding on text or images, by name."""
    images = {"eval.sizes": (8,), "batch_size": 8}
    paths = {"digits_vit": images, "moving_digits_vit": {}, "algorithmic": {}, "stdlib_qa": {}}
    found = {name: config.to_dict(config.load(str(ROOT / f"configs/{name}.py"), own)) for name, own in paths.items()}
    found["text"] = config.to_dict(tiny_config())
    for kind, one in config.ENCODINGS.items():
        values = copy.deepcopy(found["digits_vit" if one.AXES == "2+" else "text"])
        values["encoding"] = {"kind": kind} | dataclasses.asdict(one())
        values["objective"] = config.to_dict(config.Config())["objective"]
        for loss in ("contrastive", "distillation"):
            values["objective"][loss]["weight"] = 0.0
        found[kind] = values
    return found


def test_stored_configs():
    """As a config.json of an older version, or one that was edited, may be; what is accepted is built, up to its shapes."""
    bases = stored_configs()

    def read_values(values):
        ModelSpec.of(config.from_dict(values), DataSpec(vocabulary=9, classes=9, channels=3))

    for values in bases.values():
        read_values(values)

    def read(case):
        name, changes = case
        values = copy.deepcopy(bases[name])
        for (section, field), value in copy.deepcopy(changes):
            if field and isinstance(values[section], dict):
                values[section][field] = value
            else:
                values[section] = value
        read_values(values)

    def changed(name):
        flat = [(section, field) for section, values in bases[name].items() for field in fields_of(values)]
        flat += 4 * [one for one in flat if one[0] in ("encoding", "model", "data")]  # which most arithmetic is about
        change = st.tuples(st.sampled_from(flat), numbers | VALUES)
        return st.tuples(st.just(name), st.lists(change, min_size=1, max_size=3))

    numbers = st.sampled_from((0, 1, 2, 3, 8, 64, 0.5, 1e-3, -1, 10**9, 10**20, True, "none", "seqpe", (1,), [2, 4]))
    fuzz("stored configs", st.sampled_from(tuple(bases)).flatmap(changed), read)


@pytest.mark.parametrize(
    "name, sizes, words", [("text", (0, 9, 3), "vocabulary=0"), ("digits_vit", (9, 9, 0), "channels=0")]
)
def test_sizes_of_the_data_that_leave_no_model_are_refused(name, sizes, words):
    with pytest.raises(InputError, match=words):
        ModelSpec.of(config.from_dict(stored_configs()[name]), DataSpec(*sizes))


def fields_of(values: object) -> tuple[str, ...]:
    """Returns the names of a section's fields, and "" for the section itself."""
    return ("", *values) if isinstance(values, dict) else ("",)


def test_damaged_files(tmp_path):
    readers = write_readable(tmp_path / "files")
    contents = {name: (tmp_path / "files" / name).read_bytes() for name in readers}
    for name, read_one in readers.items():
        assert accepts_or_refuses(lambda: read_one(tmp_path / "files" / name)), name  # noqa: B023

    def read(case):
        name, content = case
        (tmp_path / "files" / name).write_bytes(content)
        readers[name](tmp_path / "files" / name)

    one = st.sampled_from(tuple(readers)).flatmap(lambda name: st.tuples(st.just(name), damaged(name, contents[name])))
    fuzz("damaged files", one, read)


@pytest.mark.slow
def test_mutated_commands_and_files(tmp_path):
    print(f"MUTATION_SEED={SEED} MUTATIONS={EXAMPLES}")
    inputs = tmp_path / "inputs"
    write_inputs(inputs)
    counts, faults = collections.Counter(), []
    commands = Commands(tmp_path / "cache", before="tests.without_compiling")
    try:
        for number, case in enumerate(drawn_cases(inputs)):
            folder = tmp_path / f"case{number}"
            shutil.copytree(inputs, folder, symlinks=True)
            device(folder / "zero")
            accepted, fault = run_case(commands, folder, case)
            shutil.rmtree(folder, ignore_errors=True)
            counts[accepted] += 1
            if fault:
                faults.append(
                    f"{smallest(case, lambda one: run_anew(commands, inputs, tmp_path / 'again', one))}: {fault}"
                )
    finally:
        commands.close()
    keep("commands", counts, len(faults))
    print(f"{counts[False]} refused, {counts[True]} accepted, {len(faults)} faults")
    assert not faults, "\n".join([f"MUTATION_SEED={SEED} MUTATIONS={EXAMPLES} repeats this", *faults])
    assert counts[False] and counts[True], f"MUTATION_SEED={SEED}: {counts}"
