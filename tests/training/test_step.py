"""The train step: accumulation, meshes and the three terms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from seqpe_jax.build import build
from seqpe_jax.runtime import mesh as layout
from tests.tiny import tiny_config, tokens

pytestmark = pytest.mark.slow

# Without dropout; a large epsilon keeps Adam from amplifying the rounding of gradients that are zero.
STILL = {"model__dropout": 0.0, "encoding__dropout": 0.0, "optimizer__epsilon": 1e-3}


def run(settings, devices, steps=3):
    """Losses and final parameters of a few steps; the specs of the parameters too."""
    parts = build(settings, devices)
    state, step, losses = parts.init_state(), parts.train_step(), []
    for n in range(steps):
        batch = layout.to_global(parts.mesh, jax.tree.map(np.asarray, tokens(settings, n)))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "one compilation serves shifted and unshifted steps"
    return np.array(losses), jax.device_get(state.params), parts, state


@pytest.fixture(scope="module")
def moving():
    """Two sets of windows, half of the steps shifted, both losses on."""
    return tiny_config(objective__shift__rate=0.5, objective__shift__sets=2, batch_size=16, **STILL)


@pytest.fixture(scope="module")
def single(moving):
    return run(moving, jax.devices()[:1])


@pytest.mark.parametrize("data,fsdp", [(8, 1), (4, 2), (2, 4)])
def test_meshes_equal_one_device(moving, single, data, fsdp):
    settings = dataclasses.replace(moving, mesh=dataclasses.replace(moving.mesh, data=data, fsdp=fsdp))
    losses, params, parts, state = run(settings, jax.devices())
    np.testing.assert_allclose(losses, single[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, single[1])
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    assert (PartitionSpec("fsdp") in specs or PartitionSpec(None, "fsdp") in specs) == (fsdp > 1)
    assert parts.mesh.shape == {"data": data, "fsdp": fsdp}


def test_accumulation_equals_the_plain_step(moving, single):
    parted = dataclasses.replace(moving, optimizer=dataclasses.replace(moving.optimizer, accumulate=2))
    assert moving.optimizer.accumulate != parted.optimizer.accumulate
    losses, params, *_ = run(parted, jax.devices()[:1])
    np.testing.assert_allclose(single[0], losses, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), single[1], params)


def test_remat_equals_the_plain_step(moving, single):
    remat = dataclasses.replace(moving, model=dataclasses.replace(moving.model, remat="full"))

    def traced(settings):
        parts = build(settings, jax.devices()[:1])
        loss = lambda params: parts.objective.loss(params, tokens(moving), jax.random.PRNGKey(0), 0)[0]  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(parts.shapes.params))

    jaxprs = [traced(settings) for settings in (moving, remat)]
    assert "remat" not in jaxprs[0] and ("remat" in jaxprs[1] or "checkpoint" in jaxprs[1])
    np.testing.assert_allclose(single[0], run(remat, jax.devices()[:1])[0], atol=1e-5)


@functools.cache
def gradient(contrastive, distillation, warmup_steps=0):
    """The gradient of a step under these weights of the terms."""
    terms = {"contrastive": contrastive, "distillation": distillation}
    fields = {f"objective__{name}__weight": weight for name, weight in terms.items()}
    fields |= {f"objective__{name}__warmup_steps": warmup_steps for name in terms}
    settings = tiny_config(**fields, **STILL)
    parts = build(settings, jax.devices()[:1])
    params = jax.jit(parts.objective.init)(jax.random.PRNGKey(0))
    loss = lambda p: parts.objective.loss(p, tokens(settings), jax.random.PRNGKey(1), jnp.int32(0))[0]  # noqa: E731
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("term", ["contrastive", "distillation"])
def test_a_zero_weight_gives_zero_gradient(term):
    both_off, nearly_off = gradient(0.0, 0.0), gradient(0.1, 0.1, warmup_steps=10**9)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both_off, nearly_off)
    on = gradient(1.0, 0.0) if term == "contrastive" else gradient(0.0, 1.0)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), on, both_off)
    assert max(jax.tree.leaves(difference["encoding"])) > 1e-6
    assert max(jax.tree.leaves(difference["model"])) < 1e-6  # two programs round differently


def test_a_moved_step_has_no_distillation_and_an_unmoved_one_has():
    settings = tiny_config(objective__shift__rate=0.5, **STILL)
    parts = build(settings, jax.devices()[:1])
    params = parts.init_state().params
    loss = jax.jit(parts.objective.loss)
    seen = {}
    for step in range(12):
        _, metrics = loss(params, tokens(settings), jax.random.PRNGKey(3), jnp.int32(step))
        seen.setdefault(float(metrics["moved"]), []).append(float(metrics["term/distillation"]))
    assert set(seen) == {0.0, 1.0}
    assert all(value == 0.0 for value in seen[1.0]) and all(value > 0.0 for value in seen[0.0])
