"""Folders that are written open in `transformers` with equal logits, and folders that it writes open here.

Needs the extra `hf-test` (PyTorch and transformers), and skips without it.
"""

import json

import numpy as np
import pytest
import tokenizers

from seqpe_jax import loading
from seqpe_jax.config import Config
from seqpe_jax.interop.hf import read_mapping
from seqpe_jax.model import Model
from seqpe_jax.models.build import DataSpec, ModelSpec
from tests import goldens
from tests.tiny import draw_params, tiny_config

torch = pytest.importorskip("torch", reason="needs the extra hf-test: pip install seqpe_jax[hf-test]")
transformers = pytest.importorskip("transformers", reason="needs the extra hf-test: pip install seqpe_jax[hf-test]")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

TOKENS = np.random.default_rng(3).integers(0, 300, (2, 48))
LLAMA = {"model__kind": "llama", "model__kv_heads": 1}
OURS = {
    "gpt2": ("learned", {}),
    "gpt_neox": ("rotary", {}),
    "llama": ("rotary", LLAMA),
    "llama with linear scaling": ("rotary", LLAMA | {"encoding__scaling": "linear", "encoding__scaling_factor": 4.0}),
    "mistral": ("rotary", LLAMA | {"model__window": 8}),
    "smollm3": ("none", LLAMA),
    "smollm3 with some rope": ("rotary", LLAMA | {"encoding__layers_with": (1, 0)}),
    "gemma2": ("rotary", {"model__kind": "gemma2", "model__window": 8, "model__kv_heads": 1}),
    "olmo2": ("rotary", {"model__kind": "olmo2"}),
    "qwen3": ("rotary", {"model__kind": "qwen3", "model__tied": False}),
    "granite": ("rotary", {"model__kind": "granite"}),
}


def random_model(settings: Config) -> Model:
    """A model with random weights, none of which is zero or one."""
    spec = ModelSpec.of(settings, DataSpec(vocabulary=300))
    return Model(settings, spec, DataSpec(vocabulary=300), lambda: draw_params(spec.shapes, 0.2))


def their_logits(folder, tokens) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_this_package_opens_in_transformers(name, tmp_path):
    variant, changes = OURS[name]
    settings = tiny_config(variant=variant, model__layers=3, data__length=48, model__vocabulary=300, **changes)
    model = random_model(settings)
    report = model.save_huggingface(tmp_path / "theirs")
    family = name.partition(" ")[0].replace("_", "")
    assert report["architecture"].lower() == (f"{family}lmheadmodel" if family == "gpt2" else f"{family}forcausallm")
    goldens.close(model.logits(TOKENS), their_logits(tmp_path / "theirs", TOKENS), 2e-5)
    text = "bytes: Grüße, \\n\\t 世界"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert tokenizer.encode(text) == list(text.encode()) and tokenizer.decode(tokenizer.encode(text)) == text


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4.0, 8.0]}
ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16} | FACTORS,
}


def their_model(config_class, **changes):
    torch.manual_seed(0)
    config = config_class(**SIZES | changes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def compare(model, folder, lengths=(12, 48)):
    ours = loading.open_folder(folder)
    for length in lengths:
        with torch.no_grad():
            expected = model(torch.from_numpy(TOKENS[:, :length])).logits.numpy()
        goldens.close(ours.logits(TOKENS[:, :length]), expected, 2e-5)
    return ours


@pytest.mark.parametrize("name", ROPES)
def test_shards_and_ropes_that_depend_on_the_window(name, tmp_path):
    """The window of 48 tokens is longer than max_position_embeddings, that of 12 shorter than the original one."""
    model = their_model(transformers.LlamaConfig, rope_parameters=ROPES[name], num_key_value_heads=2)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    compare(model, tmp_path)


def test_an_older_neox_folder_with_pickled_weights_and_a_tokenizer(tmp_path):
    """A folder as transformers 4 wrote it: rotary_emb_base and rotary_pct, weights and buffers in a .bin."""
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    model = their_model(transformers.GPTNeoXConfig, rope_parameters=rope)
    model.config.save_pretrained(tmp_path)
    settings = read_mapping(tmp_path / "config.json") | {"rotary_emb_base": 500, "rotary_pct": 0.5}
    del settings["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    torch.save(model.state_dict() | {"gpt_neox.layers.0.attention.bias": mask}, tmp_path / "pytorch_model.bin")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["a line of text"], vocab_size=300)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<|endoftext|>")
    theirs.save_pretrained(tmp_path)
    ours = compare(model, tmp_path, (48,))
    assert ours.tokenizer.encode(b"a text").tolist() == theirs.encode("a text")
    assert ours.tokenizer.eos_id == theirs.eos_token_id
