"""Text <-> token ids: bytes, or a Hugging Face `tokenizer.json`."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from seqpe_jax.errors import InputError

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# What lies beside a tokenizer.json and may name its end of text, in the order in which it is believed.
NAMED_IN = {
    SETTINGS: "eos_token", "special_tokens_map.json": "eos_token", "generation_config.json": "eos_token_id",
    "config.json": "eos_token_id",
}  # fmt: skip
# In this order: GPT-2 and its heirs, Llama 3, T5 and Llama 2, Gemma.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
SPECIAL_END = ("[EOS]", "<EOS>", "<|eos|>", "<|im_end|>")  # ends only where the tokenizer calls them special
SAMPLE = 1 << 20  # bytes of a split whose way to tokens and back is looked at


class Tokenizer(Protocol):
    """What the rest of the program knows of a tokenizer.

    Attributes:
      name: for people.
      vocabulary_size: ids are 0 .. vocabulary_size - 1; ids: those that have a token, rising.
      end_of_text: the id between documents, or None.
      fingerprint: hex digits, equal for tokenizers that give equal ids.
    """

    name: str
    vocabulary_size: int
    ids: np.ndarray
    end_of_text: int | None
    fingerprint: str

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the ids of UTF-8 text, 1-D of `token_dtype`. Raises: InputError, not UTF-8."""

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores where the tokenizer can."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; bytes that are no whole character become U+FFFD."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json, which `load_tokenizer` reads."""


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Returns the smallest of uint8, uint16, uint32 that holds every id."""
    return np.min_scalar_type(vocabulary_size - 1)


class ByteTokenizer:
    """Ids are the 256 values of a byte; no end of text. Encodes any bytes, UTF-8 or not."""

    name = "bytes"
    vocabulary_size = 256
    ids = np.arange(256)
    end_of_text = None
    fingerprint = "bytes-1"

    def encode(self, text: bytes) -> np.ndarray:
        """Returns uint8[len(text)]."""
        return np.frombuffer(text, np.uint8)

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids in 0..255; incomplete characters become U+FFFD."""
        return _checked(ids, self).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json."""
        _write(directory, json.dumps({"seqpe_jax": self.name}).encode())

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "ByteTokenizer":
        """Returns the tokenizer that `save` wrote. Raises: InputError, another kind lies there."""
        return _loaded(directory, cls)


class HFTokenizer:
    """A tokenizer in the JSON format of Hugging Face `tokenizers`.

    Text that spells a special token is encoded as plain text, and no special tokens are added. The end of text is what the
    files beside a tokenizer.json say (`NAMED_IN`), else the first of `END_OF_TEXT` that there is, else of `SPECIAL_END`.

    Args:
      path: the file, or a directory that holds tokenizer.json.
    Raises:
      InputError: no such file, not a tokenizer, or a file beside it names an end of text that it does not have.
    """

    def __init__(self, path: str | os.PathLike):
        import tokenizers

        file = pathlib.Path(path).expanduser()
        file = file / FILE if file.is_dir() else file
        self._content = _read(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise _not_a_tokenizer(file, error) from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise _not_a_tokenizer(file, "its vocabulary is empty")
        self.name = file.parent.name or file.stem
        self.vocabulary_size = max(vocabulary.values()) + 1
        self.ids = np.unique(list(vocabulary.values()))
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        usual = [token for token in END_OF_TEXT if token in vocabulary]
        usual += [token for token in SPECIAL_END if token in vocabulary and token in special]
        self.end_of_text = vocabulary[usual[0]] if usual else None
        self.fingerprint = "hf-" + hashlib.sha256(self._content).hexdigest()[:16]
        named = _named_end(file, vocabulary)
        if named is not None and named != self.end_of_text or usual and usual[0] in SPECIAL_END:
            self.end_of_text = self.end_of_text if named is None else named
            self.fingerprint += f"-end-{self.end_of_text}"  # texts are joined in another way than by the usual names
        self._dtype = token_dtype(self.vocabulary_size)

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the ids of UTF-8 text, uint8, uint16 or uint32[tokens]. Raises: InputError, not UTF-8."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores. Raises: InputError, not UTF-8, or nothing stands for a word."""
        whole = [_decoded(text) for text in texts]
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
        return self._tokenizer.decode(_checked(ids, self).tolist(), skip_special_tokens=False)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json, byte for byte the file that was loaded, and beside it what ends a text."""
        _write(directory, self._content)
        if self.end_of_text is not None:
            _write(directory, json.dumps({"eos_token": self._tokenizer.id_to_token(self.end_of_text)}).encode(), SETTINGS)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "HFTokenizer":
        """Returns the tokenizer that `save` wrote. Raises: InputError, another kind lies there."""
        return _loaded(directory, cls)


def _named_end(file: pathlib.Path, vocabulary: dict[str, int]) -> int | None:
    """The end of text that a file beside a tokenizer.json names, or None."""
    for name, key in NAMED_IN.items():
        beside = file.parent / name
        if file.name != FILE or not beside.is_file():
            continue
        try:
            said = json.loads(_read(beside))
        except ValueError as error:
            raise InputError(f"'{beside}', beside the tokenizer, is not JSON ({error}): mend or remove it") from None
        said = said.get(key) if isinstance(said, dict) else None
        said = said[0] if isinstance(said, list) and said else said
        said = said.get("content") if isinstance(said, dict) else said
        if said is None:
            continue
        found = vocabulary.get(said) if isinstance(said, str) else said
        if found not in vocabulary.values():
            raise InputError(
                f"'{beside}' names {said!r} as the end of text ({key}), which {FILE} beside it does not have: name one of "
                "its tokens, or take that line out"
            )
        return int(found)
    return None


@dataclasses.dataclass(frozen=True)
class Loss:
    """How much of a text does not come back from its tokens.

    Attributes:
      lost, read: bytes that do not come back, of those looked at; characters: some of those lost.
    """

    lost: int = 0
    read: int = 0
    characters: str = ""

    def __str__(self) -> str:
        share = 100 * self.lost / max(self.read, 1)
        return f"{self.lost:,} of {self.read:,} bytes looked at ({share:.2g}%), such as {self.characters!r}"


class RoundTrip:
    """Looks at some texts and at what comes back from their tokens: the beginning of each, `SAMPLE` bytes in all.

    Characters are counted, wherever they stand: what is lost is unknown to the tokenizer, or changed by it (such as capital
    letters). White space is left out, since tokenizers of words forget how many spaces stood between two.
    """

    def __init__(self, tokenizer: Tokenizer, each: int = 4096):
        self._tokenizer, self._each = tokenizer, each
        self._read, self._lost = 0, collections.Counter()

    def look(self, text: bytes) -> None:
        """Adds a text. Raises: InputError as `Tokenizer.encode`."""
        if self._read >= SAMPLE or self._tokenizer.name == ByteTokenizer.name:
            return
        part = text[: self._each].decode("utf-8", "ignore")  # the cut may fall into a character
        back = self._tokenizer.decode(self._tokenizer.encode(part.encode()))
        self._read += len(part.encode())
        self._lost += collections.Counter("".join(part.split())) - collections.Counter(back)

    @property
    def loss(self) -> Loss:
        """What was lost so far."""
        lost = sum(len(character.encode()) * count for character, count in self._lost.items())
        return Loss(lost, self._read, "".join(character for character, _ in self._lost.most_common(8)))


def check_loss(loss: Loss, tokenizer: Tokenizer, accepted: bool) -> None:
    """Refuses a tokenizer that loses text, unless that is accepted: losses for each byte would look better than they are.

    Raises:
      InputError: says how many bytes are lost, and the field that accepts it.
    """
    if loss.lost and not accepted:
        raise InputError(
            f"tokenizer '{tokenizer.name}' loses text: {loss} do not come back from its tokens, so that losses would look "
            'better than they are; take one that can write the text, or data.tokenizer="bytes", or accept it with '
            "data.lossy_tokenizer=True (evaluate: --lossy-tokenizer)"
        )


def load_tokenizer(name_or_path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names: "bytes", a tokenizer.json, or a directory that holds one.

    Raises:
      InputError: neither, or the file is not a tokenizer.
    """
    if os.fspath(name_or_path) == ByteTokenizer.name:
        return ByteTokenizer()
    file = pathlib.Path(name_or_path).expanduser()
    file = file / FILE if file.is_dir() else file
    raw = _read(file)
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise _not_a_tokenizer(file, error) from None
    if isinstance(content, dict) and content.get("seqpe_jax") == ByteTokenizer.name:
        return ByteTokenizer()
    return HFTokenizer(file)


def _loaded(directory: str | os.PathLike, kind: type):
    tokenizer = load_tokenizer(pathlib.Path(directory) / FILE)
    if not isinstance(tokenizer, kind):
        raise InputError(f"the tokenizer in '{directory}' is not a {kind.__name__}")
    return tokenizer


def _read(file: pathlib.Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(
            f"data.tokenizer: cannot read '{file}' ({error.strerror}): give \"bytes\" or the path of a Hugging Face "
            "tokenizer.json"
        ) from error


def _not_a_tokenizer(file: pathlib.Path, why: object) -> InputError:
    return InputError(
        f"data.tokenizer: '{file}' is not a Hugging Face tokenizer.json ({why}); give such a file, or \"bytes\""
    )


def _write(directory: str | os.PathLike, content: bytes, name: str = FILE) -> None:
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{name}.{os.getpid()}"
    part.write_bytes(content)
    part.replace(folder / name)


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"text is not UTF-8: byte 0x{text[error.start]:02x} at offset {error.start}; convert it, or use "
            'data.tokenizer="bytes"'
        ) from None


def _checked(ids: Iterable[int], tokenizer: Tokenizer) -> np.ndarray:
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocabulary_size:
        raise InputError(
            f"token id {ids.max() if ids.min() >= 0 else ids.min()} is outside the vocabulary of '{tokenizer.name}' "
            f"(0 .. {tokenizer.vocabulary_size - 1})"
        )
    return ids
