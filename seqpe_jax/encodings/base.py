"""What attention learns of positions: one small pytree that every encoding produces and every model reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]
# What the heads without a position get: fields that multiply are 1 there (so is the cosine), fields that add are 0.
NEUTRAL = {"rotation": (1.0, 0.0), "multiplicative": (1.0, 1.0), "additive": (0.0, 0.0), "logit_query_key": (0.0, 0.0)}


@flax.struct.dataclass
class RelativeBias:
    """What a logit gains from where its query and its key stand, computed for a part of the queries and keys at a time.

    Attributes:
      query, key: float32[P, L, C] and float32[P, S, C], what the function reads of each place.
      function: (params, query [P, l, C], key [P, s, C], heads int32[h]) -> (factor, addend), float32[P or 1, h or 1, l, s]
        each; logits are multiplied by the one, if it is not None, and then gain the other. Params: `bias_params`.
      heads: the first heads that it is for; 0 = all.
    """

    query: jax.Array
    key: jax.Array
    function: Callable[..., tuple[jax.Array | None, jax.Array]] = flax.struct.field(pytree_node=False)
    heads: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class PositionSignal:
    """The effect of P position sets of L positions on tokens, queries and keys; absent fields have none.

    Attributes:
      added: float[P, L, D], added to the tokens.
      rotation: (cos, sin), each float[P, L, H or 1, F], rotating the first F pairs (2i, 2i + 1) of q and k; F <= K/2.
      factors: (for q, for k), each float[P, L, H or 1, K or 1], multiplied onto q and k.
      shifts: (for q, for k), each float[P, L, H or 1, K], added to q and k.
      features: (f_q, f_k), each float32[P, L, H or 1, F]; final attention logits gain f_q . f_k.
      polar: (cos, sin), each float[P, L, 1, K]: q and k become the lengths softplus(q) and softplus(k) of K arrows each at
        these angles, K of the keys' turned on by polar_shift, float[H, K].
      polar_heads: the first heads for which this is so, None = all; in the others q and k stay as they are.
      bias: float32[H or 1, L, S], added to the final attention logits.
      relation: what they gain as a function of two places; relation_params: what it learns, a tree of arrays.
      stacked: names of the fields that differ by layer; these have a leading layer axis.
    """

    input_embedding: jax.Array | None = None
    rotation: Pair | None = None
    multiplicative: Pair | None = None
    additive: Pair | None = None
    logit_query_key: Pair | None = None
    polar_phase: Pair | None = None
    polar_key_phase: jax.Array | None = None
    polar_num_heads: int | None = flax.struct.field(pytree_node=False, default=None)
    bias: jax.Array | None = None
    relative_bias: RelativeBias | None = None
    bias_params: Any = None
    per_layer_fields: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def split_by_layer(self) -> tuple["PositionSignal", "PositionSignal"]:
        """Returns (what all layers share, what differs by layer with its leading layer axis), without `input_embedding`."""
        own = {name: getattr(self, name) for name in self.per_layer_fields}
        return self.replace(input_embedding=None, per_layer_fields=(), **dict.fromkeys(own)), PositionSignal(**own)

    def at_layer(self, layer: int) -> "PositionSignal":
        """Returns what one layer sees."""
        if not self.per_layer_fields:
            return self
        shared, own = self.split_by_layer()
        return shared.joined(jax.tree.map(lambda field: field[layer], own))

    def at_tokens(self, places_PL: jax.Array) -> "PositionSignal":
        """Returns what one layer's tokens get at places int32[P, L] of a window, as P position sets without a bias.

        The window's signal has one position set. A bias tells of pairs of places, so the reader of both picks its rows; so
        does that of a relation, whose keys stay those of the window.
        """
        of_pairs = {"bias": None, "relative_bias": None, "bias_params": None, "polar_key_phase": None}
        here = jax.tree.map(lambda field: field[0][places_PL], self.replace(**of_pairs))
        relative_bias = self.relative_bias and self.relative_bias.replace(query=self.relative_bias.query[0][places_PL])
        return here.replace(
            relative_bias=relative_bias, bias_params=self.bias_params, polar_key_phase=self.polar_key_phase
        )

    def joined(self, other: "PositionSignal") -> "PositionSignal":
        """Returns the signal with the fields of both. Raises: ValueError: both fill the same one."""
        fields = {}
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name != "per_layer_fields" and mine is not None and theirs is not None:
                raise ValueError(f"two parts of a position encoding both fill '{field.name}'")
            fields[field.name] = mine + theirs if field.name == "per_layer_fields" else theirs if mine is None else mine
        return PositionSignal(**fields)

    def for_heads(self, count: int, heads: int) -> "PositionSignal":
        """Returns the signal as the first `count` of a model's heads get it; the others see no position.

        Args:
          count: fields have one head, or at least that many.

        Raises:
          ValueError: the signal is added to the tokens, which all heads read, or is a bias.
        """
        if count == heads:
            return self
        fields = {}
        for name, neutral in NEUTRAL.items():
            pair = getattr(self, name)
            if pair is not None:
                fields[name] = tuple(
                    _widened(part, count, heads, value) for part, value in zip(pair, neutral, strict=True)
                )
        if self.input_embedding is not None or self.bias is not None:
            raise ValueError("what is added to tokens, or as a bias, reaches all heads")
        if self.polar_phase is not None:
            fields["polar_num_heads"] = count
        if self.relative_bias is not None:
            fields["relative_bias"] = self.relative_bias.replace(heads=count)
        return self.replace(**fields)


def _widened(field: jax.Array, count: int, heads: int, neutral: float) -> jax.Array:
    """[..., L, heads, F] of a field [..., L, 1 or more, F]: its first `count` heads, then heads that hold `neutral`."""
    *lead, held, width = field.shape
    own = jnp.broadcast_to(field, (*lead, count, width)) if held == 1 else field[..., :count, :]
    rest = ((0, 0),) * len(lead) + ((0, heads - count), (0, 0))
    return jnp.pad(own, rest, constant_values=neutral)


def broadcast_to_batch(field: jax.Array, batch: int) -> jax.Array:
    """Returns [1 or batch, ...] of a field of P position sets: sample i uses set i mod P."""
    sets = field.shape[0]
    return field if sets == 1 else jnp.tile(field, (batch // sets,) + (1,) * (field.ndim - 1))
