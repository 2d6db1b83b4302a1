"""Data of the tests of training."""

import pathlib

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    """A file of about 250 kB."""
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"{number} times {number} is {number * number}\n" for number in range(12_000)))
    return path
