"""A run that was begun before a run kept its sizes: it opens, is evaluated and goes on as if nothing had changed."""

import json
import tarfile

import numpy as np
import pytest

import seqpe_jax
from seqpe_jax import config
from seqpe_jax.runtime.checkpoint import read_config
from tests.tiny import ROOT, train

# Of the version that wrote it: step 4 of 6 is saved; these are its losses at 16 and 32 tokens after step 6.
LOSSES = {16: 5.214712860062718, 32: 5.2148559875786304}


@pytest.fixture
def older(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # its text is named from there
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    with tarfile.open(ROOT / "tests" / "fixtures" / "older_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert not (tmp_path / "run" / "sizes.json").exists()
    return tmp_path / "run"


@pytest.mark.slow
def test_it_opens_and_goes_on(older):
    model = seqpe_jax.load(older)
    assert model.step == 4 and model.sizes.vocabulary == 256
    assert np.isfinite(model.logits(np.arange(40)[None])).all()
    before = {line["step"]: line for line in map(json.loads, (older / "metrics.jsonl").read_text().splitlines())}
    train(config.from_dict(read_config(older)), older)
    after = {line["step"]: line for line in map(json.loads, (older / "metrics.jsonl").read_text().splitlines())}
    assert sorted(after) == sorted(before) == [1, 2, 3, 4, 5, 6]
    for step in (5, 6):
        assert after[step]["train/loss"] == pytest.approx(before[step]["train/loss"], abs=1e-4)
    for result in seqpe_jax.load(older).evaluate(lengths=(16, 32), tokens=256):
        assert result["loss"] == pytest.approx(LOSSES[result["length"]], abs=1e-4)
