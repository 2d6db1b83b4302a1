"""The first command line of each command on the pages works as shown, with a smaller model (`tests.small_models`).

The other lines are parsed, and their configs and sweep files validated, by `test_readme.py`.
"""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from seqpe_jax.__main__ import COMMANDS
from tests.commands import Commands
from tests.repository.test_readme import DOCS, commands
from tests.small_models import FOLDER, PHOTOS, QUESTIONS, TEXTS

pytestmark = pytest.mark.slow
PAGES = ("README.md", *DOCS)
# Folders that no page makes: runs, converted to the layout of the authors or of Hugging Face, replace what others released.
PREPARED = {
    "downloads/SmolLM2-135M": [
        ["train", "--config=configs/decoder_lm.py", "--workdir=runs/of_others"],
        ["convert", "--source=runs/of_others", "--output=downloads/SmolLM2-135M", "--to=huggingface"],
    ],
    "released/text": [
        [
            "train",
            "--config=configs/wikitext103_gpt2.py",
            "--workdir=runs/of_authors",
            "--config.data.tokenizer=path/to/tokenizer.json",
        ],
        ["convert", "--source=runs/of_authors", "--output=released/text", "--to=reference"],
    ],
}


def runs_here(words: list[str]) -> bool:
    """Returns whether a command line needs one machine alone, without a bucket or Slurm."""
    remote = ("gs://", "s3://", "slurm", "--coordinator")
    return words[:2] == ["python", "-m"] and not any(part in word for part in remote for word in words)


LINES = [
    [words[2].removeprefix("seqpe_jax."), *words[3:]] for page in PAGES for words in commands(page) if runs_here(words)
]


class Reader:
    """Types command lines of the pages, each once, and before each those that write the files that it reads."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.typed = folder, set()
        self._commands = Commands(folder / "cache", before="tests.small_models")
        _write_data(folder)

    def type(self, words: list[str]) -> None:
        """Runs a command line to its end.

        Raises:
          AssertionError: it fails.
        """
        if tuple(words) in self.typed:
            return
        self.typed.add(tuple(words))
        for path in paths_read(words):
            if not (self.folder / path).exists():
                self._make(path)
        running = self._commands.start(words[0], *shortened(words[1:]), **{FOLDER: str(self.folder)})
        result = self._commands.wait(running)
        if "libtpu" in result.err and words[0] == "aot":
            return
        assert result.code == 0, f"{' '.join(words)}\n{result.out}\n{result.err}"

    def _make(self, path: str) -> None:
        makers = PREPARED.get(path) or [words for words in LINES if path in paths_written(words)][:1]
        for words in makers:
            self.type(words)

    def close(self) -> None:
        self._commands.close()


def _write_data(folder: pathlib.Path) -> None:
    """Writes a text, questions, a tokenizer and photos where the pages have their examples."""
    import tokenizers

    text = "".join(f"line {number} of a text\n" for number in range(6000))
    (folder / TEXTS).mkdir(parents=True)
    (folder / TEXTS / "text.txt").write_text(text)
    questions = [{"index": number, "input": f"ask {number}:", "outputs": [f"no {number}"]} for number in range(40)]
    (folder / QUESTIONS).write_text("".join(json.dumps(question) + "\n" for question in questions))
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text[:2000]], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save(str(folder / "path/to/tokenizer.json"))
    rng = np.random.default_rng(0)
    for split, label, number in [(s, c, n) for s in ("train", "val") for c in "ab" for n in range(4)]:
        file = folder / PHOTOS / split / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(file)


def values_of(words: list[str], *options: str) -> list[str]:
    return [value for name, _, value in (word.partition("=") for word in words) if name in options]


def paths_written(words: list[str]) -> list[str]:
    return values_of(words, "--workdir" if words[0] in ("train", "sweep") else "--output")


def paths_read(words: list[str]) -> list[str]:
    folders = [value.partition(":")[0] for value in values_of(words, "--config") if ".py" not in value]
    return folders + values_of(
        words, "--checkpoint", "--source", "--init-from", *["--workdir"] * (words[0] == "report")
    )


def shortened(words: list[str]) -> list[str]:
    """Returns options with at most two encodings, lengths or sizes, and few tokens to generate."""
    found = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--compare", "--lengths", "--contexts", "--sizes"):
            value = ",".join(value.split(",")[:2])
        if name == "--max-new-tokens":
            value = "4"
        found.append(f"{name}{equals}{value}")
    return found + ["--steps=1"] * any(word.startswith("--mode=") for word in words)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    reader.close()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_the_pages_works(reader, name):
    lines = [words for words in LINES if words[0] == name]
    assert lines, f"no page shows {name}"
    reader.type(lines[0])
