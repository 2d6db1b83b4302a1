"""Choice of the attention backend, refusals, and the inputs of cuDNN."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.errors import InputError
from seqpe_jax.models import attention_blockwise, attention_cudnn, attention_dispatch, attention_tpu
from seqpe_jax.models.attention_inputs import AttentionInputs, reference_attention
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.training.trainer import Trainer
from tests.tiny import tiny_config

CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
H200 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
A100 = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0")
AMD = types.SimpleNamespace(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942")
KEY = jax.random.PRNGKey(0)


def shapes(
    length=1024,
    keys=None,
    *,
    width=64,
    position_query_key=0,
    causal=True,
    dtype=jnp.bfloat16,
    bias=False,
    drop=False,
    key_heads=3,
    **options,
):
    """The shapes of operands of 2 samples and 3 heads."""
    keys = keys or length
    array = jax.ShapeDtypeStruct
    return AttentionInputs(
        array((2, length, 3, width), dtype),
        array((2, keys, key_heads, width), dtype),
        array((2, keys, key_heads, width), dtype),
        position_query_key=(
            array((1, length, 3, position_query_key), jnp.float32),
            array((1, keys, 3, position_query_key), jnp.float32),
        )
        if position_query_key
        else None,
        bias=array((1, 3, length, keys), jnp.float32) if bias else None,
        causal_offset=array((1,), jnp.int32) if causal else None,
        dropout_seed=array((), jnp.int32) if drop else None,
        **options,
    )


def chosen(device, inputs, kind="auto", block=0, **fields):
    found = attention_dispatch.dispatch(kind, block, inputs, device=device, **fields)
    return f"blocks {found.block}" if found.name == "blockwise" else found.name


@pytest.mark.parametrize(
    "device, fields, expected",
    [
        (CPU, {"length": 1, "keys": 4096}, "reference"),
        (CPU, {"length": attention_dispatch.MAX_REFERENCE_LEN_CPU}, "reference"),
        (CPU, {"length": 2048}, "blocks 128"),
        (CPU, {"length": 65536}, "blocks 512"),
        (TPU, {"length": 197, "causal": False}, "reference"),
        (TPU, {"length": 512, "position_query_key": 64, "drop": True}, "tpu"),
        (TPU, {"length": 511, "keys": 1024, "dtype": jnp.float32}, "tpu"),
        (TPU, {"bias": True}, "blocks 512"),
        (H200, {"length": 256}, "reference"),
        (H200, {}, "cudnn"),
        (H200, {"position_query_key": 3, "causal": False}, "cudnn"),
        (H200, {"position_query_key": 32}, "cudnn"),
        (A100, {"position_query_key": 32}, "blocks 512"),
        (H200, {"position_query_key": 16}, "cudnn"),
        (A100, {"position_query_key": 8}, "cudnn"),
        (H200, {"position_query_key": 64}, "blocks 512"),
        (H200, {"dtype": jnp.float32}, "blocks 512"),
        (H200, {"drop": True}, "blocks 512"),
        (H200, {"bias": True}, "blocks 512"),
        (H200, {"length": 1023}, "blocks 512"),
        (H200, {"length": 512, "keys": 1024}, "blocks 512"),
        (AMD, {}, "blocks 512"),
        (CPU, {"length": 16384, "window": 512}, "blocks 128"),
        (TPU, {"key_heads": 1, "window": 512, "cap": 50.0, "position_query_key": 64}, "tpu"),
        (H200, {"key_heads": 1, "window": 512}, "cudnn"),
        (H200, {"key_heads": 1, "position_query_key": 16}, "blocks 512"),
        (H200, {"cap": 50.0}, "blocks 512"),
    ],
)
def test_dispatch(device, fields, expected):
    assert chosen(device, shapes(**fields)) == expected


def test_a_window_of_512_is_a_fifth_of_full_attention():
    """Logits that a CPU computes for 16,384 tokens."""

    def computed(window):
        inputs = shapes(16384, dtype=jnp.float32, window=window)
        size = attention_dispatch.dispatch("auto", 0, inputs, device=CPU).block
        inputs = inputs.replace(key=jnp.zeros((1, 1, 16384, 1)), causal_offset=jnp.zeros(1, jnp.int32))
        first, stop = attention_blockwise._key_blocks(inputs, jnp.arange(16384 // size), size)
        return int((stop - first).sum()) * size**2

    assert computed(512) < computed(0) / 5


def test_narrow_features_are_joined_where_products_are_exact():
    fields = {"position_query_key": 16, "dtype": jnp.float32}

    def joins(device, **fields):
        found = attention_dispatch.dispatch("blockwise", 0, shapes(**fields), device=device)
        return found.attend.keywords["concat_position"]

    assert (
        joins(CPU, **fields)
        and not joins(CPU, **fields | {"position_query_key": 17})
        and not joins(CPU, dtype=jnp.float32)
        and not joins(CPU, **fields, key_heads=1)
    )
    assert not joins(H200, **fields) and not joins(CPU, position_query_key=16)


@pytest.mark.parametrize(
    "batch, position_query_key, expected", [(16, 0, 128), (16, 16, 128), (16, 64, 64), (2, 64, 128)]
)
def test_blocks_on_a_cpu_are_small_where_features_are_wide(batch, position_query_key, expected):
    inputs = shapes(512, position_query_key=position_query_key, dtype=jnp.float32)
    more = inputs.replace(query=jax.ShapeDtypeStruct((batch, *inputs.query.shape[1:]), jnp.float32))
    assert chosen(CPU, more) == f"blocks {expected}"


def test_dispatch_of_a_given_kind():
    long, short = shapes(4096), shapes(64)
    assert chosen(CPU, long, "reference") == chosen(TPU, long, "reference") == "reference"
    assert chosen(TPU, short, "blockwise", 32) == "blocks 32" and chosen(TPU, short, "flash") == "tpu"
    assert chosen(TPU, long, "auto", 100) == "blocks 100" and chosen(TPU, short, "auto", 100) == "reference"
    assert chosen(H200, shapes(512), "auto", split=True) == "blocks 512", "queries of a device start anywhere"
    assert chosen(H200, shapes(512, causal=False), "auto", split=True) == "cudnn"
    assert chosen(H200, shapes(512, causal=False), "auto", in_parts=True) == "blocks 512", "its parts cannot be merged"
    assert chosen(CPU, short, "auto", in_parts=True) == "blocks 128" and chosen(TPU, short, in_parts=True) == "tpu"


@pytest.mark.parametrize(
    "device, fields, words",
    [
        (CPU, {}, "no kernel for cpu"),
        (AMD, {}, "no kernel for gpu .AMD"),
        (TPU, {"bias": True}, "read no bias"),
        (H200, {"dtype": jnp.float32}, "precision.compute='bfloat16'"),
        (H200, {"drop": True}, "model.attention_dropout"),
        (H200, {"position_query_key": 64}, "448 wide, and cuDNN takes 256"),
        (H200, {"length": 7}, "even lengths"),
        (H200, {"cap": 50.0}, "no soft cap .*model.attention_cap"),
        (H200, {"key_heads": 1, "position_query_key": 8}, "position keys that differ by query heads"),
    ],
)
def test_unsupported_inputs_are_refused(device, fields, words):
    with pytest.raises(InputError, match=f"model.attention_kind='flash' cannot serve: .*{words}.*Choose 'auto'"):
        chosen(device, shapes(**fields), "flash")


def test_a_run_with_an_unsupported_kind_is_refused():
    with pytest.raises(InputError, match="attention_kind='flash' cannot serve: there is no kernel for cpu"):
        Trainer.of(tiny_config(model__attention_kind="flash"))


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_are_drawn_where_the_kernel_of_their_model_is_not(scan):
    """As when a step is compiled for a slice that is not there: this machine draws shapes, the slice runs the kernel."""
    model_spec = ModelSpec.of(tiny_config(model__attention_kind="flash", model__scan=scan), DataSpec(256))
    assert model_spec.shapes["model"]


def random(name, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, name), shape)


def test_three_parts_are_a_float32():
    field = random(1, 1000) * 10.0 ** jax.random.randint(KEY, (1000,), -3, 4)
    parts = [np.asarray(part, np.float64) for part in attention_cudnn.split_float32(field)]
    np.testing.assert_allclose(sum(parts), np.asarray(field, np.float64), rtol=2.0**-23)
    assert not np.allclose(sum(parts[:2]), np.asarray(field, np.float64), rtol=2.0**-19)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_inputs_give_the_same_output(causal):
    """The operands, mixed by XLA's form of the same function; odd widths, sets, features of all heads; a head of keys for all, a window."""
    batch, length, heads, width = 4, 10, 3, 8
    key_heads = 1 if causal else heads
    query, key = (
        random(side, batch, length, count, width).astype(jnp.bfloat16) for side, count in ((1, heads), (2, key_heads))
    )
    value = random(3, batch, length, key_heads, 2 * width).astype(jnp.bfloat16)
    position_query_key = tuple(30 * random(side, 2, length, 1, 3) for side in (4, 5))  # logits of thousands
    limits = {"causal_offset": jnp.zeros(1, jnp.int32), "window": 4} if causal else {}
    weight = random(6, batch, length, heads, 2 * width)

    def score(query, key, value, position_query_key, mix):
        mixed = mix(AttentionInputs(query, key, value, position_query_key, **limits)).astype(jnp.float32)
        return (mixed * weight).sum(), mixed

    assert attention_cudnn.padded_width(AttentionInputs(query, key, value, position_query_key)) == 32
    appended = attention_cudnn.append_position(AttentionInputs(query, key, value, position_query_key))
    assert [array.shape for array in appended] == [
        (batch, length, count, 32) for count in (heads, key_heads, key_heads)
    ]
    run = functools.partial(jax.grad(score, argnums=(0, 1, 2, 3), has_aux=True), query, key, value, position_query_key)
    found, expected = run(functools.partial(attention_cudnn.flash, implementation="xla")), run(reference_attention)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(array, np.float32) for array in (one, other))
        np.testing.assert_allclose(one, other, atol=0.02 * np.abs(other).max())


def test_appended_logits_at_distance_10_000_are_those_of_float32():
    """Logits of -10 000 as differences of products of 100 000; two parts of bfloat16 would be some units off."""
    place = np.array([0, 1, 2, 5000, 9999, 10000])
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    rest = np.random.default_rng(1).normal(size=(6, 6)) * 100
    query = np.concatenate([-place[:, None] / 10.0, np.full((6, 1), 10.0), rest], axis=1) @ turn
    key = np.concatenate([np.full((6, 1), 10.0), place[:, None] / 10.0, 0 * rest], axis=1) @ turn
    zeros = jnp.zeros((1, 6, 1, 8), jnp.bfloat16)
    position_query_key = tuple(jnp.asarray(field, jnp.float32)[None, :, None] for field in (query, key))
    inputs = AttentionInputs(zeros, zeros, zeros, position_query_key)
    q, k, _ = (np.asarray(array[0, :, 0], np.float64) for array in attention_cudnn.append_position(inputs))
    np.testing.assert_allclose(q @ k.T, place[None] - place[:, None], atol=0.02)
    two = slice(8, 8 + 3 * 8)  # as much as two parts of each would give
    assert np.abs(q[:, two] @ k[:, two].T - (place[None] - place[:, None])).max() > 0.02


@pytest.mark.parametrize("position_query_key, width", [(16, 64 + 6 * 16), (32, 256)])
def test_narrow_features_with_heads_of_64_are_cudnns_on_hopper(position_query_key, width):
    """In six products of parts of bfloat16, appended to queries and keys; values stay in front, then zeros."""
    assert chosen(H200, shapes(512, position_query_key=position_query_key)) == "cudnn"
    assert attention_cudnn.padded_width(shapes(position_query_key=position_query_key)) == width
    assert chosen(A100, shapes(512, position_query_key=position_query_key)) == "blocks 512", "Ampere's kernel takes 128"
    inputs = AttentionInputs(
        *(random(side, 2, 6, 3, 64).astype(jnp.bfloat16) for side in (1, 2, 3)),
        position_query_key=tuple(5 * random(side, 1, 6, 3, position_query_key) for side in (4, 5)),
    )
    query, key, value = (np.asarray(array, np.float64) for array in attention_cudnn.append_position(inputs))
    assert query.shape == key.shape == value.shape == (2, 6, 3, width)
    np.testing.assert_array_equal(value[..., :64], np.asarray(inputs.value, np.float64))
    assert not value[..., 64:].any()
    plain_q, plain_k = (np.asarray(array, np.float64) for array in (inputs.query, inputs.key))
    position_query, position_key = (np.asarray(field, np.float64) for field in inputs.position_query_key)
    logits = np.einsum("blhk,bshk->bhls", plain_q, plain_k) + np.einsum("blhf,bshf->bhls", position_query, position_key)
    np.testing.assert_allclose(np.einsum("blhk,bshk->bhls", query, key), logits, atol=2e-5 * np.abs(logits).max())


@pytest.mark.parametrize(
    "page, hopper, ampere",
    [
        ("lm_1b", "cudnn", "blocks 512"),
        ("wikitext103_gpt2:seqpe_narrow", "cudnn", "cudnn"),
        ("squad_qa_gpt2:seqpe_narrow", "cudnn", "cudnn"),
        ("wikitext103_gpt2", "blocks 512", "blocks 512"),
    ],
)
def test_recipes_for_gpus_have_cudnns_attention(page, hopper, ampere):
    settings = config.load(f"configs/{page.partition(':')[0]}.py:{page.partition(':')[2]}".rstrip(":"))
    model, narrow = settings.model, settings.encoding.feature_width or settings.model.width // settings.model.heads
    inputs = shapes(
        settings.data.length,
        width=model.width // model.heads,
        position_query_key=narrow,
        drop=model.attention_dropout > 0,
        dtype=jnp.dtype(settings.precision.compute),
    )
    assert (chosen(H200, inputs), chosen(A100, inputs)) == (hopper, ampere)


@pytest.mark.parametrize(
    "length, together, expected",
    [
        (7, 1, 128),
        (129, 8, 256),
        (256, 1, 256),
        (512, 1, 512),
        (512, 8, 256),
        (640, 1, 384),
        (1100, 1, 384),
        (4096, 1, 512),
    ],
)
def test_blocks_of_the_kernel_leave_little_padding(length, together, expected):
    assert attention_tpu.block_size(length, together) == expected
