"""SQuAD's questions at any length: splits, prompts of the asked length, what is skipped, and bad files."""

import copy
import gzip
import hashlib
import json

import numpy as np
import pyarrow.parquet
import pytest

from seqpe_jax.data import qa
from seqpe_jax.data.datasets import qa_jsonl, qa_rows, squad_long
from seqpe_jax.data.datasets.squad_long import SquadLong
from seqpe_jax.data.tokenizers import ByteTokenizer
from seqpe_jax.errors import InputError
from seqpe_jax.tasks import metrics
from tests.tiny import ROOT

BYTES = ByteTokenizer()


def article(number, paragraphs=3):
    """An article whose paragraphs name one year each, unlike any other's; one question a paragraph."""
    found = []
    for place in range(paragraphs):
        year = str(1000 + 10 * number + place)
        text = f"Town {number}.{place} was built in {year} by people who came from far away and liked the hills there."
        answers = [{"text": year, "answer_start": text.index(year)}]
        asked = {"id": year, "question": f"When was town {number}.{place} built?", "answers": answers}
        found.append({"context": text, "qas": [asked]})
    return {"title": f"Title {number}", "paragraphs": found}


def squad(*numbers):
    return {"version": "1.1", "data": [article(number) for number in numbers]}


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def source(folder, path, split="train", length=512, tokenizer=BYTES, **options):
    return qa.qa_source(
        "squad_long",
        split=split,
        tokenizer=tokenizer,
        length=length,
        paths=(str(path),),
        cache_dir=folder / "cache",
        progress=False,
        **options,
    )


def count_example_tokens(record, tokenizer):
    longest = max(len(tokenizer.encode(f" {answer}".encode())) for answer in record["outputs"])
    return len(tokenizer.encode(record["input"].encode())) + longest + 1


def parts(record):
    """Returns (passages, the question's part) of a prompt."""
    *passages, question = record["input"].split(qa.PASSAGE_SEPARATOR)
    return passages, question


def titles(folder, paths):
    builder = SquadLong(paths=paths, data_dir=folder)
    builder.prepare(progress=False)
    builder = SquadLong(paths=paths, data_dir=folder)
    return {
        split: {row["name"].decode() for row in builder.as_data_source(split=split)} for split in builder.info.splits
    }


def test_one_file_is_split_by_article(tmp_path):
    found = titles(tmp_path / "d", (written(tmp_path / "one.json", squad(*range(30))),))
    assert {split: len(names) for split, names in found.items()} == {"train": 24, "validation": 3, "test": 3}
    assert set.union(*found.values()) == {f"Title {number}" for number in range(30)}
    twice = titles(tmp_path / "e", (written(tmp_path / "two.json", squad(*reversed(range(30)), 7)),))
    assert twice == found, "neither order nor an article that comes twice changes the splits"


def test_folder_of_train_and_dev(tmp_path):
    (tmp_path / "s").mkdir()
    written(tmp_path / "s" / "train-v1.1.json", squad(*range(10)))
    written(tmp_path / "s" / "dev-v1.1.json", squad(*range(10, 17)))
    found = titles(tmp_path / "d", (tmp_path / "s",))
    assert found["train"] == {f"Title {number}" for number in range(10)}
    assert sorted(map(len, (found["validation"], found["test"]))) == [3, 4]
    assert found["validation"] | found["test"] == {f"Title {number}" for number in range(10, 17)}


def test_prompt_answers_and_kind(tmp_path):
    content = squad(*range(12))
    asked = content["data"][3]["paragraphs"][1]["qas"][0]
    asked["question"] = "  By whom was it built?"
    asked["answers"] = [{"text": text} for text in ("people", " hills ", "people", "1031", "not there")]
    found = source(tmp_path, written(tmp_path / "one.json", content), length=700)
    record = next(found[index] for index in range(len(found)) if "By whom" in found[index]["question"])
    passages, question = parts(record)
    assert question == record["question"] == "Question: By whom was it built?\nAnswer:"
    assert record["outputs"] == ("people", "hills", "1031") and record["kind"] == "whom"
    assert record["depth"] == 0.0 and len(passages) == 1, "the others hold 'people' and 'hills'"
    assert any(len(parts(found[index])[0]) > 4 for index in range(len(found)))


def used(passages, texts):
    """Returns the text that each passage is, or begins."""
    return [next(text for text in texts if text.startswith(passage)) for passage in passages]


def test_no_passage_twice_before_all_were_used(tmp_path):
    path = written(tmp_path / "one.json", squad(*range(12)))
    texts = [item["context"] for number in range(12) for item in article(number)["paragraphs"]]
    found = source(tmp_path, path, "train", length=1500)  # of 30 passages of 93 bytes
    for index in range(len(found)):
        names = used(parts(found[index])[0], texts)
        assert 12 <= len(names) == len(set(names))
    found = source(tmp_path, path, "test", length=1500)  # of 3 passages
    assert len(found) == 3
    for index in range(3):
        record = found[index]
        passages, _ = parts(record)
        assert 0.98 * 1500 <= count_example_tokens(record, BYTES) <= 1500
        names = used(passages, texts)
        gold = next(name for name in names if record["outputs"][0] in name)
        others = [name for name in names if name != gold]
        assert names.count(gold) == 1 and len(others) > 10 and len(set(others)) == 2
        for count in range(1, len(others)):
            counts = [others[:count].count(name) for name in set(others)]
            assert max(counts) - min(counts) <= 1, "they come round after round"


@pytest.mark.parametrize("length", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_real_questions_and_tokenizer(tmp_path_factory, shared_data, gpt2_tokenizer, length):
    folder = tmp_path_factory.getbasetemp() / "xquad"
    folder.mkdir(exist_ok=True)
    tokenizer = gpt2_tokenizer
    path = shared_data / "xquad" / "xquad.en.json"
    texts = {item["context"].strip() for one in json.loads(path.read_text())["data"] for item in one["paragraphs"]}
    found, again = (source(folder, path, length=length, tokenizer=tokenizer) for _ in range(2))
    other = source(folder, path, length=length, tokenizer=tokenizer, seed=1)
    assert sum(len(source(folder, path, split, 8192, tokenizer)) for split in ("train", "validation", "test")) == 1190
    differ = 0
    for index in np.linspace(0, len(found) - 1, 12).astype(int).tolist():
        record = found[index]
        assert record == again[index] and record["index"] == index
        differ += record["input"] != other[index]["input"]
        assert 0.98 * length <= count_example_tokens(record, tokenizer) <= length
        passages, question = parts(record)
        whole = [passage for passage in passages if passage in texts]
        gold = [passage for passage in passages if any(answer in passage for answer in record["outputs"])]
        assert len(gold) == 1 and gold[0] in texts, "the gold passage stands there whole, once"
        assert record["input"][record["passage"] :].startswith(gold[0])
        rest = "\n\n".join(passage for passage in passages if passage != gold[0]).lower()
        assert not any(answer.lower() in rest for answer in record["outputs"])
        assert len(whole) >= len(passages) - 2, "one passage is cut before the gold one, one after it"
        assert all(any(text.startswith(passage) for text in texts) for passage in passages)
        assert len(set(passages)) == len(passages)
        before = len(tokenizer.encode("\n\n".join(passages[: passages.index(gold[0])]).encode()))
        after = len(tokenizer.encode("\n\n".join(passages[passages.index(gold[0]) + 1 :]).encode()))
        assert record["depth"] == pytest.approx(before / (before + after), abs=0.02)
        example = qa.training_example(record, tokenizer=tokenizer, length=length)
        assert example["tokens"].shape == (length + 1,)
    assert differ >= 11


def test_what_is_skipped_is_counted(tmp_path):
    content = squad(*range(20))
    for number in range(20):
        content["data"][number]["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "nowhere in it"
        content["data"][number]["paragraphs"][1]["qas"][0] |= {"is_impossible": True}
    long = copy.deepcopy(content["data"][0]["paragraphs"][2])
    long["context"] += " Much more text." * 100
    long["qas"][0]["question"] = "When was the long one built?"
    for number in range(20):
        content["data"][number]["paragraphs"].append(long)
    found = source(tmp_path, written(tmp_path / "one.json", content), length=512)
    assert found.skipped == {"without_answer": 16, "answer_not_in_text": 16, "too_long": 16} and len(found) == 16
    statistics = found.statistics()
    assert (
        statistics["skipped"] == found.skipped and statistics["examples"] == 16 and statistics["kinds"] == {"when": 16}
    )
    assert sum(statistics["tokens"]["count"]) == sum(statistics["depth"]["count"]) == statistics["sampled"] == 16
    lines = "\n".join(found.describe())
    assert "16 questions at 512 tokens; skipped: without_answer 16, answer_not_in_text 16, too_long 16" in lines
    assert "when 100%" in lines


def test_a_length_that_no_question_fits(tmp_path):
    path = written(tmp_path / "one.json", squad(*range(12)))
    with pytest.raises(InputError, match="the smallest workable length is [0-9]+") as caught:
        source(tmp_path, path, length=100)
    smallest = int(str(caught.value).split("smallest workable length is ")[1].split()[0])
    assert len(source(tmp_path, path, length=smallest)) >= 1
    with pytest.raises(InputError, match="smallest workable"):
        source(tmp_path, path, length=smallest - 1)
    with pytest.raises(InputError, match="at least 1 token"):
        source(tmp_path, path, length=0)


def test_only_bad_answers(tmp_path):
    content = squad(*range(12))
    for one in content["data"]:
        for item in one["paragraphs"]:
            item["qas"][0]["answers"][0]["text"] = "nowhere"
    with pytest.raises(InputError, match="no usable question: 0 have no answer, 30 none that is in its"):
        source(tmp_path, written(tmp_path / "one.json", content))


def test_too_few_articles_for_a_split(tmp_path):
    path = written(tmp_path / "one.json", squad(1))
    assert len(source(tmp_path, path, "test")) == 3
    with pytest.raises(InputError, match=r"no questions in split 'train' \(it has test\)"):
        source(tmp_path, path, "train")


def without(content, *keys):
    content = copy.deepcopy(content)
    owner = content
    for key in keys[:-1]:
        owner = owner[key]
    del owner[keys[-1]]
    return content


def test_missing_field_is_named(tmp_path):
    paragraph = ["data", 0, "paragraphs", 2]
    for keys, message in (
        (["data"], "the file has no 'data' that is a list"),
        (["data", 1, "paragraphs"], r"data\[1\] has no 'paragraphs' that is a list"),
        ([*paragraph, "context"], r"data\[0\].paragraphs\[2\] has no 'context' that is a text"),
        ([*paragraph, "qas"], r"paragraphs\[2\] has no 'qas' that is a list"),
        ([*paragraph, "qas", 0, "question"], r"qas\[0\] has no 'question' that is a text"),
        ([*paragraph, "qas", 0, "answers"], r"qas\[0\] has no 'answers' that is a list"),
        ([*paragraph, "qas", 0, "answers", 0, "text"], r"answers\[0\] has no 'text' that is a text"),
    ):
        path = written(tmp_path / "one.json", without(squad(0, 1), *keys))
        with pytest.raises(InputError, match=f"'{path}' is not in SQuAD's format: .*{message}"):
            source(tmp_path, path)


def table_of_formats():
    """The rows of the table of formats on the page: (data.name, example)."""
    page = (ROOT / "docs/data.md").read_text().partition("## Questions")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    return [(name.strip("`"), example.strip("`")) for _, name, example in rows[2:]]


def as_files(folder, example):
    """Writes 12 questions like an example in every format that holds it; yields the files."""
    records = [json.loads(example.replace("mill", f"mill {number}")) for number in range(12)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if "data" in records[0]:
        yield written(folder / "squad.json", {"data": [article for record in records for article in record["data"]]})
        return
    yield written(folder / "rows.jsonl", lines)
    if "context" in records[0]:
        yield written(folder / "list.json", records)
        (folder / "rows").write_bytes(gzip.compress(lines.encode()))
        yield folder / "rows"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "rows.parquet")
        yield folder / "rows.parquet"


@pytest.mark.parametrize("name, example", table_of_formats())
def test_every_format_of_the_page_is_read(tmp_path, name, example):
    for file in as_files(tmp_path, example):
        if name == "qa_jsonl":
            found = [qa_jsonl.parse(line, "here", number) for number, _, line in qa_jsonl.lines(file)]
            assert [answers for *_, answers in found] == [(f"The mill {number}",) for number in range(12)]
            assert all(prompt.startswith(f"The mill {at} is red.") for at, (_, prompt, _) in enumerate(found))
            assert all(prompt.endswith("Answer:") == ("answer_prefix" in example) for _, prompt, _ in found)
            continue
        splits = SquadLong(paths=(file,), data_dir=tmp_path / "none").questions()
        found = {one.passage: (one.question, one.answers) for split in splits.values() for one in split}
        assert found == {
            f"The mill {number} is red.": ("What is red?", (f"The mill {number}",)) for number in range(12)
        }, file
        assert [len({one.name for one in split}) for split in SquadLong(paths=(file,)).questions().values()] == [
            10,
            1,
            1,
        ]


def test_rows_without_titles_are_grouped_by_their_context(tmp_path):
    rows = [
        {"context": f"A text {number // 2}.", "question": f"What {number}?", "answers": None} for number in range(8)
    ]
    rows[3]["answers"] = [{"text": "text"}, {"text": "A"}]
    articles = qa_rows.group_rows(enumerate(rows), "'x'")
    assert [[context for context, _ in paragraphs] for _, paragraphs in articles] == [
        [f"A text {n}."] for n in range(4)
    ]
    assert articles[1][1][0][1] == [("What 2?", []), ("What 3?", ["text", "A"])]
    for row, words in (
        (
            {"context": "a", "question": 3},
            r"row 1 of 'x' has no 'question' that is a text \(its fields are context, ques",
        ),
        ({"context": "a", "question": "b", "answers": [3]}, r"answers of another form, \[3\]: expected"),
        ([], "row 1 of 'x' is no object"),
    ):
        with pytest.raises(InputError, match=words):
            qa_rows.group_rows(enumerate([row]), "'x'")


def test_names_in_a_folder_say_the_splits(tmp_path):
    for names, expected in (
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["whole", "whole"]),
        (["data/train.jsonl", "data/valid.jsonl", "data/test.jsonl", "notes.json"], ["train", "validation", "test"]),
        (["train.jsonl", "test.jsonl.gz"], ["train", "dev"]),
        (["questions.jsonl"], ["whole"]),
    ):
        folder = tmp_path / names[0].replace("/", "-")
        for name in [*names, "README.md"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        assert [part for part, _ in squad_long._files((str(folder),))] == expected


def test_questions_without_an_answer_are_left_out_or_asked_with_an_empty_one(tmp_path):
    rows = [{"context": f"Town {n} is old.", "question": "Is it?", "answers": {"text": []}} for n in range(12)]
    rows += [{"context": f"Hill {n} is high.", "question": "What is?", "answers": [f"Hill {n}"]} for n in range(12)]
    path = written(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    left_out = source(tmp_path, path)
    assert any(
        "questions have no answer and are left out (data.unanswerable=empty" in line for line in left_out.describe()
    )
    found = source(tmp_path, path, options=(("unanswerable", "empty"),))
    assert len(found) == len(left_out) + left_out.skipped["without_answer"] > len(left_out)
    record = next(found[index] for index in range(len(found)) if found[index]["outputs"] == ("",))
    assert len(parts(record)[0]) > 3, "an empty answer is in no other passage"
    example = qa.training_example(record, tokenizer=BYTES, length=512)
    (at,) = np.flatnonzero(example["weights"])
    assert at == len(record["input"].encode()) - 1 and example["tokens"][at + 1] == qa.BYTE_ANSWER_END
    assert any("have no answer: the end token alone is right" in line for line in found.describe())
    for hypothesis, score in (("", 1.0), ("Town", 0.0)):
        assert set(metrics.score_answer(hypothesis, record["outputs"]).values()) == {score}


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="needs one path in data.paths, got 0: .*rajpurkar.github.io"):
        SquadLong.sources(())
    with pytest.raises(InputError, match="does not exist; give one file in SQuAD's JSON format"):
        source(tmp_path, tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty' holds no file of data whose name says 'train'"):
        source(tmp_path, tmp_path / "empty")
    with pytest.raises(InputError, match=r"bad.json', line 3 is not JSON \(.*column 1\)"):
        source(tmp_path, written(tmp_path / "bad.json", '{"data":\n[\n}'))
    (tmp_path / "latin.json").write_bytes(b'{"data": "\xe9"}')
    with pytest.raises(InputError, match="latin.json' is not UTF-8"):
        source(tmp_path, tmp_path / "latin.json")
    with pytest.raises(InputError, match="the file is no object"):
        source(tmp_path, written(tmp_path / "text.json", '"a"'))
    with pytest.raises(InputError, match="is empty: no questions in"):
        source(tmp_path, written(tmp_path / "nothing.json", {"data": []}))
    assert not list((tmp_path / "cache").rglob("table.npz")) and not list((tmp_path / "cache").rglob(".unfinished-*"))


def test_prompts_are_those_of_all_versions(tmp_path):
    """Seed and index decide a prompt, so that evaluations of older versions asked the same questions."""
    found = source(tmp_path, written(tmp_path / "one.json", squad(*range(12))), "train", length=600, seed=3)
    prompts = hashlib.sha256("".join(found[index]["input"] for index in range(len(found))).encode()).hexdigest()[:16]
    assert found.fingerprint == "7eaf5dd315ef0676110550a9cac41b8e"
    assert found.content_fingerprint == "ae59199705b71183686492cb5829bb80" and prompts == "da3a0b6f280c0155"
