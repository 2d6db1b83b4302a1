"""Learning-rate schedules, separate clipping, and parameters with weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqpe_jax.config import OptimizerConfig, load
from seqpe_jax.config.validate import check_overrides_used
from seqpe_jax.distributed.sharding import abstract_state_with_shardings, make_mesh, replicated
from seqpe_jax.errors import InputError
from seqpe_jax.training.checkpoint import Checkpointer
from seqpe_jax.training.optimizer import (
    averaged_params,
    check_selected_params,
    decay_steps,
    learning_rate,
    make_optimizer,
    stop_frozen,
    update_average,
)
from seqpe_jax.training.step import TrainState, create_train_state
from tests.tiny import ROOT


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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- Kinds of optimizers

KINDS = ("adamw", "muon", "lion", "adafactor", "sgd", "schedule_free_adamw")
KERNELS = {"qkv": (8, 3, 2, 4), "out": (2, 4, 8), "mlp_in": (8, 128)}
WIDE = 256  # Adafactor stores sums of rows and columns from 128 on


def network(seed, wide=False):
    """Parameters, or gradients, of a network with one block and an encoding, drawn at random."""
    draw = np.random.default_rng(seed)
    kernels = KERNELS | ({"q": (WIDE, 2, 128)} if wide else {})
    block = {name: {"kernel": draw.normal(size=shape)} for name, shape in kernels.items()}
    model = {"token_embedding": {"embedding": draw.normal(size=(12, 8))}, "blocks_0": block}
    encoder = {"block_0": {"mlp_in": {"kernel": draw.normal(size=(8, 8)), "bias": draw.normal(size=8)}}}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), {"model": model, "encoding": {"encoder": encoder}})


def kernel_of(tree, name):
    return np.asarray(tree["model"]["blocks_0"][name]["kernel"])


def first_update(**settings):
    """The first update of the network's parameters, with a learning rate of 1 unless it is set."""
    settings = OptimizerConfig(**{"schedule": "constant", "clip": 0.0, "learning_rate": 1.0} | settings)
    optimizer, params = make_optimizer(settings, 10), network(0)
    return jax.jit(optimizer.update)(network(1), jax.jit(optimizer.init)(params), params)[0]


def test_muon_turns_the_matrices_of_blocks_into_directions_of_one_length():
    """Queries, keys and values are matrices of their own, and so are heads together; the rest is AdamW's."""
    found, adamw = first_update(kind="muon"), first_update()
    matrices = [kernel_of(found, "qkv")[:, which].reshape(8, 8) for which in range(3)]
    matrices += [kernel_of(found, "out").reshape(8, 8), kernel_of(found, "mlp_in")]
    for matrix in matrices:
        lengths = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(matrix.shape)))
        assert 0.5 < lengths.min() and lengths.max() < 1.4
    gradient = kernel_of(network(1), "out").reshape(8, 8)
    left, _, right = np.linalg.svd(gradient)
    assert np.vdot(matrices[3], -left @ right) > 0.95 * np.linalg.norm(matrices[3]) * np.sqrt(8)
    others = [{"encoding": tree["encoding"], "embedding": tree["model"]["token_embedding"]} for tree in (found, adamw)]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), *others)


def close(found, expected, rtol=1e-5, atol=0.0):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=rtol, atol=atol), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, formula",
    [
        ("adamw", lambda gradient, param: -np.sign(gradient)),
        ("lion", lambda gradient, param: -np.sign(gradient)),
        ("sgd", lambda gradient, param: -gradient),
        # Without sums of rows and columns, times the parameter's root mean square.
        ("adafactor", lambda gradient, param: -np.sign(gradient) * np.sqrt((param**2).mean())),
        ("schedule_free_adamw", lambda gradient, param: -np.sign(gradient)),  # the first average is the end itself
    ],
)
def test_the_first_update_of_each_kind(kind, formula):
    """Weight decay is the learning rate times the parameter, of kernels alone; learning rates of parts are their own."""
    expected = jax.tree.map(formula, network(1), network(0))
    close(first_update(kind=kind), expected, atol=2e-4)
    settings = {
        "learning_rate": 0.1,
        "weight_decay": 0.5,
        "encoder_learning_rate": 0.01,
        "embedding_learning_rate": 0.2,
    }
    found = first_update(kind=kind, **settings)
    close(found["encoding"], jax.tree.map(lambda leaf: 0.01 * leaf, expected["encoding"]), atol=2e-6)
    embeddings = [tree["model"]["token_embedding"]["embedding"] for tree in (found, expected)]
    close(embeddings[0], 0.2 * embeddings[1], atol=4e-5)
    own, decay = kernel_of(expected, "out"), 0.5 * kernel_of(network(0), "out")
    close(kernel_of(found, "out"), 0.1 * (own - decay), atol=2e-5)


@pytest.mark.slow
def test_schedule_free_evaluates_the_mean_of_its_ends():
    """Gradients are taken between the mean and the end (Defazio et al. 2024); a frozen parameter is its own mean."""
    fields = {"kind": "schedule_free_adamw", "schedule": "constant", "clip": 0.0, "learning_rate": 0.1}
    settings = OptimizerConfig(**fields, freeze=("model/token_embedding/*",))
    optimizer = make_optimizer(settings, 10)
    start = params = network(0)
    state = optimizer.init(params)
    ends, mean, squares, update = start, start, jax.tree.map(np.zeros_like, start), jax.jit(optimizer.update)
    for step in range(1, 4):
        gradients = params  # of half the sum of squares
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        squares = jax.tree.map(lambda old, new: 0.999 * old + 0.001 * np.asarray(new) ** 2, squares, gradients)
        scaled = jax.tree.map(lambda g, s: g / (np.sqrt(s / (1 - 0.999**step)) + 1e-8), gradients, squares)  # noqa: B023
        ends = jax.tree.map(lambda end, direction: end - 0.1 * direction, ends, scaled)
        mean = jax.tree.map(lambda old, end: old + (end - old) / step, mean, ends)  # noqa: B023
    found = averaged_params(settings, state, params)
    close(found["encoding"], mean["encoding"], 1e-4, 1e-5)
    close(kernel_of(found, "qkv"), kernel_of(mean, "qkv"), 1e-4, 1e-5)
    assert np.abs(kernel_of(found, "qkv") - kernel_of(params, "qkv")).max() > 1e-3
    close(found["model"]["token_embedding"], start["model"]["token_embedding"])


def test_an_average_moves_with_the_parameters_and_forgets_the_first():
    settings = OptimizerConfig(kind="sgd", momentum=0.0, schedule="constant", clip=0.0, learning_rate=0.1, ema=0.5)
    optimizer, move, params = make_optimizer(settings, 10), update_average(settings), network(0)
    state, expected = optimizer.init(params), params
    for step in range(8):
        updates, state = optimizer.update(network(step), state, params)
        params = optax.apply_updates(params, updates)
        state = move(state, params, jnp.int32(step))
        decay = min(0.5, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, expected, params)  # noqa: B023
    close(averaged_params(settings, state, params), expected, 1e-5, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_states_of_each_kind_on_a_mesh_and_restored(kind, tmp_path):
    """Split as the parameters are, with the values of one device; restored, the next step has the same bits."""
    fields = {"schedule": "constant", "learning_rate": 0.01, "epsilon": 1e-3} | (
        {} if kind == "schedule_free_adamw" else {"ema": 0.9}
    )
    settings = OptimizerConfig(kind=kind, **fields)
    optimizer, move = make_optimizer(settings, 10), update_average(settings)

    def step(state, gradients):
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, state.key, params, move(opt_state, params, state.step))

    def run(mesh, steps, state=None):
        start = lambda: create_train_state(network(0, wide=True), optimizer, jax.random.PRNGKey(0))  # noqa: E731
        targets, _ = abstract_state_with_shardings(mesh, jax.eval_shape(start))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, targets)
        state = jax.device_put(start(), shardings) if state is None else state(targets)
        update = jax.jit(step, out_shardings=shardings)
        for index in steps:
            state = update(state, network(10 + index, wide=True))
        return state

    mesh = make_mesh(1, 2, devices=jax.devices()[:2])
    alone, split = run(make_mesh(1, 1, devices=jax.devices()[:1]), range(2)), run(mesh, range(2))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-5), split, alone)
    large = [leaf for leaf in jax.tree.leaves(split.opt_state) if leaf.size >= 8 * 128]
    assert len(large) >= (kind == "sgd") + 1 and all(not leaf.sharding.is_fully_replicated for leaf in large)
    if kind == "adafactor":  # rows and columns of 256 x 256, and no array of its size but the average
        sizes = [leaf.size for leaf in jax.tree.leaves(split.opt_state["inner"])]
        assert max(sizes) == 8 * 128 and sizes.count(WIDE) == 2
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(2, split, {})
    checkpoints.wait()
    again = run(mesh, [2], lambda targets: checkpoints.restore(targets))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, again, run(mesh, [2], lambda _: split))


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("sgd", {"b1": 0.8}, "optimizer.b1 is not read here, it needs optimizer.kind='adamw' or 'muon' or 'lion' or"),
        ("lion", {"epsilon": 1e-6}, "optimizer.epsilon is not read here"),
        ("adafactor", {"state_dtype": "bfloat16"}, "optimizer.state_dtype is not read here"),
        ("adamw", {"momentum": 0.9}, "optimizer.momentum is not read here, it needs optimizer.kind='muon' or 'sgd'"),
        ("schedule_free_adamw", {}, "optimizer.schedule=linear is not read by .*: set optimizer.schedule=constant"),
        ("schedule_free_adamw", {"schedule": "constant", "ema": 0.9}, "optimizer.ema=0.9 is not read by"),
    ],
)
def test_what_a_kind_does_not_read_is_refused(kind, fields, message):
    fields = {"optimizer.kind": kind} | {f"optimizer.{name}": value for name, value in fields.items()}
    with pytest.raises(InputError, match=message):
        check_overrides_used(load(f"{ROOT}/configs/stdlib_lm.py:none", fields), fields)
