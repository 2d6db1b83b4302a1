"""The benchmark command: every mode, ratios of turns, and what it refuses."""

import dataclasses
import json

import jax
import pytest

from seqpe_jax import config
from seqpe_jax.models.build import DataSpec, ModelSpec, keys_per_query, model_flops
from seqpe_jax.models.flops import param_matmul_flops
from seqpe_jax.profiling.benchmark import flops_per_call
from seqpe_jax.training.trainer import Trainer
from tests.commands import CONFIG
from tests.tiny import tiny_config
from tests.training.test_commands import PLAIN, refused

pytestmark = pytest.mark.slow
KINDS = ["rotary", "rotary_partial", "seqpe"]


@pytest.mark.parametrize("mode", ["train", "decode"])
def test_encodings_are_compared(commands, tmp_path, mode):
    output = tmp_path / "deep" / "found.json"
    fields = [f"--config.{name.replace('__', '.')}={value}" for name, value in PLAIN.items()]
    result = commands(
        "benchmark",
        f"--config={CONFIG}",
        *fields,
        "--compare=seqpe,rotary",
        f"--mode={mode}",
        "--steps=3",
        f"--output={output}",
    )
    assert result.code == 0, result.err
    found = json.loads(output.read_text())
    assert [run["encoding"] for run in found["runs"]] == ["seqpe", "rotary"]
    for run in found["runs"]:
        assert 0 < run["p10_s"] <= run["median_s"] <= run["p90_s"]
        assert run["per_second"] > 0 and run["peak_bytes"] > 0 and run["mode"] == mode
        assert run["mfu"] is run["mfu_full_attention"] is None  # the peak of a CPU is not known
        bound = run["roofline"]
        assert bound["bound"] == "arithmetic" and "measured" in bound["peaks"]["source"] and bound["memory_s"] is None
        assert run["reached"] == pytest.approx(bound["seconds"] / run["median_s"])
        assert (run["encoding_share"] is not None) == (run["encoding"] == "seqpe" and mode != "decode")
    assert found["ratios"].keys() == {"seqpe/rotary"} and found["ratios"]["seqpe/rotary"]["time"] > 0
    assert "seqpe/rotary: time" in result.out and "| seqpe |" in result.out
    assert "FLOP/s of a device (measured on this machine just now" in result.out


def test_the_encoder_is_compared_with_itself_without_shared_prefixes(commands, tmp_path):
    output = tmp_path / "found.json"
    result = commands("benchmark", f"--config={CONFIG}", "--mode=encode", "--steps=1", f"--output={output}")
    assert result.code == 0, result.err
    found = json.loads(output.read_text())
    assert found["ratios"].keys() == {"seqpe/seqpe, each string by itself"}
    settings = tiny_config()
    pairs, windows = settings.objective.contrastive, settings.objective.distillation
    rows = settings.data.length + pairs.batch * (1 + pairs.candidates) + windows.batch * windows.offsets
    assert [run["per_second"] * run["median_s"] for run in found["runs"]] == pytest.approx([rows] * 2)


def test_variants_of_the_page_are_compared_each_with_the_options_that_it_reads(commands, tmp_path):
    output = tmp_path / "found.json"
    result = commands(
        "benchmark",
        "--config=configs/stdlib_lm.py",
        f"--compare={','.join(KINDS)}",
        "--steps=1",
        "--mode=eval",
        "--config.encoding.width=24",
        "--config.model.layers=1",
        "--config.batch_size=2",
        f"--output={output}",
    )
    assert result.code == 0, result.err
    found = json.loads(output.read_text())
    assert [run["encoding"] for run in found["runs"]] == KINDS
    assert found["ratios"].keys() == {"rotary/rotary_partial", "rotary/seqpe"}
    loaded = {name: config.load_variant("configs/stdlib_lm.py", name, {"encoding.width": 24}) for name in KINDS}
    assert [loaded[name].encoding.rotary_pairs for name in KINDS] == [0, 4, 4] and loaded["seqpe"].encoding.width == 24
    assert loaded["rotary"] == config.load("configs/stdlib_lm.py:rotary")


def test_bad_arguments_end_with_one_line(commands):
    refused(commands("benchmark", f"--config={CONFIG}", "--compare=seqpe,seqpe"), "names an encoding twice")
    refused(commands("benchmark", f"--config={CONFIG}", "--compare=seqqe"), "'seqqe'", "seqpe")
    large = commands("benchmark", "--config=configs/imagenet_vit.py:b16", "--compare=b16-seqpe,b16-rotary")
    refused(large, "--compare names the variants", "give --config=configs/imagenet_vit.py, and leave 'b16' out")
    kind = commands("benchmark", f"--config={CONFIG}", "--compare=seqpe,rotary", "--config.encoding.kind=alibi")
    refused(kind, "--compare names the variants", "leave --config.encoding.kind out")
    unread = commands("benchmark", f"--config={CONFIG}", "--compare=rotary,alibi", "--config.encoding.layers=3")
    refused(unread, "--config.encoding.layers is read by none of rotary, alibi")
    refused(commands("benchmark", "--config=configs/digits_vit.py", "--mode=decode"), "give a config of text")
    refused(
        commands("benchmark", f"--config={CONFIG}", "--mode=encode", "--compare=seqpe,rotary"), "encoding.kind=seqpe"
    )


def test_flops_are_counted_from_the_sizes():
    width, length = 24, 16
    block = 2 * 12 * width**2 + 4 * length * width  # weights, then attention
    forward = 2 * length * (block + 2 * width * 256)
    trainer = Trainer.of(tiny_config(model__vocabulary=256, batch_size=2), jax.devices()[:1])
    seen = forward - 2 * length * 2 * length * width  # causality hides half of the keys
    assert flops_per_call(trainer, "eval") == {"mfu": seen, "mfu_full_attention": forward}
    assert (
        trainer.flops_per_step
        == flops_per_call(trainer, "train")
        == {"mfu": 3 * seen, "mfu_full_attention": 3 * forward}
    )
    images = model_flops(config.load("configs/digits_vit.py:none"), 0, tokens=16, training=False)
    assert images["mfu"] == images["mfu_full_attention"]  # each patch sees all others
    llama = tiny_config(
        variant="rotary", model__kind="llama", model__kv_heads=1, model__head_width=8, model__mlp_width=40
    )
    model_spec = ModelSpec.of(llama, DataSpec(vocabulary=256))
    traced = param_matmul_flops(
        lambda params, inputs: model_spec.logits(params, inputs), model_spec.shapes, model_spec.inputs
    )
    assert model_flops(llama, 256, tokens=length, training=False)["mfu_full_attention"] == traced
    windows = dataclasses.replace(llama.model, layers=3, window=4, window_layers=(1, 0))
    most = 4 + length + 4
    assert keys_per_query(dataclasses.replace(llama, model=windows)) == (
        most - (16 + length**2 + 16) / (2 * length),
        most,
    )
    gated = tiny_config(model__vocabulary=256, encoding__gate="forget")  # a number for each of two heads
    counted = model_flops(gated, 256, tokens=2 * length, training=False)
    assert counted["mfu_full_attention"] == forward + 2 * length * 2 * width * 2
