"""Every wrong field gets one clear line that names it and says how to fix it."""

import copy
import dataclasses
import functools
import json
import os
import re
import typing

import ml_collections
import pytest

from seqpe_jax import config
from seqpe_jax.config import ENCODINGS, kinds_for, kinds_with
from seqpe_jax.config.io import execute_file
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import RunDir
from seqpe_jax.trees import flatten_dict, unflatten_dict
from tests.tiny import ROOT, tiny_config

QUICKSTART = str(ROOT / "configs" / "stdlib_lm.py")
JITTER = {"objective.jitter.rate": 0.5, "objective.jitter.range": 1.0}
MULTIPLIED = {"encoding.mode": "attn_mul", "encoding.feature_width": 0, "objective.contrastive.space": "vectors"}


def test_a_config_survives_json():
    settings = config.load(QUICKSTART)
    assert config.from_dict(json.loads(json.dumps(config.to_dict(settings)))) == settings


@pytest.mark.parametrize(
    "page, overrides, evaluated",
    [
        ("digits_vit", {"data.size": (32, 32), "encoding.max_position": 40}, {"sizes": (32,)}),
        ("digits_vit", {"data.size": (16, 16), "model.patch": (4, 4)}, {"sizes": (16, 24, 32)}),
        ("digits_vit", {"data.size": (16, 8), "encoding.max_position": 40}, {"sizes": ()}),
        ("digits_vit", {"data.size": (16, 16), "eval.sizes": (8, 16)}, {"sizes": (8, 16)}),
        ("digits_vit", {"model.layers": 2}, {"sizes": (8, 12, 16, 24, 32)}),
        ("moving_digits_vit", {"data.size": (6, 16, 16)}, {"sizes": (16, 24, 32), "frames": (6, 8)}),
        ("stdlib_lm", {"data.length": 512}, {"lengths": (512, 1024)}),
        ("stdlib_lm", {"data.length": 2048}, {"lengths": (2048,)}),
    ],
)
def test_evaluation_starts_at_an_overridden_training_size(page, overrides, evaluated):
    settings = config.load(str(ROOT / "configs" / f"{page}.py"), overrides)
    assert {name: getattr(settings.eval, name) for name in evaluated} == evaluated
    parsed = config.parse(ml_collections.ConfigDict(config.to_dict(settings)), overrides)
    assert parsed == settings, "as a command line sets it"


def test_fields_computed_from_the_batch_size_follow_it():
    page = str(ROOT / "configs" / "imagenet_vit.py")
    whole, part = config.load(page), config.load(page, {"batch_size": 256, "eval.every": 50_044})
    assert (whole.steps, whole.optimizer.learning_rate, whole.optimizer.warmup_steps) == (500_455, 0.0012, 25_022)
    assert (part.steps, part.optimizer.learning_rate, part.optimizer.warmup_steps) == (2_001_823, 0.0003, 100_091)
    assert (part.checkpoint.every, part.eval.every) == (25_022, 50_044)
    with pytest.raises(InputError, match="computes from others, such as steps from batch_size, has no value"):
        config.load(page, {"batch_size": 0})
    with pytest.raises(InputError, match="'batch_size' must be int, got 'x'"):
        config.load(page, {"batch_size": "x"})


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
        ({"model.dropout": 1.5}, ["model.dropout", "below 1"]),
        ({"steps": 0}, ["steps", "at least 1"]),
        ({"steps": 10**20}, ["steps", "at most 1000000000"]),
        ({"seed": 2**70}, ["seed", "at most 9223372036854775807"]),
        ({"seed": 10**5000}, ["seed", "a number of thousands of digits"]),
        ({"batch_size": 10**12}, ["batch_size", "at most 1048576", "1000000000000"]),
        ({"objective.contrastive.batch": 10**11}, ["objective.contrastive.batch", "at most 1048576"]),
        (
            {"objective.contrastive.batch": 2**20, "objective.contrastive.candidates": 4000},
            ["objective.contrastive.batch and candidates", "at most 268435456"],
        ),
        ({"data.threads": 100_000}, ["data.threads", "at most 256"]),
        ({"encoding.digits": 1000}, ["encoding.digits", "at most 64"]),
        ({"model.width": 10**9}, ["model.width", "at most 65536"]),
        ({"encoding.max_position": 2**31}, ["encoding.max_position", "at most 1073741824"]),
        ({"model.dropout": 1.0}, ["model.dropout", "below 1", "1.0"]),
        ({"optimizer.b1": 1}, ["optimizer.b1", "below 1"]),
        ({"optimizer.b2": 1.0}, ["optimizer.b2", "below 1"]),
        ({"optimizer.learning_rate": 0}, ["optimizer.learning_rate", "at least 1e-12"]),
        ({"optimizer.learning_rate": 1e300}, ["optimizer.learning_rate", "at most 100"]),
        ({"optimizer.learning_rate": 10**400}, ["optimizer.learning_rate", "finite"]),
        ({"optimizer.clip": 1e-300}, ["optimizer.clip", "0, or at least 1e-06"]),
        ({"objective.contrastive.scale": 1e-300}, ["objective.contrastive.scale", "as float32 holds it"]),
        ({"model.layer_norm_epsilon": 1e30}, ["model.layer_norm_epsilon", "at most 0.1"]),
        ({"eval.lengths": (64, 0)}, ["eval.lengths", "at least 1"]),
        ({"data.length": 4096, "batch_size": 2**17, "optimizer.accumulate": 1}, ["batch_size=131072 and data.length"]),
        ({"optimizer.schedule": "constant", "optimizer.end_learning_rate": 0.1}, ["optimizer.end_learning_rate=0.1"]),
        ({"profile.steps": "1:\u00b2"}, ["profile.steps", "first:end"]),
        ({"optimizer.learning_rate": float("nan")}, ["optimizer.learning_rate", "finite"]),
        ({"encoding.digits": 2}, ["largest position possible is 99", "encoding.digits=4"]),
        ({"data.length": 8192}, ["largest position possible is 4999", "encoding.max_position"]),
        ({"eval.lengths": (64, 12000)}, ["eval.lengths 12000", "largest position possible is 9999", "4 digits"]),
        ({"eval.contexts": (64, 1)}, ["eval.contexts", "at least 2"]),
        ({"eval.contexts": (64, 12000)}, ["eval.contexts (--contexts) 12000", "largest position possible is 9999"]),
        ({"eval.contexts": (64, 64)}, ["eval.contexts (--contexts) names 64 more than once"]),
        ({"eval.contexts": (64, 32), "eval.stride": 32}, ["eval.stride=32", "less than the smallest", "32"]),
        ({"eval.contexts": (64,), "eval.targets": 31}, ["eval.targets=31", "less than the 32 targets of one window"]),
        ({"model.heads": 5}, ["model.width=96", "model.heads=5"]),
        ({"model.kv_heads": 3}, ["model.kv_heads=3", "model.heads=4"]),
        ({"model.heads": 12, "model.kv_heads": 6, "mesh.tensor": 4}, ["model.kv_heads=6", "mesh.tensor=4"]),
        ({"model.window": 8, "model.window_layers": (1, 0, 1, 0)}, ["model.window_layers has 4", "model.layers=3"]),
        ({"model.window": 8, "model.window_layers": (2,)}, ["model.window_layers", "at most 1"]),
        ({"model.kind": "llama3"}, ["model.kind", "'llama'"]),
        ({"model.kind": "vit"}, ["model.kind='vit'", "llama"]),
        ({"model.kernel_block_k": 500}, ["model.kernel_block_k=500", "multiple of 128"]),
        ({"model.kernel_block_q_backward": 512}, ["needs model.kernel_block_q:"]),
        (
            {"model.kernel_block_q": 512, "model.kernel_block_q_backward": 768},
            ["model.kernel_block_q_backward=768", "the larger must be a multiple"],
        ),
        ({"optimizer.accumulate": 3}, ["batch_size=16", "optimizer.accumulate=3"]),
        ({"objective.shift.sets": 3}, ["objective.shift.sets=3"]),
        ({"optimizer.decay_steps": 5}, ["optimizer.decay_steps=5", "only by wsd"]),
        ({"optimizer.schedule": "wsd", "optimizer.decay_steps": 1500}, ["optimizer.decay_steps=1500", "steps=1500"]),
        (JITTER | {"objective.shift.sets": 3, "objective.shift.rate": 0.0}, ["objective.shift.sets=3"]),
        (
            {"objective.contrastive.head_scales": (1.0, 2.0)},
            ["objective.contrastive.head_scales=(1.0, 2.0)", "4 heads"],
        ),
        (
            {"objective.contrastive.head_scales": (1.0,) * 4, "objective.contrastive.space": "vectors"},
            ["objective.contrastive.head_scales", "objective.contrastive.space='logits'"],
        ),
        (
            {"objective.contrastive.head_scales": (1.0, 1.0, 1.0, -4.0), "objective.contrastive.space": "logits"},
            ["head_scales=(1.0, 1.0, 1.0, -4.0)", "0 or more"],
        ),
        ({"encoding.fraction_digits": 6}, ["encoding.fraction_digits=6", "encoding.max_position=5000", "lower one"]),
        ({"encoding.resize": "interpolate", "eval.lengths": (65,)}, ["eval.lengths 65", "encoding.fraction_digits=0"]),
        (
            {"encoding.resize": "interpolate", "encoding.fraction_digits": 1, "data.length": 8192, "eval.lengths": ()},
            ["data.length 8192", "largest position possible is 4999"],
        ),
        ({"encoding.fraction_digits": 1, "encoding.padding": "right"}, ["encoding.padding='right'"]),
        ({"objective.zoom.rate": 0.5}, ["objective.zoom", "on images"]),
        ({"objective.jitter.rate": 0.5}, ["objective.jitter.range=0.0", "set both"]),
        ({"objective.jitter.rate": 0.5, "objective.jitter.range": 0.4}, ["objective.jitter.range=0.4", "1/1"]),
        (MULTIPLIED | {"encoding.log_scaling": True}, ["encoding.log_scaling", "attn_mul"]),
        ({"objective.contrastive.mixture": (0.5, 0.4)}, ["objective.contrastive.mixture", "three"]),
        ({"objective.contrastive.candidates": 5000}, ["objective.contrastive.candidates=5000"]),
        (
            {"encoding.mode": "attn_mul", "objective.contrastive.space": "logits"},
            ["objective.contrastive.space", "attn_scalar"],
        ),
        ({"objective.distillation.offsets": 65}, ["objective.distillation.offsets=65", "64 positions"]),
        ({"objective.skip.rate": 0.5, "objective.skip.range": 10}, ["objective.skip.range=10", "64"]),
        ({"objective.shift.rate": 0.7, "objective.skip.rate": 0.7}, ["at most 1"]),
        ({"objective.shift.carries": 0.5, "objective.shift.starts": 9}, ["objective.shift.starts=9", "one of the two"]),
        (
            {"objective.shift.carries": 0.5, "encoding.base": 36, "encoding.max_position": 36, "data.length": 36}
            | {"eval.lengths": (), "objective.contrastive.candidates": 8, "objective.distillation.weight": 0.0},
            ["encoding.base=36 is larger than a window of 36", "objective.shift.carries to 0"],
        ),
        ({"optimizer.warmup_steps": 10**6}, ["optimizer.warmup_steps"]),
        ({"data.name": "text_files"}, ["data.paths"]),
        (
            {"checkpoint.every": 10, "checkpoint.keep_every": 25},
            ["keep_every=25 is not a multiple", "checkpoint.every=10"],
        ),
        ({"optimizer.skips": 3}, ["optimizer.skips=3 is read by optimizer.non_finite='skip' alone"]),
        ({"profile.steps": "13-10"}, ["profile.steps", "first:end"]),
        ({"report.watchdog": 0.5}, ["report.watchdog", "0, or at least 1"]),
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


def test_losses_without_vectors_are_refused():
    with pytest.raises(InputError, match="no vectors"):
        config.load(QUICKSTART + ":rotary", {"objective.contrastive.weight": 0.1})


def test_files_of_the_package_are_found_outside_a_clone(tmp_path, monkeypatch):
    """A file of the current folder comes first."""
    monkeypatch.chdir(tmp_path)
    assert config.load("configs/stdlib_lm.py:rotary").encoding.kind == "rotary"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stdlib_lm.py").write_text("get_config = 3")
    with pytest.raises(InputError, match="lacks get_config"):
        config.load("configs/stdlib_lm.py:rotary")


def test_a_missing_config_file_is_named():
    with pytest.raises(InputError, match="no config file at configs/nothing.py"):
        config.load("configs/nothing.py")


def test_an_edit_of_the_same_size_within_the_same_second_is_seen(tmp_path, monkeypatch):
    """As a script makes it that writes one file after the other; Python's own bytecode would hide it."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    page, when = tmp_path / "page.py", 1_700_000_000
    for steps in (1000, 2000):
        page.write_text(f"steps = {steps}\n")
        os.utime(page, (when, when))
        assert execute_file(str(page), "config file").steps == steps


QUESTIONS = str(ROOT / "configs" / "stdlib_qa.py")
DIGITS = str(ROOT / "configs" / "digits_vit.py")
KINDS = list(ENCODINGS)


@pytest.mark.parametrize(
    "overrides,words",
    [
        ({"data.size": (208, 8), "encoding.max_position": 20}, ["data.size 208x8", "largest position possible is 19"]),
        ({"batch_size": 12, "objective.shift.rate": 0.0}, ["12 examples", "objective.shift.sets=8"]),
        ({"encoding.max_position": 4000}, ["encoding.max_position=4000", "on 2 axes"]),
    ],
)
def test_a_wrong_value_of_images_is_named(overrides, words):
    """Under encoding.resize='interpolate', with zoomed steps alone."""
    assert config.load(DIGITS).objective.zoom.rate and config.load(DIGITS).encoding.resize == "interpolate"
    with pytest.raises(InputError) as caught:
        config.load(DIGITS, overrides)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def other_value(kind: str, name: str, default):
    """A value of a field of an encoding that is not its default."""
    hint = typing.get_type_hints(ENCODINGS[kind])[name]
    if typing.get_origin(hint) is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != default)
    if isinstance(default, tuple):
        return (1,)
    return not default if hint is bool else default + 1 if hint is int else default / 2 or 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_of_other_encodings_is_refused_by_the_kinds_that_have_it(kind):
    page = QUICKSTART if kind in kinds_for(1) else DIGITS
    plain = dataclasses.replace(config.load(page + ":none"), encoding=ENCODINGS[kind]())
    values, refused = config.to_dict(plain), set()
    for name, default in config.defaults().encoding.items():
        if ENCODINGS[kind].has(name):
            continue
        given = copy.deepcopy(values)
        given["encoding"][name] = default
        assert config.from_user_values(given) == config.from_dict(values), "as config files hold it"
        overrides = [f"encoding.{name}"]
        for value, by_hand in ((default, overrides), (other_value(kinds_with(name)[0], name, default), ())):
            given["encoding"][name] = value
            readers = [functools.partial(config.from_user_values, given, by_hand)]
            readers += [] if by_hand else [functools.partial(config.from_dict, given)]
            for read in readers:
                with pytest.raises(InputError) as caught:
                    read()
                message = str(caught.value)
                assert message.startswith(f"encoding.{name}=") and f"encoding.kind='{kind}'" in message
                assert message.split("only by ")[1] == f"{', '.join(kinds_with(name))}: leave it out"
        with pytest.raises(TypeError):
            ENCODINGS[kind](**{name: default})
        refused.add(name)
    assert len(refused) >= (3 if kind == "seqpe" else 18)


SWITCHES = [  # settings under which a field is not read; the settings under which it is; the field and a value
    ({"objective.contrastive.weight": 0.0}, {}, "objective.contrastive.batch", 8),
    ({"objective.contrastive.mixture": (1.0, 0.0, 0.0)}, {}, "objective.contrastive.window", 64),
    ({"objective.contrastive.mixture": (1.0, 0.0, 0.0)}, {}, "objective.contrastive.hard_fraction", 0.5),
    ({"objective.contrastive.space": "logits"}, {}, "objective.contrastive.per_head", True),
    ({"objective.distillation.weight": 0.0}, {}, "objective.distillation.offsets", 8),
    ({"objective.shift.rate": 0.0}, {"objective.shift.rate": 0.5}, "objective.shift.sets", 2),
    (
        {"objective.shift.rate": 0.0, "objective.skip.rate": 0.5},
        {"objective.shift.rate": 0.5},
        "objective.shift.starts",
        2,
    ),
    ({"objective.shift.rate": 0.0}, {"objective.shift.rate": 0.5}, "objective.shift.carries", 0.5),
    ({}, {"objective.skip.rate": 0.5}, "objective.skip.chunks", 3),
    ({}, {"model.window": 8}, "model.window_layers", (1, 0)),
    ({"model.kind": "llama"}, {}, "model.activation", "relu"),
    ({"model.attention_kind": "reference"}, {}, "model.attention_block", 64),
    ({"model.attention_kind": "blockwise"}, {}, "model.kernel_block_q", 512),
    ({}, {"mesh.context": 2}, "mesh.context_attention", "ring"),
    ({}, {"encoding.rotary_pairs": 4}, "objective.shift.rate", 0.5),
    ({}, {"optimizer.non_finite": "skip"}, "optimizer.skips", 10),
    ({}, {"eval.contexts": (64, 128)}, "eval.stride", 16),
    ({}, {"eval.contexts": (64, 128)}, "eval.targets", 64),
    ({}, {"profile.steps": "1:3"}, "profile.processes", (1,)),
]


def test_factors_of_a_config_file_are_left_out_with_other_vectors():
    """Its factors are refused where no logits are compared, so () has to be an option there."""
    page, factors = str(ROOT / "configs" / "stdlib_qa.py"), "objective.contrastive.head_scales"
    vectors = {"objective.contrastive.space": "vectors"}
    with pytest.raises(InputError, match=f"{factors}=.*, or \\(\\)"):
        config.load(page, vectors)
    config.check_overrides_used(config.load(page, vectors | {factors: ()}), [factors])


@pytest.mark.parametrize("off, on, field, value", SWITCHES)
def test_an_option_of_a_part_that_is_off_is_refused(off, on, field, value):
    page = QUICKSTART + (":none" if field == "objective.shift.rate" else "")
    config.check_overrides_used(config.load(page, on | {field: value}), [field])
    settings = config.load(page, off | {field: value})  # a config file may set it beforehand
    with pytest.raises(InputError, match=f"{field} is not read here, it needs .*: set that too, or leave {field} out"):
        config.check_overrides_used(settings, [field])


def test_a_field_of_a_loss_on_vectors_needs_vectors_before_a_weight():
    """Its weight, which the field needs too, is refused by an encoding without vectors."""
    field = "objective.contrastive.space"
    settings = config.load(str(ROOT / "configs" / "stdlib_qa.py") + ":alibi", {field: "vectors"})
    with pytest.raises(InputError, match=f"{field} is not read here, it needs encoding.kind='seqpe'"):
        config.check_overrides_used(settings, [field])


def test_fields_of_losses_and_pairs_that_are_off_are_refused():
    with pytest.raises(InputError, match="yarn_beta_slow=2.0 is not read without encoding.scaling='yarn'"):
        config.load(QUICKSTART + ":rotary", {"encoding.yarn_beta_slow": 2.0})
    with pytest.raises(InputError, match="yarn_beta_fast=2.0 must be more than encoding.yarn_beta_slow=3.0, or 0"):
        config.load(
            QUICKSTART + ":rotary",
            {"encoding.scaling": "yarn", "encoding.yarn_beta_fast": 2.0, "encoding.yarn_beta_slow": 3.0},
        )
    with pytest.raises(InputError, match="contrastive.batch=9 is not read by encoding.kind='rotary', only by seqpe"):
        config.load(QUICKSTART + ":rotary", {"objective.contrastive.batch": 9})
    for field, value in (("theta", 100.0), ("rotary_heads", 2)):
        with pytest.raises(
            InputError, match=f"encoding.{field}={value} is read by .* with encoding.rotary_pairs alone"
        ):
            config.load(QUICKSTART, {"encoding.rotary_pairs": 0, f"encoding.{field}": value})


@pytest.mark.parametrize("name, gate", [("fox", "forget"), ("cable", "cable")])
def test_published_names_of_gated_encodings_mean_their_fields(name, gate):
    """In a run's config.json, in overrides, and as the variant; parts of a config are read too."""
    today = config.load(f"{QUICKSTART}:{name}", {"encoding.gate_bias_init": 4.0})
    assert (today.encoding.kind, today.encoding.gate, today.encoding.name) == ("none", gate, name)
    values = json.loads(json.dumps(config.to_dict(today)))
    del values["encoding"]["gate"], values["encoding"]["gate_bias_init"]
    values["encoding"] |= {"kind": name, "gate_bias": 4.0}
    before = copy.deepcopy(values)
    assert config.from_dict(values) == today and values == before
    assert config.load(f"{QUICKSTART}:none", {"encoding.kind": name, "encoding.gate_bias_init": 4.0}) == today
    assert config.apply_renames({"seed": 1, "encoding": {"kind": name}})["encoding"] == {"kind": "none", "gate": gate}
    with pytest.raises(InputError, match="'encoding.gate_bias' is called 'encoding.gate_bias_init' now, and both"):
        config.from_dict(values | {"encoding": values["encoding"] | {"gate_bias_init": 1.0}})
    other = {"forget": "cable", "cable": "forget"}[gate]
    with pytest.raises(InputError, match=f"'{name}' means encoding.gate='{gate}', but encoding.gate='{other}' is set"):
        config.from_dict(values | {"encoding": values["encoding"] | {"gate": other}})
    with pytest.raises(InputError, match="field 'encoding.gate_bias': it is called 'encoding.gate_bias_init' now"):
        config.load(f"{QUICKSTART}:{name}", {"encoding.gate_bias": 4.0})


OLDER = [  # field of today, its name and a value in older versions, the value today
    ("encoding.resize", "encoding.resize", "stretch", "interpolate"),
    ("encoding.digit_index", "encoding.place", "coordinate", "per_axis"),
    ("model.attention_kind", "model.attention_kind", "blocks", "blockwise"),
    ("compat.flatten", "encoding.flatten", False, False),
    ("compat.reference_scramble", "encoding.reference_scramble", False, False),
    ("objective.contrastive.around_anchor", "objective.contrastive.around_pivot", False, False),
    ("objective.contrastive.causal_only", "objective.contrastive.past_only", False, False),
]


@pytest.mark.parametrize("field, old, value, today", OLDER)
def test_old_names_open_in_stored_configs_and_are_refused_in_new_ones(field, old, value, today, tmp_path):
    settings = config.to_dict(config.load(QUICKSTART, {"encoding.fraction_digits": 2, field: today}))
    stored = flatten_dict(json.loads(json.dumps(settings)), ".")
    del stored[field]
    assert config.to_dict(config.from_dict(unflatten_dict(stored | {old: value}, "."))) == settings
    page, wanted = (
        tmp_path / "page.py",
        f"'{field}' now" if old != field else f"'{field}': the value '{value}' is called",
    )
    page.write_text(
        f"from seqpe_jax.config import defaults\n\n\ndef get_config():\n    c = defaults()\n    c.{old} = {value!r}\n    return c\n"
    )
    for refused in (lambda: config.load(str(page)), lambda: config.load(QUICKSTART, {old: value})):
        with pytest.raises(InputError, match=re.escape(wanted)):
            refused()


def test_an_encoding_is_named_by_its_kind_and_its_gate():
    names = [config.encoding_name(*pair) for pair in (("none", "none"), ("none", "forget"), ("alibi", "cable"))]
    assert names == ["none", "fox", "alibi+cable"]


@pytest.mark.parametrize("path, axes", [(QUICKSTART, 1), (DIGITS, 2)], ids=["text", "images"])
def test_every_encoding_replaces_another(path, axes):
    """As `benchmark --compare` does: fields that the new encoding lacks are at their defaults."""
    for kind in kinds_for(axes):
        values = config.defaults()
        values.update(config.to_dict(config.load(path, JITTER)))
        found = config.parse(config.with_encoding(values, kind))
        assert found.encoding.kind == kind and found == config.reset_unused(found)
        assert (found.objective.jitter.rate > 0) == found.encoding.real_positions_on(axes)


def test_the_config_of_an_older_run_is_read():
    """Its file lacks what was added since, and holds values that nothing reads."""
    today = config.load(QUICKSTART + ":rotary")
    values = json.loads(json.dumps(config.to_dict(today)))
    values["encoding"] = json.loads(config.defaults().encoding.to_json()) | values["encoding"]
    for name in (
        "encoding.fraction_digits",
        "encoding.resize",
        "encoding.position_heads",
        "encoding.rotary_pairs",
        "encoding.rotary_heads",
        "encoding.feature_width",
        "encoding.log_scaling",
        "objective.jitter",
        "objective.zoom",
    ):
        section, field = name.split(".")
        del values[section][field]
    values["encoding"] |= {"width": 96, "heads": 4, "qk": "multi"}
    values["objective"]["contrastive"] |= {"batch": 8, "window": 512}
    old = config.from_dict(values)
    assert old.objective.contrastive.batch == 8 and config.reset_unused(old) == today


FORMER = {
    "t5": {"t5_buckets": 32, "t5_max_distance": 128},
    "fire": {"fire_threshold": 512.0, "fire_scale": 0.1},
    "kerple": {"kerple_scale": 1.0},
    "scale_invariant": {"scale_invariant_tau": 10.0, "rotary_pairs": 6},
    "rotary": {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0},
    "alibi": {"slope_scale": 1.0},
    "lookhere": {"directed_heads": 4, "slope_scale": 1.0, "undirected_slopes": "spread"},
}


@pytest.mark.parametrize("kind", FORMER)
def test_older_runs_without_lengths_of_their_encoding_have_those_they_were_trained_with(kind):
    page = QUICKSTART if kind in kinds_for(1) else DIGITS
    values = json.loads(json.dumps(config.to_dict(config.load(f"{page}:{kind}"))))
    if kind == "rotary":
        values["encoding"]["scaling"] = "yarn"
    values["encoding"] |= {name: 0 for name in FORMER[kind] if name.startswith("fire_")}  # which the page sets
    now = config.with_resolved_lengths(config.from_dict(values)).encoding
    for name in FORMER[kind].keys() - {"rotary_pairs"}:
        del values["encoding"][name]
    found = config.from_dict(values)
    assert {name: getattr(found.encoding, name) for name in FORMER[kind]} == FORMER[kind]
    resolved = config.with_resolved_lengths(found).encoding
    assert FORMER[kind].items() <= dataclasses.asdict(resolved).items()
    assert kind in ("alibi", "kerple") or now != resolved, "a config of today has its own"


def test_runs_from_before_the_authors_slopes_keep_two_thirds_of_the_heads():
    values = config.to_dict(config.load(f"{DIGITS}:lookhere", {"model.heads": 8}))
    assert config.with_resolved_lengths(config.from_dict(values)).encoding.directed_heads == 4
    del values["encoding"]["undirected_slopes"]
    found = config.from_dict(values).encoding
    assert (found.directed_heads, found.undirected_slopes) == (5, "spread")


@pytest.mark.parametrize(
    "page, field, value, kinds",
    [
        (QUICKSTART, "model.drop_path", 0.1, "images"),
        (QUICKSTART, "model.patch", (2, 2), "images"),
        (QUICKSTART, "model.classes", 3, "images"),
        (QUICKSTART, "data.size", (8, 8), "images"),
        (QUICKSTART, "data.augment.flip", 0.5, "images"),
        (QUICKSTART, "objective.label_smoothing", 0.1, "images"),
        (QUICKSTART, "objective.mixing.mixup", 0.1, "images"),
        (QUICKSTART, "eval.sizes", (8,), "images"),
        (QUICKSTART, "eval.examples", 9, "questions and sequences"),
        (DIGITS, "data.length", 64, "text, questions and sequences"),
        (DIGITS, "data.tokenizer", "words.json", "text and questions"),
        (DIGITS, "data.prompt_weight", 0.1, "questions"),
        (DIGITS, "model.vocabulary", 300, "text, questions and sequences"),
        (DIGITS, "eval.lengths", (64,), "text, questions and sequences"),
        (DIGITS, "eval.tokens", 64, "text and questions"),
        (DIGITS, "model.window", 8, "text, questions and sequences"),
        (DIGITS, "model.logit_cap", 30.0, "text, questions and sequences"),
        (DIGITS, "eval.contexts", (64,), "text"),
        (QUESTIONS, "eval.contexts", (64,), "text"),
        (QUESTIONS, "data.prepared", "prepared/text", "text and images"),
        (QUICKSTART, "data.workers", 2, "images"),
    ],
)
def test_a_field_of_other_data_is_refused_by_those_that_read_it(page, field, value, kinds):
    """A run that was stored with one opens all the same, and counts as one without it."""
    with pytest.raises(
        InputError, match=f"{field}=.* is not read by runs on .*, only by those on {kinds}: leave it at"
    ) as caught:
        config.load(page, {field: value})
    assert "\n" not in str(caught.value)
    plain = config.load(page)
    values = config.to_dict(plain)
    *sections, last = field.split(".")
    functools.reduce(dict.__getitem__, sections, values)[last] = value
    assert config.reset_unused(config.from_dict(values)) == config.reset_unused(plain)


def test_an_older_run_opens_with_numbers_that_no_new_one_may_have():
    values = config.to_dict(config.load(QUICKSTART))
    values["optimizer"] |= {"learning_rate": 0.0, "epsilon": 0.0}
    values["model"]["layer_norm_epsilon"] = values["encoding"]["layer_norm_epsilon"] = 0.0
    assert config.from_dict(values).optimizer.learning_rate == 0
    with pytest.raises(InputError, match="'model.layer_norm_epsilon' must be at least 1e-12"):
        config.from_user_values(values)


def _numbers(section, prefix=""):
    """Dotted name -> field, of those that are numbers or lists of numbers."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from _numbers(hint, name + ".")
        elif hint in (int, float) or typing.get_args(hint)[:1] in ((int,), (float,)):
            yield name, field


def test_every_number_has_an_upper_limit_that_its_message_names():
    fields = dict(_numbers(config.Config))
    assert len(fields) > 90
    for name, field in fields.items():
        ends = {field.metadata.get("high"), field.metadata.get("below")} - {None}
        assert ends, f"{name} may be as large as anybody likes"
        over = 2 * max(ends) + 1
        values = config.to_dict(config.Config())
        *sections, last = name.split(".")
        target = functools.reduce(dict.__getitem__, sections, values)
        target[last] = (over,) if isinstance(target[last], tuple) else type(target[last])(over)
        with pytest.raises(InputError, match=f"'{name}' must be .*(at most|below)"):
            config.from_dict(values)


def test_the_folder_of_a_model_is_a_config(tmp_path):
    """Options follow it, another encoding drops the fields of the one before, and no size is typed again."""
    folder = tmp_path / "run"
    stored = tiny_config(variant="rotary", encoding__theta=500.0, mesh__fsdp=2, eval__lengths=(16,))
    RunDir(folder).write_config(config.to_dict(stored))
    assert config.load(str(folder)) == dataclasses.replace(stored, mesh=config.MeshConfig())
    assert config.load(str(folder), {"steps": 9}).steps == 9
    alibi = config.load(f"{folder}:alibi", {"encoding.slope_scale": 2.0})
    assert (alibi.encoding.kind, alibi.encoding.slope_scale, alibi.model) == ("alibi", 2.0, stored.model)
    assert config.load(str(folder), {"encoding.kind": "alibi", "encoding.slope_scale": 2.0}) == alibi
    pairs = {"encoding.rotary_pairs": 6, "objective.distillation.offsets": 8}
    seqpe = config.load(f"{folder}:seqpe", pairs)
    assert (seqpe.encoding.theta, seqpe.encoding.rotary_pairs) == (500.0, 6)
    assert seqpe.objective.contrastive.weight == config.ContrastiveConfig.weight > 0
    assert config.load(str(folder), pairs | {"encoding.kind": "seqpe"}) == seqpe
    joined = config.load(f"{folder}:seqpe+rotary", {"objective.distillation.offsets": 8})
    assert (joined.encoding.theta, joined.encoding.rotary_pairs) == (500.0, 6), "all pairs of a head of 12 columns"
    with pytest.raises(InputError, match="'pope' is no encoding that allows RoPE next to it: choose one of seqpe, "):
        config.load(f"{folder}:pope+rotary")
    RunDir(folder).write_config(config.to_dict(tiny_config(variant="t5")))
    with pytest.raises(InputError, match="the model's encoding.kind is 't5', and it has no RoPE that could stay"):
        config.load(f"{folder}:seqpe+rotary")
    assert config.load(str(folder)).encoding.t5_max_distance == 0
    assert config.load(str(folder), {"data.length": 64}).encoding.t5_max_distance == 16
    with pytest.raises(InputError, match="unknown config variant 'alibo'"):
        config.load(f"{folder}:alibo")
    with pytest.raises(InputError, match="no config file at"):
        config.load(str(tmp_path / "nothing"))
