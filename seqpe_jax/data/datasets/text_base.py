"""What the builders of text share: the features, UTF-8 checks, long documents in pieces, splits by file."""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds

# Builders of text find all they need here, those of the base included.
from seqpe_jax.data.datasets.base import CachedBuilder
from seqpe_jax.data.formats import strip_bom
from seqpe_jax.errors import InputError

MAX_DOCUMENT_BYTES = 4 << 20  # bounds the memory that one example takes
# Between a letter and the space before the next word: byte-level BPE vocabularies never merge across it, so a document
# cut there is tokenised as if it were whole.
_SEAM = re.compile(rb"(?<=\S)(?= [^\s])")

Documents = Iterable[tuple[str, bytes]]


class TextBuilder(CachedBuilder, skip_registration=True):
    """A data set of documents: {"text": bytes (UTF-8), "name": bytes}; pieces of one document share its name.

    A subclass says what it reads (`sources`) and yields documents by split (`documents`), in an order that is kept.
    """

    ITEM_NAME = "texts"

    def features(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()})

    def documents(self) -> Mapping[str, Documents]:
        """Returns (name, UTF-8 text) pairs by split; lazily, as the data may be large.

        Raises:
          InputError: nothing there to read, or not text.
        """
        raise NotImplementedError

    def contents(self) -> Mapping[str, Documents]:
        return self.documents()

    def examples(self, content: tuple[str, bytes]) -> Iterator[dict]:
        name, text = content
        for piece in split_document(text):
            yield {"text": piece, "name": name.encode("utf-8", "surrogateescape")}  # a file's name may be any bytes


def split_document(text: bytes, limit: int = MAX_DOCUMENT_BYTES) -> Iterator[bytes]:
    """Yields `text` in order, in pieces of about `limit` bytes; empty text has none.

    Cuts before a space between two words where there is one in the next `limit` bytes, else between two characters.
    """
    start = 0
    while len(text) - start > limit:
        seam = _SEAM.search(text, start + limit, min(len(text), start + 2 * limit))
        end = seam.start() if seam else character_start(text, start + limit)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def character_start(text: bytes, offset: int) -> int:
    """Returns the first offset >= `offset` where a UTF-8 character starts (or the end)."""
    while offset < len(text) and text[offset] & 0xC0 == 0x80:
        offset += 1
    return offset


def check_utf8(text: bytes, file: str, offset: int = 0) -> bytes:
    """Returns `text` if it is UTF-8.

    Args:
      file, offset: where the text starts, for the message.

    Raises:
      InputError: names the file and the byte offset of the first byte that is not UTF-8.
    """
    position = 0
    for piece in split_document(text):
        try:
            piece.decode("utf-8")
        except UnicodeDecodeError as error:
            place = offset + position + error.start
            raise InputError(
                f"'{file}' is not UTF-8 text: byte 0x{piece[error.start]:02x} at offset {place}; convert the file to "
                "UTF-8 or leave it out of data.paths"
            ) from None
        position += len(piece)
    return text


def read_text(file: pathlib.Path) -> bytes:
    """Returns the bytes of a UTF-8 file, without a byte order mark. Raises: InputError, unreadable or not UTF-8."""
    try:
        return strip_bom(check_utf8(file.read_bytes(), str(file)))
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check data.paths") from error
