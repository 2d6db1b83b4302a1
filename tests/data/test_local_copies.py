"""Local copies of data in a bucket: downloaded once for each version."""

import os

import numpy as np
import pytest

from seqpe_jax import files
from seqpe_jax.data.cache import local_copies
from seqpe_jax.data.tokenizers import load_tokenizer
from seqpe_jax.data.tokens import token_source
from seqpe_jax.errors import InputError
from seqpe_jax.files import as_path, atomic_write

TEXTS = {f"part/{number}.txt": f"{number} times {number} is {number**2}\n" * 40 for number in range(3)}


@pytest.fixture
def texts(store):
    for name, text in TEXTS.items():
        atomic_write(as_path(store.folder) / name, text)
    return store.folder


def held(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in files.list_files(folder)}


def test_a_folder_is_copied_once_for_each_version(texts, tmp_path, monkeypatch):
    place, took = as_path(texts), []
    download = type(place).download
    monkeypatch.setattr(type(place), "download", lambda self, file: (took.append(self.name), download(self, file)))
    own = tmp_path / "own.txt"
    (here, same) = local_copies([texts, str(own)], tmp_path)
    assert same == str(own) and held(as_path(here)) == TEXTS and len(took) == 3
    times = {path.name: path.stat().st_mtime_ns for path in files.list_files(as_path(here))}
    assert local_copies([texts], tmp_path) == (here,) and len(took) == 3, "it is here already"

    atomic_write(place / "part" / "1.txt", "another")
    (place / "part" / "2.txt").unlink()
    local_copies([texts], tmp_path)
    assert took[3:] == ["1.txt"]
    assert held(as_path(here)) == {"part/0.txt": TEXTS["part/0.txt"], "part/1.txt": "another"}
    now = {path.name: path.stat().st_mtime_ns for path in files.list_files(as_path(here))}
    assert now["0.txt"] == times["0.txt"] and now["1.txt"] != times["1.txt"]


def test_missing_data_are_refused(texts, tmp_path):
    for path, words in (
        (f"{texts}/nothing", "there is nothing at"),
        (f"{texts}/part/*.txt", "is a pattern"),
        ("gs://no-such-bucket/texts", "there is nothing at|cannot be downloaded"),
    ):
        with pytest.raises(InputError, match=f"data.paths: .*{words}"):
            local_copies([path], tmp_path)


def test_tokens_and_tokenizers_of_a_store_are_those_of_a_disk(texts, tmp_path):
    for name, text in TEXTS.items():
        atomic_write(tmp_path / "texts" / name, text)
    tokenizer = load_tokenizer("bytes")
    one, other = (
        token_source(
            "text_files", split="train", tokenizer=tokenizer, paths=paths, cache_dir=tmp_path / "cache", progress=False
        )
        for paths in ([str(tmp_path / "texts")], [texts])
    )
    np.testing.assert_array_equal(one.tokens, other.tokens)
    tokenizer.save(texts)
    assert (
        load_tokenizer(texts).digest == load_tokenizer(os.path.join(texts, "tokenizer.json")).digest == tokenizer.digest
    )
    with pytest.raises(InputError, match=f"data.tokenizer: cannot read '{texts}/none.json' .No such file"):
        load_tokenizer(f"{texts}/none.json")
