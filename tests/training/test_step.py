"""The compiled train step: equal on meshes, with accumulation, remat and a loop over layers; its three loss terms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.encodings import digit_encoder, seqpe
from seqpe_jax.models import transformer
from seqpe_jax.training.step import TrainState, create_train_state
from seqpe_jax.training.trainer import Trainer
from tests.inference.test_export import vit_config
from tests.tiny import random_params, tiny_config, tokens

pytestmark = pytest.mark.slow

STEPS = 3
# A large epsilon keeps Adam from amplifying the rounding of gradients that are zero.
WITHOUT_DROPOUT = {"model__dropout": 0.0, "encoding__dropout": 0.0, "optimizer__epsilon": 1e-3}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Losses and states of a few steps, and their program."""

    parts: Trainer
    losses: np.ndarray
    before: TrainState  # on the host
    after: TrainState
    traced: str
    compiled: jax.stages.Compiled

    @functools.cached_property
    def params(self):
        return jax.device_get(self.after.params)


def run(settings, devices, start=None):
    """Takes a few steps from a state, or from step 0."""
    parts = Trainer.of(settings, devices)
    if start is None:
        state = parts.init_state()
    else:  # compiling the initialization takes a third of the time
        state = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), start, parts.abstract_state)
    before, losses = jax.tree.map(np.array, state), []  # a copy: a step donates its state
    traced = parts.jit_train_step().trace(state, batch_of(parts, 0))
    compiled = traced.lower().compile()
    for n in range(STEPS):
        state, metrics = compiled(state, batch_of(parts, n))
        losses.append(float(metrics["loss"]))
    return Steps(parts, np.array(losses), before, state, str(traced.jaxpr), compiled)


def batch_of(parts, n):
    if not parts.config.is_image:
        return layout.from_local_rows(parts.mesh, jax.tree.map(np.asarray, tokens(parts.config, n)))
    draw, settings = np.random.default_rng(n), parts.config
    images = draw.normal(size=(settings.batch_size, *settings.data.size, 1)).astype(np.float32)
    labels = draw.integers(0, 10, settings.batch_size).astype(np.int32)
    return layout.from_local_rows(parts.mesh, {"images": images, "labels": labels})


@pytest.fixture(scope="module")
def with_offsets():
    """Two sets of windows, a random offset in half of the steps, both position losses, two encoder layers."""
    return tiny_config(
        objective__shift__rate=0.5, objective__shift__sets=2, batch_size=16, encoding__layers=2, **WITHOUT_DROPOUT
    )


@pytest.fixture(scope="module")
def single(with_offsets):
    return run(with_offsets, jax.devices()[:1])


@pytest.fixture(scope="module")
def images():
    """The same on images, with a loop over two layers."""
    shift = {"objective__shift__rate": 0.5, "objective__shift__sets": 2}
    fields = {"model__width": 24, "model__scan": True, "optimizer__epsilon": 1e-3, "encoding__share_prefixes": False}
    return vit_config(batch_size=16, **fields, **shift)


@pytest.fixture(scope="module")
def single_images(images):
    return run(images, jax.devices()[:1])


def check_mesh(settings, expected, sizes, start=None):
    """Checks that steps on a mesh equal those of one device, and that parameters and moments are sharded."""
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
    settings = dataclasses.replace(settings, mesh=config.MeshConfig(**sizes))
    found = run(settings, jax.devices(), start)
    np.testing.assert_allclose(found.losses, expected.losses, atol=1e-5)
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max() + 1e-6)
    assert found.parts.mesh.shape == sizes
    moments = found.after.opt_state.inner_states["model"].inner_state[1][0].mu
    for tree in (found.after.params, moments):
        part = tree["model"]
        kernel = (part["blocks"]["layers"] if settings.model.scan else part["blocks_0"])["mlp_in"]["kernel"]
        split = tuple(axis if sizes[axis] > 1 else None for axis in ("fsdp", "tensor"))
        assert kernel.sharding.spec[-2:] == split
        width, hidden = kernel.sharding.shard_shape(kernel.shape)[-2:]
        assert (width, hidden) == (24 // sizes["fsdp"], 96 // sizes["tensor"])
    return found.compiled.as_text()


def count_rows(settings):
    """Encoder rows of a step, padded to the eight devices."""
    terms, places = settings.objective, int(np.prod(settings.grid))
    rows = terms.shift.sets * places + terms.contrastive.batch * (1 + terms.contrastive.candidates)
    return -(-(rows + terms.distillation.batch * terms.distillation.offsets) // 8) * 8


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 2, "context": 4},
    ],
    ids=lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items()),
)
def test_meshes_equal_one_device(with_offsets, single, sizes, monkeypatch):
    levels, build_trie = [], digit_encoder.build_trie
    noted = lambda digits, base, sizes: levels.append(sizes) or build_trie(digits, base, sizes)  # noqa: E731
    monkeypatch.setattr(digit_encoder, "build_trie", noted)
    if "tensor" in sizes:
        monkeypatch.setattr(seqpe, "MAX_SHARED_FRACTION", 10.0)  # eight rows per device share too few prefixes
    # On one mesh, the initialization is sharded as well.
    program = check_mesh(with_offsets, single, sizes, None if "tensor" in sizes else single.before)
    rows, places = count_rows(with_offsets), 4  # three digits, and CLS; hidden units of the encoder: 96
    assert f"f32[{rows},{places},96]" not in program and f"f32[{rows},96]" not in program
    if "tensor" in sizes:  # each device has a trie of its own rows
        assert levels[-1][-1] == rows // 8 and f"f32[{sum(levels[-1]) + levels[-1][-1]},96]" in program
    else:
        assert not levels and f"f32[{rows // 8},{places},96]" in program


def test_a_mesh_equals_one_device_on_images(images, single_images):
    sizes = {"fsdp": 2, "context": 2, "tensor": 2}
    program = check_mesh(images, single_images, sizes, single_images.before)
    rows, places = count_rows(images), 7  # three digits for each coordinate, and CLS
    assert f"f32[{rows // 8},{places},16]" in program and f"f32[{rows},{places},16]" not in program


def test_one_compilation_serves_perturbed_and_other_steps(single):
    """A perturbed step has no distillation loss."""
    step, state, seen = single.parts.jit_train_step(), jax.tree.map(jnp.copy, single.after), {}
    for n in range(STEPS, STEPS + 8):
        state, metrics = step(state, batch_of(single.parts, n))
        seen.setdefault(float(metrics["moved"]), []).append(float(metrics["term/distillation"]))
    assert set(seen) == {0.0, 1.0}
    assert all(value == 0.0 for value in seen[1.0]) and all(value > 0.0 for value in seen[0.0])
    assert step._cache_size() == 1


def test_a_loop_over_layers_equals_the_plain_step():
    """Each layer has its own signal; the position losses, which use no layer, are off."""
    off = {"objective__contrastive__weight": 0.0, "objective__distillation__weight": 0.0}
    plain = tiny_config(model__layers=3, **off, **WITHOUT_DROPOUT)
    assert plain.encoding.qk == "multi"
    looped = dataclasses.replace(plain, model=dataclasses.replace(plain.model, scan=True, remat="dots"))
    one, two = Trainer.of(plain, jax.devices()[:1]), Trainer.of(looped, jax.devices()[:1])
    first = one.init_state()
    params = jax.tree.map(jnp.copy, first.params)  # a step takes its state
    second = create_train_state(
        params | {"model": transformer.stack_layers(params["model"], 3)}, two.optimizer, jnp.copy(first.key)
    )
    results = [parts.jit_train_step()(state, batch_of(parts, 0)) for parts, state in ((one, first), (two, second))]
    assert float(results[0][1]["loss"]) == pytest.approx(float(results[1][1]["loss"]), abs=1e-5)
    params = results[1][0].params
    params = params | {"model": transformer.unstack_layers(params["model"], 3)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0][0].params, params)


def test_accumulation_equals_the_plain_step(with_offsets, single):
    parted = dataclasses.replace(with_offsets, optimizer=dataclasses.replace(with_offsets.optimizer, accumulate=2))
    assert with_offsets.optimizer.accumulate != parted.optimizer.accumulate
    found = run(parted, jax.devices()[:1], single.before)
    np.testing.assert_allclose(single.losses, found.losses, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), single.params, found.params)


def test_remat_equals_the_plain_step(with_offsets, single):
    remat = dataclasses.replace(with_offsets, model=dataclasses.replace(with_offsets.model, remat="full"))
    found = run(remat, jax.devices()[:1], single.before)
    assert "remat" not in single.traced and ("remat" in found.traced or "checkpoint" in found.traced)
    np.testing.assert_allclose(single.losses, found.losses, atol=1e-5)


def test_bfloat16_arithmetic_follows_the_plain_step(with_offsets, single):
    """Parameters, optimizer state and loss are float32; arithmetic has eight bits."""
    half = dataclasses.replace(with_offsets, precision=dataclasses.replace(with_offsets.precision, compute="bfloat16"))
    found = run(half, jax.devices()[:1], single.before)
    assert "bf16[" in found.compiled.as_text() and "bf16[" not in single.compiled.as_text()
    floats = [leaf.dtype for leaf in jax.tree.leaves(found.after) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    assert 0 < np.abs(found.losses - single.losses).max() < 1e-2
    trees = (single.before.params, single.params, found.params)
    for first, plain, other in zip(*map(jax.tree.leaves, trees), strict=True):
        assert np.linalg.norm(other - plain) <= 0.1 * np.linalg.norm(plain - first) + 1e-6


@functools.cache
def gradients(contrastive, distillation):
    """Gradients of the first step, and of a step after the warm-up of the terms."""
    terms = {"contrastive": contrastive, "distillation": distillation}
    fields = {f"objective__{name}__weight": weight for name, weight in terms.items()}
    fields |= {f"objective__{name}__warmup_steps": 10**9 for name in terms}
    settings = tiny_config(**fields, **WITHOUT_DROPOUT)
    parts = Trainer.of(settings, jax.devices()[:1])
    params = random_params(parts, 0.1)
    loss = lambda p, step: parts.train_loss.loss(p, tokens(settings), jax.random.PRNGKey(1), step)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    return gradient(params, jnp.int32(0)), gradient(params, jnp.int32(10**9))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=["contrastive", "distillation"])
def test_a_zero_weight_gives_zero_gradient(weights):
    (off, same), (nearly_off, on) = gradients(0.0, 0.0), gradients(*weights)
    jax.tree.map(np.testing.assert_array_equal, off, same)  # nothing else depends on the step
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), off, nearly_off)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), on, off)
    assert max(jax.tree.leaves(difference["encoding"])) > 1e-6
    assert max(jax.tree.leaves(difference["model"])) < 1e-6  # two programs round differently
