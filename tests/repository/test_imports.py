"""Import direction, by import-linter's contracts in pyproject.toml; and no circle of modules. The source is parsed, not run."""

import graphlib
import pathlib
import subprocess
import sys

import grimp

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_contracts_of_import_direction_hold():
    """In a process of its own: import-linter holds the output stream that it was imported with, which a test closes."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_circle_of_modules():
    graph = grimp.build_graph("seqpe_jax", cache_dir=None)
    imported = {name: graph.find_modules_directly_imported_by(name) - {"seqpe_jax"} for name in graph.modules}
    assert "seqpe_jax.encodings.seqpe" in imported
    graphlib.TopologicalSorter(imported).prepare()  # raises CycleError with the circle
