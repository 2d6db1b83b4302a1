"""Whatever is given to a command, it works or says in one line what is wrong: no traceback, no hang, no flood of memory.

MUTATIONS=2000 draws that many command lines and files, in place of the few of every day.
"""

import collections
import concurrent.futures
import os
import pathlib
import queue
import shutil

import hypothesis
import pytest

from tests.commands import Commands
from tests.mutations import Case, cases, device, write_inputs
from tests.without_compiling import FOLDER, STOPPED

EXAMPLES = int(os.environ.get("MUTATIONS", "60"))
SECONDS = float(os.environ.get("MUTATION_SECONDS", "60"))  # of one command; far more than any of them needs
BYTES = 2 << 30  # likewise
# What commands say that come to their end without a compiled model.
WORKED = {"report": "the whole report", "convert": "written: ", "sweep": "python -m seqpe_jax"}


def drawn(place: pathlib.Path, count: int) -> list[Case]:
    """So many different cases, the same ones every time."""
    found: dict[str, Case] = {}

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases(place))
    def draw(case: Case) -> None:
        hypothesis.assume(case.key not in found)
        found[case.key] = case

    draw()
    return list(found.values())


def outcome(commands: Commands, folder: pathlib.Path, case: Case) -> tuple[str, str]:
    """Runs a case in its folder; returns what became of it, and what is wrong with that, or ""."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    result = commands.wait(commands.start(*case.words, **{FOLDER: str(folder), "HOME": str(folder)}), SECONDS)
    told, said = "accepted" if result.code == 0 else "refused", result.err.strip()
    last = said.rpartition("\n")[2]
    if result.code < 0:
        return told, f"ended by signal {-result.code}"
    if result.peak > BYTES:
        return told, f"took {result.peak / 2**20:,.0f} MiB"
    if "Traceback" in said + result.out:
        return told, f"traceback: {last}"
    if result.code == 0:
        done = STOPPED in result.out or WORKED.get(case.words[0], STOPPED) in result.out
        return told, "" if done else f"did nothing: {said}"
    if result.code != 2 or not last.startswith("error: ") or len(last) < 20:
        return told, f"exit code {result.code}: {said}"
    return told, ""


@pytest.mark.slow
def test_mutated_commands_and_files(tmp_path):
    place = tmp_path / "place"
    write_inputs(place)
    counts, wrong = collections.Counter(), []
    idle: queue.Queue[Commands] = queue.Queue()
    for number in range(2):
        idle.put(Commands(tmp_path / f"cache{number}", before="tests.without_compiling"))

    def run(numbered: tuple[int, Case]) -> None:
        number, case = numbered
        folder, commands = tmp_path / f"case{number}", idle.get()
        try:
            shutil.copytree(place, folder, symlinks=True)
            device(folder / "zero")
            told, why = outcome(commands, folder, case)
        finally:
            idle.put(commands)
            shutil.rmtree(folder, ignore_errors=True)
        counts[told] += 1
        if why:
            wrong.append(f"{case}: {why}")

    try:
        with concurrent.futures.ThreadPoolExecutor(idle.qsize()) as pool:
            list(pool.map(run, enumerate(drawn(place, EXAMPLES))))
    finally:
        while not idle.empty():
            idle.get().close()
    print(f"{counts['refused']} refused, {counts['accepted']} accepted, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
    # Neither all nor nothing is accepted; checksums find nearly every changed file.
    assert min(counts.values()) >= EXAMPLES // 30
