"""The digit encoder and ALiBi's slopes against the PyTorch reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.relative_bias import alibi_slopes
from seqpe_jax.interop import from_state_dicts
from seqpe_jax.positions.digits import significant_mask, to_digits
from tests.goldens import close, load, names, under

# The fast lane takes one encoder with one axis and one with two.
NAMES = [
    name if name in ("enc1d_a", "enc2d_a", "absent") else pytest.param(name, marks=pytest.mark.slow)
    for name in names("encoder")
]


@pytest.mark.parametrize("name", NAMES)
def test_encoder(goldens, name):
    spec, arrays = load(goldens, "encoder", name)
    reference = from_state_dicts(spec, None, under(arrays, "param/"))
    encoding, padding = reference.model_spec.encoding, "left" if spec["left_padding"] else "right"
    positions_RA = jnp.asarray(arrays["in/positions"], jnp.int32).reshape(-1, spec["data_dim"])
    written = {"base": 10, "digits": spec["max_digits"], "padding": padding}
    np.testing.assert_array_equal(to_digits(positions_RA, **written), arrays["in/digits"])
    np.testing.assert_array_equal(significant_mask(positions_RA, **written), arrays["in/pad_mask"] > 0)
    params = jax.tree.map(jnp.asarray, reference.params["encoding"])

    def weighted(params):
        vectors_RE = encoding.apply({"params": params}, positions_RA, method="vectors")
        return (vectors_RE * arrays["in/out_weight"]).sum(), vectors_RE

    (_, vectors_RE), grads = jax.jit(jax.value_and_grad(weighted, has_aux=True))(params)
    close(vectors_RE, arrays["out/pe"], 2e-5)
    expected = from_state_dicts(spec, None, under(arrays, "grad/")).params[
        "encoding"
    ]  # a gradient has its array's place
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for path, found in jax.tree_util.tree_flatten_with_path(grads)[0]:
        want = dict(jax.tree_util.tree_flatten_with_path(expected)[0])[path]
        error = np.abs(found - want).max()
        assert error <= 1e-4 * max(np.abs(want).max(), 1e-2 * largest), jax.tree_util.keystr(path)


def test_alibi_table(goldens):
    _, arrays = load(goldens, "tables", "tables_alibi")
    for name, table in under(arrays, "out/alibi/").items():
        count, heads = (int(part[1:]) for part in name.split("_"))
        close(np.arange(count)[:, None] * alibi_slopes(heads), table, 2e-6, name)
    close(arrays["in/alibi_ids"][:, None] * alibi_slopes(12), arrays["out/alibi_ids_H12"], 2e-6)
