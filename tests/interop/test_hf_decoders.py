"""Folders of Hugging Face decoders: logits, greedy texts, there and back bit for bit, fields that are refused by name."""

import json
import pathlib
import shutil

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from seqpe_jax import config, loading, trees
from seqpe_jax.errors import InputError
from seqpe_jax.inference import export, generate
from seqpe_jax.inference.decode import Sampling
from seqpe_jax.interop import convert, hf_decoders, hf_families
from seqpe_jax.interop.hf import read_mapping
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks.base import ExportSignature
from seqpe_jax.tasks.evaluate import EvalRequest, evaluate
from seqpe_jax.training.loop import train_and_evaluate
from tests import goldens as stored
from tests.interop.test_conversion import tokenizer_file
from tests.tiny import ROOT, tiny_config

pytestmark = pytest.mark.usefixtures("one_device")

# Twelve folders; one of them, with its first row of tokens, stands in the repository.
FOLDER = stored.FOLDER / "hf" if (stored.FOLDER / "hf").is_dir() else ROOT / "tests" / "fixtures" / "hf"
NAMES = sorted(file.parent.name for file in FOLDER.glob("*/expected.npz"))
EOS = 2
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
# A value of a field of each family that no reader can know.
ALTERED = {
    "gemma2": ("hidden_activation", "gelu_quick"),
    "gpt_neox": ("attention_bias", False),
    "granite": ("hidden_act", "gelu_quick"),
    "llama": ("pretraining_tp", 2),
    "llama3_scaled": ("rope_parameters", {"rope_type": "llama4", "factor": 8.0}),
    "llama_linear": ("rope_scaling", {"type": "quadratic", "factor": 4.0}),
    "llama_yarn": ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "shrink": 2.0}),
    "mistral_window": ("sliding_window", "wide"),
    "olmo2": ("attention_bias", True),
    "qwen2": ("layer_types", ["full_attention", "chunked_attention", "full_attention"]),
    "qwen3": ("num_key_value_heads", 2.5),
    "smollm3": ("no_rope_layers", [1, 2, 0]),
}


@pytest.fixture(scope="module", params=NAMES)
def folder(request) -> pathlib.Path:
    """Each folder of `../shared/goldens/hf`."""
    return FOLDER / request.param


def settings_of(folder: pathlib.Path) -> dict:
    return read_mapping(folder / "config.json")


def greedy(model, tokens, new_tokens=12):
    """Greedy continuations of rows of tokens through the cache."""
    known = np.ones(model.data_spec.vocabulary, bool)
    sampling = Sampling(new_tokens)
    found = generate.generate(
        model.compiled, model.config, model.params, list(tokens), sampling, known, keep_logits=True
    )
    return [(one.tokens, one.logits) for one in found]


def same_text(found, expected, logits) -> None:
    """Asserts equal tokens up to the end of a text; two whose logits lie within 1e-4 are a tie."""
    for token, want, row in zip(found, expected, logits, strict=True):
        assert token == want or abs(float(row[token]) - float(row[want])) < 1e-4
        if token != want or want == EOS:
            return  # after a tie texts differ


@pytest.mark.slow
def test_a_folder_is_read_and_written(folder, tmp_path):
    arrays = np.load(folder / "expected.npz")
    model = loading.open_folder(folder)
    # Not compiled as a whole: the folders share shapes, so that each operation is compiled once for all of them.
    params = jax.tree.map(jnp.asarray, model.params)
    stored.close(model.model_spec.logits(params, jnp.asarray(arrays["tokens"])), arrays["logits"], 2e-5)
    report = model.save_huggingface(tmp_path / "back")
    written, source = (load_file(path / "model.safetensors") for path in (tmp_path / "back", folder))
    assert written.keys() == source.keys()
    assert all(np.array_equal(written[name], source[name]) for name in source)
    assert report["architecture"] in settings_of(folder)["architectures"]
    assert loading.folder_config(tmp_path / "back") == model.config
    for file in ("config.json", "generation_config.json"):
        assert TOKEN_IDS.items() <= read_mapping(tmp_path / "back" / file).items()


def test_fields_are_refused_by_their_names(folder):
    settings = settings_of(folder)
    name, value = ALTERED[folder.name]
    for changed, words in (
        ({name: value}, name.removesuffix("s") if name.startswith("rope") else f"field '{name}'"),
        ({"attention_sinks": 4}, "field 'attention_sinks' is unknown for model_type"),
        ({"num_hidden_layers": None}, "field 'num_hidden_layers' is missing"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            hf_decoders.read(folder, settings | changed)
        assert "\n" not in str(caught.value)
    neutral = {"tokenizer_class": "X", "is_decoder": False, "problem_type": None, "attention_sinks": None, "top_p": 0.9}
    assert hf_decoders.read(folder, settings | neutral).config == hf_decoders.read(folder, settings).config


@pytest.mark.long
def test_greedy_texts_through_the_cache_and_through_an_export(folder):
    """Twelve folders take a minute; `test_a_window_is_a_ring_in_the_cache` holds the hardest of them in every run."""
    expected, model = np.load(folder / "expected.npz"), loading.open_folder(folder)
    prompts, texts = expected["tokens"][:, :20], expected["greedy"][:, 20:]
    for (found, logits), text in zip(greedy(model, prompts), texts, strict=True):
        same_text(found, text, logits)
    call = exported_logits(model, 40)
    window = np.zeros((len(prompts), 40), np.int32)
    window[:, :20] = prompts
    ended = np.zeros(len(prompts), bool)
    for at in range(20, 32):
        rows = np.asarray(call(window))[:, at - 1]
        for row, text in enumerate(texts):
            if not ended[row]:
                same_text([rows[row].argmax()], [text[at - 20]], [rows[row]])
                ended[row] = rows[row].argmax() != text[at - 20] or text[at - 20] == EOS
        window[:, at] = rows.argmax(-1)


@pytest.mark.long
def test_seqpe_in_a_decoder_trains_on_a_mesh_as_on_one_device(folder, tmp_path, capsys):
    """One step from each folder, with SeqPE next to its own rotary positions, over fsdp and tensor."""
    source = tmp_path / "decoder"
    shutil.copytree(folder, source)
    character_tokenizer(source / "tokenizer.json")
    (tmp_path / "text.txt").write_text("a line of text, and another one\n" * 60)
    fields = {"init_from": str(source), "data.name": "text_files", "data.paths": (str(tmp_path / "text.txt"),)}
    fields |= {"data.length": 16, "eval.lengths": (16,), "batch_size": 8, "steps": 1, "optimizer.epsilon": 1e-3}
    fields |= {
        "encoding.layers": 1,
        "encoding.width": 12,
        "encoding.heads": 1,
        "data.cache_dir": str(tmp_path / "cache"),
    }
    fields |= {
        "objective.contrastive.batch": 8,
        "objective.distillation.batch": 8,
        "objective.distillation.offsets": 8,
        "data.lossy_tokenizer": True,
    }
    rates = ("encoding.dropout", "encoding.attention_dropout", "model.dropout", "model.attention_dropout")
    fields |= dict.fromkeys((*rates, "model.embedding_dropout"), 0.0)  # masks on a mesh are others
    found = {}
    for name, mesh in (("one", {}), ("mesh", {"mesh.fsdp": 2, "mesh.tensor": 2})):
        train_and_evaluate(config.load(f"{source}:seqpe+rotary", fields | mesh), str(tmp_path / name))
        shown = capsys.readouterr()
        assert "(+0.0000)" in shown.out + shown.err  # the model computes what it computed before
        found[name] = RunDir(tmp_path / name).read_metrics()[-1], loading.load(tmp_path / name).params
    one, mesh = found["one"], found["mesh"]
    assert mesh[0]["train/loss"] == pytest.approx(one[0]["train/loss"], rel=1e-5)
    before = loading.open_folder(source).params["model"]
    moved = 0
    for (name, new), (_, expected) in zip(
        trees.flatten_dict(mesh[1]).items(), trees.flatten_dict(one[1]).items(), strict=True
    ):
        new, expected = np.asarray(new), np.asarray(expected)
        np.testing.assert_allclose(new, expected, atol=1e-4 * np.abs(expected).max() + 1e-6, err_msg=name)
        old = trees.flatten_dict({"model": before}).get(name)
        moved += old is not None and not np.array_equal(old, new)
    assert moved > 10


def character_tokenizer(file: pathlib.Path) -> None:
    """Writes a tokenizer whose tokens are the printable characters of ASCII."""
    words = {word: n for n, word in enumerate(["[UNK]", *map(chr, range(32, 127))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(file))


def exported_logits(model, length: int):
    """The logits of a model as StableHLO that another process would read, a function of tokens [2, length]."""
    shape = ("batch", "length")
    signature = ExportSignature("tokens", "int32", shape, {"length": length}, (*shape, "131"), "", "")
    params = model.compiled.params_with_table(model.params, (length,))
    logits = model.model_spec.with_precomputed_table((length,)).logits
    program = jax.export.deserialize(bytearray(export.export_stablehlo(logits, params, signature, ("cpu",))))
    leaves = trees.flatten_dict(params)
    call = jax.jit(program.call)
    return lambda tokens: call(leaves, jnp.asarray(tokens))


def test_a_window_is_a_ring_in_the_cache():
    folder = FOLDER / "mistral_window"
    if not folder.is_dir():
        pytest.skip("no ../shared/goldens/hf next to the repository")
    expected = np.load(folder / "expected.npz")
    (found, logits), *_ = greedy(loading.open_folder(folder), expected["tokens"][:1, :20])
    same_text(found, expected["greedy"][0, 20:], logits)


def tiny_llama(folder: pathlib.Path, **changes) -> pathlib.Path:
    """A folder of a Llama with random weights and a tokenizer."""
    settings = {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
    } | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = {"model.embed_tokens": (40, 16), "model.norm": (16,), "lm_head": (40, 16)}
    shapes |= {f"model.layers.0.{name}_layernorm": (16,) for name in ("input", "post_attention")}
    rows = {"self_attn.q": (16, 16), "self_attn.k": (8, 16), "self_attn.v": (8, 16), "self_attn.o": (16, 16)}
    rows |= {"mlp.gate": (24, 16), "mlp.up": (24, 16), "mlp.down": (16, 24)}
    shapes |= {f"model.layers.0.{name}_proj": shape for name, shape in rows.items()}
    draw = np.random.default_rng(0)
    arrays = {f"{name}.weight": draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(
        arrays | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}, folder / "model.safetensors"
    )
    tokenizer_file(folder / "tokenizer.json")
    return folder


@pytest.mark.slow
def test_a_folder_is_evaluated_and_converted_with_its_tokenizer(tmp_path):
    source = tiny_llama(tmp_path / "llama", finetuned_by="someone")
    with pytest.raises(InputError, match="--ignore-fields=finetuned_by passes over it"):
        loading.open_folder(source)
    with pytest.raises(InputError, match="has no field 'finetuned'. Did you mean 'finetuned_by'"):
        loading.open_folder(source, ignore_fields=["finetuned"])
    model = loading.open_folder(source, ignore_fields=["finetuned_by"])
    (tmp_path / "text.txt").write_text("some letters without a meaning " * 40)
    request = EvalRequest(
        ((16,), (32,)), split="validation", data="text_files", paths=(str(tmp_path / "text.txt"),), lossy=True
    )
    report, _ = evaluate(model, request)
    assert [result["length"] for result in report["results"]] == [16, 32] and report["checkpoint"] == str(source)
    tokens = np.arange(32)[None] % 40
    logits = model.logits(tokens)
    done = convert.convert_to_run(str(source), str(tmp_path / "run"), ignore_fields=["finetuned_by"])
    assert done["left_out"] == {"model.layers.0.self_attn.rotary_emb.inv_freq": "frequencies of rotary positions"}
    with pytest.raises(InputError, match="--ignore-fields is for the config.json of Hugging Face"):
        loading.open_folder(tmp_path / "run", ignore_fields=["finetuned_by"])
    convert.convert_to_huggingface(str(tmp_path / "run"), str(tmp_path / "back"), "bfloat16")
    for file, changes in (("model.safetensors", {}), ("tokenizer.json", {}), ("config.json", {"dtype": "bfloat16"})):
        assert (tmp_path / "back" / file).is_file()
        if changes:
            assert changes.items() <= read_mapping(tmp_path / "back" / file).items()
    again = loading.load(tmp_path / "back")
    assert again.config.model == model.config.model
    assert np.abs(np.asarray(again.logits(tokens) - logits)).max() < 0.02 * np.abs(logits).max()


FAMILY_OF = {
    "learned": ("gpt2", {}),
    "rotary": ("gpt_neox", {}),
    "none": ("smollm3", {"model__kind": "llama"}),
    "rotary of mistral": ("mistral", {"model__kind": "llama", "model__window": 8}),
}


@pytest.mark.parametrize("variant", FAMILY_OF)
def test_models_of_this_package_have_a_family(variant):
    family, changes = FAMILY_OF[variant]
    settings = tiny_config(variant=variant.partition(" ")[0], model__vocabulary=300, **changes)
    assert hf_families.settings_of(settings)[0].kind == family


@pytest.mark.parametrize(
    "variant, changes, words",
    [
        ("seqpe", {}, "encoding.kind='seqpe': Hugging Face has no architecture with it; .*seqpe_jax.export"),
        ("alibi", {}, "encoding.kind='alibi'"),
        ("rotary", {"encoding__log_scaling": True}, "encoding.log_scaling"),
        (
            "rotary",
            {"model__kind": "llama", "model__norm_placement": "both"},
            "model.norm_placement='pre', here 'both'",
        ),
    ],
)
def test_what_hugging_face_has_not_is_refused(variant, changes, words):
    settings = tiny_config(variant=variant, model__vocabulary=300, **changes)
    with pytest.raises(InputError, match=words) as caught:
        hf_families.settings_of(settings)
    assert "StableHLO" in str(caught.value) and "\n" not in str(caught.value)
