"""Hugging Face folders: settings, weights in one file or in shards, GPT-2 variants and tokenizers."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from seqpe_jax.data.tokenizers import load_tokenizer
from seqpe_jax.errors import InputError
from seqpe_jax.interop import convert, load_reference
from seqpe_jax.interop.hf import read_mapping
from tests.interop.test_conversion import tokenizer_file

pytestmark = pytest.mark.usefixtures("one_device")


def test_what_is_no_mapping_is_refused(tmp_path):
    nested = (b"[" * 100_000, b'{"a":' * 50_000, b"- " * 50_000)
    other = (b"a: [1", b"\xff\xfe\x00", b"when: 2001-99-99", b"3", b"", b"!!python/object/apply:os.system ['true']")
    for content in nested + other:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(InputError, match="config.json (is neither JSON nor YAML|must hold a mapping)") as caught:
            read_mapping(tmp_path / "config.json")
        assert "\n" not in str(caught.value)


WIDTH = 8
LAYERS = 2


def hugging_face(folder, seed=0, **settings):
    """The config.json of a small GPT-2 as `transformers` writes it, and its arrays."""
    tokens = settings.get("vocab_size", 40)
    state = {"wte.weight": (tokens, WIDTH), "wpe.weight": (16, WIDTH), "ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    for layer in range(LAYERS):
        shapes = dict.fromkeys(("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"), (WIDTH,))
        for name, rows, columns in (
            ("attn.c_attn", 1, 3),
            ("attn.c_proj", 1, 1),
            ("mlp.c_fc", 1, 4),
            ("mlp.c_proj", 4, 1),
        ):
            shapes |= {f"{name}.weight": (rows * WIDTH, columns * WIDTH), f"{name}.bias": (columns * WIDTH,)}
        state |= {f"h.{layer}.{name}": shape for name, shape in shapes.items()}
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in state.items()}
    folder.mkdir(exist_ok=True)
    known = {"model_type": "gpt2", "vocab_size": 40, "n_positions": 16, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2}
    known |= {"activation_function": "gelu_new", "n_ctx": 16, "architectures": ["GPT2LMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(known | settings))
    return arrays


@pytest.mark.slow
def test_hugging_face_gpt2(tmp_path):
    source = tmp_path / "gpt2"
    arrays = hugging_face(source) | {"h.0.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.float32))}
    save_file(arrays, source / "model.safetensors")
    tokenizer_file(source / "tokenizer.json")
    (source / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    report = convert.convert_to_run(str(source), str(tmp_path / "run"))
    assert load_tokenizer(tmp_path / "run").eos_id == 2
    assert report["left_out"] == {"h.0.attn.bias": "causal mask"} and report["encoding"] == "learned"
    tokens = np.random.default_rng(1).integers(0, 40, (2, 16))
    found = np.asarray(load_reference(str(tmp_path / "run")).logits(tokens))
    np.testing.assert_allclose(found, plain_gpt2(arrays, tokens, LAYERS, heads=2), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, options",
    [
        ({"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}, {"by_layer": True}),
        ({"scale_attn_weights": False}, {"scaled": False}),
        ({"tie_word_embeddings": False}, {}),
        ({"tie_word_embeddings": True}, {}),
    ],
)
def test_what_transformers_can_make_of_a_gpt2_is_read(tmp_path, settings, options):
    """Stanford's runs scale attention by layer; a head of its own is read, and one that the config ties is not."""
    arrays = hugging_face(tmp_path / "gpt2", **settings)
    head = np.random.default_rng(9).normal(0, 0.3, (40, WIDTH)).astype(np.float32)
    save_file(arrays | {"lm_head.weight": head}, tmp_path / "gpt2" / "model.safetensors")
    own = settings.get("tie_word_embeddings", True) is False
    expected = arrays | ({"lm_head.weight": head} if own else {})
    tokens = np.random.default_rng(1).integers(0, 40, (2, 16))
    model = load_reference(str(tmp_path / "gpt2"))
    np.testing.assert_allclose(model.logits(tokens), plain_gpt2(expected, tokens, LAYERS, 2, **options), atol=2e-5)
    assert ("output_embedding" in model.params["model"]) == own
    model.save(tmp_path / "run")
    again = load_reference(str(tmp_path / "run"))
    np.testing.assert_allclose(again.logits(tokens), model.logits(tokens), atol=1e-6)
    if own:
        with pytest.raises(InputError, match="model.tied=False"):
            convert.convert_to_reference(str(tmp_path / "run"), str(tmp_path / "back"))


@pytest.mark.slow
def test_weights_in_shards_are_read(tmp_path):
    source = tmp_path / "gpt2"
    arrays = hugging_face(source)
    save_file(arrays, source / "model.safetensors")
    tokens = np.random.default_rng(1).integers(0, 40, (2, 16))
    expected = load_reference(str(source)).logits(tokens)
    (source / "model.safetensors").unlink()
    files = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    places = {name: files[at % 2] for at, name in enumerate(arrays)}
    for file in files:
        save_file({name: leaf for name, leaf in arrays.items() if places[name] == file}, source / file)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    np.testing.assert_array_equal(load_reference(str(source)).logits(tokens), expected)

    def refused(words, change):
        index.write_text(json.dumps({"weight_map": change}))
        with pytest.raises(InputError, match=words) as caught:
            load_reference(str(source))
        assert "\n" not in str(caught.value)

    refused("lacks h.9.weight, which model.safetensors.index.json says is there", places | {"h.9.weight": files[0]})
    refused("a file outside of its folder, '../else.safetensors'", places | {"wte.weight": "../else.safetensors"})
    refused("must hold a weight_map", [])
    refused(
        "00003.safetensors is missing: model.safetensors.index.json names 3 parts", places | {"x": "00003.safetensors"}
    )
    (source / files[1]).write_bytes(b"damaged")
    refused(f"{files[1]} is damaged or cut short", places)


@pytest.mark.slow
def test_a_tokenizer_in_two_files_ends_texts_as_its_settings_files_say(tmp_path):
    import tokenizers

    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<stop>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    files = (tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "config.json").write_text('{"eos_token_id": 256}')
    assert convert._load_tokenizer(files, "").eos_id == 256
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    found = convert._load_tokenizer(files, "")
    assert found.eos_id == 257 and not found.lost_characters("Grüße, 世界!\n")
    (tmp_path / "added_tokens.json").write_text('{"<new>": 258}')
    for file in files:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert convert._load_tokenizer(files, "").encode(b"<new>").tolist() == [258]
    files[0].write_text("{")
    with pytest.raises(InputError, match="vocab.json and merges.txt in .* are no tokenizer"):
        convert._load_tokenizer(files, "")


@pytest.mark.slow
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_a_hugging_face_folder_generates_with_its_tokenizer(tmp_path, files):
    import tokenizers

    source = tmp_path / "theirs"
    save_file(hugging_face(source, vocab_size=300), source / "model.safetensors")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["line of text"], vocab_size=300)
    if files == "tokenizer.json":
        made.save(str(source / files))
    else:
        made.save_model(str(source))
    model = load_reference(str(source))
    assert model.tokenizer.decode(model.tokenizer.encode(b"a line")) == "a line"
    assert isinstance(model.generate("line of", max_new_tokens=2), str)


def plain_gpt2(arrays, tokens, layers, heads, scaled=True, by_layer=False):
    """GPT-2's logits in float64 NumPy, straight from its definition.

    Args:
      scaled: attention logits are divided by the square root of the head width; by_layer: and by the layer's number.
    """
    p = {name: leaf.astype(np.float64) for name, leaf in arrays.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = p["wte.weight"][tokens] + p["wpe.weight"][: tokens.shape[1]]
    batch, length, width = x.shape
    for layer in range(layers):
        h = f"h.{layer}"
        qkv = norm(x, f"{h}.ln_1") @ p[f"{h}.attn.c_attn.weight"] + p[f"{h}.attn.c_attn.bias"]
        q, k, v = qkv.reshape(batch, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
        scale = (np.sqrt(width // heads) if scaled else 1.0) * (layer + 1 if by_layer else 1)
        logits = np.where(np.tril(np.ones((length, length))) > 0, q @ k.swapaxes(-1, -2) / scale, -1e30)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + mixed @ p[f"{h}.attn.c_proj.weight"] + p[f"{h}.attn.c_proj.bias"]
        u = norm(x, f"{h}.ln_2") @ p[f"{h}.mlp.c_fc.weight"] + p[f"{h}.mlp.c_fc.bias"]
        u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + u @ p[f"{h}.mlp.c_proj.weight"] + p[f"{h}.mlp.c_proj.bias"]
    return norm(x, "ln_f") @ p.get("lm_head.weight", p["wte.weight"]).T
