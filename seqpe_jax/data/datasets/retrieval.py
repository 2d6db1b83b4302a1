"""Probes of long contexts: something is said once in a long text, and asked for at its end; made on the fly, at any length.

Passkey (Mohtashami and Jaggi, arXiv 2305.16300), the tasks of RULER (Hsieh et al., arXiv 2404.06654) that need no corpus,
multi-query associative recall (Arora et al., arXiv 2312.04927) and induction heads (Olsson et al., arXiv 2209.11895; as a test,
Fu et al., arXiv 2212.14052). Prompts of passkey and RULER have the authors' words, so that figures compare; RULER's essays
are replaced by its repeated sentences. The other two are given a form in words, for any tokenizer. Each prompt is a
function of seed, split and number, and the same at every length but for what is said in between.
"""

import dataclasses
import itertools
import string
from collections.abc import Callable, Sequence

import numpy as np

from seqpe_jax.errors import InputError

VERSION = 1  # of the prompts
NAME = "retrieval"  # of the data set
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = (
    "able bold calm dark eager fair glad huge idle keen loud mild neat odd pale quiet rapid sharp tame vast".split()
)
NOUNS = (
    "apple bridge candle desert engine forest garden hammer island jacket kettle lantern mirror needle orchard".split()
)
SYLLABLES = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
NUM_KEYS = 4  # of niah_multikey, niah_multivalue, niah_multiquery and mqar
HOPS = 4  # of vt
COMMON, COMMON_TIMES, UNCOMMON_TIMES = 10, 30, 3  # of cwe
ZETA = 2.0  # exponent of the frequencies of fwe
MIXED = ("passkey", "niah_single", "mqar", "induction")  # probes that fit into 256 bytes without their instructions
FREQUENT, DOTS = 3, "...."  # words that fwe asks for, and the most frequent of all, which does not count


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt in parts.

    Attributes:
      instructions: text before the context; may be left out.
      context: the long text.
      question: its end.
      answers: all that a complete answer says, in order.
      gold: character of the context at which what is asked for begins; None = it is in several places.
    """

    instructions: str
    context: str
    question: str
    answers: tuple[str, ...]
    gold: int | None = None


Probe = Callable[[np.random.Generator, int, float], Prompt]  # (generator, units of filler, depth) -> prompt


def _haystack(size: int, needles: Sequence[tuple[float, str]], separator: str = "\n") -> tuple[str, int]:
    """Returns noise with needles at depths in 0..1, and the character at which the first needle given begins."""
    places = sorted((round(depth * size), number) for number, (depth, _) in enumerate(needles))
    lines, first = [NOISE] * size, 0
    for added, (place, number) in enumerate(places):
        lines.insert(place + added, needles[number][1])
        first = place + added if number == 0 else first
    return separator.join(lines), sum(len(line) + len(separator) for line in lines[:first])


def passkey(rng: np.random.Generator, size: int, depth: float) -> Prompt:
    """A number among repeated sentences."""
    key = int(rng.integers(1, 50001))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    context, gold = _haystack(size, [(depth, needle)])
    return Prompt(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about "
        "the important information there.",
        context,
        "What is the pass key? The pass key is",
        (str(key),),
        gold,
    )


def _niah(keys: int, values: int, queries: int) -> Probe:
    """Returns RULER's needles in a haystack: `values` numbers for each of `keys` keys, of which `queries` are asked for."""

    def make(rng: np.random.Generator, size: int, depth: float) -> Prompt:
        chosen = rng.permutation(len(ADJECTIVES) * len(NOUNS))[:keys].tolist()
        names = [f"{ADJECTIVES[number % len(ADJECTIVES)]}-{NOUNS[number // len(ADJECTIVES)]}" for number in chosen]
        numbers = rng.integers(10**6, 10**7, (keys, values)).tolist()
        needles = [
            (float(rng.random()), f"One of the special magic numbers for {name} is: {number}.")
            for name, own in zip(names, numbers, strict=True)
            for number in own
        ]
        one = queries == values == 1
        if one:
            needles[0] = (depth, needles[0][1])
        context, gold = _haystack(size, needles)
        asked = " and ".join(filter(None, [", ".join(names[: queries - 1]), names[queries - 1]]))
        what = f"special magic number{'' if one else 's'} for {asked} mentioned in the provided text"
        question = f"What is the {what}? The {what} is" if one else f"What are all the {what}? The {what} are"
        return Prompt(
            f"{'A special magic number is' if one else 'Some special magic numbers are'} hidden within the following text. Make "
            f"sure to memorize it. I will quiz you about the {'number' if one else 'numbers'} afterwards.",
            context,
            question,
            tuple(str(number) for own in numbers[:queries] for number in own),
            gold if one else None,
        )

    return make


def variable_tracking(rng: np.random.Generator, size: int, depth: float) -> Prompt:
    """RULER's vt: a number is assigned to a variable, that to another one, and so on; all of them are asked for."""
    del depth
    names: list[str] = []
    while len(names) <= HOPS:
        name = _letters(rng, 5, string.ascii_uppercase)
        names += [name] * (name not in names)
    value = int(rng.integers(10000, 100000))
    assigned = [str(value), *(f"VAR {name}" for name in names)]
    lines = [f"VAR {name} = {to}" for name, to in zip(names, assigned, strict=False)]
    context, _ = _haystack(size, list(zip(sorted(rng.random(len(lines)).tolist()), lines, strict=True)))
    return Prompt(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.",
        context,
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) "
        f"of variable assignment in the text above, {len(names)} variables are assigned the value {value}, they are:",
        tuple(names),
    )


def common_words(rng: np.random.Generator, size: int, depth: float) -> Prompt:
    """RULER's cwe: the ten words of a list that come thirty times, among `size` that come three times."""
    del depth
    words = _distinct_words(rng, COMMON + size)
    listed = words[:COMMON] * COMMON_TIMES + words[COMMON:] * UNCOMMON_TIMES
    order = rng.permutation(len(listed)).tolist()
    return Prompt(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
        "often.",
        " ".join(f"{number}. {listed[index]}" for number, index in enumerate(order, 1)),
        "Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in the "
        "list are:",
        tuple(words[:COMMON]),
    )


def frequent_words(rng: np.random.Generator, size: int, depth: float) -> Prompt:
    """RULER's fwe: the three most frequent of coded words with a zeta distribution, whose first is dots."""
    del depth
    total = 40 + size
    shares = np.arange(1, total + 1) ** -ZETA
    counts = np.rint(total * shares / shares.sum()).astype(int)
    counts[1 : 2 + FREQUENT] += np.arange(FREQUENT + 1)[
        ::-1
    ]  # no two of the first are equal, however short the text is
    counts = counts[counts > 0]
    coded = [DOTS, *_distinct_words(rng, len(counts) - 1)]
    text = [word for word, count in zip(coded, counts.tolist(), strict=True) for _ in range(count)]
    return Prompt(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
        "words.",
        " ".join(text[index] for index in rng.permutation(len(text)).tolist()),
        f"Question: Do not provide any explanation. Please ignore the dots '{DOTS}'. What are the three most frequently appeared "
        "words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(coded[1 : 1 + FREQUENT]),
    )


def associative_recall(rng: np.random.Generator, size: int, depth: float) -> Prompt:
    """MQAR: as many pairs of a key and a value as fit; some keys, and their values, are asked for."""
    del depth
    values: dict[str, int] = {}
    while len(values) < NUM_KEYS:
        values.setdefault(_letters(rng, 3, string.ascii_lowercase), int(rng.integers(100, 1000)))
    for _ in range(size):
        values.setdefault(_letters(rng, 3, string.ascii_lowercase), int(rng.integers(100, 1000)))
    pairs = [f"{key}={value}" for key, value in values.items()]
    order, wanted = rng.permutation(len(pairs)).tolist(), pairs[:NUM_KEYS]
    return Prompt(
        "Memorize the values of the following keys.",
        " ".join(pairs[index] for index in order),
        f"Repeat the pairs of {' '.join(pair.partition('=')[0] for pair in wanted)}:",
        tuple(wanted),
    )


def induction(rng: np.random.Generator, size: int, depth: float) -> Prompt:
    """A mark comes once, before a word, among random letters; at its second time, at the end, the word is asked for."""
    word = _letters(rng, 4, string.ascii_lowercase)
    symbols = list(_letters(rng, size, string.ascii_lowercase))
    place = round(depth * size)
    context = " ".join([*symbols[:place], "#", word, *symbols[place:]])
    return Prompt("Continue the following text.", context, "#", (word,), 2 * place)


def mixed(rng: np.random.Generator, size: int, depth: float) -> Prompt:
    """One of the short probes, each as often as the others: a model that trains on them can be asked all four."""
    return MAKERS[MIXED[int(rng.integers(len(MIXED)))]](rng, size, depth)


def _letters(rng: np.random.Generator, count: int, alphabet: str) -> str:
    return "".join(alphabet[index] for index in rng.integers(0, len(alphabet), count).tolist())


def _distinct_words(rng: np.random.Generator, count: int) -> list[str]:
    """Words of three syllables, none of which occurs in another."""
    chosen = rng.permutation(len(SYLLABLES) ** 3)[:count].tolist()
    if count > len(chosen):
        raise InputError(f"this probe has {len(chosen)} words, and {count} are needed: choose a shorter length")
    base = len(SYLLABLES)
    return [SYLLABLES[n % base] + SYLLABLES[n // base % base] + SYLLABLES[n // base**2] for n in chosen]


MAKERS: dict[str, Probe] = {
    "passkey": passkey,
    "niah_single": _niah(1, 1, 1),
    "niah_multikey": _niah(NUM_KEYS, 1, 1),
    "niah_multivalue": _niah(1, NUM_KEYS, 1),
    "niah_multiquery": _niah(NUM_KEYS, 1, NUM_KEYS),
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
    "mqar": associative_recall,
    "induction": induction,
    "mixed": mixed,
}


class Retrieval:
    """The data set of one probe, whose questions `data.retrieval.RetrievalQuestions` makes."""

    name = NAME
