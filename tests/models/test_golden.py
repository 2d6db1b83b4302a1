"""GPT-2 with every kind of signal against the PyTorch reference: logits, loss, and the gradients that were stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.interop import from_state_dicts
from seqpe_jax.losses.task import cross_entropy
from tests.goldens import close, compare_gradients, load, names, under

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", names("gpt2"))
def test_gpt2(goldens, name):
    spec, arrays = load(goldens, "gpt2", name)
    state, vectors = under(arrays, "param/"), spec["pe_type"] == "seq_pe"
    reference = from_state_dicts(spec, state, signal=arrays["in/pe"] if vectors else None)
    tokens_BL, labels_BL = (jnp.asarray(arrays[key], jnp.int32) for key in ("in/input_ids", "in/labels"))

    def run(params):
        logits_BLV = reference.model_spec.logits(params, tokens_BL)
        return cross_entropy(logits_BLV, labels_BL)[0], logits_BLV

    # Not compiled as a whole: the files share shapes, so that each operation is compiled once for all of them.
    params = jax.tree.map(jnp.asarray, reference.params)
    (loss, logits_BLV), grads = jax.value_and_grad(run, has_aux=True)(params)
    close(logits_BLV, arrays["out/logits"], 2e-5)
    assert float(loss) == pytest.approx(float(arrays["out/loss"]), abs=2e-5)
    given_grad = grads["encoding"].pop("given", None)
    if "grad_in/pe" in arrays and vectors:
        close(given_grad, arrays["grad_in/pe"], 1e-4)
    compare_gradients(reference.config, grads, under(arrays, "grad/"), state)


@pytest.mark.parametrize("name", ["alibi_a", "rotary_a", "sin_a"])
def test_rows_of_a_fixed_table_given_as_signal(goldens, name):
    spec, arrays = load(goldens, "gpt2", name)
    reference = from_state_dicts(spec, under(arrays, "param/"), signal=arrays["in/pe"])
    close(reference.logits(np.asarray(arrays["in/input_ids"])), arrays["out/logits"], 2e-5)
