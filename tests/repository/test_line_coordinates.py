"""The coordinates of benchmarks/line_coordinates.py are those of lines, and depend on no later byte."""

import importlib
import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_column_and_the_indentation_of_a_byte_are_those_of_its_line_so_far(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("line_coordinates")
    text = b"def f(x):\n    if x:\n\n        y = 1\n  z"
    found = np.asarray(script.coordinates(np.array([[*text]]), np.array([7]), axes=3))[0]
    for at, here in enumerate(found):
        line = text[: at + 1].removesuffix(b"\n").rpartition(b"\n")[2] + b"\n" * (text[at] == 10)
        assert [*here] == [7 + at, len(line) - 1, len(line) - len(line.lstrip(b" "))]
    index = np.asarray(script.coordinates(np.array([[*text]]), np.array([7]), axes=1))
    assert (index[0, :, 0] == found[:, 0]).all()
