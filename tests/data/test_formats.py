"""Files that are something else than the plain text they are given as, and texts that begin with a byte order mark."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from seqpe_jax.cli.generate import read_prompts
from seqpe_jax.data.datasets import qa_jsonl
from seqpe_jax.data.datasets.squad_long import SquadLong
from seqpe_jax.data.datasets.wikitext103 import Wikitext103
from seqpe_jax.data.formats import BYTE_ORDER_MARK, check_text_file
from seqpe_jax.data.qa import qa_source
from seqpe_jax.data.tokenizers import ByteTokenizer
from seqpe_jax.data.tokens import token_source
from seqpe_jax.errors import InputError, encode_utf8
from seqpe_jax.files import parse_json

TEXT = b"Once upon a time there was a fox.\n" * 40
TABLE = pyarrow.table({"text": ["one", "two"]})


def tarred(text):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        member = tarfile.TarInfo("one.txt")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return content.getvalue()


def zipped(text):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("one.txt", text)
    return content.getvalue()


def parquet():
    content = io.BytesIO()
    pyarrow.parquet.write_table(TABLE, content)
    return content.getvalue()


def arrow(new):
    content = io.BytesIO()
    with new(content, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return content.getvalue()


def saved(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def database(folder):
    with sqlite3.connect(folder / "made.db") as connection:
        connection.execute("create table texts (text)")
    return (folder / "made.db").read_bytes()


FORMATS = {
    "compressed with gzip.*gunzip": lambda folder: gzip.compress(TEXT),
    "compressed with bzip2.*bunzip2": lambda folder: bz2.compress(TEXT),
    "compressed with xz.*unxz": lambda folder: lzma.compress(TEXT),
    "compressed with zstd.*unzstd": lambda folder: b"\x28\xb5\x2f\xfd" + TEXT,
    "a zip archive.*unpack": lambda folder: zipped(TEXT),
    "a tar archive.*tar -xf": lambda folder: tarred(TEXT),
    "a Parquet file.*write its text": lambda folder: parquet(),
    "an Arrow file.*write its text": lambda folder: arrow(pyarrow.ipc.new_file),
    "an Arrow stream.*write its text": lambda folder: arrow(pyarrow.ipc.new_stream),
    "an SQLite database": database,
    "a NumPy array": lambda folder: saved(np.zeros(3)),
    "a PDF document": lambda folder: b"%PDF-1.7\n" + TEXT,
    "UTF-16 text.*iconv -f UTF-16 -t UTF-8": lambda folder: TEXT.decode().encode("utf-16"),
    "UTF-32 text.*iconv -f UTF-32 -t UTF-8": lambda folder: TEXT.decode().encode("utf-32"),
    "binary, or UTF-16 text without": lambda folder: TEXT.decode().encode("utf-16-be"),
}


def test_other_formats_are_named(tmp_path):
    file = tmp_path / "text.txt"
    for words, content in FORMATS.items():
        file.write_bytes(content(tmp_path))
        with pytest.raises(InputError, match=f"data.paths: '{file}' is {words}, or leave it out|'{file}' is {words}"):
            check_text_file(file)


RECORDS = [{"text": f"story {number}", "id": number} for number in range(30)]


def test_json_records_are_no_text(tmp_path):
    for content in (
        "\n".join(map(json.dumps, RECORDS)),
        "\ufeff" + "\r\n\r\n".join(map(json.dumps, RECORDS)) + "\r\n",
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "\n".join(json.dumps(one | {"long": "x" * 200_000}) for one in RECORDS),
    ):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(InputError, match=r"a.jsonl' holds JSON records \(fields 'text', 'id'.*data.name=qa_jsonl"):
            check_text_file(tmp_path / "a.jsonl")


def test_what_looks_like_json_may_be_text(tmp_path):
    single = ("", "plain", "{", '{"one": 1}', "[1]\n[2]", "1\n2\n", "[" * 100_000)
    for content in (*single, '{"a": 1}\n{"b"', '{"a": 1}\nand text', "[{x}] is no JSON", "{{}\n{}", '["a", {"b": 1}]'):
        (tmp_path / "a.txt").write_text(content)
        check_text_file(tmp_path / "a.txt")


def test_every_reader_of_text_says_what_a_file_is(tmp_path):
    options = {"split": "train", "tokenizer": ByteTokenizer(), "cache_dir": tmp_path / "c", "progress": False}
    (tmp_path / "texts").mkdir()
    for number in range(30):  # the last is looked at before the first is read
        (tmp_path / "texts" / f"{number:02d}.txt").write_bytes(TEXT if number < 29 else gzip.compress(TEXT))
    (tmp_path / "wiki.train.raw").write_bytes(gzip.compress(TEXT))
    (tmp_path / "questions").write_bytes(gzip.compress(TEXT))
    for name, path in (("text_files", "texts"), ("wikitext103", "wiki.train.raw")):
        with pytest.raises(InputError, match="' is compressed with gzip, but plain UTF-8 text is expected: unpack it"):
            token_source(name, paths=str(tmp_path / path), **options)
    for name in ("qa_jsonl", "squad_long"):
        with pytest.raises(InputError, match="data.paths: '.*questions' is compressed with gzip"):
            qa_source(name, paths=str(tmp_path / "questions"), length=64, **options)
    with pytest.raises(InputError, match="--prompts-file=.*questions is compressed with gzip"):
        read_prompts(str(tmp_path / "questions"))
    (tmp_path / "lines").write_text('{"input": "a", "outputs": ["b"]}\n{"input": "c", "outputs": ["d"]}\n')
    with pytest.raises(
        InputError, match="row 1 of .*lines' has no 'context' .*fields are input, outputs.* data.name=qa_jsonl"
    ):
        qa_source("squad_long", paths=str(tmp_path / "lines"), length=64, **options)


def test_byte_order_marks_are_no_text(tmp_path):
    mark = BYTE_ORDER_MARK
    (tmp_path / "one.txt").write_bytes(mark + TEXT)
    options = {"split": "train", "tokenizer": ByteTokenizer(), "cache_dir": tmp_path / "c", "progress": False}
    assert bytes(token_source("text_files", paths=str(tmp_path / "one.txt"), **options).tokens[:4]) == b"Once"
    (tmp_path / "wiki.train.raw").write_bytes(mark + b" = A title = \n \n Text .\n")
    assert list(Wikitext103(paths=(tmp_path / "wiki.train.raw",), data_dir=tmp_path).documents()["train"]) == [
        ("train/00000 A title", b" = A title = \n \n Text .\n")
    ]
    line = json.dumps({"index": 1, "input": "a?", "outputs": ["b"]}).encode()
    (tmp_path / "qa.jsonl").write_bytes(mark + b"\n" + mark + line)
    found = [qa_jsonl.parse(line, "here") for _, _, line in qa_jsonl.lines(tmp_path / "qa.jsonl")]
    assert found == [(1, "a?", ("b",))]
    (tmp_path / "squad.json").write_bytes(
        mark + b'{"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": []}]}]}'
    )
    found = SquadLong(paths=(tmp_path / "squad.json",), data_dir=tmp_path).questions()
    assert [one.passage for split in found.values() for one in split] == ["c"]
    (tmp_path / "prompts.txt").write_bytes(mark + b"first\nsecond\n")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["first", "second"]
    assert parse_json("\ufeff[1]") == parse_json(mark + b"[1]") == [1]


def test_half_a_surrogate_pair_is_one_line(tmp_path):
    options = {
        "split": "train",
        "tokenizer": ByteTokenizer(),
        "cache_dir": tmp_path / "c",
        "progress": False,
        "length": 64,
    }
    (tmp_path / "qa.jsonl").write_text('{"index": 1, "input": "a \\ud83d?", "outputs": ["b"]}\n')
    (tmp_path / "squad.json").write_text(
        '{"data": [{"title": "t", "paragraphs": [{"context": "a \\udc00", "qas": [{"question": "q", "answers": []}]}]}]}'
    )
    for name, file, half in (("qa_jsonl", "qa.jsonl", "d83d"), ("squad_long", "squad.json", "dc00")):
        with pytest.raises(InputError, match=rf"is not JSON .*half a surrogate pair, \\u{half}"):
            qa_source(name, paths=str(tmp_path / file), **options)
    with pytest.raises(InputError, match="holds half a surrogate pair at character 2"):
        encode_utf8("a \ud83d")
    assert encode_utf8("\udcff\U0001f642") == b"\xff\xf0\x9f\x99\x82"


def test_special_tokens_that_a_text_spells_are_said(tmp_path, capsys):
    (tmp_path / "stories.txt").write_text("A story of a fox.\n<|endoftext|>\n" * 400 + "[EOS]<unk>")
    options = {"tokenizer": ByteTokenizer(), "cache_dir": tmp_path / "c", "paths": str(tmp_path / "stories.txt")}
    for _ in range(2):
        source = token_source("text_files", split="train", **options)
        assert source.documents == 1 and source.special_token_counts == {"<|endoftext|>": 360}
    err = capsys.readouterr().err.splitlines()
    assert err == [
        "text_files/train: the text of 1 document spells special tokens, which are read as plain text: <|endoftext|> 360 "
        "times; where they end documents of plain text, set data.name='text' and data.split_on='<|endoftext|>', which "
        "leaves them out"
    ]
    assert token_source("text_files", split="test", **options).special_token_counts == {"<|endoftext|>": 20, "[EOS]": 1}
