"""The vision transformer with every kind of signal against the PyTorch reference: outputs and stored gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.config import CompatConfig
from seqpe_jax.interop import from_state_dicts
from seqpe_jax.positions.grids import PositionGrid
from tests.goldens import close, compare_gradients, load, names, under

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", names("vit"))
def test_vit(goldens, name):
    spec, arrays = load(goldens, "vit", name)
    state, vectors = under(arrays, "param/"), spec["pe_type"] == "seq_pe"
    mixed = spec["pe_apply_method"] == "rotary_mixed"
    images = jnp.asarray(np.moveaxis(arrays["in/images"], 1, -1))
    reference = from_state_dicts(spec, state, signal=arrays["in/pe"] if vectors else None)
    model_spec, params = reference.model_spec, jax.tree.map(jnp.asarray, reference.params)
    encoding, model = model_spec.encoding, model_spec.network
    if vectors:  # given below, in the place of the parameter that holds them
        encoding, params = encoding.inner, params | {"encoding": dict(params["encoding"])}
        params["encoding"].pop("given")
    shape = tuple(side // part for side, part in zip(images.shape[1:3], model.patch, strict=True))
    given = jnp.asarray(arrays["in/pe"]) if vectors else PositionGrid().positions(shape)[None]

    def signal_of(encoding, params, given):
        variables = {"params": params["encoding"]}
        if vectors:
            return encoding.apply(variables, given, method="signal")
        return encoding.apply(variables, given, shape=shape)

    def seen(module, method):  # the first attention's input and output
        return method == "features" or module.path in (("blocks_0", "norm_1"), ("blocks_0", "out"))

    def run(params, given):
        variables, signal = {"params": params["model"]}, signal_of(encoding, params, given)
        logits_BV, between = model.apply(variables, images, signal, capture_intermediates=seen)
        return (logits_BV * arrays["in/out_weight"]).sum(), (logits_BV, between["intermediates"])

    if "extrap" in name:  # a larger grid than the model's; only logits are stored
        signal = signal_of(encoding, params, given)
        close(model.apply({"params": params["model"]}, images, signal), arrays["out/logits"], 2e-5)
        return
    inputs = (0, 1) if vectors else 0
    # Not compiled as a whole: the files share shapes, so that each operation is compiled once for all of them.
    (_, (logits_BV, between)), grads = jax.value_and_grad(run, inputs, has_aux=True)(params, given)
    close(logits_BV, arrays["out/logits"], 2e-5)
    close(between["features"][0], arrays["out/features"], 2e-5)
    close(between["blocks_0"]["norm_1"]["__call__"][0], arrays["out/attn0_in"], 2e-5)
    close(between["blocks_0"]["out"]["__call__"][0], arrays["out/attn0_out"], 2e-5)
    signal = signal_of(encoding, params, given)
    weights = model.apply({"params": params["model"]}, images, signal, lambda weights: weights, method="attention")[-1]
    close(weights, arrays["out/attn_last"], 2e-5)
    grads, given_grad = grads if vectors else (grads, None)
    if vectors and "grad_in/pe" in arrays:
        close(given_grad, arrays["grad_in/pe"], 1e-4)
    compare_gradients(reference.config, grads, under(arrays, "grad/"), state)
    if mixed:
        correct = signal_of(
            encoding.clone(dims=dataclasses.replace(encoding.dims, compat=CompatConfig())), params, given
        )
        close(model.apply({"params": params["model"]}, images, correct), arrays["out/logits_fixed"], 2e-5)
        cos, sin = (part[:, :, 1:].swapaxes(2, 3) for part in correct.rotation)
        close(cos, arrays["out/pe_re"], 2e-5)
        close(sin, arrays["out/pe_im"], 2e-5)
    if spec["pe_apply_method"] == "rotary_2d":
        for part, stored in zip(signal.rotation, ("in/pe_re", "in/pe_im"), strict=True):
            close(part[:, 1:, 0], arrays[stored], 2e-5)
