"""Contrastive and distillation losses: equal to the PyTorch reference, and without gradients where none belong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.losses.position import contrastive_loss, distillation_loss
from tests.goldens import close, load, under

KEY = jax.random.PRNGKey(0)


def test_contrastive(goldens):
    spec, arrays = load(goldens, "criterion", "contrastive_a")
    anchors, labels = arrays["in/pivot_pe"], jnp.asarray(arrays["in/labels"], jnp.int32)
    candidates = arrays["in/neg_pe"].reshape(len(anchors), -1, anchors.shape[1])
    losses = under(arrays, "out/loss/")
    assert len(losses) == 8
    for name, expected in losses.items():
        per_head, smoothing, scale = re.fullmatch(r"mh(\d)_ls([\d.]+)_sc([\d.]+)", name).groups()
        options = {
            "heads": spec["num_heads"] if int(per_head) else None,
            "label_smoothing": float(smoothing),
            "scale": float(scale),
        }
        loss, grads = jax.value_and_grad(
            lambda p, c, options=options: contrastive_loss(p, c, labels, **options), argnums=(0, 1)
        )(anchors, candidates)
        close(loss, expected, 1e-5, name)
        close(grads[0], arrays[f"grad/pivot_pe/{name}"], 1e-5, name)
        close(grads[1].reshape(arrays["in/neg_pe"].shape), arrays[f"grad/neg_pe/{name}"], 1e-5, name)


@pytest.mark.slow
def test_distillation(goldens):
    spec, arrays = load(goldens, "criterion", "transfer_a")
    main, indices = arrays["in/main_pe"], arrays["in/main_indices"].reshape(spec["batch"], -1)
    student = arrays["in/trans_pe"].reshape(*indices.shape, -1)
    losses = under(arrays, "out/loss/")
    assert len(losses) >= 20
    for name, expected in losses.items():
        metric, beta, per_head, scale = re.fullmatch(r"(\w+?)_beta([\d.]+)_mh(\d)_sc([\d.]+)", name).groups()
        options = {
            "heads": spec["num_heads"] if int(per_head) else None,
            "metric": metric.removesuffix("_div"),
            "beta": float(beta),
            "scale": float(scale),
        }
        loss, grads = jax.value_and_grad(
            lambda m, s, options=options: distillation_loss(m[0][indices], s, **options), argnums=(0, 1)
        )(main, student)
        close(loss, expected, 1e-5, name)
        close(grads[1].reshape(arrays["in/trans_pe"].shape), arrays[f"grad/trans_pe/{name}"], 1e-5, name)
        teacher = arrays.get(f"grad/main_pe/{name}", np.zeros_like(main))
        close(grads[0], teacher, 1e-5, name)


def random(*shape):
    return jax.random.normal(jax.random.fold_in(KEY, len(shape)), shape)


@pytest.mark.slow
def test_beta_one_fixes_the_teacher():
    teacher, student = random(2, 5, 6), random(2, 5, 6) + 0.3
    grads = jax.grad(lambda t, s: distillation_loss(t, s), argnums=(0, 1))(teacher, student)
    assert float(jnp.abs(grads[0]).max()) == 0.0 and float(jnp.abs(grads[1]).max()) > 0
    both = jax.grad(lambda t: distillation_loss(t, student, beta=0.5))(teacher)
    assert float(jnp.abs(both).max()) > 0


@pytest.mark.parametrize("metric", ["kl", "mse"])
def test_reduction_by_rows_or_elements(metric):
    teacher, student = random(2, 5, 6), random(2, 5, 6) * 0.9
    elements = distillation_loss(teacher, student, metric=metric)
    assert float(distillation_loss(teacher, student, metric=metric, reduction="rows")) == pytest.approx(5 * elements)
    assert float(distillation_loss(teacher, teacher, metric=metric)) == pytest.approx(0.0, abs=1e-6)


def test_one_head_is_the_complete_vector():
    anchors, candidates, labels = random(3, 8), random(3, 4, 8), jnp.array([0, 3, 1])
    assert contrastive_loss(anchors, candidates, labels, heads=1) == contrastive_loss(anchors, candidates, labels)


@pytest.mark.slow
def test_anchors_below_the_floor_have_no_gradient():
    """The floor applies to each anchor in each head: one below it does not hide one above."""
    near, far = jnp.array([4.0, 0.0]), jnp.array([0.0, 1.0])
    anchors, candidates = jnp.stack([near, far]), jnp.broadcast_to(jnp.stack([near, far]), (2, 2, 2))
    labels = jnp.array([0, 0])  # of the second anchor: the first candidate, from which it is far
    single = [float(contrastive_loss(anchors[i : i + 1], candidates[i : i + 1], labels[i : i + 1])) for i in (0, 1)]
    assert single[0] < 0.5 < single[1]
    loss, grads = jax.value_and_grad(lambda p: contrastive_loss(p, candidates, labels, floor=0.5))(anchors)
    assert float(loss) == pytest.approx((0.5 + single[1]) / 2)
    assert not np.asarray(grads[0]).any() and np.asarray(grads[1]).any()
    assert contrastive_loss(anchors, candidates, labels, floor=0.0) == contrastive_loss(anchors, candidates, labels)
