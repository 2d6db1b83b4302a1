"""Algorithmic tasks: what a model reads, hides and is scored for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqpe_jax
from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.losses.task import OutputLoss
from seqpe_jax.models.build import check_encoding
from seqpe_jax.tasks import AlgorithmicSequences, evaluate
from seqpe_jax.tasks.base import EvalContext
from seqpe_jax.training.trainer import Trainer
from tests.tiny import ROOT, random_params, train

TINY = {
    "steps": 2,
    "batch_size": 8,
    "data.length": 6,
    "data.task": "reverse_string",
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "optimizer.warmup_steps": 0,
    "eval.lengths": (6, 9),
    "eval.examples": 12,
    "report.trackers": (),
}


def settings_of(variant, **overrides):
    small = {"encoding.width": 16, "encoding.heads": 2, "encoding.layers": 1} if variant == "seqpe" else {}
    values = TINY | small | {name.replace("__", "."): value for name, value in overrides.items()}
    return config.load(f"{ROOT}/configs/algorithmic.py:{variant}", values)


def test_scores_count_outputs_and_are_means_over_lengths():
    """Of the model below each output is right but the first of even inputs, whatever comes after the end."""
    settings = settings_of("none", data__task="duplicate_string")
    task = AlgorithmicSequences(settings)
    assert task.lengths_of((6,)) == range(1, 7) and task.lengths_of((9,)) == range(7, 10)
    seen = []

    def eval_step(batch):
        first = (batch["tokens"] == ord("|")).argmax(axis=1)
        seen.append(first)
        index = np.arange(batch["tokens"].shape[1])
        return {"loss": np.ones(batch["tokens"].shape), "right": (first[:, None] != index) | (first[:, None] % 2 == 1)}

    found = task.evaluate(EvalContext(eval_step, None, lambda batch: batch, batch_size=8), (9,), "test")
    assert found["by_length"] == {
        "length": [7, 8, 9],
        "examples": [4, 4, 4],
        "accuracy": [100.0, pytest.approx(100 * 15 / 16), 100.0],
        "exact_match": [100.0, 0.0, 100.0],
    }
    assert found["accuracy"] == pytest.approx((200 + 93.75) / 3) and found["exact_match"] == pytest.approx(200 / 3)
    assert found["loss"] == 1.0 and found["examples"] == 12
    assert np.concatenate(seen)[:12].tolist() == [7, 8, 9] * 4


@pytest.mark.slow
def test_padding_is_seen_by_nothing(one_device):
    """In the encoder's form an example has the same losses in its own window and in a longer one."""
    settings = settings_of("rotary", data__form="encoder")
    trainer = Trainer.of(settings, jax.devices()[:1])
    params, loss = random_params(trainer, 0.3), OutputLoss()
    network, spec = trainer.model_spec.network, trainer.model_spec
    example = trainer.task.examples.example("test", 4, 0, 12)
    other = {name: example[name].copy() for name in ("tokens", "targets", "weights", "padding")}
    other["tokens"][8:] = 65

    @jax.jit
    def losses(batch):
        grid = batch["tokens"].shape[1:]
        signal = spec.signal(params, spec.position_grid.positions(grid)[None], grid)
        return loss.eval_step(network, {"params": params["model"]}, signal, batch)["loss"][0, :8]

    def results(batch, length):
        return losses({name: jnp.asarray(array)[None, :length] for name, array in batch.items()})

    own = results(other, 8)
    np.testing.assert_allclose(results(other, 12), own, rtol=1e-6, atol=1e-6)
    open_ = {name: array for name, array in other.items() if name != "padding"}
    assert np.abs(results(open_, 12) - own).max() > 1e-3
    swapped = other | {"tokens": other["tokens"].copy()}
    swapped["tokens"][3] ^= 1  # attention in both directions: the last input reaches the first
    assert np.abs(results(swapped, 8)[0] - own[0]) > 1e-6


@pytest.mark.slow
def test_a_run_learns_is_evaluated_and_reopened(tmp_path, one_device):
    settings = settings_of(
        "learned",
        data__form="encoder",
        encoding__table_length=40,
        objective__skip__rate=1.0,
        objective__skip__chunks=0,
        eval__positions="random",
    )
    train(settings, tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= line["train/accuracy"] <= 1
    model = seqpe_jax.load(tmp_path)
    assert model.params["encoding"]["table"].shape == (40, 16)
    report, _ = evaluate.evaluate(model, evaluate.EvalRequest(examples=6))
    assert [result["length"] for result in report["results"]] == [6, 9] and report["training_length"] == 6
    assert report["results"][1]["by_length"]["length"] == [7, 8, 9]
    with pytest.raises(InputError, match="draws the 42 positions of a window from 40: raise objective.skip.range"):
        evaluate.evaluate(model, evaluate.EvalRequest(lengths=((21,),)))
    with pytest.raises(InputError, match="data.form='encoder' reads outputs at blanks, and generates no text"):
        model.generate(["0110"])


def test_what_does_not_fit_is_refused():
    for variant, overrides, message in (
        ("alibi", {"data__form": "encoder"}, "the encoding 'alibi' needs causal order: choose one of seqpe, "),
        ("fox", {"data__form": "encoder"}, "the encoding 'fox' needs causal order"),
        ("rotary", {"data__form": "encoder", "model__window": 4}, "model.window=4 is of causal attention"),
        ("seqpe", {"encoding__max_position": 12}, "data.length 6, with its output a window of 13, needs position 12"),
        ("none", {"eval__positions": "random"}, "encoding.kind='none' has none"),
        ("rotary", {"data__task": "parity"}, "data.task.*Did you mean 'parity_check'"),
        ("rotary", {"data__tokenizer": "x.json"}, "data.tokenizer=.* is not read by runs on sequences"),
        ("learned", {"objective__skip__rate": 1.0}, "encoding.table_length to the positions that are drawn"),
        ("rotary", {"data__name": "stdlib_text"}, "data.task=.*reverse_string.* is not read"),
    ):
        with pytest.raises(InputError, match=message):
            settings_of(variant, **overrides)
    with pytest.raises(InputError, match="table_length=4 is less than the 13 positions of a training window"):
        check_encoding(settings_of("learned", encoding__table_length=4))
