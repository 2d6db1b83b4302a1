"""An exported function equals its run at any batch, length and size of its range; a folder is complete or absent."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config, files, trees
from seqpe_jax.config.encodings import kinds_for
from seqpe_jax.errors import InputError
from seqpe_jax.inference import export as serving
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.tasks.base import ExportSignature
from seqpe_jax.training.trainer import Trainer
from tests.tiny import COMPOSED, ROOT, every_part, random_params, tiny_config
from tests.training.test_image_commands import TINY

LENGTHS = ((1, 9), (3, 32))  # batch and length; windows of training have 16
SIZES = ((3, 16, 14), (1, 8, 8))


def vit_config(kind="seqpe", page="digits_vit", **fields):
    values = (
        TINY | {"objective.distillation.offsets": 4}
        if kind == "seqpe"
        else {name: value for name, value in TINY.items() if not name.startswith(("encoding", "objective"))}
    )
    values = values | {name.replace("__", "."): value for name, value in fields.items()}
    return config.load(f"{ROOT}/configs/{page}.py:{kind}", values)


def random_run(settings):
    """A run on one device, and parameters none of which is zero or one."""
    run = Trainer.of(settings, jax.devices()[:1])
    return run, random_params(run, 0.1)


def exported(run, params, max_grid, platforms=("cpu",)):
    """The exported function as another process reads it, and its flat parameters."""
    stored = run.compiled.params_with_table(params, max_grid)
    program = serving.export_stablehlo(
        run.model_spec.with_precomputed_table(max_grid).logits, stored, run.task.export_signature(max_grid), platforms
    )
    return jax.export.deserialize(bytearray(program)), trees.flatten_dict(stored)


def own_logits(run, params, inputs):
    """The logits of the run itself, with its encoder."""
    shape = run.config.grid_of(inputs.shape[1:-1]) if run.config.is_image else inputs.shape[1:]
    signal = run.model_spec.signal(params, run.model_spec.position_grid.positions(shape)[None], shape)
    return run.model_spec.network.apply({"params": params["model"]}, inputs, signal)


def check(run, params, max_grid, inputs, tolerance=1e-5, platforms=("cpu",)):
    model, leaves = exported(run, params, max_grid, platforms)
    assert model.platforms == platforms
    assert set(re.findall(r"custom_call @(\w+)", model.mlir_module())) <= {"shape_assertion"}
    for array in inputs:
        expected = jax.jit(functools.partial(own_logits, run))(params, array)
        assert float(jnp.ptp(expected)) > 0.1
        found = jax.jit(model.call)(leaves, array)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    return model.mlir_module(), leaves


def windows(vocabulary=256):
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocabulary, size).astype(np.int32) for size in LENGTHS]


# Each field of a signal: tables of vectors, rotations, embedded positions, rank-F and relative biases, gates, polar.
TEXTS = {
    "composed": COMPOSED,
    "composed, interpolated": COMPOSED | {"encoding__resize": "interpolate", "encoding__fraction_digits": 1},
    "seqpe embedded": {"encoding__mode": "input_add", "encoding__qk": "none"},
    **{kind: {"variant": kind} for kind in ("learned", "rotary_mixed", "fox")},
    **{kind: {"variant": kind} | every_part(kind, "cable") for kind in ("alibi", "fire", "pope")},
}
# Layers of which several heads share keys cannot rotate some of them.
TEXTS["fire"] |= {"model__window": 6, "model__kv_heads": 1, "model__attention_block": 8, "encoding__rotary_heads": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_exports_of_text_equal_the_run_at_any_batch_and_length(name):
    """Of three texts that are shorter or longer than in training; of both where positions depend on the length."""
    layers = 2 if name in ("composed", "rotary_mixed", "fire", "pope") else 1  # a signal for each layer
    fields = {"objective__contrastive__space": "vectors", "model__layers": layers} | TEXTS[name]
    run, params = random_run(tiny_config(**fields))
    every = name == "composed" or run.config.encoding.window_dependence
    platforms = serving.PLATFORMS if name == "composed" else ("cpu",)
    _, leaves = check(run, params, (32,), windows() if every else windows()[1:], platforms=platforms)
    if "encoding/table" in leaves and name != "learned":
        rows = 160 if "interpolated" in name else 32  # tenths of the 16 trained positions, or the exported range
        assert leaves["encoding/table"].shape == (rows, 24)
        assert not any("encoder" in leaf for leaf in leaves)


IMAGES = {
    "seqpe": {"encoding__mode": "attn_mul", "encoding__qk": "multi"},
    "composed": COMPOSED | {"encoding__mode": "attn_scalar"},
    "learned": {"kind": "learned"},
    "rotary_mixed": {"kind": "rotary_mixed"},
    "pape": {"kind": "pape", "encoding__parabolas": 3, "encoding__rotary_pairs": 2},
    "lookhere": {"kind": "lookhere", "model__heads": 4, "encoding__rotary_pairs": 2, "encoding__rotary_heads": 3},
}

OTHERS = [("text", kind) for kind in kinds_for(1) if kind != "seqpe" and kind not in TEXTS]
OTHERS += [("images", kind) for kind in kinds_for(2) if kind not in IMAGES]


@pytest.mark.slow
@pytest.mark.parametrize("data, kind", OTHERS)
def test_every_encoding_can_be_exported_for_any_size(data, kind):
    """Without a table its positions are functions of sizes that are not known."""
    model_spec = ModelSpec.of(tiny_config(variant=kind) if data == "text" else vit_config(kind), DataSpec(256, 10, 1))
    grid = (32,) if data == "text" else (8, 8)
    shape = ("batch", "length") if data == "text" else ("batch", "2 * rows", "2 * columns", "1")
    limits = {"length": 32} if data == "text" else {"rows": 8, "columns": 8}
    signature = ExportSignature("inputs", model_spec.inputs.dtype, shape, limits, ("batch",), "", "")
    program = serving.export_stablehlo(
        model_spec.with_precomputed_table(grid).logits, model_spec.shapes, signature, ("cpu",)
    )
    assert len(program) > 1000


@pytest.mark.slow
def test_exports_of_long_windows_attend_blockwise():
    run, params = random_run(tiny_config(variant="alibi", model__attention_block=6))
    assert "while" in check(run, params, (32,), windows()[1:])[0]
    assert "while" not in exported(run, params, (6,))[0].mlir_module()  # no loop where the range fits in one block


@pytest.mark.slow
def test_bfloat16_exports():
    run, params = random_run(tiny_config(precision__compute="bfloat16"))
    assert "bf16" in check(run, params, (32,), windows()[1:], tolerance=2e-2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_exports_of_images_equal_the_run_at_any_batch_and_size(name):
    run, params = random_run(vit_config(**IMAGES[name]))
    draw = np.random.default_rng(0)
    images = [draw.normal(size=(*size, 1)).astype(np.float32) for size in SIZES]
    every = name in ("seqpe", "learned")  # which interpolate: a larger grid and the trained one
    platforms = serving.PLATFORMS if name == "seqpe" else ("cpu",)
    program, leaves = check(run, params, (8, 8), images if every else images[:1], platforms=platforms)
    assert "while" not in program
    if name == "seqpe":
        sides = run.model_spec.position_grid.table_shape((8, 8))[0]  # of all interpolated positions
        assert sides > (8, 8) and leaves["encoding/table"].shape == (*sides, 16)
        assert "encoding/prefix_vectors" in leaves


@pytest.mark.slow
def test_exports_of_videos_take_any_number_of_frames():
    fields = {"data__size": (4, 16, 16), "eval__sizes": (16,), "eval__frames": (4,), "model__patch": (2, 8, 8)}
    fields["encoding__rotary_pairs"] = 3
    run, params = random_run(vit_config(page="moving_digits_vit", **fields))
    draw = np.random.default_rng(0)
    videos = [draw.normal(size=(*size, 1)).astype(np.float32) for size in ((2, 8, 24, 16),)]
    check(run, params, (4, 3, 2), videos)


@pytest.mark.parametrize("arguments", [np.zeros((1, 33), np.int32), np.zeros((1, 8), np.float32)])
def test_inputs_outside_of_the_range_are_refused(arguments):
    model, leaves = exported(*random_run(tiny_config(variant="none")), (32,))
    with pytest.raises(ValueError, match="shapes|[Dd]type"):
        model.call(leaves, arguments)


def test_positions_past_the_table_show():
    run, params = random_run(tiny_config())
    stored = run.compiled.params_with_table(params, (20,))
    vectors = run.model_spec.with_precomputed_table((20,)).encoding.apply(
        {"params": stored["encoding"]}, jnp.array([[19], [20]]), method="vectors"
    )
    assert np.isfinite(vectors[0]).all() and np.isnan(vectors[1]).all()


def test_parameters_are_read_back_or_refused(tmp_path):
    tree = {"model": {"kernel": np.ones((2, 3), np.float32)}, "encoding": {}}
    serving.write_params(tmp_path, tree)
    held = []

    def put(array, target):
        held.append(array.shape)
        return array

    found = serving.read_params(tmp_path, tree, put)
    assert held == [(2, 3)]
    assert trees.flatten_dict(found).keys() == {"model/kernel"} and found.keys() == tree.keys()
    assert (found["model"]["kernel"] == 1).all()
    other = {"model": {"kernel": np.ones((3, 2), np.float32)}, "encoding": {}}
    with pytest.raises(InputError, match=r"model/kernel is float32\[2, 3\], but config.json asks for float32\[3, 2\]"):
        serving.read_params(tmp_path, other, put)
    with pytest.raises(InputError, match="model/bias is missing"):
        serving.read_params(tmp_path, {"model": tree["model"] | {"bias": np.ones(3, np.float32)}}, put)
    path = tmp_path / serving.PARAMS_FILE
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="cannot be read"):
        serving.read_params(tmp_path, tree, put)


def test_a_folder_is_complete_or_absent(tmp_path):
    output = tmp_path / "deep" / "export"
    with pytest.raises(KeyboardInterrupt):
        with files.atomic_dir(output) as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt
    assert list((tmp_path / "deep").iterdir()) == []
    output.mkdir()  # an empty folder may be there
    with files.atomic_dir(output) as folder:
        assert folder.parent == output.parent and not any(output.iterdir())
        (folder / "all").write_text("all")
    assert [path.name for path in output.parent.iterdir()] == ["export"] and (output / "all").read_text() == "all"
    assert output.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    with pytest.raises(InputError, match="not an empty folder"):
        files.require_empty(output)
