"""The exceptions that commands print in one line, with exit codes; imports nothing of this package."""

import contextlib
import difflib
import itertools
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes the work


class InputError(ValueError):
    """Bad input; the message is one line: what is wrong, what was expected, how to fix it.

    Commands print the message without a traceback and exit with code 2.
    """


class CheckpointGone(InputError):
    """A checkpoint was removed while it was read, as a run that trains removes old ones: the next look finds another."""


class Failure(RuntimeError):
    """Work that cannot continue, through no fault of the input; the message is one line, the exit code `code`."""

    code = 1


class StoreError(OSError, Failure):
    """A request to a bucket that failed, also when repeated; `filename` and `strerror` say where and why."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class _ShortRepr(reprlib.Repr):
    """Reads no more of a value than it writes; `reprlib` would write subclasses of its containers out whole."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, VALUE_LENGTH, VALUE_LENGTH, VALUE_LENGTH
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 12

    def repr1(self, x: Any, level: int) -> str:
        for kind in (dict, list, tuple, set, frozenset):
            if isinstance(x, kind):
                return getattr(self, f"repr_{kind.__name__}")(x, level)
        return super().repr1(x, level)

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """The first keys in their own order: sorting many would take long."""
        if level <= 0 and x:
            return "{...}"
        pairs = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"
            for key, value in itertools.islice(x.items(), self.maxdict)
        ]
        return "{" + ", ".join([*pairs, *["..."] * (len(x) > self.maxdict)]) + "}"


VALUE_LENGTH = 120  # characters of a value in a message
_short_repr = _ShortRepr()


def format_value(value: Any) -> str:
    """Returns a value as Python writes it, for messages, cut to one short line however much it holds."""
    try:
        text = " ".join(_short_repr.repr(value).split())
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    size = f" ({len(value)} characters)" if isinstance(value, str) and len(value) > VALUE_LENGTH else ""
    return text + size if len(text) <= VALUE_LENGTH else f"{text[:80]}...{size}"


class Outage(Failure):
    """A service that does not answer now; what schedulers start again with this code may find it."""

    code = EXIT_PREEMPTED


def look_again(read: Callable[[], Any], times: int) -> Any:
    """Returns read(), called up to so many times, as long as a checkpoint vanishes under it. Raises: CheckpointGone."""
    for _ in range(times - 1):
        with contextlib.suppress(CheckpointGone):
            return read()
    return read()


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the known name nearest to `name`, or the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name[:VALUE_LENGTH], known, n=1)  # takes the product of the lengths
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(known)}."


def encode_utf8(text: str) -> bytes:
    """Returns a text as UTF-8; invalid bytes of a command line stay as they are.

    Raises:
      InputError: it holds half a surrogate pair.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text {text!r:.60} holds half a surrogate pair at character {error.start}, which is no character: write "
            "the whole pair, or leave it out"
        ) from None


def check_utf8_name(path: object, folder_kind: str) -> None:
    """Refuses a folder that the libraries which write there cannot name: they accept UTF-8 names only.

    Args:
      path: the folder.
      folder_kind: purpose of the folder and the option that sets it, for the message.

    Raises:
      InputError: names the folder.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the name of '{path}' is not UTF-8, as that of {folder_kind} must be: choose another"
        ) from None
