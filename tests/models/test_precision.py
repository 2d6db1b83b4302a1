"""Precision of matrix products: float32 in the encoder, in losses on vectors and in position logits, else as the config says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax import config
from seqpe_jax.encodings.seqpe import SeqPE
from seqpe_jax.errors import InputError
from seqpe_jax.training.trainer import Trainer
from tests.inference.test_export import vit_config
from tests.jaxprs import subprograms
from tests.tiny import random_params, tiny_config, tokens

DEFAULT, HIGH, HIGHEST = ((precision,) * 2 for precision in jax.lax.Precision)


def products(jaxpr):
    """(precision, names of the modules that it is in) of each matrix product of a program and those that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"], str(equation.source_info.name_stack)
        for program in subprograms(equation.params):
            yield from products(program)


def step_products(settings):
    run = Trainer.of(settings, jax.devices()[:1], data_available=False)
    batch = {
        name: jax.ShapeDtypeStruct((settings.batch_size, *leaf.shape), leaf.dtype)
        for name, leaf in run.task.example.items()
    }
    return list(products(run.jit_train_step().trace(run.abstract_state, batch).jaxpr.jaxpr))


def settings_of(kind, **fields):
    if kind == "vit":
        return vit_config(precision__matmul="high", **fields)
    blocks = {
        "model__attention_kind": "blockwise",
        "model__attention_block": 8,
    }  # whose backward pass is traced by itself
    return tiny_config(precision__matmul="high", **blocks, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("kind, encoder", [("gpt2", HIGHEST), ("vit", DEFAULT)])
def test_every_product_of_a_step_has_its_precision(kind, encoder):
    """Those of the network and of the encoder as their fields say, all others float32; none is left to the platform."""
    found = step_products(settings_of(kind, encoding__matmul_precision=encoder[0].name.lower()))
    inside = {"encoder": [], "features": [], "network": []}
    for precision, names in found:
        in_encoder = "encoder/" in names or "qk_map" in names
        # Besides products of positions: sums over samples (`sum_over_sets`), and `jax.image` in zoom.
        of_features = any(part in names for part in ("hf", "phl", "n,n...", "vmap"))
        inside["encoder" if in_encoder else "features" if of_features else "network"].append(precision)
    assert {HIGHEST, encoder} >= set(inside["encoder"]) >= {encoder} and len(inside["encoder"]) > 10
    assert set(inside["features"]) == {HIGHEST} and set(inside["network"]) == {HIGH}, found


def test_precision_changes_no_number_on_a_cpu():
    """To the last bit, of vectors and of logits."""
    batch = tokens(tiny_config())["tokens"][:, :-1]
    results = []
    for precision in ("default", "highest"):
        settings = tiny_config(precision__matmul=precision, encoding__matmul_precision=precision)
        run = Trainer.of(settings, jax.devices()[:1], data_available=False)
        results.append(jax.jit(run.model_spec.logits)(random_params(run, 0.1), batch))
    np.testing.assert_array_equal(*results)


def test_what_bfloat16_does_not_read_is_refused():
    fields = {"precision.matmul": "high", "precision.compute": "bfloat16"}
    settings = tiny_config(**{name.replace(".", "__"): value for name, value in fields.items()})
    with pytest.raises(InputError, match="precision.matmul is not read here, it needs precision.compute='float32'"):
        config.check_overrides_used(settings, fields)
    assert Trainer.of(settings, jax.devices()[:1]).model_spec.network.config.matmul_precision == "default"


def test_an_encoding_by_itself_is_precise_too():
    encoding = SeqPE.for_model(layers=1, width=16, heads=2, max_position=100)
    positions = jnp.arange(8)
    params = jax.eval_shape(encoding.init, jax.random.PRNGKey(0), positions)
    found = list(products(jax.make_jaxpr(encoding.apply)(params, positions).jaxpr))
    assert found and all(precision == HIGHEST for precision, _ in found)
