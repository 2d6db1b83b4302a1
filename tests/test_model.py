"""One handle on runs, exports and checkpoints of others, opened without their data."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import seqpe_jax
from seqpe_jax import config, loading
from seqpe_jax.data import images as image_data
from seqpe_jax.data import tokens as text_data
from seqpe_jax.distributed.hardware import Chip
from seqpe_jax.distributed.sharding import device_bytes
from seqpe_jax.errors import InputError
from seqpe_jax.models.build import DataSpec
from seqpe_jax.run_dir import DATA_SPEC_FILE, RunDir
from seqpe_jax.training import optimizer as optimizers
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.trainer import Trainer
from tests.inference.test_export import vit_config
from tests.tiny import random_state, tiny_config

pytestmark = pytest.mark.usefixtures("one_device")

FIELDS = {"encoding__rotary_pairs": 2, "model__layers": 2, "encoding__qk": "multi"}


def saved(folder, settings, step=3):
    """The folder of a run of random weights."""
    trainer = Trainer.of(settings, jax.devices()[:1])
    checkpoints = Checkpointer(folder)
    checkpoints.save(step, random_state(trainer, 0.2), {})
    checkpoints.close()
    RunDir(folder).write_config(config.to_dict(settings))
    RunDir(folder).write_data_spec(trainer.task.data_spec)
    trainer.task.save_assets(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"line {number:4d} of text\n" for number in range(300)))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_file):
    fields = FIELDS | {"data__name": "text_files", "data__paths": (str(text_file),)}
    return saved(tmp_path_factory.mktemp("runs") / "first", tiny_config(**fields))


@pytest.fixture(scope="module")
def model(run):
    """The run's model, for tests that change nothing of it."""
    return seqpe_jax.load(run)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("runs") / "photos", vit_config())


@pytest.fixture
def no_data(monkeypatch):
    """No data set, optimiser or state of training may be touched."""

    def refuse(*_, **__):
        pytest.fail("opening a model touched what only training needs")

    monkeypatch.setattr(text_data, "token_source", refuse)
    monkeypatch.setattr(image_data, "image_source", refuse)
    monkeypatch.setattr(optimizers, "make_optimizer", refuse)
    monkeypatch.setattr(Trainer, "of", refuse)


@pytest.mark.slow
def test_a_model_is_opened_without_its_data(run, photos, no_data):
    model = seqpe_jax.load(run)
    assert repr(model).startswith("Model(seqpe in gpt2, 2 layers of width 24, ") and "step 3 of" in repr(model)
    assert model.logits(np.arange(24)[None]).shape == (1, 24, 256)
    assert model.encode_positions([0, 9, 199]).shape == (3, 24)
    assert isinstance(model.generate("line ", max_new_tokens=3), str)
    assert len(model.generate(["line ", "a"], 3, temperature=1.0)) == 2
    curves = model.position_curves(40, tokens=np.arange(9))
    assert curves.keys() == {"distances", "logit", "kernel"} and curves["logit"].shape == (2, 2, 40)
    for arguments, message in (((0,), "no position"), (((4, 4),), "1 number"), ((8, range(9)), "1 to 8 of the window")):
        with pytest.raises(InputError, match=message):
            model.position_curves(*arguments)
    assert seqpe_jax.load(photos).position_curves((12, 8))["distances"].ndim == 2
    grown = seqpe_jax.load(photos).logits(np.zeros((2, 12, 12, 1), np.float32))
    assert grown.shape == (2, 10) and np.isfinite(grown).all()


@pytest.mark.slow
def test_a_run_an_export_and_a_copy_answer_alike(run, tmp_path):
    model, tokens = seqpe_jax.load(run), np.random.default_rng(0).integers(0, 256, (2, 40))
    model.export(tmp_path / "export", max_length=64, platforms=("cpu",))
    model.save(tmp_path / "copy")
    exported, copy = seqpe_jax.load(tmp_path / "export"), seqpe_jax.load(str(tmp_path / "copy"))
    for other in (exported, copy):
        np.testing.assert_allclose(other.logits(tokens), model.logits(tokens), atol=2e-5)
        np.testing.assert_allclose(other.encode_positions([0, 63]), model.encode_positions([0, 63]), atol=2e-5)
        assert other.generate("line ", 8) == model.generate("line ", 8)
    assert (copy.step, exported.step, copy.data_spec) == (3, 3, model.data_spec)
    with pytest.raises(InputError, match="position 64 is outside 0 .. 63, the range of this export"):
        exported.logits(np.zeros((1, 65), int))
    with pytest.raises(InputError, match="60 new tokens are beyond the exported range, up to 64: .* --max-length=65"):
        exported.generate("line ", 60)
    with pytest.raises(InputError, match="is an export already"):
        exported.export(tmp_path / "again")
    with pytest.raises(InputError, match="is an export, which has no encoder"):
        exported.save_reference(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_position_has_one_vector(run, tmp_path):
    """To the last bit, in windows of any length that begin anywhere, and in an export: logits magnify what differs."""
    model = seqpe_jax.load(run)
    model.params["encoding"]["encoder"]["final_norm"]["scale"] *= 60.0  # as large as training makes vectors
    whole = np.asarray(model.compiled.vectors(model.params, (150,)))
    assert np.abs(whole).max() > 20
    for length, start in ((1, 0), (40, 0), (9, 131)):
        found = model.compiled.vectors(model.params, (length,), start=start)
        np.testing.assert_array_equal(found, whole[start : start + length])
    model.export(tmp_path / "export", max_length=150, platforms=("cpu",))
    exported = seqpe_jax.load(tmp_path / "export")
    np.testing.assert_array_equal(exported.params["encoding"]["table"], whole)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 40))
    for start in (0, 60):
        np.testing.assert_array_equal(exported.logits(tokens, start), model.logits(tokens, start))


@pytest.mark.slow
def test_a_damaged_export_is_refused(run, tmp_path):
    export = tmp_path / "export"
    seqpe_jax.load(run).export(export, max_length=40, platforms=("cpu",))
    moved = tmp_path / "moved"
    export.rename(moved)  # a folder may have any name
    (moved / "README.md").write_text("what we use it for")
    assert seqpe_jax.load(moved).logits(np.zeros((1, 3), int)).shape == (1, 3, 256)
    content = bytearray((moved / "params.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (moved / "params.safetensors").write_bytes(content)
    shutil.copytree(moved, tmp_path / "other")
    with pytest.raises(
        InputError, match="other is damaged: params.safetensors has changed since it was written; export"
    ):
        seqpe_jax.load(tmp_path / "other").logits(np.zeros((1, 3), int))
    for name, byte in (("config.json", 0), ("config.json", 99), ("sizes.json", 20)):
        held = (moved / name).read_bytes()
        (moved / name).write_bytes(held[:byte] + bytes([held[byte] ^ 1]) + held[byte + 1 :])
        with pytest.raises(InputError, match=f"{name} has changed since it was written: put back a copy"):
            seqpe_jax.load(moved)
        (moved / name).write_bytes(held)


def test_logits_of_a_window_with_another_start(model):
    tokens = np.random.default_rng(0).integers(0, 256, (1, 10))
    moved = model.logits(tokens, start=100)
    assert float(np.abs(moved - model.logits(tokens)).max()) > 1e-4
    model_spec, positions = model.model_spec, model.model_spec.position_grid.positions((10,))[None] + 100

    @jax.jit
    def expected(params):
        signal = model_spec.signal(params, positions, (10,))
        return model_spec.network.apply({"params": params["model"]}, tokens, signal)

    np.testing.assert_allclose(moved, expected(model.params), atol=1e-5)


@pytest.mark.slow
def test_evaluation_is_the_loss_of_its_logits(model):
    """At each length, the last window too, and of the same targets under each context."""
    found = model.evaluate(lengths=(16, 48), contexts=(16, 48), tokens=250, targets=64)
    assert [result.get("length") for result in found] == [16, 48, None, None]
    assert [result.get("context") for result in found] == [None, None, 16, 48]
    tokens = np.asarray(model.task.source("test").tokens, np.int64)

    def losses(size, end):
        """Of the targets of the window that ends with a token."""
        logits = np.asarray(model.logits(tokens[None, end - size : end]), np.float64)[0]
        targets = tokens[end - size + 1 : end + 1]
        return np.log(np.exp(logits).sum(-1)) - logits[np.arange(size), targets]

    for result in found[:2]:
        length = result["length"]
        ends = [*range(length, 250, length), 250]
        scored = np.concatenate(
            [losses(length, end)[-new:] for end, new in zip(ends, np.diff([0, *ends]), strict=True)]
        )
        assert len(scored) == result["tokens"] == 250
        assert result["loss"] == pytest.approx(scored.mean(), abs=1e-5)
    count = len(tokens)
    blocks = (count - 1 - 48) // 8 + 1
    ends = [count - 1 - 8 * ((2 * n + 1) * blocks // 16) for n in range(8)]
    for result in found[2:]:
        scored = np.concatenate([losses(result["context"], end)[-8:] for end in ends])
        assert (result["targets"], result["stride"]) == (64, 8)
        assert result["loss"] == pytest.approx(scored.mean(), abs=1e-5)


def test_a_released_checkpoint_opens_the_same_way(goldens, no_data, tmp_path):
    for kind in ("text", "image"):
        model = seqpe_jax.load(goldens / "checkpoints" / kind)
        stored = np.load(goldens / "checkpoints" / kind / "expected_output.npz")
        assert "Model(seqpe in" in repr(model) and len(stored.files)
        model.save(tmp_path / kind)
        again = seqpe_jax.load(tmp_path / kind)
        assert again.data_spec == model.data_spec and jax.tree.all(
            jax.tree.map(lambda one, other: np.array_equal(one, other), model.params, again.params)
        )
    assert again.data_spec.channels == 3 and len(again.data_spec.mean) == 3


def test_an_older_run_without_a_data_spec_opens(run, photos, tmp_path, no_data):
    for folder, expected in ((run, DataSpec(vocabulary=256)), (photos, DataSpec(0, 10, 1, (0.3051,), (0.3761,)))):
        assert RunDir(folder).data_spec == expected
        shutil.copytree(folder, tmp_path / folder.name)
        (tmp_path / folder.name / DATA_SPEC_FILE).unlink()
        assert loading.open_model(str(tmp_path / folder.name)).data_spec == expected


@pytest.mark.slow
def test_the_data_spec_is_that_of_the_model_not_of_its_data(tmp_path):
    """More ids than bytes, more classes than digits: an export declares what it returns."""
    text = saved(tmp_path / "text", tiny_config(model__vocabulary=300))
    digits = saved(tmp_path / "digits", vit_config(model__classes=12))
    for folder, last, inputs in (
        (text, "300", np.zeros((1, 5), np.int32)),
        (digits, "12", np.zeros((1, 8, 8, 1), np.float32)),
    ):
        model = seqpe_jax.load(folder)
        model.export(folder / "export", platforms=("cpu",))
        declared = json.loads((folder / "export" / "config.json").read_text())["export"]["output"]["shape"]
        assert declared[-1] == last and model.logits(inputs).shape[-1] == int(last)


@pytest.mark.parametrize(
    "ask, words",
    [
        (lambda model: model.logits(np.full((1, 4), 256)), "tokens 256 to 256 are not all in the vocabulary, 0 to 255"),
        (lambda model: model.logits(np.zeros((1, 4))), "tokens int32"),
        (lambda model: model.logits(np.zeros(4, int)), r"tokens int32\[B, L\], got an array of shape \(4,\)"),
        (lambda model: model.logits(np.zeros((1, 4), int), start=(1, 2)), "start must be 1 int"),
        (
            lambda model: model.logits(np.zeros((1, 4), int), start=1.5),
            r"start must be 1 int\(s\), one per axis, got 1.5",
        ),
        (
            lambda model: model.encode_positions([3.5]),
            "position 3.5 is no multiple of 1/1, the resolution of encoding.fraction_digits=0",
        ),
        (lambda model: model.logits(np.zeros((1, 4), int), start=998), "position 1001 is outside 0 .. 999"),
        (lambda model: model.encode_positions([[0, 1]]), r"int32\[R, 1\]"),
        (lambda model: model.encode_positions([-1]), "position -1 is outside"),
        (lambda model: model.generate("", top_k=5), "top-k and top-p limit random draws"),
        (lambda model: model.generate("a", 0), "at least 1"),
        (lambda model: model.generate("a", 1000), "position 1000"),
        (lambda model: model.evaluate(sizes=(8,)), "is a run on text"),
        (lambda model: model.predict("a.png"), "this model reads text: it predicts no classes"),
        (lambda model: model.evaluate(lengths=(4000,)), "position 3999"),
    ],
)
def test_bad_requests_to_a_language_model_are_refused(model, ask, words):
    with pytest.raises(InputError, match=words) as caught:
        ask(model)
    assert "\n" not in str(caught.value)


def test_pixels_are_normalized_as_in_training(photos):
    model = seqpe_jax.load(photos)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    normalized = (pixels / 255 - np.asarray(model.data_spec.mean)) / np.asarray(model.data_spec.std)
    np.testing.assert_allclose(model.logits(pixels), model.logits(normalized.astype(np.float32)), atol=1e-5)


@pytest.mark.slow
def test_images_get_their_likeliest_classes(photos, tmp_path):
    """Of files and arrays, resized, named and sorted; the same as those of the logits."""
    model = seqpe_jax.load(photos)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    Image.fromarray(pixels[0, ..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.repeat(pixels[1], 3, axis=-1)).resize((16, 16), Image.Resampling.NEAREST).save(
        tmp_path / "a.png"
    )
    found = model.predict([tmp_path / "grey.png", pixels[1], pixels[2]], top=3)
    expected = np.asarray(jax.nn.softmax(model.logits(pixels)))
    for one, probabilities in zip(found, expected, strict=True):
        order = np.argsort(-probabilities)[:3]
        assert [name for name, _ in one["top"]] == [model.class_names[label] for label in order]
        np.testing.assert_allclose([value for _, value in one["top"]], probabilities[order], rtol=1e-4)
    assert found[0]["file"] == str(tmp_path / "grey.png") and found[1]["file"] is None
    assert len(model.predict(str(tmp_path / "a.png"), size=(8, 12), top=99)["top"]) == 10
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for call, words in (
        (lambda: model.predict(tmp_path / "cut.png"), "cannot read image '.*cut.png'"),
        (lambda: model.predict(pixels.astype(np.float32)[0]), r"uint8\[height, width, 1\], got float32\[8, 8, 1\]"),
        (lambda: model.predict(pixels[0], size=9), "size 9x9 does not divide into patches"),
        (lambda: model.logits(pixels.astype(np.float32)), "float images must be normalized, at most about .* got 25"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_bad_requests_to_a_model_of_images_are_refused(photos):
    model = seqpe_jax.load(photos)
    with pytest.raises(InputError, match="generates no text"):
        model.generate("a")
    with pytest.raises(InputError, match=r"1 channel\(s\), got an array of shape \(1, 8, 8, 3\)"):
        model.logits(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(InputError, match="do not divide into patches"):
        model.logits(np.zeros((1, 9, 8, 1), np.float32))
    whole = np.zeros((1, 8, 8, 1), np.uint8)
    with pytest.raises(InputError, match=r"images of uint8 \(0 to 255\), or normalized ones of float32, got int32"):
        model.logits(whole.astype(np.int32))
    with pytest.raises(InputError, match="does not know the mean and deviation"):
        dataclasses.replace(model, data_spec=dataclasses.replace(model.data_spec, mean=(), std=())).logits(whole)
    with pytest.raises(InputError, match="it has no tokenizer"):
        _ = model.tokenizer


def test_a_folder_without_a_model_is_refused(tmp_path, run):
    with pytest.raises(InputError, match="nothing does not exist: give a --workdir"):
        seqpe_jax.load(tmp_path / "nothing")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "config.json", unfinished)
    with pytest.raises(InputError, match="no checkpoints in .*unfinished"):
        seqpe_jax.load(unfinished)
    newer = tmp_path / "newer"
    shutil.copytree(run, newer)
    values = json.loads((newer / "config.json").read_text())
    values["encoding"]["colour"] = "red"
    (newer / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="unknown config field 'encoding.colour'"):
        seqpe_jax.load(newer)
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / DATA_SPEC_FILE).write_text('{"vocabulary": "many"}')
    with pytest.raises(InputError, match="sizes.json cannot be read"):
        seqpe_jax.load(damaged)


@pytest.mark.slow
def test_a_model_on_a_mesh_computes_what_it_does_on_one_device(run, monkeypatch):
    """With its parameters split over all devices, and in generation gathered layer by layer, token by token."""
    plain, split = seqpe_jax.load(run), seqpe_jax.load(run, mesh={"fsdp": 2, "context": 2, "tensor": 2})
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(plain.params["model"]))
    assert device_bytes(plain.params["model"]) == whole and device_bytes(split.params["model"]) < whole / 3
    assert split.config.mesh == config.MeshConfig(fsdp=2, context=2, tensor=2)
    tokens = np.arange(2 * 16).reshape(2, 16)
    np.testing.assert_allclose(split.logits(tokens), plain.logits(tokens), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("seqpe_jax.inference.generate._fit_gathered", lambda mesh, params: False)
    assert split.generate("line", 3) == plain.generate("line", 3)


@pytest.mark.parametrize(
    "mesh, words",
    [
        ({"fsdp": 3}, "mesh.fsdp=3 .* 8 devices"),
        ({"fsdp": 0}, "mesh.fsdp.* 0"),
        ({"rows": 2}, "unknown config field 'mesh.rows'"),
        ({"tensor": 4}, "model.heads=2 does not divide over mesh.tensor=4"),
        ({}, "parameters take .* GiB of each device, and a small chip has 0: .*--config.mesh.fsdp"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(run, mesh, words, monkeypatch):
    monkeypatch.setattr(loading, "find_chip", lambda kind: Chip("small chip", 1.0, 1000, ""))
    with pytest.raises(InputError, match=words) as caught:
        loading.open_model(run, mesh=mesh)
    assert "\n" not in str(caught.value)
