"""Runs whose commands are scripts of milliseconds that leave what train and evaluate leave."""

import dataclasses
import pathlib
import sys

from seqpe_jax.sweeps.run import SweepRun
from seqpe_jax.sweeps.spec import Trial
from tests.tiny import tiny_config

TRAIN = """
import json, os, pathlib, signal, sys, time
folder, steps, wish = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
(folder / "config.json").write_text("{}")
print("trains on", len(os.sched_getaffinity(0)), "core(s), device", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
for step in range(1, steps + 1):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "eval/loss@16": float(wish) if wish[0].isdigit() else 0.1}) + "\\n")
    while (wish == "waits" or wish == "9.0" and step == 1) and not stop:
        time.sleep(0.01)
    if stop:
        print("SIGTERM: saved", flush=True)
        sys.exit(1)
    if wish == "fails":
        print("half of it\\nthe loss is nan", flush=True)
        sys.exit(1)
    if wish == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
(folder / "checkpoints" / str(steps)).mkdir(parents=True)
"""
EVALUATE = """
import json, pathlib, sys, time
time.sleep(0.01)
pathlib.Path(sys.argv[1], "evaluation.json").write_text(json.dumps({"step": int(sys.argv[2]), "results": []}))
"""


@dataclasses.dataclass(frozen=True)
class FakeRun(SweepRun):
    """`wish` is "well", "waits" (for SIGTERM), "fails", "dies", or the number that it measures (9.0 waits too)."""

    wish: str = "well"

    @property
    def train(self):
        return "train", [sys.executable, "-S", "-c", TRAIN, str(self.folder), str(self.steps), self.wish]

    @property
    def evaluate(self):
        return "evaluate", [sys.executable, "-S", "-c", EVALUATE, str(self.folder), str(self.steps)]


def run(workdir: pathlib.Path, name: str, wish: str = "well", steps: int = 3) -> FakeRun:
    """Returns a run of a sweep's folder."""
    return FakeRun(Trial(name, "tests/tiny_text.py", {}, tiny_config(steps=steps)), workdir / name, wish=wish)


def headers(one: SweepRun) -> list[str]:
    """Returns which commands the log says were begun."""
    lines = (one.folder / "log.txt").read_text().splitlines()
    begun = [lines[at + 1] for at, line in enumerate(lines) if line.startswith("== 20")]  # the scripts' first lines
    return ["train" if "signal" in line else "evaluate" for line in begun]
