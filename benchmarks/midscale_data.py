"""Fetches the text of configs/midscale_lm.py, and trains its tokenizer.

    python benchmarks/midscale_data.py                   writes runs/corpus, or --folder=DIR

Code and English from one archive of the Python package index, Django 5.2 (BSD licence): 17 MB of Python and 6 MB of
documentation. The tokenizer is a byte-level BPE of 8,192 tokens, trained on both. The archive is compared with its checksum.
A second call does nothing. It takes a minute.
"""

import hashlib
import pathlib
import subprocess
import sys
import tarfile
import tempfile

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE, ARCHIVE = "Django==5.2", "Django-5.2.tar.gz"
SHA256 = "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89"
VOCABULARY = 8192
_FOLDER = flags.DEFINE_string("folder", str(ROOT / "runs" / "corpus"), "folder of the text and tokenizer.json")


def extract(archive: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the documentation and the source files, and returns their paths, in order."""
    found = []
    with tarfile.open(archive) as files:
        for member in files:
            name = pathlib.PurePosixPath(*pathlib.PurePosixPath(member.name).parts[1:])
            wanted = name.suffix == ".py" or (name.suffix == ".txt" and name.parts[0] == "docs")
            if not member.isfile() or not wanted or not (content := files.extractfile(member).read().strip()):
                continue
            try:
                content.decode()
            except UnicodeDecodeError:  # the package tests other character sets
                continue
            path = folder / ("english" if name.suffix == ".txt" else "code") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content + b"\n")
            found.append(path)
    return sorted(found)


def main(arguments: list[str]) -> None:
    """The command."""
    del arguments
    import tokenizers

    folder = pathlib.Path(_FOLDER.value)
    if (folder / "tokenizer.json").exists():
        print(f"{folder} is complete")
        return
    with tempfile.TemporaryDirectory() as temporary:
        line = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary=:all:",
            f"--dest={temporary}",
            PACKAGE,
        ]
        if subprocess.run(line, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"error: {' '.join(line)} failed: see above")
        archive = pathlib.Path(temporary) / ARCHIVE
        if (digest := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
            sys.exit(f"error: {ARCHIVE} has the checksum {digest}, not {SHA256}: it is another file")
        paths = extract(archive, folder)
    made = tokenizers.ByteLevelBPETokenizer()
    made.train([str(path) for path in paths], VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    made.save(str(folder / "tokenizer.json"))  # last: it marks a complete folder
    print(f"written: {folder}, {len(paths)} files, {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB")


if __name__ == "__main__":
    app.run(main)
