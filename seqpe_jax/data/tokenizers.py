"""Tokenizers: bytes, or a Hugging Face `tokenizer.json` with the files next to it."""

import collections
import dataclasses
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from seqpe_jax.data.formats import strip_bom
from seqpe_jax.errors import InputError
from seqpe_jax.files import AnyPath, as_path, atomic_write, parse_json, parse_json_text

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
GPT2_VOCABULARY_FILE = "vocab.json"
GPT2_MERGES_FILE = "merges.txt"
# Sets of files that make a tokenizer; the first one that exists counts.
TOKENIZER_FILE_SETS = ((TOKENIZER_FILE,), (GPT2_VOCABULARY_FILE, GPT2_MERGES_FILE))
# Files next to a tokenizer.json -> the key that names its EOS token, the most trusted first.
EOS_FILES = {
    TOKENIZER_CONFIG_FILE: "eos_token",
    SPECIAL_TOKENS_FILE: "eos_token",
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
}
BOS_FILES = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)  # may name a bos_token
# In this order: GPT-2 and its successors, Llama 3, T5 and Llama 2, Gemma.
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
SPECIAL_EOS_TOKENS = ("[EOS]", "<EOS>", "<|eos|>", "<|im_end|>")  # EOS only if the tokenizer marks them as special
RUN_CONFIG_SECTIONS = {
    "data",
    "encoding",
    "objective",
}  # tell the config.json of a run from that of a Hugging Face model
BYTES_WITH_END = "bytes_eos"
BYTE_TOKENIZERS = ("bytes", BYTES_WITH_END)  # values of `data.tokenizer` that name no file
MAX_TOKEN_IDS = 1 << 24  # a model has an embedding row for each
ROUND_TRIP_BYTES = 1 << 20  # of a split that are encoded and decoded for comparison
ROUND_TRIP_PART_BYTES = 4096  # of a longer text that are compared in one piece


class Tokenizer(Protocol):
    """The interface of a tokenizer.

    Attributes:
      name: human-readable name.
      vocab_size: ids are 0 .. vocab_size - 1.
      ids: rising; those that have a token.
      eos_id: the id between documents, or None.
      start_id: the id that an empty prompt begins with, or None.
      adds_start: other programs begin each text with that id, as its file says; `encode` never does.
      special_tokens: their spelling in a text is encoded as plain text.
      digest: hex digits, equal for tokenizers that give equal ids.
      fingerprint: hex digits, equal for tokenizers that give equal ids and have the same EOS token.
    """

    name: str
    vocab_size: int
    ids: np.ndarray
    eos_id: int | None
    start_id: int | None
    adds_start: bool
    special_tokens: frozenset[str]
    digest: str
    fingerprint: str

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the ids of UTF-8 text, 1-D of `token_dtype`. Raises: InputError: not UTF-8."""

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores if the tokenizer can."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; incomplete characters become U+FFFD."""

    def lost_characters(self, text: str) -> collections.Counter[str]:
        """Counts the characters of a text that do not survive encoding and decoding. Raises: InputError as `encode`."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json, which `load_tokenizer` reads, and a file that names the EOS token."""


def decode_continuation(tokenizer: Tokenizer, prompt: Iterable[int], ids: Iterable[int]) -> str:
    """Returns the text that ids add after a prompt.

    Decoded without the prompt they may give another: Metaspace tokenizers drop the space before the first word, others
    join the parts of a word.

    Args:
      tokenizer: tokenizer of all ids.
      prompt: ids before them.
      ids: token ids to decode.
    """
    before, after = (
        np.asarray(part if isinstance(part, np.ndarray) else list(part), np.int64) for part in (prompt, ids)
    )
    if before.tolist() == [tokenizer.start_id]:  # no text comes before
        return tokenizer.decode(after)
    prompt_text, text = tokenizer.decode(before), tokenizer.decode(np.concatenate([before, after]))
    return text[len(os.path.commonprefix([prompt_text, text])) :]


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint8, uint16 and uint32 that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


class ByteTokenizer:
    """The 256 values of a byte as ids; encodes any bytes, UTF-8 or not.

    Args:
      with_end: byte 255, which no UTF-8 text has, is the EOS token; else there is none.
    """

    name = "bytes"
    vocab_size = 256
    ids = np.arange(256)
    start_id = ord("\n")  # files of text end with it
    adds_start = False
    special_tokens: frozenset[str] = frozenset()

    def __init__(self, with_end: bool = False):
        self.eos_id = 255 if with_end else None
        self.digest = self.fingerprint = "bytes-1-end-255" if with_end else "bytes-1"

    def encode(self, text: bytes) -> np.ndarray:
        """Returns uint8[len(text)]."""
        return np.frombuffer(text, np.uint8)

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids in 0..255; incomplete characters become U+FFFD."""
        return _check_ids(ids, self).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def lost_characters(self, text: str) -> collections.Counter[str]:
        """Returns nothing: bytes lose no character."""
        return collections.Counter()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json."""
        _write(directory, json.dumps({"seqpe_jax": self.name if self.eos_id is None else BYTES_WITH_END}).encode())


class HFTokenizer:
    """A tokenizer in the JSON format of Hugging Face `tokenizers`.

    Special tokens spelled out in a text are encoded as plain text, and none are added. The EOS token is the one that
    the files next to tokenizer.json name (`EOS_FILES`), else the first of `EOS_TOKENS` in the vocabulary, else of
    `SPECIAL_EOS_TOKENS`. The folder of a run has a file with its EOS token (`save`); a run without that file is older
    than `SPECIAL_EOS_TOKENS`, which do not count there. Tokens of an added_tokens.json are added if tokenizer.json
    lacks them, and `save` writes them into it.

    Args:
      path: the file, or a folder that holds tokenizer.json, or GPT-2's vocab.json and merges.txt.

    Raises:
      InputError: no such file, not a tokenizer, or a file next to it names an EOS token that it does not have.
    """

    def __init__(self, path: str | os.PathLike):
        file = as_path(path).expanduser()
        file = file / TOKENIZER_FILE if file.is_dir() else file
        self._content = _tokenizer_json(file)
        siblings = _sibling_configs(file)
        self._tokenizer = _build(self._content, file)
        added = _extra_tokens(file, self._tokenizer.get_vocab(with_added_tokens=True))
        if added:
            self._content = _with_added_tokens(self._content, added, _special_token_names(siblings))
            self._tokenizer = _build(self._content, file)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        _check_vocabulary(vocabulary, file)
        self.name = file.parent.name or file.stem
        self.vocab_size = max(vocabulary.values()) + 1
        self.ids = np.unique(list(vocabulary.values()))
        self._set_eos(file, siblings, vocabulary)
        content = parse_json(self._content)
        self._unknown_id = vocabulary.get(content["model"].get("unk_token"), content["model"].get("unk_id"))
        self._is_byte_level = "ByteLevel" in json.dumps(content.get("pre_tokenizer"))
        self._dtype = token_dtype(self.vocab_size)

    def _set_eos(self, file: AnyPath, siblings: Mapping[str, Mapping[str, Any]], vocabulary: Mapping[str, int]) -> None:
        """Sets `eos_id`, `start_id`, `special_tokens`, `digest` and `fingerprint`."""
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        usual = next((vocabulary[token] for token in EOS_TOKENS if token in vocabulary), None)
        candidates = [_configured_eos_id(file, siblings, vocabulary, special), usual]
        if not siblings.get("config.json", {}).keys() >= RUN_CONFIG_SECTIONS:
            candidates += [vocabulary[token] for token in SPECIAL_EOS_TOKENS if token in special]
        self.eos_id = next((token_id for token_id in candidates if token_id is not None), None)
        bos_tokens = [_token_name(siblings.get(name, {}).get("bos_token")) for name in BOS_FILES]
        # A run's folder names its EOS token alone, which is what came before each text in training.
        self.start_id = next(
            (vocabulary[token] for token in bos_tokens if isinstance(token, str) and token in vocabulary), self.eos_id
        )
        self.adds_start = self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [self.start_id]
        self.special_tokens = frozenset(special) | {token for token in EOS_TOKENS if token in vocabulary}
        self.digest = self.fingerprint = "hf-" + hashlib.sha256(self._content).hexdigest()[:16]
        if self.eos_id != usual:  # documents are joined in another way than the file alone says
            self.fingerprint += f"-end-{self.eos_id}"

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the ids of UTF-8 text, uint8, uint16 or uint32[tokens]. Raises: InputError: not UTF-8."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores. Raises: InputError: not UTF-8, or a word has no token."""
        decoded = [_decode_utf8(text) for text in texts]
        try:
            encoded = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        except BaseException as error:
            _reraise_others(error)
            raise InputError(
                f"tokenizer '{self.name}' cannot encode the text ({error}): give one that has a token for every character, "
                'such as a byte-level one, or data.tokenizer="bytes"'
            ) from None
        return [np.array(one.ids, self._dtype) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, special tokens included. Raises: InputError: the tokenizer's decoder fails."""
        given = _check_ids(ids, self).tolist()
        try:
            return self._tokenizer.decode(given, skip_special_tokens=False)
        except BaseException as error:
            _reraise_others(error)
            raise InputError(f"tokenizer '{self.name}' cannot decode tokens ({error}): repair its decoder") from None

    def lost_characters(self, text: str) -> collections.Counter[str]:
        """Counts the characters that encoding and decoding does not give back, at any position of the text.

        They are unknown to the tokenizer, or changed by it (such as capital letters). NFC and NFD of a letter with
        accents are equal. White space counts for byte-level tokenizers only: others ignore by design how many spaces
        separate words.
        """
        ids = self.encode(text.encode())
        decoded = self.decode(ids[ids != self._unknown_id] if self._unknown_id is not None else ids)
        expected = text if self._is_byte_level else "".join(text.split())
        counts = [collections.Counter(unicodedata.normalize("NFC", one)) for one in (expected, decoded)]
        return counts[0] - counts[1]

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json, unchanged from the file that was loaded, and a file that names the EOS token."""
        _write(directory, self._content)
        if self.eos_id is not None:
            eos = {"eos_token": self._tokenizer.id_to_token(self.eos_id)}
            _write(directory, json.dumps(eos).encode(), TOKENIZER_CONFIG_FILE)


def _reraise_others(error: BaseException) -> None:
    """Raises an error again that is not the library's: it raises bare Exception, and PanicException, a BaseException."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _build(content: bytes, file: AnyPath) -> Any:
    """Returns the `tokenizers.Tokenizer` of a tokenizer.json. Raises: InputError: it is none."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except BaseException as error:
        _reraise_others(error)
        raise _not_a_tokenizer(file, error) from None


def _check_vocabulary(vocabulary: Mapping[str, int], file: AnyPath) -> None:
    """Raises InputError for an empty vocabulary, and for ids that no model could embed."""
    if not vocabulary:
        raise _not_a_tokenizer(file, "its vocabulary is empty")
    if max(vocabulary.values()) >= MAX_TOKEN_IDS:
        raise _not_a_tokenizer(file, f"its largest id is {max(vocabulary.values())}, the limit is {MAX_TOKEN_IDS - 1}")


def _tokenizer_json(file: AnyPath) -> bytes:
    """Returns the content of a tokenizer.json, made of GPT-2's vocab.json and merges.txt if only these exist."""
    vocabulary, merges = file.parent / GPT2_VOCABULARY_FILE, file.parent / GPT2_MERGES_FILE
    if file.name != TOKENIZER_FILE or file.exists() or not (vocabulary.is_file() and merges.is_file()):
        return _read(file)
    import tokenizers

    try:
        lines = _read(merges).decode("utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        return tokenizers.ByteLevelBPETokenizer(parse_json(_read(vocabulary)), pairs).to_str().encode()
    except BaseException as error:
        _reraise_others(error)
        raise InputError(
            f"vocab.json and merges.txt in '{file.parent}' are no tokenizer ({error}): repair them, or give a tokenizer.json"
        ) from None


def _extra_tokens(file: AnyPath, vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Returns the tokens and ids of the added_tokens.json next to a tokenizer.json that its vocabulary lacks.

    Raises:
      InputError: it cannot be read, or contradicts the tokenizer.json.
    """
    path = file.parent / ADDED_TOKENS_FILE
    if file.name != TOKENIZER_FILE or not path.is_file():
        return {}
    try:
        added = parse_json_text(_read(path))
    except ValueError as error:
        raise InputError(f"'{path}', next to the tokenizer, is not JSON ({error}): repair or remove it") from None
    if not isinstance(added, dict) or not all(
        type(number) is int and 0 <= number < MAX_TOKEN_IDS for number in added.values()
    ):
        raise InputError(
            f"'{path}', next to the tokenizer, must give each token an id from 0 to {MAX_TOKEN_IDS - 1}, as "
            '{"<token>": 50257}: repair or remove it'
        )
    tokens = {number: token for token, number in vocabulary.items()}
    for token, number in added.items():
        if vocabulary.get(token, number) != number or tokens.get(number, token) != token:
            other = f"{token!r} the id {vocabulary[token]}" if token in vocabulary else f"{tokens[number]!r} that id"
            raise InputError(
                f"'{path}' gives {token!r} the id {number}, but {TOKENIZER_FILE} next to it gives {other}: they are of two "
                "tokenizers; remove the one that is not the model's"
            )
    return {token: number for token, number in added.items() if token not in vocabulary}


def _with_added_tokens(content: bytes, added: Mapping[str, int], special: set[str]) -> bytes:
    """Returns the content of a tokenizer.json with more tokens, as `transformers` adds them."""
    changed = parse_json(content)
    changed["added_tokens"] = [
        *(changed.get("added_tokens") or ()),
        *(
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": token not in special,
                "special": token in special,
            }
            for token, number in sorted(added.items(), key=lambda item: item[1])
        ),
    ]
    return json.dumps(changed, ensure_ascii=False).encode()


def _special_token_names(siblings: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Returns the tokens that the files next to a tokenizer.json call special, such as eos_token."""
    found = []
    for name in (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE):
        settings = siblings.get(name, {})
        found += [value for key, value in settings.items() if key.endswith("_token")]
        more = settings.get("additional_special_tokens")
        found += more if isinstance(more, list) else []
    return {token for token in map(_token_name, found) if isinstance(token, str)}


def _sibling_configs(file: AnyPath) -> dict[str, Mapping[str, Any]]:
    """Returns the content of the files of `EOS_FILES` next to a tokenizer.json, by name.

    Raises:
      InputError: one of the tokenizer's own cannot be read; others of these names may belong to anything.
    """
    found = {}
    for name, key in EOS_FILES.items():
        path = file.parent / name
        if file.name != TOKENIZER_FILE or not path.is_file():
            continue
        try:
            content = parse_json(_read(path))
        except ValueError as error:
            if key == "eos_token":
                raise InputError(
                    f"'{path}', next to the tokenizer, is not JSON ({error}): repair or remove it"
                ) from None
            continue
        if isinstance(content, dict):
            found[name] = content
    return found


def _token_name(value: Any) -> Any:
    """Returns the token that a field such as "eos_token" names, by itself or as the content of an object."""
    return value.get("content") if isinstance(value, dict) else value


def _configured_eos_id(
    file: AnyPath, siblings: Mapping[str, Mapping[str, Any]], vocabulary: Mapping[str, int], special: set[str]
) -> int | None:
    """Returns the EOS id that the files next to a tokenizer.json name, or None.

    An id counts if a special token or one of `EOS_TOKENS` has it: the configs of many models name GPT-2's id, whatever
    token their tokenizer has there.

    Raises:
      InputError: the tokenizer's own files name a token that it does not have.
    """
    eos_ids = {vocabulary[token] for token in (*special, *EOS_TOKENS) if token in vocabulary}
    for name, key in EOS_FILES.items():
        value = siblings.get(name, {}).get(key)
        if key == "eos_token_id":
            for token_id in value if isinstance(value, list) else [value]:
                if isinstance(token_id, int) and token_id in eos_ids:
                    return token_id
            continue
        token = _token_name(value)
        if token is None:
            continue
        if not isinstance(token, str) or token not in vocabulary:
            raise InputError(
                f"'{file.parent / name}' names {token!r} as the EOS token ({key}), which {TOKENIZER_FILE} next to it does "
                "not have: name one of its tokens, or remove that line"
            )
        return vocabulary[token]
    return None


@dataclasses.dataclass(frozen=True)
class RoundTripLoss:
    """Text that encoding and decoding does not give back.

    Attributes:
      lost_bytes: UTF-8 bytes that are lost.
      checked_bytes: UTF-8 bytes that were checked.
      examples: some of the lost characters, the most frequent ones first.
    """

    lost_bytes: int = 0
    checked_bytes: int = 0
    examples: str = ""

    def __str__(self) -> str:
        percent = 100 * self.lost_bytes / max(self.checked_bytes, 1)
        return (
            f"{self.lost_bytes:,} of {self.checked_bytes:,} checked bytes ({percent:.2g}%), such as {self.examples!r}"
        )


class RoundTrip:
    """Check of some texts against their decoded tokens (`Tokenizer.lost_characters`).

    Args:
      tokenizer: tokenizer to check.
      num_texts: number of texts that will be added; each gets an equal part of `ROUND_TRIP_BYTES`.
    """

    def __init__(self, tokenizer: Tokenizer, num_texts: int = 1):
        self._tokenizer = tokenizer
        self._bytes_per_text = max(ROUND_TRIP_PART_BYTES, ROUND_TRIP_BYTES // num_texts)
        self._checked_bytes = 0
        self._lost: collections.Counter[str] = collections.Counter()

    def add(self, text: bytes) -> None:
        """Checks a text. Raises: InputError as `Tokenizer.encode`."""
        for part in _sample_parts(text, self._bytes_per_text):
            self._checked_bytes += len(part.encode())
            self._lost += self._tokenizer.lost_characters(part)

    @property
    def loss(self) -> RoundTripLoss:
        """The loss of all texts so far."""
        lost_bytes = sum(len(character.encode()) * count for character, count in self._lost.items())
        examples = "".join(character for character, _ in self._lost.most_common(8))
        return RoundTripLoss(lost_bytes, self._checked_bytes, examples)


def _sample_parts(text: bytes, size: int) -> Iterator[str]:
    """Yields a text, or evenly spaced parts of a longer one that are complete words, about `size` bytes in total."""
    if len(text) <= size:
        yield text.decode("utf-8", "ignore")  # `encode` refuses what is not UTF-8
        return
    num_parts = max(1, size // ROUND_TRIP_PART_BYTES)
    for start in np.linspace(0, len(text) - ROUND_TRIP_PART_BYTES, num_parts).astype(int).tolist():
        end = start + ROUND_TRIP_PART_BYTES
        part = text[start:end].decode("utf-8", "ignore")  # the cuts may be inside a character
        if start > 0:
            part = re.sub(r"^\S*\s", "", part)
        if end < len(text):
            part = re.sub(r"\s\S*$", "", part)
        yield part


def check_round_trip(loss: RoundTripLoss, tokenizer: Tokenizer, accepted: bool) -> None:
    """Refuses a tokenizer that loses text, unless accepted: its losses per byte would look better than they are.

    Raises:
      InputError: says how many bytes are lost, and the field that accepts it.
    """
    if loss.lost_bytes and not accepted:
        raise InputError(
            f"tokenizer '{tokenizer.name}' loses text: {loss} do not survive encoding and decoding, so that losses would look "
            'better than they are; use a tokenizer that can encode the text, or data.tokenizer="bytes", or accept it with '
            "data.lossy_tokenizer=True (evaluate: --lossy-tokenizer)"
        )


def load_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names: "bytes", "bytes_eos", a tokenizer.json, or a folder with one.

    Raises:
      InputError: neither, or the file is not a tokenizer.
    """
    if os.fspath(name_or_path) in BYTE_TOKENIZERS:
        return ByteTokenizer(os.fspath(name_or_path) == BYTES_WITH_END)
    file = as_path(name_or_path).expanduser()
    file = file / TOKENIZER_FILE if file.is_dir() else file
    try:
        content = parse_json(_tokenizer_json(file))
    except InputError:
        raise
    except ValueError as error:
        raise _not_a_tokenizer(file, error) from None
    if isinstance(content, dict) and content.get("seqpe_jax") in BYTE_TOKENIZERS:
        return ByteTokenizer(content["seqpe_jax"] == BYTES_WITH_END)
    return HFTokenizer(file)


def write_byte_level(directory: str | os.PathLike) -> None:
    """Writes the ids of `ByteTokenizer` as a tokenizer.json that Hugging Face's libraries read."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    # The alphabet of byte-level tokenizers: printable bytes are themselves, the others follow from code point 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    made = tokenizers.Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    _write(directory, made.to_str().encode())


def _read(file: AnyPath) -> bytes:
    """Returns the content of a JSON file without a byte order mark. Raises: InputError: it cannot be read."""
    try:
        return strip_bom(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"data.tokenizer: cannot read '{file}' ({error.strerror}): give \"bytes\" or the path of a Hugging Face "
            "tokenizer.json"
        ) from error


def _not_a_tokenizer(file: AnyPath, reason: object) -> InputError:
    return InputError(
        f"data.tokenizer: '{file}' is not a Hugging Face tokenizer.json ({reason}); give such a file, or \"bytes\""
    )


def _write(directory: str | os.PathLike, content: bytes, name: str = TOKENIZER_FILE) -> None:
    atomic_write(as_path(directory) / name, content)


def _decode_utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text is not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start}; convert it, or use "
            'data.tokenizer="bytes"'
        ) from None


def _check_ids(ids: Iterable[int], tokenizer: Tokenizer) -> np.ndarray:
    """Returns ids as int64[n]. Raises: InputError: one is outside of the vocabulary."""
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise InputError(
            f"token id {ids.max() if ids.min() >= 0 else ids.min()} is outside the vocabulary of '{tokenizer.name}' "
            f"(0 .. {tokenizer.vocab_size - 1})"
        )
    return ids
