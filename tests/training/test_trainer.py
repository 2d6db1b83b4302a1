"""Trainer: configs that contradict themselves, warm starts, initialization and its key."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.models.build import check_encoding
from seqpe_jax.run_dir import RunDir
from seqpe_jax.tasks import LanguageModeling
from seqpe_jax.training import trainer
from seqpe_jax.training.trainer import Trainer
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
