"""Questions as the program reads them: tokens and weights of examples, prompts from lines, names and splits."""

import json

import numpy as np
import pytest

from seqpe_jax.data import qa, qa_index
from seqpe_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from seqpe_jax.errors import InputError

BYTES = ByteTokenizer()
RECORD = {
    "index": 3,
    "input": "a = 1\n\n>>> a =",
    "question": ">>> a =",
    "outputs": ("1", "one"),
    "depth": 0.0,
    "kind": "k",
}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def line(index, prompt, *outputs):
    return {"index": index, "input": prompt, "outputs": list(outputs)}


def source(folder, path, split="train", length=64, tokenizer=BYTES):
    return qa.qa_source(
        "qa_jsonl",
        split=split,
        tokenizer=tokenizer,
        length=length,
        paths=(str(path),),
        cache_dir=folder / "cache",
        progress=False,
    )


def test_training_example():
    found = qa.training_example(RECORD, tokenizer=BYTES, length=24, prompt_weight=0.25, question_weight=0.5)
    assert {name: (value.dtype.name, value.shape) for name, value in found.items()} == {
        "tokens": ("int32", (25,)),
        "weights": ("float32", (24,)),
    }
    assert bytes(found["tokens"].tolist()) == b"a = 1\n\n>>> a = 1" + b"\0" * 9
    # 14 tokens of prompt: 13 of them are targets, 7 of the question; then " ", "1" and the end; then what fills up.
    np.testing.assert_array_equal(found["weights"], [0.25] * 6 + [0.5] * 7 + [1.0] * 3 + [0.0] * 8)
    targets = found["tokens"][1:][found["weights"] == 1.0]
    assert bytes(targets.tolist()) == b" 1\0"
    assert qa.training_example(RECORD, tokenizer=BYTES, length=17)["weights"][-2:].tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="question 3 takes 17 tokens with its answer, more than 16"):
        qa.training_example(RECORD, tokenizer=BYTES, length=16)


def test_any_accepted_answer_is_trained_on():
    drawn = set()
    for seed in range(20):
        found = qa.training_example(RECORD, np.random.default_rng(seed), tokenizer=BYTES, length=24)
        drawn.add(bytes(found["tokens"][14:].tolist()).split(b"\0")[0])
    assert drawn == {b" 1", b" one"}


def test_prompt_begins_the_training_example(gpt2_tokenizer):
    answers = ("b", "=", "'r'", "of the Normans", "世界", "1066.")
    for tokenizer in (BYTES, gpt2_tokenizer):
        for prompt in ("Who?\nAnswer:", "x =", "class Foo(", "a\n\nb", "ends with 世"):
            for answer in answers:
                record = RECORD | {"input": prompt, "outputs": (answer,)}
                tokens = qa.prompt_tokens(record, tokenizer)
                example = qa.training_example(record, tokenizer=tokenizer, length=60)
                assert tokens.dtype == np.int32
                np.testing.assert_array_equal(example["tokens"][: len(tokens)], tokens)
                answered = example["tokens"][1:][example["weights"] == 1.0]
                assert tokenizer.decode(answered[:-1]) == f" {answer}"
                assert answered[-1] == qa.answer_end_id(tokenizer)


def test_answer_end_id(gpt2_tokenizer, tmp_path):
    assert qa.answer_end_id(BYTES) == 0
    assert qa.answer_end_id(gpt2_tokenizer) == 50256
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="has no EOS token, which an answer must end with"):
        source(tmp_path, tmp_path / "none", tokenizer=load_tokenizer(tmp_path))


def test_prompts_from_lines(tmp_path):
    long = line(9, "word " * 20, "x")
    path = tmp_path / "some.jsonl"
    first = line(5, " passage\n\nQuestion: é?\nAnswer: ", "x", " x", "yy ")
    path.write_text("\n" + lines(first) + "  \n" + lines(long, line(7, "q", "a")))
    found = source(tmp_path, path)
    assert len(found) == 2 and found.skipped["too_long"] == 1 and found.length == 64
    assert found[0] == {
        "index": 5,
        "input": "passage\n\nQuestion: é?\nAnswer:",
        "question": "Question: é?\nAnswer:",
        "outputs": ("x", "yy"),
        "depth": None,
        "kind": "any",
        "passage": None,
    }
    assert found[1]["index"] == 7 and [question for question, _, _ in found.questions()] == [
        "Question: é?\nAnswer:",
        "q",
    ]
    assert len(source(tmp_path, path, "test", length=200)) == 3, "one file serves every split"
    statistics = found.statistics()
    assert statistics["depth"] is None and statistics["skipped"]["too_long"] == 1
    assert sum(statistics["tokens"]["count"]) == 2
    # "q", " a" and the end are 4 tokens; the longest answer counts.
    assert len(source(tmp_path, path, length=4)) == 1
    with pytest.raises(
        InputError, match=r"fits 3 tokens: the smallest workable length is 4 \(and 102 for all of its 3"
    ):
        source(tmp_path, path, length=3)


def test_changed_lines_are_read_again(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(lines(line(0, "q", "a")))
    first = source(tmp_path, path)
    path.write_text(lines(line(0, "another", "a"), line(1, "q", "b")))
    second = source(tmp_path, path)
    assert len(first) == 1 and len(second) == 2 and second[0]["input"] == "another"
    assert first.fingerprint != second.fingerprint == source(tmp_path, path).fingerprint
    assert source(tmp_path, path, length=65).fingerprint != second.fingerprint


def test_folder_of_lines(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(lines(line(0, split, "a")))
    assert source(tmp_path, tmp_path, "validation")[0]["input"] == "validation"
    with pytest.raises(
        InputError, match=r"test.jsonl' does not exist \(the folder has train, validation\); give one file"
    ):
        source(tmp_path, tmp_path, "test")
    with pytest.raises(InputError, match="nothing.jsonl' does not exist; give one file, or a folder"):
        source(tmp_path, tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="unknown split 'dev'"):
        source(tmp_path, tmp_path, "dev")
    with pytest.raises(InputError, match="needs one path in data.paths, got 0"):
        qa.qa_source("qa_jsonl", split="test", tokenizer=BYTES, length=9, cache_dir=tmp_path)


def test_bad_line_is_named(tmp_path):
    path = tmp_path / "some.jsonl"
    for bad, message in (
        ("{", "is not JSON"),
        ("[1]", "is no object"),
        (
            lines({"context": "c", "question": "q", "answer": "a"}),
            "is a question with its context: use data.name=squad_long",
        ),
        (lines({"index": True, "input": "q", "outputs": ["a"]}), "field 'index' must be an integer, got True"),
        (lines({"index": 0, "outputs": ["a"]}), "field 'input' must be a text, got None"),
        (lines({"index": 0, "input": "q", "outputs": 5}), "field 'outputs' must be a list, got 5"),
        (lines({"input": "q", "outputs": ["a"], "answer_prefix": 5}), "field 'answer_prefix' must be a text, got 5"),
        (lines(line(0, " \n", "a")), "field 'input' is empty"),
        (lines(line(0, "q")), r"field 'outputs' must be a list of texts that are not empty, got \[\]"),
        (lines(line(0, "q", "a", " ")), "must be a list of texts that are not empty"),
        (lines(line(0, "q", 5)), "must be a list of texts that are not empty"),
    ):
        path.write_text(lines(line(0, "q", "a")) + "\n" + bad)
        with pytest.raises(InputError, match=f"'{path}', line 3.*{message}"):
            source(tmp_path, path)


def test_not_utf8_and_nothing(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_bytes(lines(line(0, "q", "a")).encode() + b'{"index": 0, "input": "caf\xe9", "outputs": ["a"]}')
    with pytest.raises(InputError, match="line 2 is not JSON .*can't decode byte 0xe9"):
        source(tmp_path, path)
    path.write_text(" \n\n")
    with pytest.raises(InputError, match="holds no line; give one file"):
        source(tmp_path, path)


def test_a_damaged_index_is_built_again(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(lines(*(line(number, f"q{number}", "a") for number in range(20))))
    assert len(source(tmp_path, path)) == 20
    (folder,) = [entry for entry in (tmp_path / "cache" / "questions").iterdir() if not entry.name.startswith(".")]
    (folder / qa_index.INDEX_FILE).write_bytes(b"damaged")
    assert len(source(tmp_path, path)) == 20


class Glueing(ByteTokenizer):
    """Joins a full stop and what separates it from the next passage, but not from an anchor."""

    name, fingerprint = "bytes", "glueing"

    def encode(self, text):
        ids = super().encode(text)
        return ids if text.count(b"\n\n") > 2 else ids[: max(1, len(ids) - 8 * text.count(b"."))]


def test_prompt_fits_if_the_tokenizer_merges_across_passages(tmp_path):
    content = {"data": []}
    for number in range(12):
        asked = {"question": f"Which is {number}?", "answers": [{"text": f"number{number}x"}]}
        text = f"This is a passage with number{number}x in it. It has a second sentence."
        content["data"].append({"title": str(number), "paragraphs": [{"context": text, "qas": [asked]}]})
    (tmp_path / "one.json").write_text(json.dumps(content))
    tokenizer = Glueing()
    found = qa.qa_source(
        "squad_long",
        split="train",
        tokenizer=tokenizer,
        length=400,
        paths=(str(tmp_path / "one.json"),),
        cache_dir=tmp_path / "cache",
        progress=False,
    )
    for index in range(len(found)):
        assert 300 < len(qa.training_example(found[index], tokenizer=tokenizer, length=400)["tokens"])
