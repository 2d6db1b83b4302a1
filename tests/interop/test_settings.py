"""Settings of foreign files: the type and range of each field, before anything is computed from it."""

import functools
import time

import numpy as np
import pytest

from seqpe_jax.errors import InputError, format_value
from seqpe_jax.interop import hf_decoders, hf_images, torch_config, torch_reference
from seqpe_jax.interop.hf import read_mapping
from seqpe_jax.interop.settings import Field
from tests.interop import test_hf_images
from tests.interop.test_hf_images import HF, TIMM

SPECS = {
    "gpt2": {
        "vocab_size": 40,
        "n_layer": 2,
        "n_embd": 48,
        "n_head": 3,
        "pe_type": "seq_pe",
        "pe_apply_method": "attn_add",
    },
    "vit": {"depth": 2, "embed_dim": 48, "img_size": 32, "num_classes": 9, "num_heads": 3, "patch_size": 8}
    | {"pe_type": "seq_pe", "pe_apply_method": "attn_mul", "use_pe_multi_head": True},
    "seqpe_encoder": {"layer_num": 2, "max_digits": 5, "num_attention_heads": 4, "pe_embed_dim": 48},
}
WRONG = ("x", "3", True, 2.5, 0, -7, 10**9, 10**25, 10**5000, float("nan"), float("inf"), 1e-320, [1], {"x": 1}, None)


def fits(field: Field, value: object) -> bool:
    try:
        field.check("", value)
    except InputError:
        return False
    return True


def refused(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message and len(message) < 500, message


@pytest.mark.parametrize("kind", SPECS)
def test_each_setting_of_the_reference_has_a_type_and_a_range(kind):
    """Whatever stands there gives a config, or a line that names the field; no other error, no endless arithmetic."""
    read = torch_config.encoding_from_spec if kind == "seqpe_encoder" else torch_config.config_from_spec
    spec = {"kind": kind} | SPECS[kind]
    read(spec)
    for name, field in torch_config.SPEC_FIELDS[kind].items():
        for value in WRONG:
            if not fits(field, value):
                call = functools.partial(torch_config.check_spec, spec | {name: value})
                refused(call, f"config field '{name}' of a {kind} must be")
                continue
            try:
                read(spec | {name: value})
            except InputError as error:
                assert "\n" not in str(error)
    refused(lambda: read(spec | {3: 1}), "the name of a setting must be text, got 3")


def test_types_and_ranges():
    assert Field(float).check("", 3) == 3.0 and type(Field(float).check("", 3)) is float
    assert Field(int, null=True).check("", None) is None and Field(bool).check("", True) is True
    refused(lambda: Field(bool).check("file: field 'a'", "x"), "file: field 'a' must be true or false, got 'x'")
    refused(lambda: Field(int).check("a", True), "a must be a whole number, got True")
    refused(lambda: Field(int, {"low": 1, "high": 4}).check("a", 5), "a must be at least 1 and at most 4, got 5")
    refused(lambda: Field(float).check("a", float("inf")), "a must be a finite number")


@pytest.mark.parametrize(
    "settings, words",
    [
        (HF | {"layer_norm_eps": "x"}, "field 'layer_norm_eps' must be a number, got 'x'"),
        (HF | {"num_attention_heads": 0}, "field 'num_attention_heads' must be at least 1"),
        (HF | {"qkv_bias": 1}, "field 'qkv_bias' is 1, only True"),
        (HF | {"image_size": [8, 8, 8]}, "field 'image_size' must be one or two whole numbers"),
        (TIMM | {"model_args": 5}, "field 'model_args' must be a mapping of settings, got 5"),
        (TIMM | {"pretrained_cfg": {"std": [0, 1, 1]}}, "field 'pretrained_cfg.std' must be at least 0.001"),
        (TIMM | {"pretrained_cfg": {"mean": "x"}}, "field 'pretrained_cfg.mean' must be a list"),
        (
            TIMM | {"model_args": {}, "pretrained_cfg": {"input_size": [3, "x", 8]}},
            "'pretrained_cfg.input_size' must be a whole number",
        ),
    ],
)
def test_settings_of_vision_transformers_come_before_their_weights(tmp_path, settings, words):
    refused(lambda: hf_images.read(tmp_path, settings), words)


@pytest.mark.parametrize(
    "name, array, words",
    [
        (
            "patch_embed.proj.weight",
            np.zeros((12, 1, 0, 2)),
            "patch_embed.proj.weight has the shape (12, 1, 0, 2), not one of 4",
        ),
        ("blocks.0.mlp.fc1.weight", np.zeros(()), "blocks.0.mlp.fc1.weight has the shape (), not one of 2 sides"),
        ("head.weight", None, "lack head.weight"),
    ],
)
def test_sizes_are_read_from_arrays_that_have_them(tmp_path, name, array, words):
    """Of timm and of the reference: an array that is no image model's is a line, and no division by zero."""
    state = test_hf_images.timm_state(3, test_hf_images.PATCHES) | {name: array}
    state = {
        key: value for key, value in state.items() if value is not None and (key != "head.bias" or array is not None)
    }
    known = hf_images._known_timm(tmp_path / "config.json", TIMM)
    refused(lambda: hf_images._config_and_rules(known, state, None), words)
    settings = {"MODEL": {"TYPE": "vit_s_16"}, "PE_TYPE": "nope"}
    refused(
        lambda: torch_reference._image_spec(tmp_path / "config.json", settings, state), "no vision transformer", words
    )


def test_more_heads_than_width_are_refused_before_a_head_has_a_width(tmp_path):
    settings = {"model_type": "gpt2", "vocab_size": 9, "n_layer": 1, "n_embd": 4, "n_head": 5, "n_positions": 8}
    refused(lambda: hf_decoders.read(tmp_path, settings), "5 heads share a width of 4")


def test_a_share_of_a_head_that_rotates_half_a_pair_is_refused(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {"model_type": "gpt_neox", "intermediate_size": 96} | sizes
    refused(
        lambda: hf_decoders.read(tmp_path, settings), "config.json: the share 0.25 of a head of width 12 rotates 3 col"
    )
    hf_decoders.read(tmp_path, settings | {"hidden_size": 64})


@pytest.mark.parametrize(
    "content, words",
    [
        ("a: &x [1, 2]\nb: [*x, *x]\n", "line 2 repeats a value by an alias"),
        ("1: 2\n", "the name of a setting must be text, got 1"),
        ('{"a": 1,\n\t"b": }', "is neither JSON nor YAML: Expecting value: line 2"),
        ("a: " + "[" * 2**20, "no file of settings"),
    ],
)
def test_what_yaml_can_do_beyond_settings_is_refused(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    refused(lambda: read_mapping(tmp_path / "config.json"), words)
    (tmp_path / "config.json").write_text('{\n\t"a": 1e-06\n}')  # JSON, whose tabs YAML would refuse
    assert read_mapping(tmp_path / "config.json") == {"a": 1e-6}


def test_values_in_messages_are_short_whatever_they_hold():
    """Nine lists in lists, as aliases and pickles share them, would be gigabytes."""
    nested: object = "x"
    for _ in range(30):
        nested = [nested] * 30
    before = time.process_time()
    for value in (nested, {"a": nested}, {n: n for n in range(10**5)}, "x" * 10**6, 10**5000, {10**5000}):
        assert 0 < len(format_value(value)) < 160
    assert time.process_time() - before < 1
    assert [format_value(value) for value in (3, "a\nb", (1,), {"a": 1})] == ["3", r"'a\nb'", "(1,)", "{'a': 1}"]
