"""Text <-> token ids: bytes, or a Hugging Face `tokenizer.json`."""

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

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, ADDED_TOKENS_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
)
# What lies beside a tokenizer.json and may name its end of text, in the order in which it is believed.
EOS_FILES = {
    TOKENIZER_CONFIG_FILE: "eos_token",
    "special_tokens_map.json": "eos_token",
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
}
# In this order: GPT-2 and its heirs, Llama 3, T5 and Llama 2, Gemma.
EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
SPECIAL_EOS_TOKENS = ("[EOS]", "<EOS>", "<|eos|>", "<|im_end|>")  # ends only where the tokenizer calls them special
RUN_CONFIG_SECTIONS = {"data", "encoding", "objective"}  # of the sections by which the config.json of a run is known
MAX_TOKEN_IDS = 1 << 24  # ids; a model has a row of its embedding for each
ROUND_TRIP_BYTES = 1 << 20  # bytes of a split whose way to tokens and back is looked at
ROUND_TRIP_PART_BYTES = 4096  # bytes of a longer text that are looked at together


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer.

    Attributes:
      name: for people.
      vocabulary_size: ids are 0 .. vocabulary_size - 1; ids: those that have a token, rising.
      end_of_text: the id between documents, or None.
      special_tokens: what spells one of them in a text is encoded as plain text.
      digest: hex digits, equal for tokenizers that give equal ids; fingerprint: for those that end texts alike too.
    """

    name: str
    vocab_size: int
    ids: np.ndarray
    eos_id: int | None
    special_tokens: frozenset[str]
    digest: str
    fingerprint: str

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the ids of UTF-8 text, 1-D of `token_dtype`. Raises: InputError, not UTF-8."""

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores where the tokenizer can."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; bytes that are no whole character become U+FFFD."""

    def lost_characters(self, text: str) -> collections.Counter[str]:
        """Returns the characters of a text that do not come back from its tokens, and how often each is lost.

        Raises:
          InputError: as `encode`.
        """

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json, which `load_tokenizer` reads, and what says how its texts end."""


def decode_continuation(tokenizer: Tokenizer, prompt: Iterable[int], ids: Iterable[int]) -> str:
    """Returns the text that ids add to that of a prompt, whose ids they follow.

    By themselves they may have another: Metaspace tokenizers drop the space before the first word, others join a word's
    parts.
    """
    known, new = (np.asarray(part if isinstance(part, np.ndarray) else list(part), np.int64) for part in (prompt, ids))
    before, text = tokenizer.decode(known), tokenizer.decode(np.concatenate([known, new]))
    return text[len(os.path.commonprefix([before, text])) :]


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint8, uint16, uint32 that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


class ByteTokenizer:
    """Ids are the 256 values of a byte; no end of text. Encodes any bytes, UTF-8 or not."""

    name = "bytes"
    vocab_size = 256
    ids = np.arange(256)
    eos_id = None
    special_tokens: frozenset[str] = frozenset()
    digest = fingerprint = "bytes-1"

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
        """Returns nothing: every byte comes back."""
        return collections.Counter()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json."""
        _write(directory, json.dumps({"seqpe_jax": self.name}).encode())

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "ByteTokenizer":
        """Returns the tokenizer that `save` wrote. Raises: InputError, another kind lies there."""
        return _load_tokenizer_of(directory, cls)


class HFTokenizer:
    """A tokenizer in the JSON format of Hugging Face `tokenizers`.

    Text that spells a special token is encoded as plain text, and no special tokens are added. The end of text is what the
    files beside a tokenizer.json say (`EOS_FILES`), else the first of `EOS_TOKENS` that there is, else of `SPECIAL_EOS_TOKENS`. In
    the folder of a run, `save` has written which it is; a run that has no such file began when the names of `EOS_TOKENS`
    alone were known, and they alone count there. Tokens of an added_tokens.json beside a tokenizer.json that lacks them are
    its own, and `save` writes them into it.

    Args:
      path: the file, or a directory that holds tokenizer.json, or GPT-2's vocab.json and merges.txt.

    Raises:
      InputError: no such file, not a tokenizer, or a file beside it names an end of text that it does not have.
    """

    def __init__(self, path: str | os.PathLike):
        import tokenizers

        file = as_path(path).expanduser()
        file = file / TOKENIZER_FILE if file.is_dir() else file

        def built(content: bytes) -> tokenizers.Tokenizer:
            try:
                return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
            except Exception as error:  # the library raises bare Exception
                raise _not_a_tokenizer(file, error) from None

        self._content, beside = _tokenizer_json(file), _sibling_configs(file)
        self._tokenizer = built(self._content)
        added = _extra_tokens(file, self._tokenizer.get_vocab(with_added_tokens=True))
        if added:
            self._content = _with_added(self._content, added, _special_token_names(beside))
            self._tokenizer = built(self._content)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise _not_a_tokenizer(file, "its vocabulary is empty")
        if max(vocabulary.values()) >= MAX_TOKEN_IDS:
            raise _not_a_tokenizer(
                file, f"its largest id is {max(vocabulary.values())}, and ids end at {MAX_TOKEN_IDS - 1}"
            )
        self.name = file.parent.name or file.stem
        self.vocab_size = max(vocabulary.values()) + 1
        self.ids = np.unique(list(vocabulary.values()))
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        usual = next((vocabulary[token] for token in EOS_TOKENS if token in vocabulary), None)
        ends = [_configured_eos_id(file, beside, vocabulary, special), usual]
        if not beside.get("config.json", {}).keys() >= RUN_CONFIG_SECTIONS:
            ends += [vocabulary[token] for token in SPECIAL_EOS_TOKENS if token in special]
        self.eos_id = next((end for end in ends if end is not None), None)
        self.special_tokens = frozenset(special) | {token for token in EOS_TOKENS if token in vocabulary}
        self.digest = self.fingerprint = "hf-" + hashlib.sha256(self._content).hexdigest()[:16]
        if self.eos_id != usual:  # texts are joined in another way than the file alone says
            self.fingerprint += f"-end-{self.eos_id}"
        content = parse_json(self._content)
        self._unknown = vocabulary.get(content["model"].get("unk_token"), content["model"].get("unk_id"))
        self._keeps_space = "ByteLevel" in json.dumps(content.get("pre_tokenizer"))
        self._dtype = token_dtype(self.vocab_size)

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the ids of UTF-8 text, uint8, uint16 or uint32[tokens]. Raises: InputError, not UTF-8."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores. Raises: InputError, not UTF-8, or nothing stands for a word."""
        whole = [_decode_utf8(text) for text in texts]
        try:
            encoded = self._tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"tokenizer '{self.name}' cannot write the text ({error}): give one that has a token for every character, "
                'such as a byte-level one, or data.tokenizer="bytes"'
            ) from None
        return [np.array(one.ids, self._dtype) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, special tokens included."""
        return self._tokenizer.decode(_check_ids(ids, self).tolist(), skip_special_tokens=False)

    def lost_characters(self, text: str) -> collections.Counter[str]:
        """Returns the characters that are missing in what comes back, wherever they stand there.

        They are unknown to the tokenizer, or changed by it (such as capital letters). Two ways to write one letter with its
        accents (NFC and NFD) are the same. White space counts for byte-level tokenizers alone: others forget by design how
        many spaces stood between two words.
        """
        ids = self.encode(text.encode())
        back = self.decode(ids[ids != self._unknown] if self._unknown is not None else ids)
        asked = text if self._keeps_space else "".join(text.split())
        counts = [collections.Counter(unicodedata.normalize("NFC", one)) for one in (asked, back)]
        return counts[0] - counts[1]

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json, byte for byte the file that was loaded, and beside it what ends a text."""
        _write(directory, self._content)
        if self.eos_id is not None:
            _write(
                directory,
                json.dumps({"eos_token": self._tokenizer.id_to_token(self.eos_id)}).encode(),
                TOKENIZER_CONFIG_FILE,
            )

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "HFTokenizer":
        """Returns the tokenizer that `save` wrote. Raises: InputError, another kind lies there."""
        return _load_tokenizer_of(directory, cls)


def _tokenizer_json(file: AnyPath) -> bytes:
    """The content of a tokenizer.json, or one made of GPT-2's vocab.json and merges.txt where these lie in its place."""
    vocabulary, merges = file.parent / "vocab.json", file.parent / "merges.txt"
    if file.name != TOKENIZER_FILE or file.exists() or not (vocabulary.is_file() and merges.is_file()):
        return _read(file)
    import tokenizers

    try:
        lines = _read(merges).decode("utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        return tokenizers.ByteLevelBPETokenizer(parse_json(_read(vocabulary)), pairs).to_str().encode()
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"vocab.json and merges.txt in '{file.parent}' are no tokenizer ({error}): mend them, or give a tokenizer.json"
        ) from None


def _extra_tokens(file: AnyPath, vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Returns the tokens of the added_tokens.json beside a tokenizer.json that its vocabulary lacks, and their ids.

    Raises:
      InputError: it cannot be read, or contradicts the tokenizer.json.
    """
    beside = file.parent / ADDED_TOKENS_FILE
    if file.name != TOKENIZER_FILE or not beside.is_file():
        return {}
    try:
        added = parse_json_text(_read(beside))
    except ValueError as error:
        raise InputError(f"'{beside}', beside the tokenizer, is not JSON ({error}): mend or remove it") from None
    if not isinstance(added, dict) or not all(
        type(number) is int and 0 <= number < MAX_TOKEN_IDS for number in added.values()
    ):
        raise InputError(
            f"'{beside}', beside the tokenizer, must give each token an id from 0 to {MAX_TOKEN_IDS - 1}, as "
            '{"<token>": 50257}: mend or remove it'
        )
    taken = {number: token for token, number in vocabulary.items()}
    for token, number in added.items():
        if vocabulary.get(token, number) != number or taken.get(number, token) != token:
            other = f"{token!r} the id {vocabulary[token]}" if token in vocabulary else f"{taken[number]!r} that id"
            raise InputError(
                f"'{beside}' gives {token!r} the id {number}, but {TOKENIZER_FILE} beside it gives {other}: they are of two "
                "tokenizers; remove the one that is not the model's"
            )
    return {token: number for token, number in added.items() if token not in vocabulary}


def _with_added(content: bytes, added: Mapping[str, int], special: set[str]) -> bytes:
    """Returns the content of a tokenizer.json with further tokens, as `transformers` adds them."""
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


def _special_token_names(beside: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Returns the tokens that the files beside a tokenizer.json call special, such as eos_token."""
    found = []
    for name in (TOKENIZER_CONFIG_FILE, "special_tokens_map.json"):
        settings = beside.get(name, {})
        found += [value for key, value in settings.items() if key.endswith("_token")]
        more = settings.get("additional_special_tokens")
        found += more if isinstance(more, list) else []
    contents = [token.get("content") if isinstance(token, dict) else token for token in found]
    return {token for token in contents if isinstance(token, str)}


def _sibling_configs(file: AnyPath) -> dict[str, Mapping[str, Any]]:
    """Returns what the files of `EOS_FILES` beside a tokenizer.json hold, by name.

    Raises:
      InputError: one that is the tokenizer's own cannot be read; others of these names may belong to anything.
    """
    found = {}
    for name, key in EOS_FILES.items():
        beside = file.parent / name
        if file.name != TOKENIZER_FILE or not beside.is_file():
            continue
        try:
            content = parse_json(_read(beside))
        except ValueError as error:
            if key == "eos_token":
                raise InputError(
                    f"'{beside}', beside the tokenizer, is not JSON ({error}): mend or remove it"
                ) from None
            continue
        if isinstance(content, dict):
            found[name] = content
    return found


def _configured_eos_id(
    file: AnyPath, beside: Mapping[str, Mapping[str, Any]], vocabulary: Mapping[str, int], special: set[str]
) -> int | None:
    """Returns the end of text that the files beside a tokenizer.json name, or None.

    An id counts where a special token has it, or one of `EOS_TOKENS`: the configs of many models name GPT-2's, whatever
    their tokenizer has there.

    Raises:
      InputError: the tokenizer's own files name a token that it does not have.
    """
    ends = {vocabulary[token] for token in (*special, *EOS_TOKENS) if token in vocabulary}
    for name, key in EOS_FILES.items():
        said = beside.get(name, {}).get(key)
        if key == "eos_token_id":
            for end in said if isinstance(said, list) else [said]:
                if isinstance(end, int) and end in ends:
                    return end
            continue
        token = said.get("content") if isinstance(said, dict) else said
        if token is None:
            continue
        if not isinstance(token, str) or token not in vocabulary:
            raise InputError(
                f"'{file.parent / name}' names {token!r} as the end of text ({key}), which {TOKENIZER_FILE} beside it does not have: "
                "name one of its tokens, or take that line out"
            )
        return vocabulary[token]
    return None


@dataclasses.dataclass(frozen=True)
class RoundTripLoss:
    """How much of a text does not come back from its tokens.

    Attributes:
      lost_bytes: bytes that decoding does not give back.
      checked_bytes: bytes of the text that was checked.
      examples: some of the lost characters, the most frequent first.
    """

    lost_bytes: int = 0
    checked_bytes: int = 0
    examples: str = ""

    def __str__(self) -> str:
        share = 100 * self.lost_bytes / max(self.checked_bytes, 1)
        return (
            f"{self.lost_bytes:,} of {self.checked_bytes:,} bytes looked at ({share:.2g}%), such as {self.examples!r}"
        )


class RoundTrip:
    """Looks at some texts and at what comes back from their tokens (`Tokenizer.lost`), at `ROUND_TRIP_BYTES` bytes in all.

    Args:
      texts: how many will be looked at; of longer ones than their share, parts from beginning to end.
    """

    def __init__(self, tokenizer: Tokenizer, texts: int = 1):
        self._tokenizer, self._share = tokenizer, max(ROUND_TRIP_PART_BYTES, ROUND_TRIP_BYTES // texts)
        self._read, self._lost = 0, collections.Counter()

    def add(self, text: bytes) -> None:
        """Adds a text. Raises: InputError as `Tokenizer.encode`."""
        for part in _sample_parts(text, self._share):
            self._read += len(part.encode())
            self._lost += self._tokenizer.lost_characters(part)

    @property
    def loss(self) -> RoundTripLoss:
        """What was lost so far."""
        lost = sum(len(character.encode()) * count for character, count in self._lost.items())
        return RoundTripLoss(lost, self._read, "".join(character for character, _ in self._lost.most_common(8)))


def _sample_parts(text: bytes, share: int) -> Iterator[str]:
    """Yields a text, or where it is longer, whole words of it from evenly spaced places, about `share` bytes together."""
    if len(text) <= share:
        yield text.decode("utf-8", "ignore")  # `encode` refuses what is not UTF-8
        return
    for start in (
        np.linspace(0, len(text) - ROUND_TRIP_PART_BYTES, max(1, share // ROUND_TRIP_PART_BYTES)).astype(int).tolist()
    ):
        part = text[start : start + ROUND_TRIP_PART_BYTES].decode(
            "utf-8", "ignore"
        )  # the cuts may fall into a character
        if start > 0:
            part = re.sub(r"^\S*\s", "", part)
        if start + ROUND_TRIP_PART_BYTES < len(text):
            part = re.sub(r"\s\S*$", "", part)
        yield part


def check_round_trip(loss: RoundTripLoss, tokenizer: Tokenizer, accepted: bool) -> None:
    """Refuses a tokenizer that loses text, unless that is accepted: losses for each byte would look better than they are.

    Raises:
      InputError: says how many bytes are lost, and the field that accepts it.
    """
    if loss.lost_bytes and not accepted:
        raise InputError(
            f"tokenizer '{tokenizer.name}' loses text: {loss} do not come back from its tokens, so that losses would look "
            'better than they are; take one that can write the text, or data.tokenizer="bytes", or accept it with '
            "data.lossy_tokenizer=True (evaluate: --lossy-tokenizer)"
        )


def load_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names: "bytes", a tokenizer.json, or a directory of one.

    Raises:
      InputError: neither, or the file is not a tokenizer.
    """
    if os.fspath(name_or_path) == ByteTokenizer.name:
        return ByteTokenizer()
    file = as_path(name_or_path).expanduser()
    file = file / TOKENIZER_FILE if file.is_dir() else file
    raw = _tokenizer_json(file)
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise _not_a_tokenizer(file, error) from None
    if isinstance(content, dict) and content.get("seqpe_jax") == ByteTokenizer.name:
        return ByteTokenizer()
    return HFTokenizer(file)


def _load_tokenizer_of(directory: str | os.PathLike, kind: type):
    tokenizer = load_tokenizer(as_path(directory) / TOKENIZER_FILE)
    if not isinstance(tokenizer, kind):
        raise InputError(f"the tokenizer in '{directory}' is not a {kind.__name__}")
    return tokenizer


def _read(file: AnyPath) -> bytes:
    """Returns what a file of JSON holds, without a byte order mark. Raises: InputError: it cannot be read."""
    try:
        return strip_bom(file.read_bytes())
    except OSError as error:
        raise InputError(
            f"data.tokenizer: cannot read '{file}' ({error.strerror}): give \"bytes\" or the path of a Hugging Face "
            "tokenizer.json"
        ) from error


def _not_a_tokenizer(file: AnyPath, why: object) -> InputError:
    return InputError(
        f"data.tokenizer: '{file}' is not a Hugging Face tokenizer.json ({why}); give such a file, or \"bytes\""
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
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise InputError(
            f"token id {ids.max() if ids.min() >= 0 else ids.min()} is outside the vocabulary of '{tokenizer.name}' "
            f"(0 .. {tokenizer.vocab_size - 1})"
        )
    return ids
