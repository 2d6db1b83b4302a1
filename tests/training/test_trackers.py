"""Trackers, offline: what they record is read back by their own clients; a resumed run continues its curves."""

import importlib.util
import json
import pathlib

import pytest

from seqpe_jax import config
from seqpe_jax.cli import config_flags
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import RunDir
from seqpe_jax.training import trackers
from seqpe_jax.training.metrics_writer import MetricsWriter
from tests.tiny import tiny_config


def needs(package):
    reason = f"{package} is not installed: pip install {trackers.PACKAGES[package][1]}"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


def record(folder, names):
    """Records a run that is killed after step 4, of which step 2 is saved, and resumed to its end, step 6."""
    values = json.loads(json.dumps(config.to_dict(tiny_config(variant="none"))))
    folder.mkdir()
    RunDir(folder).write_config(values)
    for start, end in ((0, 4), (2, 6)):
        writer = MetricsWriter(folder, start, trackers=names, config=values)
        for step in range(start + 1, end + 1):
            writer.write(step, {"train/loss": 1 / step, "train/term/task": 1 / step}, time=float(step))
        if end == 6:
            metrics = {"eval/loss@16": 0.5, "eval/loss@32": 0.25, "eval/perplexity@16": 2.0}
            writer.write(end, metrics, time=6.0)
            writer.write_evaluation(end, metrics)
            writer.write_figures(end)
            writer.complete = True
        writer.close()


def test_a_missing_package_is_named_before_training(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    trackers.check_installed(("tensorboard",))
    with pytest.raises(InputError, match="names mlflow, whose package is not installed: pip install mlflow-skinny, or"):
        trackers.check_installed(("tensorboard", "mlflow"))


def test_older_configs_open_and_names_are_checked():
    for argument in ("wandb, mlflow", "('wandb', 'mlflow')"):
        assert config_flags._names(argument) == ("wandb", "mlflow")
    assert config_flags._names("()") == () and config_flags._names("wandb") == ("wandb",)
    for value, meant in ((True, ("tensorboard",)), (False, ())):
        assert config.from_dict({"report": {"tensorboard": value}}).report.trackers == meant
    for fields, message in (
        ({"report.trackers": ("wandbb",)}, "Did you mean 'wandb'"),
        ({"report.trackers": ("mlflow", "mlflow")}, "names mlflow twice"),
        ({"report.tensorboard": False}, "it is called 'report.trackers' now"),
    ):
        with pytest.raises(InputError, match=message):
            config.load("configs/stdlib_lm.py:none", fields)


def test_a_tracker_that_fails_gets_all_later(capsys):
    got, works = [], [False]

    def call(value):
        if not works[0]:
            raise ConnectionError("no  route\nto host")
        got.append(value)

    tracker = trackers.Deferred("mlflow")
    for value in range(3):
        tracker._defer(lambda value=value: call(value))
    tracker.flush()
    tracker.flush()
    assert got == [] and capsys.readouterr().err.count("mlflow: ConnectionError: no route to host: it gets") == 1
    works[0] = True
    tracker.flush()
    assert got == [0, 1, 2]


def records(path: pathlib.Path):
    """The records of a run of Weights & Biases, by its own messages: LevelDB's log format after a header of 7 bytes."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, parts, place = path.read_bytes(), b"", 7
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if kind == 0:
            break
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield messages.Record.FromString(parts)
            parts = b""


@needs("wandb")
def test_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record(tmp_path / "run", ("wandb",))
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    losses, found, identities = {}, {}, set()
    for one in (one for file in files for one in records(file)):
        items = (*one.config.update, *one.run.config.update, *one.history.item)
        line = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        found |= line
        if "train/loss" in line:
            losses[line["step"]] = line["train/loss"]
        if one.WhichOneof("record_type") == "run":
            identities.add(one.run.run_id)
    assert losses == {step: 1 / step for step in range(1, 7)}
    assert identities == {json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]}
    assert found["model.layers"] == 1
    media = files[1].parent / "files"
    table = json.loads((media / found["evaluation/path"]).read_text())
    assert table["columns"] == ["size", "loss", "perplexity"] and table["data"][1] == ["32", 0.25, None]
    assert (media / found["plots/training_curves/path"]).read_bytes().startswith(b"\x89PNG")


@needs("mlflow")
def test_mlflow(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    record(tmp_path / "run", ("tensorboard", "mlflow"))
    client = importlib.import_module("mlflow.tracking").MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    (experiment,) = [one for one in client.search_experiments() if one.name == "seqpe_jax"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    losses = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "train/loss")}
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 7)}
    assert run.data.metrics["eval/loss_at_32"] == 0.25 and run.data.params["model.layers"] == "1"
    artifacts = pathlib.Path(run.info.artifact_uri.removeprefix("file://"))
    assert json.loads((artifacts / "config.json").read_text())["model.layers"] == 1
    table = json.loads((artifacts / "evaluation" / "6.json").read_text())
    assert table == {"columns": ["size", "loss", "perplexity"], "data": [["16", 0.5, 2.0], ["32", 0.25, None]]}
    assert (artifacts / "plots" / "training_curves" / "6.png").read_bytes().startswith(b"\x89PNG")
