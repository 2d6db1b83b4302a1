"""The generate command end to end on a tiny trained run; bad input ends with exit code 2 and one line."""

import json
import pathlib

import pytest

from tests.commands import CONFIG, STDIN, train_arguments, with_defaults
from tests.training.test_commands import PLAIN, refused, word_tokenizer

pytestmark = pytest.mark.slow

NEW = "--max-new-tokens=20"
COUNTING = [f"w{number % 5}" for number in range(1500)]  # what follows a word is always the same


@pytest.fixture(scope="module")
def trained(commands, tmp_path_factory) -> pathlib.Path:
    """A run on bytes that has learned to go on with "abcabc..."."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.txt").write_text("abc" * 1500)
    fields = PLAIN | {"steps": 100, "checkpoint__every": 100, "optimizer__learning_rate": 0.005}
    result = commands("train", *train_arguments(folder / "run", folder / "text.txt", **fields))
    assert result.code == 0, result.err
    return folder / "run"


@pytest.fixture(scope="module")
def words(commands, tmp_path_factory) -> pathlib.Path:
    """A run on whole words with an end of text after "w4"."""
    folder = tmp_path_factory.mktemp("words")
    for number in range(400):
        (folder / f"{number}.txt").write_text(" ".join(COUNTING[:5]))
    word_tokenizer(folder / "tokenizer.json", ["<|endoftext|>", *COUNTING[:5]])
    fields = {
        "steps": 60,
        "checkpoint__every": 60,
        "optimizer__learning_rate": 0.02,
        "data__length": 8,
        "eval__lengths": (8,),
        "data__tokenizer": folder / "tokenizer.json",
    }
    result = commands("train", *train_arguments(folder / "run", folder / "*.txt", config=f"{CONFIG}:rotary", **fields))
    assert result.code == 0, result.err
    return folder / "run"


def test_a_prompt_is_gone_on_with(commands, trained, tmp_path):
    output, prompt = tmp_path / "deep" / "texts.jsonl", tmp_path / "prompt.txt"
    prompt.write_text("abca\n")
    words = ["generate", f"--checkpoint={trained}", "--print-prompt", NEW, f"--output={output}"]
    result = commands.wait(commands.start(*words, **{STDIN: str(prompt)}))
    assert result.code == 0 and not result.err, result.err
    expected = "bcabcabcabcabcabcabc"
    assert result.out == f"abca{expected}\nwritten: {output}\n"
    (line,) = map(json.loads, output.read_text().splitlines())
    assert (line["prompt"], line["text"], line["tokens"]) == ("abca", expected, list(expected.encode()))
    assert line["ended"] is False and -5 < line["log_prob"] < 0
    assert list(output.parent.iterdir()) == [output]


def test_the_lines_of_a_file_are_batched(commands, trained, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("abc\nb\r\nbcabcabcabcabcabcabcabc\nc\n")
    result = commands("generate", f"--checkpoint={trained}", f"--prompts-file={path}", "--max-new-tokens=5")
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in result.out.splitlines()]
    prompts = ["abc", "b", "bcabcabcabcabcabcabcabc", "c"]
    assert [line["prompt"] for line in lines] == prompts
    assert [line["text"] for line in lines] == ["abcab", "cabca", "abcab", "abcab"]
    assert "token 20/20" in result.err


def test_a_seed_repeats_a_text_of_any_bytes(commands, trained):
    """At a high temperature the bytes are no UTF-8."""
    hot = ["--prompt=ab", NEW, "--temperature=50", "--top-p=0.99", "--top-k=240"]
    first, again, other = (
        commands("generate", f"--checkpoint={trained}", *hot, f"--seed={seed}") for seed in (1, 1, 2)
    )
    assert first.code == 0 and "\ufffd" in first.out
    assert first.out == again.out != other.out


def test_a_text_ends_at_the_tokenizers_end(commands, words):
    for prompt, expected in (("w0 w1", " w2 w3 w4\n"), ("", "w0 w1 w2 w3 w4\n")):  # which begins at its end, too
        result = commands("generate", f"--checkpoint={words}", f"--prompt={prompt}", NEW)
        assert (result.code, result.out) == (0, expected), result.err


def test_bad_arguments_are_refused(commands, trained, tmp_path):
    for name, content in {"latin.txt": b"caf\xe9\n", "gap.txt": b"one\n\ntwo\n", "empty.txt": b""}.items():
        (tmp_path / name).write_bytes(content)
    for arguments, expected in (
        ([], ["--prompt=TEXT", "--prompts-file=FILE", "standard input"]),  # which is empty here
        (["--prompt=a", "--prompts-file=b"], ["either"]),
        (["--print-prompt", "--prompts-file=b"], ["either", "--print-prompt"]),
        (["--prompt=abc", "--top-k=5"], ["temperature 0", "top-k"]),
        (["--prompt=abc", "--max-new-tokens=998"], ["1001", "largest position possible is 999"]),
        (["--prompt=abc", "--max-new-tokens=0"], ["at least 1, got 0"]),
        (["--prompt=abc", "--max-new-tokens=few"], ["max-new-tokens", "few"]),
        (["--prompt=abc", "--temperature=-1"], ["temperature", "-1"]),
        (["--prompt=abc", "--top-p=0"], ["top-p", "above 0"]),
        (["--prompt=abc", "--top-p=1.1"], ["top-p", "1.1"]),
        (["--prompt=abc", "--window=150"], ["--window=150", "encoding.kind='seqpe'", "leave it out"]),
        (["--prompt=abc", "--seed=-3"], ["seed", "-3"]),
        (["--prompts-file=DIR/nothing.txt"], ["--prompts-file", "nothing.txt"]),
        (["--prompts-file=DIR/latin.txt"], ["--prompts-file", "UTF-8"]),
        (["--prompts-file=DIR/gap.txt"], ["line 2", "gap.txt"]),
        (["--prompts-file=DIR/empty.txt"], ["line 1", "empty.txt"]),
        (["--prompt=abc", "--output=DIR"], ["--output", "folder"]),
        (["--prompt=abc", "--promt=abc"], ["promt"]),
        (["--prompt=abc", "--checkpoint=DIR/none"], ["none does not exist"]),
    ):
        arguments = [argument.replace("DIR", str(tmp_path)) for argument in arguments]
        result = commands("generate", *with_defaults(arguments, checkpoint=trained))
        refused(result, *expected)
        assert not result.out


def test_a_run_on_images_is_refused(commands, trained, tmp_path):
    settings = json.loads((trained / "config.json").read_text())
    settings["data"] |= {"name": "digit_images", "size": [8, 8], "paths": []}
    settings["model"] |= {"kind": "vit", "patch": [2, 2]}
    settings["objective"]["contrastive"]["causal_only"] = False
    (tmp_path / "config.json").write_text(json.dumps(settings))
    refused(commands("generate", f"--checkpoint={tmp_path}", "--prompt=abc"), "images", "text")


def test_prompts_without_end_are_refused(commands, tmp_path):
    refused(
        commands("generate", f"--checkpoint={tmp_path}", "--prompts-file=/dev/zero"), "more than 64 MiB", "fewer lines"
    )


def test_another_tokenizer_is_refused(commands, words, tmp_path):
    tokenizer = words / "tokenizer.json"
    before = tokenizer.read_bytes()
    word_tokenizer(tokenizer, ["<|endoftext|>", *COUNTING[:5], "more"])
    refused(
        commands("generate", f"--checkpoint={words}", "--prompt=w0"),
        "tokenizer.json has changed since it was written",
    )
    tokenizer.write_bytes(before)
