"""Import direction, by import-linter's contracts in pyproject.toml; and no circle of modules. The source is parsed, not run."""

import graphlib
import os
import pathlib
import subprocess
import sys

import grimp

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_contracts_of_import_direction_hold():
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_circle_of_modules():
    graph = grimp.build_graph("seqpe_jax", cache_dir=None)
    imported = {name: graph.find_modules_directly_imported_by(name) - {"seqpe_jax"} for name in graph.modules}
    assert "seqpe_jax.encodings.seqpe" in imported
    graphlib.TopologicalSorter(imported).prepare()  # raises CycleError with the circle
