"""Models of the PyTorch reference: recorded arrays, its files, and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from seqpe_jax.errors import InputError
from seqpe_jax.interop import from_state_dicts, load_reference
from seqpe_jax.interop.foreign import Arrays
from tests.goldens import close, load, names, under

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_reference_s_checkpoints(goldens, kind):
    folder = goldens / "checkpoints" / kind
    model, expected = load_reference(str(folder)), np.load(folder / "expected_output.npz")
    inputs = expected["in/input_ids"] if kind == "text" else np.moveaxis(expected["in/images"], 1, -1)
    compared = 0
    for name in expected.files:
        if not name.startswith("out/logits/"):
            continue
        case = name.rpartition("/")[2]
        if kind == "text":
            start, length = (int(part) for part in case.removeprefix("start").split("_T"))
            found, positions = model.logits(inputs[:, :length], start), np.arange(start, start + length)
        else:
            start = [int(part) for part in case.removeprefix("start").split("_")]
            found = model.logits(inputs, start)
            positions = np.stack(np.meshgrid(*(np.arange(4) + first for first in start), indexing="ij"), -1).reshape(
                -1, 2
            )
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=2e-5)
        vectors = expected[f"out/pe/{case}"][0]
        np.testing.assert_allclose(model.encode_positions(positions), vectors, rtol=0, atol=2e-5)
        compared += 1
    assert compared >= 2


def test_the_last_epoch_and_one_file_give_the_same(goldens, tmp_path):
    folder = goldens / "checkpoints" / "image"
    (tmp_path / "ckpt_epoch_7.pth").symlink_to(folder / "ckpt_epoch_7.pth")
    best, last = load_reference(str(folder / "best_model.pth")), load_reference(str(tmp_path))
    assert jax.tree.map(np.shape, best.params) == jax.tree.map(np.shape, last.params) and best.config == last.config


@pytest.mark.parametrize("name", [name for name in names("vit") if name != "absent"][:2] + ["rotary_2d_a"])
def test_vit_without_a_jit_of_its_own(goldens, name):
    spec, arrays = load(goldens, "vit", name)
    model = from_state_dicts(spec, under(arrays, "param/"), signal=arrays.get("in/pe"))
    close(model.logits(np.moveaxis(arrays["in/images"], 1, -1)), arrays["out/logits"], 2e-5)


def test_an_encoder_s_settings_are_read_off_its_arrays(goldens):
    spec, arrays = load(goldens, "gpt2", "attn_scalar_single_mh1_a")
    encoder_spec, encoder = load(goldens, "encoder", "enc_outproj_a")
    state = under(encoder, "param/")
    grown = np.random.default_rng(0).normal(0, 0.1, (48, state["out_proj.weight"].shape[1])).astype(np.float32)
    state |= {"out_proj.weight": grown, "out_proj.bias": np.zeros(48, np.float32)}
    explicit = spec | {"encoder": {key: value for key, value in encoder_spec.items() if key not in ("kind", "note")}}
    explicit["encoder"] |= {"out_proj_dim": 48, "num_attention_heads": 3}
    tokens = np.asarray(arrays["in/input_ids"])
    both = [from_state_dicts(config, under(arrays, "param/"), state).logits(tokens) for config in (spec, explicit)]
    np.testing.assert_array_equal(*both)


def refused(goldens, match, change=None, **settings):
    spec, arrays = load(goldens, "gpt2", "attn_scalar_single_mh1_a")
    state = under(arrays, "param/")
    if change:
        change(state)
    with pytest.raises(InputError, match=match):
        from_state_dicts(spec | settings, state, signal=arrays["in/pe"])


def test_what_does_not_belong_together_is_refused_by_name(goldens):
    refused(goldens, "lacks tensors.*transformer.wte.weight", lambda state: state.pop("transformer.wte.weight"))
    refused(goldens, "has tensors.*more.weight", lambda state: state.update({"more.weight": np.zeros(3)}))
    broken = np.full((97, 48), np.nan, np.float32)
    refused(goldens, "token_embedding/embedding.*NaN", lambda state: state.update({"transformer.wte.weight": broken}))
    refused(goldens, "shape.*97, 48.*96, 48", None, vocab_size=96)
    refused(goldens, "'n_layers' of a gpt2 is unknown.*n_layer", None, n_layers=2)
    refused(goldens, "pe_type='rope'", None, pe_type="rope")
    refused(goldens, "activation_function='gelu_fast'", None, activation_function="gelu_fast")
    with pytest.raises(InputError, match="kind is 'bert'"):
        from_state_dicts({"kind": "bert"}, {})
    with pytest.raises(InputError, match="no weights"):
        from_state_dicts({"kind": "gpt2"}, None)


def test_wrong_inputs_are_refused(goldens):
    text, image = (load_reference(str(goldens / "checkpoints" / kind)) for kind in ("text", "image"))
    with pytest.raises(InputError, match=r"tokens int32\[B, L\].*\(3,\)"):
        text.logits(np.zeros(3, np.int32))
    with pytest.raises(InputError, match="position 100031 is outside 0 .. 99999"):
        text.logits(np.zeros((1, 32), np.int32), start=100_000)
    with pytest.raises(InputError, match="2 int"):
        image.logits(np.zeros((1, 32, 32, 3), np.float32), start=3)
    with pytest.raises(InputError, match=r"int32\[R, 2\]"):
        image.encode_positions(np.arange(4))
    spec, arrays = load(goldens, "gpt2", "nope_a")
    with pytest.raises(InputError, match="no encoder of positions"):
        from_state_dicts(spec, under(arrays, "param/")).encode_positions(np.arange(4))
    spec, arrays = load(goldens, "encoder", "enc1d_a")
    with pytest.raises(InputError, match="position encoder alone"):
        from_state_dicts(spec, None, under(arrays, "param/")).logits(np.zeros((1, 4), np.int32))


@pytest.mark.parametrize(
    "file, change, match",
    [
        ("config.json", {"n_layers": 3}, "config.json.*'n_layers' is unknown.*n_layer"),
        ("config.json", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx.*only False"),
        ("config.json", {"add_cross_attention": True}, "add_cross_attention.*only False"),
        ("pe_config.json", {"SEQPE_COLOUR": 1}, "pe_config.json.*'SEQPE_COLOUR' is unknown"),
        ("pe_config.json", {"SEQPE_ADD_OUT_PROJ": False}, "SEQPE_ADD_OUT_PROJ.*only True"),
        ("pe_config.json", {"SEQPE_ACTIVATION_FUNCTION": "tanh"}, "activation_function='tanh'"),
    ],
)
def test_a_setting_that_would_compute_something_else_is_refused(goldens, tmp_path, file, change, match):
    source = goldens / "checkpoints" / "text"
    for path in source.rglob("*.*"):
        copy = tmp_path / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        if path.suffix != ".npz":
            copy.write_bytes(path.read_bytes())
    content = (tmp_path / file).read_text()
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in change.items())
    if file == "config.json":
        content = json.dumps(json.loads(content) | change)
    else:
        others = [line for line in content.splitlines() if line.partition(":")[0] not in change]
        content = "\n".join([*others, lines])
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=match):
        load_reference(str(tmp_path))


def test_a_fixed_table_must_be_the_one_that_its_config_describes(goldens):
    from seqpe_jax.interop import torch_model, torch_reference

    spec, arrays = load(goldens, "gpt2", "rotary_a")
    state = under(arrays, "param/")
    right, wrong = ({"pe_model.weight": arrays["in/pe"][0] * scale} for scale in (1.0, 1.01))
    sources = [
        torch_reference.of_spec(spec, lambda table=table: Arrays(state, {}, table, ()))
        for table in (right, wrong, {"pe_model.weight": np.zeros(3)}, {"pe_model.weight": np.zeros((9, 7))})
    ]
    _ = torch_model.from_checkpoint(sources[0]).params
    for source in sources[1:]:
        with pytest.raises(
            InputError, match="pe_model.weight (is not the table of encoding 'rotary'|has the shape .3,.)"
        ):
            _ = torch_model.from_checkpoint(source).params


def test_a_table_of_a_grid_is_left_out_and_not_compared(goldens, tmp_path):
    from seqpe_jax.interop import torch_model, torch_reference

    spec, arrays = load(goldens, "vit", "rotary_2d_a")
    save_file(under(arrays, "param/"), tmp_path / "model.safetensors")
    save_file({"weight": np.zeros((4, 4), np.float32)}, tmp_path / "pe_model.safetensors")
    sizes = {"MODEL": {"TYPE": "vit_s_16", "NUM_HEADS": spec["num_heads"]}, "DATA": {"IMG_SIZE": spec["img_size"]}}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"PE_TYPE": "rotary", "PE_APPLY_METHOD": "rotary_2d"}))
    source = torch_reference.read(tmp_path)
    assert torch_model.from_checkpoint(source).params["model"] and list(source.arrays.left_out) == ["pe_model.weight"]
