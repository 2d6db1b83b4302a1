"""Every command that README and the docs show works as it stands there, on a smaller model (`tests.small_models`).

Set-up, several hosts, Slurm and buckets are not started: `test_readme.py` reads those lines.
"""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.commands import Commands
from tests.house.test_readme import DOCS, commands
from tests.small_models import FOLDER, PHOTOS, QUESTIONS, TEXTS

pytestmark = pytest.mark.slow
PAGES = ("README.md", *DOCS)
# Made of a run, in the authors' form: stands for what they released.
PREPARED = {
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


def started(words: list[str]) -> bool:
    elsewhere = ("gs://", "slurm", "--coordinator")
    return words[:2] == ["python", "-m"] and not any(part in word for part in elsewhere for word in words)


ALL = {page: [words[2:] for words in commands(page) if started(words)] for page in PAGES}


class Reader:
    """Types the commands of the pages, each once, and before each what makes what it reads."""

    def __init__(self, folder: pathlib.Path):
        import tokenizers

        self.folder, self.done = folder, set()
        self._commands = Commands(folder / "cache", before="tests.small_models")
        (folder / TEXTS).mkdir(parents=True)
        text = "".join(f"line {number} of a text\n" for number in range(6000))
        (folder / TEXTS / "text.txt").write_text(text)
        lines = [json.dumps({"index": at, "input": f"ask {at}:", "outputs": [f"no {at}"]}) for at in range(40)]
        (folder / QUESTIONS).write_text("\n".join(lines) + "\n")
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator([text[:2000]], vocab_size=300, special_tokens=["<|endoftext|>"])
        made.save(str(folder / "path/to/tokenizer.json"))
        draw = np.random.default_rng(0)
        for split, label, number in [(s, c, n) for s in ("train", "val") for c in "ab" for n in range(4)]:
            file = folder / PHOTOS / split / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8)).save(file)

    def type(self, words: list[str]) -> None:
        """Runs a command of a page to its end. Raises: AssertionError: it fails, or what it reads is made by none."""
        key = tuple(words)
        if key in self.done:
            return
        self.done.add(key)
        for path in read_by(words):
            if not (self.folder / path).exists():
                self._make(path)
        result = self._commands.wait(
            self._commands.start(words[0].removeprefix("seqpe_jax."), *quick(words[1:]), **{FOLDER: str(self.folder)})
        )
        if "libtpu" in result.err and words[0] == "seqpe_jax.aot":
            return
        assert result.code == 0, f"{' '.join(words)}\n{result.out}\n{result.err}"

    def _make(self, path: str) -> None:
        for words in PREPARED.get(path, []):
            self.type([f"seqpe_jax.{words[0]}", *words[1:]])
        makers = [words for page in PAGES for words in ALL[page] if path in made_by(words)]
        if makers:
            self.type(makers[0])

    def close(self) -> None:
        self._commands.close()


def paths(words: list[str], *options: str) -> list[str]:
    return [path for name, _, path in (word.partition("=") for word in words) if name in options]


def made_by(words: list[str]) -> list[str]:
    return paths(words, "--workdir") if words[0] in ("seqpe_jax.train", "seqpe_jax.sweep") else paths(words, "--output")


def read_by(words: list[str]) -> list[str]:
    reported = ["--workdir"] if words[0] == "seqpe_jax.report" else []
    return paths(words, "--checkpoint", "--source", "--init-from", *reported)


def quick(words: list[str]) -> list[str]:
    """Options with fewer encodings, lengths and sizes, and fewer tokens to generate."""
    found = []
    for word in words:
        name, given, value = word.partition("=")
        if name in ("--compare", "--lengths", "--contexts", "--sizes"):
            value = ",".join(value.split(",")[:2])
        if name == "--max-new-tokens":
            value = "4"
        found.append(f"{name}{given}{value}")
    return found + ["--steps=1"] * any(word.startswith("--mode=") for word in words)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    reader.close()


@pytest.mark.parametrize("page", [page for page in PAGES if ALL[page]])
def test_the_commands_of_a_page_work(reader, page):
    for words in ALL[page]:
        reader.type(words)
