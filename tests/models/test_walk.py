"""Windows read block by block through all layers equal windows read at once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.models import walk
from seqpe_jax.models.gpt2 import GPT2
from tests.models.test_attention import random

LENGTH, HEADS, WIDTH = 21, 2, 4
MODEL = GPT2(vocabulary=11, layers=2, width=HEADS * WIDTH, heads=HEADS, init_std=0.3)
SIGNALS = {
    "none": PositionSignal(),
    "added": PositionSignal(added=random(1, 1, LENGTH, HEADS * WIDTH)),
    "rotation": PositionSignal(rotation=tuple(random(side, 1, LENGTH, 1, WIDTH // 2) for side in (1, 2))),
    "shifts": PositionSignal(shifts=tuple(random(side, 1, LENGTH, HEADS, WIDTH) for side in (1, 2))),
    "features": PositionSignal(features=tuple(random(side, 1, LENGTH, HEADS, 3) for side in (1, 2))),
    "bias": PositionSignal(bias=random(3, HEADS, LENGTH, LENGTH)),
    "layered": PositionSignal(
        features=tuple(random(side, 2, 1, LENGTH, 1, 3) for side in (1, 2)), bias=random(4, 2, 1, LENGTH, LENGTH),
        added=random(5, 1, LENGTH, HEADS * WIDTH), stacked=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def variables():
    return MODEL.init(jax.random.PRNGKey(0), jnp.zeros((1, 4), jnp.int32), PositionSignal())


@pytest.mark.parametrize("name", SIGNALS)
def test_blocks_equal_the_whole(variables, name, monkeypatch):
    """Lengths that blocks do not divide, and fewer blocks than groups."""
    signal = SIGNALS[name]
    tokens_BL = jax.random.randint(jax.random.PRNGKey(1), (3, LENGTH), 0, 11)
    whole = MODEL.apply(variables, tokens_BL, signal, method="hidden")
    for block in (2, 8):
        found = jax.jit(functools.partial(walk.walk, MODEL, variables, block=block))(tokens_BL, signal)
        np.testing.assert_allclose(found, whole, atol=1e-5)
    monkeypatch.setattr(walk, "SHORT", 4)
    np.testing.assert_allclose(walk.hidden(MODEL, variables, tokens_BL, signal), whole, atol=1e-5)


def test_no_array_of_long_windows_has_every_pair_of_places(variables):
    """And the logits that layers share are computed once: as many products of features as groups, not groups x layers."""
    length, features = 2048, 3
    signal = PositionSignal(features=tuple(random(side, 1, length, HEADS, features) for side in (1, 2)))
    tokens_BL = jnp.zeros((1, length), jnp.int32)
    lowered = jax.jit(functools.partial(walk.hidden, MODEL)).lower(variables, tokens_BL, signal)
    sizes = [
        int(np.prod([int(side) for side in shape.split(",")]))
        for shape in re.findall(r"\w\d+\[([\d,]+)\]", lowered.compile().as_text())
    ]
    assert max(sizes) < length * length / 2
    products = re.findall(rf"dot_general.*x{features}xf32.*x{features}xf32", lowered.as_text())
    assert len(products) == walk.GROUPS


def test_blocks_shrink_as_windows_and_batches_grow():
    assert [walk.block_size(places, 4) for places in (2048, 8192, 65536)] == [256, 128, 64]
    assert walk.block_size(2048, 4 * 8) == 64
