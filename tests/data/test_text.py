"""The data set `text`: formats, splits, records without text."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from seqpe_jax import config
from seqpe_jax.data.datasets.base import SPLITS
from seqpe_jax.data.datasets.text import Text
from seqpe_jax.data.datasets.text_base import split_document, stream_parts
from seqpe_jax.data.datasets.text_records import detect
from seqpe_jax.data.formats import check_text_file
from seqpe_jax.data.tokenizers import ByteTokenizer
from seqpe_jax.data.tokens import token_source
from seqpe_jax.errors import InputError

RECORDS = [{"text": f"record {number} ü\n", "meta": {"body": f"body {number}"}} for number in range(100)]


def documents(*paths, **options):
    """Returns {split: {name: text}} without a copy of it in the cache."""
    splits: dict = {split: {} for split in SPLITS}
    for split, contents in Text(paths=paths, options=tuple(options.items()), data_dir="unused").contents().items():
        for name, text in contents:
            splits[split][name] = b"".join(split_document(text) if isinstance(text, bytes) else text).decode()
    return splits


def all_texts(splits):
    return sorted(text for texts in splits.values() for text in texts.values())


def json_lines(records=RECORDS):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet():
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), content, row_group_size=30)
    return content.getvalue()


def arrow(new):
    content, table = io.BytesIO(), pyarrow.Table.from_pylist(RECORDS)
    with new(content, table.schema) as writer:
        writer.write_table(table, 40)
    return content.getvalue()


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


BUILDER = """
import tensorflow_datasets as tfds

class ToyCorpus(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"article": {"body": tfds.features.Text()}}))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples("train", 100), "test": self._generate_examples("test", 20)}

    def _generate_examples(self, name, count):
        for number in range(count):
            yield number, {"article": {"body": f"{name} {number}"}}
"""
FORMATS = {
    "lines.jsonl": json_lines(),
    "bom.json": b"\xef\xbb\xbf" + json_lines(),
    "lines.jsonl.gz": gzip.compress(json_lines()),
    "two.jsonl.zst": zstd(json_lines(RECORDS[:50])) + zstd(json_lines(RECORDS[50:])),
    "lines.jsonl.xz": lzma.compress(json_lines()),
    "no_suffix": bz2.compress(json_lines()),
    "table.parquet": parquet(),
    "file.arrow": arrow(pyarrow.ipc.new_file),
    "stream.arrow": arrow(pyarrow.ipc.new_stream),
}


@pytest.mark.parametrize("name", FORMATS)
def test_records_of_every_format_are_the_same_documents(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(FORMATS[name])
    splits = documents(file)
    assert all_texts(splits) == sorted(record["text"] for record in RECORDS)
    assert 80 <= len(splits["train"]) < 100 and splits["validation"] and splits["test"]
    assert all_texts(documents(file, text_key="meta.body")) == sorted(record["meta"]["body"] for record in RECORDS)


def test_array_record(tmp_path):
    for name, content in (("json", json.dumps), ("plain", lambda record: record["text"])):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / name), "group_size:1")
        for record in RECORDS:
            writer.write(content(record).encode())
        writer.close()
        assert all_texts(documents(tmp_path / name)) == sorted(record["text"] for record in RECORDS)


def test_folders_that_the_datasets_library_saves(tmp_path):
    for split, first in (("train", 0), ("test", 60)):
        folder = tmp_path / split
        folder.mkdir()
        for name in ("data-00000-of-00001.arrow", "cache-1234.arrow"):  # the second one holds the same rows
            (folder / name).write_bytes(FORMATS["stream.arrow"] if first == 0 else FORMATS["file.arrow"])
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    splits = documents(tmp_path)
    assert len(splits["test"]) == 100 and len(splits["train"]) + len(splits["validation"]) == 100
    assert splits["validation"] and not set(splits["train"]) & set(splits["validation"])


def test_plain_text_in_spans_and_by_names(tmp_path):
    text = "".join(f"line {number} é\n" for number in range(4000))
    for name, content in (("a.txt", text.encode()), ("b.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(content)
        splits = documents(tmp_path / name)
        assert "".join(splits[split][name] for split in SPLITS) == text
        assert all(splits[split][name].startswith("line ") for split in SPLITS)
        assert len(splits["train"][name]) / len(text) == pytest.approx(0.9, abs=0.01)
    (tmp_path / "own").mkdir()
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / "own" / name).write_text(f"text of {name}\n" * 9)
    splits = documents(tmp_path / "own")
    assert {split: list(texts) for split, texts in splits.items()} == {
        "train": ["train.txt"],
        "validation": ["valid.txt"],
        "test": ["test.txt"],
    }
    for number in range(40):
        (tmp_path / f"{number}.md").write_text("many files\n")
    assert {split: len(texts) for split, texts in documents(f"{tmp_path}/*.md").items()} == {
        "train": 36,
        "validation": 2,
        "test": 2,
    }


def test_a_tfds_builder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    file = tmp_path / "toy_corpus.py"
    file.write_text(BUILDER)
    splits = documents(f"tfds:{file}", text_key="article.body")
    assert len(splits["train"]) + len(splits["validation"]) == 100 and len(splits["test"]) == 20
    assert sorted(splits["test"].values()) == sorted(f"test {number}" for number in range(20))
    with pytest.raises(InputError, match="has no field 'text', but article: name the one"):
        documents(f"tfds:{file}")


@pytest.mark.parametrize("limit", [7, 32, 1000])
def test_streamed_parts_are_those_of_the_document(limit):
    text = ("word wörld " * 40 + "世" * 60 + " end").encode()
    assert list(stream_parts(io.BytesIO(text), None, limit)) == list(split_document(text, limit))
    assert list(stream_parts(io.BytesIO(text), 300, limit)) == list(split_document(text[:300], limit))


def test_a_few_records_without_text_are_counted_and_more_are_refused(tmp_path, capsys):
    bad = [{"text": None}, {"other": "x"}, {"text": " "}, {"text": 5}, {"text": "\ud800"}]
    file = tmp_path / "a.jsonl"
    file.write_bytes(json_lines(RECORDS * 6 + bad))
    assert len(all_texts(documents(file))) == 600
    shown = capsys.readouterr().err
    assert "no field 'text': 1, first in 'a.jsonl' record 602 with other" in shown and "null" in shown
    file.write_bytes(json_lines(RECORDS + bad))
    with pytest.raises(InputError, match=r"5 of 105 records have no text .*at most 1% may"):
        documents(file)
    with pytest.raises(InputError, match="no field 'texts'"):
        documents(file, text_key="texts")


def test_plain_text_is_split_at_a_string(tmp_path, monkeypatch):
    """Whatever the parts are in which it is read; what is left of white space is no document."""
    texts, end = [f"\nstory {number} \u00fc\n" for number in range(200)], "<|endoftext|>"
    (tmp_path / "a.txt").write_text(end.join(texts) + end + "\n")
    for limit in (split_document.__defaults__[0], 7):
        monkeypatch.setattr(split_document, "__defaults__", (limit,))
        splits = documents(tmp_path / "a.txt", split_on=end)
        assert all_texts(splits) == sorted(texts) and len(splits["train"]) == pytest.approx(180, abs=8)
    monkeypatch.setattr("seqpe_jax.data.datasets.text_records.MAX_PART_BYTES", 99)
    with pytest.raises(InputError, match="data.split_on='@': .* more than 99 bytes without it"):
        documents(tmp_path / "a.txt", split_on="@")


def test_what_is_not_meant_is_refused(tmp_path):
    def refused(name, content, message, **options):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            documents(file, **options)
        file.unlink()

    refused("broken.jsonl", json_lines() + b"{broken\n", "line 101 of .* is not JSON")
    refused("list.json", json.dumps(RECORDS).encode(), "not JSON lines")
    refused("list", json.dumps(RECORDS).encode(), "one JSON list")
    refused("short.gz", gzip.compress(json_lines())[:-20], "damaged or cut short")
    refused("short.zst", zstd(json_lines() * 99)[:-20], "damaged or cut short")
    refused("cut.parquet", parquet()[:-20], "damaged or cut short")
    refused("a.parquet", parquet(), "no column 'body', but text, meta", text_key="body")
    refused("a.txt", b"plain", "text_key='body' is for records", text_key="body")
    refused("a.parquet", parquet(), "data.split_on='x' is for plain text, but .* has records", split_on="x")
    refused(
        "rows.TSV.gz", gzip.compress(b"id\ttext\n1\ta\n"), "rows.TSV.gz' is named as a table, which would be trained on"
    )
    refused("a.zip", b"PK\x03\x04", "a zip archive")
    refused("latin.txt", b"caf\xe9 " * 30, "not UTF-8 text: byte 0xe9 at offset 3")
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    (tmp_path / "README.md").write_text("about it")
    assert len(all_texts(documents(tmp_path))) == 100 and "README.md" in Text.skipped((str(tmp_path),))
    (tmp_path / "stray.txt").write_text("stray")
    with pytest.raises(InputError, match="records .a.jsonl. and to plain text .stray.txt."):
        documents(tmp_path)
    table = tmp_path / "rows.csv"
    table.write_text('id,text\n1,"so, it is"\n')
    with pytest.raises(InputError, match="is named as a table"):
        check_text_file(table)
    check_text_file(table, raw=True)
    assert detect(table.rename(tmp_path / "rows.csv.txt"), "rows").kind == "text"
    with pytest.raises(InputError, match="TFDS has no 'squat'. Did you mean 'squad'"):
        Text.sources(("tfds:squat",))


def test_a_run_reads_the_key_and_other_data_sets_refuse_it(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json_lines())
    shared = {"split": "train", "tokenizer": ByteTokenizer(), "paths": (str(file),), "cache_dir": tmp_path / "cache"}
    source = token_source("text", options=(("text_key", "meta.body"),), progress=False, **shared)
    assert bytes(source.tokens[:5]) == b"body " and source.documents > 80
    assert source.fingerprint != token_source("text", progress=False, **shared).fingerprint
    page = {"data": {"name": "stdlib_text", "text_key": "body"}}
    with pytest.raises(InputError, match="data.text_key=body is not read by data.name='stdlib_text', only by text"):
        config.from_dict(page)
    with pytest.raises(InputError, match="data.name=text reads"):
        token_source("text_files", progress=False, **shared)
    raw = token_source("text_files", options=(("raw", True),), progress=False, **shared)
    assert bytes(raw.tokens[:9]) == b'{"text": '
