"""Bounds of parameters: training limits the parameter and leaves its gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqpe_jax.config import KerpleConfig, ModelDims, PoPEConfig
from seqpe_jax.encodings.pope import PoPE
from seqpe_jax.encodings.position_signal import clip_straight_through
from seqpe_jax.encodings.relative_bias import Kerple
from seqpe_jax.training.optimizer import projection
from seqpe_jax.training.step import create_train_state, make_train_step


def bias(variables, encoding):
    """What logits gain of the first layer; the sum grows with every parameter of PoPE and falls with those of KERPLE."""
    positions = jnp.arange(4)[None, :, None]
    signal = encoding.apply({"params": variables}, positions, shape=(4,))
    if isinstance(encoding, PoPE):
        return signal.polar_key_phase
    own = signal.at_layer(0)
    return own.relative_bias.function(own.bias_params, own.relative_bias.query, own.relative_bias.key, jnp.arange(2))[1]


KERPLE, POPE = Kerple(KerpleConfig(), ModelDims(1, 4, 2)), PoPE(PoPEConfig(), ModelDims(1, 4, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding, name, end, outwards",
    [
        (KERPLE, "slope", 0.01, -1.0),
        (KERPLE, "scale", 0.01, -1.0),
        (POPE, "shift", 0.0, -1.0),
        (POPE, "shift", -2 * math.pi, 1.0),
    ],
)
def test_a_parameter_comes_back_from_its_bound(encoding, name, end, outwards):
    """A step beyond ends on the bound, and the next one that leads inside does so at once."""
    optimizer = optax.sgd(0.05)

    def loss(params, batch, *_):
        value = batch["sign"] * bias(params["encoding"], encoding).sum()
        return value, {"loss": value}

    step = jax.jit(make_train_step(loss, optimizer, lambda _: 0.05, project=projection(encoding.PARAM_BOUNDS)))
    fresh = encoding.init(jax.random.PRNGKey(0), jnp.arange(4)[None, :, None], shape=(4,))["params"]
    params = {"encoding": {key: jnp.full_like(leaf, end if key == name else 1.0) for key, leaf in fresh.items()}}
    states = [create_train_state(params, optimizer, jax.random.PRNGKey(0))]
    for sign in (outwards, -outwards):
        states.append(step(states[-1], {"sign": jnp.float32(sign)})[0])
    at, back = (np.asarray(state.params["encoding"][name]) for state in states[1:])
    np.testing.assert_array_equal(at, np.float32(end))
    low, high = encoding.PARAM_BOUNDS[name]
    assert (low < back).all() and (back < high).all()


def test_parameters_begin_within_their_bounds_and_older_ones_count_as_they_did():
    fresh = Kerple(KerpleConfig(), ModelDims(16, 64, 64)).init(
        jax.random.PRNGKey(0), jnp.arange(4)[None, :, None], shape=(4,)
    )
    smallest = [float(leaf.min()) for leaf in fresh["params"].values()]
    assert smallest == [pytest.approx(0.01)] * 2  # some of so many were drawn below
    value, slope = jax.vmap(jax.value_and_grad(lambda x: clip_straight_through(x, (0.01, math.inf))))(
        jnp.array([-3.0, 0.01, 2.0])
    )
    np.testing.assert_allclose(value, [0.01, 0.01, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(slope, 1.0)
