"""Text data sets: the standard library, own files, WikiText-103, and their splits."""

import io
import os
import zipfile

import pytest

from seqpe_jax.data.datasets import stdlib_text, wikitext103
from seqpe_jax.data.datasets.base import SPLITS
from seqpe_jax.data.datasets.squad_long import SquadLong
from seqpe_jax.data.datasets.text_base import split_document
from seqpe_jax.data.datasets.text_files import TextFiles
from seqpe_jax.data.datasets.wikitext103 import Wikitext103
from seqpe_jax.errors import InputError

ARTICLES = {
    "train": [
        " \n = First = \n \n Some text .\n \n = = Section = = \n \n More text , 世界 .\n \n",
        " = Second = \n \n Text .\n \n",
    ],
    "validation": [" \n = Third one = \n \n A = B = C \n \n"],
    "test": [" \n = Fourth = \n \n Text .\n"],
}
RAW_NAMES = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}


def read(kind, paths, folder):
    """Returns {split: [(name, text)]} of a prepared data set, read the way TFDS reads it."""
    builder = kind(paths=paths, data_dir=folder)
    builder.prepare(progress=False)
    builder = kind(paths=paths, data_dir=folder)
    return {
        split: [(row["name"].decode(), row["text"]) for row in builder.as_data_source(split=split)]
        for split in builder.info.splits
    }


def joined(documents):
    return b"".join(text for _, text in documents)


def test_pieces_cut_between_words_or_characters():
    text = ("word " * 50).encode()
    cut = list(split_document(text, 32))
    assert b"".join(cut) == text and len(cut) > 3
    assert all(piece.startswith(b" word") and not piece.endswith(b" ") for piece in cut[1:-1])
    cut = list(split_document("世".encode() * 50, 32))
    assert b"".join(cut).decode() == "世" * 50 and [piece.decode() for piece in cut]
    assert list(split_document(b"")) == [] and list(split_document(b"ab", 2)) == [b"ab"]


def test_parts_have_the_tokens_of_the_document(shared_data, gpt2_tokenizer):
    text = (shared_data / "wikitext" / "test.txt").read_bytes()[:60_000]
    text = text.decode("utf-8", "ignore").encode()
    cut = gpt2_tokenizer.encode_many(list(split_document(text, 1000)))
    assert len(cut) > 50
    assert [token for piece in cut for token in piece.tolist()] == gpt2_tokenizer.encode(text).tolist()


def test_stdlib_text(tmp_path):
    splits = read(stdlib_text.StdlibText, (), tmp_path)
    names = {split: [name for name, _ in documents] for split, documents in splits.items()}
    everything = sorted(name for split in SPLITS for name in names[split])
    assert set(splits) == set(SPLITS) and len(everything) == len(set(everything)) > 300
    assert all(names[split] == sorted(names[split]) for split in SPLITS)
    assert all(stdlib_text.split(name) == split for split in SPLITS for name in names[split])
    assert not any("/test/" in f"/{name}" or "/tests/" in name or "site-packages" in name for name in everything)
    sizes = {split: len(joined(splits[split])) for split in SPLITS}
    assert sum(sizes.values()) > 5_000_000
    for split in ("validation", "test"):
        assert 0.02 < sizes[split] / sum(sizes.values()) < 0.10
    assert "argparse.py" in everything and "email/parser.py" in everything


def test_many_files_are_split_by_file(tmp_path):
    folder = tmp_path / "text"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    (folder / "deep" / ".hidden" / "no.txt").write_bytes(b"\xff")
    written = {}
    for number in range(40):
        name = f"deep/{number:02d}.txt" if number % 2 else f"{number:02d}.txt"
        written[name] = f"file {number} ü\n".encode() * 3
        (folder / name).write_bytes(written[name])
    splits = read(TextFiles, (folder,), tmp_path / "d")
    assert {split: len(documents) for split, documents in splits.items()} == {"train": 36, "validation": 2, "test": 2}
    assert {name: text for documents in splits.values() for name, text in documents} == written
    globbed = read(TextFiles, (f"{folder}/*.txt", f"{folder}/deep/*.txt", f"{folder}/00.txt"), tmp_path / "e")
    assert globbed == splits


def test_few_files_are_split_by_spans(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes("".join(f"line {number} é\n" for number in range(1000)).encode())
    two.write_bytes("世".encode() * 1001)
    splits = read(TextFiles, (one, two), tmp_path / "d")
    for file in (one, two):
        parts = [joined([row for row in splits[split] if row[0] == file.name]) for split in SPLITS]
        assert b"".join(parts) == file.read_bytes()
        assert len(parts[0]) / file.stat().st_size == pytest.approx(0.9, abs=0.01)
        assert all(part.decode() for part in parts)
    assert joined(splits["train"][:1]).endswith(b"\n")


def test_long_document_comes_in_pieces_of_one_name(tmp_path, monkeypatch):
    monkeypatch.setattr(split_document, "__defaults__", (1000,))
    file = tmp_path / "one.txt"
    file.write_bytes(b"some words " * 1000)
    splits = read(TextFiles, (file,), tmp_path / "d")
    assert len(splits["train"]) > 5 and {name for name, _ in splits["train"]} == {"one.txt"}
    assert b"".join(joined(splits[split]) for split in SPLITS) == file.read_bytes()


def test_links_put_nothing_into_two_splits(tmp_path):
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    for number in range(40):
        (folder / "deep" / f"{number:02d}.txt").write_text(f"file {number}\n" * 3)
    before = read(TextFiles, (folder,), tmp_path / "d")
    (folder / "loop").symlink_to(".")
    (folder / "deep" / "copy.txt").symlink_to("07.txt")
    for path in (folder, folder / "**" / "*.txt"):
        assert read(TextFiles, (path,), tmp_path / "e" / path.name) == before


def test_names_need_not_be_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    names = [os.fsdecode(b"%02d\xff.txt" % number) for number in range(20)]
    for name in names:
        (folder / name).write_text(name[:2])
    builder = TextFiles(paths=(folder,), data_dir=tmp_path / "d")
    builder.prepare(progress=False)
    found = {row["name"]: row["text"] for split in SPLITS for row in builder.as_data_source(split=split)}
    assert found == {os.fsencode(name): name[:2].encode() for name in names}
    assert TextFiles.source_key((str(folder),)) == TextFiles.source_key((str(folder),))


def test_what_is_no_file_is_refused_by_all_builders(tmp_path):
    os.mkfifo(tmp_path / "train-1.json")
    with pytest.raises(InputError, match="no file of data .*; skipped: pipes, .*: 1 .*train-1.json"):
        SquadLong.sources((str(tmp_path),))
    (tmp_path / "train-1.json").unlink()
    (tmp_path / "train-1.json").symlink_to("nowhere")
    with pytest.raises(InputError, match="no file of data .*; skipped: .*links.*: 1 .*train-1.json"):
        SquadLong.sources((str(tmp_path),))


def test_bad_text_files(tmp_path):
    with pytest.raises(InputError, match="needs data.paths"):
        TextFiles.sources(())
    with pytest.raises(InputError, match=r"data.paths: '.*nowhere\*' does not exist and matches nothing"):
        TextFiles.sources((str(tmp_path / "nowhere*"),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        TextFiles.sources((str(tmp_path / "empty"),))
    os.mkfifo(tmp_path / "empty" / "pipe")
    with pytest.raises(InputError, match="holds no files, skipped: pipes, sockets and devices: 1 .*pipe.; give"):
        TextFiles.sources((str(tmp_path / "empty"),))
    (tmp_path / "empty" / "nothing.txt").touch()
    with pytest.raises(InputError, match="data set 'text_files' is empty"):
        read(TextFiles, (tmp_path / "empty",), tmp_path / "d")


@pytest.mark.parametrize("prefix", [b"caf", b"0123456 89" * 1_000_000])
def test_not_utf8_names_file_and_offset(tmp_path, prefix):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(prefix + b"\xe9 noir " * 9)
    with pytest.raises(InputError) as caught:
        read(TextFiles, (bad,), tmp_path / "d")
    assert str(caught.value).startswith(f"'{bad}' is not UTF-8 text: byte 0xe9 at offset {len(prefix)};")


def release_raw(folder):
    for split, articles in ARTICLES.items():
        (folder / RAW_NAMES[split]).write_bytes("".join(articles).encode())
    return folder


def release_zip(folder):
    file = folder / "wikitext-103-raw-v1.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for split, articles in ARTICLES.items():
            archive.writestr(f"wikitext-103-raw/{RAW_NAMES[split]}", "".join(articles))
    return file


def release_parquet(folder):
    import pyarrow
    import pyarrow.parquet

    for split, articles in ARTICLES.items():
        lines = io.StringIO("".join(articles)).readlines()
        halves = [lines[:7], lines[7:]] if split == "train" else [lines]
        for number, part in enumerate(halves):
            rows = [line if line.strip() else "" for line in part]
            name = f"{split}-{number:05d}-of-{len(halves):05d}.parquet"
            pyarrow.parquet.write_table(pyarrow.table({"text": rows}), folder / name)
    return folder


def test_wikitext_behind_links(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "release").mkdir()
    for number, file in enumerate(sorted(release_raw(tmp_path / "blobs").iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "release" / file.name).symlink_to(f"../blobs/{number}")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "far").symlink_to("../release")
    (tmp_path / "all" / "gone.raw").symlink_to("nowhere")
    for place in (tmp_path / "release", tmp_path / "all", tmp_path / "all" / ".." / "release"):
        splits = read(Wikitext103, (place,), tmp_path / "d" / place.name)
        assert {split: [text.decode() for _, text in documents] for split, documents in splits.items()} == ARTICLES
    assert Wikitext103.skipped((str(tmp_path / "all"),)) == f"broken links: 1 ({tmp_path}/all/gone.raw)"


@pytest.mark.parametrize("release", [release_raw, release_zip, release_parquet])
def test_wikitext_in_every_form(tmp_path, release):
    (tmp_path / "release").mkdir()
    path = release(tmp_path / "release")
    splits = read(Wikitext103, (path,), tmp_path / "d")
    assert [name for name, _ in splits["train"]] == ["train/00000 First", "train/00001 Second"]
    assert [name for name, _ in splits["validation"]] == ["validation/00000 Third one"]
    assert {split: [text.decode() for _, text in documents] for split, documents in splits.items()} == ARTICLES
    if path.is_file():
        assert read(Wikitext103, (path.parent,), tmp_path / "e") == splits


def test_wikitext_real_text(tmp_path, shared_data):
    splits = read(Wikitext103, (shared_data / "wikitext",), tmp_path)
    assert set(splits) == {"validation", "test"}
    for split, file in (("validation", "valid.txt"), ("test", "test.txt")):
        assert joined(splits[split]) == (shared_data / "wikitext" / file).read_bytes()
        assert len(splits[split]) == 60  # articles, as the release says
        assert all(text.lstrip().startswith(b"= ") for _, text in splits[split])


def test_bad_wikitext(tmp_path):
    with pytest.raises(InputError, match="does not exist; put wikitext-103-raw-v1.zip"):
        Wikitext103.sources((str(tmp_path / "none"),))
    with pytest.raises(InputError, match="holds no WikiText-103; put"):
        Wikitext103.sources((str(tmp_path),))
    (tmp_path / "train.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="is not a complete zip file"):
        read(Wikitext103, (tmp_path / "train.zip",), tmp_path / "d")
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="is not a parquet file with a column 'text'"):
        read(Wikitext103, (tmp_path / "train.parquet",), tmp_path / "e")
    (tmp_path / "train.raw").write_bytes(b" \n = One = \n \n fine\n \n = Two = \n \n caf\xe9\n")
    with pytest.raises(InputError, match=r"train.raw' is not UTF-8 text: byte 0xe9 at offset 38"):
        read(Wikitext103, (tmp_path / "train.raw",), tmp_path / "f")


def test_wikitext_download(tmp_path, monkeypatch):
    origin = tmp_path / "origin"
    origin.mkdir()
    release_parquet(origin)
    monkeypatch.setattr(wikitext103, "RELEASE", origin.as_uri() + "/")
    train = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    held_out = ("validation-00000-of-00001.parquet", "test-00000-of-00001.parquet")
    assert wikitext103.RELEASE_FILES == train + held_out
    files = wikitext103.download(tmp_path / "downloads")
    assert [file.read_bytes() for file in files] == [(origin / file.name).read_bytes() for file in files]
    (origin / train[0]).unlink()
    assert wikitext103.download(tmp_path / "downloads") == files, "nothing is fetched twice"
    with pytest.raises(
        InputError, match="cannot download WikiText-103 from .* put wikitext-103-raw-v1.zip.* data.paths"
    ):
        wikitext103.download(tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").rglob("*.part"))


def test_wikitext_download_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(wikitext103, "RELEASE", "http://127.0.0.1:9/")
    with pytest.raises(InputError, match="cannot download"):
        builder = Wikitext103(data_dir=tmp_path, downloads=tmp_path / "downloads")
        builder.prepare(progress=False)
