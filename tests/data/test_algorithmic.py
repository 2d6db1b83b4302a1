"""Algorithmic tasks against hand-made cases of the papers' definitions, and their examples in both forms."""

import numpy as np
import pytest

from seqpe_jax.data.datasets.algorithmic import RULES, Algorithmic, HeldOutExamples, TrainingExamples
from seqpe_jax.data.registry import ALGORITHMIC_TASKS, window_of_task
from seqpe_jax.errors import InputError

# Worked out by hand from the definitions of arXiv 2207.02098 and 2305.19466.
CASES = {
    "even_pairs": {"001110": "0", "0101001": "1", "1": "0", "10": "1"},
    "parity_check": {"1010100": "1", "01111": "0"},
    "cycle_navigation": {"><.<<": "3", ">>><": "2", "<": "4", ".": "0"},
    "modular_arithmetic": {"1+2*3": "2", "1-1-1": "4", "0*1+4*3-2": "0", "4": "4", "2-3*4": "0", "1-2*3-4": "1"},
    "stack_manipulation": {"0110422": "11020000", "110222": "2000000", "0222": "20000", "0223": "02000", "1": "12"},
    "reverse_string": {"011010": "010110", "1": "1"},
    "modular_arithmetic_brackets": {"((2*3)-4)": "2", "(-3)": "2", "-1": "4", "(4*(4*4))": "4", "(1-(2-3))": "2"},
    "solve_equation": {"(x+2)=0": "3", "x=4": "4", "((1-x)+3)=2": "2", "(1-(2-x))=0": "1", "00": "0"},
    "duplicate_string": {"101": "101101", "111111": "111111111111"},
    "missing_duplicate": {"01100210": "1", "1011213": "0", "1": "1", "20": "0", "12": "1"},
    "odds_first": {"00110101": "01000111", "110": "101"},
    "binary_addition": {
        "001+01101": "0101120000",
        "1001+000001": "100101200000",
        "1+1": "0120",
        "01": "012",
        "0": "02",
    },
    "binary_multiplication": {
        "001*01101": "000110120",
        "1001*000001": "00000100120",
        "1*1": "120",
        "0": "2",
        "10": "02",
    },
    "compute_sqrt": {"100101": "110", "111": "10", "0001": "01", "1": "1"},
    "bucket_sort": {"10204112": "00111224", "1110001": "0001111"},
    "copy": {"dog7": "dog7"},
    "addition": {"53726+1917": "55643", "9+9": "18", "0+5": "5"},
    "sorting": {"31415": "11345", "Bb0A": "0bAB"},
}


@pytest.mark.parametrize("task", RULES)
def test_outputs_are_those_of_the_definitions(task):
    assert {text: RULES[task].solve(text) for text in CASES[task]} == CASES[task]


@pytest.mark.parametrize("task", ALGORITHMIC_TASKS)
def test_inputs_have_the_length_and_outputs_fit(task):
    """The table that configs read says the sizes that examples have; every length can be drawn, far beyond training."""
    given, output = ALGORITHMIC_TASKS[task]
    for length in (1, 2, 3, 4, 5, 9, 40, 500):
        text, result = Algorithmic(task, "decoder").sample("test", length, 0)
        exact = task not in ("addition",)
        assert len(text) == given(length) if exact else len(text) <= given(length)
        assert len(result) == output(length) if exact else len(result) <= output(length)
    drawn = [Algorithmic(task, "decoder").sample("test", 9, number) for number in range(64)]
    # No output dominates, so that guessing does not pay: at most three quarters of 64 are the most frequent one.
    assert max([result for _, result in drawn].count(result) for _, result in drawn) <= 48
    assert len({text for text, _ in drawn}) > 30


def test_inputs_have_the_symbols_of_their_task():
    """Brackets match, one digit of an equation is x, operands are positive and roots have a nonzero radicand."""
    texts = {
        task: [Algorithmic(task, "encoder").sample("test", 12, number)[0] for number in range(40)] for task in RULES
    }
    assert all(text.count("x") == 1 == text.count("=") for text in texts["solve_equation"])
    assert not any("*" in text for text in texts["solve_equation"])
    assert any("*" in text for text in texts["modular_arithmetic_brackets"])
    assert all(text.count("(") == text.count(")") for text in texts["modular_arithmetic_brackets"])
    assert all("1" in number for text in texts["binary_addition"] for number in text.split("+"))
    assert all("1" in text for text in texts["compute_sqrt"])
    assert {text[0] in "01" and set(text) <= set("01234") for text in texts["stack_manipulation"]} == {True}
    assert {len(max(text.split("+"), key=len)) for text in texts["addition"]} == {12}


def test_examples_are_functions_of_seed_split_and_number():
    own = Algorithmic("bucket_sort", "decoder", seed=1)
    assert own.sample("train", 20, 5) == Algorithmic("bucket_sort", "decoder", seed=1).sample("train", 20, 5)
    assert own.sample("train", 20, 5) != Algorithmic("bucket_sort", "decoder", seed=2).sample("train", 20, 5)
    assert own.sample("test", 20, 5) == Algorithmic("bucket_sort", "encoder", seed=2).sample("test", 20, 5)
    assert len({own.sample(split, 20, 5) for split in ("train", "validation", "test")}) == 3
    assert own.sample("train", 20, 5)[0] == "33041232133023221221"  # in every version: studies compare runs
    with pytest.raises(InputError, match="data.task='parity' is none of even_pairs, "):
        Algorithmic("parity", "decoder")


def short_stack(form):
    """The number of an example whose result ends with zeros."""
    task = Algorithmic("stack_manipulation", form)
    return next(number for number in range(50) if task.sample("test", 6, number)[1].endswith("200"))


def test_the_decoder_reads_outputs_from_left_to_right():
    """Zeros after a result's end are left out; the end of the string is trained, and needed in an exact match."""
    number = short_stack("decoder")
    example = Algorithmic("stack_manipulation", "decoder").example("test", 6, number, 20)
    text, output = Algorithmic("stack_manipulation", "decoder").sample("test", 6, number)
    result = output[: output.index("2") + 1]
    whole = f"{text}|{result}\0".encode()
    assert bytes(example["tokens"][: len(whole) - 1].astype(np.uint8)) == whole[:-1]
    trained = np.flatnonzero(example["weights"])
    assert bytes(example["targets"][trained].astype(np.uint8)) == f"{result}\0".encode()
    assert trained[0] == len(text) and example["weights"].sum() == pytest.approx(1)
    assert example["scored"].sum() == len(result) == example["required"].sum() - 1
    assert not example["tokens"][len(whole) :].any() and "padding" not in example


def test_the_encoder_reads_outputs_at_blanks():
    number = short_stack("encoder")
    example = Algorithmic("stack_manipulation", "encoder").example("test", 6, number, 20)
    text, output = Algorithmic("stack_manipulation", "encoder").sample("test", 6, number)
    assert bytes(example["tokens"][:13].astype(np.uint8)) == f"{text}{'?' * 7}".encode()
    assert bytes(example["targets"][6:13].astype(np.uint8)) == output.encode()
    assert np.flatnonzero(example["weights"]).tolist() == list(range(6, 13))  # zeros after the end too, as the authors
    assert example["scored"].sum() == output.index("2") + 1 == example["required"].sum()
    assert example["padding"].tolist() == [False] * 13 + [True] * 7


def test_training_lengths_are_uniform_and_held_out_ones_take_turns():
    window = window_of_task("duplicate_string", "decoder", 40)
    assert window == 121
    source = TrainingExamples(Algorithmic("duplicate_string", "decoder"), 40)
    lengths = [int(np.flatnonzero(source[index]["weights"])[0]) for index in range(800)]
    assert source[0].keys() == {"tokens", "targets", "weights"} and source[0]["tokens"].shape == (window,)
    counts = np.bincount(lengths, minlength=41)
    assert counts[0] == 0 and counts[1:].min() > 5 and counts[1:].max() < 45
    held_out = HeldOutExamples(Algorithmic("duplicate_string", "decoder"), "test", range(41, 44), 7)
    assert [int(held_out[index]["length"]) for index in range(7)] == [41, 42, 43, 41, 42, 43, 41]
    shorter = HeldOutExamples(Algorithmic("duplicate_string", "decoder"), "test", range(43, 44), 2)
    np.testing.assert_array_equal(shorter[1]["tokens"], held_out[5]["tokens"])  # whatever lengths are read with it
