"""Averages of parameters: evaluated while training, saved, opened and resumed."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import seqpe_jax
from seqpe_jax.errors import InputError
from tests.tiny import tiny_config, train

pytestmark = pytest.mark.usefixtures("one_device")

KINDS = {
    "ema": {"optimizer__ema": 0.5, "checkpoint__best": "ema_loss@16"},
    "schedule_free": {"optimizer__kind": "schedule_free_adamw", "optimizer__schedule": "constant"},
}


def metrics_at(folder, step):
    return [
        line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if line["step"] == step
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_of_a_run(kind, tmp_path, capsys):
    folder, again = tmp_path / "run", tmp_path / "again"
    fields = {"variant": "none", "steps": 4, "eval__every": 2, "eval__lengths": (16,), "checkpoint__keep": 2}
    settings = tiny_config(**fields, data__name="stdlib_text", model__dropout=0.0, **KINDS[kind])
    train(settings, folder)
    line = rf"\n  optimizer {settings.optimizer.kind}: 0\.\d MiB of state, an average of the parameters among it\n"
    assert re.search(line, capsys.readouterr().out)

    # Evaluated during training, and opened later, with the same value: in Python and by the command's function.
    name = "eval/ema_loss@16" if kind == "ema" else "eval/loss@16"
    (measured,) = (entry[name] for entry in metrics_at(folder, 4) if name in entry)
    trained = seqpe_jax.load(folder, weights="trained")
    averaged = seqpe_jax.load(folder, weights="averaged")
    assert averaged.averaged and not trained.averaged and ", averaged)" in repr(averaged)
    (result,) = averaged.evaluate(lengths=(16,), split="validation")
    assert result["loss"] == pytest.approx(measured, abs=1e-5)
    kernels = [model.params["model"]["blocks_0"]["mlp_in"]["kernel"] for model in (trained, averaged)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4
    by_default = seqpe_jax.load(folder)
    assert by_default.averaged == (kind == "schedule_free")

    # Saved as a model of its own, it has nothing else to read.
    averaged.save(tmp_path / "saved")
    np.testing.assert_array_equal(
        seqpe_jax.load(tmp_path / "saved").params["model"]["blocks_0"]["mlp_in"]["kernel"], kernels[1]
    )
    with pytest.raises(InputError, match="holds parameters alone, and no average"):
        seqpe_jax.load(tmp_path / "saved", weights="averaged")

    # Resumed from step 2, the run has the same bits.
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "4")
    train(settings, again)
    for weights in ("trained", "averaged"):
        one, other = (seqpe_jax.load(run, weights=weights).params for run in (folder, again))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert [{**entry, "time": 0} for entry in metrics_at(again, 4) if name in entry] == [
        {**entry, "time": 0} for entry in metrics_at(folder, 4) if name in entry
    ]


def test_a_run_without_an_average_says_so(tmp_path):
    from seqpe_jax.interop.run_writer import write_run
    from seqpe_jax.models.build import DataSpec
    from seqpe_jax.training.trainer import Trainer
    from tests.tiny import random_params

    settings = tiny_config(variant="none")
    params = random_params(Trainer.of(settings, jax.devices()[:1]), 0.3)
    write_run(tmp_path / "run", settings, params, DataSpec(vocabulary=256), 6)
    with pytest.raises(InputError, match="has no average of its parameters: train with --config.optimizer.ema"):
        seqpe_jax.load(tmp_path / "run", weights="averaged")
