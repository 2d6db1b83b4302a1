"""The tree: no path of one machine, scripts that parse, types of the public functions, and ruff's rules (pyproject.toml)."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = {".py", ".sh", ".md", ".txt", ".toml", ".yaml", ".yml", ".json", ".sbatch", ".cfg", ""}
SKIPPED = {".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache"}

# Folders of one machine; put together here so that this file does not name them.
MACHINE_PATHS = re.compile(
    r"(?<![\w.~])/(?:" + "|".join(["work", "tmp/" + "env", "root", "home/" + r"\w", "Users/" + r"\w"]) + r")(?![\w.-])"
)


def tree() -> list[pathlib.Path]:
    """Returns the files under version control, or all files where there is no git."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        files = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if not SKIPPED & set(path.relative_to(ROOT).parts)]
    return [path for path in files if path.is_file()]


def test_no_file_names_a_path_of_one_machine():
    assert MACHINE_PATHS.search("see " + "/" + "work/main") and not MACHINE_PATHS.search("DIR/work, /workdir, ~/work")
    found = []
    for path in tree():
        if path.suffix in TEXT:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if MACHINE_PATHS.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_shell_scripts_parse():
    for path in sorted((ROOT / "launch").glob("*.sh")):
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.slow
def test_the_types_of_the_public_functions_hold():
    pytest.importorskip("mypy")
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_ruff_finds_nothing():
    pytest.importorskip("ruff")
    check = [sys.executable, "-m", "ruff", "check", "--quiet", "."]
    found = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
