"""GPT-2 with every kind of signal against the PyTorch reference: logits, loss, and the gradients that were stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.fixed import ALiBi, NoPosition, Rotary, Sinusoidal
from seqpe_jax.encodings.learned import Learned
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.interop import reference
from seqpe_jax.models.gpt2 import GPT2
from seqpe_jax.objectives.task import cross_entropy
from tests.goldens import close, load, names, under

pytestmark = pytest.mark.slow


def make_encoding(spec, state):
    """(module, its parameters) of a file, and the method that takes its positions or vectors to the signal."""
    sizes = {"width_model": spec["n_embd"], "heads_model": spec["n_head"]}
    if spec["pe_type"] == "seq_pe":
        mode, qk = spec["pe_apply_method"], spec["use_pe_qk_per_layer"]
        if mode in ("input_add", "rotary"):
            qk = "none"
        elif qk is None:
            qk = "none" if spec["pe_out_dim"] == spec["n_embd"] else "halves"
        params = {"qk_map": reference.qk_map_params(state)} if qk in ("single", "multi") else {}
        per_head = spec["use_pe_multi_head"]
        return SeqPE(layers_model=spec["n_layer"], **sizes, mode=mode, qk=qk, per_head=per_head), params
    if spec["pe_type"] == "vanilla":
        return Learned(spec["n_embd"], (spec["n_positions"],)), reference.learned_params(state)
    make = {
        "sin": lambda: Sinusoidal(spec["n_embd"]), "rotary": lambda: Rotary(**sizes), "nope": NoPosition,
        "alibi": lambda: ALiBi(**sizes, reference_scaling=True),
    }  # fmt: skip
    return make[spec["pe_type"]](), {}


@pytest.mark.parametrize("name", names("gpt2"))
def test_gpt2(goldens, name):
    spec, arrays = load(goldens, "gpt2", name)
    state = under(arrays, "param/")
    encoding, encoding_params = make_encoding(spec, state)
    model = GPT2(spec["vocab_size"], spec["n_layer"], spec["n_embd"], spec["n_head"])
    params = {"encoding": encoding_params, "model": reference.gpt2_params(state)}
    tokens_BL, labels_BL = (jnp.asarray(arrays[key], jnp.int32) for key in ("in/input_ids", "in/labels"))
    vectors = spec["pe_type"] == "seq_pe"
    length = tokens_BL.shape[1]
    given = arrays["in/pe"] if vectors else jnp.arange(length, dtype=jnp.int32)[None, :, None]

    def run(params, given):
        variables = {"params": params["encoding"]}
        if vectors:
            signal = encoding.apply(variables, given, method="signal")
        else:
            signal = encoding.apply(variables, given, shape=(length,))
        logits_BLV = model.apply({"params": params["model"]}, tokens_BL, signal)
        return cross_entropy(logits_BLV, labels_BL)[0], logits_BLV

    params = jax.tree.map(jnp.asarray, params)
    inputs = (0, 1) if vectors else 0
    (loss, logits_BLV), grads = jax.jit(jax.value_and_grad(run, inputs, has_aux=True))(params, given)
    close(logits_BLV, arrays["out/logits"], 2e-5)
    assert float(loss) == pytest.approx(float(arrays["out/loss"]), abs=2e-5)
    grads, given_grad = grads if vectors else (grads, None)
    if "grad_in/pe" in arrays:
        close(given_grad, arrays["grad_in/pe"], 1e-4)
    compare_gradients(grads, under(arrays, "grad/"), state)


def compare_gradients(grads, stored, state):
    """Compares the stored gradients: the rest is filled with NaN and left out."""
    filled = {key: stored.get(key, np.full_like(value, np.nan)) for key, value in state.items()}
    expected = {"model": reference.gpt2_params(filled), "encoding": {}}
    if "qk_map" in grads["encoding"]:
        expected["encoding"]["qk_map"] = reference.qk_map_params(filled)
    if "table" in grads["encoding"]:
        expected["encoding"]["table"] = filled["transformer.wpe.weight"]
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    largest = max((np.nanmax(np.abs(leaf)) for leaf in stored.values()), default=0.0)
    compared = 0
    for found, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        if not np.isnan(want).any():
            assert np.abs(found - want).max() <= 1e-4 * max(np.abs(want).max(), 1e-2 * largest)
            compared += 1
    assert compared == len(stored) or "qk_map" in grads["encoding"]
