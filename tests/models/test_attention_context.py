"""Attention over a sequence that is split over devices, gathered or in a ring: it is the attention of one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from seqpe_jax.axes import use_sharding
from seqpe_jax.distributed.sharding import MeshSharding, make_mesh
from seqpe_jax.encodings.position_signal import PositionSignal, RelativeBias
from seqpe_jax.encodings.relative_bias import LogBias
from seqpe_jax.errors import InputError
from seqpe_jax.models import attention_context
from seqpe_jax.models.attention import attend
from seqpe_jax.models.attention_context import Split, make_plan
from seqpe_jax.models.attention_tpu import AUTO_BLOCKS
from seqpe_jax.profiling.collectives import collectives
from seqpe_jax.profiling.hlo import HloModule
from seqpe_jax.training.trainer import Trainer
from tests.models.test_attention import close
from tests.models.test_attention_dispatch import CPU, shapes
from tests.tiny import tiny_config

BATCH, HEADS, WIDTH = 2, 2, 4
KEY = jax.random.PRNGKey(0)


def random(name: int, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, name), shape)


def sharding(shards: int = 4) -> MeshSharding:
    """Tokens are split over four devices."""
    return MeshSharding(make_mesh(1, 1, shards, 1, jax.devices()[:shards]))


@functools.cache
def case(name: str) -> tuple[int, PositionSignal, dict]:
    """(tokens, signal, options): together they have every term that logits may gain."""
    length = 16 if name == "divisible images" else 13  # 16 with padding: chunks of two tokens
    angles = random(9, 1, length, 1, WIDTH // 2)
    position = tuple(random(side, 1, length, 1, 3) for side in (10, 11))
    if name.endswith("images"):
        return length, PositionSignal(position_query_key=position), {"causal": False}
    if name in ("text", "window"):  # as SeqPE, ALiBi, RoPE and forget gates do
        signal = PositionSignal(rotation=(jnp.cos(angles), jnp.sin(angles)), position_query_key=position)
        gate = -jnp.cumsum(jnp.abs(random(12, BATCH, length, HEADS)), axis=1)
        options = {"cum_log_gate_BLH": gate, "dropout_rate": 0.4, "dropout_key": KEY}
        return length, signal, options | ({"window": 5, "cap": 1.5} if name == "window" else {})
    inputs = jnp.stack([jnp.arange(length), jnp.arange(length), jnp.ones(length)], axis=-1)[None].astype(jnp.float32)
    signal = PositionSignal(
        bias=random(13, HEADS, length, length),
        relative_bias=RelativeBias(inputs, inputs, LogBias()),
        bias_params={"slope": jnp.array([1.0, 2.0]), "scale": jnp.array([0.5, 1.5])},
    )
    return length, signal, {"window": 3}


def output_and_gradients(name: str, **choice):
    length, signal, options = case(name)
    key_heads = 1 if options.get("window") else HEADS
    weight, *qkv = (random(side, BATCH, length, HEADS if side < 2 else key_heads, WIDTH) for side in range(4))
    gate = options.get("cum_log_gate_BLH")
    settings = {key: value for key, value in options.items() if key != "cum_log_gate_BLH"} | choice

    def score(qkv, gate, fields):
        found = signal.replace(**fields)
        out = attend(*qkv, found, gate, **settings)
        return (out * weight).sum(), out

    fields = {name: getattr(signal, name) for name in ("rotation", "position_query_key", "bias", "bias_params")}
    return jax.jit(jax.grad(score, argnums=(0, 1, 2), has_aux=True))(qkv, gate, fields)


@functools.cache
def expected(name: str):
    return output_and_gradients(name, kind="reference")


@pytest.mark.slow
@pytest.mark.usefixtures("small_kernel")
@pytest.mark.parametrize(
    "name, mode, kind",
    [
        ("window", "gather", "blockwise"),
        ("text", "ring", "blockwise"),
        ("window", "ring", "flash"),
        ("bias", "ring", "blockwise"),
        ("divisible images", "ring", "blockwise"),
        ("images", "gather", "reference"),
    ],
)
def test_over_devices_it_is_the_same(name, mode, kind):
    with use_sharding(sharding()):
        found = output_and_gradients(name, kind=kind, block=0 if kind == "flash" else 2, context=mode)
    close(found, expected(name))


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_every_device_has_the_same_work(shards):
    """Each visible pair of chunks is computed once, and no device computes more than another."""
    split = Split(("context",), shards, True, 4 * shards)
    for device in range(shards):
        chunks = [chunk for chunk in range(2 * shards) if split.holder(chunk) == device]
        assert sum(chunks) == 2 * shards - 1 and {
            one[1] for one in (split.low_chunk(device), split.high_chunk(device))
        } == set(chunks)
    computed = []
    for device in range(shards):
        pairs = attention_context._own_pairs(split, device)
        for source in range(shards):
            pairs += attention_context._pairs(split, device, source)
        computed += [(int(pair.query_chunk), int(pair.key_chunk)) for pair in pairs]
        assert len(pairs) == 2 * shards + 1
    assert sorted(computed) == [(query, key) for query in range(2 * shards) for key in range(query + 1)]


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_nothing_whole_is_reduced_or_stored(mode):
    """Gradients are scattered where they are summed, and gathered keys are no residuals of the forward pass."""
    length, on_mesh = 16, sharding()
    split = NamedSharding(on_mesh.mesh, PartitionSpec(None, "context"))
    array = jax.ShapeDtypeStruct((BATCH, length, HEADS, WIDTH), jnp.float32, sharding=split)

    def output(*qkv):
        with use_sharding(on_mesh):
            return attend(*qkv, PositionSignal(), kind="blockwise", block=2, context=mode)

    residuals = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(output, *qkv)[1], array, array, array))
    assert max(leaf.size for leaf in residuals) == array.size
    gradients = jax.grad(lambda *qkv: output(*qkv).sum(), argnums=(0, 1, 2))
    compiled = jax.jit(gradients, out_shardings=(split,) * 3).lower(array, array, array).compile()
    sent = collectives(HloModule(compiled.as_text())).by_kind
    assert sent.keys() == {"all-gather", "collective-permute"} - ({"all-gather"} if mode == "ring" else set())


def plan(inputs, mode="auto", kind="auto", shards=(4, 1, 1), device=CPU):
    options = {"kind": kind, "block": 0, "kernel_blocks": AUTO_BLOCKS, "mode": mode, "device": device}
    return make_plan(inputs, **options, context_axes=("context",), shards=shards)


def test_the_ring_serves_what_would_not_fit_gathered():
    million = shapes(2**20, position_query_key=4)  # 2 x 2 samples x 3 heads x 64 in bfloat16, and features
    assert plan(million).ring and not plan(million, "gather").ring
    assert not plan(million, shards=(4, 2, 3)).ring, "each device gathers a sixth of it"
    assert not plan(shapes(2**20 - 1, causal=False)).ring, "only causal attention may be padded"
    assert plan(shapes(64), "ring").backend.name == "blockwise", "the reference has no parts"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"inputs": shapes(63, causal=False)}, "in both directions over 63 tokens, .* mesh.context=4: choose 'gather'"),
        ({"inputs": shapes(64), "kind": "reference"}, "attention_kind='reference' .* mesh.context_attention='ring'"),
    ],
)
def test_what_the_ring_cannot_serve_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        plan(**options, mode="ring")


def test_a_run_is_refused_before_it_starts():
    with pytest.raises(InputError, match="mesh.context_attention='ring'"):
        Trainer.of(tiny_config(mesh__context=2, mesh__context_attention="ring", model__attention_kind="reference"))
