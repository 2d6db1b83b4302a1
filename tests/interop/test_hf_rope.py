"""RoPE of Hugging Face folders: frequencies by the formula and by transformers, both forms there and back, refusals."""

import json
import math

import numpy as np
import pytest

from seqpe_jax.config import ModelDims, RotaryConfig
from seqpe_jax.encodings.rope import scaled_rotation
from seqpe_jax.errors import InputError
from seqpe_jax.interop.hf_rope import rope_from_hf, rope_to_hf

WIDTH, LENGTH = 16, 256  # of a head; max_position_embeddings
SHORT, LONG = [1.0 + pair / 8 for pair in range(8)], [1.5 + pair * pair for pair in range(8)]
ORIGINAL = {"original_max_position_embeddings": 64}
CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0} | ORIGINAL,
    "yarn_fractions": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 6, "beta_slow": 0.5}
    | ORIGINAL,
    "yarn_mscale": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.2} | ORIGINAL,
    "yarn_attention": {"rope_type": "yarn", "factor": None, "attention_factor": 1.25} | ORIGINAL,
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | ORIGINAL,
    "longrope": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG} | ORIGINAL,
    "longrope_factor": {"rope_type": "longrope", "factor": 16.0, "short_factor": SHORT, "long_factor": LONG} | ORIGINAL,
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.7, "factor": 2.0},
}
WINDOWS = (40, 64, 65, 256, 700)


def settings_of(rope, theta=10_000.0, model_type="llama", **others):
    return {
        "model_type": model_type,
        "max_position_embeddings": LENGTH,
        "hidden_size": 2 * WIDTH,
        "num_attention_heads": 2,
        "rope_parameters": {"rope_theta": theta} | rope,
    } | others


def rotation_of(settings, window):
    encoding, dims = RotaryConfig(**rope_from_hf(settings, WIDTH)), ModelDims(1, 2 * WIDTH, 2, (LENGTH,))
    encoding.check(1)
    encoding.check_dims(dims)
    return scaled_rotation(encoding.resolved(dims), WIDTH, LENGTH, window)


def by_formula(rope, window, theta=10_000.0):
    """Frequencies and the factor of q and k by a loop over the pairs, float64."""
    kind, factor, frequencies, attention = rope["rope_type"], rope.get("factor") or 4.0, [], 1.0
    for pair in range(8):
        plain = theta ** (-2 * pair / WIDTH)
        if kind == "linear":
            plain /= factor
        elif kind == "dynamic":
            grown = theta * (factor * max(window, LENGTH) / LENGTH - (factor - 1)) ** (WIDTH / (WIDTH - 2))
            plain = grown ** (-2 * pair / WIDTH)
        elif kind == "yarn":
            ends = [
                WIDTH * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
            ]
            if rope.get("truncate", True):
                ends = math.floor(ends[0]), math.ceil(ends[1])
            ends = max(ends[0], 0), min(ends[1], WIDTH - 1)
            share = min(1.0, max(0.0, (pair - ends[0]) / (ends[1] - ends[0])))
            plain = share * plain / factor + (1 - share) * plain
            m = [0.1 * rope.get(name, 1.0) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim")]
            attention = rope.get("attention_factor") or (m[0] / m[1] if "mscale" in rope else m[0])
        elif kind == "llama3":
            turns = 64 * plain / (2 * math.pi)
            smooth = (turns - 1) / 3
            plain = (
                plain / factor if turns < 1 else plain if turns > 4 else (1 - smooth) * plain / factor + smooth * plain
            )
        elif kind == "longrope":
            plain /= (LONG if window > 64 else SHORT)[pair]
            attention = math.sqrt(1 + math.log(factor) / math.log(64))
        elif kind == "proportional":
            plain /= factor
        frequencies.append(plain)
    return np.array(frequencies[: 5 if kind == "proportional" else 8]), attention


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_the_formula_in_every_window(name):
    for window in WINDOWS:
        found, factor = rotation_of(settings_of(CASES[name]), window)
        expected, attention = by_formula(CASES[name], window)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert factor == pytest.approx(attention, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils", reason="needs the extra hf-test")
    torch = pytest.importorskip("torch", reason="needs the extra hf-test")
    llama = pytest.importorskip("transformers", reason="needs the extra hf-test").LlamaConfig
    settings = settings_of(CASES[name])
    config = llama(**{key: value for key, value in settings.items() if key != "model_type"})
    for window in WINDOWS:
        if name == "default":
            expected, attention = 10_000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH), 1.0
        else:
            expected, attention = rope_utils.ROPE_INIT_FUNCTIONS[CASES[name]["rope_type"]](config, seq_len=window)
        found, factor = rotation_of(settings, window)
        found = np.pad(found, (0, 8 - len(found)))  # p-RoPE's other pairs have frequency 0 there
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
        assert factor == pytest.approx(float(attention), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_both_forms_there_and_back(name):
    fields = rope_from_hf(settings_of(CASES[name]), WIDTH)
    written = json.loads(json.dumps(rope_to_hf(RotaryConfig(**fields), WIDTH, LENGTH, "llama")))
    older = {name: value for name, value in written.items() if name != "rope_parameters"}
    newer = {"rope_parameters": written["rope_parameters"]}
    if older["rope_scaling"]:
        assert (
            older["rope_scaling"].pop("rope_type") == older["rope_scaling"]["type"]
        )  # the oldest folders have type alone
    common = {"model_type": "llama", "max_position_embeddings": LENGTH}
    defaults = {field: getattr(RotaryConfig(), field) for field in RotaryConfig.rope_fields()}
    for form in (written, older, newer):
        assert defaults | rope_from_hf(common | form, WIDTH) == defaults | fields


def test_gpt_neox_rotates_a_share_of_each_head():
    common = {"model_type": "gpt_neox", "max_position_embeddings": LENGTH}
    older = {"rotary_emb_base": 500, "rotary_pct": 0.5}
    newer = {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_type": "default"}}
    fields = rope_from_hf(common | older, WIDTH)
    assert fields == rope_from_hf(common | newer, WIDTH) == {"theta": 500.0, "rotary_share": 0.5}
    assert rope_from_hf(common, WIDTH) == {"theta": 10_000.0, "rotary_share": 0.25}
    written = rope_to_hf(RotaryConfig(**fields), WIDTH, LENGTH, "gpt_neox")
    assert rope_from_hf(common | written, WIDTH) == fields and written.items() >= older.items()
    found, _ = rotation_of(common | older, LENGTH)
    np.testing.assert_allclose(found, [500.0 ** (-2 * pair / 8) for pair in range(4)])


def test_the_configs_of_twelve_families_are_read(goldens):
    found = {}
    for path in sorted(goldens.glob("hf/*/config.json")):
        settings = json.loads(path.read_text())
        width = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
        encoding = RotaryConfig(**rope_from_hf(settings, width))
        encoding.check(1)
        found[path.parent.name] = encoding
    assert len(found) == 12 and found["smollm3"].theta == 2e6 and found["gpt_neox"].rotary_share == 0.5
    kinds = {name: encoding.scaling for name, encoding in found.items() if encoding.scaling != "none"}
    assert kinds == {"llama3_scaled": "llama3", "llama_linear": "linear", "llama_yarn": "yarn"}
    nested = settings | {"rope_parameters": {kind: CASES["yarn"] for kind in ("full_attention", "sliding_attention")}}
    assert rope_from_hf(nested, WIDTH)["scaling"] == "yarn"


REFUSED = [
    (
        {"rope_type": "yarn", "factor": 4.0, "finetuned": True},
        {},
        "rope_parameters.finetuned is not read with rope_type='yarn'",
    ),
    ({"rope_type": "yarm"}, {}, "unknown rope_parameters.rope_type 'yarm'. Did you mean .yarn"),
    ({"rope_type": "linear"}, {}, "rope_parameters lacks factor, which rope_type='linear' needs"),
    ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, {}, "rope_type and rope_parameters.type differ"),
    (
        {"rope_type": "llama3", "factor": "8"} | CASES["llama3"] | {"factor": "8"},
        {},
        "factor must be a number .* got '8'",
    ),
    ({"rope_type": "yarn", "truncate": 1, "factor": 2.0}, {}, "truncate must be true or false"),
    ({"rope_type": "longrope", "short_factor": 2.0, "long_factor": LONG}, {}, "short_factor must be a list"),
    ({"rope_theta": 5.0}, {"rope_theta": 6.0}, "rope_theta=6.0 and rope_parameters.rope_theta=5.0 differ"),
    ({"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor=0.5: model_type='llama' rotates whole heads"),
    ({}, {"rope_scaling": CASES["linear"]}, "rope_scaling and rope_parameters describe different rotations"),
    ({"rope_type": "dynamic", "factor": 2.0} | ORIGINAL, {}, "original_max_position_embeddings=64 is not read"),
    ({"full_attention": {}}, {}, "layer types and other fields side by side"),
    # What arithmetic would meet.
    ({"rope_type": "yarn"}, {"max_position_embeddings": 0}, "rope_type='yarn' needs max_position_embeddings"),
    (
        {"rope_type": "yarn"},
        {"original_max_position_embeddings": "x"},
        "original_max.* must be a whole number, got 'x'",
    ),
    ({"rope_type": "linear", "factor": 10**400}, {}, "factor must be a number of at least 0, got 1000"),
    ({"rope_type": "proportional", "partial_rotary_factor": 1e308}, {}, "partial_rotary_factor must be a number"),
    ({"rope_type": 5}, {}, "rope_parameters.rope_type must be a name, got 5"),
    ({1: 2, "full_attention": {}}, {}, "the name of a setting must be text, got 1"),
]


@pytest.mark.parametrize("rope, others, message", REFUSED)
def test_a_field_that_is_not_read_is_refused_by_name(rope, others, message):
    with pytest.raises(InputError, match=message):
        rope_from_hf(settings_of(rope, **others), WIDTH)
    layers = {"full_attention": CASES["linear"], "sliding_attention": CASES["default"]}
    with pytest.raises(InputError, match="differs between full_attention and sliding_attention"):
        rope_from_hf(settings_of({}) | {"rope_parameters": layers}, WIDTH)


UNWRITABLE = [
    ({"scaling": "yarn"}, "encoding.scaling='yarn' without encoding.scaling_factor has no form"),
    ({"scaling": "yarn", "scaling_factor": 2.0}, "encoding.yarn_ramp='rotations' has no form"),
    ({"rotary_share": 0.5}, "encoding.rotary_share=0.5 has no form"),
    ({"fraction_digits": 1}, "encoding.fraction_digits=1 has no form"),
    (
        {"scaling": "ntk", "original_length": 64},
        "encoding.original_length=64, which begins to scale at .*256 has no form",
    ),
    ({"rotary_pairs": 3, "scaling": "ntk"}, "encoding.rotary_pairs=3 has no form"),
]


@pytest.mark.parametrize("fields, message", UNWRITABLE)
def test_what_hugging_face_has_not_is_refused_by_name(fields, message):
    with pytest.raises(InputError, match=message):
        rope_to_hf(RotaryConfig(**fields), WIDTH, LENGTH, "llama")


def test_ntk_is_a_larger_base_or_dynamic_scaling_with_the_factor_1():
    for fields, kind in (({"scaling_factor": 4.0}, None), ({}, "dynamic")):
        encoding = RotaryConfig(scaling="ntk", **fields)
        written = rope_to_hf(encoding, WIDTH, LENGTH, "llama")
        assert (written["rope_scaling"] or {}).get("type") == kind
        for window in (100, 700):
            found, _ = rotation_of({"model_type": "llama", "max_position_embeddings": LENGTH} | written, window)
            np.testing.assert_allclose(found, scaled_rotation(encoding, WIDTH, LENGTH, window)[0], rtol=1e-12)
