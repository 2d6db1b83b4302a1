"""Writes the table of docs/encodings.md from the classes of `seqpe_jax.config.encodings`.

python benchmarks/encodings_table.py            writes the table
python benchmarks/encodings_table.py --check    says whether the page differs, and changes nothing
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seqpe_jax.config import encodings_table  # noqa: E402

PAGE = ROOT / "docs" / "encodings.md"
TABLE = re.compile(r"^\| kind \|.*\n(?:\|.*\n)*", re.MULTILINE)


def main(check: bool) -> int:
    """Returns the exit code: 1 if the page has no such table, or another one that is to be checked."""
    text = PAGE.read_text()
    if not TABLE.search(text):
        print(f"{PAGE} has no table that begins with | kind |", file=sys.stderr)
        return 1
    updated = TABLE.sub(lambda _: encodings_table(), text, count=1)
    if check and updated != text:
        print(f"{PAGE} differs from the classes: run python benchmarks/encodings_table.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
