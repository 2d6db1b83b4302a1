"""One step is one step: read at once, in parts or spread over devices, whatever its examples weigh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.models import transformer
from seqpe_jax.training.step import create_train_state
from seqpe_jax.training.trainer import Trainer
from tests.tiny import ROOT, random_params, random_state

SMALL = {
    "steps": 4,
    "batch_size": 8,
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "optimizer.warmup_steps": 0,
    "optimizer.epsilon": 1e-3,
}
TEXT = SMALL | {"data.length": 16, "eval.lengths": (16,)}
SEQPE = {
    "encoding.qk": "single",  # all layers read the same position queries and keys
    "encoding.layers": 1,
    "encoding.width": 16,
    "encoding.heads": 2,
    "encoding.max_position": 120,
    "encoding.position_heads": 1,
    "encoding.rotary_heads": 1,
    "encoding.rotary_pairs": 2,
    "encoding.feature_width": 4,
    "encoding.log_scaling": True,
    "objective.contrastive.head_scales": (4.0,),
    "objective.contrastive.batch": 4,
    "objective.contrastive.candidates": 4,
    "objective.contrastive.window": 16,
    "objective.distillation.batch": 2,
    "objective.distillation.offsets": 4,
    "objective.shift.rate": 0.0,
}
TASKS = {
    "text": ("stdlib_lm.py:alibi", TEXT | {"encoding.gate": "forget"}),
    "questions": ("stdlib_qa.py", TEXT | SEQPE | {"model.layers": 2}),
    "images": ("digits_vit.py:none", SMALL),
}


def batch_of(task, parts):
    """A batch whose examples weigh as differently as the task allows."""
    draw, settings = np.random.default_rng(0), parts.config
    if task == "images":
        images = draw.normal(size=(settings.batch_size, *settings.data.size, 1)).astype(np.float32)
        batch = {"images": images, "labels": draw.integers(0, 10, settings.batch_size).astype(np.int32)}
    else:
        batch = {"tokens": draw.integers(0, 256, (settings.batch_size, settings.data.length + 1)).astype(np.int32)}
    if task == "questions":
        counted = np.array([[1], [14], [3], [9], [0], [0], [2], [1]])
        batch["weights"] = (np.arange(settings.data.length) >= settings.data.length - counted).astype(np.float32)
        assert len(set(batch["weights"].sum(axis=1))) > 4 and not batch["weights"][4:6].any()
    return layout.from_local_rows(parts.mesh, batch)


@functools.cache
def step_of(task, accumulate=1, mesh=(), fields=()):
    """(metrics, parameters) after a step from fixed parameters; fields: of the config, as pairs."""
    path, values = TASKS[task]
    settings = config.load(f"{ROOT}/configs/{path}", values | {"optimizer.accumulate": accumulate} | dict(fields))
    settings = dataclasses.replace(settings, mesh=config.MeshConfig(**dict(mesh)))
    parts = Trainer.of(settings, jax.devices() if mesh else jax.devices()[:1])
    model = settings.model
    if model.scan:  # the same parameters, stored in the other way
        plain = Trainer.of(
            dataclasses.replace(settings, model=dataclasses.replace(model, scan=False)), jax.devices()[:1]
        )
        params = random_params(plain, 0.2)
        params["model"] = transformer.stack_layers(params["model"], model.layers)
        state = create_train_state(params, parts.optimizer, jax.random.PRNGKey(0))
    else:
        state = random_state(parts, 0.2)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract_state)
    state, metrics = parts.jit_train_step()(jax.device_put(state, shardings), batch_of(task, parts))
    params = jax.device_get(state.params)
    if model.scan:
        params["model"] = transformer.unstack_layers(params["model"], model.layers)
    return jax.device_get(metrics), params


def check(found, expected):
    metrics, params = found
    assert metrics.keys() == expected[0].keys()
    for name, value in expected[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.slow
def test_a_batch_read_in_parts_is_the_batch():
    """Of one part nothing counts."""
    check(step_of("questions", 4), step_of("questions"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, parts, mesh",
    [
        pytest.param("questions", 1, {"data": 2, "context": 2, "tensor": 2}, marks=pytest.mark.long),
        ("questions", 2, {"fsdp": 2, "context": 4, "context_attention": "ring"}),
        pytest.param("text", 1, {"fsdp": 2, "context": 4, "context_attention": "ring"}, marks=pytest.mark.long),
        ("text", 4, {"data": 2, "context": 2, "tensor": 2}),
        pytest.param("images", 2, {"data": 4, "tensor": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_batch_spread_over_devices_is_the_batch(task, parts, mesh):
    """Also where each device reads its share in parts."""
    check(step_of(task, parts, tuple(mesh.items())), step_of(task))


@pytest.mark.slow
def test_a_composed_encoding_is_the_same_in_every_form_of_the_model():
    form = {"model.attention_kind": "blockwise", "model.attention_block": 6, "model.scan": True, "model.remat": "full"}
    check(step_of("questions", fields=tuple(form.items())), step_of("questions"))
