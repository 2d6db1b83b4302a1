"""The files under the paths that a user gives: links are followed, each real file comes once, and the rest is told."""

import collections
import dataclasses
import fnmatch
import functools
import glob
import heapq
import os
import pathlib
import stat
import sys
from collections.abc import Iterable

import tqdm

from seqpe_jax.errors import InputError

MAX_NAMES_SHOWN = 3  # names told of each kind that is left out
DUPLICATE_LINK, PARENT_LINK, BROKEN_LINK = (
    "links to what is read already",
    "links to folders above",
    "links that lead nowhere",
)
SPECIAL_FILE, UNREADABLE_FOLDER, OTHER_FILE_TYPE = (
    "pipes, sockets and devices",
    "folders that cannot be read",
    "files of other kinds",
)
HIDDEN_FOLDER, SYSTEM_FOLDER = "hidden folders", "thumbnail and system folders"
# What operating systems, network disks and archivers put beside a user's own folders, in lower case: thumbnails, metadata,
# recycle bins, snapshots. Their files are copies of others, or no data at all.
SYSTEM_FOLDERS = frozenset(
    {
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "#recycle",
        "#snapshot",
        "__macosx",
        "$recycle.bin",
        "lost+found",
        "system volume information",
    }
)
FILE_TYPES = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}

GlobParts = tuple[str, ...]
ALL_BELOW: GlobParts = ("**",)  # below a folder


class Skipped:
    """What lies under paths but is not read: how many of each kind, and the first of their names."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Counts one more of a kind."""
        self._counts[kind] += 1
        first = self._names.setdefault(kind, [])
        if len(first) < MAX_NAMES_SHOWN:
            first.append(name)

    def __str__(self) -> str:
        return "; ".join(
            f"{kind}: {count} ({', '.join(self._names[kind])}{', ...' if count > MAX_NAMES_SHOWN else ''})"
            for kind, count in self._counts.items()
        )


@dataclasses.dataclass(frozen=True)
class ResolvedPaths:
    """What paths lead to.

    Attributes:
      files: absolute paths as they were met, sorted; a file that is met by its own name has that one, not a link's.
      left_out: what is not read, though it lies there.
      empty: the paths given that lead to no file.
    """

    files: list[str]
    skipped: Skipped
    empty: list[str]


def resolve_paths(paths: Iterable[str], *, suffixes: tuple[str, ...] = (), title: str = "") -> ResolvedPaths:
    """Returns the files that paths name: files, globs (`**` crosses folders), and all below folders that is not hidden.

    Thumbnail and system folders (`SYSTEM_FOLDERS`) are read only where a path names them.
    Links to files and folders are followed, and no real file or folder is read twice, however many links lead to it; but
    not out of what was given, to a folder that holds it. What is neither a file nor a folder is never opened.

    Args:
      suffixes: lower-case ends of the names that are wanted; () = all.
      title: of the progress bar on stderr; "" = none.

    Raises:
      InputError: a path that is itself a link to nowhere, a pipe, a socket or a device.
    """
    with tqdm.tqdm(desc=title, unit=" files", delay=2.0, disable=not title) as bar:
        search = _Search(suffixes, bar)
        paths = sorted(set(paths))
        for path in paths:
            search.begin(path)
        search.run()
    return ResolvedPaths(
        sorted(search.files.values()), search.skipped, [path for path in paths if path not in search.useful]
    )


class _Search:
    """Folders still to be looked into, each with the patterns that names in it are held against.

    Attributes:
      files: real path -> path as it was met; useful: the paths given that led to a file.
    """

    def __init__(self, suffixes: tuple[str, ...], bar: tqdm.tqdm):
        self.files: dict[str, str] = {}
        self.skipped = Skipped()
        self.useful: set[str] = set()
        self._suffixes, self._bar = suffixes, bar
        self._begun: set[str] = set()
        self._above: set[str] = set()  # real folders that hold what was given
        self._seen: dict[tuple[str, GlobParts], str] = {}  # (real folder, patterns) -> the path given that led there
        # Links wait until nothing else is left, so that what they lead to is known by its own name where it has one here.
        self._folders: list[tuple[str, set[GlobParts], str]] = []
        self._links: list[tuple[str, set[GlobParts], str]] = []

    def begin(self, given: str) -> None:
        path, patterns = _split_glob(os.path.expanduser(given))
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if os.path.islink(path):
                raise InputError(
                    f"data.paths: '{given}' is a link that leads nowhere (to '{os.readlink(path)}'): mend or remove it"
                ) from None
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                return  # told by whoever asks, who knows what was expected
            raise InputError(f"data.paths: '{given}' cannot be read ({error.strerror})") from error
        if not patterns and not stat.S_ISDIR(mode):
            check_regular_file(mode, given)
        path = absolute_path(path)
        self._begun.add(path)
        self._above.update(map(str, pathlib.Path(os.path.realpath(path)).parents))
        if os.path.islink(path):
            heapq.heappush(self._links, (path, {patterns}, given))
        elif stat.S_ISDIR(mode):
            heapq.heappush(self._folders, (path, {patterns}, given))
        elif not patterns:
            self._take(path, os.path.realpath(path), given)

    def run(self) -> None:
        while self._folders or self._links:
            if self._folders:
                self._enter(*heapq.heappop(self._folders))
                continue
            path, patterns, given = heapq.heappop(self._links)
            try:
                mode = os.stat(path).st_mode
            except OSError:
                self.skipped.add(BROKEN_LINK, path)
                continue
            if stat.S_ISDIR(mode):
                if path not in self._begun and os.path.realpath(path) in self._above:
                    self.skipped.add(PARENT_LINK, path)
                else:
                    self._enter(path, patterns, given)
            elif () in patterns:
                self._meet(path, os.path.realpath(path), given, stat.S_ISREG(mode))

    def _enter(self, path: str, patterns: set[GlobParts], given: str) -> None:
        """Looks into a folder, for what has not been looked for there yet."""
        real = os.path.realpath(path)
        wanted = {pattern or ALL_BELOW for pattern in patterns}
        fresh = {pattern for pattern in wanted if (real, pattern) not in self._seen}
        if not fresh:
            if any(self._seen[real, pattern] != given for pattern in wanted):
                self.useful.add(given)
            if os.path.islink(path):
                self.skipped.add(DUPLICATE_LINK, path)
            return
        self._seen |= {(real, pattern): given for pattern in fresh}
        try:
            with os.scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            self.skipped.add(UNREADABLE_FOLDER, path)
            return
        for entry in entries:
            if is_system_folder(entry.name) and entry.is_dir() and all(entry.name != pattern[0] for pattern in fresh):
                self.skipped.add(SYSTEM_FOLDER, entry.path)
                continue
            after = {rest for pattern in fresh for rest in _remaining_parts(entry.name, pattern)}
            if not after:
                if entry.name.startswith(".") and any(pattern[0] == "**" for pattern in fresh) and entry.is_dir():
                    self.skipped.add(HIDDEN_FOLDER, entry.path)
                continue
            if entry.is_symlink():
                heapq.heappush(self._links, (entry.path, after, given))
            elif entry.is_dir(follow_symlinks=False):
                heapq.heappush(self._folders, (entry.path, after, given))
            elif () in after:
                self._meet(entry.path, os.path.join(real, entry.name), given, entry.is_file(follow_symlinks=False))

    def _meet(self, path: str, real: str, given: str, regular: bool) -> None:
        if not regular:
            self.skipped.add(SPECIAL_FILE, path)
        elif self._suffixes and not path.lower().endswith(self._suffixes):
            self.skipped.add(OTHER_FILE_TYPE, path)
        else:
            self._take(path, real, given)

    def _take(self, path: str, real: str, given: str) -> None:
        self.useful.add(given)
        if self.files.setdefault(real, path) != path:
            self.skipped.add(DUPLICATE_LINK, path)
        self._bar.update()


def _split_glob(path: str) -> tuple[str, GlobParts]:
    """Returns (where to begin, the patterns of what follows); none where the path is a name."""
    if os.path.lexists(path) or not glob.has_magic(path):
        return path, ()
    parts = path.split(os.sep)
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    begin = os.sep.join(parts[:first]) or (os.sep if first else os.curdir)
    patterns = [part for part in parts[first:] if part not in ("", os.curdir)]
    return begin, (*patterns, "**") if path.endswith(os.sep) else tuple(patterns)


def _remaining_parts(name: str, patterns: GlobParts) -> set[GlobParts]:
    """Returns what may follow a name below a folder held against patterns; () = nothing need follow."""
    head, *rest = patterns
    rest, hidden = tuple(rest), name.startswith(".")
    if head != "**":
        return {rest} if fnmatch.fnmatch(name, head) and (not hidden or head.startswith(".")) else set()
    crossed = set() if hidden else {patterns} if rest else {patterns, ()}
    return crossed | _remaining_parts(name, rest) if rest else crossed


def is_system_folder(name: str) -> bool:
    """Returns whether a folder of this name holds thumbnails or belongs to the system (`SYSTEM_FOLDERS`)."""
    return name.lower() in SYSTEM_FOLDERS


def absolute_path(path: str) -> str:
    """Returns the absolute path, without `..`; what `..` means behind a link is kept."""
    plain = os.path.abspath(path)
    real = os.path.realpath(path)
    return plain if os.path.realpath(plain) == real else real


def check_regular_file(mode: int, name: str) -> None:
    """Refuses what is no file, and might never end. Raises: InputError."""
    if not stat.S_ISREG(mode):
        kind = FILE_TYPES.get(stat.S_IFMT(mode), "no file")
        raise InputError(f"data.paths: '{name}' is {kind}, where a file was expected: copy what it gives into a file")


@functools.cache
def warn(words: str) -> None:
    """Says something on stderr, in one line, once."""
    print(" ".join(words.split()), file=sys.stderr, flush=True)
