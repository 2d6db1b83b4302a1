"""Classes of encodings: each field is read by its module, capabilities are true, a new encoding is a class and an entry."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from seqpe_jax import config
from seqpe_jax.config import ENCODINGS, EncodingConfig, ModelDims
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.errors import InputError
from seqpe_jax.models.build import DataSpec, ModelSpec
from tests.tiny import ROOT, tiny_config, train


def page_of(kind):
    """A config file for this kind, and its overrides."""
    if kind in config.kinds_for(axes=1):
        return tiny_config(variant=kind)
    return config.load(f"{ROOT}/configs/digits_vit.py:{kind}")


def signal_of(settings, shape=None):
    """Shapes of the signal of a window or grid."""
    model_spec = ModelSpec.of(settings, DataSpec(vocabulary=256, classes=10, channels=1))
    shape = shape or model_spec.shape
    positions_PLA = model_spec.position_grid.positions(shape)[None]
    run = lambda key: model_spec.encoding.init_with_output(key, positions_PLA, shape=shape)[0]  # noqa: E731
    return jax.eval_shape(run, jax.ShapeDtypeStruct((2,), jnp.uint32))


def recording(chosen, names):
    """A subclass of an encoding's class that notes the names of the fields that are read of it."""
    paused = []

    @contextlib.contextmanager
    def pause():
        paused.append(True)
        yield
        paused.pop()

    class Recording(chosen):
        def __getattribute__(self, name):
            if not paused:
                names.add(name)
            return super().__getattribute__(name)

        def resolved(self, dims):
            with pause():  # it copies all fields
                return super().resolved(dims)

        def __hash__(self):
            with pause():
                return super().__hash__()

        def __eq__(self, other):
            return self is other

    return Recording


SCALINGS = (
    {"scaling": "yarn", "yarn_ramp": "pairs"},
    {"scaling": "llama3"},
    {"scaling": "longrope", "short_factor": (1.0,) * 6, "long_factor": (2.0,) * 6},
)


@pytest.mark.parametrize("kind", ENCODINGS)
def test_each_field_is_read_where_a_model_is_built_and_applied(kind):
    """With every part, and on windows longer than in training; else a field would do nothing."""
    settings, names = page_of(kind), set()
    own = {field.name: getattr(settings.encoding, field.name) for field in dataclasses.fields(settings.encoding)}
    parts = {"rotary_pairs": 2, "gate": "forget" if len(settings.grid) == 1 else "none", "log_scaling": True}
    own |= {name: value for name, value in parts.items() if name in own}
    if kind in ("rotary", "rope_id"):  # which sharpen attention themselves
        own["log_scaling"] = False
    del own["kind"]
    for scaling in SCALINGS if kind == "rotary" else ({},):
        encoding = recording(ENCODINGS[kind], names)(**own | scaling)
        settings = dataclasses.replace(settings, encoding=encoding)
        signal_of(settings, tuple(2 * side for side in settings.grid))
    assert own.keys() - names == set()


def test_a_module_that_reads_a_field_its_encoding_has_not_got_fails():
    class Misspelled(nn.Module):
        config: EncodingConfig
        dims: ModelDims

        def __call__(self, positions_PLA):
            return positions_PLA * self.config.slope_scal

    encoding = Misspelled(ENCODINGS["alibi"](), ModelDims(1, 8, 2))
    with pytest.raises(AttributeError, match="slope_scal"):
        encoding.apply({}, jnp.zeros((1, 4, 1)))
    with pytest.raises(TypeError, match="slope_scal"):
        ENCODINGS["alibi"](slope_scal=2.0)


def test_fields_that_encodings_share_have_one_default_and_type():
    defaults, hints = config.defaults().encoding, config.field_types()
    for kind, chosen in ENCODINGS.items():
        assert chosen().kind == kind and set(chosen.requires()) <= {field.name for field in dataclasses.fields(chosen)}
        for field in dataclasses.fields(chosen):
            assert field.name == "kind" or (field.default == defaults[field.name] and field.metadata["doc"])
            assert f"encoding.{field.name}" in hints


@pytest.mark.parametrize("kind", ENCODINGS)
def test_capabilities_are_those_of_the_signal(kind):
    chosen, settings = ENCODINGS[kind], page_of(kind)
    if kind == "seqpe":
        settings = tiny_config(encoding__qk="multi")
    signal = signal_of(settings)
    assert bool(signal.per_layer_fields) == chosen.PER_LAYER
    assert (ModelSpec.of(settings, DataSpec(256, 10, 1)).encoder is not None) == chosen.HAS_VECTORS
    for axes in (1, 2):
        if kind in config.kinds_for(axes):
            chosen().check(axes)
            continue
        with pytest.raises(InputError, match=f"encoding.kind='{kind}' is for .*: choose one of seqpe"):
            chosen().check(axes)


def lengths(config_file, variant, **fields):
    overrides = {"eval.lengths": ()} if "vit" not in config_file else {}
    values = overrides | {name.replace("__", "."): value for name, value in fields.items()}
    return dataclasses.asdict(
        config.with_resolved_lengths(config.load(f"configs/{config_file}.py:{variant}", values)).encoding
    )


def test_shares_are_the_authors_numbers_at_the_authors_lengths():
    at = functools.partial(lengths, "wikitext103_gpt2", encoding__max_position=5000)
    assert at("t5", data__length=512)["t5_buckets"] == 32 and at("t5", data__length=512)["t5_max_distance"] == 128
    assert at("fire", data__length=2048)["fire_threshold"] == 512
    assert at("fire", data__length=2048)["fire_scale"] == pytest.approx(0.1)
    assert at("rotary", data__length=4096)["yarn_beta_fast"] == 32
    assert at("scale_invariant", data__length=4096)["rotary_pairs"] == 16  # half of the pairs of 64 columns
    rope_id = at("rope_id", data__length=4096)
    assert (rope_id["rotary_pairs"], rope_id["fastest_period"], rope_id["slowest_period"]) == (16, 32, 2048)
    for heads, directed in ((6, 4), (12, 8), (16, 8)):
        assert lengths("imagenet_vit", "lookhere", model__heads=heads)["directed_heads"] == directed
    assert lengths("imagenet_vit", "pape", model__width=768, model__heads=12)["parabolas"] == 50


def test_shares_follow_the_window():
    at = functools.partial(lengths, "stdlib_lm")
    text = at("fire", encoding__fire_threshold=0.0, encoding__fire_scale=0.0)
    assert (text["fire_threshold"], text["fire_scale"]) == (16, 3.2)
    assert (at("t5")["t5_buckets"], at("t5")["t5_max_distance"]) == (32, 32)
    assert at("rotary")["yarn_beta_fast"] == pytest.approx(64 / (2 * math.pi))  # rotations of the fastest pair
    assert at("scale_invariant")["rotary_pairs"] == 4
    assert at("scale_invariant", encoding__rotary_pairs=6)["rotary_pairs"] == 6
    assert at("fire")["fire_threshold"] == 512 and at("t5", encoding__t5_max_distance=64)["t5_max_distance"] == 64
    short = at("t5", data__length=8)
    assert short["t5_buckets"] == short["t5_max_distance"] == 8
    rope_id = at("rope_id")
    assert (rope_id["rotary_pairs"], rope_id["slowest_period"]) == (6, 32)
    assert rope_id["fastest_period"] == pytest.approx(2 * math.pi)  # a 128th of 64 tokens would be less than a token
    assert at("rope_id", data__length=8)["fastest_period"] == at("rope_id", data__length=8)["slowest_period"] == 4
    assert lengths("digits_vit", "lookhere")["directed_heads"] == 3
    assert lengths("digits_vit", "pape")["parabolas"] == 19
    assert lengths("digits_vit", "fire")["fire_threshold"] == pytest.approx(math.hypot(4, 4) / 4)


def test_a_compared_variant_takes_the_overrides_that_it_has():
    overrides = {"steps": 700, "encoding.width": 24, "encoding.slope_scale": 2.0}
    found = config.load_variant(f"{ROOT}/configs/stdlib_lm.py", "alibi", overrides)
    assert (found.steps, found.encoding.slope_scale) == (700, 2.0)


@dataclasses.dataclass(frozen=True)
class ToyConfig(EncodingConfig):
    """Distance to the first token, times a number, added to the tokens."""

    MODULE: ClassVar[str] = "tests.encodings.test_configs:Toy"
    SUMMARY: ClassVar[str] = "A line."
    REAL_POSITIONS: ClassVar[bool] = False

    kind: str = dataclasses.field(default="toy", init=False)
    steepness: float = 0.5


class Toy(nn.Module):
    config: ToyConfig
    dims: ModelDims

    def __call__(self, positions_PLA, *, shape, deterministic=True):
        return PositionSignal(
            input_embedding=jnp.broadcast_to(
                self.config.steepness * positions_PLA.astype(jnp.float32), (*positions_PLA.shape[:2], self.dims.width)
            )
        )


@pytest.mark.slow
def test_a_new_encoding_takes_one_class_and_one_entry(monkeypatch, tmp_path):
    """It is a variant of every config file, has its own fields alone, is stored, and trains."""
    monkeypatch.setitem(ENCODINGS, "toy", ToyConfig)
    settings = tiny_config(variant="toy", encoding__steepness=0.25, steps=2)
    assert settings.encoding == ToyConfig(steepness=0.25) and config.from_dict(config.to_dict(settings)) == settings
    with pytest.raises(InputError, match="steepness=2.0 is not read by encoding.kind='alibi', only by toy"):
        tiny_config(variant="alibi", encoding__steepness=2.0)
    with pytest.raises(InputError, match="theta=2.0 is not read by encoding.kind='toy', only by seqpe, "):
        tiny_config(variant="toy", encoding__theta=2.0)
    assert "encoding.steepness" in config.field_types() and "| `toy` | A line. |" in config.encodings_table()
    train(settings, tmp_path)
    losses = [json.loads(line).get("train/loss") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss is not None and math.isfinite(loss)]
    assert json.loads((tmp_path / "config.json").read_text())["encoding"]["steepness"] == 0.25


def test_the_tables_of_the_documentation_are_those_of_the_package():
    path = ROOT / "benchmarks" / "encodings_table.py"
    spec = importlib.util.spec_from_file_location("encodings_table", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(check=True) == 0


COMPAT = [  # stored by versions that had it in the encoding section
    ("seqpe", {"qk": "halves"}, {"qk_halves": True}),
    ("sinusoidal", {"flatten": True}, {"flatten": True}),
    ("rotary_mixed", {"reference_scramble": True}, {"reference_scramble": True}),
    ("alibi", {"reference_scaling": True}, {"reference_scaling": True}),
]


@pytest.mark.parametrize("kind, older, compat", COMPAT)
def test_checkpoints_converted_by_older_versions_open_with_the_behaviour_of_the_reference(kind, older, compat):
    settings = page_of(kind)
    values = json.loads(json.dumps(config.to_dict(settings)))
    everything = json.loads(config.defaults().encoding.to_json()) | {
        "flatten": False,
        "reference_scramble": False,
        "reference_scaling": False,
    }
    values["encoding"] = everything | values["encoding"] | older
    del values["compat"]
    found = config.from_dict(values)
    assert found.compat == config.CompatConfig(**compat) and found.dims.compat == found.compat
    if kind == "seqpe":
        assert found.encoding.qk == "none"
        query, key = signal_of(found).position_query_key
        assert query.shape[-1] == key.shape[-1] == settings.model.width // settings.model.heads // 2
    other = next(one for one in ENCODINGS if one != kind and one in config.kinds_for(len(settings.grid)))
    with pytest.raises(InputError, match=f"compat.* is for encoding.kind='{kind}', and this is '{other}'"):
        config.from_dict(config.to_dict(dataclasses.replace(page_of(other), compat=found.compat)))
