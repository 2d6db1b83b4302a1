"""The train step: accumulation, meshes and the three terms."""

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
    import dataclasses

    settings = dataclasses.replace(moving, mesh=dataclasses.replace(moving.mesh, data=data, fsdp=fsdp))
    losses, params, parts, state = run(settings, jax.devices())
    np.testing.assert_allclose(losses, single[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params, single[1])
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    assert (PartitionSpec("fsdp") in specs or PartitionSpec(None, "fsdp") in specs) == (fsdp > 1)
    assert parts.mesh.shape == {"data": data, "fsdp": fsdp}


def test_accumulation_equals_the_plain_step():
    plain = tiny_config(objective__shift__rate=0.5, objective__shift__sets=2, **STILL)
    parted = tiny_config(objective__shift__rate=0.5, objective__shift__sets=2, optimizer__accumulate=2, **STILL)
    assert plain.optimizer.accumulate != parted.optimizer.accumulate
    one, two = run(plain, jax.devices()[:1]), run(parted, jax.devices()[:1])
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one[1], two[1])


def test_remat_equals_the_plain_step():
    plain, remat = tiny_config(**STILL), tiny_config(model__remat="full", **STILL)

    def traced(settings):
        parts = build(settings, jax.devices()[:1])
        loss = lambda params: parts.objective.loss(params, tokens(plain), jax.random.PRNGKey(0), 0)[0]  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(parts.shapes.params))

    jaxprs = [traced(settings) for settings in (plain, remat)]
    assert "remat" not in jaxprs[0] and ("remat" in jaxprs[1] or "checkpoint" in jaxprs[1])
    one, two = run(plain, jax.devices()[:1]), run(remat, jax.devices()[:1])
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)


def gradient(settings, **batch):
    parts = build(settings, jax.devices()[:1])
    params = parts.init_state().params
    loss = lambda p: parts.objective.loss(p, tokens(settings) | batch, jax.random.PRNGKey(1), jnp.int32(0))[0]  # noqa: E731
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("term", ["contrastive", "distillation"])
def test_a_zero_weight_gives_zero_gradient(term):
    zero = {f"objective__{term}__weight": 0.0}
    other = "distillation" if term == "contrastive" else "contrastive"
    both_off = gradient(tiny_config(**zero, **{f"objective__{other}__weight": 0.0}, **STILL))
    warm = {f"objective__{name}__warmup_steps": 10**9 for name in ("contrastive", "distillation")}
    nearly_off = gradient(tiny_config(**warm, **STILL))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), both_off, nearly_off)
    on = gradient(tiny_config(**{f"objective__{term}__weight": 1.0, f"objective__{other}__weight": 0.0}, **STILL))
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
