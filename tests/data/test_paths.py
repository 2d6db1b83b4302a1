"""Files that paths lead to: through links, each once, with the skipped ones counted."""

import glob
import os
import re
import socket

import pytest

from seqpe_jax.data.paths import resolve_paths
from seqpe_jax.errors import InputError


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def below(folder, *paths, **options):
    """Returns (names of what is found, what is skipped) with names below a folder."""
    found = resolve_paths([str(folder / path) for path in paths], **options)
    return [os.path.relpath(file, folder) for file in found.files], str(found.skipped).replace(f"{folder}/", "")


def plainly(path):
    """What globs and walks find where there are no links."""
    found = set()
    for match in [path] if os.path.exists(path) else glob.glob(path, recursive=True):
        found |= {match} if os.path.isfile(match) else set()
        for folder, folders, names in os.walk(match):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found |= {os.path.join(folder, name) for name in names if not name.startswith(".")}
    return sorted(map(os.path.abspath, found))


PATTERNS = [
    "",
    "*",
    "**",
    "*/",
    "**/",
    "*.txt",
    "**/*.txt",
    "a/**",
    "a/**/c/*",
    "**/c",
    "**/**/*.md",
    "*/*/**",
    "[ab]/*.txt",
    "?.txt",
    "a[1].txt",
    "**/.hidden/*",
    ".hidden",
    "**/.*",
    "a/b/../*.txt",
    "./a/./*",
    "**/[!x].txt",
    "nothing*",
    "a/x.txt/",
    "a/x.txt/*",
    "a/x.txt/**",
]


def test_without_links_globs_and_folders_lead_where_python_says(tmp_path):
    names = ("x.txt", "a[1].txt", ".dot.txt", "a/x.txt", "a/y.md", "a/b/c/x.txt", "a/c/z.txt", "a/.hidden/u.txt")
    write(tmp_path, *names, "b/x.txt", "b/c/c/c.txt", ".hidden/v.txt", "b/.w.txt")
    for pattern in PATTERNS:
        found = resolve_paths([f"{tmp_path}/{pattern}"])
        assert found.files == plainly(f"{tmp_path}/{pattern}"), pattern
        assert re.fullmatch(r"(hidden folders: \d \(\S+(, \S+)*\))?", str(found.skipped))
        assert found.unmatched == ([] if found.files else [f"{tmp_path}/{pattern}"])


@pytest.mark.parametrize("path", ["", "**/*.txt", "**", "*"])
def test_a_file_is_read_once_however_links_turn(tmp_path, path):
    write(tmp_path, "1.txt", "deep/2.txt", "deep/deeper/3.txt")
    (tmp_path / "deep" / "loop").symlink_to("..")
    (tmp_path / "deep" / "deeper" / "again.txt").symlink_to("../2.txt")
    found, skipped = below(tmp_path, path)
    assert found == ["1.txt", "deep/2.txt", "deep/deeper/3.txt"]
    assert skipped.startswith("links to files already found: 2 (deep/deeper/again.txt, deep/loop")


def test_folders_that_all_link_to_each_other_take_no_time(tmp_path):
    for one in range(12):
        write(tmp_path, f"{one:02d}/text.txt")
        for other in range(12):
            (tmp_path / f"{one:02d}" / f"to{other}").symlink_to(f"../{other:02d}")
    assert below(tmp_path, "**/*.txt")[0] == [f"{one:02d}/text.txt" for one in range(12)]
    assert len(below(tmp_path, "00")[0]) == 12


def test_linked_folders_and_files_are_entered(tmp_path):
    write(tmp_path, "far/one/1.txt", "far/2.txt", "far/3.md")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "one").symlink_to(tmp_path / "far" / "one")
    (tmp_path / "near" / "two.txt").symlink_to("../far/2.txt")
    (tmp_path / "way").symlink_to("near")
    for path in ("near", "near/**/*.txt", "near/*"):
        assert below(tmp_path, path) == (["near/one/1.txt", "near/two.txt"], "")
    assert below(tmp_path, "way")[0] == ["way/one/1.txt", "way/two.txt"]
    found, skipped = below(tmp_path, "near", "far/*.txt")
    assert found == ["far/2.txt", "near/one/1.txt"], "a file's own name goes before a link's"
    assert skipped == "links to files already found: 1 (near/two.txt)"
    assert resolve_paths([str(tmp_path / "way"), str(tmp_path / "near")]).unmatched == []
    assert below(tmp_path, "way/../far/2.txt")[0] == ["far/2.txt"]
    (tmp_path / "far" / "inner").symlink_to("one")
    assert below(tmp_path, "far/inner/../2.txt")[0] == ["far/2.txt"]


def test_links_do_not_lead_out_to_what_holds_them(tmp_path):
    write(tmp_path, "all/train/1.txt", "all/test/2.txt", "all/0.txt")
    (tmp_path / "all" / "train" / "up").symlink_to("..")
    (tmp_path / "all" / "train" / "root").symlink_to("/")
    (tmp_path / "all" / "train" / "side").symlink_to("../test")
    found, skipped = below(tmp_path, "all/train")
    assert found == ["all/train/1.txt", "all/train/side/2.txt"]
    assert skipped == "links to parent folders: 2 (all/train/root, all/train/up)"
    (tmp_path / "given").symlink_to("all")
    assert below(tmp_path, "all/train", "given")[0] == ["all/train/1.txt", "all/train/side/2.txt", "given/0.txt"]


def test_what_is_no_file_is_skipped_and_counted(tmp_path, monkeypatch):
    write(tmp_path, "1.txt", "closed/2.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "self").symlink_to("self")
    for number in range(5):
        (tmp_path / f"gone{number}").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket")
    scandir = os.scandir

    def closed(path):
        if path == str(tmp_path / "closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    found, skipped = below(tmp_path, "")
    assert found == ["1.txt"]
    assert set(skipped.split("; ")) == {
        "pipes, sockets and devices: 3 (pipe.txt, socket, zero.txt)",
        "broken links: 6 (gone0, gone1, gone2, ...)",
        "unreadable folders: 1 (closed)",
    }
    assert below(tmp_path, "*.txt")[1] == "pipes, sockets and devices: 2 (pipe.txt, zero.txt)"


def test_names_that_are_not_wanted_are_counted(tmp_path):
    write(tmp_path, "1.PNG", "a/2.png", "a/notes.txt", "blob")
    (tmp_path / "a" / "3.png").symlink_to("../blob")
    assert below(tmp_path, "", suffixes=(".png",)) == (
        ["1.PNG", "a/2.png", "a/3.png"],
        "files of other types: 2 (blob, a/notes.txt)",
    )


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda path: os.mkfifo(path), "is a pipe, but a file is expected"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, but a file is expected"),
        (lambda path: path.symlink_to("nowhere"), r"is a broken link \(to 'nowhere'\)"),
        (lambda path: path.symlink_to("odd.txt"), r"is a broken link \(to 'odd.txt'\)"),
    ],
)
def test_a_path_that_can_never_be_read_is_refused(tmp_path, make, words):
    make(tmp_path / "odd.txt")
    with pytest.raises(InputError, match=f"data.paths: '{tmp_path}/odd.txt' {words}"):
        resolve_paths([str(tmp_path / "odd.txt")])


def test_thumbnail_and_system_folders_are_skipped_and_counted(tmp_path):
    write(
        tmp_path,
        "1.txt",
        "@eaDir/1.txt/thumb.txt",
        "a/__MACOSX/2.txt",
        "a/#recycle/3.txt",
        "lost+found/4.txt",
        "a/$RECYCLE.BIN/5.txt",
        ".thumbnails/6.txt",
    )
    for path in ("", "**/*.txt"):
        found, skipped = below(tmp_path, path)
        assert found == ["1.txt"]
        assert set(skipped.split("; ")) == {
            "hidden folders: 1 (.thumbnails)",
            "thumbnail and system folders: 5 (@eaDir, lost+found, a/#recycle, ...)",
        }
    assert below(tmp_path, "lost+found", "@eaDir/**")[0] == ["@eaDir/1.txt/thumb.txt", "lost+found/4.txt"], "as asked"


def test_paths_that_lead_to_no_file(tmp_path, monkeypatch):
    write(tmp_path, "1.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "loop").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    empty = ["", "*.md", "1.txt/", "empty", "nowhere"]
    assert resolve_paths(["1.txt", *empty]).unmatched == empty
