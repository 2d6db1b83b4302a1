"""The token cache: built once, by one process, again when the data change or are damaged."""

import collections
import concurrent.futures
import json
import multiprocessing
import os

import numpy as np
import pytest

from seqpe_jax.data import tokens as text
from seqpe_jax.data.cache import staged_directory
from seqpe_jax.data.tokenizers import ByteTokenizer
from seqpe_jax.data.tokens import token_source
from seqpe_jax.errors import InputError
from seqpe_jax.files import cache_root


class Letters:
    """A tokenizer of 300 ids with an end of text: byte + 1, 0 between documents."""

    name, vocab_size, eos_id, fingerprint = "letters", 300, 0, "letters"
    special_tokens = frozenset({"<sep>"})

    def encode_many(self, texts):
        return [np.frombuffer(one, np.uint8).astype(np.uint16) + 1 for one in texts]

    def lost_characters(self, text):
        return collections.Counter()


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("".join(f"wörd {number} {line}\n" for line in range(200)))
    return folder


def source(files, cache, **changes):
    arguments = {"split": "train", "tokenizer": ByteTokenizer(), "paths": (files,), "cache_dir": cache}
    return token_source("text_files", **{**arguments, "progress": False, **changes})


def test_bytes(files, tmp_path):
    parts = [source(files, tmp_path / "c", split=split) for split in ("train", "validation", "test")]
    assert all(isinstance(part.tokens, np.memmap) and part.tokens.dtype == np.uint8 for part in parts)
    assert all(part.bytes == part.tokens.size and part.documents == 3 for part in parts)
    whole = [file.read_bytes() for file in sorted(files.iterdir())]
    assert sum(part.bytes for part in parts) == sum(map(len, whole))
    assert sum(part.words for part in parts) == 3 * 200 * 3
    assert whole[0].startswith(parts[0].tokens[:1000].tobytes())
    assert len({part.fingerprint for part in parts}) == 3


def test_eos_token_between_documents(files, tmp_path):
    plain = source(files, tmp_path / "c")
    letters = source(files, tmp_path / "c", tokenizer=Letters())
    assert letters.tokens.dtype == np.uint16
    assert (letters.bytes, letters.words) == (plain.bytes, plain.words)
    assert letters.tokens.size == plain.tokens.size + 2
    separators = np.flatnonzero(letters.tokens == 0)
    assert len(separators) == 2 and 0 < separators[0] and separators[-1] < letters.tokens.size - 1
    np.testing.assert_array_equal(letters.tokens[letters.tokens != 0] - 1, plain.tokens)


def test_pieces_of_a_document_are_not_separated(files, tmp_path, monkeypatch):
    whole = source(files, tmp_path / "c", tokenizer=Letters())
    from seqpe_jax.data.datasets import text_base

    monkeypatch.setattr(text_base.split_document, "__defaults__", (500,))
    monkeypatch.setattr(text, "BATCH_BYTES", 600)
    cut = source(files, tmp_path / "d", tokenizer=Letters())
    assert cut.fingerprint == whole.fingerprint and cut.documents == 3
    np.testing.assert_array_equal(cut.tokens, whole.tokens)


def test_skipped_files_are_reported_once(files, tmp_path, capsys):
    (files / "gone").symlink_to("nowhere")
    for split in ("train", "test", "train"):
        source(files, tmp_path / "c", split=split)
    assert capsys.readouterr().err == ""
    for split in ("train", "test", "train"):
        source(files, tmp_path / "c", split=split, progress=True)
    assert capsys.readouterr().err == f"data.paths: skipped: broken links: 1 ({files}/gone)\n"


def test_a_cache_that_cannot_be_named_is_refused(files, tmp_path):
    with pytest.raises(
        InputError, match="is not UTF-8, as that of the cache .*SEQPE_JAX_CACHE.* must be: choose another"
    ):
        source(files, tmp_path / os.fsdecode(b"caf\xe9"))


def test_work_is_done_once_and_again_when_something_changed(files, tmp_path, monkeypatch):
    calls = []
    tokenize = text._tokenize
    monkeypatch.setattr(text, "_tokenize", lambda *rest: (calls.append(1), tokenize(*rest)))
    first = source(files, tmp_path / "c")
    assert source(files, tmp_path / "c").fingerprint == first.fingerprint and len(calls) == 1
    assert source(files, tmp_path / "c", tokenizer=Letters()).fingerprint != first.fingerprint and len(calls) == 2
    (files / "1.txt").write_text("other words\n" * 300)
    assert source(files, tmp_path / "c").fingerprint != first.fingerprint and len(calls) == 3
    assert source(files, tmp_path / "elsewhere").fingerprint == source(files, tmp_path / "c").fingerprint


def test_damage_and_what_a_killed_process_left(files, tmp_path):
    first = source(files, tmp_path / "c")
    (folder,) = [path for path in (tmp_path / "c" / "tokens").iterdir() if path.is_dir()]
    left = folder.with_name(f".unfinished-{folder.name}-dead")
    left.mkdir()
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(10)
    again = source(files, tmp_path / "c")
    assert again.fingerprint == first.fingerprint and again.tokens.size == first.tokens.size
    assert not left.exists()
    (folder / "summary.json").write_text("{")
    assert source(files, tmp_path / "c").fingerprint == first.fingerprint


def test_failure_leaves_nothing(files, tmp_path):
    (files / "1.txt").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"1.txt' is not UTF-8 text: byte 0xff at offset 0;"):
        source(files, tmp_path / "c")
    assert not [path for path in (tmp_path / "c").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_without_locks_the_first_to_finish_stays(tmp_path):
    target = tmp_path / "target"
    with staged_directory(target, alone=False) as slow:
        (slow / "who").write_text("slow")
        with staged_directory(target, alone=False) as fast:
            (fast / "who").write_text("fast")
    assert (target / "who").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def _fingerprint(arguments):
    return source(*arguments).fingerprint


@pytest.mark.slow
def test_processes_at_once(files, tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        found = list(pool.map(_fingerprint, [(files, tmp_path / "c")] * 2))
    assert len(set(found)) == 1
    assert len([path for path in (tmp_path / "c" / "tokens").iterdir() if path.is_dir()]) == 1


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.delenv("SEQPE_JAX_CACHE", raising=False)
    assert cache_root() == cache_root("~/.cache/seqpe_jax")
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine" and cache_root("/x/y").as_posix() == "/x/y"


def test_data_dir_and_environment(files, tmp_path, monkeypatch):
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "mine"))
    source(files, "", data_dir=tmp_path / "sets")
    assert [path.name[:10] for path in (tmp_path / "sets").iterdir() if path.is_dir()] == ["text_files"]
    assert (tmp_path / "mine" / "tokens").is_dir() and not (tmp_path / "mine" / "datasets").exists()


def test_bad_input(files, tmp_path):
    with pytest.raises(InputError, match="unknown split 'valid'. Did you mean 'validation'"):
        source(files, tmp_path / "c", split="valid")
    with pytest.raises(InputError, match="unknown data set 'text_file'"):
        token_source("text_file", split="train", tokenizer=ByteTokenizer(), cache_dir=tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        source(tmp_path / "missing", tmp_path / "c")
    (tmp_path / "tiny.txt").write_text("x")
    with pytest.raises(InputError, match="'text_files' has no texts in split 'train'"):
        source(tmp_path / "tiny.txt", tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the cache .* set data.cache_dir"):
        source(files, tmp_path / "file")


def test_one_path_may_be_a_plain_string(files, tmp_path):
    assert source(files, tmp_path / "c", paths=str(files)).fingerprint == source(files, tmp_path / "c").fingerprint


@pytest.mark.slow
def test_wikitext_with_gpt2_tokens(shared_data, gpt2_tokenizer, tmp_path):
    tokenizer = gpt2_tokenizer
    arguments = {"split": "test", "tokenizer": tokenizer, "paths": (shared_data / "wikitext",)}
    found = token_source("wikitext103", cache_dir=tmp_path, progress=False, **arguments)
    content = (shared_data / "wikitext" / "test.txt").read_text()
    assert (found.bytes, found.words, found.documents) == (len(content.encode()), len(content.split()), 60)
    assert found.tokens.dtype == np.uint16 and (found.tokens == tokenizer.eos_id).sum() == 59
    assert tokenizer.decode(found.tokens[found.tokens != tokenizer.eos_id]) == content
    with pytest.raises(InputError, match="no texts in split 'train' .it has validation, test."):
        token_source("wikitext103", **{**arguments, "split": "train", "cache_dir": tmp_path})


def test_stdlib_text_needs_seconds_once(tmp_path):
    found = token_source(
        "stdlib_text", split="validation", tokenizer=ByteTokenizer(), cache_dir=tmp_path, progress=False
    )
    assert found.tokens.size == found.bytes > 100_000
    assert bytes(found.tokens).decode("utf-8")
    assert os.path.exists(tmp_path / "datasets")


class Deaf(Letters):
    """Letters that has no token for one of them."""

    name, fingerprint = "deaf", "deaf"

    def lost_characters(self, text):
        return collections.Counter({"ö": text.count("ö")})


def test_a_tokenizer_that_loses_text_must_be_accepted(files, tmp_path):
    with pytest.raises(InputError) as caught:
        source(files, tmp_path / "cache", tokenizer=Deaf())
    message = str(caught.value)
    assert "loses text" in message and "data.lossy_tokenizer=True" in message and "'ö'" in message
    assert not list((tmp_path / "cache" / "tokens").glob("text*")), "refused before anything is tokenized"
    found = source(files, tmp_path / "cache", tokenizer=Deaf(), accept_lossy=True)
    assert (
        0.15 < found.round_trip_loss.lost_bytes / found.round_trip_loss.checked_bytes < 0.2
        and found.round_trip_loss.examples == "ö"
    )
    with pytest.raises(InputError, match="loses text"):  # what was prepared with leave is not read without
        source(files, tmp_path / "cache", tokenizer=Deaf())
    assert source(files, tmp_path / "cache", tokenizer=Letters()).round_trip_loss.lost_bytes == 0


@pytest.mark.parametrize("gone", ["*.array_record*", "dataset_info.json", "features.json"])
def test_a_prepared_folder_that_was_cleaned_in_part_is_prepared_again(files, tmp_path, capsys, gone):
    cache = tmp_path / "cache"
    expected = source(files, cache).tokens.copy()
    for path in [*cache.rglob(gone), *cache.glob("tokens/*/tokens.bin")]:
        path.unlink()
    np.testing.assert_array_equal(source(files, cache).tokens, expected)
    assert "is incomplete, as if it had been cleaned in part: it is prepared again" in capsys.readouterr().err


def test_prepared_data_that_were_cut_short_are_prepared_again(files, tmp_path, capsys):
    cache = tmp_path / "c"
    expected = np.array(source(files, cache).tokens)
    for name in ("*.array_record*", "sizes_of_files.json"):
        (path,) = list(cache.rglob(name))[:1]
        whole = path.read_bytes()
        path.write_bytes(whole[:-7])
        for tokens in cache.glob("tokens/*/tokens.bin"):
            tokens.write_bytes(tokens.read_bytes()[:-1])
        np.testing.assert_array_equal(source(files, cache).tokens, expected)
        assert path.stat().st_size == len(whole)
    assert "is incomplete" in capsys.readouterr().err
    for path in cache.rglob("sizes_of_files.json"):
        path.unlink()  # as data that were prepared by older versions have none
    for summary, changes in (("dtype", "float32"), ("bytes", "many"), ("words", -1)):
        (path,) = (cache / "tokens").glob("*/summary.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {summary: changes}))
        assert source(files, cache).bytes == expected.size
    assert capsys.readouterr().err == ""


def test_caches_of_versions_without_round_trip_checks_are_read(files, tmp_path):
    first = source(files, tmp_path / "c", tokenizer=Deaf(), accept_lossy=True)
    (summary,) = (tmp_path / "c" / "tokens").glob("*/summary.json")
    content = json.loads(summary.read_text())
    del content["loss"]
    summary.write_text(json.dumps(content))
    again = source(files, tmp_path / "c", tokenizer=Deaf())
    assert (
        again.fingerprint == first.fingerprint
        and again.round_trip_loss.lost_bytes == again.round_trip_loss.checked_bytes == 0
    )


def test_fingerprints_are_those_of_all_versions(files, tmp_path):
    """Runs of older versions compare the fingerprint of their data with these."""
    found = [source(files, tmp_path / "c", tokenizer=one).fingerprint for one in (ByteTokenizer(), Letters())]
    assert found == ["331da7e847e999d7c9603f9a9e03d273", "1a27e3974c83c3a0090ea24d26e62a28"]
