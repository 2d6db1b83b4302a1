"""Base class of text data sets: documents, UTF-8 checks, long documents in parts."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO

import tensorflow_datasets as tfds

from seqpe_jax.data.datasets.base import CachedBuilder
from seqpe_jax.errors import InputError

MAX_DOCUMENT_BYTES = 4 << 20  # bounds the memory of one record
# Between a letter and the space before the next word. Byte-level BPE vocabularies never merge across it, so that a
# document split there has the tokens of the complete document.
_WORD_BOUNDARY = re.compile(rb"(?<=\S)(?= [^\s])")

Documents = Iterable[
    tuple[str, bytes | Iterator[bytes]]
]  # (name, UTF-8 text, or its parts as `split_document` makes them)


class TextBuilder(CachedBuilder, skip_registration=True):
    """A data set of documents: {"text": bytes (UTF-8), "name": bytes}; the parts of a document share its name.

    A subclass implements `sources` and `documents`.
    """

    ITEM_NAME = "texts"

    def features(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()})

    def documents(self) -> Mapping[str, Documents]:
        """Returns the documents of each split in a fixed order, lazily, since the data may be large.

        Raises:
          InputError: there is no input, or it is not text.
        """
        raise NotImplementedError

    @classmethod
    def input_bytes(cls, paths: tuple[str, ...]) -> int:
        """Returns the bytes of the files under `paths`; 0 = few. Raises: InputError as `sources`."""
        return 0

    def contents(self) -> Mapping[str, Documents]:
        return self.documents()

    def examples(self, content: tuple[str, bytes]) -> Iterator[dict]:
        name, text = content
        for part in split_document(text) if isinstance(text, bytes) else text:
            yield {"text": part, "name": name.encode("utf-8", "surrogateescape")}  # a file name may be any bytes


def split_document(text: bytes, limit: int = MAX_DOCUMENT_BYTES) -> Iterator[bytes]:
    """Yields `text` in order, in parts of about `limit` bytes; an empty text has none.

    The cut is before a space between two words if the next `limit` bytes have one, else between two characters.
    """
    start = 0
    while len(text) - start > limit:
        boundary = _WORD_BOUNDARY.search(text, start + limit, min(len(text), start + 2 * limit))
        end = boundary.start() if boundary else character_start(text, start + limit)
        yield text[start:end]
        start = end
    if text[start:]:
        yield text[start:]


def stream_parts(stream: BinaryIO, size: int | None = None, limit: int | None = None) -> Iterator[bytes]:
    """Yields the parts that `split_document` makes of the next bytes of a stream, with memory for two of them.

    Args:
      stream: UTF-8 text.
      size: number of bytes; None = all that follow.
      limit: size of a part; None = the default of `split_document`.
    """
    limit = split_document.__defaults__[0] if limit is None else limit
    held, left = b"", size
    while True:
        wanted = 2 * limit + 4 - len(held)  # the next character begins within four bytes
        block = stream.read(wanted if left is None else min(wanted, left))
        left = None if left is None else left - len(block)
        held += block
        if len(block) < wanted and (not block or left == 0):
            yield from split_document(held, limit)
            return
        while len(held) >= 2 * limit + 4:
            part = next(split_document(held, limit))
            yield part
            held = held[len(part) :]


def character_start(text: bytes, offset: int) -> int:
    """Returns the first offset >= `offset` at which a UTF-8 character starts, or the end of the text."""
    while offset < len(text) and text[offset] & 0xC0 == 0x80:
        offset += 1
    return offset


def check_utf8(text: bytes, file: str, offset: int = 0) -> bytes:
    """Returns `text` if it is UTF-8.

    Args:
      text: part of a file.
      file: name of the file, for the message.
      offset: byte offset of the text in the file, for the message.

    Raises:
      InputError: names the file and the byte offset of the first byte that is not UTF-8.
    """
    for part in split_document(text):
        try:
            part.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"'{file}' is not UTF-8 text: byte 0x{part[error.start]:02x} at offset {offset + error.start}; convert the "
                "file to UTF-8 or leave it out of data.paths"
            ) from None
        offset += len(part)
    return text
