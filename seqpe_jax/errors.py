"""The exceptions that commands print in one line, with exit codes; imports nothing of this package."""

import difflib
from collections.abc import Iterable

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes the work


class InputError(ValueError):
    """Bad input; the message is one line: what is wrong, what was expected, how to fix it.

    Commands print the message without a traceback and exit with code 2.
    """


class Failure(RuntimeError):
    """Work that cannot continue, through no fault of the input; the message is one line, the exit code `code`."""

    code = 1


class StoreError(OSError, Failure):
    """A request to a bucket that failed, also when repeated; `filename` and `strerror` say where and why."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the known name nearest to `name`, or the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
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
