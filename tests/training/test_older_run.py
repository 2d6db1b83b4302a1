"""A run of an older version, without sizes.json: it opens, is evaluated and resumes with equal numbers."""

import json
import tarfile

import jax
import numpy as np
import pytest

import seqpe_jax
from seqpe_jax import config
from seqpe_jax.interop.run_writer import write_run
from seqpe_jax.models.build import DataSpec
from seqpe_jax.reporting.study import read_study
from seqpe_jax.run_dir import RunDir
from seqpe_jax.training.trainer import Trainer
from tests import tiny
from tests.tiny import ROOT, random_params, tiny_config, train

pytestmark = pytest.mark.usefixtures("one_device")

# Of the version that wrote it: step 4 of 6 is saved; these are its losses at 16 and 32 tokens after step 6.
LOSSES = {16: 5.214712860062718, 32: 5.2148559875786304}
# Of the version in which these were kinds of their own: the first logits after 20 tokens, of parameters drawn as below.
GATED = {
    "fox": (-0.2517552375793457, 1.1999388933181763, 1.3450261354446411, -1.5372754335403442),
    "cable": (0.5286048650741577, -0.2205733060836792, 3.1767332553863525, -0.27683836221694946),
}


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
    assert model.step == 4 and model.data_spec.vocabulary == 256
    assert np.isfinite(model.logits(np.arange(40)[None])).all()
    before = {line["step"]: line for line in map(json.loads, (older / "metrics.jsonl").read_text().splitlines())}
    train(RunDir(older).config, older)
    after = {line["step"]: line for line in map(json.loads, (older / "metrics.jsonl").read_text().splitlines())}
    assert sorted(after) == sorted(before) == [1, 2, 3, 4, 5, 6]
    for step in (5, 6):
        assert after[step]["train/loss"] == pytest.approx(before[step]["train/loss"], abs=1e-4)
    for result in seqpe_jax.load(older).evaluate(lengths=(16, 32), tokens=256):
        assert result["loss"] == pytest.approx(LOSSES[result["length"]], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GATED)
def test_a_run_whose_gates_were_a_kind_of_encoding_opens(kind, tmp_path):
    """With the parameters that it was saved with; reports call it as they did."""
    settings = tiny_config(variant=kind, model__layers=2, encoding__gate_bias_init=1.0)
    params = random_params(Trainer.of(settings, jax.devices()[:1]), 0.3)
    write_run(tmp_path / "run", settings, params, DataSpec(vocabulary=256), 6)
    values = json.loads(json.dumps(config.to_dict(settings)))
    del values["encoding"]["gate"], values["encoding"]["gate_bias_init"]
    values["encoding"] |= {"kind": kind, "gate_bias": 1.0}
    RunDir(tmp_path / "run").write_config(values)
    tiny.older(tmp_path / "run")
    model = seqpe_jax.load(tmp_path / "run")
    assert model.config == settings
    np.testing.assert_allclose(model.logits(np.arange(20)[None])[0, -1, :4], GATED[kind], atol=1e-5)
    assert read_study(tmp_path).rows == [kind] and repr(model).startswith(f"Model({kind} in gpt2")
