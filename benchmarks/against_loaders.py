"""Times what a host does with data against what others' users call; the two take turns.

    python -m venv OTHER && OTHER/bin/pip install torch torchvision transformers datasets
    python benchmarks/against_loaders.py --mode=images --python=OTHER/bin/python
    python benchmarks/against_loaders.py --mode=tokens --python=OTHER/bin/python --turns=5

images: JPEG files in folders of classes, as large as ImageNet's, to training examples of 224 pixels: random crops and flips.
Ours hands bytes to the device, which flips and normalizes; theirs is torchvision's `ImageFolder` with the transforms of its
reference script, to normalized floats. Both sides run in one process; CPU seconds are compared.

tokens: a JSON lines file of 100 MB (`--megabytes`), source files of the installed packages, to token ids on disk, by one BPE
tokenizer of 4,096 tokens and two processes. Ours is the `prepare` command; theirs is `load_dataset`, `map` with the fast
tokenizer of `transformers`, batched, and `save_to_disk`. Seconds on the clock are compared, from the start of Python to its end.

Stores docs/results/against_loaders.json and prints the median of the turns' ratios, ours over theirs, and the quartiles.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import image_input  # noqa: E402

from seqpe_jax.config.schema import AugmentConfig  # noqa: E402
from seqpe_jax.data import images  # noqa: E402

_PYTHON = flags.DEFINE_string("python", None, "an interpreter that has the other packages", required=True)
_MODE = flags.DEFINE_enum("mode", "images", ["images", "tokens"], "what to time")
_TURNS = flags.DEFINE_integer("turns", 15, "timed turns of each", lower_bound=2)
_MEGABYTES = flags.DEFINE_integer("megabytes", 100, "size of the text", lower_bound=1)
STORED = ROOT / "docs" / "results" / "against_loaders.json"
SIZE, CROP_SCALE = 224, (0.08, 1.0)
VOCABULARY, TRAINED_BYTES, PROCESSES = 4096, 4_000_000, 2


def _images(folder: pathlib.Path) -> Callable[[], int]:
    """Returns a function that makes a training example of each file."""
    source = image_input.source_of(folder)
    augment = AugmentConfig(crop_scale=CROP_SCALE, flip=0.5)
    draw = np.random.default_rng(0)

    def work() -> int:
        for index in range(len(source)):
            images.train_example(source[index], (SIZE, SIZE), augment, draw, mean=source.mean)
        return len(source)

    return work


def _write_text(folder: pathlib.Path, size: int) -> int:
    """Writes text.jsonl, a document for each source file, and tokenizer.json; returns the bytes of text."""
    import tokenizers

    paths = [
        path
        for root in map(sysconfig.get_path, ("purelib", "stdlib"))
        for path in sorted(pathlib.Path(root).rglob("*.py"))
    ]
    written, sample = 0, []
    with (folder / "text.jsonl").open("w") as file:
        for path in dict.fromkeys(path.resolve() for path in paths):
            if not (text := path.read_text(errors="replace")).strip():
                continue
            file.write(json.dumps({"text": text}) + "\n")
            if written < TRAINED_BYTES:
                sample.append(text)
            written += len(text.encode())
            if written >= size:
                break
        else:
            sys.exit(f"error: the installed packages have {written / 1e6:.0f} MB of source: give fewer --megabytes")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(sample, VOCABULARY, special_tokens=["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    return written


def _seconds(command: list[str]) -> float:
    """Returns the seconds that a command takes, from its start to its end."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stdout}")
    return time.perf_counter() - start


def _compare_tokens(folder: pathlib.Path, python: str, turns: int) -> tuple[str, int, list[float], list[float]]:
    """Returns (versions of the other side, bytes, our seconds, theirs)."""
    theirs_script = pathlib.Path(__file__).with_name("torch_loaders.py")
    found = subprocess.run([python, str(theirs_script), "versions"], stdout=subprocess.PIPE, text=True)
    if found.returncode:
        sys.exit(f"error: --python={python} has no datasets and transformers: see above")
    size = _write_text(folder, _MEGABYTES.value * 10**6)
    ours_command = [sys.executable, "-m", "seqpe_jax.prepare", f"--config={ROOT / 'configs' / 'stdlib_lm.py'}"]
    ours_command += [f"--config.data.{name}" for name in ("name=text", f"paths={folder / 'text.jsonl'}")]
    ours_command += [f"--config.data.tokenizer={folder / 'tokenizer.json'}", f"--processes={PROCESSES}"]
    theirs_command = [python, str(theirs_script), "tokens", str(folder), str(PROCESSES)]
    ours, theirs = [], []
    for turn in range(turns):
        ours.append(_seconds([*ours_command, f"--output={folder / f'ours{turn}'}"]))
        theirs.append(_seconds([*theirs_command, str(folder / f"theirs{turn}")]))
        print(f"turn {turn + 1} of {turns}: {ours[-1]:.1f} s and {theirs[-1]:.1f} s", flush=True)
    return found.stdout.strip(), size, ours, theirs


def _compare_images(folder: pathlib.Path, python: str, turns: int) -> tuple[str, int, list[float], list[float]]:
    """Returns (versions of the other side, images, our CPU seconds, theirs)."""
    work = _images(folder)
    line = [python, str(pathlib.Path(__file__).with_name("torch_loaders.py")), "images", str(folder), str(SIZE)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        ready, _, versions = other.stdout.readline().strip().partition(" ")
        if ready != "ready":
            sys.exit(f"error: --python={python} has no torchvision: see above")
        ours, theirs, units = [], [], 0
        for _ in range(1 + turns):
            start = time.process_time()
            units = work()
            ours.append(time.process_time() - start)
            other.stdin.write("\n")
            other.stdin.flush()
            theirs.append(float(other.stdout.readline()))
        other.stdin.close()
    return versions, units, ours[1:], theirs[1:]


def main(arguments: list[str]) -> None:
    """The command."""
    del arguments
    mode = _MODE.value
    compare = {"images": _compare_images, "tokens": _compare_tokens}[mode]
    with tempfile.TemporaryDirectory() as folder:
        versions, units, ours, theirs = compare(pathlib.Path(folder), _PYTHON.value, _TURNS.value)
    low, middle, high = statistics.quantiles([one / two for one, two in zip(ours, theirs, strict=True)])
    found = {
        "against": versions,
        "turns": len(ours),
        "ratio": {"median": middle, "quarters": [low, high]},
        "units_per_second": {"ours": units / min(ours), "theirs": units / min(theirs)},
    }
    print(f"ours / {versions}: {middle:.2f} ({low:.2f} .. {high:.2f}), {found['units_per_second']}")
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    STORED.write_text(json.dumps(stored | {mode: found}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
