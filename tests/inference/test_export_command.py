"""The export command: the folder runs without Flax and this package, equals its run, and bad input ends with one line."""

import ast
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from seqpe_jax import config, loading
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import OUTPUT_FILES, RunDir
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.trainer import Trainer
from tests.commands import environment, with_defaults
from tests.inference import test_export as test_serving
from tests.tiny import random_state, tiny_config
from tests.training.test_commands import refused, word_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

# Comes before the lines of a model card: a process with nothing but JAX, what JAX needs, and what the card names.
ALONE = """
import importlib.machinery, sys
class OnlyOnTheCard:
    names = {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers", "safetensors"}
    def find_spec(self, name, path=None, target=None):
        if "." in name or name in self.names:
            return
        spec = importlib.machinery.PathFinder.find_spec(name)
        if name == "seqpe_jax" or spec and "site-packages" in f"{spec.origin} {spec.submodule_search_locations}":
            raise ModuleNotFoundError(f"{name} is not on the card", name=name)
sys.meta_path.insert(0, OnlyOnTheCard())
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"line {number:4d} of text\n" for number in range(300)))
    return path


def saved_run(workdir: pathlib.Path, settings: config.Config) -> pathlib.Path:
    """A workdir with a checkpoint of random weights."""
    run = Trainer.of(settings, jax.devices()[:1])
    checkpoints = Checkpointer(workdir)
    checkpoints.save(3, random_state(run, 0.2), {})
    checkpoints.close()
    RunDir(workdir).write_config(config.to_dict(settings))
    run.task.save_assets(workdir)
    return workdir


@pytest.fixture(scope="module")
def on_text(tmp_path_factory, text) -> pathlib.Path:
    """A workdir of a language model, with results for the card."""
    fields = {"data__name": "text_files", "data__paths": (str(text),)}
    workdir = saved_run(tmp_path_factory.mktemp("run") / "tiny", tiny_config(**fields))
    lines = [{"step": 2, "time": 1.0, "train/loss": 5.4321}, {"step": 3, "time": 2.0, "train/loss": 5.25}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = [{"length": length, "loss": 5.0, "perplexity": 148.4, "bits_per_byte": 7.125} for length in (16, 32)]
    (workdir / "evaluation.json").write_text(json.dumps({"step": 3, "split": "test", "results": results}))
    return workdir


@pytest.fixture(scope="module")
def text_export(commands, on_text) -> pathlib.Path:
    output = on_text.parent / "exports" / "tiny"
    result = commands("export", f"--checkpoint={on_text}", f"--output={output}", "--max-length=48")
    assert result.code == 0, result.err
    return output


@pytest.fixture(scope="module")
def on_images(tmp_path_factory) -> pathlib.Path:
    """A workdir of a classifier whose encoding is made of parts, and which interpolates positions of larger images."""
    settings = test_serving.vit_config(encoding__mode="attn_scalar", **test_serving.COMPOSED)
    assert settings.encoding.resize == "interpolate" and settings.encoding.fraction_digits == 1
    return saved_run(tmp_path_factory.mktemp("run") / "digits", settings)


@pytest.fixture(scope="module")
def images_export(one_device, on_images) -> pathlib.Path:
    output = on_images.parent / "digits-export"
    loading.open_model(on_images).export(output, max_size=16, platforms=("cpu",))
    assert "| encoding | seqpe, past training between its positions |" in (output / "README.md").read_text()
    return output


def lines_of(card: pathlib.Path) -> str:
    """The five lines of a model card that load and run it."""
    (block,) = re.findall(r"^```python\n(.*?)^```", card.read_text(), re.MULTILINE | re.DOTALL)
    assert len(ast.parse(block).body) == len(block.splitlines()) == 5
    return block


def run_alone(inputs: dict[pathlib.Path, list[np.ndarray]]) -> dict[pathlib.Path, list[np.ndarray]]:
    """Logits of the lines of model cards, in a process without this package, on their own input and then on others."""
    blocks, further = (
        [ALONE, "import os, pathlib, sys"],
        """
given = numpy.load("../inputs.npz")
found = [jax.jit(model.call)(params, given[name]) for name in given]
numpy.savez("../logits.npz", inputs, logits, *found)
""",
    )
    for folder, arrays in inputs.items():
        np.savez(folder.parent / "inputs.npz", *arrays)
        blocks += [f"os.chdir({str(folder)!r})", lines_of(folder / "README.md"), further]
        assert "`pip install jax flatbuffers safetensors`" in (folder / "README.md").read_text()
    blocks.append('print(sorted({name.partition(".")[0] for name in sys.modules}))')
    clean = {name: value for name, value in environment(folder).items() if not name.startswith("PYTHON")}
    words = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(words, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"seqpe_jax", "flax", "optax"} & set(ast.literal_eval(done.stdout))
    return {folder: list(np.load(folder.parent / "logits.npz").values()) for folder in inputs}


def own_logits(workdir: pathlib.Path, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of the run, from its checkpoint and its encoder."""
    run = loading.open_model(str(workdir))
    assert run.step == 3
    params, found = jax.device_get(run.params), jax.jit(functools.partial(test_serving.own_logits, run))
    return [np.asarray(found(params, array)) for array in inputs]


def test_models_run_alone(on_text, text_export, on_images, images_export):
    draw = np.random.default_rng(0)
    tokens = [draw.integers(0, 256, size).astype(np.int32) for size in ((2, 48), (3, 7))]
    images = [draw.normal(size=size).astype(np.float32) for size in ((2, 16, 16, 1), (3, 8, 12, 1))]
    inputs, runs = {text_export: tokens, images_export: images}, {text_export: on_text, images_export: on_images}
    for folder, (card_inputs, *found) in run_alone(inputs).items():
        for logits, expected in zip(found, own_logits(runs[folder], [card_inputs, *inputs[folder]]), strict=True):
            assert np.ptp(expected) > 0.1
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_the_folder_of_an_export(text_export):
    names = {path.name for path in text_export.iterdir()}
    assert names == {"README.md", "config.json", "digests.json", "model.stablehlo", "params.safetensors", "sizes.json"}
    assert {name.lower() for name in names} <= OUTPUT_FILES, "each is refused as an output"
    leaves = safetensors.numpy.load_file(text_export / "params.safetensors")
    assert leaves["encoding/table"].shape == (48, 24) and "model/blocks_0/qkv/kernel" in leaves
    assert not any("encoder" in name for name in leaves)
    assert [path.name for path in text_export.parent.iterdir()].count("tiny") == 1
    assert not list(text_export.parent.glob(".*"))
    assert len({path.stat().st_mode for path in text_export.iterdir()}) == 1  # whoever reads one file reads all


def report_of(folder, **request):
    """The report of an evaluation, and its arrays."""
    return evaluate(loading.open_model(folder), EvalRequest(**request))


@pytest.mark.parametrize("kind", ["text", "images"])
def test_an_evaluation_measures_the_same_on_an_export(request, kind):
    folders = [request.getfixturevalue(name) for name in (f"on_{kind}", f"{kind}_export")]
    sizes = {"text": {"lengths": ((16,), (48,))}, "images": {"sizes": ((8, 8), (16, 12))}}[kind]
    (own, own_arrays), (other, arrays) = (report_of(folder, **sizes) for folder in folders)
    assert own_arrays["similarity"].keys() == arrays["similarity"].keys()
    assert {name for name in own if own[name] != other[name]} <= {"checkpoint", "made_from", "results"}
    for before, after in zip(own["results"], other["results"], strict=True):
        assert before.keys() == after.keys()
        nested = {name for name, value in before.items() if isinstance(value, list | dict)} - {"loss_by_position"}
        assert all(after[name] == before[name] for name in nested)
        for name in before.keys() - nested - {"loss_by_position"}:
            assert after[name] == pytest.approx(before[name], rel=1e-5)


def test_evaluation_of_an_export_reads_the_export(commands, text_export, tmp_path):
    copy, lengths = tmp_path / "copy", {"lengths": ((32,),)}
    shutil.copytree(text_export, copy)
    leaves = safetensors.numpy.load_file(copy / "params.safetensors")
    leaves["encoding/table"] = -3 * leaves["encoding/table"]
    safetensors.numpy.save_file(leaves, copy / "params.safetensors")
    refused(commands("evaluate", f"--checkpoint={copy}", "--lengths=32"), "params.safetensors has changed")
    (copy / "digests.json").unlink()
    with pytest.raises(InputError, match="digests.json is missing, which this export had"):
        report_of(copy, **lengths)
    settings = json.loads((copy / "config.json").read_text())
    del settings["export"]["digests"]  # as older versions wrote it
    (copy / "config.json").write_text(json.dumps(settings))
    first, second = (report_of(folder, **lengths)[0]["results"][0]["loss"] for folder in (text_export, copy))
    assert first != second
    (copy / "params.safetensors").unlink()
    with pytest.raises(InputError, match="params.safetensors.* cannot be read"):
        report_of(copy, **lengths)


def test_evaluation_beyond_the_exported_range_is_refused(text_export, images_export):
    with pytest.raises(InputError, match="evaluation length 49 .*up to 48.*--max-length=49"):
        report_of(text_export, lengths=((16,), (49,)))
    with pytest.raises(InputError, match="evaluation size 8x18 .*up to 16x16.*--max-size=18"):
        report_of(images_export, sizes=((8, 18),))


def test_the_model_card_says_what_it_is(on_text, text_export):
    card = (text_export / "README.md").read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(Trainer.of(tiny_config()).abstract_state.params))
    leaves = safetensors.numpy.load_file(text_export / "params.safetensors").values()
    for words in (
        "| data | text_files |",
        "| steps | 3 |",
        "| encoding | seqpe |",
        "| training length | 16 |",
        "| lengths served | up to 48 |",
        "| platforms | cpu, cuda, tpu |",
        "int32[batch, length]",
        "length 1 to 48",
        f"| parameters | {count:,} trained, {sum(leaf.size for leaf in leaves):,} here",
        "train/loss: 5.25 (step 3)",
        "| 32 | 5.000 | 7.125 | 148.400 |",
        "the test split, step 3",
    ):
        assert words in card, words
    stored, own = (json.loads((folder / "config.json").read_text()) for folder in (text_export, on_text))
    section = stored.pop("export")
    assert stored == own
    assert section["input"] == {
        "name": "tokens",
        "dtype": "int32",
        "shape": ["batch", "length"],
        "limits": {"length": 48},
    }
    assert (section["step"], section["reach"], section["jax"]) == (3, [48], jax.__version__)
    assert section["platforms"] == ["cpu", "cuda", "tpu"]


def test_a_tokenizer_goes_with_its_model(text, tmp_path):
    word_tokenizer(tmp_path / "tokenizer.json", ["line", "of", "text", "</s>"])
    fields = {
        "data__name": "text_files",
        "data__paths": (str(text),),
        "data__tokenizer": str(tmp_path / "tokenizer.json"),
        "data__lossy_tokenizer": True,
    }
    workdir = saved_run(tmp_path / "run", tiny_config(variant="rotary", eval__lengths=(16,), **fields))
    (tmp_path / "tokenizer.json").unlink()  # the run keeps its own
    export = tmp_path / os.fsdecode(b"caf\xe9")  # a name may be any bytes
    loading.open_model(workdir).export(export, platforms=("cpu",))
    assert (export / "README.md").read_text().startswith("# caf\\udce9\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (export / name).read_bytes() == (workdir / name).read_bytes()
    own, other = (report_of(folder)[0]["results"][0] for folder in (workdir, export))
    assert other["tokens"] == own["tokens"] and other["loss"] == pytest.approx(own["loss"], rel=1e-5)


def test_export_refuses_arguments(commands, on_text, on_images, text_export, tmp_path):
    full, output = tmp_path / "FULL", tmp_path / "new" / "export"
    full.mkdir()
    (full / "letter.txt").write_text("dear reader")
    for argument, *words in (
        ("--max-length=0", "max-length", "0"),
        ("--platforms=", "--platforms", "cpu, cuda, tpu"),
        (f"--output={full}", "FULL", "not an empty folder"),
        ("--checkpoint=nowhere", "nowhere does not exist"),
    ):
        result = commands("export", *with_defaults([argument], checkpoint=on_text, output=output))
        refused(result, *words)
        assert "positions" not in result.out + result.err
    assert [path.name for path in full.iterdir()] == ["letter.txt"]
    for folder, options, *words in (
        (on_text, {"max_length": 1001}, "--max-length 1001", "largest position possible is 999"),
        (on_text, {"max_size": 8}, "--max-size", "text", "--max-length"),
        (on_text, {"platforms": ("cpu", "gpu")}, "'gpu'", "cpu, cuda, tpu"),
        (full, {}, "not a run", "config.json"),
        (text_export, {}, "an export already", "--workdir"),
        (on_images, {"max_size": 9}, "--max-size 9x9", "patches of 2x2"),
        (on_images, {"max_size": 202}, "--max-size 202x202", "largest size possible is 80x80"),
        (on_images, {"max_length": 16}, "--max-length", "images", "--max-size"),
    ):
        with pytest.raises(InputError) as caught:
            loading.open_model(folder).export(output, **options)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
    assert not output.parent.exists()


def test_an_export_that_is_stopped_leaves_nothing(commands, on_text, tmp_path):
    """While it is written: tests/inference/test_export.py."""
    given = (f"--checkpoint={on_text}", f"--output={tmp_path / 'out' / 'export'}")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        running, deadline = commands.start("export", *given), time.monotonic() + 120
        while "lowering" not in running.out:
            assert time.monotonic() < deadline, running.err
            time.sleep(0.01)
        os.kill(running.process, number)
        assert commands.wait(running).code == code and not list((tmp_path / "out").glob("*"))
