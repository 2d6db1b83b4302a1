"""Every wrong field gets one clear line that names it and says how to fix it."""

import json

import pytest

from seqpe_jax import config
from seqpe_jax.errors import InputError
from tests.tiny import ROOT

QUICKSTART = str(ROOT / "configs" / "stdlib_lm.py")


def test_a_config_survives_json():
    settings = config.load(QUICKSTART)
    assert config.from_dict(json.loads(json.dumps(config.to_dict(settings)))) == settings


def test_difference_names_the_fields_that_differ():
    old = config.to_dict(config.load(QUICKSTART))
    new = config.to_dict(config.load(QUICKSTART, {"model.width": 192, "seed": 3}))
    assert config.difference(old, new) == ["model.width: 96 -> 192", "seed: 0 -> 3"]
    assert config.difference(old, json.loads(json.dumps(old))) == []


@pytest.mark.parametrize(
    "overrides,words",
    [
        ({"model.widht": 96}, ["unknown", "model.widht", "'model.width'"]),
        ({"encoding.kind": "rotery"}, ["encoding.kind", "'rotary'"]),
        ({"model.width": 96.5}, ["model.width", "int", "96.5"]),
        ({"model.dropout": True}, ["model.dropout", "float", "True"]),
        ({"model.dropout": 1.5}, ["model.dropout", "at most 1"]),
        ({"steps": 0}, ["steps", "at least 1"]),
        ({"optimizer.learning_rate": float("nan")}, ["optimizer.learning_rate", "finite"]),
        ({"encoding.digits": 2}, ["largest position possible is 99", "encoding.digits=4"]),
        ({"data.length": 8192}, ["largest position possible is 4999", "encoding.max_position"]),
        ({"eval.lengths": (64, 6000)}, ["eval.lengths 6000", "largest position possible is 4999"]),
        ({"model.heads": 5}, ["model.width=96", "model.heads=5"]),
        ({"optimizer.accumulate": 3}, ["batch_size=16", "optimizer.accumulate=3"]),
        ({"objective.shift.sets": 3}, ["objective.shift.sets=3"]),
        ({"objective.contrastive.mixture": (0.5, 0.4)}, ["objective.contrastive.mixture", "three"]),
        ({"objective.contrastive.candidates": 5000}, ["objective.contrastive.candidates=5000"]),
        ({"encoding.mode": "attn_mul"}, ["objective.contrastive.space", "attn_scalar"]),
        ({"objective.distillation.offsets": 65}, ["objective.distillation.offsets=65", "64 positions"]),
        ({"objective.skip.rate": 0.5, "objective.skip.range": 10}, ["objective.skip.range=10", "64"]),
        ({"objective.shift.rate": 0.7, "objective.skip.rate": 0.7}, ["at most 1"]),
        ({"optimizer.warmup_steps": 10**6}, ["optimizer.warmup_steps"]),
        ({"data.name": "text_files"}, ["data.paths"]),
        ({"profile.steps": "13-10"}, ["profile.steps", "first:end"]),
        ({"profile.steps": "10:13", "steps": 12, "optimizer.warmup_steps": 0}, ["profile.steps='10:13'", "steps=12"]),
    ],
)
def test_a_wrong_value_is_named(overrides, words):
    with pytest.raises(InputError) as caught:
        config.load(QUICKSTART, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_an_unknown_variant_suggests_the_nearest():
    with pytest.raises(InputError, match="'rotory'.*'rotary'"):
        config.load(QUICKSTART + ":rotory")


def test_terms_without_vectors_are_refused():
    with pytest.raises(InputError, match="no vectors"):
        config.load(QUICKSTART + ":rotary", {"objective.contrastive.weight": 0.1})


def test_a_missing_config_file_is_named():
    with pytest.raises(InputError, match="no config file at configs/nothing.py"):
        config.load("configs/nothing.py")
