"""Questions on the standard library's source: found in their passage, hard to guess, at every length."""

import collections

import pytest

from seqpe_jax.data import qa
from seqpe_jax.data.datasets import stdlib_qa, stdlib_text
from seqpe_jax.data.datasets.qa_base import Question
from seqpe_jax.data.datasets.stdlib_qa import questions_of_file
from seqpe_jax.data.tokenizers import ByteTokenizer

SOURCE = '''
import os
from collections import deque as line, namedtuple

LIMIT_OF_ALL = 120
NAMES = {"first": b"one", "second": 2_000}

class Reader(Base, Other):
    size = "é"

    def read(self, path, mode='rb', *, encoding="utf8") -> Text:
        self.handle = open(path)
        for part in self.pieces():
            connect(part, timeout=7.5)
        if not path:
            raise OSError("no path")
        total = 3.5
        width = width + 1
        for line in lines_of(self):
            line.close()
        self.done()
        return self.handle

    def take(self):
        """Give what is left."""
        return 7

    def __init__(self):
        """Make ready for use."""
'''

EXPECTED = {
    ("import", "from collections import", "deque"),
    ("constant", "LIMIT_OF_ALL =", "120"),
    ("item", 'NAMES = {"first":', 'b"one"'),
    ("item", 'first": b"one", "second":', "2_000"),
    ("base", "class Reader(", "Base"),
    ("argument", "def read(self, path, mode=", "'rb'"),
    ("argument", "path, mode='rb', *, encoding=", '"utf8"'),
    ("annotation", 'rb\', *, encoding="utf8") ->', "Text"),
    ("attribute", "self.handle =", "open(path)"),
    ("iterated", "for part in", "self.pieces()"),
    ("keyword", "connect(part, timeout=", "7.5"),
    ("exception", "if not path:\n    raise", "OSError"),
    ("variable", "total =", "3.5"),
    ("returned", "self.done()\nreturn", "self.handle"),
    ("function", "Give what is left. def", "take"),
}


def test_every_question_type():
    found = list(questions_of_file("m.py", SOURCE.encode()))
    assert {(one.question_type, one.question, one.answers[0]) for one in found} == EXPECTED
    assert all(one.name == "m.py" and len(one.answers) == 1 for one in found)
    passages = {one.question: one.passage for one in found}
    raised = 'if not path:\n    raise OSError("no path")\ntotal = 3.5\nwidth = width + 1'
    assert passages["if not path:\n    raise"] == raised
    assert passages["total ="] == "total = 3.5\nwidth = width + 1\nfor line in lines_of(self):"
    assert passages["Give what is left. def"] == 'def take(self):\n    """Give what is left."""\n    return 7'


def test_what_does_not_parse_asks_nothing():
    assert list(questions_of_file("bad.py", b"def f(:\n")) == [] and list(questions_of_file("nul.py", b"x = 1\0")) == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache in which the data set is made of every third file of the standard library."""
    names = stdlib_text._names
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_text, "_names", lambda root: names(root)[::3])
        yield tmp_path_factory.mktemp("cache")


def source(cache, split="train", length=256):
    return qa.qa_source(
        "stdlib_qa", split=split, tokenizer=ByteTokenizer(), length=length, cache_dir=cache, progress=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("split", stdlib_qa.SPLITS)
def test_answers_follow_the_question(cache, split):
    found = source(cache, split, 2048)
    asked = list(found.questions())
    assert len(asked) == len(found) > {"train": 1500, "validation": 100, "test": 100}[split]
    assert found.skipped == {"without_answer": 0, "answer_not_in_text": 0, "too_long": 0}
    others = [one for other in stdlib_qa.SPLITS if other != split for one in source(cache, other).questions()]
    questions = {question for question, _, _ in asked}
    assert len(questions) == len(asked) and not questions & {question for question, _, _ in others}
    kinds = collections.Counter(kind for _, kind, _ in asked)
    assert len(kinds) >= 11 and max(kinds.values()) < 0.3 * len(asked) and kinds["function"] < 0.15 * len(asked)
    clues = collections.Counter()
    for index in range(0, len(found), len(found) // 60):
        record = found[index]
        *passages, question = record["input"].split(qa.PASSAGE_SEPARATOR)
        cue, (answer,) = question.removeprefix(">>> "), record["outputs"]
        assert question.startswith(">>> ") and record["question"] == question
        assert (
            answer.isascii() and 2 <= len(answer) <= 16 and len(cue) <= 32 and not stdlib_qa._is_guessable(cue, answer)
        )
        cue = cue.removesuffix(" def") if record["kind"] == "function" else cue
        gold = [passage for passage in passages if cue in passage]
        assert len(gold) == 1 and len(gold[0]) <= 72 and gold[0].count(cue) == 1
        if record["kind"] == "function":
            assert gold[0].startswith(f"def {answer}(")
        else:
            assert gold[0].partition(cue)[2].lstrip().startswith(answer), "it goes on with the answer"
        others = [passage for passage in passages if passage != gold[0]]
        clue = stdlib_qa.clue(question.removeprefix(">>> "))
        clues[question.removeprefix(">>> ").removesuffix(clue) == ""] += 1
        assert clue and question.endswith(clue) and not any(clue in passage for passage in others)
        assert len(others) > 15 and not any(stdlib_qa._has_word(passage, answer) for passage in others)
    assert 0.2 < clues[True] / sum(clues.values()) < 0.5, "a third of the questions must be read as a whole"


@pytest.mark.slow
def test_passages_are_unchanged_source(cache):
    found, files = source(cache, "test"), dict(stdlib_text.files()["test"])
    code = ["\n".join(line.strip() for line in text.decode().split("\n")) for text in files.values()]
    for index in range(0, len(found), 10):
        cue = found[index]["question"].removeprefix(">>> ")
        passage = next(
            part for part in found[index]["input"].split(qa.PASSAGE_SEPARATOR) if cue.removesuffix(" def") in part
        )
        assert found[index]["input"][found[index]["passage"] :].startswith(passage)
        assert any(answer in passage for answer in found[index]["outputs"]), "or its distance is not known"
        stripped = "\n".join(line.strip() for line in passage.split("\n"))
        assert any(stripped in text for text in code)


@pytest.mark.slow
@pytest.mark.parametrize("length", [128, 2048])
def test_lengths_in_bytes(cache, length):
    found = source(cache, "validation", length)
    assert found.skipped["too_long"] == 0
    for index in range(0, len(found), len(found) // 60):
        record = found[index]
        size = len(record["input"]) + 1 + len(record["outputs"][0]) + 1
        assert 0.975 * length <= size <= length
        assert qa.training_example(record, tokenizer=ByteTokenizer(), length=length)["tokens"][-1] == qa.BYTE_ANSWER_END


@pytest.mark.slow
def test_depths_cover_the_context(cache):
    found = source(cache, "validation", 2048)
    depths = [found[index]["depth"] for index in range(0, len(found), 2)]
    bins = collections.Counter(min(int(5 * depth), 4) for depth in depths)
    assert all(0.12 < bins[part] / len(depths) < 0.28 for part in range(5))


@pytest.mark.slow
def test_passage_must_be_read(cache):
    from seqpe_jax.tasks.metrics import no_context_baseline

    train = list(source(cache).questions())
    for split in ("validation", "test"):
        found = no_context_baseline(train, source(cache, split).questions())
        assert found["examples"] > 100 and found["contains"] < 10 and found["exact_match_strict"] < 10
    leaked = no_context_baseline(train, train)
    assert leaked["exact_match_strict"] > 99, "each question is asked once, so memory of its own split answers all"


def test_frequent_answers_and_large_tables_are_thinned_out():
    questions = []
    for name in "abcdefgh":
        table = "".join(f"x{name}{number} = {number % 3 + 10}\n" for number in range(1000))
        questions += questions_of_file(name, table.encode())
    selected = list(stdlib_qa._select(iter(questions), set()))
    assert len(questions) > 7000 and [one for one in questions if one in set(selected)] == selected
    answers = collections.Counter(one.answers[0] for one in selected)
    assert max(answers.values()) <= stdlib_qa.MAX_ANSWER_SHARE * len(questions) + 1
    assert max(collections.Counter(one.name for one in selected).values()) <= stdlib_qa.MAX_QUESTIONS_PER_FILE
    asked = {questions[0].question}
    assert list(stdlib_qa._select(iter(questions[:1]), asked)) == []
    assert len(list(stdlib_qa._select(iter(questions[1:100] * 2), asked))) == len(asked) - 1 > 1


def test_the_order_of_questions_is_that_of_all_versions():
    question = Question("a.py", "x = 1\ny = 2", "x =", "constant", ("1",))
    expected = r"Question(name='a.py', passage='x = 1\ny = 2', question='x =', kind='constant', answers=('1',))"
    assert stdlib_qa._identity(question) == expected
