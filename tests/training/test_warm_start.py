"""A new run with the parameters of another model: what it reuses, draws, drops, resizes, and how far its loss moves."""

import re
import shutil

import jax
import numpy as np
import pytest

import seqpe_jax
from seqpe_jax import config
from seqpe_jax.config.encodings import all_fields
from seqpe_jax.encodings.absolute import resize_table
from seqpe_jax.errors import InputError
from seqpe_jax.run_dir import RunDir
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.trainer import Trainer
from seqpe_jax.training.warm_start import GATE_PARAMS, check_source, open_source
from seqpe_jax.trees import flatten_dict
from tests import goldens
from tests.interop.test_hf_decoders import character_tokenizer
from tests.tiny import ROOT, random_params, random_state, tiny_config
from tests.training.test_trainer import written

pytestmark = pytest.mark.usefixtures("one_device")


def saved(folder, **fields):
    """Returns a folder with the config and random parameters of a run; nothing is compiled."""
    trainer = Trainer.of(tiny_config(**fields), jax.devices()[:1])
    RunDir(folder).write_config(config.to_dict(trainer.config))
    RunDir(folder).write_data_spec(trainer.task.data_spec)
    checkpoints = Checkpointer(folder)
    checkpoints.save(1, random_state(trainer, 0.05), {"seconds": 1.0})
    checkpoints.close()
    return str(folder)


def begun(source, **fields):
    """Returns the trainer of a run that begins with a checkpoint, and its warm start."""
    trainer = Trainer.of(tiny_config(init_from=source, **fields), jax.devices()[:1])
    check_source(trainer.config, trainer.task, source)
    return trainer, open_source(trainer.config, trainer.abstract_state.params)


SEQPE = {"variant": "seqpe", "encoding__rotary_pairs": 6}
GATE = {"variant": "alibi", "encoding__gate": "forget"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "theirs, ours, line",
    [
        (
            {"variant": "rotary"},
            SEQPE,
            "keeps all N parameters; draws N (encoding/encoder, encoding/qk_map); encoding.kind: rotary -> seqpe",
        ),
        (
            SEQPE,
            {"variant": "none"},
            "keeps N parameters; drops N (encoding/encoder, encoding/qk_map); encoding.kind: seqpe -> none",
        ),
        (SEQPE, {}, "keeps all N parameters; encoding.rotary_pairs: 6 -> 0"),
        (
            {},
            {"encoding__position_heads": 1},
            "keeps N parameters; draws N (encoding/encoder, encoding/qk_map); encoding.position_heads: 0 -> 1",
        ),
        (
            GATE,
            {"variant": "alibi"},
            f"keeps N parameters; drops N (model/blocks/{GATE_PARAMS}); encoding.gate: forget -> none",
        ),
        (
            GATE,
            GATE | {"encoding__gate": "cable"},
            f"keeps N parameters; draws N (model/blocks/{GATE_PARAMS}); encoding.gate: forget -> cable",
        ),
        (GATE | {"model__scan": True}, GATE | {"model__kind": "decoder"}, ""),
    ],
)
def test_one_line_says_what_is_reused_drawn_and_dropped(tmp_path, theirs, ours, line):
    source = saved(tmp_path / "run", **theirs)
    found = begun(source, **ours)[1]
    shown = re.sub(r"[\d,]*\d,?\d* (?=parameters|\()", "N ", found.describe().removeprefix(f"starting from {source}"))
    assert shown == f": {line}" * bool(line)
    assert found.losses_differ == bool(line)


def test_a_run_begins_with_all_but_the_encoding(tmp_path):
    """Stacked over layers or not; the loss of a batch says how far the new encoding has moved it."""
    source = saved(tmp_path / "run", variant="rotary", model__scan=True)
    trainer, found = begun(source, **GATE, optimizer__freeze=("model/[!b]*",))
    state, (line, moved) = trainer.init_or_warm_start()
    params, stored = (flatten_dict(tree["model"]) for tree in (state.params, found.source.params))
    assert line.startswith(f"starting from {source}: keeps all ") and "draws" in line
    np.testing.assert_array_equal(params["blocks_0/qkv/kernel"], stored["blocks/layers/qkv/kernel"][0])
    np.testing.assert_array_equal(params["token_embedding/embedding"], stored["token_embedding/embedding"])
    fresh = trainer.init_state().params["model"]["blocks_0"]["fading"]["kernel"]
    np.testing.assert_array_equal(params["blocks_0/fading/kernel"], fresh)
    before, after, difference = map(float, re.fullmatch(r".*: (\d.\d+) of .*, (\d.\d+) as .* \((.*)\)", moved).groups())
    assert abs(after - before - difference) < 2e-4 and 5 < before < 6.5 and difference != 0


@pytest.mark.slow
@pytest.mark.parametrize("length", [8, 40])
def test_a_learned_table_is_cut_or_interpolated(tmp_path, length):
    source = saved(tmp_path / "run", variant="learned")
    trainer, found = begun(source, variant="learned", data__length=length, eval__lengths=(length,))
    drawn = random_params(trainer, 0.05, seed=3)
    params, stored = found.params(drawn), found.source.params
    table = stored["encoding"]["table"]
    expected = table[:length] if length < 16 else resize_table(table, (length,), "linear")
    np.testing.assert_allclose(params["encoding"]["table"], expected, rtol=1e-6, atol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, params["model"], stored["model"])
    verb = "cuts" if length < 16 else "interpolates"
    assert f"; {verb} the learned table from 16 to {length} positions" in found.describe()


def test_other_sizes_are_refused(tmp_path):
    source = written(tmp_path / "run", tiny_config())
    run = Trainer.of(tiny_config(model__width=48, model__activation="relu"), jax.devices()[:1])
    with pytest.raises(
        InputError, match="differs in model.activation: gelu_tanh -> relu; .*model.width: 24 -> 48"
    ) as caught:
        check_source(run.config, run.task, source)
    assert f"or take its config: --config={source}" in str(caught.value)
    with pytest.raises(InputError, match="has 256 tokens, and this one 300 .model.vocabulary"):
        begun(saved(tmp_path / "other", variant="none"), variant="none", model__vocabulary=300)


def test_fields_on_which_parameters_do_not_depend(tmp_path):
    """Also of a run of an older version, which stored the fields of all encodings."""
    unused = all_fields() | {"kind": "rotary", "width": 96, "qk": "multi"}
    run = Trainer.of(tiny_config(variant="rotary", model__dropout=0.2), jax.devices()[:1])
    check_source(run.config, run.task, written(tmp_path / "rotary", tiny_config(variant="rotary"), **unused))


@pytest.mark.slow
def test_readme_swaps_the_positions_of_a_folder(tmp_path, monkeypatch, capsys):
    """The code of README, on a small Hugging Face decoder, or on a run where that is missing."""
    monkeypatch.setenv("SEQPE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 60)
    folder, decoder = tmp_path / "decoder", goldens.FOLDER / "hf" / "llama"
    if decoder.is_dir():
        shutil.copytree(decoder, folder)
        character_tokenizer(folder / "tokenizer.json")
    else:
        saved(folder, variant="rotary")
    fields = {"data.paths": (str(tmp_path / "text.txt"),), "data.length": 16, "steps": 1}
    fields |= {"batch_size": 8, "eval.lengths": (16,), "encoding.layers": 1, "encoding.width": 12, "encoding.heads": 1}
    fields |= {"data.lossy_tokenizer": True} if decoder.is_dir() else {}
    fields |= {f"objective.{loss}.weight": 0.0 for loss in ("contrastive", "distillation")}
    monkeypatch.setattr(seqpe_jax.Model, "generate", lambda *_, **__: "text")
    load = config.load
    monkeypatch.setattr(config, "load", lambda page, given: load(page, given | fields))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "seqpe+rotary" in block)
    for shown, real in (("path/of/a/decoder", folder), ("runs/swapped", tmp_path / "run")):
        assert shown in block
        block = block.replace(shown, str(real))
    exec(block, {})
    model = seqpe_jax.load(tmp_path / "run")
    printed = capsys.readouterr().out
    assert (
        "encoding/start_scale); encoding.kind: rotary -> seqpe" in printed and "as this run begins (+0.0000)" in printed
    )
    assert (model.config.encoding.kind, model.step) == ("seqpe", 1) and model.config.encoding.rotary_pairs > 0
