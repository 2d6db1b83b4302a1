"""The command `sweep`: it resumes after a kill and repeats nothing, on a disk and in a bucket; bad input is refused."""

import json
import os
import pathlib
import shlex
import signal
import time

import pytest

from seqpe_jax import files
from tests.commands import with_defaults
from tests.training.test_commands import refused

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"line {number:4d} of text\n" for number in range(300)))
    return path


def sweep_file(folder: pathlib.Path, text: pathlib.Path, axes: str) -> pathlib.Path:
    """A sweep of alibi on the tiny config, unless the axes say something else."""
    path = folder / "sweep.py"
    path.write_text(
        "from seqpe_jax.sweeps import product\n"
        "CONFIG = 'tests/tiny_text.py:alibi'\n"
        f"COMMON = {{'data.paths': ({str(text)!r},), 'steps': 4, 'eval.lengths': (16,)}}\n"
        "def runs():\n"
        f"    for trial in product({axes}):\n"
        "        yield '-'.join(map(str, trial.values())), COMMON | trial\n"
    )
    return path


def commands_in_log(run: pathlib.Path) -> list[str]:
    return [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("== 20")]


def lines_of(run: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("|")]


def test_a_killed_sweep_resumes_decides_and_is_reported(commands, text, tmp_path):
    """Two tuning runs decide a field of a third; with the results file another folder needs no run at all."""
    workdir, path, results = tmp_path / "sweep", tmp_path / "sweep.py", f"--results={tmp_path / 'results.json'}"
    common = {"data.paths": (str(text),), "steps": 4, "eval.lengths": (16, 32), "eval.every": 4}
    path.write_text(
        "from seqpe_jax.sweeps import tune_then_repeat\nCONFIG = 'tests/tiny_text.py:alibi'\n"
        f"def runs():\n    return tune_then_repeat({{'alibi': {common!r}}}, {{'optimizer.learning_rate': (1e-4, 1e-2)}}, "
        "minimise='eval/loss@16', tuning_overrides={'seed': 0}, seeds=(1,))\n"
    )
    arguments = [f"--sweep={path}", f"--workdir={workdir}"]
    first, second = tuning = [f"alibi-learning_rate={rate}" for rate in ("0.0001", "0.01")]
    before = commands("sweep", *arguments, "--status")
    assert before.code == 0 and f"alibi-1: step 0 of 4; waits for {', '.join(tuning)}" in before.out
    words = (f"'alibi-1' depends on {', '.join(tuning)}", "add them to --only")
    refused(commands("sweep", *arguments, "--only=alibi-1"), *words)
    assert not workdir.exists()
    printed = commands("sweep", *arguments, "--executor=print")
    assert [shlex.split(line)[2] for line in printed.out.splitlines()] == ["seqpe_jax.train"] * 2
    assert f"alibi-1 waits for {first} (not finished), {second} (not finished) to decide" in printed.err

    running, deadline = commands.start("sweep", *arguments, results), time.monotonic() + 300
    while not (workdir / second / "log.txt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(running.process, signal.SIGKILL)
    assert commands.wait(running).code == -signal.SIGKILL
    done = {file: file.stat().st_mtime_ns for file in (workdir / first).glob("*.json*")}

    result = commands("sweep", *arguments, "--jobs=2", results)
    assert result.code == 0 and "3 runs" in result.out and "2 at a time" in result.out, result.out + result.err
    assert {file: file.stat().st_mtime_ns for file in done} == done and len(commands_in_log(workdir / first)) == 1
    last = {
        name: [line["eval/loss@16"] for line in lines_of(workdir / name) if "eval/loss@16" in line] for name in tuning
    }
    best = min(last, key=last.get)
    chosen = f"optimizer.learning_rate={best.partition('=')[2]} ({best} has the best eval/loss@16, {last[best][0]:.4g})"
    assert f"alibi-1: {chosen}" in result.out and "3 of 3 runs finished" in result.out
    config = json.loads((workdir / "alibi-1" / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == float(best.partition("=")[2])
    for name in (*tuning, "alibi-1"):
        assert [line["step"] for line in lines_of(workdir / name) if "train/loss" in line] == [1, 2, 3, 4]
        assert (workdir / name / "evaluation.json").exists() == (name == "alibi-1")
    files_before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*") if file.is_file()}
    again = commands("sweep", *arguments)
    assert again.code == 0 and "0 to do" in again.out
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*") if file.is_file()} == files_before
    assert f"alibi-1: finished; {chosen}" in commands("sweep", *arguments, "--status").out
    report = commands("report", f"--workdir={workdir}", f"--output={tmp_path / 'report'}")
    value = json.loads((workdir / "alibi-1" / "evaluation.json").read_text())["results"][0]["bits_per_byte"]
    assert report.code == 0 and table_of(report.out)[2].startswith(f"| alibi | {value:.3f} |"), report.out + report.err
    assert "Choice of optimizer.learning_rate" in (tmp_path / "report" / "report.html").read_text()

    other = tmp_path / "other"
    restored = commands("sweep", f"--sweep={path}", f"--workdir={other}", results)
    assert restored.code == 0 and "0 to do" in restored.out and f"alibi-1: {chosen}" in restored.out, restored.err
    assert "3 of them from" in restored.out and not (other / "alibi-1" / "checkpoints").exists()
    same = commands("report", f"--workdir={other}", f"--output={tmp_path / 'same'}")
    assert same.code == 0 and table_of(same.out) == table_of(report.out) and len(table_of(same.out)) == 3


@pytest.mark.parametrize("one", ["store", pytest.param("s3_store", marks=pytest.mark.long)], ids=["gs", "s3"])
def test_a_sweep_in_a_bucket_is_resumed_by_another_machine(commands, one, text, tmp_path, request):
    """This machine holds the logs of runs at work alone; a failed run is executed again on request."""
    store = request.getfixturevalue(one)
    later, bucket = tmp_path / "later.txt", files.as_path(f"{store.folder}/sweep")
    path = sweep_file(tmp_path, later, "{'variant': ('alibi',)}")

    def swept(machine: str, *arguments: str):
        variables = store.environment | {"SEQPE_JAX_CACHE": str(tmp_path / machine)}
        return commands.wait(commands.start("sweep", f"--sweep={path}", f"--workdir={bucket}", *arguments, **variables))

    failed = swept("one")
    assert failed.code == 1 and f"(complete output: {bucket}/alibi/log.txt)" in failed.out, failed.out + failed.err
    assert "alibi: failed: train, exit code 2: error: data.paths" in swept("another", "--status=true").out
    later.write_bytes(text.read_bytes())
    unchanged = swept("another")
    assert unchanged.code == 1 and "1 failed before, 0 to do" in unchanged.out and "--retry-failed" in unchanged.err
    result = swept("another", "--retry-failed=true")
    assert result.code == 0 and "1 of 1 runs finished" in result.out, result.out + result.err
    again = swept("third")
    assert again.code == 0 and "0 to do" in again.out
    assert [line["step"] for line in lines_of(bucket / "alibi") if "train/loss" in line] == [1, 2, 3, 4]
    assert json.loads((bucket / "alibi" / "evaluation.json").read_text())["step"] == 4
    assert len(commands_in_log(bucket / "alibi")) == 3
    assert not [path for at in (tmp_path, ROOT) for path in at.glob("??:*")]
    output = f"--output={tmp_path / 'r'}"
    report = commands.wait(commands.start("report", f"--workdir={bucket}", output, **store.environment))
    assert report.code == 0 and "| alibi |" in report.out, report.err
    refused(swept("third", "--executor=optuna"), "does not allow", "--executor=local or print")


def test_printed_commands_are_those_of_all_runs(commands, tmp_path):
    sweep = "--sweep=configs/sweeps/extrapolation.py"
    printed = commands("sweep", sweep, f"--workdir={tmp_path / 'a b'}", "--executor=print")
    lines = [shlex.split(line) for line in printed.out.splitlines()]
    assert printed.code == 0 and len(lines) == 48 and not (tmp_path / "a b").exists()
    assert {words[2] for words in lines} == {"seqpe_jax.train", "seqpe_jax.evaluate"}
    assert all(pathlib.Path(words[0]).exists() and f"{tmp_path}/a b/" in words[-1] for words in lines)


def test_bad_options_are_refused_before_anything_runs(commands, text, tmp_path):
    path = sweep_file(tmp_path, text, "{'variant': ('alibi', 'rotary')}")
    (tmp_path / "wrong").mkdir()
    wrong = sweep_file(tmp_path / "wrong", text, "{'variant': ('alibi', 'rotory')}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear reader")
    search = "--sweep=configs/sweeps/search.py"
    for options, words in (
        (["--sweep=configs/sweeps/none.py"], ["no sweep file at configs/sweeps/none.py"]),
        (["--executor=slurn"], ["executor", "slurn"]),
        (["--jobs=0"], ["jobs"]),
        (["--results=results.json", "--executor=print"], ["--results is for runs that are executed"]),
        (["--results=README.md"], ["--results=README.md holds no results of a sweep"]),
        (["--only=alibi,rotory"], ["'rotory'", "'rotary'"]),
        (["--slurm=partition=x"], ["--executor=slurm"]),
        (["--executor=optuna"], ["defines no SEARCH"]),
        (["--executor=optuna", search, "--only=a"], ["--only"]),
        (["--executor=optuna", search, "--status"], ["--status"]),
        ([search], ["no runs()", "--executor=optuna"]),
        ([f"--sweep={wrong}"], ["run 'rotory'", "'rotary'"]),
        ([f"--workdir={tmp_path / 'full'}"], ["holds other things"]),
    ):
        refused(commands("sweep", *with_defaults(options, sweep=path, workdir=tmp_path / "x")), *words)
    assert not (tmp_path / "x").exists() and len(list((tmp_path / "full").iterdir())) == 1
