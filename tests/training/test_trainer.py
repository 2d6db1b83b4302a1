"""Trainer: configs that contradict themselves, warm starts, initialization and its key."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.config.encodings import all_fields
from seqpe_jax.errors import InputError
from seqpe_jax.models.build import check_encoding
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks import LanguageModeling
from seqpe_jax.training import trainer
from seqpe_jax.training.trainer import Trainer
from seqpe_jax.training.warm_start import check_source
from tests.inference.test_export import vit_config
from tests.tiny import tiny_config

PAIRS = {"encoding__rotary_pairs": 2}
ROTARY = {"encoding__mode": "rotary", "encoding__qk": "none", "objective__contrastive__space": "vectors"}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"encoding__position_heads": 3}, "encoding.position_heads=3 is more than model.heads=2"),
        ({"variant": "rotary", "encoding__position_heads": 3}, "encoding.position_heads=3 is more than model.heads=2"),
        (
            {"variant": "rotary_mixed", "encoding__position_heads": 9},
            "encoding.position_heads=9 is more than model.heads=2",
        ),
        ({"variant": "alibi", "encoding__position_heads": 3}, "encoding.position_heads=3 is more than model.heads=2"),
        (PAIRS | {"encoding__rotary_heads": 3}, "encoding.rotary_heads=3 is more than model.heads=2"),
        (PAIRS | ROTARY, "encoding.mode='rotary' and encoding.rotary_pairs=2 both rotate"),
        (PAIRS | {"model__width": 18}, "encoding.rotary_pairs=2 .*: model.width / model.heads = 9 must be even"),
        ({"encoding__rotary_pairs": 7}, "encoding.rotary_pairs=7 must lie between the 1 axes and the 6 pairs"),
        ({"variant": "rotary", "encoding__rotary_pairs": 7}, "encoding.rotary_pairs=7 must lie between"),
        (
            {"encoding__mode": "attn_add", "encoding__feature_width": 4, "objective__contrastive__space": "vectors"},
            "set encoding.mode='attn_scalar'",
        ),
    ],
)
def test_an_impossible_encoding_is_refused_before_data_are_read(fields, words, monkeypatch):
    monkeypatch.setattr(LanguageModeling, "__init__", lambda *_: pytest.fail("data were read"))
    settings = tiny_config(**fields)
    for act in (check_encoding, Trainer.of):
        with pytest.raises(InputError, match=words) as caught:
            act(settings)
        assert "\n" not in str(caught.value)


def test_rotary_pairs_need_one_pair_per_axis():
    with pytest.raises(InputError, match="encoding.rotary_pairs=1 must lie between the 2 axes and the 4 pairs"):
        check_encoding(vit_config(encoding__rotary_pairs=1))
    with pytest.raises(
        InputError, match="encoding.rotary_pairs=1 rotates .* model.heads = 2 must be at least 4 for 2 axes"
    ):
        check_encoding(vit_config(encoding__rotary_pairs=1, model__width=4, model__heads=2))


def written(folder, settings, **encoding):
    """Returns a folder with the config of a run; fields of its encoding are changed, or with None removed."""
    values = json.loads(json.dumps(config.to_dict(settings)))
    values["encoding"] |= encoding
    values["encoding"] = {name: value for name, value in values["encoding"].items() if value is not None}
    RunDir(folder).write_config(values)
    return str(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rotary_pairs", 2),
        ("position_heads", 1),
        ("feature_width", 3),
        ("fraction_digits", 1),
        ("resize", "interpolate"),
        ("rotary_heads", 1),
    ],
)
def test_a_warm_start_refuses_parameters_of_another_encoding(tmp_path, field, value):
    pairs = PAIRS if field == "rotary_heads" else {}  # rotary heads need pairs
    fields = pairs | {f"encoding__{field}": value}
    run = Trainer.of(tiny_config(eval__lengths=(), **fields), jax.devices()[:1])
    source = written(tmp_path, tiny_config(**pairs))
    with pytest.raises(InputError, match=f"encoding.{field}: .* -> {value}"):
        check_source(run.config, run.task, source)


def test_a_warm_start_ignores_free_and_unused_fields(tmp_path):
    run = Trainer.of(tiny_config(encoding__log_scaling=True), jax.devices()[:1])
    check_source(run.config, run.task, written(tmp_path / "new", tiny_config()))
    check_source(
        run.config, run.task, written(tmp_path / "old", tiny_config(), log_scaling=None, resize=None, theta=100.0)
    )
    rotary = Trainer.of(tiny_config(variant="rotary"), jax.devices()[:1])
    older_fields = all_fields() | {
        "kind": "rotary",
        "width": 96,
        "qk": "multi",
    }  # older runs stored those of all encodings
    check_source(
        rotary.config, rotary.task, written(tmp_path / "rotary", tiny_config(variant="rotary"), **older_fields)
    )
    with pytest.raises(InputError, match="encoding.theta: 100.0 -> 10000.0"):
        check_source(
            rotary.config, rotary.task, written(tmp_path / "other", tiny_config(variant="rotary"), theta=100.0)
        )


def test_a_warm_start_compares_resolved_lengths(tmp_path):
    run = Trainer.of(tiny_config(variant="t5"), jax.devices()[:1])
    check_source(run.config, run.task, written(tmp_path / "same", tiny_config(variant="t5")))
    longer = written(tmp_path / "longer", tiny_config(variant="t5", data__length=256, eval__lengths=(256,)))
    with pytest.raises(InputError, match="encoding.t5_buckets: 32 -> 16; encoding.t5_max_distance: 64 -> 16"):
        check_source(run.config, run.task, longer)


def test_the_step_projects_parameters_into_their_bounds(monkeypatch):
    given = {}
    monkeypatch.setattr(trainer, "make_train_step", lambda *_, **options: given.update(options) or (lambda *_: None))
    run = Trainer.of(tiny_config(variant="kerple", encoding__log_scaling=True), jax.devices()[:1])
    run.jit_train_step()
    params = {"encoding": {"slope": jnp.array([-1.0, 3.0])}, "model": {"slope": jnp.array([-1.0])}}
    found = given["project"](params)
    np.testing.assert_allclose(found["encoding"]["slope"], [0.01, 3.0])
    assert found["model"] is params["model"]


def test_the_initialization_is_traced_once(monkeypatch):
    """For shapes and values together: tracing takes longer than computing."""
    traced, create = [], trainer.create_train_state
    monkeypatch.setattr(trainer, "create_train_state", lambda *arguments: traced.append(1) or create(*arguments))
    state = Trainer.of(tiny_config()).init_state()
    assert traced == [1] and int(state.step) == 0


def test_seeds_beyond_32_bits_have_distinct_keys():
    """Smaller seeds have the key of `jax.random.PRNGKey`, as in stored runs."""

    def key_from_seed(seed):
        model_spec = types.SimpleNamespace(init=lambda key: {"drawn": jax.random.bits(key)})
        optimizer = types.SimpleNamespace(init=lambda params: ())
        state = trainer._make_init_fn(model_spec, optimizer, seed)()
        return (*state.key.tolist(), int(state.params["drawn"]))

    small = (0, 7, 2**31, 2**32 - 1)
    assert [key_from_seed(seed)[:2] for seed in small] == [tuple(jax.random.PRNGKey(seed).tolist()) for seed in small]
    keys = [key_from_seed(seed) for seed in (*small, 2**32, 2**32 + 7, 2**33 + 7, 2**63 - 1)]
    assert len(set(keys)) == len(keys)
