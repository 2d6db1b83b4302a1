"""What the builders of text share: the features, UTF-8 checks, long documents in pieces, splits by file."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import tensorflow_datasets as tfds
import tqdm  # TFDS brings it

from seqpe_jax.data.cache import cache_root
from seqpe_jax.errors import InputError

PIECE_BYTES = 4 << 20  # bounds the memory that one example takes
SPLITS = ("train", "validation", "test")
# Between a letter and the space before the next word: byte-level BPE vocabularies never merge across it, so a document
# cut there is tokenised as if it were whole.
_SEAM = re.compile(rb"(?<=\S)(?= [^\s])")

Documents = Iterable[tuple[str, bytes]]


class DocumentBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set of documents: {"text": bytes (UTF-8), "name": bytes}; pieces of one document share its name.

    A subclass says what it reads (`sources`) and yields documents by split (`documents`), in an order that is kept.

    Args:
      paths: what the user points at; its meaning is the subclass's.
      downloads: folder for what is fetched; none = the cache's.
      **kwargs: of TFDS, e.g. `data_dir`.
    """

    def __init__(self, *, paths: Iterable[str] = (), downloads: str | os.PathLike = "", **kwargs):
        self.paths = tuple(os.fspath(path) for path in paths)
        self.downloads = pathlib.Path(downloads) if downloads else cache_root() / "downloads"
        self.input_error: InputError | None = None
        self._progress = True
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    @classmethod
    def sources(cls, paths: tuple[str, ...]) -> list[str]:
        """Returns one line per thing read, which changes when its content does.

        Raises:
          InputError: nothing there to read.
        """
        raise NotImplementedError

    def documents(self) -> Mapping[str, Documents]:
        """Returns (name, UTF-8 text) pairs by split; lazily, as the data may be large.

        Raises:
          InputError: nothing there to read, or not text.
        """
        raise NotImplementedError

    @classmethod
    def source_key(cls, paths: tuple[str, ...]) -> str:
        """Returns 16 hex digits that name this version of the builder reading these sources."""
        identity = [cls.name, str(cls.VERSION), cls.sources(tuple(os.fspath(path) for path in paths))]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def prepare(self, *, progress: bool = True) -> None:
        """Writes the data set to `data_dir`; long work shows its progress on stderr, and nothing is said on stdout.

        Raises:
          InputError: as `documents`.
        """
        self._progress = progress
        try:
            tfds.disable_progress_bar()  # TFDS's own comes at once, one line per split and shard
            with contextlib.redirect_stdout(io.StringIO()):
                self.download_and_prepare()
        except Exception:
            if self.input_error is not None:
                raise self.input_error from None
            raise

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        del dl_manager
        splits = {}
        with self._remembered():
            for split, documents in self.documents().items():
                examples = self._examples(documents, f"prepare {self.name}/{split}")
                first = next(examples, None)  # TFDS refuses a split without examples
                if first is not None:
                    splits[split] = _chain(first, examples)
            if not splits:
                raise InputError(f"data set '{self.name}' is empty: no text in {', '.join(self.paths) or 'its files'}")
        return splits

    def _generate_examples(self, documents: Documents):
        return self._examples(documents, f"prepare {self.name}")

    def _examples(self, documents: Documents, title: str) -> Iterator[tuple[int, dict]]:
        key = 0
        with self._remembered():
            for name, text in tqdm.tqdm(documents, title, unit=" texts", delay=2.0, disable=not self._progress):
                for piece in pieces(text):
                    yield key, {"text": piece, "name": name}
                    key += 1

    @contextlib.contextmanager
    def _remembered(self):
        """TFDS adds words of its own to what a generator raises; this keeps the message as it was."""
        try:
            yield
        except InputError as error:
            self.input_error = InputError(str(error))
            raise


def _chain(first: tuple, rest: Iterator[tuple]) -> Iterator[tuple]:
    yield first
    yield from rest


def pieces(text: bytes, limit: int = PIECE_BYTES) -> Iterator[bytes]:
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
    for piece in pieces(text):
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
    """Returns the bytes of a UTF-8 file. Raises: InputError, unreadable or not UTF-8."""
    try:
        return check_utf8(file.read_bytes(), str(file))
    except OSError as error:
        raise InputError(f"cannot read '{file}' ({error.strerror}): check data.paths") from error


def describe_file(file: pathlib.Path, name: str) -> str:
    """Returns a line that changes when the file does: name, place, size in bytes and time of change."""
    status = file.stat()
    return f"{name} {file} {status.st_size} {status.st_mtime_ns}"


def chance(name: str) -> float:
    """Returns a number in [0, 1) that depends on `name` only, the same everywhere and for ever."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
