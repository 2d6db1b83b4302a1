"""Windows that hold several documents: each is as if it were alone, for every encoding and every attention backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.axes import use_sharding
from seqpe_jax.config import ENCODINGS
from seqpe_jax.config.encodings import ModelDims
from seqpe_jax.distributed.sharding import MeshSharding, make_mesh
from seqpe_jax.encodings.position_signal import PositionSignal, broadcast_to_batch
from seqpe_jax.errors import InputError
from seqpe_jax.losses.task import Documents, NetworkCall, NextTokenLoss
from seqpe_jax.models import attention_blockwise, attention_tpu
from seqpe_jax.models.attention import attend
from seqpe_jax.models.attention_inputs import AttentionInputs
from seqpe_jax.models.build import DataSpec, ModelSpec
from seqpe_jax.tasks.language_modeling import LanguageModeling
from tests.tiny import tiny_config

END, BATCH, LENGTH, HEADS, WIDTH = 0, 4, 16, 2, 4
FIRST, SECOND = 6, slice(6, 6 + 8)  # length of the first document of rows 0 and 1, end included, and the second one
CASES = {kind: (kind, {}) for kind, one in ENCODINGS.items() if one.AXES != "2+" and kind != "seqpe"}
MODES = ("attn_scalar", "attn_mul", "attn_add", "rotary", "input_add")
for mode in MODES:
    qk = "none" if mode in ("rotary", "input_add") else "single"
    CASES[f"seqpe {mode}"] = ("seqpe", {"width": 8, "heads": 2, "layers": 1, "mode": mode, "qk": qk})
CASES["alibi and more"] = ("alibi", {"rotary_pairs": 1, "rotary_heads": 1, "log_scaling": True, "start_at_zero": True})


@functools.cache
def rows() -> jax.Array:
    """int32[4, L + 1]: two windows of several documents, and rows that begin with the second one of each."""
    tokens = np.random.default_rng(0).integers(1, 9, (BATCH, LENGTH + 1))
    tokens[:2, [FIRST - 1, SECOND.stop - 1]] = END
    tokens[2:, :8] = tokens[:2, SECOND]
    return jnp.asarray(tokens, jnp.int32)


def random(name: int, *shape) -> jax.Array:
    return jax.random.normal(jax.random.PRNGKey(name), shape)


def query_key_value() -> list[jax.Array]:
    return [random(side, 9, HEADS, WIDTH)[rows()[:, :-1]] for side in range(3)]


def signal_of(kind: str, fields: dict) -> PositionSignal:
    """Two sets of positions, from 0 and from 5 on, each read by two rows."""
    encoding = ENCODINGS[kind](**fields).build(ModelDims(1, HEADS * WIDTH, HEADS, (LENGTH,)))
    positions_PLA = jnp.arange(LENGTH, dtype=jnp.int32)[None, :, None] + jnp.array([0, 5])[:, None, None]
    options = {"shape": (LENGTH,)}
    if kind == "seqpe":  # any vectors, without their encoder
        vectors_PLE = random(4, 2, LENGTH, encoding.vector_width)
        return encoding.init_with_output(jax.random.PRNGKey(1), vectors_PLE, positions_PLA, method="signal", **options)[
            0
        ]
    params = encoding.init(jax.random.PRNGKey(1), positions_PLA, **options)
    return encoding.apply(jax.tree.map(lambda leaf: leaf + 0.3, params), positions_PLA, **options)  # none is 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_document_in_a_window_is_as_if_alone(name):
    """Outputs of the second document, in its window and at the beginning of a row; also with forget gates."""
    kind, fields = CASES[name]
    config = ENCODINGS[kind](**fields)
    signal = Documents(END, config.reset_fields).signal(signal_of(kind, fields), rows()[:, :-1])
    qkv = query_key_value()
    if signal.input_embedding is not None:
        added = broadcast_to_batch(signal.input_embedding, BATCH).reshape(BATCH, LENGTH, HEADS, WIDTH)
        qkv = [part + added for part in qkv]
    gates_BLH = jnp.cumsum(-jnp.abs(random(3, 9, HEADS)[rows()[:, :-1]]), axis=1)
    for gate_BLH in (None, gates_BLH) if config.has("gate") else (None,):
        out = attend(*qkv, signal.at_layer(0), gate_BLH, kind="reference")
        np.testing.assert_allclose(out[:2, SECOND], out[2:, :8], atol=1e-5)


# --- Backends

DOCUMENTS = np.sort(np.random.default_rng(1).integers(0, 3, (BATCH, LENGTH)))
PAIR = tuple(random(side, 1, LENGTH, 1, 3) for side in (7, 8))
QKV = tuple(random(side, BATCH, LENGTH, HEADS, WIDTH) for side in (10, 11, 12))


def output_and_gradients(**options):
    def score(qkv, pair):
        out = attend(*qkv, PositionSignal(position_query_key=pair, documents=jnp.asarray(DOCUMENTS)), **options)
        return (out * random(13, *out.shape)).sum(), out

    return jax.jit(jax.grad(score, argnums=(0, 1), has_aux=True))(QKV, PAIR)


@functools.cache
def expected():
    """Each document by itself, without a mask of documents."""

    def alone(qkv, pair):
        out = []
        for sample, documents in enumerate(DOCUMENTS):
            ends = [0, *np.flatnonzero(np.diff(documents)) + 1, LENGTH]
            parts = [
                attend(
                    *(part[sample : sample + 1, first:last] for part in qkv),
                    PositionSignal(position_query_key=tuple(field[:, first:last] for field in pair)),
                    kind="reference",
                )
                for first, last in zip(ends, ends[1:], strict=False)
            ]
            out.append(jnp.concatenate(parts, axis=1))
        out = jnp.concatenate(out)
        return (out * random(13, *out.shape)).sum(), out

    return jax.jit(jax.grad(alone, argnums=(0, 1), has_aux=True))(QKV, PAIR)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes, options",
    [
        (None, {"kind": "reference"}),
        (None, {"kind": "blockwise", "block": 3}),
        ((2, 1, 4, 1), {"kind": "blockwise", "block": 3, "context": "ring"}),
        ((2, 1, 2, 2), {"kind": "blockwise", "block": 3, "context": "gather"}),
        ((2, 1, 4, 1), {"kind": "flash", "context": "ring"}),  # the TPU kernels, interpreted
    ],
)
@pytest.mark.usefixtures("small_kernel")
def test_every_backend_equals_documents_alone(sizes, options):
    """Outputs and gradients, also with tokens over devices."""
    with use_sharding(MeshSharding(make_mesh(*sizes)) if sizes else None):
        found = output_and_gradients(**options)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected()), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("small_kernel")
def test_the_kernels_skip_tiles_of_other_documents(monkeypatch):
    """Outputs and gradients; tiles of 4 tokens of all samples in one grid step, of which 7 of 10 before the diagonal are needed."""
    counts, shared = [], attention_tpu._Tile.shared_logits

    def counted(tile):
        jax.debug.callback(lambda: counts.append(1))
        return shared(tile)

    monkeypatch.setattr(attention_tpu._Tile, "shared_logits", counted)
    for one, other in zip(*map(jax.tree.leaves, (output_and_gradients(kind="flash"), expected())), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    jax.effects_barrier()
    of_blocks = DOCUMENTS.reshape(BATCH, 4, 4)
    meet = (of_blocks.max(2)[:, None] >= of_blocks.min(2)[..., None]).any(0) & np.tri(4, dtype=bool)
    assert len(counts) == 3 * HEADS * meet.sum() == 3 * HEADS * 7
    documents = (jnp.asarray(DOCUMENTS)[:, None, None],) * 2  # of one sample in each of four grid steps
    config = attention_tpu.KernelConfig(16, 4, 4, (4, 4), 1, True, False, 0.0, None, jnp.float32, True)
    for keys_outer in (False, True):
        bounds = attention_tpu._document_bounds(documents, config, keys_outer).reshape(BATCH, 4, 2)
        assert bounds[2].tolist() == [[0, 1], [0, 2], [1, 2], [3, 3]]


def test_blocks_of_earlier_documents_alone_are_skipped():
    """Of 16 blocks of one token, a query sees those of its document and of any that another sample still reads there."""
    documents = jnp.array([[0] * 8 + [1] * 8, [0] * 4 + [1] * 12])
    inputs = AttentionInputs(
        *(jnp.zeros((2, 2, 16, 4)),) * 3, documents=(documents,) * 2, causal_offset=jnp.zeros(1, int)
    )
    ranges = [attention_blockwise._key_blocks(inputs, jnp.int32(i), 1) for i in (3, 7, 8, 15)]
    assert [(int(first), int(stop)) for first, stop in ranges] == [(0, 4), (0, 8), (4, 9), (4, 16)]


# --- Loss


def test_the_first_token_of_a_document_is_not_predicted():
    """Losses by the tokens that a network sees: the mean, its weight, and the loss of each token."""
    weights, loss = jnp.full((BATCH, LENGTH), 2.0), NextTokenLoss(Documents(END))
    counted = np.asarray(rows()[:, :-1] != END)
    assert (~counted).sum() == 6 and not counted[0, [FIRST - 1, SECOND.stop - 1]].any()
    batch = {"tokens": rows()}
    assert loss.weight(batch) == counted.sum() and loss.weight(batch | {"weights": weights}) == 2 * counted.sum()
    settings = tiny_config(variant="alibi", data__packing="documents", data__tokenizer="bytes_eos")
    spec = ModelSpec.of(settings, DataSpec(vocabulary=9))
    params = jax.jit(spec.init)(jax.random.PRNGKey(0))
    signal, variables = spec.signal(params, jnp.arange(LENGTH)[None, :, None], (LENGTH,)), {"params": params["model"]}

    @jax.jit
    def run(tokens):
        found = loss.eval_step(spec.network, variables, signal, {"tokens": tokens})["loss"]
        return found, loss.loss(NetworkCall(spec.network, variables, signal), {"tokens": tokens}, None)[0]

    losses, mean = run(rows())
    np.testing.assert_allclose(mean, np.asarray(losses)[counted].mean(), rtol=1e-6)
    np.testing.assert_allclose(losses[:2, SECOND][:, :-1], losses[2:, :7], atol=1e-5)


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(InputError, match="has no EOS token .* set data.tokenizer='bytes_eos'"):
        LanguageModeling(tiny_config(data__packing="documents"))
    task = LanguageModeling(tiny_config(data__packing="documents", data__tokenizer="bytes_eos"))
    assert task.document_end == 255 and "position_query_key" in task.task_loss.documents.reset_fields
