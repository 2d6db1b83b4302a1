"""Several processes train as one does: same losses, shared checkpoints, one end for all."""

import json
import os
import pathlib
import shutil
import signal
import socket
import time
from collections import Counter

import pytest

from seqpe_jax.data.tokenizers import ByteTokenizer
from seqpe_jax.data.tokens import token_source
from seqpe_jax.training.checkpoint import TMP_SUFFIX
from tests.commands import Commands, Result, Running, free_port, hosts, train_arguments
from tests.run_files import lines, newest
from tests.tiny_text import write_mixture

pytestmark = pytest.mark.slow

CHEAP = {"config": "tests/tiny_text.py:alibi", "steps": 64, "checkpoint__every": 8, "report__every": 8}
# An evaluation after half of the steps that lasts far longer than JAX needs to agree on a stop, some seconds.
EVALUATED = {"eval__every": 32, "eval__lengths": (16,), "eval__batch_tokens": 16, "eval__tokens": 480_000}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(1000)))
    return path


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Commands whose processes hold rows of a batch that are not consecutive."""
    running = Commands(tmp_path_factory.mktemp("cache"), before="tests.interleaved_mesh")
    yield running
    running.close()


@pytest.fixture(scope="module")
def begin(commands, text):
    """Returns a function that starts the processes of a run; `each` has overrides for some of them."""

    def start(
        workdir, count, devices, *, data=text, present=None, each=None, variables=None, timeout=300, **fields
    ) -> list[Running]:
        port, running = free_port(), []
        for process in present or range(count):
            own = fields | (each or {}).get(process, {})
            arguments = train_arguments(workdir, data, **own)
            if count > 1:
                arguments += [*hosts(port, count, process), f"--start-timeout={timeout}"]
            flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
            flags.append(f"--xla_force_host_platform_device_count={devices}")
            given = {"XLA_FLAGS": " ".join(flags)} | (variables or {}).get(process, {})
            running.append(commands.start("train", *arguments, **given))
        return running

    return start


def finish(commands: Commands, running: list[Running]) -> list[Result]:
    return [commands.wait(one) for one in running]


def interrupt(commands, running, workdir, who: int, number: int) -> tuple[list[Result], float]:
    """Sends a signal to one process after its next checkpoint; returns what all left, and the seconds until then."""
    before, deadline = newest(workdir), time.monotonic() + 900
    while newest(workdir) == before:
        assert time.monotonic() < deadline, [one.err for one in running]
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(running[who].process, number)
    return finish(commands, running), time.monotonic() - began


def said(result: Result) -> list[str]:
    """Returns what a process said of its own: not the logs of libraries, which name their source line."""
    own = ("error", "process", "preempted", "failed", "Traceback")
    return [line for line in result.err.splitlines() if line.startswith(own)]


def close(found: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        losses = {name: value for name, value in other.items() if "loss" in name or "term" in name}
        assert losses and {name: one[name] for name in losses} == pytest.approx(losses, abs=1e-5)


def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(commands, begin, text, tmp_path):
    """Of a mixture, several documents in a window. The two read one source prepared, each its own; the one that resumes tokenizes it."""
    fields = {
        "data": None,
        "steps": 4,
        "checkpoint__every": 2,
        "checkpoint__keep": 2,
        "eval__every": 2,
        "eval__lengths": (32,),
        "encoding__layers": 1,
        "objective__shift__rate": 0.5,
        "objective__distillation__weight": 0.0,  # the contrastive loss is spread over devices in the same way
        "mesh__fsdp": 4,  # so that both processes write arrays
    }
    two, one, resumed = tmp_path / "two", tmp_path / "one", tmp_path / "resumed"
    tokens = tmp_path / "tokens"
    mixture, prepared = write_mixture(tmp_path, text), write_mixture(tmp_path, text, "prepared", prepared=str(tokens))
    source = {"name": "text", "paths": tmp_path / "few.jsonl", "tokenizer": "bytes_eos"}
    options = [f"--config.data.{name}={value}" for name, value in source.items()]
    options += ["--config=tests/tiny_text.py", "--shard-bytes=5000", "--processes=1", f"--output={tokens}"]
    made = commands("prepare", *options)
    assert made.code == 0 and f"train with --config.data.prepared={tokens}" in made.out, made.err
    log = logging_reads(tmp_path / "reads")
    results = finish(commands, begin(two, 2, 4, variables=log, config=prepared, **fields))
    assert [result.code for result in results] == [0, 0], results
    assert "2 process(es), 8 device(s)" in results[0].out and "batch 8: 2 x 4 devices, 1 each" in results[0].out
    assert "workdir" not in results[1].out and "step 4/4" not in results[1].err, "only the main process prints"
    assert "step 4/4" in results[0].err

    [alone] = finish(commands, begin(one, 1, 8, config=mixture, **fields))
    assert alone.code == 0 and "batch 8: 1 x 8 devices, 1 each" in alone.out, alone.err
    close(lines(two), lines(one))
    assert any("source/few/loss@32" in line for line in lines(two))
    assert len((two / "starts.jsonl").read_text().splitlines()) == 1
    for step in (2, 4):
        reads = reads_of(tmp_path / "reads", files_of(two, step))
        own = [{one["process"] for one in reads if f"process_{number}/" in one["file"]} for number in range(2)]
        assert len(own[0]) == len(own[1]) == 1 and own[0] != own[1], "each reads what it wrote"

    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    [alone] = finish(commands, begin(resumed, 1, 8, config=mixture, **fields))
    assert alone.code == 0 and "resuming at step 2" in alone.out, alone.err
    close(lines(resumed), lines(one))


def logging_reads(log: pathlib.Path) -> dict[int, dict[str, str]]:
    """Variables with which two processes note what they read for checksums (tests/interleaved_mesh.py)."""
    return {process: {"READS": str(log)} for process in range(2)}


def files_of(workdir: pathlib.Path, step: int) -> list[str]:
    """The files of a checkpoint."""
    folder = workdir / "checkpoints" / str(step)
    return [f"{folder}/{file}" for file in json.loads((folder / "digests.json").read_text())["files"]]


def reads_of(log: pathlib.Path, files: list[str]) -> list[dict]:
    """The reads of a checkpoint's files for their checksums; each file was read once."""
    reads = [json.loads(line.replace(TMP_SUFFIX, "")) for line in log.read_text().splitlines()]
    reads = [one for one in reads if one["file"] in files]
    assert sorted(one["file"] for one in reads) == sorted(files)
    return reads


def test_a_stopped_process_and_a_sleeping_loader_are_named_in_time(commands, begin, tmp_path):
    workdir = tmp_path / "run"
    fields = CHEAP | {"steps": 10**5, "report__watchdog": 5.0}
    running = begin(workdir, 2, 1, **fields)
    deadline = time.monotonic() + 900
    while not newest(workdir):
        assert time.monotonic() < deadline, [one.err for one in running]
        time.sleep(0.01)
    os.kill(running[1].process, signal.SIGSTOP)
    began, main = time.monotonic(), commands.wait(running[0])
    assert main.code == 75 and time.monotonic() - began < 60, main.err
    host, stopped_at = socket.gethostname(), newest(workdir)
    [line] = [line for line in main.err.splitlines() if line.startswith("no progress for")]
    assert f"process 1 (on {host}) does not answer: stopped, or its machine" in line
    assert line.endswith(f"the same command resumes from step {stopped_at}")
    assert "run_steps" in (workdir / "stacks" / "process_0.txt").read_text()
    os.kill(running[1].process, signal.SIGCONT)
    assert commands.wait(running[1]).code in (75, 1, -signal.SIGABRT)

    results = finish(commands, begin(workdir, 2, 1, variables={1: {"SLEEPS": "24"}}, **fields))
    assert [result.code for result in results] == [75, 75], results
    slow = lines(workdir)[-1]
    assert (
        slow["hosts/slowest_process"] == 1 and slow["hosts/slowest_seconds"] > 0.02 > slow["hosts/median_seconds"] / 2
    )
    [line] = [line for line in results[0].err.splitlines() if line.startswith("no progress for")]
    assert (
        f"process 1 (on {host}) waits for a batch of data since" in line and "1 other(s) wait for the devices" in line
    )
    assert "sleeping" in (workdir / "stacks" / "process_1.txt").read_text()
    assert len((workdir / "starts.jsonl").read_text().splitlines()) == 2 and 0 < lines(workdir)[-1]["train/goodput"] < 1


def test_a_killed_process_ends_the_others_and_a_stop_of_one_stops_all(commands, begin, tmp_path):
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("".join(f"{number} plus {number} is {2 * number}\n" for number in range(40_000)))
    workdir, fields = tmp_path / "run", CHEAP | EVALUATED | {"data__paths": str(numbers)}
    results, seconds = interrupt(commands, begin(workdir, 2, 1, **fields), workdir, 1, signal.SIGKILL)
    assert results[1].code == -signal.SIGKILL and results[0].code == 1 and seconds < 60
    [line] = said(results[0])
    assert line.startswith(f"process 1 (on {socket.gethostname()}) was killed")
    killed_at = newest(workdir)

    results, seconds = interrupt(commands, begin(workdir, 2, 1, **fields), workdir, 0, signal.SIGKILL)
    assert f"resuming at step {killed_at}" in results[0].out
    # JAX's own service may end the second process in the same instant, by an abort; its last word is there anyhow.
    assert results[0].code == -signal.SIGKILL and results[1].code in (1, -signal.SIGABRT) and seconds < 60
    assert [line[:41] for line in said(results[1])] == ["process 1: process 0, the coordinator (at"]

    saved = files_of(workdir, newest(workdir))
    running, deadline = (
        begin(workdir, 2, 1, variables=logging_reads(tmp_path / "reads"), **fields),
        time.monotonic() + 900,
    )
    while lines(workdir)[-1]["step"] != 32:  # it evaluates
        assert time.monotonic() < deadline, [one.err for one in running]
        time.sleep(0.01)
    shares = Counter()
    for one in reads_of(tmp_path / "reads", saved):
        shares[one["process"]] += one["bytes"]
    assert len(shares) == 2 and min(shares.values()) > 0.4 * shares.total(), "before the start, each its part"
    time.sleep(0.1)
    os.kill(running[1].process, signal.SIGINT)
    results = finish(commands, running)
    assert [result.code for result in results] == [75, 75], results
    assert said(results[0]) == ["preempted at step 32: saved; the same command resumes from there"]
    assert not said(results[1]) and not any("eval/loss@16" in line for line in lines(workdir)), "it waited for the end"
    results = finish(commands, begin(workdir, 2, 1, **fields | {"eval__tokens": 64}))
    assert [result.code for result in results] == [0, 0], results
    assert [line["step"] for line in lines(workdir) if "eval/loss@16" in line] == [32, 64]

    found, port = tmp_path / "found.json", free_port()
    given = [f"--checkpoint={workdir}", "--lengths=16", "--contexts=8,16", "--tokens=70", f"--output={found}"]
    two = finish(commands, [commands.start("evaluate", *given, *hosts(port, 2, process)) for process in range(2)])
    assert [result.code for result in two] == [0, 0], two[0].err
    assert "length 16: 70 tokens, loss" in two[0].out and "context 8: " in two[0].out and "length" not in two[1].out
    losses = [result["loss"] for result in json.loads(found.read_text())["results"]]
    assert commands("evaluate", *given).code == 0
    assert [result["loss"] for result in json.loads(found.read_text())["results"]] == pytest.approx(losses, abs=1e-5)


def test_processes_that_do_not_fit_end_with_one_line(commands, begin, tmp_path):
    results = finish(commands, begin(tmp_path / "a", 2, 1, each={1: {"optimizer__clip": 0.5}}, **CHEAP))
    assert [result.code for result in results] == [2, 2] and said(results[1]) == []
    [line] = said(results[0])
    assert line.startswith("error: the processes of this run differ in config.optimizer.clip: ")
    assert "0.5 (process 1)" in line

    results = finish(commands, begin(tmp_path / "b", 2, 1, **CHEAP | {"batch_size": 7}))
    assert [result.code for result in results] == [2, 2] and said(results[1]) == []
    [line] = said(results[0])
    assert line.startswith("error: microbatch size 7 (batch_size=7 ") and not (tmp_path / "b").exists()

    # Each alone would train; only the second cannot keep its data.
    (tmp_path / "file").write_text("")
    results = finish(
        commands, begin(tmp_path / "c", 2, 1, variables={1: {"SEQPE_JAX_CACHE": str(tmp_path / "file")}}, **CHEAP)
    )
    assert [result.code for result in results] == [2, 2] and said(results[1]) == []
    [line] = said(results[0])
    assert line.startswith(f"process 1 (on {socket.gethostname()}): error: cannot write to the cache")

    # Under one path, with one size and time, the two hosts have other texts.
    caches = {process: {"SEQPE_JAX_CACHE": str(tmp_path / f"cache{process}")} for process in range(2)}
    own, fields = tmp_path / "own.txt", {"split": "train", "tokenizer": ByteTokenizer(), "progress": False}
    own.write_text("line 0 of a text\n" * 200)
    written = own.stat().st_mtime_ns
    token_source("text_files", paths=(str(own),), cache_dir=caches[0]["SEQPE_JAX_CACHE"], **fields)
    own.write_text("line 1 of a text\n" * 200)
    os.utime(own, ns=(written, written))
    results = finish(commands, begin(tmp_path / "e", 2, 1, variables=caches, **CHEAP | {"data__paths": own}))
    assert [result.code for result in results] == [2, 2] and said(results[1]) == [], results
    [line] = said(results[0])
    assert line.startswith("error: the processes of this run differ in train split of text_files: 3,077 tokens (finger")
    assert f"(process 0 on {socket.gethostname()}), 3,077 tokens (fingerprint" in line and not (tmp_path / "e").exists()

    [main] = finish(commands, begin(tmp_path / "d", 2, 1, present=[0], timeout=1, **CHEAP))
    assert main.code == 1 and main.err.startswith("process 1 of 2 did not come within 1 s (came: 0 on "), main.err
