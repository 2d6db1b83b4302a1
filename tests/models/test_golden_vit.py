"""The vision transformer with every kind of signal against the PyTorch reference: outputs and stored gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.fixed import NoPosition, Rotary, RotaryAxial, Sinusoidal
from seqpe_jax.encodings.learned import Learned
from seqpe_jax.encodings.mixed import RotaryMixed
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.interop import reference
from seqpe_jax.models.vit import ViT
from seqpe_jax.positions.grids import grid
from tests.goldens import close, load, names, under

pytestmark = pytest.mark.slow

THETA = {"sin": 10000.0, "rotary": 10000.0, "rotary_2d": 100.0}  # of the stored files


def model_of(spec) -> ViT:
    patch = (spec["patch_size"],) * 2
    return ViT(spec["num_classes"], patch, spec["depth"], spec["embed_dim"], spec["num_heads"])


def encoding_of(spec, **fields):
    sizes = {"width_model": spec["embed_dim"], "heads_model": spec["num_heads"], "prefix": 1}
    kind, method, depth = spec["pe_type"], spec["pe_apply_method"], spec["depth"]
    if kind == "seq_pe":
        qk = spec["use_pe_qk_per_layer"] or ("halves" if method == "attn_scalar" else "none")
        per_head = spec["use_pe_multi_head"]
        return SeqPE(depth, **sizes, axes=2, mode=method, qk=qk, per_head=per_head)
    if kind == "vanilla":
        side = spec["img_size"] // spec["patch_size"]
        return Learned(spec["embed_dim"], (side, side), prefix=1)
    if kind == "sin":
        return Sinusoidal(spec["embed_dim"], THETA[kind], prefix=1, flatten=True)
    if kind == "nope":
        return NoPosition()
    if method == "rotary_mixed":
        return RotaryMixed(depth, **sizes, **fields)
    return {"rotary": Rotary, "rotary_2d": RotaryAxial}[method](**sizes, theta=THETA[method])


def params_of(spec, state):
    encoding = {}
    if spec["pe_type"] == "seq_pe":
        encoding = reference.prefix_params(state)
        if spec["use_pe_qk_per_layer"]:
            encoding["qk_map"] = reference.qk_map_params(state)
    if spec["pe_type"] == "vanilla":
        encoding = reference.learned_params(state)
    if spec["pe_apply_method"] == "rotary_mixed":
        encoding = reference.rotary_mixed_params(under(state, "pe_model."), spec["num_heads"])
    return {"encoding": encoding, "model": reference.vit_params(state)}


@pytest.mark.parametrize("name", names("vit"))
def test_vit(goldens, name):
    spec, arrays = load(goldens, "vit", name)
    state = under(arrays, "param/")
    model, vectors = model_of(spec), spec["pe_type"] == "seq_pe"
    mixed = spec["pe_apply_method"] == "rotary_mixed"
    encoding = encoding_of(spec, reference_scramble=True) if mixed else encoding_of(spec)
    params = jax.tree.map(jnp.asarray, params_of(spec, state))
    images = jnp.asarray(np.moveaxis(arrays["in/images"], 1, -1))
    shape = tuple(side // part for side, part in zip(images.shape[1:3], model.patch, strict=True))
    given = jnp.asarray(arrays["in/pe"]) if vectors else grid(jnp.zeros(2, jnp.int32), shape)[None]

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
    weights = model.apply({"params": params["model"]}, images, signal, method="attention")
    close(weights, arrays["out/attn_last"], 2e-5)
    grads, given_grad = grads if vectors else (grads, None)
    if vectors and "grad_in/pe" in arrays:
        close(given_grad, arrays["grad_in/pe"], 1e-4)
    compare_gradients(grads, under(arrays, "grad/"), state, spec)
    if mixed:
        correct = signal_of(encoding_of(spec), params, given)
        close(model.apply({"params": params["model"]}, images, correct), arrays["out/logits_fixed"], 2e-5)
        cos, sin = (part[:, :, 1:].swapaxes(2, 3) for part in correct.rotation)
        close(cos, arrays["out/pe_re"], 2e-5)
        close(sin, arrays["out/pe_im"], 2e-5)
    if spec["pe_apply_method"] == "rotary_2d":
        for part, stored in zip(signal.rotation, ("in/pe_re", "in/pe_im"), strict=True):
            close(part[:, 1:, 0], arrays[stored], 2e-5)


def compare_gradients(grads, stored, state, spec):
    """Compares the stored gradients, all of them: the rest is filled with NaN and left out."""
    filled = {key: stored.get(key, np.full_like(value, np.nan)) for key, value in state.items()}
    expected = params_of(spec, filled)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    largest = max((np.abs(leaf).max() for leaf in stored.values()), default=0.0)
    compared = 0
    for found, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        there = ~np.isnan(want)
        found, want = np.asarray(found)[there], want[there]
        if want.size:
            assert np.abs(found - want).max() <= 1e-4 * max(np.abs(want).max(), 1e-2 * largest)
            compared += want.size
    assert compared == sum(leaf.size for leaf in stored.values())
