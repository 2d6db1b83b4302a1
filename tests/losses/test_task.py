"""Cross-entropy: weights and smoothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.losses.task import cross_entropy

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
