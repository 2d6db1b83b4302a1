"""Writes the tables of docs/encodings.md and docs/models.md from the classes and presets of `seqpe_jax.config`.

python benchmarks/encodings_table.py            writes the tables
python benchmarks/encodings_table.py --check    says whether a page differs, and changes nothing
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seqpe_jax.config import encodings_table  # noqa: E402
from seqpe_jax.config.decoder_presets import presets_table  # noqa: E402

TABLES = {ROOT / "docs" / "encodings.md": encodings_table, ROOT / "docs" / "models.md": presets_table}
TABLE = re.compile(r"^\| kind \|.*\n(?:\|.*\n)*", re.MULTILINE)


def main(check: bool) -> int:
    """Returns the exit code: 1 if a page has no such table, or another one that is to be checked."""
    return max([_update(page, make(), check) for page, make in TABLES.items()])


def _update(page: pathlib.Path, table: str, check: bool) -> int:
    """Writes or checks the table of one page; returns 1 if it has none, or another one that is to be checked."""
    text = page.read_text()
    if not TABLE.search(text):
        print(f"{page} has no table that begins with | kind |", file=sys.stderr)
        return 1
    updated = TABLE.sub(lambda _: table, text, count=1)
    if check and updated != text:
        print(f"{page} differs from the package: run python benchmarks/encodings_table.py", file=sys.stderr)
        return 1
    if not check:
        page.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
