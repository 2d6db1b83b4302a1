"""The train step: accumulation, meshes and the three terms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.build import build
from seqpe_jax.encodings import seqpe
from seqpe_jax.models import blocks
from seqpe_jax.runtime import mesh as layout
from tests.test_serving import vit_config
from tests.tiny import tiny_config, tokens

pytestmark = pytest.mark.slow

# Without dropout; a large epsilon keeps Adam from amplifying the rounding of gradients that are zero.
STILL = {"model__dropout": 0.0, "encoding__dropout": 0.0, "optimizer__epsilon": 1e-3}


def run(settings, devices, steps=3):
    """Losses and final parameters of a few steps; the run, its state and its compiled step too."""
    parts = build(settings, devices)
    state, step, losses = parts.init_state(), parts.train_step(), []
    compiled = step.lower(state, batch_of(parts, 0)).compile()
    for n in range(steps):
        state, metrics = compiled(state, batch_of(parts, n))
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state.params), parts, state, compiled


def batch_of(parts, n):
    if not parts.config.reads_images:
        return layout.to_global(parts.mesh, jax.tree.map(np.asarray, tokens(parts.config, n)))
    draw, settings = np.random.default_rng(n), parts.config
    images = draw.normal(size=(settings.batch_size, *settings.data.size, 1)).astype(np.float32)
    labels = draw.integers(0, 10, settings.batch_size).astype(np.int32)
    return layout.to_global(parts.mesh, {"images": images, "labels": labels})


@pytest.fixture(scope="module")
def moving():
    """Two sets of windows, half of the steps shifted, both losses on."""
    return tiny_config(objective__shift__rate=0.5, objective__shift__sets=2, batch_size=16, **STILL)


@pytest.fixture(scope="module")
def single(moving):
    return run(moving, jax.devices()[:1])


@pytest.fixture(scope="module")
def images():
    """The same of images; two layers, a loop over them."""
    shift = {"objective__shift__rate": 0.5, "objective__shift__sets": 2}
    fields = {"model__width": 24, "model__scan": True, "optimizer__epsilon": 1e-3, "encoding__share_prefixes": False}
    return vit_config(batch_size=16, **fields, **shift)


@pytest.fixture(scope="module")
def single_images(images):
    return run(images, jax.devices()[:1])


def check_mesh(settings, expected, sizes):
    """Three steps on a mesh equal those of one device, and their arrays lie as the mesh says."""
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
    settings = dataclasses.replace(settings, mesh=config.MeshConfig(**sizes))
    losses, params, parts, state, compiled = run(settings, jax.devices())
    np.testing.assert_allclose(losses, expected[0], atol=1e-5)
    for found, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max() + 1e-6)
    assert parts.mesh.shape == sizes
    moments = state.opt_state.inner_states["model"].inner_state[1][0].mu
    for tree in (state.params, moments):
        part = tree["model"]
        kernel = (part["blocks"]["layers"] if settings.model.scan else part["blocks_0"])["mlp_in"]["kernel"]
        split = tuple(axis if sizes[axis] > 1 else None for axis in ("fsdp", "tensor"))
        assert kernel.sharding.spec[-2:] == split
        width, hidden = kernel.sharding.shard_shape(kernel.shape)[-2:]
        assert (width, hidden) == (24 // sizes["fsdp"], 96 // sizes["tensor"])
    return compiled.as_text()


def count_rows(settings):
    """Encoder rows of a step, padded to the eight devices."""
    terms, places = settings.objective, int(np.prod(settings.grid))
    rows = terms.shift.sets * places + terms.contrastive.batch * (1 + terms.contrastive.candidates)
    return -(-(rows + terms.distillation.batch * terms.distillation.offsets) // 8) * 8


@pytest.mark.parametrize("sizes", [
    {"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "context": 4},
], ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items()))  # fmt: skip
def test_meshes_equal_one_device(moving, single, sizes, monkeypatch):
    levels, tree = [], seqpe.tree
    monkeypatch.setattr(seqpe, "tree", lambda digits, base, sizes: levels.append(sizes) or tree(digits, base, sizes))
    if "tensor" in sizes:
        monkeypatch.setattr(seqpe, "WORTH", 10.0)  # else eight rows to a device share too little
    program = check_mesh(moving, single, sizes)
    rows, places = count_rows(moving), 4  # three digits, and CLS; hidden units of the encoder: 96
    assert f"f32[{rows},{places},96]" not in program and f"f32[{rows},96]" not in program
    if "tensor" in sizes:  # each device has a tree of its own rows
        assert levels[-1][-1] == rows // 8 and f"f32[{sum(levels[-1]) + levels[-1][-1]},96]" in program
    else:
        assert not levels and f"f32[{rows // 8},{places},96]" in program


@pytest.mark.parametrize("sizes", [
    {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "context": 4},
], ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items()))  # fmt: skip
def test_meshes_equal_one_device_on_images(images, single_images, sizes):
    program = check_mesh(images, single_images, sizes)
    rows, places = count_rows(images), 5  # two digits for each coordinate, and CLS
    assert f"f32[{rows // 8},{places},16]" in program and f"f32[{rows},{places},16]" not in program


def test_one_compilation_serves_moved_and_other_steps(moving, single):
    parts, state = single[2:4]
    step, moved = parts.train_step(), set()
    state = parts.init_state()
    for n in range(6):
        state, metrics = step(state, batch_of(parts, n))
        moved.add(float(metrics["moved"]))
    assert moved == {0.0, 1.0} and step._cache_size() == 1


def test_a_loop_over_layers_equals_the_plain_step():
    plain = tiny_config(model__layers=3, objective__shift__rate=0.5, **STILL)
    looped = dataclasses.replace(plain, model=dataclasses.replace(plain.model, scan=True, remat="dots"))
    one, two = build(plain, jax.devices()[:1]), build(looped, jax.devices()[:1])
    first = one.init_state()
    params = jax.tree.map(jnp.copy, first.params)  # a step takes its state
    second = two.init_state().replace(params=params | {"model": blocks.stack(params["model"], 3)})
    results = [parts.train_step()(state, batch_of(parts, 0)) for parts, state in ((one, first), (two, second))]
    assert float(results[0][1]["loss"]) == pytest.approx(float(results[1][1]["loss"]), abs=1e-5)
    params = results[1][0].params
    params = params | {"model": blocks.unstack(params["model"], 3)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0][0].params, params)


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


def test_bfloat16_arithmetic_follows_the_plain_step(moving, single):
    """Parameters, optimiser state and loss stay float32; eight bits of the arithmetic stay."""
    half = dataclasses.replace(moving, precision=dataclasses.replace(moving.precision, compute="bfloat16"))
    losses, params, _, state, compiled = run(half, jax.devices()[:1])
    assert "bf16[" in compiled.as_text() and "bf16[" not in single[4].as_text()
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    assert 0 < np.abs(losses - single[0]).max() < 1e-2
    start = jax.device_get(single[2].init_state().params)
    for first, plain, found in zip(*map(jax.tree.leaves, (start, single[1], params)), strict=True):
        assert np.linalg.norm(found - plain) <= 0.1 * np.linalg.norm(plain - first) + 1e-6


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
