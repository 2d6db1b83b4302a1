"""The tree: no path of anybody's machine, docstrings on everything public, scripts that parse."""

import ast
import functools
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


SOURCES = sorted((ROOT / "seqpe_jax").rglob("*.py"))


def test_no_file_names_a_path_of_one_machine():
    assert MACHINE_PATHS.search("see " + "/" + "work/main") and not MACHINE_PATHS.search("DIR/work, /workdir, ~/work")
    found = []
    for path in tree():
        if path.suffix in TEXT:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if MACHINE_PATHS.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@functools.cache
def _classes() -> dict[str, tuple[list[str], set[str]]]:
    """Returns class name -> (names of its bases, its methods with a docstring), over the whole package."""
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = {
                    item.name for item in node.body if isinstance(item, ast.FunctionDef) and ast.get_docstring(item)
                }
                found[node.name] = ([ast.unparse(base).rpartition(".")[2] for base in node.bases], methods)
    return found


def _inherited(name: str, method: str, classes: dict[str, tuple[list[str], set[str]]]) -> bool:
    bases, _ = classes.get(name, ([], set()))
    return any(method in classes.get(base, ([], set()))[1] or _inherited(base, method, classes) for base in bases)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path):
    source = path.read_text()
    if not source.strip():
        assert path.name == "__init__.py"
        return
    module, classes = ast.parse(source), _classes()
    missing = [] if ast.get_docstring(module) else ["the module"]

    def look(body: list[ast.stmt], owner: str) -> None:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            told = ast.get_docstring(node) or (owner and _inherited(owner, node.name, classes))
            if not told and not (owner and node.name == "setup"):  # Flax's own hook
                missing.append(f"{owner}.{node.name}" if owner else node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, node.name)

    look(module.body, "")
    assert not missing, f"no docstring: {', '.join(missing)}"


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.slow
def test_the_types_of_the_public_face_hold():
    pytest.importorskip("mypy")
    found = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_ruff_finds_nothing():
    pytest.importorskip("ruff")
    check = [sys.executable, "-m", "ruff", "check", "--quiet", "."]
    found = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
