"""The two exceptions that commands tell in one line; imports nothing, so every room may raise them."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, told in one line: what is wrong, what was expected, how to fix it.

    Commands print the message without a traceback and exit with code 2.
    """


class Failure(RuntimeError):
    """Work that cannot go on, through no fault of the input, told in one line; commands exit with code 1."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the known name nearest to `name`, or the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(known)}."
