"""Gains of attention by distance: the parts of a logit that depend on positions alone, and the mean product of gates.

A query is at the end of a window, or at the centre of a grid; the keys are those before it, or all patches around it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax.encodings.position_signal import Pair, PositionSignal
from seqpe_jax.encodings.relative_bias import MASKED
from seqpe_jax.models.attention import position_logits
from seqpe_jax.models.attention_inputs import apply_relative_bias
from seqpe_jax.models.transformer import unstack_layers

WITHOUT = {"logit": 0.0, "kernel": 1.0, "factor": 1.0}  # parts of the logits of a layer that gets no position
MAX_DISTANCES = 256  # of a window, evenly spaced on a logarithmic axis


def distances_of(shape: tuple[int, ...]) -> np.ndarray:
    """Returns the distances from the query to the keys: int32[D] of a window, float32[rows, columns] of a grid.

    On a grid they are Euclidean, and 0 at the query; of a video's frames, the middle one is taken.
    """
    if len(shape) == 1:
        spaced = np.geomspace(1, max(1, shape[0] - 1), MAX_DISTANCES).round().astype(np.int32)
        return np.unique(np.append(spaced[spaced < shape[0]], np.int32(0)))
    rows, columns = (np.arange(side) - side // 2 for side in shape[-2:])
    return np.hypot(rows[:, None], columns).astype(np.float32)


def query_and_keys(shape: tuple[int, ...], prefix_tokens: int) -> tuple[int, np.ndarray]:
    """Returns the token index of the query, and those of the keys in the order of `distances_of`, flat."""
    if len(shape) == 1:
        return shape[0] - 1, shape[0] - 1 - distances_of(shape)
    index = prefix_tokens + np.arange(math.prod(shape)).reshape(shape)
    plane = index[tuple(side // 2 for side in shape[:-2])]
    return int(plane[shape[-2] // 2, shape[-1] // 2]), plane.ravel()


def position_terms(
    signal: PositionSignal, query: int, keys_S: jax.Array, layers: int, heads: int
) -> dict[str, jax.Array]:
    """Returns the parts of a query's logits that depend on positions alone.

    Args:
      signal: of all layers, one position set.
      query: token index of the query.
      keys_S: int32, token indices of the keys.
      layers: number of layers of the model.
      heads: number of heads of the model.

    Returns:
      Those that the encoding has, each float32[layers, heads, S]: "logit", the addend; "kernel", the mean cosine of the angle
      between rotated pairs, or polar components, of query and key; "factor", the mean of the products of multipliers. NaN
      marks keys to which a head does not attend. {} for encodings that are added to tokens.
    """
    terms = [_layer_terms(signal.at_layer(layer), query, keys_S, heads) for layer in range(layers)]
    names = dict.fromkeys(name for term in terms for name in term)
    without = {name: jnp.full((heads, len(keys_S)), WITHOUT[name]) for name in names}
    return {name: jnp.stack([term.get(name, without[name]) for term in terms]) for name in names}


def _layer_terms(signal: PositionSignal, query: int, keys_S: jax.Array, heads: int) -> dict[str, jax.Array]:
    def mean_of_products(pair: Pair) -> jax.Array:
        product_SHF = (pair[0][0, query] * pair[1][0, keys_S]).astype(jnp.float32)
        return jnp.broadcast_to(product_SHF.mean(axis=-1).T, (heads, len(keys_S)))

    terms, logit_HS = {}, _logit(signal, query, keys_S, heads)
    if signal.additive is not None:  # (q + position) . (k + position) / sqrt(K) holds that of the positions
        width = signal.additive[0].shape[-1]
        logit_HS = mean_of_products(signal.additive) * math.sqrt(width) + (0.0 if logit_HS is None else logit_HS)
    if logit_HS is not None:
        terms["logit"] = jnp.broadcast_to(logit_HS, (heads, len(keys_S)))
    if signal.rotation is not None:
        cos, sin = signal.rotation
        terms["kernel"] = mean_of_products((cos, cos)) + mean_of_products((sin, sin))
    if signal.polar_phase is not None:
        cos, sin = signal.polar_phase
        cos_phase, sin_phase = jnp.cos(signal.polar_key_phase), jnp.sin(signal.polar_key_phase)
        key = cos * cos_phase - sin * sin_phase, sin * cos_phase + cos * sin_phase
        kernel_HS = mean_of_products((cos, key[0])) + mean_of_products((sin, key[1]))
        is_polar_H = jnp.arange(heads) < (heads if signal.polar_num_heads is None else signal.polar_num_heads)
        terms["kernel"] = jnp.where(is_polar_H[:, None], kernel_HS, 1.0)
    # A factor of whole queries (log scaling, YaRN) is the same for all keys.
    if signal.multiplicative is not None and signal.multiplicative[1].shape[-1] > 1:
        terms["factor"] = mean_of_products(signal.multiplicative)
    return terms


def _logit(signal: PositionSignal, query: int, keys_S: jax.Array, heads: int) -> jax.Array | None:
    """The addend of biases, relative biases and position queries and keys, float32[H or 1, S]; None without any."""
    logit_HS, bias = None, signal.relative_bias
    if signal.position_query_key is not None:
        position_query, position_key = signal.position_query_key
        signal = signal.replace(position_query_key=(position_query, position_key[:, keys_S]))
    if signal.bias is not None:
        signal = signal.replace(bias=signal.bias[..., keys_S])
    rows_PHLS = position_logits(signal, jnp.array([[query]]), len(keys_S))
    if rows_PHLS is not None:
        logit_HS = rows_PHLS[0, :, 0]
    if bias is not None:
        inputs = bias.query[:, query][:, None], bias.key[:, keys_S], jnp.arange(heads)
        zeros = jnp.zeros((1, heads, 1, len(keys_S)))
        addend_HS = apply_relative_bias(zeros, bias, signal.bias_params, *inputs)[0, :, 0]
        logit_HS = jnp.where(addend_HS <= MASKED / 2, jnp.nan, addend_HS) + (0.0 if logit_HS is None else logit_HS)
    return logit_HS


def log_gates(network: Any, params: Any, tokens_L: jax.Array, signal: PositionSignal) -> jax.Array:
    """Returns the log forget gate of each token, float32[layers, L, H].

    Args:
      network: a `Decoder` with gates.
      params: its parameters.
      tokens_L: int32, a text.
      signal: of all layers and L positions.
    """
    config = network.config
    if config.scan:
        params = unstack_layers(params, config.layers)
    unrolled = network.clone(config=dataclasses.replace(config, scan=False, remat="none"))
    _, state = unrolled.apply(
        {"params": params},
        tokens_L[None],
        signal,
        capture_intermediates=lambda module, method: module.name == "fading" and method == "__call__",
        mutable=["intermediates"],
    )
    blocks = [state["intermediates"][f"blocks_{layer}"] for layer in range(config.layers)]
    return jnp.stack([block["fading"]["__call__"][-1][0] for block in blocks])


def mean_gate_products(log_gate_NLH: jax.Array, distances_D: jax.Array) -> jax.Array:
    """Returns the mean product of the gates between a key and a query, float32[layers, heads, D].

    Args:
      log_gate_NLH: float32, log forget gates of a text.
      distances_D: int32; the mean is over all queries that have a key at this distance, NaN where none has.
    """
    length = log_gate_NLH.shape[1]
    cum_log_gate_NLH = jnp.cumsum(log_gate_NLH, axis=1)

    def mean_at(distance: jax.Array) -> jax.Array:
        product_NLH = jnp.exp(cum_log_gate_NLH - jnp.roll(cum_log_gate_NLH, distance, axis=1))
        has_key_L1 = (jnp.arange(length) >= distance)[:, None]
        return jnp.where(has_key_L1, product_NLH, 0.0).sum(axis=1) / has_key_L1.sum()

    return jnp.moveaxis(jax.lax.map(mean_at, distances_D), 0, -1)
