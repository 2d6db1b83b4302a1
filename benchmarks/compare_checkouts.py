"""Compares the speed of two checkouts of this project: their `benchmark` commands take turns.

    python benchmarks/compare_checkouts.py OLD NEW --config=configs/speed_lm.py:seqpe --mode=train --output=speed.json

OLD and NEW are checkouts, also of versions with other module names. A turn runs `python -m seqpe_jax.benchmark` in each of
them, in alternating order, with the interpreter of its .venv if it has one. Prints for each encoding the median and the
quartiles of the turns' time ratios, new over old. Nothing else should run on the machine.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

WARM_UP = 1  # turns that only fill the compilation caches


def main() -> int:
    """Runs the turns and reports their ratios; returns the exit code."""
    options = _parse_arguments()
    for checkout in (options.old, options.new):
        if not (checkout / "seqpe_jax").is_dir():
            print(f"error: {checkout} is no checkout: it has no folder seqpe_jax", file=sys.stderr)
            return 2
    seconds: dict[str, list[dict[str, float]]] = {"old": [], "new": []}  # of each turn, by encoding
    for turn in range(WARM_UP + options.turns):
        for side in ("old", "new") if turn % 2 else ("new", "old"):
            try:
                measured = time_steps(getattr(options, side), options.config, options.mode, options.steps)
            except subprocess.CalledProcessError as error:
                print(f"error: benchmark failed in {getattr(options, side)}: {error.stderr.strip()}", file=sys.stderr)
                return 1
            if turn >= WARM_UP:
                seconds[side].append(measured)
        print(f"turn {turn + 1} of {WARM_UP + options.turns}", file=sys.stderr, flush=True)
    result = {
        "old": _commit(options.old),
        "new": _commit(options.new),
        "config": options.config,
        "mode": options.mode,
        "steps": options.steps,
        "turns": options.turns,
        "encodings": compare(seconds["old"], seconds["new"]),
    }
    for name, one in result["encodings"].items():
        low, high = one["quartiles"]
        print(
            f"{name}: new takes {one['median']:.3f} of old's time (quartiles {low:.3f} .. {high:.3f}, {options.turns} turns)"
        )
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=pathlib.Path, help="checkout that is compared with")
    parser.add_argument("new", type=pathlib.Path, help="checkout that is judged")
    parser.add_argument("--config", required=True, help="config file with its :variant, relative to both checkouts")
    parser.add_argument("--mode", choices=("train", "eval", "decode"), default="train", help="what is timed")
    parser.add_argument("--turns", type=int, default=25, help="turns of both (default: 25)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a turn (default: 10)")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    if options.turns < 2 or options.steps < 1:
        parser.error("--turns must be at least 2, --steps at least 1")
    return options


def time_steps(checkout: pathlib.Path, config: str, mode: str, steps: int) -> dict[str, float]:
    """Runs `benchmark` in a checkout; returns encoding -> median seconds of a step."""
    own = checkout.resolve() / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "benchmark.json"
        command = [str(own) if own.exists() else sys.executable, "-m", "seqpe_jax.benchmark"]
        command += [f"--config={config}", f"--mode={mode}", f"--steps={steps}", f"--output={output}"]
        subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True)
        runs = json.loads(output.read_text())["runs"]
    return {run["encoding"]: run["median_s"] for run in runs}


def compare(old: list[dict[str, float]], new: list[dict[str, float]]) -> dict[str, dict]:
    """Returns for each encoding the ratios new / old of the turns.

    Args:
      old: encoding -> seconds, of each turn.
      new: likewise, of the same turns.
    """
    encodings = {}
    for name in old[0].keys() & new[0].keys():
        ratios = [after[name] / before[name] for before, after in zip(old, new, strict=True)]
        low, middle, high = statistics.quantiles(ratios)
        times = {"old_s": [one[name] for one in old], "new_s": [one[name] for one in new]}
        encodings[name] = {"median": middle, "quartiles": [low, high], "ratios": ratios, **times}
    return encodings


def _commit(checkout: pathlib.Path) -> str:
    """Returns the commit of a checkout, its path where git does not know it."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else str(checkout)


if __name__ == "__main__":
    sys.exit(main())
