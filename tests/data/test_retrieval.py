"""Probes of long contexts: what they hide, where, and what they ask, by hand-made cases."""

import re

import numpy as np
import pytest

from seqpe_jax.data import qa, registry
from seqpe_jax.data.datasets import retrieval
from seqpe_jax.data.retrieval import RetrievalQuestions
from seqpe_jax.data.tokenizers import ByteTokenizer
from seqpe_jax.errors import InputError

BYTES = ByteTokenizer()


def questions(probe, length=2048, split="test", **options):
    return RetrievalQuestions(split, tokenizer=BYTES, length=length, probe=probe, depths=(0.0, 0.5, 1.0), **options)


def make(probe, size=20, depth=0.5, seed=0):
    return retrieval.MAKERS[probe](np.random.default_rng(seed), size, depth)


def test_the_passkey_is_said_once_at_its_depth():
    prompt = make("passkey", size=4, depth=0.5)
    (key,) = prompt.answers
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    assert prompt.context.split("\n") == [retrieval.NOISE] * 2 + [needle] + [retrieval.NOISE] * 2
    assert prompt.context[prompt.gold :].startswith(needle) and prompt.question.endswith("The pass key is")
    assert make("passkey", 4, 0.0).context.startswith("The pass key") and make("passkey", 4, 1.0).gold > 300


@pytest.mark.parametrize(
    "probe,keys,values,asked",
    [("single", 1, 1, 1), ("multikey", 4, 1, 1), ("multivalue", 1, 4, 1), ("multiquery", 4, 1, 4)],
)
def test_needles_are_rulers(probe, keys, values, asked):
    prompt = make(f"niah_{probe}", size=9)
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", prompt.context)
    assert len(found) == keys * values and len({key for key, _ in found}) == keys
    named = {key for key, _ in found if key in prompt.question}
    assert len(named) == asked and set(prompt.answers) == {value for key, value in found if key in named}
    assert prompt.context.count(retrieval.NOISE) == 9
    assert (prompt.gold is None) == (probe not in ("single", "multikey"))


def test_variables_are_assigned_in_a_chain():
    prompt = make("vt")
    lines = re.findall(r"VAR (\w{5}) = (\S+)(?: (\w{5}))?", prompt.context)
    assert len(lines) == 5 == len(prompt.answers) and lines[0][1].isdigit() and lines[0][1] in prompt.question
    assert [line[0] for line in lines] == list(prompt.answers)
    assert [line[2] for line in lines[1:]] == list(prompt.answers[:-1])


def test_common_words_come_ten_times_as_often():
    prompt = make("cwe", size=7)
    words = re.findall(r"\d+\. (\w+)", prompt.context)
    counts = {word: words.count(word) for word in words}
    assert {word for word, count in counts.items() if count == 30} == set(prompt.answers) and len(prompt.answers) == 10
    assert sorted(counts.values())[:7] == [3] * 7 and len(counts) == 17


@pytest.mark.parametrize("size", [0, 5, 300])
def test_frequent_words_are_the_first_three_after_the_dots(size):
    prompt = make("fwe", size=size)
    words = prompt.context.split()
    counts = sorted(((words.count(word), word) for word in set(words)), reverse=True)
    assert counts[0][1] == "...." and tuple(word for _, word in counts[1:4]) == prompt.answers
    assert counts[3][0] > counts[4][0]


def test_recall_and_induction_ask_for_what_was_paired():
    prompt = make("mqar", size=30)
    pairs = dict(pair.split("=") for pair in prompt.context.split())
    assert len(prompt.answers) == 4 and all(
        pairs[key] == value for key, value in (one.split("=") for one in prompt.answers)
    )
    assert all(one.split("=")[0] in prompt.question for one in prompt.answers)
    prompt = make("induction", size=10, depth=0.5)
    symbols = prompt.context.split()
    assert symbols.index("#") == 5 and symbols.count("#") == 1 and prompt.question == "#"
    assert (symbols[6],) == prompt.answers and prompt.context[prompt.gold] == "#"


@pytest.mark.parametrize("probe", registry.PROBES)
def test_prompts_fill_their_length_and_are_the_same_at_every_one(probe):
    short, long = questions(probe, 4096), questions(probe, 6000)
    for index in (0, 4):
        records = short[index], long[index]
        assert records[0]["outputs"] == records[1]["outputs"] and records[0]["question"] == records[1]["question"]
        for record, length in zip(records, (4096, 6000), strict=True):
            tokens = qa.count_example_tokens(BYTES, record["input"], (record["answer"],))
            assert length - 120 < tokens <= length  # a line of noise is 91 bytes
            assert all(record["answer"].count(part) == 1 for part in record["outputs"])
    assert short[0] == questions(probe, 4096)[0] != questions(probe, 4096, seed=1)[0]
    assert short[0]["input"] != questions(probe, 4096, split="train")[0]["input"]


def test_what_is_trained_is_the_complete_answer():
    record = questions("niah_multivalue", 900)[1]
    example = qa.training_example(record, tokenizer=BYTES, length=900)
    trained = bytes(example["tokens"][1:][example["weights"] > 0].astype(np.uint8))
    assert trained.decode() == f" {', '.join(record['outputs'])}\0"
    single = questions("niah_single", 900)
    assert [single[index]["depth"] for index in range(4)] == [0.0, 0.5, 1.0, 0.0]
    assert single[2]["input"][single[2]["passage"] :].startswith("One of the special")
    drawn = {round(questions("niah_single", 900, split="train")[index]["depth"], 3) for index in range(6)}
    assert len(drawn) == 6


def test_short_prompts_need_no_instructions():
    assert "I will quiz you" not in questions("passkey", 256, instructions=False)[0]["input"]
    with pytest.raises(
        InputError, match="fits 200 tokens: the smallest workable length is 2.., or less with data.instr"
    ):
        questions("passkey", 200)
