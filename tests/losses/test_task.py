"""Cross-entropy: weights, smoothing, and logits block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.losses.task import blockwise_token_losses, cross_entropy
from tests.jaxprs import has_array_of_size

KEY = jax.random.PRNGKey(3)


def test_weights_leave_elements_out():
    logits = jax.random.normal(KEY, (4, 7))
    labels = jnp.array([0, 6, 2, 3])
    mean, losses = cross_entropy(logits, labels, jnp.array([1.0, 0.0, 1.0, 0.0]))
    assert losses.shape == (4,)
    assert float(mean) == pytest.approx(float((losses[0] + losses[2]) / 2))
    assert float(cross_entropy(logits, labels)[0]) == pytest.approx(float(losses.mean()))


def test_smoothing_spreads_the_target():
    logits, labels = np.array(jax.random.normal(KEY, (3, 5)), np.float64), np.array([1, 4, 0])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.full((3, 5), 0.2 / 5) + 0.8 * np.eye(5)[labels]
    found = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), label_smoothing=0.2)[1]
    np.testing.assert_allclose(found, -(target * log_p).sum(-1), rtol=1e-5)


def test_blockwise_losses_equal_those_of_all_logits_without_holding_them():
    batch, length, width, classes, block = 2, 10, 6, 37, 4  # 10 is no multiple of 4
    hidden_BLD = jax.random.normal(KEY, (batch, length, width))
    weight_DV = jax.random.normal(jax.random.fold_in(KEY, 1), (width, classes))
    targets_BL = jax.random.randint(KEY, (batch, length), 0, classes)

    def blocked(weight_DV, hidden_BLD):
        return blockwise_token_losses(lambda hidden: hidden @ weight_DV, hidden_BLD, targets_BL, block)

    def complete(weight_DV, hidden_BLD):
        return cross_entropy(hidden_BLD @ weight_DV, targets_BL)[1]

    np.testing.assert_allclose(blocked(weight_DV, hidden_BLD), complete(weight_DV, hidden_BLD), rtol=1e-5)
    gradients = [jax.jit(jax.grad(lambda *at, f=f: f(*at).mean(), (0, 1))) for f in (blocked, complete)]
    for found, expected in zip(*(gradient(weight_DV, hidden_BLD) for gradient in gradients), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not has_array_of_size(jax.make_jaxpr(gradients[0])(weight_DV, hidden_BLD).jaxpr, batch * length * classes)
    assert has_array_of_size(jax.make_jaxpr(gradients[1])(weight_DV, hidden_BLD).jaxpr, batch * length * classes)
