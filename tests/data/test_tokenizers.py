"""Tokenizers: round trips, EOS tokens, added tokens, lost text, refusals."""

import json

import numpy as np
import pytest

from seqpe_jax.data.tokenizers import (
    ByteTokenizer,
    HFTokenizer,
    RoundTrip,
    check_round_trip,
    decode_continuation,
    load_tokenizer,
    token_dtype,
)
from seqpe_jax.errors import InputError

TEXT = "Grüße, 世界!\n\n\tdef f(x):  return x\r\n \x00 <|endoftext|> 🙂\n"


@pytest.fixture
def small_file(tmp_path):
    """A byte-level BPE made of the bytes only, with one special token."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    file = tmp_path / "small" / "tokenizer.json"
    file.parent.mkdir()
    tokenizer.save(str(file))
    return file


def test_smallest_type_that_holds_the_ids():
    sizes = (2, 256, 257, 65536, 65537)
    assert [token_dtype(size).name for size in sizes] == ["uint8", "uint8", "uint16", "uint16", "uint32"]


def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT.encode())
    assert ids.dtype == np.uint8 and ids.size == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode(list(ids)) == TEXT
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([0xE4, 0xB8]) == "\ufffd"
    assert tokenizer.eos_id is None and tokenizer.vocab_size == 256


def test_file_round_trip(small_file):
    tokenizer = load_tokenizer(small_file)
    assert isinstance(tokenizer, HFTokenizer) and tokenizer.name == "small"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    ids = tokenizer.encode(TEXT.encode())
    assert ids.dtype == np.uint16
    assert tokenizer.eos_id not in ids, "text that spells a special token is text"
    assert tokenizer.decode(ids) == TEXT
    many = tokenizer.encode_many([b"ab", b"", "ü".encode()])
    assert [one.size for one in many] == [2, 0, 2]


def test_gpt2_round_trip(shared_data):
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer" / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode(b"Hello world").tolist() == [15496, 995]
    assert tokenizer.decode(tokenizer.encode(TEXT.encode())) == TEXT
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_save_and_load(tmp_path, small_file):
    for tokenizer in (ByteTokenizer(), HFTokenizer(small_file)):
        folder = tmp_path / "saved" / tokenizer.name
        tokenizer.save(folder)
        for again in (load_tokenizer(folder), load_tokenizer(folder / "tokenizer.json")):
            assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint


def test_fingerprint_follows_the_file(tmp_path, small_file):
    changed = json.loads(small_file.read_text())
    changed["added_tokens"] = []
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed))
    assert HFTokenizer(other).fingerprint != HFTokenizer(small_file).fingerprint
    assert HFTokenizer(other).eos_id is None


def words_file(path, **fields):
    """A tokenizer of words, as its file says it, with some fields of its model changed."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"} | fields
    rest = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], **rest, "model": model}))
    return path


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    no_json = (b"", b"not json", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000)
    for content in (*no_json, b"{}", b"[1]", b"[]", b"null", b"3", b'{"model": {}}', b'{"model": {"type": "BPE"}}'):
        file.write_bytes(content)
        for load, path in ((load_tokenizer, file), (load_tokenizer, tmp_path), (HFTokenizer, file)):
            with pytest.raises(InputError, match="data.tokenizer.*is not a Hugging Face tokenizer.json") as caught:
                load(path)
            assert "\n" not in str(caught.value)
    for vocabulary in ({}, {"a": 2**24}, {"a": 2**32 - 1}, {"a": 2**40}, {"a": -1}, {"a": "b"}, []):
        with pytest.raises(InputError, match="is not a Hugging Face tokenizer.json"):
            load_tokenizer(words_file(tmp_path / "words.json", vocab=vocabulary))
    assert load_tokenizer(words_file(tmp_path / "words.json", vocab={"a": 2**20})).vocab_size == 2**20 + 1


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.json", tmp_path, "byte"):
        with pytest.raises(InputError, match='data.tokenizer: cannot read .* give "bytes" or'):
            load_tokenizer(path)


def test_bad_text_and_ids(small_file):
    with pytest.raises(InputError, match="byte 0xe9 at offset 3"):
        HFTokenizer(small_file).encode(b"caf\xe9 noir")
    for bad in ([256], [-1, 3]):
        with pytest.raises(InputError, match="outside the vocabulary of 'bytes'"):
            ByteTokenizer().decode(bad)


def with_tokens(file, special=(), plain=()):
    """The same tokenizer with further tokens."""
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(file))
    made.add_special_tokens(list(special))
    made.add_tokens(list(plain))
    made.save(str(file))
    return file


def test_files_next_to_the_tokenizer_name_the_eos_token(small_file, tmp_path):
    plain = load_tokenizer(with_tokens(small_file, ["<stop>"]))
    assert plain.eos_id == 256 and not plain.fingerprint.endswith("257")
    for name, content in (
        ("tokenizer_config.json", {"eos_token": "<stop>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<stop>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "<stop>"}),
        ("generation_config.json", {"eos_token_id": [257]}),
        ("config.json", {"eos_token_id": 257}),
    ):
        (small_file.parent / name).write_text(json.dumps(content))
        found = load_tokenizer(small_file)
        assert found.eos_id == 257 and found.fingerprint != plain.fingerprint
        found.save(tmp_path / "saved")
        saved = load_tokenizer(tmp_path / "saved")
        assert saved.eos_id == 257 and saved.fingerprint == found.fingerprint
        (small_file.parent / name).unlink()


def test_a_bracketed_end_counts_only_where_it_is_special(tmp_path, small_file):
    content = json.loads(small_file.read_text())
    content["added_tokens"] = []
    small_file.write_text(json.dumps(content))
    assert load_tokenizer(with_tokens(small_file, plain=["[EOS]"])).eos_id is None
    assert load_tokenizer(with_tokens(small_file, special=["<|im_end|>"])).eos_id == 257


def test_an_end_that_the_tokenizer_does_not_have_is_refused(small_file):
    (small_file.parent / "tokenizer_config.json").write_text('{"eos_token": "</nothing>"}')
    with pytest.raises(InputError, match="names '</nothing>' as the EOS token"):
        load_tokenizer(small_file)
    (small_file.parent / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_tokenizer(small_file)


def test_lost_characters_are_counted(small_file, tmp_path):
    whole = RoundTrip(load_tokenizer(small_file))
    whole.add(TEXT.encode())
    assert whole.loss.checked_bytes == len(TEXT.encode()) and not whole.loss.lost_bytes
    few = byte_level(tmp_path / "few.json", "abcĠ")
    trip = RoundTrip(few)
    trip.add("a cab xü\n".encode())
    assert trip.loss.lost_bytes == 4 and set(trip.loss.examples) == set("xü\n") and trip.loss.checked_bytes == 10
    check_round_trip(trip.loss, few, accepted=True)
    with pytest.raises(InputError, match="4 of 10 checked bytes"):
        check_round_trip(trip.loss, few, accepted=False)


def test_a_tokenizer_without_most_letters(shared_inputs):
    tokenizer = load_tokenizer(shared_inputs / "bytelevel_partial_alphabet.json")
    assert tokenizer.lost_characters("the fox\tBé") == {"\t": 1, "B": 1, "é": 1} and not tokenizer.lost_characters(
        "the fox"
    )


def test_ids_of_a_model_count_where_the_tokenizer_has_an_end_there(small_file):
    """The configs of many models name GPT-2's end, 50256, whatever the tokenizer has there."""
    with_tokens(small_file, ["<stop>"], ["word"])
    folder = small_file.parent
    for said, end in ((50256, 256), (65, 256), (258, 256), ([50256, 258, 257], 257), ("<stop>", 256), (None, 256)):
        (folder / "config.json").write_text(json.dumps({"eos_token_id": said}))
        assert load_tokenizer(small_file).eos_id == end, said
    (folder / "generation_config.json").write_text('{"eos_token_id": 257}')
    assert load_tokenizer(small_file).eos_id == 257
    (folder / "config.json").write_text('{"eos_token_id": 256}')
    assert load_tokenizer(small_file).eos_id == 256, "the model's own config comes first"
    (folder / "config.json").write_text("// of another program\n[]")
    assert load_tokenizer(small_file).eos_id == 257
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert load_tokenizer(small_file).eos_id == 257


def test_an_end_in_brackets(shared_inputs):
    tokenizer = load_tokenizer(shared_inputs / "eos_in_brackets.json")
    assert tokenizer.decode([tokenizer.eos_id]) == "[EOS]"
    assert not tokenizer.lost_characters(TEXT)


def test_a_run_from_before_ends_its_texts_as_it_did(small_file, tmp_path):
    """A run whose folder says nothing of an end began when a few names alone were known."""
    content = json.loads(small_file.read_text())
    content["added_tokens"][0]["content"] = "[EOS]"
    small_file.write_text(json.dumps(content))
    new = load_tokenizer(small_file)
    (small_file.parent / "config.json").write_text(
        json.dumps({"data": {}, "encoding": {}, "model": {}, "objective": {}})
    )
    old = load_tokenizer(small_file)
    assert (new.eos_id, old.eos_id) == (256, None)
    assert new.digest == old.digest and new.fingerprint != old.fingerprint == old.digest
    old.save(tmp_path / "old")
    assert not (tmp_path / "old" / "tokenizer_config.json").exists()
    new.save(small_file.parent)
    assert load_tokenizer(small_file).fingerprint == new.fingerprint


def byte_level(path, letters, normalizer=None):
    """A byte-level tokenizer that knows some letters of the alphabet of bytes alone."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={one: at for at, one in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    made.save(str(path))
    return load_tokenizer(path)


def word_level(path, words, normalizer=None):
    """A tokenizer of whole words, with an unknown one."""
    import tokenizers

    vocabulary = {word: number for number, word in enumerate(["[unknown]", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[unknown]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if normalizer:
        made.normalizer = normalizer
    made.save(str(path))
    return load_tokenizer(path)


def test_what_is_lost(tmp_path):
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    spaceless = byte_level(tmp_path / "1.json", [one for one in letters if one not in "ĠĊĉ"])
    assert spaceless.lost_characters("if x:\n\treturn x\n") == {" ": 2, "\n": 2, "\t": 1}
    half = byte_level(tmp_path / "2.json", [one for one in letters if one != "Ã"])
    assert half.lost_characters("é a é") == {"é": 2}
    nfc = byte_level(tmp_path / "3.json", letters, tokenizers.normalizers.NFC())
    assert not nfc.lost_characters("cafe\u0301"), "another way to write the same letter"
    words = word_level(tmp_path / "4.json", ["the", "fox"])
    assert not words.lost_characters("the  fox\n\tthe"), "white space between words"
    assert words.lost_characters("the known fox") == {"k": 1, "n": 2, "o": 1, "w": 1}, (
        "the name of the unknown token hides nothing"
    )
    small = word_level(tmp_path / "5.json", ["the", "fox"], tokenizers.normalizers.Lowercase())
    assert small.lost_characters("The Fox the") == {"T": 1, "F": 1}


def test_long_texts_are_checked_from_beginning_to_end_in_whole_words(tmp_path):
    tokenizer = word_level(tmp_path / "words.json", ["the", "fox", "naïve"])
    trip = RoundTrip(tokenizer, 256)
    trip.add("the naïve fox ".encode() * 20_000)
    assert not trip.loss.lost_bytes and 3000 < trip.loss.checked_bytes <= 4096
    trip = RoundTrip(tokenizer, 16)
    trip.add(b"the fox " * 20_000 + b"dog " * 40_000 + b"the fox " * 20_000)
    assert 0.2 < trip.loss.lost_bytes / trip.loss.checked_bytes < 0.4 and 60_000 < trip.loss.checked_bytes <= 65_536
    trip = RoundTrip(tokenizer)
    trip.add("狐".encode() * 1_000_000)  # no word ends
    assert trip.loss.lost_bytes == trip.loss.checked_bytes > 1_000_000


def metaspace(path):
    """A tokenizer as SentencePiece makes them, whose decoder drops the space before the first word."""
    import tokenizers

    pieces = [("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581fox", -1.0), ("es", -1.0), ("\u2581", -2.0)]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.save(str(path))
    return load_tokenizer(path)


def test_what_follows_a_prompt_keeps_its_first_space(tmp_path, small_file):
    tokenizer = metaspace(tmp_path / "metaspace.json")
    prompt, new = tokenizer.encode(b"the"), tokenizer.encode(b"foxes the")
    assert tokenizer.decode(new) == "foxes the" and decode_continuation(tokenizer, prompt, new) == " foxes the"
    assert decode_continuation(tokenizer, tokenizer.encode(b"the fox"), new[1:]) == "es the"
    for plain in (load_tokenizer(small_file), ByteTokenizer()):
        prompt, new = plain.encode("ü".encode()), plain.encode(" 世".encode())
        assert (
            decode_continuation(plain, prompt, new) == " 世"
            and decode_continuation(plain, prompt, new[:-1]) == " \ufffd"
        )
        assert decode_continuation(plain, prompt, []) == ""


def test_tokens_of_added_tokens_json_are_the_tokenizers(small_file, tmp_path):
    folder, plain = small_file.parent, load_tokenizer(small_file)
    (folder / "added_tokens.json").write_text('\ufeff{"<stop>": 258, "<word>": 257, "<|endoftext|>": 256}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    found = load_tokenizer(folder)
    assert (plain.vocab_size, found.vocab_size) == (257, 259) and found.digest != plain.digest
    assert found.eos_id == 258 and found.special_tokens == {"<|endoftext|>", "<stop>"}
    assert found.encode(b"<word>").tolist() == [257] and found.decode([258, 257]) == "<stop><word>"
    assert found.encode(b"<stop>").size == 6, "a special token is not read from text"
    found.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == found.fingerprint
    (folder / "added_tokens.json").write_text('{"<|endoftext|>": 256}')
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).fingerprint == plain.fingerprint, "nothing that is not there already"


def test_added_tokens_that_do_not_fit_are_refused(small_file):
    for content, words in (
        ('{"<word>": 256}', "gives '<word>' the id 256, but tokenizer.json next to it gives '<.endoftext.>' that id"),
        ('{"<|endoftext|>": 300}', "the id 300, but tokenizer.json next to it gives .* the id 256"),
        ('{"<word>": "257"}', "must give each token an id from 0"),
        ('["<word>"]', "must give each token an id from 0"),
        ("{", "is not JSON"),
        ('{"\\ud83d": 257}', "is not JSON .*half a surrogate pair"),
    ):
        (small_file.parent / "added_tokens.json").write_text(content)
        with pytest.raises(InputError, match=words):
            load_tokenizer(small_file)


def test_byte_order_marks_of_a_tokenizer(small_file):
    plain = load_tokenizer(small_file)
    small_file.write_bytes(b"\xef\xbb\xbf" + small_file.read_bytes())
    (small_file.parent / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token": "<|endoftext|>"}')
    assert load_tokenizer(small_file).fingerprint == plain.fingerprint


def test_a_word_that_nothing_stands_for_is_one_line(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "fox": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert tokenizer.encode(b"the fox").tolist() == [0, 1]
    with pytest.raises(InputError, match="cannot encode the text"):
        tokenizer.encode(b"the wolf")


def test_a_pattern_that_searches_without_end_is_one_line(tmp_path):
    """The library gives up with a PanicException, which is no Exception."""
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"fox": 0}, unk_token="fox"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(x+x+)+y"), "isolated")
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(InputError, match="cannot encode the text .*retry-limit"):
        load_tokenizer(tmp_path / "words.json").encode(b"x" * 40)


def test_ids_are_those_that_have_a_token(small_file):
    content = json.loads(small_file.read_text())
    content["added_tokens"][0]["id"] = 300
    small_file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(small_file)
    assert tokenizer.vocab_size == int(tokenizer.ids.max()) + 1 and len(tokenizer.ids) == 257
