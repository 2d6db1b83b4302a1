"""Learning-rate schedules, separate clipping, and parameters with weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqpe_jax.config import OptimizerConfig
from seqpe_jax.distributed.sharding import make_mesh, replicated
from seqpe_jax.errors import InputError
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.optimizer import (
    check_selected_params,
    decay_steps,
    learning_rate,
    make_optimizer,
    stop_frozen,
)


@pytest.mark.parametrize("schedule,middle,end", [("linear", 0.5, 0.1), ("cosine", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_schedules(schedule, middle, end):
    settings = OptimizerConfig(learning_rate=1.0, end_learning_rate=0.1, warmup_steps=10, schedule=schedule)
    rate = learning_rate(settings, 110)
    assert rate(0) == 0.0 and rate(5) == pytest.approx(0.5) and rate(10) == pytest.approx(1.0)
    assert rate(110) == pytest.approx(end)
    assert rate(60) == pytest.approx(middle if schedule != "linear" else 0.55)


def test_wsd_is_constant_until_its_decay():
    settings = OptimizerConfig(
        learning_rate=1.0, end_learning_rate=0.2, warmup_steps=10, schedule="wsd", decay_steps=20
    )
    rate = learning_rate(settings, 110)
    assert [float(rate(step)) for step in (5, 10, 50, 90)] == pytest.approx([0.5, 1.0, 1.0, 1.0])
    assert float(rate(100)) == pytest.approx(0.6) and float(rate(110)) == pytest.approx(0.2)
    assert decay_steps(OptimizerConfig(schedule="wsd"), 500) == 50
    longer = learning_rate(settings, 300)
    assert all(float(rate(step)) == float(longer(step)) for step in range(91))


def tree(encoder, encoder_bias, qk_map, embedding, dense):
    """Parameters (or gradients) of the shape that training has, each leaf filled with one number."""
    return {
        "encoding": {
            "encoder": {"kernel": jnp.full((2, 2), encoder), "bias": jnp.full(2, encoder_bias)},
            "qk_map": {"kernel": jnp.full((2, 2), qk_map)},
        },
        "model": {
            "token_embedding": {"embedding": jnp.full((3, 2), embedding)},
            "dense": {"kernel": jnp.full((2, 2), dense)},
        },
    }


def test_model_and_encoder_are_clipped_separately():
    params = tree(1.0, 1.0, 1.0, 1.0, 1.0)
    grads = tree(1e3, 0.0, 1e-3, 0.0, 1e-3)
    optimizer = make_optimizer(OptimizerConfig(clip=1.0, schedule="constant"), 10)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = optax.tree_utils.tree_get_all_with_path(state, "mu")
    model, encoder = [found for _, found in sorted(moments, key=lambda item: "encoder" in str(item[0]))]
    np.testing.assert_allclose(model["model"]["dense"]["kernel"], 1e-4, rtol=1e-5)  # untouched by the encoder's norm
    np.testing.assert_allclose(encoder["encoding"]["encoder"]["kernel"], 0.1 * 0.5, rtol=1e-3)


def test_weight_decay_spares_biases_embeddings_and_the_encoder():
    params, zeros = tree(1.0, 1.0, 1.0, 1.0, 1.0), tree(0.0, 0.0, 0.0, 0.0, 0.0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant"), 10)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert float(updates["model"]["dense"]["kernel"][0, 0]) == pytest.approx(-0.05)
    for leaf in (updates["model"]["token_embedding"]["embedding"], updates["encoding"]["encoder"]["kernel"]):
        assert float(jnp.abs(leaf).max()) == 0.0


def updated(settings, steps=3):
    """The optimizer state, and the parameters after each step under gradients of 1."""
    params, found = tree(*[1.0] * 5), []
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", clip=0.0, **settings), 10)
    state = optimizer.init(params)
    for _ in range(steps):
        gradients = jax.grad(lambda given: optax.tree.sum(stop_frozen(OptimizerConfig(**settings), given)))(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return state, found


def test_frozen_parameters_stay_and_have_no_state():
    settings = {"learning_rate": 0.1, "weight_decay": 0.5, "freeze": ("model/*", "encoding/encoder/bias")}
    state, steps = updated(settings)
    first, last = tree(*[1.0] * 5), steps[-1]
    jax.tree.map(np.testing.assert_array_equal, last["model"], first["model"])
    np.testing.assert_array_equal(last["encoding"]["encoder"]["bias"], 1.0)
    np.testing.assert_allclose(last["encoding"]["encoder"]["kernel"], 0.7, rtol=1e-5)
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sizes == [4, 4] * 2, "moments of the encoder's kernel and of the qk map alone"


def test_parameters_frozen_at_first_begin_with_the_moments_of_all_steps():
    """Their first update has the size of the learning rate, as in a run without them frozen."""
    steps = updated({"learning_rate": 0.1, "freeze": ("model/dense/*",), "freeze_steps": 2})[1]
    kernels = [float(params["model"]["dense"]["kernel"][0, 0]) for params in steps]
    others = [float(params["encoding"]["qk_map"]["kernel"][0, 0]) for params in steps]
    assert kernels == pytest.approx([1.0, 1.0, 0.9], rel=1e-5) and others == pytest.approx([0.9, 0.8, 0.7], rel=1e-5)


def test_the_encoding_has_a_learning_rate_of_its_own():
    settings = {"learning_rate": 0.1, "encoder_learning_rate": 0.01}
    state, steps = updated(settings, 1)
    for part, expected in (("encoding", 0.99), ("model", 0.9)):
        jax.tree.map(lambda leaf, value=expected: np.testing.assert_allclose(leaf, value, rtol=1e-5), steps[0][part])
    plain = jax.tree.structure(updated({"learning_rate": 0.1}, 1)[0])
    assert jax.tree.structure(state) == plain, "a run may change it when it resumes"


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"freeze": ("model/*", "modl/*")},
            "optimizer.freeze: 'modl/\\*' matches no parameter; their names are encoding/",
        ),
        ({"freeze": ("*",)}, "freezes all 5 arrays of the model"),
        ({"freeze": ("enc*",), "encoder_learning_rate": 0.1}, "this model trains none"),
    ],
)
def test_a_field_that_selects_no_parameter_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        check_selected_params(OptimizerConfig(**settings), tree(*[1.0] * 5))


def test_the_mean_of_gradients_in_bfloat16(tmp_path):
    """Stored in two bytes, computed in four: the first update is that of float32. A restored state continues bit for bit."""
    draw = np.random.default_rng(0)
    params = tree(*draw.normal(size=5))
    grads = [tree(*draw.normal(size=5)) for _ in range(3)]
    optimizers = {
        dtype: make_optimizer(OptimizerConfig(state_dtype=dtype, schedule="constant", clip=0.0), 10)
        for dtype in ("float32", "bfloat16")
    }
    states = {dtype: optimizer.init(params) for dtype, optimizer in optimizers.items()}
    moments = {
        (name, leaf.dtype.name)
        for name in ("mu", "nu")
        for _, found in optax.tree_utils.tree_get_all_with_path(states["bfloat16"], name)
        for leaf in jax.tree.leaves(found)
    }
    assert moments == {("mu", "bfloat16"), ("nu", "float32")}
    first = [optimizer.update(grads[0], states[dtype], params)[0] for dtype, optimizer in optimizers.items()]
    jax.tree.map(np.testing.assert_array_equal, *first)

    update, state = jax.jit(optimizers["bfloat16"].update), states["bfloat16"]
    checkpoints = Checkpointer(tmp_path)
    for step, gradients in enumerate(grads):
        if step == 2:
            checkpoints.save(step, {"opt_state": state}, {})
        _, state = update(gradients, state, params)
    checkpoints.wait()
    everywhere = replicated(make_mesh(0, 1))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), state)
    restored = checkpoints.restore({"opt_state": shapes})["opt_state"]
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, update(grads[2], restored, params)[1], state)
