import json

import numpy as np
import pytest

from seqpe_jax.data.tokenizers import ByteTokenizer, HFTokenizer, RoundTrip, check_loss, load_tokenizer, token_dtype
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


@pytest.mark.parametrize(
    "size, name", [(2, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_smallest_type_that_holds_the_ids(size, name):
    assert token_dtype(size) == np.dtype(name)


def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(TEXT.encode())
    assert ids.dtype == np.uint8 and ids.size == len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode(list(ids)) == TEXT
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([0xE4, 0xB8]) == "\ufffd"
    assert tokenizer.end_of_text is None and tokenizer.vocabulary_size == 256


def test_file_round_trip(small_file):
    tokenizer = load_tokenizer(small_file)
    assert isinstance(tokenizer, HFTokenizer) and tokenizer.name == "small"
    assert (tokenizer.vocabulary_size, tokenizer.end_of_text) == (257, 256)
    ids = tokenizer.encode(TEXT.encode())
    assert ids.dtype == np.uint16
    assert tokenizer.end_of_text not in ids, "text that spells a special token is text"
    assert tokenizer.decode(ids) == TEXT
    many = tokenizer.encode_many([b"ab", b"", "ü".encode()])
    assert [one.size for one in many] == [2, 0, 2]


def test_gpt2_round_trip(shared_data):
    tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer" / "tokenizer.json")
    assert (tokenizer.vocabulary_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode(b"Hello world").tolist() == [15496, 995]
    assert tokenizer.decode(tokenizer.encode(TEXT.encode())) == TEXT
    assert tokenizer.decode([50256]) == "<|endoftext|>"


def test_save_and_load(tmp_path, small_file):
    for tokenizer in (ByteTokenizer(), HFTokenizer(small_file)):
        folder = tmp_path / "saved" / tokenizer.name
        tokenizer.save(folder)
        for again in (load_tokenizer(folder), load_tokenizer(folder / "tokenizer.json"), type(tokenizer).load(folder)):
            assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
    with pytest.raises(InputError, match="not a HFTokenizer"):
        HFTokenizer.load(tmp_path / "saved" / "bytes")


def test_fingerprint_follows_the_file(tmp_path, small_file):
    changed = json.loads(small_file.read_text())
    changed["added_tokens"] = []
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed))
    assert HFTokenizer(other).fingerprint != HFTokenizer(small_file).fingerprint
    assert HFTokenizer(other).end_of_text is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"not json", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_file_that_is_no_tokenizer(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match="data.tokenizer.*is not a Hugging Face tokenizer.json"):
        load_tokenizer(file)
    with pytest.raises(InputError, match="is not a Hugging Face tokenizer.json"):
        HFTokenizer(file)


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


@pytest.mark.parametrize(
    "name, said",
    [
        ("tokenizer_config.json", {"eos_token": "<stop>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<stop>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "<stop>"}),
        ("generation_config.json", {"eos_token_id": [257]}),
        ("config.json", {"eos_token_id": 257}),
    ],
)
def test_the_end_of_text_is_what_the_files_beside_say(small_file, tmp_path, name, said):
    plain = load_tokenizer(with_tokens(small_file, ["<stop>"]))
    assert plain.end_of_text == 256 and not plain.fingerprint.endswith("257")
    (small_file.parent / name).write_text(json.dumps(said))
    found = load_tokenizer(small_file)
    assert found.end_of_text == 257 and found.fingerprint != plain.fingerprint
    found.save(tmp_path / "kept")  # it travels with a run
    kept = load_tokenizer(tmp_path / "kept")
    assert kept.end_of_text == 257 and kept.fingerprint == found.fingerprint


def test_a_bracketed_end_counts_only_where_it_is_special(tmp_path, small_file):
    content = json.loads(small_file.read_text())
    content["added_tokens"] = []
    small_file.write_text(json.dumps(content))
    assert load_tokenizer(with_tokens(small_file, plain=["[EOS]"])).end_of_text is None
    assert load_tokenizer(with_tokens(small_file, special=["<|im_end|>"])).end_of_text == 257


def test_an_end_that_the_tokenizer_does_not_have_is_refused(small_file):
    (small_file.parent / "tokenizer_config.json").write_text('{"eos_token": "</nothing>"}')
    with pytest.raises(InputError, match="names '</nothing>' as the end of text"):
        load_tokenizer(small_file)
    (small_file.parent / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_tokenizer(small_file)


def test_lost_characters_are_counted(small_file, tmp_path):
    import tokenizers

    whole = RoundTrip(load_tokenizer(small_file))
    whole.look(TEXT.encode())
    assert whole.loss.read == len(TEXT.encode()) and not whole.loss.lost
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: at for at, letter in enumerate("abcĠ")}, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "few.json"))
    few = load_tokenizer(tmp_path / "few.json")
    trip = RoundTrip(few)
    trip.look("a cab xü\n".encode())
    assert trip.loss.lost == 3 and set(trip.loss.characters) == set("xü") and trip.loss.read == 10
    check_loss(trip.loss, few, accepted=True)
    with pytest.raises(InputError, match="3 of 10 bytes"):
        check_loss(trip.loss, few, accepted=False)


def test_a_word_that_nothing_stands_for_is_one_line(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "fox": 1}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert tokenizer.encode(b"the fox").tolist() == [0, 1]
    with pytest.raises(InputError, match="cannot write the text"):
        tokenizer.encode(b"the wolf")


def test_ids_are_those_that_have_a_token(small_file):
    content = json.loads(small_file.read_text())
    content["added_tokens"][0]["id"] = 300
    small_file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(small_file)
    assert tokenizer.vocabulary_size == int(tokenizer.ids.max()) + 1 and len(tokenizer.ids) == 257
