"""Checkpoints of others -> runs, and back: bit for bit, and nothing half-written."""

import dataclasses
import functools
import pathlib
import pickle
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from seqpe_jax import config, loading
from seqpe_jax.errors import InputError
from seqpe_jax.interop import convert, load_reference
from seqpe_jax.interop.torch_config import spec_from_config
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.trainer import Trainer
from tests.inference import test_export as test_serving
from tests.tiny import random_state, tiny_config, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

WORDS = "the digits of a position become a vector and the vector enters attention\n" * 60


def tokenizer_file(path: pathlib.Path, size: int = 40) -> pathlib.Path:
    """A tokenizer of single characters with that many tokens."""
    import tokenizers

    vocabulary = {"<|endoftext|>": 0, "[UNK]": 1} | {chr(97 + n) if n < 26 else f"t{n}": n + 2 for n in range(size - 2)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.save(str(path))
    return path


def saved_run(folder: pathlib.Path, settings: config.Config) -> pathlib.Path:
    """A run of a config at step 0."""
    parts = Trainer.of(settings, jax.devices()[:1])
    RunDir(folder).write_config(config.to_dict(settings))
    parts.task.save_assets(folder)
    checkpoints = Checkpointer(folder)
    checkpoints.save(0, random_state(parts, 0.1), {})
    checkpoints.close()
    return folder


def same(first, second) -> bool:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("variant", ["seqpe", "multi", "learned", "sinusoidal", "rotary", "alibi", "none"])
def test_text_round_trip(tmp_path, variant):
    changes = {
        "multi": {"encoding__qk": "multi"},
        "alibi": {"compat__reference_scaling": True},
        "sinusoidal": {"encoding__amplitude": 1.0},
    }.get(variant, {})
    kind = "seqpe" if variant == "multi" else variant
    changes = {"data__tokenizer": str(tokenizer_file(tmp_path / "t.json"))} | changes
    run = saved_run(tmp_path / "ours", tiny_config(variant=kind, **changes))
    convert.convert_to_reference(str(run), str(tmp_path / "theirs"))
    written = tmp_path / "theirs" / "best_model" / "model.safetensors"
    (tmp_path / "usual").write_text("")
    assert written.stat().st_mode == (tmp_path / "usual").stat().st_mode  # not for its owner alone
    report = convert.convert_to_run(str(tmp_path / "theirs"), str(tmp_path / "again"))
    first, second = load_reference(str(run)), load_reference(str(tmp_path / "again"))
    assert same(first.params, second.params)
    assert report["parameters"] == sum(np.size(leaf) for leaf in jax.tree.leaves(first.params))
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert (tmp_path / "theirs" / "tokenizer_config.json").read_text() == '{"eos_token": "<|endoftext|>"}'
    tokens = np.arange(24)[None] % 40
    np.testing.assert_array_equal(first.logits(tokens), second.logits(tokens))
    expected = {"sinusoidal", "rotary", "alibi", "seqpe"}
    assert (tmp_path / "theirs" / "best_model" / "model_1.safetensors").is_file() == (kind in expected)


WHOLE = {
    "encoding.fraction_digits": 0,
    "encoding.resize": "extrapolate",
    "objective.zoom.rate": 0.0,
}  # as the reference knows
FIELDS = {
    "seqpe_paper": {"encoding.width": 24, "encoding.heads": 2, "objective.distillation.offsets": 4},
    "rotary_mixed": {"compat.reference_scramble": True, **WHOLE},
    "learned": {},
}


@pytest.mark.parametrize("kind", FIELDS)
def test_image_round_trip(tmp_path, kind):
    for split in ("train", "validation"):
        for label in ("one", "two"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (number * 60, 90, 20)).save(folder / f"{number}.png")
    settings = config.load(
        "configs/digits_vit.py:" + kind,
        {
            "data.name": "image_folder",
            "data.paths": (str(tmp_path / "images"),),
            "data.size": (16, 16),
            "model.patch": (4, 4),
            "model.layers": 2,
            "model.width": 24,
            "model.heads": 2,
            "eval.sizes": (),
            "model.activation": "gelu",
            "model.layer_norm_epsilon": 1e-6,
            **FIELDS[kind],
        },
    )
    run = saved_run(tmp_path / "ours", settings)
    convert.convert_to_reference(str(run), str(tmp_path / "theirs"))
    convert.convert_to_run(str(tmp_path / "theirs"), str(tmp_path / "again"))
    first, second = load_reference(str(run)), load_reference(str(tmp_path / "again"))
    assert same(first.params, second.params)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(first.logits(images), second.logits(images))


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_run_of_ours_is_read_whatever_the_reference_knows(tmp_path, kind):
    """Its encoding made of parts, its positions between whole numbers: the logits are the run's own."""
    fields = {"encoding__resize": "interpolate", "encoding__fraction_digits": 1} | test_serving.COMPOSED
    if kind == "text":
        settings, inputs = tiny_config(**fields), np.arange(24)[None]
    else:
        settings = test_serving.vit_config(encoding__mode="attn_scalar", **fields)
        inputs = np.random.default_rng(0).normal(size=(2, 12, 8, 1)).astype(np.float32)
    folder = str(saved_run(tmp_path / "ours", settings))
    model, run = load_reference(folder), loading.open_model(folder)
    params = run.params
    expected = jax.jit(functools.partial(test_serving.own_logits, run))(params, inputs)
    np.testing.assert_allclose(model.logits(inputs), expected, atol=1e-5)
    places = np.asarray(run.model_spec.position_grid.positions((3,) * len(settings.grid)))
    vectors = run.compiled.vectors(params, (3,) * len(settings.grid))
    np.testing.assert_allclose(
        model.encode_positions(places / run.model_spec.position_grid.position_resolution), vectors, atol=1e-5
    )
    with pytest.raises(InputError, match="the range of [34] digits in base 10"):
        model.logits(inputs, start=(5000,) * len(settings.grid))


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_reference_s_own_files_come_back_bit_equal(goldens, tmp_path, kind):
    source = goldens / "checkpoints" / kind
    convert.convert_to_run(str(source), str(tmp_path / "run"))
    assert same(load_reference(str(source)).params, load_reference(str(tmp_path / "run")).params)
    convert.convert_to_reference(str(tmp_path / "run"), str(tmp_path / "back"))
    assert same(load_reference(str(source)).params, load_reference(str(tmp_path / "back")).params)
    if kind == "text":
        for name in ("model", "model_1"):
            files = [load_file(folder / "best_model" / f"{name}.safetensors") for folder in (source, tmp_path / "back")]
            assert files[0].keys() == files[1].keys()
            assert all((files[0][key] == files[1][key]).all() for key in files[0])


def test_a_converted_model_is_evaluated_and_trained_on(goldens, tmp_path):
    """`evaluate` gives the loss of `load_reference`'s logits; `train --init-from` begins with these parameters."""
    source, text = goldens / "checkpoints" / "text", tmp_path / "words.txt"
    text.write_text(WORDS)
    tokenizer = tokenizer_file(tmp_path / "tokenizer.json", 97)
    run = str(tmp_path / "run")
    assert convert.convert_to_run(str(source), run, str(tokenizer))["tokenizer"]
    report, _ = evaluate(
        loading.open_model(run), EvalRequest(lengths=((32,),), data="text_files", paths=(str(text),), tokens=64)
    )
    values = config.to_dict(loading.load_run_config(run))
    values["data"] |= {"name": "text_files", "paths": (str(text),)}
    tokens = np.asarray(Trainer.of(config.from_dict(values)).task.source("test").tokens, np.int32)
    windows = tokens[: report["results"][0]["tokens"] + 1]
    inputs, targets = windows[:-1].reshape(-1, 32), windows[1:].reshape(-1, 32)
    logits = np.asarray(load_reference(str(source)).logits(inputs), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert report["results"][0]["loss"] == pytest.approx(losses.mean(), abs=2e-5) and report["step"] == 0
    settings = dict(
        data__tokenizer=str(tokenizer),
        data__paths=(str(text),),
        data__name="text_files",
        data__length=32,
        steps=1,
        model__layers=2,
        model__width=48,
        model__heads=3,
        encoding__width=48,
        encoding__heads=3,
        encoding__qk="single",
        encoding__max_position=2000,
        encoding__digits=5,
        model__vocabulary=97,
        optimizer__warmup_steps=1,
        init_from=run,
        encoding__mode="attn_scalar",
        eval__lengths=(),
        encoding__layers=2,
        objective__contrastive__weight=0.0,
        objective__distillation__weight=0.0,
    )
    train(tiny_config(**settings), tmp_path / "tuned")
    assert same(load_reference(run).params, load_reference(str(tmp_path / "tuned")).params)
    with pytest.raises(InputError, match="model.layers: 2 -> 1"):
        train(tiny_config(**settings | {"model__layers": 1}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def copy_of(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    for path in source.rglob("*.*"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return target


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def bomb(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(pathlib.Path("x")))


def nan(path):
    state = load_file(path)
    state["transformer.wte.weight"][3] = np.nan
    save_file(state, path)


@pytest.mark.parametrize(
    "kind, damage, match",
    [
        ("text", ("best_model/model.safetensors", cut), "model.safetensors is damaged or cut short"),
        ("text", ("best_model/model_1.safetensors", lambda path: path.unlink()), "model_1.safetensors is missing"),
        ("text", ("best_model/model.safetensors", nan), "token_embedding/embedding holds NaN"),
        ("text", ("config.json", lambda path: path.write_text("{")), "config.json is neither JSON nor YAML"),
        ("image", ("best_model.pth", cut), "best_model.pth.*cut short"),
        ("image", ("best_model.pth", bomb), "refused.*pathlib"),
    ],
)
def test_what_is_damaged_leaves_nothing(goldens, tmp_path, kind, damage, match):
    source = copy_of(goldens / "checkpoints" / kind, tmp_path / "source")
    (file, change), output = damage, tmp_path / "out" / "run"
    change(source / file)
    with pytest.raises(InputError, match=match):
        convert.convert_to_run(str(source), str(output))
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_places_and_formats_are_checked(goldens, tmp_path):
    source = str(goldens / "checkpoints" / "text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(InputError, match="not an empty folder"):
        convert.convert_to_run(source, str(tmp_path / "full"))
    with pytest.raises(InputError, match="does not exist"):
        convert.convert_to_run(str(tmp_path / "absent"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="no checkpoint that can be read"):
        convert.convert_to_run(str(tmp_path / "full"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="200 tokens, but the model only 97"):
        convert.convert_to_run(source, str(tmp_path / "out"), str(tokenizer_file(tmp_path / "t.json", 200)))
    convert.convert_to_run(source, str(tmp_path / "run"))
    with pytest.raises(InputError, match="a run of ours already"):
        convert.convert_to_run(str(tmp_path / "run"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="came without a tokenizer"):
        evaluate(loading.open_model(str(tmp_path / "run")), EvalRequest())
    base36 = saved_run(tmp_path / "base36", tiny_config(encoding__base=36))
    with pytest.raises(InputError, match="encoding.base=36: the reference's format knows 10 alone"):
        convert.convert_to_reference(str(base36), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "field, value",
    [
        ("rotary_pairs", 2),
        ("feature_width", 4),
        ("position_heads", 1),
        ("log_scaling", True),
        ("fraction_digits", 1),
        ("resize", "interpolate"),
        ("gate", "forget"),
    ],
)
def test_what_the_reference_has_nothing_like_is_refused_by_name(field, value):
    plain = tiny_config(model__vocabulary=97)
    spec_from_config(plain, 24)
    changed = dataclasses.replace(plain, encoding=dataclasses.replace(plain.encoding, **{field: value}))
    with pytest.raises(InputError, match=f"encoding.{field}={value!r}: the reference's format knows"):
        spec_from_config(changed, 24)


@pytest.mark.parametrize("kind, words", [("gpt_neox", "residual='parallel'"), ("olmo2", "norm='rms_norm'")])
def test_blocks_that_the_reference_has_nothing_like_are_refused_by_name(kind, words):
    with pytest.raises(InputError, match=f"model.{words}: the reference's format knows"):
        spec_from_config(tiny_config(model__vocabulary=97, model__kind=kind), 24)


@pytest.mark.parametrize("kind", ["fire", "t5", "pope"])
def test_a_kind_that_the_reference_does_not_know_is_refused_by_name(kind):
    with pytest.raises(InputError, match=f"encoding.kind='{kind}': the reference knows seqpe, learned, .* alone"):
        spec_from_config(tiny_config(variant=kind, model__vocabulary=97), 0)
