"""Import direction, by import-linter's contracts in pyproject.toml; and no circle of modules. The source is parsed, not run."""

import graphlib
import pathlib

import grimp
from importlinter.cli import lint_imports

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_contracts_of_import_direction_hold(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


def test_no_circle_of_modules():
    graph = grimp.build_graph("seqpe_jax", cache_dir=None)
    imported = {name: graph.find_modules_directly_imported_by(name) - {"seqpe_jax"} for name in graph.modules}
    assert "seqpe_jax.encodings.seqpe" in imported
    graphlib.TopologicalSorter(imported).prepare()  # raises CycleError with the circle
