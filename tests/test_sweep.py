"""The command: a sweep that is killed goes on, finished work is not repeated, bad input is told before anything runs."""

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


def sweep_file(folder: pathlib.Path, text: pathlib.Path, axes: str, **fields) -> pathlib.Path:
    """A sweep of alibi and rotary on the tiny config, unless the axes say something else."""
    path = folder / "sweep.py"
    common = {"data.paths": (str(text),), "steps": 4, "eval.lengths": (16,)} | fields
    path.write_text(
        "from seqpe_jax.sweeps.spec import Search, Range, product\n"
        "CONFIG = 'tests/tiny_text.py:alibi'\n"
        f"COMMON = {common!r}\n"
        "def runs():\n"
        f"    for point in product({axes}):\n"
        "        yield '-'.join(map(str, point.values())), COMMON | point\n"
    )
    return path


def log(workdir: pathlib.Path, name: str) -> list[str]:
    return [line for line in (workdir / name / "log.txt").read_text().splitlines() if line.startswith("== 20")]


def until(what) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_sweep_goes_on_and_repeats_nothing(commands, text, tmp_path):
    workdir = tmp_path / "sweep"
    path = sweep_file(tmp_path, text, "{'variant': ('alibi', 'rotary'), 'seed': (0, 1)}")
    arguments = [f"--sweep={path}", f"--workdir={workdir}"]
    running = commands.start("sweep", *arguments)
    until(lambda: (workdir / "alibi-1" / "log.txt").exists())
    os.kill(running.process, signal.SIGKILL)
    assert commands.wait(running).code == -signal.SIGKILL
    done = {file: file.stat().st_mtime_ns for file in (workdir / "alibi-0").glob("*.json*")}
    assert len(done) == 6 and not (workdir / "rotary-0").exists()

    result = commands("sweep", *arguments, "--jobs=2")
    assert result.code == 0, result.out + result.err
    assert "4 runs" in result.out and "2 at a time" in result.out and "4 of 4 runs finished" in result.out
    assert {file: file.stat().st_mtime_ns for file in done} == done and len(log(workdir, "alibi-0")) == 2
    for name in ("alibi-0", "alibi-1", "rotary-0", "rotary-1"):
        lines = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
        assert json.loads((workdir / name / "evaluation.json").read_text())["step"] == 4
    assert len(log(workdir, "rotary-1")) == 2

    before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*") if file.is_file()}
    again = commands("sweep", *arguments)
    assert again.code == 0 and "0 to do" in again.out
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*") if file.is_file()} == before

    report = commands("report", f"--workdir={workdir}", f"--output={tmp_path / 'report'}")
    assert report.code == 0, report.err
    for kind in ("alibi", "rotary"):
        results = [json.loads((workdir / f"{kind}-{seed}" / "evaluation.json").read_text()) for seed in (0, 1)]
        mean = sum(result["results"][0]["bits_per_byte"] for result in results) / 2
        row = next(line for line in report.out.splitlines() if line.startswith(f"| {kind}"))
        assert f"{mean:.3f}" in row and "±" in row


def test_a_stopped_sweep_has_saved_and_a_failed_run_is_retried_alone(commands, text, tmp_path):
    workdir, missing = tmp_path / "sweep", tmp_path / "later.txt"
    path = sweep_file(tmp_path, text, "{'seed': (0, 1)}", steps=3000, **{"checkpoint.every": 10000})
    path.write_text(
        path.read_text()
        .replace("yield ", "point |= {'data.paths': (%r,)} if point['seed'] else {}; yield ")
        .replace("'-'.join(map(str, point.values()))", "'ab'[point['seed']]")
        % str(missing)
    )
    arguments = [f"--sweep={path}", f"--workdir={workdir}", "--jobs=2"]
    running = commands.start("sweep", *arguments)
    until(lambda: (workdir / "b" / "log.txt").exists() and "== failed" in (workdir / "b" / "log.txt").read_text())
    until(lambda: (workdir / "a" / "metrics.jsonl").exists() and (workdir / "a" / "metrics.jsonl").read_text())
    os.kill(running.process, signal.SIGTERM)
    stopped = commands.wait(running)
    assert stopped.code == 1 and "SIGTERM: 0 of 2 runs finished" in stopped.err, stopped.out + stopped.err
    assert "SIGTERM at step" in (workdir / "a" / "log.txt").read_text()
    assert list((workdir / "a" / "checkpoints").glob("[0-9]*"))

    refused_run = commands("sweep", *arguments, "--only=b")
    assert refused_run.code == 1 and "1 failed before, 0 to do" in refused_run.out
    assert "failed: b: train, exit code 2: error: data.paths" in refused_run.out and "--retry-failed" in refused_run.err
    missing.write_text("a line of text\n" * 200)
    before = (workdir / "a" / "log.txt").read_bytes()
    running = commands.start("sweep", *arguments, "--retry-failed")
    until(lambda: (workdir / "b" / "metrics.jsonl").exists() and (workdir / "b" / "metrics.jsonl").read_text())
    os.kill(running.process, signal.SIGTERM)
    assert commands.wait(running).code == 1 and (workdir / "a" / "log.txt").read_bytes() == before


def test_two_stages_are_one_command_and_one_report(commands, text, tmp_path):
    workdir, path = tmp_path / "sweep", tmp_path / "sweep.py"
    common = {"data.paths": (str(text),), "steps": 4, "eval.lengths": (16, 32), "eval.every": 4}
    path.write_text(
        "from seqpe_jax.sweeps.spec import two_stages\nCONFIG = 'tests/tiny_text.py:alibi'\n"
        f"def runs():\n    return two_stages({{'alibi': {common!r}}}, {{'optimizer.learning_rate': (1e-4, 1e-2)}}, "
        "minimise='eval/loss@16', trial={'seed': 0}, seeds=(1, 2))\n"
    )
    arguments = [f"--sweep={path}", f"--workdir={workdir}"]
    tried = [f"alibi-learning_rate={rate}" for rate in ("0.0001", "0.01")]
    before = commands("sweep", *arguments, "--status")
    assert before.code == 0 and f"alibi-1: step 0 of 4; waits for {', '.join(tried)}" in before.out
    refused(
        commands("sweep", *arguments, "--only=alibi-1"), f"'alibi-1' waits for {', '.join(tried)}", "name these too"
    )
    assert not workdir.exists()
    kept = f"--results={tmp_path / 'kept.json'}"
    result = commands("sweep", *arguments, "--jobs=2", kept)
    assert result.code == 0, result.out + result.err
    last = {}
    for name in tried:
        lines = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
        [last[name]] = [line["eval/loss@16"] for line in lines if "eval/loss@16" in line]
    best = min(last, key=last.get)
    chosen = f"optimizer.learning_rate={best.partition('=')[2]} ({best} has the best eval/loss@16, {last[best]:.4g})"
    assert f"alibi-1, alibi-2: {chosen}" in result.out and "4 of 4 runs finished" in result.out
    for name in ("alibi-1", "alibi-2"):
        rate = json.loads((workdir / name / "config.json").read_text())["optimizer"]["learning_rate"]
        assert rate == float(best.partition("=")[2])
    assert not [name for name in tried if (workdir / name / "evaluation.json").exists()]
    assert f"alibi-2: finished; {chosen}" in commands("sweep", *arguments, "--status").out
    printed = commands("sweep", *arguments, "--executor=print")
    assert [shlex.split(line)[2] for line in printed.out.splitlines()].count("seqpe_jax.evaluate") == 2
    report = commands("report", f"--workdir={workdir}", f"--output={tmp_path / 'report'}")
    assert report.code == 0 and [line.split(" ")[1] for line in report.out.splitlines()[2:3]] == ["alibi"], report.err
    assert "How optimizer.learning_rate was chosen" in (tmp_path / "report" / "report.html").read_text()

    elsewhere = tmp_path / "elsewhere"
    again = commands("sweep", f"--sweep={path}", f"--workdir={elsewhere}", kept)
    assert again.code == 0 and "0 to do" in again.out and f"alibi-1, alibi-2: {chosen}" in again.out, (
        again.out + again.err
    )
    assert "4 of them from" in again.out and not (elsewhere / "alibi-1" / "checkpoints").exists()
    other = commands("report", f"--workdir={elsewhere}", f"--output={tmp_path / 'other'}")
    tables = [[line for line in told.out.splitlines() if line.startswith("|")] for told in (report, other)]
    assert other.code == 0 and tables[0] == tables[1] and len(tables[0]) == 3


def test_a_sweep_in_a_store_is_that_on_a_disk(commands, store, text, tmp_path):
    """Nothing of it is kept on this machine but the logs of what is at work: another machine goes on with it."""
    axes = "{'variant': ('alibi', 'rotary')}"
    path, disk, bucket = sweep_file(tmp_path, text, axes), tmp_path / "disk", files.as_path(f"{store.folder}/sweep")

    def swept(workdir, cache: str, *arguments: str):
        variables = store.environment | {"SEQPE_JAX_CACHE": str(tmp_path / cache)}
        return commands.wait(
            commands.start("sweep", f"--sweep={path}", f"--workdir={workdir}", *arguments, **variables)
        )

    assert swept(disk, "one", "--jobs=2").code == 0
    later = tmp_path / "later.txt"
    path.write_text(path.read_text().replace(str(text), str(later)))
    failed = swept(bucket, "one", "--only=alibi")
    assert failed.code == 1 and f"(all of it: {bucket}/alibi/log.txt)" in failed.out, failed.out + failed.err
    assert "alibi: failed: train, exit code 2: error: data.paths" in swept(bucket, "another", "--status=true").out
    later.write_bytes(text.read_bytes())
    for cache, arguments, words in (
        ("another", ["--retry-failed=true"], "1 of 2"),
        ("another", ["--jobs=2"], "2 of 2"),
    ):
        result = swept(bucket, cache, *arguments)
        assert words in result.out, result.out + result.err
    again = swept(bucket, "third", "--jobs=2")
    assert again.code == 0 and "0 to do" in again.out

    for name in ("alibi", "rotary"):
        found = []
        for workdir in (disk, bucket):
            lines = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
            evaluation = json.loads((workdir / name / "evaluation.json").read_text())
            found.append([evaluation["results"], [(line["step"], line["train/loss"]) for line in lines]])
        assert found[0] == found[1] and len(found[0][1]) == 4
        assert (bucket / name / "log.txt").read_text().count("== 20") == {"alibi": 3, "rotary": 2}[name]
    assert not list(tmp_path.glob("gs:*")) and not (ROOT / "gs:").exists()
    report = commands.wait(
        commands.start("report", f"--workdir={bucket}", f"--output={tmp_path / 'r'}", **store.environment)
    )
    assert report.code == 0 and "| alibi |" in report.out, report.err
    refused(swept(bucket, "third", "--executor=optuna"), "stores have not", "--executor=local or print")


def test_commands_of_a_second_stage_are_printed_when_it_is_decided(commands, text, tmp_path):
    path, own = tmp_path / "sweep.py", {"data.paths": (str(text),), "steps": 4, "eval.lengths": (16,), "eval.every": 4}
    path.write_text(
        "from seqpe_jax.sweeps.spec import two_stages\nCONFIG = 'tests/tiny_text.py:alibi'\n"
        f"def runs():\n    return two_stages({{'alibi': {own!r}}}, {{'batch_size': (8, 16)}}, maximise='eval/loss@16', "
        "trial={}, seeds=(1,))\n"
    )
    result = commands("sweep", f"--sweep={path}", f"--workdir={tmp_path / 'sweep'}", "--executor=print")
    assert [shlex.split(line)[2] for line in result.out.splitlines()] == ["seqpe_jax.train"] * 2
    [line] = [line for line in result.err.splitlines() if "alibi-1" in line]
    assert (
        "waits for alibi-batch_size=8 (not finished), alibi-batch_size=16 (not finished) to decide batch_size" in line
    )


def test_a_search_runs_its_trials_and_evaluates_the_best(commands, text, tmp_path):
    pytest.importorskip("optuna")
    workdir, path = tmp_path / "search", sweep_file(tmp_path, text, "{'seed': (0,)}", **{"eval.every": 2})
    ranges = "{'optimizer.learning_rate': Range(1e-4, 1e-2, log=True)}"
    path.write_text(path.read_text() + f"SEARCH = Search({ranges}, COMMON, minimise='eval/loss@16', trials=2)\n")
    result = commands("sweep", f"--sweep={path}", f"--workdir={workdir}", "--executor=optuna", "--jobs=2")
    assert result.code == 0, result.out + result.err
    names = [f"trial-{number:03d}" for number in range(2)]
    last = {}
    for name in names:
        lines = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
        last[name] = [line["eval/loss@16"] for line in lines if "eval/loss@16" in line][-1]
    best = min(last, key=last.get)
    assert f"best: {best}, eval/loss@16 {last[best]:.4g} with optimizer.learning_rate=" in result.out
    assert [name for name in names if (workdir / name / "evaluation.json").exists()] == [best]


def test_printed_commands_run_as_they_stand(commands, text, tmp_path):
    result = commands(
        "sweep", "--sweep=configs/sweeps/extrapolation.py", f"--workdir={tmp_path / 'x'}", "--executor=print"
    )
    lines = [shlex.split(line) for line in result.out.splitlines()]
    assert result.code == 0 and len(lines) == 48 and not (tmp_path / "x").exists()
    assert {words[2] for words in lines} == {"seqpe_jax.train", "seqpe_jax.evaluate"}
    path = sweep_file(tmp_path, text, "{'variant': ('alibi', 'rotary')}", steps=1)
    printed = commands("sweep", f"--sweep={path}", f"--workdir={tmp_path / 'a b'}", "--executor=print", "--only=rotary")
    for line in printed.out.splitlines():
        python, _, module, *words = shlex.split(line)
        assert pathlib.Path(python).exists()
        done = commands(module.removeprefix("seqpe_jax."), *words)
        assert done.code == 0, done.err
    assert json.loads((tmp_path / "a b" / "rotary" / "evaluation.json").read_text())["encoding"] == "rotary"


@pytest.mark.parametrize(
    "options,words",
    [
        (["--sweep=configs/sweeps/none.py"], ["no sweep file at configs/sweeps/none.py"]),
        (["--executor=slurn"], ["executor", "slurn"]),
        (["--jobs=0"], ["jobs"]),
        (["--results=kept.json", "--executor=print"], ["--results is for runs that are worked on"]),
        (["--results=README.md"], ["--results=README.md holds no results of a sweep"]),
        (["--only=alibi,rotory"], ["'rotory'", "'rotary'"]),
        (["--slurm=partition=x"], ["--executor=slurm"]),
        (["--executor=optuna"], ["defines no SEARCH"]),
        (["--executor=optuna", "--sweep=configs/sweeps/search.py", "--only=a"], ["--only"]),
        (["--executor=optuna", "--sweep=configs/sweeps/search.py", "--status"], ["--status"]),
        (["--sweep=configs/sweeps/search.py"], ["no runs()", "--executor=optuna"]),
    ],
)
def test_bad_options_are_refused(commands, text, tmp_path, options, words):
    path = sweep_file(tmp_path, text, "{'variant': ('alibi', 'rotary')}")
    refused(commands("sweep", *with_defaults(options, sweep=path, workdir=tmp_path / "x")), *words)
    assert not (tmp_path / "x").exists()


def test_a_wrong_point_is_refused_before_anything_runs(commands, text, tmp_path):
    path = sweep_file(tmp_path, text, "{'variant': ('alibi', 'rotory')}")
    refused(commands("sweep", f"--sweep={path}", f"--workdir={tmp_path / 'x'}"), "run 'rotory'", "'rotary'")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear reader")
    path = sweep_file(tmp_path, text, "{'variant': ('alibi', 'rotary')}")
    refused(commands("sweep", f"--sweep={path}", f"--workdir={tmp_path / 'full'}"), "holds other things")
    assert not (tmp_path / "x").exists() and len(list((tmp_path / "full").iterdir())) == 1
