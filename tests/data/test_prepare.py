"""Prepared data: the same tokens and images as without, in shards of which each host reads its part; kills lose no shard."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from seqpe_jax.config.schema import DataConfig
from seqpe_jax.data import image_records, images, prepare, shards, tokens
from seqpe_jax.data.loader import TrainLoader, eval_windows, training_windows
from seqpe_jax.data.tokenizers import load_tokenizer
from seqpe_jax.errors import InputError
from tests.data.test_tokenizers import with_tokens, word_level

LENGTH, BATCH = 16, 8
SHARD_BYTES = 1000
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_BYTES", 700)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files, and a tokenizer of more than 256 words with an EOS token."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "text").mkdir()
    for number in range(3):
        lines = [f"word {number} is <|endoftext|> {line}\n" for line in range(120)]
        (root / "text" / f"{number}.txt").write_text("".join(lines))
    words = ["word", "is", "<", "|", ">", "endoftext", "<|", "|>", *map(str, range(300))]
    word_level(root / "tokenizer.json", words)
    with_tokens(root / "tokenizer.json", ["[EOS]"])
    return root


@pytest.fixture
def settings(corpus, tmp_path):
    """The data section of a config."""
    return DataConfig(
        name="text_files",
        paths=(str(corpus / "text"),),
        tokenizer=str(corpus / "tokenizer.json"),
        cache_dir=str(tmp_path / "cache"),
    )


def make(settings, output, **options):
    return prepare.prepare(settings, output, **{"shard_bytes": SHARD_BYTES, "progress": False} | options)


def source(settings, split="train", prepared="", **changes):
    arguments = {"tokenizer": load_tokenizer(settings.tokenizer), "paths": settings.paths}
    arguments |= {"cache_dir": settings.cache_dir, "progress": False, "prepared": prepared}
    return tokens.token_source(settings.name, split=split, **arguments | changes)


def train_batches(found, rows=None, steps=6):
    loader = TrainLoader(training_windows(found.tokens, LENGTH), batch_size=BATCH, seed=3, rows=rows)
    return [loader.batch(step)["tokens"] for step in range(steps)]


def shard_times(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.tokens"))}


# --- Text


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_prepared_tokens_are_those_of_the_text(settings, tmp_path, tokenizer):
    if tokenizer == "bytes":
        settings = dataclasses.replace(settings, tokenizer="bytes")
    counts = make(settings, tmp_path / "out")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out" / "train").glob("*.tokens"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {SHARD_BYTES}
    for split in SPLITS:
        found, expected = source(settings, split, tmp_path / "out"), source(settings, split)
        assert (found.tokens.dtype, len(found.tokens)) == (expected.tokens.dtype, counts[split])
        np.testing.assert_array_equal(found.tokens[:], expected.tokens)
        np.testing.assert_array_equal(found.tokens[490:1510], expected.tokens[490:1510])  # over the ends of shards
        same = ("bytes", "words", "documents", "fingerprint", "special_token_counts")
        assert [getattr(found, name) for name in same] == [getattr(expected, name) for name in same]
    assert source(settings, prepared=tmp_path / "out").special_token_counts["<|endoftext|>"] > 300
    found, expected = source(settings, prepared=tmp_path / "out"), source(settings)
    np.testing.assert_array_equal(train_batches(found), train_batches(expected))
    for one, other in zip(eval_windows(found.tokens, 50, 4), eval_windows(expected.tokens, 50, 4), strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])


def test_hosts_read_their_own_windows_alone(settings, tmp_path, monkeypatch):
    make(settings, tmp_path / "out")
    read, original = [], shards.ShardReader.read

    def recorded(self, shard, start, stop):
        read.append((shard * SHARD_BYTES + start, shard * SHARD_BYTES + stop))
        return original(self, shard, start, stop)

    monkeypatch.setattr(shards.ShardReader, "read", recorded)
    found = source(settings, prepared=tmp_path / "out")
    assert not read, "opening reads no shard"
    steps = len(training_windows(found.tokens, LENGTH)) // BATCH  # of an epoch
    whole, parts, ranges = train_batches(found, steps=steps), [], []
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        read.clear()
        parts.append((rows, train_batches(source(settings, prepared=tmp_path / "out"), rows, steps)))
        ranges.append(sorted(read))
        assert sum(stop - start for start, stop in read) == steps * len(rows) * (LENGTH + 1) * 2
    for rows, batches in parts:
        np.testing.assert_array_equal(batches, np.array(whole)[:, rows])
    owners = np.zeros(found.tokens.size, int)
    for number, own in enumerate(ranges):
        for start, stop in own:
            assert not owners[start // 2 + 1 : stop // 2 - 1].any(), "windows share their outermost tokens alone"
            owners[start // 2 : stop // 2] = number + 1


def test_a_killed_preparation_continues_after_its_last_shard(settings, tmp_path, monkeypatch):
    make(settings, tmp_path / "whole")
    expected = json.loads((tmp_path / "whole" / "index.json").read_text())
    write, left = prepare._OpenShard.write, [0]

    def killed(self, content, count):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, content, count)

    def run_until_killed():
        with monkeypatch.context() as patch:
            left[0] = 2  # enough for a shard and the start of the next
            patch.setattr(prepare._OpenShard, "write", killed)
            make(settings, tmp_path / "out")

    finished, kills = {}, 0
    while kills < 20:
        with contextlib.suppress(KeyboardInterrupt):
            run_until_killed()
            break
        kills += 1
        with pytest.raises(InputError, match="has no index.json: its preparation has not finished; run .* again"):
            source(settings, prepared=tmp_path / "out")
        now = shard_times(tmp_path / "out")
        assert finished.items() < now.items(), "finished shards are finished, and there is one more"
        finished = now
    assert 2 < kills < 20 and finished.items() <= shard_times(tmp_path / "out").items()
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == expected
    assert not [path for path in (tmp_path / "out").rglob("*.part")]


def test_a_damaged_shard_and_those_after_it_are_written_again(settings, tmp_path):
    make(settings, tmp_path / "out")
    before, third = shard_times(tmp_path / "out"), tmp_path / "out" / "train" / "00002.tokens"
    content = third.read_bytes()
    third.write_bytes(b"\0\0" + content[2:])  # of the same size
    make(settings, tmp_path / "out")
    assert third.read_bytes() == content
    same = {name for name, time in shard_times(tmp_path / "out").items() if before[name] == time}
    assert same == {name for name in before if not name.startswith("train") or name < "train/00002"}


def test_a_shard_whose_state_is_damaged_is_written_again(settings, tmp_path):
    """The next one begins where it says."""
    make(settings, tmp_path / "out")
    index, state = (tmp_path / "out" / name for name in ("index.json", "train/00002.json"))
    expected = index.read_text()
    state.write_text(state.read_text().replace('"bytes": ', '"bytes": 1'))
    (tmp_path / "out" / "train" / "00003.json").unlink()
    make(settings, tmp_path / "out")
    assert index.read_text() == expected


def test_processes_write_what_one_writes(settings, tmp_path):
    for processes in (1, 2):
        make(settings, tmp_path / str(processes), processes=processes)
    one, two = ((tmp_path / name / "index.json").read_text() for name in ("1", "2"))
    assert one == two


def broken_index(folder):
    file = folder / "index.json"
    file.write_text(file.read_text().replace('"documents": 3', '"documents": 4'))


def cut_shard(folder):
    (folder / "train" / "00001.tokens").write_bytes(b"12345")


def missing_shard(folder):
    (folder / "train" / "00001.tokens").unlink()


def other_words(folder):
    return {"tokenizer": load_tokenizer("bytes")}


@pytest.mark.parametrize(
    "change, message",
    [
        (broken_index, r"index.json' is damaged \(its checksum is another\): run `.*prepare` again"),
        (lambda folder: (folder / "index.json").write_text("{"), "index.json' is damaged"),
        (cut_shard, "shard .*00001.tokens' has 5 of 1,000 bytes: run `.*prepare` again with the same --output"),
        (missing_shard, "shard .*00001.tokens' is missing: run"),
        (
            other_words,
            r"was tokenized with '.*' \(hf-.*\), but data.tokenizer is 'bytes' \(bytes-1\): set data.tokenizer=",
        ),
    ],
)
def test_what_training_refuses(settings, tmp_path, change, message):
    make(settings, tmp_path / "out")
    changes = change(tmp_path / "out")
    with pytest.raises(InputError, match=message) as caught:
        source(settings, prepared=tmp_path / "out", **changes if isinstance(changes, dict) else {})
    assert "\n" not in str(caught.value)


def test_other_data_and_lengths_are_refused(settings, tmp_path):
    make(settings, tmp_path / "out")
    with pytest.raises(InputError, match="holds 'text_files', but data.name='stdlib_text'"):
        tokens.token_source("stdlib_text", split="train", tokenizer=load_tokenizer("bytes"), prepared=tmp_path / "out")
    with pytest.raises(InputError, match="missing' has no index.json: give the folder that `.*prepare` has written"):
        source(settings, prepared=tmp_path / "missing")
    count = len(source(settings, prepared=tmp_path / "out").tokens)
    with pytest.raises(
        InputError, match=f"a window of {count} tokens needs {count + 1}, but the split has {count}: low"
    ):
        training_windows(source(settings, prepared=tmp_path / "out").tokens, count)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tokenizer": "bytes"}, "holds shards with tokenizer=hf-.*, not bytes-1: choose another folder"),
        ({"name": "qa_jsonl"}, "has questions, which need no preparation"),
        ({"name": "digit_images", "paths": ()}, "data.name='digit_images' needs no preparation"),
        ({"prepared": "there"}, "data.prepared='there' is read by runs, not by their preparation: leave it out"),
    ],
)
def test_what_the_preparation_refuses(settings, tmp_path, fields, message):
    make(settings, tmp_path / "out")
    with pytest.raises(InputError, match=message):
        make(dataclasses.replace(settings, **fields), tmp_path / "out")


def test_a_folder_of_something_else_is_refused(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and has no plan.json: choose a new or empty folder"):
        make(settings, tmp_path / "out")


def test_several_hosts_refuse_to_tokenize_much(settings, tmp_path):
    with pytest.raises(
        InputError, match=r"GB of text, and every host .*: do it once .*`python -m seqpe_jax.prepare --c"
    ):
        source(settings, max_bytes=100)
    expected = source(settings, max_bytes=10**6)
    assert source(settings, max_bytes=100).fingerprint == expected.fingerprint, "it is in the cache now"
    make(settings, tmp_path / "out")
    assert source(settings, prepared=tmp_path / "out", max_bytes=1).fingerprint == expected.fingerprint


def test_text_that_the_tokenizer_loses_is_refused_at_once(settings, corpus, tmp_path):
    word_level(tmp_path / "few.json", ["word"])
    settings = dataclasses.replace(settings, tokenizer=str(tmp_path / "few.json"))
    with pytest.raises(InputError, match="loses text"):
        make(settings, tmp_path / "out")
    settings = dataclasses.replace(settings, lossy_tokenizer=True)
    make(settings, tmp_path / "out")
    assert source(settings, prepared=tmp_path / "out", accept_lossy=True).round_trip_loss.lost_bytes
    with pytest.raises(InputError, match="loses text"):
        source(settings, prepared=tmp_path / "out")


def test_shards_in_a_bucket(settings, store, monkeypatch):
    from seqpe_jax import buckets
    from seqpe_jax.files import as_path

    make(settings, store.folder)
    (as_path(store.folder) / "train" / "00001.tokens").unlink()
    with pytest.raises(InputError, match="00001.tokens' is missing"):
        source(settings, prepared=store.folder)
    make(settings, store.folder)
    read, original = [], buckets.RemotePath.read_range

    def recorded(self, start, stop):
        read.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(buckets.RemotePath, "read_range", recorded)
    found, expected = source(settings, prepared=store.folder), source(settings)
    assert found.fingerprint == expected.fingerprint and not read
    np.testing.assert_array_equal(
        train_batches(found, [2, 5], 2), np.array(train_batches(expected, steps=2))[:, [2, 5]]
    )
    assert sum(read) == 2 * 2 * (LENGTH + 1) * 2, "the windows, and nothing else"
    read.clear()
    held_out = source(settings, "test", prepared=store.folder)
    for length in (16, 50):
        assert (
            sum(batch["scored"].sum() for batch in eval_windows(held_out.tokens, length, 4)) == held_out.tokens.size - 1
        )
    assert sum(read) == 2 * held_out.tokens.size, "once for all lengths"


# --- Images


@pytest.fixture
def photos(settings, tmp_path):
    """The data section of a config on 24 small images in three classes, of which some are of other sizes."""
    draw, root = np.random.default_rng(0), tmp_path / "photos"
    for split, count in (("train", 6), ("validation", 2)):
        for label in ("ant", "bee", "cow"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (8, 8 + number, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    settings = dataclasses.replace(settings, name="image_folder", paths=(str(root),))
    return settings


def image_split(settings, split="train", prepared="", **changes):
    return images.image_source(
        settings.name,
        split=split,
        paths=settings.paths,
        cache_dir=settings.cache_dir,
        progress=False,
        prepared=prepared,
        **changes,
    )


def same_images(found, expected, facts=()):
    assert len(found) == len(expected)
    own = ("records", "decode", "content")
    facts = facts or [field.name for field in dataclasses.fields(found) if field.name not in own]
    assert [getattr(found, name) for name in facts] == [getattr(expected, name) for name in facts]
    for index in (*range(len(found)), 0):
        one, other = found[index], expected[index]
        assert one["label"] == other["label"]
        np.testing.assert_array_equal(one["image"], other["image"])


def test_prepared_images_are_the_files(photos, tmp_path, capsys):
    assert make(photos, tmp_path / "out", processes=2, progress=True) == {"train": 18, "validation": 6}
    assert "split 'test' is left out: data.paths" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "train").glob("*.array_record"))) > 2
    for split in ("train", "validation"):
        same_images(image_split(photos, split, tmp_path / "out"), image_split(photos, split))
    with pytest.raises(InputError, match="has no split 'test' .it has train, validation."):
        image_split(photos, "test", tmp_path / "out")
    with pytest.raises(InputError, match="was prepared with data.bit_depth=0, not 12"):
        image_split(photos, prepared=tmp_path / "out", bit_depth=12)


def test_splits_of_the_same_images_share_their_shards(photos, tmp_path):
    """As the two held-out splits of ImageNet do."""
    root = pathlib.Path(photos.paths[0])
    shutil.copytree(root / "validation", root / "test")
    assert make(photos, tmp_path / "out") == {"train": 18, "validation": 6, "test": 6}
    assert not (tmp_path / "out" / "test").exists()
    same_images(image_split(photos, "test", tmp_path / "out"), image_split(photos, "test"), ("name", "fingerprint"))


def test_a_killed_preparation_of_images_continues(photos, tmp_path, monkeypatch):
    make(photos, tmp_path / "whole")
    encode, seen = image_records.encode, []

    def killed(source, index):
        seen.append(index)
        if index == 9:
            raise KeyboardInterrupt
        return encode(source, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_records, "encode", killed)
        make(photos, tmp_path / "out")
    finished = len(list((tmp_path / "out" / "train").glob("*.array_record")))
    assert finished > 1
    monkeypatch.setattr(image_records, "encode", lambda source, index: (seen.append(index), encode(source, index))[1])
    seen.clear()
    make(photos, tmp_path / "out")
    assert 1 < seen[0] <= 9, "what is finished is not read again"
    for name in ("index.json", "train/00001.array_record"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_images_in_a_bucket(photos, store, monkeypatch):
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", store.address)  # ArrayRecord reads buckets by itself
    make(photos, store.folder)
    same_images(image_split(photos, "validation", store.folder), image_split(photos, "validation"))
