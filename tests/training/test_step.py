"""The compiled train step: equal on meshes and in bfloat16, its sharding, and its three loss terms.

Microbatches, recomputation and a loop over layers: tests/repository/test_equal_steps.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.encodings import digit_encoder, seqpe
from seqpe_jax.models.transformer import stack_layers
from seqpe_jax.training.step import TrainState, create_train_state
from seqpe_jax.training.trainer import Trainer
from tests.inference.test_export import vit_config
from tests.tiny import random_params, random_state, tiny_config, tokens

pytestmark = pytest.mark.slow

STEPS = 3
# A large epsilon keeps Adam from amplifying the rounding of gradients that are zero.
WITHOUT_DROPOUT = {"model__dropout": 0.0, "encoding__dropout": 0.0, "optimizer__epsilon": 1e-3}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Losses and states of a few steps, and their program."""

    parts: Trainer
    metrics: list
    before: TrainState  # on the host
    after: TrainState
    compiled: jax.stages.Compiled

    @functools.cached_property
    def params(self):
        return jax.device_get(self.after.params)

    @property
    def losses(self):
        return np.array([float(metrics["loss"]) for metrics in self.metrics])


def run(settings, devices, start=None):
    """Takes a few steps from a state, or from random parameters."""
    parts = Trainer.of(settings, devices)
    start = jax.device_get(random_state(parts, 0.1)) if start is None else start
    state, metrics = on_mesh(parts, start), []
    compiled = parts.jit_train_step().lower(state, batch_of(parts, 0)).compile()
    for n in range(STEPS):
        state, found = compiled(state, batch_of(parts, n))
        metrics.append(found)
    return Steps(parts, metrics, start, state, compiled)


def on_mesh(parts, state):
    return jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), state, parts.abstract_state)


def batch_of(parts, n):
    if not parts.config.is_image:
        return layout.from_local_rows(parts.mesh, jax.tree.map(np.asarray, tokens(parts.config, n)))
    draw, settings = np.random.default_rng(n), parts.config
    images = draw.normal(size=(settings.batch_size, *settings.data.size, 1)).astype(np.float32)
    labels = draw.integers(0, 10, settings.batch_size).astype(np.int32)
    return layout.from_local_rows(parts.mesh, {"images": images, "labels": labels})


@pytest.fixture(scope="module")
def with_offsets():
    """Eight sets of windows, a random offset in half of the steps, both position losses, two encoder layers.

    With beta below 1 the window for distillation has a gradient, too.
    """
    shift = {"objective__shift__rate": 0.5, "objective__shift__sets": 8, "objective__distillation__beta": 0.5}
    return tiny_config(batch_size=16, encoding__layers=2, **shift, **WITHOUT_DROPOUT)


@pytest.fixture(scope="module")
def single(with_offsets):
    return run(with_offsets, jax.devices()[:1])


@pytest.fixture(scope="module")
def images():
    """The same on images, with a loop over two layers."""
    shift = {"objective__shift__rate": 0.5, "objective__shift__sets": 8}
    fields = {"model__width": 24, "model__scan": True, "optimizer__epsilon": 1e-3, "encoding__share_prefixes": False}
    return vit_config(batch_size=16, **fields, **shift)


@pytest.fixture(scope="module")
def single_images(images):
    return run(images, jax.devices()[:1])


def check_mesh(settings, expected, sizes):
    """Checks that steps on a mesh equal those of one device, and that parameters and moments are sharded."""
    sizes = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes
    settings = dataclasses.replace(settings, mesh=config.MeshConfig(**sizes))
    found = run(settings, jax.devices(), expected.before)
    np.testing.assert_allclose(found.losses, expected.losses, atol=1e-5)
    for one, other in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max() + 1e-6)
    assert found.parts.mesh.shape == sizes
    moments = found.after.opt_state.inner_states["model"].inner_state[1][0].mu
    for tree in (found.after.params, moments):
        part = tree["model"]
        kernel = (part["blocks"]["layers"] if settings.model.scan else part["blocks_0"])["mlp_in"]["kernel"]
        over = [tuple(axis for axis in names if sizes[axis] > 1) for names in (("fsdp", "context"), ("tensor",))]
        assert kernel.sharding.spec[-2:] == tuple(jax.sharding.PartitionSpec(*(names or None for names in over)))
        width, hidden = kernel.sharding.shard_shape(kernel.shape)[-2:]
        assert (width, hidden) == (24 // sizes["fsdp"] // sizes["context"], 96 // sizes["tensor"])
    return found.compiled.as_text()


def count_rows(settings):
    """Encoder rows of a step on each of eight devices: a part of the windows, and whole samples of the losses."""
    terms, places = settings.objective, int(np.prod(settings.grid))
    samples = [terms.contrastive.batch] * (1 + terms.contrastive.candidates)
    samples += [terms.distillation.batch] * terms.distillation.offsets
    return sum(-(-count // 8) for count in [terms.shift.sets * places, *samples])


@pytest.mark.parametrize(
    "sizes", [pytest.param({"data": 8}, marks=pytest.mark.long), {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_meshes_equal_one_device(with_offsets, single, sizes, monkeypatch):
    levels, build_trie = [], digit_encoder.build_trie
    noted = lambda digits, base, sizes: levels.append(sizes) or build_trie(digits, base, sizes)  # noqa: E731
    monkeypatch.setattr(digit_encoder, "build_trie", noted)
    if "tensor" in sizes:
        monkeypatch.setattr(seqpe, "MAX_SHARED_FRACTION", 10.0)  # eight rows per device share too few prefixes
    program = check_mesh(with_offsets, single, sizes)
    rows, places = count_rows(with_offsets), 4  # three digits, and CLS; hidden units of the encoder: 96
    assert f"f32[{8 * rows},{places},96]" not in program and f"f32[{8 * rows},96]" not in program
    if "tensor" in sizes:  # each device has a trie of its own rows
        assert levels[-1][-1] == rows and f"f32[{sum(levels[-1]) + levels[-1][-1]},96]" in program
    else:
        assert not levels and f"f32[{rows},{places},96]" in program


def test_scanned_layers_of_a_llama_on_a_mesh_equal_blocks_on_one_device():
    """With shared heads of keys, a window in every other layer, norms of queries and keys, and factors."""
    parts = {"kind": "llama", "layers": 2, "heads": 4, "kv_heads": 2, "window": 5, "window_layers": (1, 0)}
    parts |= {"qk_norm": "all", "norm_placement": "both", "logit_multiplier": 2.0, "logit_cap": 5.0, "tied": False}
    fields = {f"model__{name}": value for name, value in parts.items()}
    settings = functools.partial(tiny_config, variant="rotary", optimizer__epsilon=1e-3, **fields)
    plain = run(settings(), jax.devices()[:1])
    stacked = plain.before.params | {"model": stack_layers(plain.before.params["model"], 2)}
    start = create_train_state(stacked, plain.parts.optimizer, plain.before.key)
    mesh = {"mesh__fsdp": 2, "mesh__tensor": 2}
    split = run(settings(model__scan=True, model__remat="full", **mesh), jax.devices()[:4], jax.device_get(start))
    np.testing.assert_allclose(split.losses, plain.losses, rtol=1e-5)
    expected = stack_layers(plain.params["model"], 2)
    for one, other in zip(jax.tree.leaves(split.params["model"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max() + 1e-6)


def test_a_mesh_equals_one_device_on_images(images, single_images):
    sizes = {"fsdp": 2, "context": 2, "tensor": 2}
    program = check_mesh(images, single_images, sizes)
    rows, places = count_rows(images), 7  # three digits for each coordinate, and CLS
    assert f"f32[{rows},{places},16]" in program and f"f32[{8 * rows},{places},16]" not in program


def test_an_initial_state_on_a_mesh_is_that_of_one_device():
    settings = tiny_config(variant="learned")
    mesh = config.MeshConfig(data=2, fsdp=2, tensor=2)
    parts = (settings, jax.devices()[:1]), (dataclasses.replace(settings, mesh=mesh), jax.devices())
    alone, sharded = (Trainer.of(*part).init_state() for part in parts)
    assert sharded.params["model"]["blocks_0"]["mlp_in"]["kernel"].sharding.spec[-2:] == ("fsdp", "tensor")
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), alone, sharded)


def test_one_compilation_serves_perturbed_and_other_steps(single):
    """A perturbed step has no distillation loss."""
    seen, state = {}, on_mesh(single.parts, single.before)
    for n in range(11):
        state, metrics = single.compiled(state, batch_of(single.parts, n))
        seen.setdefault(float(metrics["moved"]), []).append(float(metrics["term/distillation"]))
    assert set(seen) == {0.0, 1.0}
    assert all(value == 0.0 for value in seen[1.0]) and all(value > 0.0 for value in seen[0.0])


def in_bfloat16(settings):
    return dataclasses.replace(settings, precision=dataclasses.replace(settings.precision, compute="bfloat16"))


def test_a_step_in_bfloat16_keeps_a_float32_state(with_offsets):
    """Parameters, optimizer state and loss are float32; arithmetic has eight bits."""
    parts = Trainer.of(in_bfloat16(with_offsets), jax.devices()[:1])
    traced = parts.jit_train_step().trace(parts.abstract_state, batch_of(parts, 0))
    state, metrics = traced.out_info
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {metrics["loss"].dtype, *floats} == {jnp.dtype("float32")} and ":bf16[" in str(traced.jaxpr)


@pytest.mark.long
def test_bfloat16_arithmetic_follows_the_plain_step(with_offsets, single):
    """The same of a model without the losses: tests/models/test_decoder.py."""
    found = run(in_bfloat16(with_offsets), jax.devices()[:1], single.before)
    assert "bf16[" not in single.compiled.as_text()
    assert 0 < np.abs(found.losses - single.losses).max() < 1e-2
    trees = (single.before.params, single.params, found.params)
    for first, plain, other in zip(*map(jax.tree.leaves, trees), strict=True):
        assert np.linalg.norm(other - plain) <= 0.1 * np.linalg.norm(plain - first) + 1e-6


def gradients(term):
    """Gradients of a loss with one of the terms: before its warm-up, in which its weight is zero, and after it."""
    weights = {f"objective__{name}__weight": float(name == term) for name in ("contrastive", "distillation")}
    settings = tiny_config(**weights, **{f"objective__{term}__warmup_steps": 10**9}, **WITHOUT_DROPOUT)
    parts = Trainer.of(settings, jax.devices()[:1])
    params = random_params(parts, 0.1)
    loss = lambda p, step: parts.train_loss.loss(p, tokens(settings), jax.random.PRNGKey(1), step)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss))
    return gradient(params, jnp.int32(0)), gradient(params, jnp.int32(10**9))


def test_a_zero_weight_gives_zero_gradient():
    (task, contrastive), (same, distillation) = gradients("contrastive"), gradients("distillation")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), task, same)
    for off, on in ((task, contrastive), (same, distillation)):
        difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), on, off)
        assert max(jax.tree.leaves(difference["encoding"])) > 1e-6
        assert max(jax.tree.leaves(difference["model"])) == 0.0
