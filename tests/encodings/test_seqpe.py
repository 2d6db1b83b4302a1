"""SeqPE: the read-out shortcut, determinism, dropout, shared prefixes, digit indices, products, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import CompatConfig, ModelDims, SeqPEConfig
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError
from seqpe_jax.positions.prefix_trie import PositionStructure
from tests.tiny import draw_params

KEY = jax.random.PRNGKey(0)
SIZES = {"width": 12, "heads": 2, "digits": 3, "init_std": 0.5}
POSITIONS_RA = jnp.array([[0], [7], [70], [345], [999], [7]], jnp.int32)


def make(*, axes=1, model_width=12, model_heads=2, qk="single", **fields) -> SeqPE:
    """A module by itself; qk "halves" is that of the reference without a map."""
    compat = CompatConfig(qk_halves=qk == "halves")
    fields["qk"] = "none" if compat.qk_halves else qk
    dims = ModelDims(layers=3, width=model_width, heads=model_heads, grid=(9,) * axes, compat=compat)
    return SeqPE(SeqPEConfig(**(SIZES | fields)), dims)


@functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def compiled_vectors(encoding, variables, positions_RA, deterministic=True, rngs=None):
    return encoding.apply(variables, positions_RA, deterministic=deterministic, rngs=rngs, method="vectors")


def vectors(encoding, variables, positions_RA=POSITIONS_RA, **options):
    return np.asarray(compiled_vectors(encoding, variables, positions_RA, **options))


def initial(encoding, positions_RA=POSITIONS_RA):
    init = functools.partial(encoding.init, shape=(len(positions_RA),))
    return draw_params(jax.eval_shape(init, KEY, jnp.asarray(positions_RA)[None]), 0.5)


def test_a_vector_depends_on_its_position_alone():
    encoding = make()
    variables = initial(encoding)
    vectors_RE = vectors(encoding, variables)
    np.testing.assert_array_equal(vectors_RE, vectors(encoding, variables))
    np.testing.assert_array_equal(vectors_RE[1], vectors_RE[5])
    np.testing.assert_allclose(vectors(encoding, variables, POSITIONS_RA[2:4]), vectors_RE[2:4], atol=1e-5)
    assert np.abs(vectors_RE[1] - vectors_RE[2]).max() > 1e-2  # 007 and 070
    assert vectors_RE.dtype == np.float32


def test_dropout_acts_only_in_training():
    encoding = make(dropout=0.5)
    variables = initial(encoding)
    keys = [{"rngs": {"dropout": jax.random.PRNGKey(seed)}} for seed in (0, 1)]
    np.testing.assert_array_equal(vectors(encoding, variables, **keys[0]), vectors(encoding, variables, **keys[1]))
    first, second = (vectors(encoding, variables, deterministic=False, **key) for key in keys)
    assert np.abs(first - second).max() > 1e-2
    attention = make(dropout=0.0, attention_dropout=0.5)
    first, second = (vectors(attention, variables, deterministic=False, **key) for key in keys)
    assert np.abs(first - second).max() > 1e-2


@pytest.mark.parametrize("direction", ["causal", "bi"])
def test_the_shortcut_of_the_last_layer_changes_nothing(direction, monkeypatch):
    from seqpe_jax.encodings import digit_encoder

    encoding = make(direction=direction)
    variables = initial(encoding)
    short = vectors(encoding, variables)
    string_layers, last = digit_encoder.string_layers, []

    def all_tokens(*arguments):
        x_RNW, layers = string_layers(*arguments)
        last.extend(layer.last_only for layer in layers)
        return x_RNW, [layer._replace(last_only=False) for layer in layers]

    monkeypatch.setattr(digit_encoder, "string_layers", all_tokens)
    compiled_vectors.clear_cache()
    np.testing.assert_allclose(vectors(encoding, variables), short, atol=1e-5)
    assert last == [False, True]
    compiled_vectors.clear_cache()


WINDOW = np.arange(186, 236)[:, None]
RANDOM = np.random.default_rng(0).integers(0, 1000, (30, 1))
BOXES = np.stack(np.meshgrid(np.arange(37, 51), np.arange(8, 18), indexing="ij"), -1).reshape(-1, 2)
STRIDED = np.arange(50)[:, None] * 10
JITTERED_BOX = 10 * (BOXES - [37, 8]) + 3 + np.random.default_rng(0).integers(-3, 4, BOXES.shape)
SHARED = {
    "a window without a group": (WINDOW, [], {}),
    "two windows, one of them cut, and others": (
        np.concatenate([WINDOW, WINDOW[:20] + 90, WINDOW[20:] + 300, RANDOM]),
        [PositionStructure(2, (50,), 2), PositionStructure(30)],
        {},
    ),
    "one layer, which reads the last digit": (
        np.concatenate([WINDOW, RANDOM]),
        [PositionStructure(1, (50,)), PositionStructure(30)],
        {"cls": False, "layers": 1},
    ),
    "base 3 and three layers": (WINDOW, [PositionStructure(1, (50,))], {"base": 3, "digits": 6, "layers": 3}),
    "some of a window": (WINDOW[::7], [PositionStructure(1, (50,), max_rows=8)], {}),
    "a box, digit indices per axis": (BOXES, [PositionStructure(1, (14, 10))], {"axes": 2, "digit_index": "per_axis"}),
    "a strided window": (STRIDED, [PositionStructure(1, (50,), spans=(490,))], {}),
    "a jittered box": (
        JITTERED_BOX,
        [PositionStructure(1, (14, 10), spans=(136, 96), independent_axes=True)],
        {"axes": 2},
    ),
}
# The fast lane takes groups of all kinds along one axis, and boxes.
FAST = ("two windows, one of them cut, and others", "a jittered box")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SHARED]
)
def test_shared_prefixes_change_nothing(name, monkeypatch):
    """Values and gradients, for rows that share and rows that do not; sharing is forced."""
    from seqpe_jax.encodings import seqpe

    monkeypatch.setattr(seqpe, "MAX_SHARED_FRACTION", 10.0)
    positions_RA, structures, fields = SHARED[name]
    positions_RA = jnp.asarray(positions_RA, jnp.int32)
    shared, plain = make(**fields), make(share_prefixes=False, **fields)
    sizes = shared._max_nodes(positions_RA, structures)
    assert sizes is not None and plain._max_nodes(positions_RA, structures) is None
    if structures:
        assert sum(sizes) < 0.75 * len(positions_RA) * len(sizes)
    variables = initial(plain, positions_RA)
    weight_RE = jnp.asarray(np.random.default_rng(1).normal(size=(len(positions_RA), 12)))

    def value(encoding, structures):
        def loss(variables):
            vectors_RE = encoding.apply(variables, positions_RA, structures=structures, method="vectors")
            return (weight_RE * vectors_RE).sum(), vectors_RE

        (_, vectors_RE), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
        return vectors_RE, grads

    (found, found_grads), (expected, expected_grads) = value(shared, structures), value(plain, ())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for one, other in zip(jax.tree.leaves(found_grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, np.abs(other).max()))


def test_prefixes_are_shared_where_it_pays_and_can_be_done():
    window, few = jnp.asarray(WINDOW), jnp.asarray(RANDOM[:2])
    assert make()._max_nodes(window, [PositionStructure(1, (50,))]) == (2, 6, 50)
    assert make()._max_nodes(few, [PositionStructure(2)]) is None  # nothing to gain
    for fields in ({"direction": "bi"}, {"padding": "right"}, {"mask_padding": True}, {"share_prefixes": False}):
        assert make(**fields)._max_nodes(window, [PositionStructure(1, (50,))]) is None


def test_digit_indices_may_restart_with_each_axis():
    positions_RA = jnp.array([[12, 345], [345, 12]], jnp.int32)
    for digit_index, rows in ("global", 6), ("per_axis", 3):
        encoding = make(axes=2, digit_index=digit_index)
        variables = initial(encoding, positions_RA)
        assert variables["params"]["encoder"]["place_embedding"].shape == (rows, 12)
        found = vectors(encoding, variables, positions_RA)
        assert np.abs(found[0] - found[1]).max() > 1e-2  # coordinates still differ by their own embedding


@pytest.mark.parametrize("qk, per_head", [("multi", True), ("halves", False)])
def test_features_are_query_key_products(qk, per_head):
    """Of the whole encoding; other maps: test_narrow_parts_of_some_heads."""
    encoding = make(qk=qk, per_head=per_head, scalar_scale=3.0, qk_init_std=0.5)
    variables = initial(encoding)
    signal = jax.jit(lambda: encoding.apply(variables, POSITIONS_RA[None], shape=(6,)))()
    vectors_RE = vectors(encoding, variables)
    assert vectors_RE.shape == (6, 12 if per_head else 6) and bool(signal.per_layer_fields) == (qk == "multi")
    layers = [signal.at_layer(layer) for layer in range(3)]
    weights = variables["params"].get("qk_map", {})
    heads = 2 if per_head else 1
    for layer, at_layer in enumerate(layers):
        mapped = vectors_RE
        if weights:
            kernel, bias = (weights[name][layer] if qk == "multi" else weights[name] for name in ("kernel", "bias"))
            mapped = vectors_RE @ np.asarray(kernel) + np.asarray(bias)
        query, key = (mapped, mapped) if qk == "none" else np.split(mapped, 2, axis=-1)
        query, key = (part.reshape(6, heads, -1) for part in (query, key))
        found = np.einsum("plhf,pshf->phls", *at_layer.position_query_key)[0]
        expected = 3.0 * np.einsum("lhf,shf->hls", query, key) / np.sqrt(6)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    if qk == "multi":
        assert np.abs(layers[0].position_query_key[0] - layers[1].position_query_key[0]).max() > 1e-2


def test_initial_weights():
    for distribution in ("normal", "truncated_normal"):
        encoding = make(width=64, init_distribution=distribution, init_std=0.1, qk_init_std=0.3, norm_init=0.5)
        params = jax.jit(lambda encoding=encoding: encoding.init(KEY, POSITIONS_RA[None], shape=(6,)))()["params"]
        kernels = params["encoder"]["block_0"]["mlp_in"]["kernel"]
        assert float(kernels.std()) == pytest.approx(0.1 if distribution == "normal" else 0.088, rel=0.05)
        assert float(params["qk_map"]["kernel"].std()) == pytest.approx(
            0.3 if distribution == "normal" else 0.264, rel=0.15
        )
        assert (params["encoder"]["final_norm"]["scale"] == 0.5).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"direction": "bi", "cls": False}, "encoding.cls=True"),
        ({"width": 10, "heads": 4}, "encoding.width=10 is not a multiple of encoding.heads=4"),
        ({"mode": "input_add"}, "encoding.qk='none'"),
        ({"mode": "rotary", "qk": "none", "model_width": 6}, "model.width / model.heads = 3 is odd"),
        ({"mode": "attn_add", "output_width": 6}, "encoding.output_width=6: set it to 0 or 12"),
        ({"mode": "attn_mul", "qk": "halves", "output_width": 12}, "set it to 0 or 24"),
        ({"mode": "input_add", "qk": "none", "output_width": 6}, "set it to 0 or 12"),
        ({"qk": "none", "output_width": 7}, "do not split into 2 parts"),
        ({"qk": "halves", "output_width": 6}, "do not split into 4 parts"),
        ({"position_heads": 3}, "encoding.position_heads=3 is more than model.heads=2"),
        ({"mode": "input_add", "qk": "none", "position_heads": 1}, "reaches all heads: set encoding.position_heads=0"),
        (
            {"mode": "attn_add", "feature_width": 4},
            "set encoding.mode='attn_scalar' and encoding.qk='single' or 'multi'",
        ),
        ({"qk": "none", "feature_width": 4}, "or encoding.feature_width=0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    encoding = make(**fields)
    with pytest.raises(InputError, match=message):  # before anything is compiled
        jax.eval_shape(lambda: encoding.init(KEY, POSITIONS_RA[None], shape=(6,)))


@pytest.mark.slow
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("qk", ["single", "multi", "none", "halves"])
def test_narrow_parts_of_some_heads(qk, per_head):
    """Features by hand from vectors and the qk map: of the first two of three heads, and none of the third."""
    layers, width, narrow = 3, 12, 5 if qk in ("single", "multi") else 0
    encoding = make(
        model_heads=3,
        qk=qk,
        per_head=per_head,
        position_heads=2,
        feature_width=narrow,
        scalar_scale=3.0,
        qk_init_std=0.5,
    )
    vectors_PLE = jax.random.normal(KEY, (1, 6, width if per_head else width // 3))
    assert vectors_PLE.shape[-1] == encoding.vector_width
    variables = encoding.init(KEY, vectors_PLE, method="signal")  # the encoder itself is not asked
    parts = 2 if per_head else 1
    shapes = jax.tree.map(jnp.shape, variables.get("params", {}))
    if narrow:
        lead, out = (layers,) if qk == "multi" else (), 2 * parts * narrow
        assert shapes == {"qk_map": {"kernel": (*lead, vectors_PLE.shape[-1], out), "bias": (*lead, out)}}
        variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)  # a bias of its own
    else:
        assert shapes == {}
    signal = encoding.apply(variables, vectors_PLE, method="signal")
    assert signal.per_layer_fields == (("position_query_key",) if qk == "multi" else ())
    for layer in range(layers):
        found = np.einsum("plhf,pshf->phls", *signal.at_layer(layer).position_query_key)[0]
        assert found.shape == (3, 6, 6) and not found[2].any()
        mapped = np.asarray(vectors_PLE[0], np.float64)
        if narrow:
            kernel, bias = (variables["params"]["qk_map"][name] for name in ("kernel", "bias"))
            kernel, bias = (kernel[layer], bias[layer]) if qk == "multi" else (kernel, bias)
            mapped = mapped @ np.asarray(kernel) + np.asarray(bias)
        query, key = (mapped, mapped) if qk == "none" else np.split(mapped, 2, axis=-1)
        held = parts if narrow else 3 if per_head else 1  # without a map a vector has its part of each head
        query, key = (np.reshape(part, (6, held, -1)) for part in (query, key))
        for head in range(2):
            own = head if per_head else 0
            expected = 3.0 * query[:, own] @ key[:, own].T / np.sqrt(4)
            np.testing.assert_allclose(found[head], expected, atol=1e-4 * np.abs(expected).max())
