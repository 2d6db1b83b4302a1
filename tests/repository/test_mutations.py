"""Any command line and any file gives a result or one line that names the fault: no traceback, no hang, no memory flood.

MUTATIONS=2000 draws that many command lines and files in place of the few of every day; MUTATION_SEED=N repeats a draw.
"""

import collections
import os
import pathlib
import random
import shutil

import hypothesis
import pytest

from tests.commands import Commands
from tests.mutations import COMMANDS, Case, cases, device, write_inputs
from tests.without_compiling import FOLDER, STOPPED

EXAMPLES = int(os.environ.get("MUTATIONS", "24"))
SEED = int(os.environ.get("MUTATION_SEED", random.SystemRandom().randrange(2**32)))
SECONDS = float(os.environ.get("MUTATION_SECONDS", "60"))  # of one command; far more than any of them needs
BYTES = 2 << 30  # likewise
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
                faults.append(f"{case}: {fault}")
    finally:
        commands.close()
    print(f"{counts[False]} refused, {counts[True]} accepted, {len(faults)} faults")
    assert not faults, "\n".join([f"MUTATION_SEED={SEED} MUTATIONS={EXAMPLES} repeats this", *faults])
    assert counts[False] and counts[True], f"MUTATION_SEED={SEED}: {counts}"
