"""Files that the paths of a user lead to: folders, globs and links, each real file once, skipped files counted."""

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

MAX_NAMES_SHOWN = 3  # names in a message, of each reason for skipping

# Reasons for skipping.
DUPLICATE_LINK = "links to files already found"
PARENT_LINK = "links to parent folders"
BROKEN_LINK = "broken links"
SPECIAL_FILE = "pipes, sockets and devices"
UNREADABLE_FOLDER = "unreadable folders"
OTHER_FILE_TYPE = "files of other types"
HIDDEN_FOLDER = "hidden folders"
SYSTEM_FOLDER = "thumbnail and system folders"

# Folders that operating systems, network disks and archivers add to those of a user, in lower case: thumbnails,
# metadata, recycle bins, snapshots. Their files are copies of others, or no data at all.
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

GlobParts = tuple[str, ...]  # of a glob, one pattern per level of folders
ALL_BELOW: GlobParts = ("**",)


class Skipped:
    """Files and folders that are not read: their number by reason, and the first names of each."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Counts one more."""
        self._counts[reason] += 1
        names = self._names.setdefault(reason, [])
        if len(names) < MAX_NAMES_SHOWN:
            names.append(name)

    def __str__(self) -> str:
        return "; ".join(
            f"{reason}: {count} ({', '.join(self._names[reason])}{', ...' if count > MAX_NAMES_SHOWN else ''})"
            for reason, count in self._counts.items()
        )


@dataclasses.dataclass(frozen=True)
class ResolvedPaths:
    """The files that paths lead to.

    Attributes:
      files: absolute paths, sorted; a file that is found under its own name has that name, not a link's.
      skipped: files under the paths that are not read.
      unmatched: the paths that lead to no file.
    """

    files: list[str]
    skipped: Skipped
    unmatched: list[str]


def resolve_paths(paths: Iterable[str], *, suffixes: tuple[str, ...] = (), title: str = "") -> ResolvedPaths:
    """Returns the files that paths lead to: files, globs (`**` crosses folders), all files of folders but hidden ones.

    Thumbnail and system folders (`SYSTEM_FOLDERS`) are read only if a path names them. Links to files and folders are
    followed, but not to parents of a given path; no real file or folder is read twice, however many links lead to it. Pipes
    and devices are never opened.

    Args:
      paths: paths of local files.
      suffixes: endings of names to take, in lower case; () = all.
      title: title of the progress bar on stderr; "" = none.

    Raises:
      InputError: a path is itself a broken link, a pipe, a socket or a device.
    """
    with tqdm.tqdm(desc=title, unit=" files", delay=2.0, disable=not title) as bar:
        walk = _Walk(suffixes, bar)
        paths = sorted(set(paths))
        for path in paths:
            walk.start(path)
        walk.run()
    return ResolvedPaths(
        sorted(walk.files.values()), walk.skipped, [path for path in paths if path not in walk.matched]
    )


class _Walk:
    """A walk over folders, each with the globs that its names are matched with.

    Links wait until no folder is left, so that a file is found under its own name first.

    Attributes:
      files: real path -> path under which it was found.
      skipped: files that are not read.
      matched: the given paths that led to a file.
    """

    def __init__(self, suffixes: tuple[str, ...], bar: tqdm.tqdm):
        self.files: dict[str, str] = {}
        self.skipped = Skipped()
        self.matched: set[str] = set()
        self._suffixes = suffixes
        self._bar = bar
        self._starts: set[str] = set()  # absolute paths of what was given
        self._parents: set[str] = set()  # real folders that hold what was given
        self._visited: dict[tuple[str, GlobParts], str] = {}  # (real folder, glob) -> given path that led there
        # Heaps of (path, globs, given path).
        self._folders: list[tuple[str, set[GlobParts], str]] = []
        self._links: list[tuple[str, set[GlobParts], str]] = []

    def start(self, given: str) -> None:
        """Adds a path of the user. Raises: InputError: it can never be read."""
        path, pattern = _split_glob(os.path.expanduser(given))
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if os.path.islink(path):
                raise InputError(
                    f"data.paths: '{given}' is a broken link (to '{os.readlink(path)}'): repair or remove it"
                ) from None
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                return  # the caller reports it, who knows what is expected
            raise InputError(f"data.paths: '{given}' cannot be read ({error.strerror})") from error
        if not pattern and not stat.S_ISDIR(mode):
            check_regular_file(mode, given)
        path = absolute_path(path)
        self._starts.add(path)
        self._parents.update(map(str, pathlib.Path(os.path.realpath(path)).parents))
        if os.path.islink(path):
            heapq.heappush(self._links, (path, {pattern}, given))
        elif stat.S_ISDIR(mode):
            heapq.heappush(self._folders, (path, {pattern}, given))
        elif not pattern:
            self._take(path, os.path.realpath(path), given)

    def run(self) -> None:
        """Visits all folders and links."""
        while self._folders or self._links:
            if self._folders:
                self._visit_folder(*heapq.heappop(self._folders))
            else:
                self._visit_link(*heapq.heappop(self._links))

    def _visit_link(self, path: str, patterns: set[GlobParts], given: str) -> None:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            self.skipped.add(BROKEN_LINK, path)
            return
        if not stat.S_ISDIR(mode):
            if () in patterns:
                self._found(path, os.path.realpath(path), given, stat.S_ISREG(mode))
        elif path not in self._starts and os.path.realpath(path) in self._parents:
            self.skipped.add(PARENT_LINK, path)
        else:
            self._visit_folder(path, patterns, given)

    def _visit_folder(self, path: str, patterns: set[GlobParts], given: str) -> None:
        """Matches the names in a folder with the globs that it was not visited with before."""
        real = os.path.realpath(path)
        wanted = {pattern or ALL_BELOW for pattern in patterns}
        new = {pattern for pattern in wanted if (real, pattern) not in self._visited}
        if not new:
            if any(self._visited[real, pattern] != given for pattern in wanted):
                self.matched.add(given)
            if os.path.islink(path):
                self.skipped.add(DUPLICATE_LINK, path)
            return
        self._visited |= {(real, pattern): given for pattern in new}
        try:
            with os.scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            self.skipped.add(UNREADABLE_FOLDER, path)
            return
        for entry in entries:
            self._visit_entry(entry, real, new, given)

    def _visit_entry(self, entry: os.DirEntry, folder: str, patterns: set[GlobParts], given: str) -> None:
        if is_system_folder(entry.name) and entry.is_dir() and all(entry.name != pattern[0] for pattern in patterns):
            self.skipped.add(SYSTEM_FOLDER, entry.path)
            return
        rest = {remaining for pattern in patterns for remaining in _remaining_parts(entry.name, pattern)}
        if not rest:
            if entry.name.startswith(".") and any(pattern[0] == "**" for pattern in patterns) and entry.is_dir():
                self.skipped.add(HIDDEN_FOLDER, entry.path)
        elif entry.is_symlink():
            heapq.heappush(self._links, (entry.path, rest, given))
        elif entry.is_dir(follow_symlinks=False):
            heapq.heappush(self._folders, (entry.path, rest, given))
        elif () in rest:
            self._found(entry.path, os.path.join(folder, entry.name), given, entry.is_file(follow_symlinks=False))

    def _found(self, path: str, real: str, given: str, regular: bool) -> None:
        if not regular:
            self.skipped.add(SPECIAL_FILE, path)
        elif self._suffixes and not path.lower().endswith(self._suffixes):
            self.skipped.add(OTHER_FILE_TYPE, path)
        else:
            self._take(path, real, given)

    def _take(self, path: str, real: str, given: str) -> None:
        self.matched.add(given)
        if self.files.setdefault(real, path) != path:
            self.skipped.add(DUPLICATE_LINK, path)
        self._bar.update()


def _split_glob(path: str) -> tuple[str, GlobParts]:
    """Splits a path into the folder before its first pattern and the patterns; () if it is a name without patterns."""
    if os.path.lexists(path) or not glob.has_magic(path):
        return path, ()
    parts = path.split(os.sep)
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    start = os.sep.join(parts[:first]) or (os.sep if first else os.curdir)
    patterns = [part for part in parts[first:] if part not in ("", os.curdir)]
    return start, (*patterns, "**") if path.endswith(os.sep) else tuple(patterns)


def _remaining_parts(name: str, patterns: GlobParts) -> set[GlobParts]:
    """Returns the patterns left for the next levels after a name matched the first; () = the name itself is a match."""
    head, *rest = patterns
    rest, hidden = tuple(rest), name.startswith(".")
    if head != "**":
        return {rest} if fnmatch.fnmatch(name, head) and (not hidden or head.startswith(".")) else set()
    crossed = set() if hidden else {patterns} if rest else {patterns, ()}
    return crossed | _remaining_parts(name, rest) if rest else crossed


def is_system_folder(name: str) -> bool:
    """True for the name of a folder of thumbnails or of the system (`SYSTEM_FOLDERS`)."""
    return name.lower() in SYSTEM_FOLDERS


def absolute_path(path: str) -> str:
    """Returns the absolute path without `..`; a `..` after a link means the parent of the link's target."""
    plain = os.path.abspath(path)
    real = os.path.realpath(path)
    return plain if os.path.realpath(plain) == real else real


def check_regular_file(mode: int, name: str) -> None:
    """Refuses pipes, devices and folders. Raises: InputError."""
    if not stat.S_ISREG(mode):
        file_type = FILE_TYPES.get(stat.S_IFMT(mode), "no file")
        raise InputError(f"data.paths: '{name}' is {file_type}, but a file is expected: copy its content into a file")


@functools.cache
def warn(message: str) -> None:
    """Prints a message to stderr, in one line, once per process."""
    print(" ".join(message.split()), file=sys.stderr, flush=True)
