"""Baselines against the formulas of their papers, written as loops over pairs of tokens; gates and RoPE's scalings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import ENCODINGS, ModelDims
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.inference.compiled import with_mesh
from seqpe_jax.models.attention import attend, forget_gate_query_key
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.models.transformer import GATES
from seqpe_jax.training.trainer import Trainer
from seqpe_jax.trees import flatten_dict
from tests.tiny import every_part, random_params, tiny_config

LAYERS, HEADS, WIDTH = 2, 4, 8  # of a head
TEXTS = ("t5", "kerple", "fire", "scale_invariant", "pope", "rope_id")
GRIDS = ("alibi_grid", "lookhere", "fire", "fire_signed")
TRAINED = 16  # tokens of training, beyond which RoPE-ID sharpens attention
KEY = jax.random.PRNGKey(0)


# Lengths as the papers have them, and as none has them: no constant of a paper may be left in a formula.
PAPERS = {
    "t5_buckets": 32,
    "t5_max_distance": 128,
    "fire_threshold": 512.0,
    "fire_scale": 0.1,
    "kerple_scale": 1.0,
    "scale_invariant_tau": 10.0,
    "rotary_pairs": 2,
    "fastest_period": 32.0,
    "slowest_period": 2048.0,
    "directed_heads": 4,
    "slope_scale": 1.0,
    "yarn_beta_slow": 1.0,
    "yarn_beta_fast": 32.0,
}
OTHERS = PAPERS | {
    "t5_buckets": 10,
    "t5_max_distance": 24,
    "fire_threshold": 2.4,
    "fire_scale": 0.7,
    "kerple_scale": 8.0,
    "scale_invariant_tau": 3.0,
    "rotary_pairs": 3,
    "fastest_period": 7.0,
    "slowest_period": 20.0,
    "directed_heads": 2,
    "slope_scale": 0.5,
    "yarn_beta_slow": 0.5,
    "yarn_beta_fast": 6.0,
}


def make(kind, grid=(64,), prefix_tokens=0, model_heads=HEADS, **fields):
    chosen = ENCODINGS[kind]
    own = {
        name: value for name, value in (PAPERS | fields).items() if chosen.has(name) and name not in chosen.requires()
    }
    return chosen(**own).make_module(ModelDims(LAYERS, model_heads * WIDTH, model_heads, grid, prefix_tokens))


def signal_of(encoding, positions_PLA, shape, layer=1):
    """The signal of one layer, and the parameters it was made with; none of them is where it began."""
    variables = encoding.init(KEY, positions_PLA, shape=shape)
    draw = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * draw.normal(size=leaf.shape).astype(np.float32), variables)
    params = {name: np.asarray(leaf, np.float64) for name, leaf in variables.get("params", {}).items()}
    return encoding.apply(variables, positions_PLA, shape=shape).at_layer(layer), params


def operands(length, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.normal(size=(2, length, HEADS, WIDTH)).astype(np.float32) for _ in range(3)]


def mixed(logit, q, k, v, causal):
    """Softmax of logit(q_i, k_j, i, j, h) over the keys, times the values, in float64."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    out = np.zeros_like(v)
    for b, i, h in np.ndindex(out.shape[:3]):
        seen = range(i + 1 if causal else out.shape[1])
        logits = np.array([logit(q[b, i, h], k[b, j, h], i, j, h) for j in seen])
        weights = np.exp(logits - logits.max())
        out[b, i, h] = (weights / weights.sum()) @ v[b, : len(logits), h]
    return out


def dot(q, k):
    return q @ k / math.sqrt(WIDTH)


def t5_bucket(distance, buckets, max_distance):
    exact = buckets // 2
    if distance < exact:
        return int(distance)
    return min(
        buckets - 1, exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact))
    )


def rotated(array, angles):
    """The first pairs of a head, rotated by their angles."""
    found = array.copy()
    for n, angle in enumerate(angles):
        x, y = array[2 * n], array[2 * n + 1]
        found[2 * n] = x * math.cos(angle) - y * math.sin(angle)
        found[2 * n + 1] = x * math.sin(angle) + y * math.cos(angle)
    return found


def softplus(x):
    return np.log1p(np.exp(x))


def fire(params, moves, sides, h, start):
    """Of one distance and the largest one, or of a displacement along each axis and its sides."""
    c, threshold = abs(params["scale"][1]), abs(params["threshold"][1]) * start
    inward = params["inward"][1].reshape(len(moves), -1)
    hidden = params["inward_bias"][1].copy()
    for move, side, weights in zip(moves, sides, inward, strict=True):
        share = math.log(c * abs(move) + 1) / (math.log(c * max(side, threshold) + 1) + 1e-6)
        hidden += math.copysign(share, move) * weights
    hidden = np.maximum(hidden, 0.0)
    return hidden @ params["outward"][1][:, h] + params["outward_bias"][1][h]


def text_logit(kind, params, at, lengths):
    """The logit of the paper for tokens at the positions `at`, with these lengths."""

    def logit(q, k, i, j, h):
        distance = at[i] - at[j]
        if kind == "t5":
            return (
                dot(q, k) + params["buckets"][t5_bucket(distance, lengths["t5_buckets"], lengths["t5_max_distance"]), h]
            )
        if kind == "kerple":
            slope, scale = (max(params[name][1, h], 0.01) for name in ("slope", "scale"))
            return dot(q, k) - slope * math.log(1 + scale * distance)
        if kind == "fire":
            return dot(q, k) + fire(params, [distance], [at[i]], h, lengths["fire_threshold"])
        if kind == "scale_invariant":
            square = 2 * math.log(distance / lengths["scale_invariant_tau"] + 1) + 1
            frequencies = [10000.0 ** (-2 * n / WIDTH) for n in range(lengths["rotary_pairs"])]
            ends = (rotated(array, [position * f for f in frequencies]) for array, position in ((q, at[i]), (k, at[j])))
            return math.sqrt(square) * dot(*ends) + 1 - square
        if kind == "rope_id":
            count, fastest, slowest = (lengths[name] for name in ("rotary_pairs", "fastest_period", "slowest_period"))
            periods = [fastest * (slowest / fastest) ** (n / (count - 1)) for n in range(count)]
            ends = (
                rotated(array, [2 * math.pi * position / period for period in periods])
                for array, position in ((q, at[i]), (k, at[j]))
            )
            return (0.1 * math.log(max(1, (i + 1) / TRAINED)) + 1) ** 2 * dot(*ends)
        frequencies = 10000.0 ** (-np.arange(WIDTH) / WIDTH)
        shift = np.clip(params["shift"][1, h], -2 * math.pi, 0)
        return (softplus(q) * softplus(k) * np.cos(distance * frequencies - shift)).sum() / math.sqrt(WIDTH)

    return logit


@pytest.mark.parametrize("start, lengths", [(0, PAPERS), (300, OTHERS)])
@pytest.mark.parametrize("kind", TEXTS)
def test_attention_of_text_equals_the_paper(kind, start, lengths):
    """Near the origin and, except for FIRE, which reads how far the text goes back, anywhere else."""
    length = 40
    positions_PLA = jnp.array([*range(length - 2), 170, 199])[None, :, None] + start
    signal, params = signal_of(make(kind, (TRAINED,), **lengths), positions_PLA, (length,))
    q, k, v = operands(length)
    expected = mixed(text_logit(kind, params, positions_PLA[0, :, 0].tolist(), lengths), q, k, v, causal=True)
    for form, block in (("reference", 0), ("blockwise", 16)):
        np.testing.assert_allclose(attend(q, k, v, signal, kind=form, block=block), expected, atol=1e-5)
    assert np.abs(np.asarray(attend(q, k, v, PositionSignal())) - expected).max() > 1e-2
    if not start and kind in (
        "scale_invariant",
        "pope",
    ):  # gates lower logits that these scale, or compute in polar coordinates
        log_gate = (
            np.cumsum(-np.abs(np.random.default_rng(3).normal(size=(2, length, HEADS))), axis=1).astype(np.float32) / 10
        )
        logit, one = (
            text_logit(kind, params, positions_PLA[0, :, 0].tolist(), lengths),
            [array[:1] for array in (q, k, v)],
        )
        gated = lambda q, k, i, j, h: logit(q, k, i, j, h) + log_gate[0, i, h] - log_gate[0, j, h]  # noqa: E731
        expected = mixed(gated, *one, causal=True)
        for form, block in (("reference", 0), ("blockwise", 16)):
            found = attend(*one, signal, log_gate[:1], kind=form, block=block)
            np.testing.assert_allclose(found, expected, atol=1e-5)


def grid_logit(kind, params, coordinates, lengths):
    """The logit of the paper; coordinates: of each token, None = it has no position (the class token)."""
    directed = lengths["directed_heads"]
    slopes = {
        "alibi_grid": [2.0 ** (-2 * (h + 1)) for h in range(HEADS)],
        "lookhere": [0.5] * directed + [0.25, 0.0625][: HEADS - directed],
    }.get(kind)
    depth = {"alibi_grid": 1.0, "lookhere": 0.5}.get(kind, 1.0) * lengths["slope_scale"]  # the last of two layers

    def logit(q, k, i, j, h):
        here, there = coordinates[i], coordinates[j]
        if here is None or there is None:
            return dot(q, k)
        distance = math.dist(here, there)
        if kind == "fire":
            return dot(q, k) + fire(params, [distance], [math.dist((0, 0), (3, 2))], h, lengths["fire_threshold"])
        if kind == "fire_signed":
            moves = [mine - theirs for mine, theirs in zip(here, there, strict=True)]
            return dot(q, k) + fire(params, moves, (3, 2), h, lengths["fire_threshold"])
        down, right = there[0] - here[0], there[1] - here[1]
        hidden = (down > 0, down < 0, right > 0, right < 0)  # from heads that look up, down, left, right
        if (
            kind == "lookhere" and h < directed and hidden[(directed + h) % 4]
        ):  # the second layer goes on after the first
            return -1e30
        return dot(q, k) - slopes[h] * depth * distance

    return logit


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [PAPERS, OTHERS], ids=["papers", "others"])
@pytest.mark.parametrize("kind", GRIDS)
def test_attention_of_grids_equals_the_paper(kind, lengths):
    shape = (4, 3)
    coordinates = [(row, column) for row in range(4) for column in range(3)]
    name, fields = kind.removesuffix("_signed"), lengths | {"fire_signed": kind == "fire_signed"}
    signal, params = signal_of(make(name, shape, prefix_tokens=1, **fields), jnp.array(coordinates)[None], shape)
    q, k, v = operands(13)
    expected = mixed(grid_logit(kind, params, [None, *coordinates], lengths), q, k, v, causal=False)
    for form, block in (("reference", 0), ("blockwise", 8)):
        np.testing.assert_allclose(attend(q, k, v, signal, causal=False, kind=form, block=block), expected, atol=1e-5)
    finer, _ = signal_of(
        make(name, shape, prefix_tokens=1, fraction_digits=1, **fields), 10 * jnp.array(coordinates)[None], shape
    )
    np.testing.assert_allclose(attend(q, k, v, finer, causal=False), expected, atol=1e-5)


@pytest.mark.parametrize("heads, directed, undirected", [(6, 1, 2), (8, 1, 4), (12, 2, 4), (16, 2, 8)])
def test_slopes_of_lookhere_are_those_of_the_authors_code(heads, directed, undirected):
    """Four heads for each slope of those with a direction; of the others two or four, or as many for each of the four."""
    found = make("lookhere", (2, 3), directed_heads=0, model_heads=heads).apply(
        {}, jnp.zeros((1, 6, 2), jnp.int32), shape=(2, 3)
    )
    others = [0.25, 0.0625, 0.015625, 0.00390625]
    expected = [0.5, 0.25][:directed] * 4
    expected = sorted(expected, reverse=True) + sorted(others[:undirected] * max(1, undirected // 4), reverse=True)
    assert list(found.relative_bias.function.slopes) == expected


@pytest.mark.parametrize("kind", ["forget", "cable"])
def test_gates_lower_logits_by_later_tokens(kind):
    length = 12
    preactivations = np.random.default_rng(2).normal(size=(2, length, HEADS))
    steps = {"forget": -softplus(-preactivations), "cable": -softplus(preactivations)}[kind]
    np.testing.assert_allclose(GATES[kind](jnp.asarray(preactivations, jnp.float32)), steps, atol=1e-6)
    q, k, v = operands(length)
    for sample in range(2):
        one = [array[sample : sample + 1] for array in (q, k, v)]
        logit = lambda q, k, i, j, h, n=sample: dot(q, k) + steps[n, j + 1 : i + 1, h].sum()  # noqa: E731
        expected = mixed(logit, *one, causal=True)
        log_gate = jnp.cumsum(jnp.asarray(steps[sample : sample + 1], jnp.float32), axis=1)
        np.testing.assert_allclose(attend(*one, PositionSignal(), log_gate), expected, atol=1e-5)
    assert forget_gate_query_key(log_gate, log_gate)[0].shape == (1, length, HEADS, 2)


@pytest.mark.slow
@pytest.mark.parametrize("scaling, lengths", [("linear", PAPERS), ("ntk", PAPERS), ("yarn", PAPERS), ("yarn", OTHERS)])
def test_rope_is_scaled_in_longer_windows_alone(scaling, lengths):
    betas = {name: lengths[name] for name in ("yarn_beta_slow", "yarn_beta_fast")}
    dims = ModelDims(LAYERS, HEADS * WIDTH, HEADS, (64,))
    plain, scaled = (ENCODINGS["rotary"](scaling=name, **betas).make_module(dims) for name in ("none", scaling))
    positions_PLA = jnp.arange(512)[None, :, None]
    unscaled = plain.apply({}, positions_PLA, shape=(512,))
    for shape in ((64,), (20,)):  # as trained, or shorter
        short = positions_PLA[:, : shape[0]]
        jax.tree.map(np.testing.assert_array_equal, *(one.apply({}, short, shape=shape) for one in (plain, scaled)))
    found = scaled.apply({}, positions_PLA, shape=(512,))
    frequencies = 10000.0 ** (-2 * np.arange(4) / WIDTH)
    ratio = 8.0
    if scaling == "linear":
        expected = frequencies / ratio
    elif scaling == "ntk":
        expected = (10000.0 * ratio ** (WIDTH / (WIDTH - 2))) ** (-2 * np.arange(4) / WIDTH)
    else:
        slow, fast = lengths["yarn_beta_slow"], lengths["yarn_beta_fast"]
        unchanged = [min(1.0, max(0.0, (64 / (2 * math.pi / f) - slow) / (fast - slow))) for f in frequencies]
        expected = [(1 - share) * f / ratio + share * f for share, f in zip(unchanged, frequencies, strict=True)]
        np.testing.assert_allclose(found.multiplicative[0], 0.1 * math.log(8) + 1, rtol=1e-6)
    angles = np.arange(512)[:, None] * np.asarray(expected)
    np.testing.assert_allclose(found.rotation[0][0, :, 0], np.cos(angles), atol=1e-5)
    assert np.abs(found.rotation[0] - unscaled.rotation[0]).max() > 0.1


def gradients(settings, devices=None):
    """Logits of the model, and the gradients of their squares, by name."""
    run = Trainer.of(settings, devices or jax.devices()[:1])
    params = random_params(run, 0.3)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)

    def signal(params):
        return run.model_spec.signal(params, run.model_spec.position_grid.positions((24,))[None], (24,))

    def found(params):
        logits = run.model_spec.network.apply({"params": params["model"]}, tokens, signal(params))
        return (logits**2).mean(), logits

    (_, logits), slopes = jax.jit(with_mesh(run.mesh, jax.value_and_grad(found, has_aux=True)))(params)
    return logits, slopes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "fire", "scale_invariant", "pope", "alibi"])
def test_blocks_on_a_mesh_equal_the_plain_form(kind):
    """With every part that the encoding can be combined with."""
    layers = 2 if kind == "pope" else 1  # whose layers have phases of their own
    fields = {"variant": kind, "model__layers": layers, "precision__compute": "float32"}
    fields |= every_part(kind, "cable" if kind in ("alibi", "fire") else "forget")
    expected = gradients(tiny_config(**fields, model__attention_kind="reference"))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[1]["encoding"]))
    split = {"mesh__data": 2, "mesh__context": 2, "mesh__tensor": 2}
    blocks = tiny_config(**fields, **split, model__attention_kind="blockwise", model__attention_block=8)
    found = gradients(blocks, jax.devices())
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5 * max(1.0, float(np.abs(other).max())))


@pytest.mark.parametrize("kind, log_gate, scan", [("none", "forget", False), ("alibi", "cable", True)])
def test_gates_begin_as_open_as_their_bias(kind, log_gate, scan):
    """A token lets sigmoid(gate_bias_init) of those before it through, before training."""
    gates = {"encoding__gate": log_gate, "encoding__gate_bias_init": 3.0}
    settings = tiny_config(variant=kind, **gates, model__layers=2, model__scan=scan)
    params = jax.jit(ModelSpec.of(settings, DataSpec(vocabulary=256)).init)(KEY)
    biases = [leaf for name, leaf in flatten_dict(params["model"], "/").items() if name.endswith("fading/bias")]
    assert sum(bias.size for bias in biases) == settings.model.layers * settings.model.heads
    for bias in biases:
        np.testing.assert_allclose(np.exp(GATES[log_gate](bias)), 1 / (1 + np.exp(-3.0)), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "kerple", "pope"])
def test_heads_without_a_position_are_unchanged(kind):
    """position_heads leaves the last heads as they are without an encoding."""
    length, q, k, v = 10, *operands(10)
    signal, _ = signal_of(make(kind), jnp.arange(length)[None, :, None], (length,))
    some = attend(q, k, v, signal.for_heads(3, HEADS))
    np.testing.assert_array_equal(some[:, :, :3], attend(q, k, v, signal)[:, :, :3])
    np.testing.assert_allclose(some[:, :, 3], attend(q, k, v, PositionSignal())[:, :, 3], atol=1e-6)
