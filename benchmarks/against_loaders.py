"""Times what a host does with data against what others' users call, in CPU seconds; the two take turns.

    python -m venv OTHER && OTHER/bin/pip install torch torchvision transformers datasets
    python benchmarks/against_loaders.py --mode=images --python=OTHER/bin/python
    python benchmarks/against_loaders.py --mode=tokens --python=OTHER/bin/python

images: JPEG files in folders of classes, as large as ImageNet's, to training examples of 224 pixels: random crops and flips.
Ours hands bytes to the device, which flips and normalizes; theirs is torchvision's `ImageFolder` with the transforms of its
reference script, to normalized floats. tokens: text files to token ids by one BPE tokenizer. Ours is what `prepare` does with a
batch of records, with its counts of words and special tokens; theirs is `datasets.map` with the fast tokenizer of `transformers`,
batched. Both sides run in one process. Stores docs/results/against_loaders.json and prints the median of the turns' ratios,
ours over theirs, and the quartiles.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import image_input  # noqa: E402

from seqpe_jax.config.schema import AugmentConfig  # noqa: E402
from seqpe_jax.data import images, token_encoder  # noqa: E402
from seqpe_jax.data.tokenizers import load_tokenizer  # noqa: E402

_PYTHON = flags.DEFINE_string("python", None, "an interpreter that has the other packages", required=True)
_MODE = flags.DEFINE_enum("mode", "images", ["images", "tokens"], "what to time")
_TURNS = flags.DEFINE_integer("turns", 15, "timed turns of each", lower_bound=2)
STORED = ROOT / "docs" / "results" / "against_loaders.json"
SIZE, CROP_SCALE = 224, (0.08, 1.0)
RECORDS, RECORD_BYTES, VOCABULARY = 200, 5000, 4096  # of the text, which is this Python's own library


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


def _tokens(folder: pathlib.Path) -> Callable[[], int]:
    """Returns a function that encodes the text, for which a tokenizer is trained first."""
    import tokenizers

    files = sorted(pathlib.Path(json.__file__).parents[1].glob("*.py"))
    text = "".join(path.read_text() for path in files if path.read_text().isascii())
    parts = [text[start : start + RECORD_BYTES] for start in range(0, RECORDS * RECORD_BYTES, RECORD_BYTES)]
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(parts, VOCABULARY, special_tokens=["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    encoder = token_encoder.RecordEncoder(load_tokenizer(str(folder / "tokenizer.json")))
    records = [{"text": part.encode(), "name": str(number).encode()} for number, part in enumerate(parts)]

    def work() -> int:
        encoder(records, None)
        return sum(map(len, parts))

    return work


def main(arguments: list[str]) -> None:
    """The command."""
    del arguments
    mode = _MODE.value
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        work = {"images": _images, "tokens": _tokens}[mode](folder)
        line = [_PYTHON.value, str(pathlib.Path(__file__).with_name("torch_loaders.py")), mode, root, str(SIZE)]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            ready, _, version = other.stdout.readline().strip().partition(" ")
            if ready != "ready":
                sys.exit(
                    f"error: --python={_PYTHON.value} has no torchvision, or no datasets and transformers: see above"
                )
            ours, theirs, units = [], [], 0
            for _ in range(1 + _TURNS.value):
                start = time.process_time()
                units = work()
                ours.append(time.process_time() - start)
                other.stdin.write("\n")
                other.stdin.flush()
                theirs.append(float(other.stdout.readline()))
            other.stdin.close()
    ours, theirs = ours[1:], theirs[1:]
    low, middle, high = statistics.quantiles([one / two for one, two in zip(ours, theirs, strict=True)])
    found = {
        "against": version,
        "turns": len(ours),
        "ratio": {"median": middle, "quarters": [low, high]},
        "units_per_second": {"ours": units / min(ours), "theirs": units / min(theirs)},
    }
    print(f"ours / {version}: {middle:.2f} ({low:.2f} .. {high:.2f}), {found['units_per_second']} of a core")
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    STORED.write_text(json.dumps(stored | {mode: found}, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
