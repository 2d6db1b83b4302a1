"""Training that can never fit is refused before anything is traced."""

import types

import jax
import pytest

from seqpe_jax.errors import InputError
from seqpe_jax.training import memory
from tests.tiny import tiny_config

CHIP = types.SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"batch_size": 2**20, "model__layers": 64, "model__width": 768, "model__heads": 12},
            "batch_size=1048576 examples of 16 positions",
        ),
        ({"model__layers": 1024, "model__width": 3072, "model__heads": 24}, "model.layers=1024 of model.width=3072"),
    ],
)
def test_what_cannot_fit_is_refused_by_the_fields_that_set_it(changes, words):
    settings = tiny_config(**changes)
    with pytest.raises(InputError, match=words) as caught:
        memory.check_memory(settings, [CHIP])
    assert "at least" in str(caught.value) and "\n" not in str(caught.value)
    memory.check_memory(settings, [CHIP] * 4096)
    memory.check_memory(
        settings, [CHIP, types.SimpleNamespace(device_kind="?", platform="x", memory_stats=lambda: None)]
    )


def test_the_estimate_is_below_what_a_model_takes():
    settings = tiny_config()
    parameters, states = memory.least_bytes(settings)
    model = settings.model
    assert parameters == 4 * model.layers * 10 * model.width**2 + 4 * model.vocabulary * model.width
    assert states == 2 * model.layers * settings.batch_size * settings.data.length * model.width
    memory.check_memory(settings, jax.devices())
