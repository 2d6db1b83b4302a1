"""The script that compares the speed of two checkouts, on checkouts whose benchmark command is a stub."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "compare_checkouts.py"
STUB = """
import json, sys
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
assert options["config"] == "configs/x.py:alibi" and options["mode"] == "eval" and options["steps"] == "3"
{body}
json.dump({{"runs": [{{"encoding": "alibi", "median_s": {seconds}}}]}}, open(options["output"], "w"))
"""


@pytest.fixture
def checkouts(tmp_path) -> list[str]:
    """Two checkouts; the new one takes half the time of the old one."""
    for name, seconds in (("old", 2.0), ("new", 1.0)):
        (tmp_path / name / "seqpe_jax").mkdir(parents=True)
        (tmp_path / name / "seqpe_jax" / "__init__.py").touch()  # a package goes before one on PYTHONPATH
        (tmp_path / name / "seqpe_jax" / "benchmark.py").write_text(STUB.format(body="", seconds=seconds))
    return [str(tmp_path / "old"), str(tmp_path / "new")]


def compared(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments, "--config=configs/x.py:alibi", "--mode=eval", "--steps=3"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_ratios_are_new_over_old(checkouts, tmp_path):
    done = compared(*checkouts, "--turns=3", f"--output={tmp_path / 'speed.json'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alibi: new takes 0.500 of old's time (quartiles 0.500 .. 0.500, 3 turns)\n"
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["turns"] == 3 and result["encodings"]["alibi"]["ratios"] == [0.5] * 3
    assert result["encodings"]["alibi"]["old_s"] == [2.0] * 3


@pytest.mark.slow
def test_what_cannot_be_compared_is_said_in_a_line(checkouts, tmp_path):
    gone = compared(checkouts[0], str(tmp_path / "none"))
    assert (
        gone.returncode == 2
        and gone.stderr == f"error: {tmp_path / 'none'} is no checkout: it has no folder seqpe_jax\n"
    )
    (tmp_path / "new" / "seqpe_jax" / "benchmark.py").write_text("import sys; sys.exit('error: no such config')")
    failed = compared(*checkouts)
    assert failed.returncode == 1 and "benchmark failed in" in failed.stderr and "no such config" in failed.stderr
