"""The project as others get it: a wheel, a source archive and a site of the docs, made of a copy of the tree."""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import seqpe_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The files that a clone has, without what was built or trained here."""
    found = tmp_path_factory.mktemp("copy") / "seqpe_jax"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this tree is no clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (found / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, found / name, follow_symlinks=False)
    return found


def run(copy, *words):
    found = subprocess.run([sys.executable, "-m", *words], cwd=copy, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


def test_wheel_and_source_archive_are_built(copy):
    pytest.importorskip("build")
    run(copy, "build", "--no-isolation", "--outdir", "dist")
    stem = f"dist/seqpe_jax-{seqpe_jax.__version__}"
    with zipfile.ZipFile(copy / f"{stem}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        about = wheel.read(f"seqpe_jax-{seqpe_jax.__version__}.dist-info/METADATA").decode()
    package = {str(path.relative_to(copy)) for path in (copy / "seqpe_jax").rglob("*.py")}
    assert package | {"seqpe_jax/py.typed", "seqpe_jax/reporting/page.html", "seqpe_jax/reporting/page.js"} <= names
    assert {f"seqpe_jax/{path.relative_to(copy)}" for path in (copy / "configs").rglob("*.py")} <= names
    assert not any(name.startswith(("tests", "configs", "launch", "benchmarks")) for name in names)
    assert f"Version: {seqpe_jax.__version__}\n" in about and "License-Expression: Apache-2.0\n" in about
    assert "Requires-Dist: jax<0.13,>=0.10\n" in about and not any("tensorflow=" in line for line in about.splitlines())
    with tarfile.open(copy / f"{stem}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"pyproject.toml", "README.md", "LICENSE", "requirements.txt"} <= held


def test_the_docs_are_a_site(copy):
    pytest.importorskip("mkdocs")
    output = run(copy, "mkdocs", "build", "--strict", "--site-dir", "made")
    assert "WARNING" not in output
    pages = {path.stem for path in (copy / "docs").glob("*.md")} - {"index"}
    for page in pages:
        assert "<h1" in (copy / "made" / page / "index.html").read_text()
