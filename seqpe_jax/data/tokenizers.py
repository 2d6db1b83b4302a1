"""Text <-> token ids: bytes, or a Hugging Face `tokenizer.json`."""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from seqpe_jax.errors import InputError

FILE = "tokenizer.json"
# In this order: GPT-2 and its heirs, Llama 3, T5 and Llama 2, Gemma.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


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

    Text that spells a special token is encoded as plain text, and no special tokens are added.

    Args:
      path: the file, or a directory that holds tokenizer.json.
    Raises:
      InputError: no such file, or not a tokenizer.
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
        self.end_of_text = next((vocabulary[token] for token in END_OF_TEXT if token in vocabulary), None)
        self.fingerprint = "hf-" + hashlib.sha256(self._content).hexdigest()[:16]
        self._dtype = token_dtype(self.vocabulary_size)

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the ids of UTF-8 text, uint8, uint16 or uint32[tokens]. Raises: InputError, not UTF-8."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each text, on all cores."""
        encoded = self._tokenizer.encode_batch_fast([_decoded(text) for text in texts], add_special_tokens=False)
        return [np.array(one.ids, self._dtype) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, special tokens included."""
        return self._tokenizer.decode(_checked(ids, self).tolist(), skip_special_tokens=False)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes DIRECTORY/tokenizer.json, byte for byte the file that was loaded."""
        _write(directory, self._content)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "HFTokenizer":
        """Returns the tokenizer that `save` wrote. Raises: InputError, another kind lies there."""
        return _loaded(directory, cls)


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


def _write(directory: str | os.PathLike, content: bytes) -> None:
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{FILE}.{os.getpid()}"
    part.write_bytes(content)
    part.replace(folder / FILE)


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
