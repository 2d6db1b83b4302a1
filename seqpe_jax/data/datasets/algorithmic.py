"""Algorithmic tasks: strings of symbols and the strings that follow from them, made on the fly, at any length.

The fifteen tasks of Deletang et al. (arXiv 2207.02098), as Ruoss et al. (arXiv 2305.16843) train and test them, and copy,
addition and sorting of Kazemnejad et al. (arXiv 2305.19466). Each example is a pure function of a seed, the task and its
length. Symbols are ASCII characters, so that examples can be read; those of the papers are digits, except operators, which
are written as such here.
"""

import dataclasses
import itertools
import json
import math
import operator
import string
import zlib
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.base import SPLITS, check_split
from seqpe_jax.data.datasets.image_base import fingerprint_of
from seqpe_jax.data.registry import window_of_task
from seqpe_jax.errors import InputError

MODULUS = 5  # of arithmetic; also the states of a cycle and the symbols to sort
END_OF_RESULT = "2"  # ends results whose length depends on more than the input's
PLACEHOLDER, EMPTY = "2", "3"  # of missing_duplicate
POP, PUSH_0, PUSH_1 = "234"
STEPS = "<.>"  # of cycle_navigation: back, stay, forward
COPIED = string.digits + string.ascii_lowercase + string.ascii_uppercase
SORTED = COPIED[:50]
BLANK = ord("?")  # in place of an output, in the encoder's form
SEPARATOR = ord("|")  # between input and output, in the decoder's form
END = 0  # after the output of the decoder's form, and padding
EPOCH = 2**30  # examples of the training split, more than any run reads

# --- Inputs at a length


def _draw(symbols: str) -> Callable[[np.random.Generator, int], str]:
    """Returns a function that draws strings of independent symbols."""

    def strings(rng: np.random.Generator, length: int) -> str:
        return "".join(symbols[index] for index in rng.integers(0, len(symbols), length).tolist())

    return strings


_bits, _residues, _decimals = _draw("01"), _draw(string.digits[:MODULUS]), _draw(string.digits)


def _arithmetic(rng: np.random.Generator, length: int) -> str:
    """Draws digits with operators between them; of even lengths one symbol less."""
    operators = _draw("+-*")(rng, (length - 1) // 2)
    numbers = _residues(rng, len(operators) + 1)
    return numbers[0] + "".join(map("".join, zip(operators, numbers[1:], strict=True)))


def _expression(rng: np.random.Generator, length: int, operators: str = "+-*") -> str:
    """Draws d, -d, (d) or (-d), or two expressions and an operator in brackets."""
    if length < 5:
        digit = _residues(rng, 1)
        return ("", digit, f"-{digit}", f"({digit})", f"(-{digit})")[length]
    left = int(rng.integers(1, length - 3))
    sign = _draw(operators)(rng, 1)
    return f"({_expression(rng, left, operators)}{sign}{_expression(rng, length - 3 - left, operators)})"


def _equation(rng: np.random.Generator, length: int) -> str:
    """Draws an expression of which a digit is x, and its value; zeros below three symbols."""
    if length < 3:
        return "0" * length
    expression = _expression(rng, length - 2, "+-")
    index = int(rng.integers(0, len(expression)))
    while not expression[index].isdigit():
        index = (index + 1) % len(expression)
    return f"{expression[:index]}x{expression[index + 1 :]}={value_of(expression)}"


def _stack_and_actions(rng: np.random.Generator, length: int) -> str:
    depth = int(rng.integers(1, length)) if length > 1 else 1
    return _bits(rng, depth) + _draw(POP + PUSH_0 + PUSH_1)(rng, length - depth)


def _with_gap(rng: np.random.Generator, length: int) -> str:
    """Draws a string, written twice, with a placeholder for a symbol; an odd length ends with the empty symbol."""
    if length == 1:
        return "1"
    text = 2 * _bits(rng, length // 2)
    index = int(rng.integers(0, len(text)))
    return text[:index] + PLACEHOLDER + text[index + 1 :] + EMPTY * (length % 2)


def _positive(rng: np.random.Generator, length: int) -> str:
    """Draws a binary number above 0."""
    bits = _bits(rng, length)
    while "1" not in bits:
        bits = _bits(rng, length)
    return bits


def _operands(sign: str) -> Callable[[np.random.Generator, int], str]:
    """Returns a function that draws two binary numbers above 0; a single number below three symbols, not all ones."""

    def strings(rng: np.random.Generator, length: int) -> str:
        if length < 3:
            return f"{rng.integers(0, 2**length - 1):b}".zfill(length)[::-1]
        digits = int(rng.integers(1, length - 1))
        return _positive(rng, digits) + sign + _positive(rng, length - 1 - digits)

    return strings


def _decimal_operands(rng: np.random.Generator, length: int) -> str:
    """Draws two decimal numbers without leading zeros: one has so many digits, the other at most as many."""
    digits = [length, int(rng.integers(1, length + 1))]
    return "+".join(
        str(rng.integers(digits[index] > 1, 10)) + _decimals(rng, digits[index] - 1) for index in rng.permutation(2)
    )


# --- Outputs


def value_of(expression: str) -> int:
    """Returns the value modulo 5 of an expression of digits with +, -, * and brackets; products are computed first."""
    return _sum(expression, 0)[0] % MODULUS


def _sum(text: str, start: int) -> tuple[int, int]:
    """Value of the sum that starts at an index, and the index after it."""
    value, index = _product(text, start)
    while index < len(text) and text[index] in "+-":
        term, after = _product(text, index + 1)
        value, index = (value + term if text[index] == "+" else value - term), after
    return value, index


def _product(text: str, start: int) -> tuple[int, int]:
    value, index = _factor(text, start)
    while index < len(text) and text[index] == "*":
        factor, index = _factor(text, index + 1)
        value *= factor
    return value % MODULUS, index


def _factor(text: str, start: int) -> tuple[int, int]:
    if text[start] == "-":
        value, index = _factor(text, start + 1)
        return -value, index
    if text[start] == "(":
        value, index = _sum(text, start + 1)
        return value, index + 1
    return int(text[start]), start + 1


def _solution(equation: str) -> str:
    """The digit that x stands for; 0 in a string without an equation."""
    expression, _, value = equation.partition("=")
    return next((digit for digit in "01234" if value and value_of(expression.replace("x", digit)) == int(value)), "0")


def _final_stack(text: str) -> str:
    """The stack after the actions, top first; nothing can be popped from an empty one."""
    stack = ""
    for symbol in text:
        stack = stack[:-1] if symbol == POP else stack + {PUSH_0: "0", PUSH_1: "1"}.get(symbol, symbol)
    return _terminated(stack[::-1], len(text) + 1)


def _missing_symbol(text: str) -> str:
    if PLACEHOLDER not in text:
        return text
    index, half = text.index(PLACEHOLDER), len(text) // 2
    return text[(index + half) % (2 * half)]


def _binary_result(sign: str, compute: Callable[[int, int], int]) -> Callable[[str], str]:
    """Returns a function that computes with numbers whose lowest digit comes first."""

    def result(text: str) -> str:
        length = len(text) + (sign == "+")
        if sign not in text:  # of one or two symbols
            return _terminated(f"{int(text[::-1], 2):b}"[::-1] if sign == "+" else "0" * (len(text) - 1), length)
        first, second = (int(number[::-1], 2) for number in text.split(sign))
        return _terminated(f"{compute(first, second):b}"[::-1], length)

    return result


def _terminated(result: str, length: int) -> str:
    """A result with its end, and zeros up to a length."""
    return (result + END_OF_RESULT).ljust(length, "0")


def _unequal_neighbors(text: str) -> int:
    return sum(first != second for first, second in itertools.pairwise(text))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A task.

    Attributes:
      draw: (generator of random numbers, length) -> input.
      solve: input -> output.
    """

    draw: Callable[[np.random.Generator, int], str]
    solve: Callable[[str], str]


RULES = {
    # Regular languages: is the number of 01 and 10, or of 1, odd? The state of a cycle after steps; the value modulo 5.
    "even_pairs": Rule(_bits, lambda text: str(_unequal_neighbors(text) % 2)),
    "parity_check": Rule(_bits, lambda text: str(text.count("1") % 2)),
    "cycle_navigation": Rule(_draw(STEPS), lambda text: str((text.count(STEPS[2]) - text.count(STEPS[0])) % MODULUS)),
    "modular_arithmetic": Rule(_arithmetic, lambda text: str(value_of(text))),
    # Context-free languages.
    "stack_manipulation": Rule(_stack_and_actions, _final_stack),
    "reverse_string": Rule(_bits, lambda text: text[::-1]),
    "modular_arithmetic_brackets": Rule(_expression, lambda text: str(value_of(text))),
    "solve_equation": Rule(_equation, _solution),
    # Context-sensitive languages; sums and products have the lowest digit first, square roots the highest.
    "duplicate_string": Rule(_bits, lambda text: 2 * text),
    "missing_duplicate": Rule(_with_gap, _missing_symbol),
    "odds_first": Rule(_bits, lambda text: text[::2] + text[1::2]),
    "binary_addition": Rule(_operands("+"), _binary_result("+", operator.add)),
    "binary_multiplication": Rule(_operands("*"), _binary_result("*", operator.mul)),
    "compute_sqrt": Rule(_positive, lambda text: f"{math.isqrt(int(text, 2)):b}".zfill((len(text) + 1) // 2)),
    "bucket_sort": Rule(_residues, lambda text: "".join(sorted(text))),
    # Kazemnejad et al.; the length of a sum is the number of digits of its larger operand.
    "copy": Rule(_draw(COPIED), lambda text: text),
    "addition": Rule(_decimal_operands, lambda text: str(sum(map(int, text.split("+"))))),
    "sorting": Rule(_draw(SORTED), lambda text: "".join(sorted(text, key=SORTED.index))),
}
# Whose results end with `END_OF_RESULT`; zeros after it are trained, as the authors do, and not scored.
TERMINATED = ("stack_manipulation", "binary_addition", "binary_multiplication")


@dataclasses.dataclass(frozen=True)
class Algorithmic:
    """Examples of a task in one form, a function of split, seed, length and number.

    In the encoder's form a blank stands for each output, and attention is in both directions (Ruoss et al.); in the
    decoder's form input, separator and output are read from left to right, each symbol from those before it.

    Attributes:
      task: one of `registry.ALGORITHMIC_TASKS`.
      form: "encoder" or "decoder".
      seed: seed of the training examples; those of the other splits have none.
    """

    name = "algorithmic"
    VERSION = tfds.core.Version("1.0.0")

    task: str
    form: str
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses a task that there is not. Raises: InputError."""
        if self.task not in RULES:
            raise InputError(f"data.task='{self.task}' is none of {', '.join(RULES)}")

    def fingerprint(self, split: str) -> str:
        """Returns hex digits, equal for equal examples; those of training depend on the seed."""
        check_split(split)
        return fingerprint_of(self.name, str(self.VERSION), self.task, self.form, split, self.seed * (split == "train"))

    def sample(self, split: str, length: int, number: int) -> tuple[str, str]:
        """Returns (input, output) of an example.

        Args:
          split: "train", "validation" or "test".
          length: length of the task, at least 1.
          number: number of the example.
        """
        seed = self.seed if split == "train" else 0
        words = (seed, SPLITS.index(split), zlib.crc32(self.task.encode()), length, number)
        rule = RULES[self.task]
        text = rule.draw(np.random.default_rng(words), length)
        return text, rule.solve(text)

    def example(self, split: str, length: int, number: int, window: int) -> dict[str, np.ndarray]:
        """Returns an example, padded to a window.

        Args:
          split, length, number: as in `sample`.
          window: W, at least that of the length.

        Returns:
          {"tokens": int32[W], "targets": int32[W], "weights": float32[W] of the loss, whose sum is 1, "scored": bool[W], the
          outputs that count, "required": bool[W], those which must be right in an exact match}, in the encoder's form with
          "padding": bool[W].
        """
        text, output = self.sample(split, length, number)
        counted = output.index(END_OF_RESULT) + 1 if self.task in TERMINATED else len(output)
        given, result = (np.frombuffer(part.encode(), np.uint8).astype(np.int32) for part in (text, output))
        if self.form == "encoder":
            tokens, targets = np.append(given, np.full(len(result), BLANK)), np.append(given, result)
            first, trained, required = len(given), len(result), counted
        else:
            sequence = np.concatenate([given, [SEPARATOR], result[:counted], [END]])
            tokens, targets = sequence[:-1], sequence[1:]
            first, trained, required = len(given), counted + 1, counted + 1
        indices = np.arange(window) - first
        made = {
            "tokens": _padded_ids(tokens, window),
            "targets": _padded_ids(targets, window),
            "weights": ((indices >= 0) & (indices < trained)).astype(np.float32) / np.float32(trained),
            "scored": (indices >= 0) & (indices < counted),
            "required": (indices >= 0) & (indices < required),
        }
        return made | ({"padding": np.arange(window) >= len(tokens)} if self.form == "encoder" else {})


def _padded_ids(ids: np.ndarray, window: int) -> np.ndarray:
    return np.pad(ids, (0, window - len(ids)), constant_values=END).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TrainingExamples:
    """Training examples in Grain's sense, each of a length from 1 to `longest` with equal probability.

    Attributes:
      examples: the task.
      longest: largest length.
    """

    examples: Algorithmic
    longest: int

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        own = self.examples
        length = int(np.random.default_rng((own.seed, int(index))).integers(1, self.longest + 1))
        window = window_of_task(own.task, own.form, self.longest)
        made = own.example("train", length, int(index), window)
        return {name: array for name, array in made.items() if name not in ("scored", "required")}


@dataclasses.dataclass(frozen=True)
class HeldOutExamples:
    """Examples of a split in Grain's sense, in turn of each length of a range.

    Attributes:
      examples: the task.
      split: "validation" or "test".
      lengths: the lengths.
      count: number of examples.
    """

    examples: Algorithmic
    split: str
    lengths: range
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        round_, place = divmod(int(index), len(self.lengths))
        length, own = self.lengths[place], self.examples
        window = window_of_task(own.task, own.form, self.lengths[-1])
        made = own.example(self.split, length, round_, window) | {"length": np.int32(length)}
        return {name: array for name, array in made.items() if name != "weights"}  # those of a batch are of its rows


def describe(examples: Algorithmic, length: int) -> str:
    """Returns a training example of a length in words."""
    return " -> ".join(map(json.dumps, examples.sample("train", length, 0)))
