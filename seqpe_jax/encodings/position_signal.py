"""PositionSignal: the effect of positions on tokens, queries, keys and logits, as every encoding returns it."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import flax
import jax
import jax.numpy as jnp

from seqpe_jax.axes import BATCH, HEADS, LENGTH, copy_per_shard, shards, with_logical_constraint

Pair = tuple[jax.Array, jax.Array]
ParamBounds = dict[str, tuple[float, float]]  # name of a parameter -> (smallest value, largest value)
# Values of the fields in heads that get no position: 1 for factors and cosines, 0 for terms that are added.
IDENTITY_VALUES = {
    "rotation": (1.0, 0.0),
    "multiplicative": (1.0, 1.0),
    "additive": (0.0, 0.0),
    "position_query_key": (0.0, 0.0),
    "parabola": (0.0, 0.0),
}
# Fields that a layer may lack: those of queries, keys and logits.
LAYER_FIELDS = {
    *IDENTITY_VALUES,
    "polar_phase",
    "polar_key_phase",
    "polar_num_heads",
    "bias",
    "relative_bias",
    "bias_params",
}


@flax.struct.dataclass
class RelativeBias:
    """A logit bias as a function of the positions of query and key, computed for some queries and keys at a time.

    Attributes:
      query: float32[P, L, C], inputs of the function for each query.
      key: float32[P, S, C], the same for each key.
      function: (params, query [P, l, C], key [P, s, C], heads int32[h]) -> (factor, addend), each
        float32[P or 1, h or 1, l, s]. Logits are multiplied by the factor, if it is not None, and the addend is added;
        params: `PositionSignal.bias_params`.
      heads: the first heads that get it; 0 = all.
    """

    query: jax.Array
    key: jax.Array
    function: Callable[..., tuple[jax.Array | None, jax.Array]] = flax.struct.field(pytree_node=False)
    heads: int = flax.struct.field(pytree_node=False, default=0)


@dataclasses.dataclass(frozen=True)
class ScaledBias:
    """A function of `RelativeBias` whose effect is multiplied by a factor of each head.

    Attributes:
      function: that without the factor.
    """

    function: Callable[..., tuple[jax.Array | None, jax.Array]]

    def __call__(
        self, params: Any, query: jax.Array, key: jax.Array, heads_H: jax.Array
    ) -> tuple[jax.Array | None, jax.Array]:
        """Returns (factor, addend); params: {"own": those of the function, "start_scale": float32[H]}."""
        factor, addend = self.function(params["own"], query, key, heads_H)
        scale_H11 = params["start_scale"][heads_H][:, None, None]
        return None if factor is None else 1.0 + scale_H11 * (factor - 1.0), scale_H11 * addend


@flax.struct.dataclass
class PositionSignal:
    """The effect of P sets of L positions on tokens, queries, keys and logits. Fields that are None have no effect.

    Attributes:
      input_embedding: float[P, L, D], added to the tokens.
      rotation: (cos, sin), each float[P, L, H or 1, F], rotating the first F pairs (2i, 2i + 1) of q and k; F <= K/2.
      multiplicative: (of q, of k), each float[P, L, H or 1, K or 1], multiplied onto q and k.
      additive: (of q, of k), each float[P, L, H or 1, K], added to q and k.
      position_query_key: position queries and keys, each float32[P, L, H or 1, F], whose dot product is added to the
        final attention logits.
      parabola: (coordinates float32[P, L, H, M], whether a token has a position float32[P, L, H or 1, 1]) of M parabolas, which
        become position queries and keys by what the queries' tokens say (`models.transformer.parabola_query_key`).
      polar_phase: (cos, sin), each float[P, L, 1, K]; component k of q and k then has the magnitude softplus of its value,
        and this phase.
      polar_key_phase: float[H, K], added to the phase of keys.
      polar_num_heads: the first heads in polar coordinates; None = all. In the others q and k stay as they are.
      bias: float32[H or 1, L, S], added to the final attention logits.
      relative_bias: the same as a function of positions.
      bias_params: parameters of that function, a tree of arrays.
      documents: int32[B, L], number of each token's document in its sample, rising; a token attends to its own document.
      per_layer_fields: names of the fields that differ by layer; they have a leading layer axis.
      field_layers: (name of a field, flags by layer) of the fields that only some layers have.
      per_shard: the P sets of `position_query_key` are equal copies of one, for P shards of the batch
        (`axes.copy_per_shard`).
    """

    input_embedding: jax.Array | None = None
    rotation: Pair | None = None
    multiplicative: Pair | None = None
    additive: Pair | None = None
    position_query_key: Pair | None = None
    parabola: Pair | None = None
    polar_phase: Pair | None = None
    polar_key_phase: jax.Array | None = None
    polar_num_heads: int | None = flax.struct.field(pytree_node=False, default=None)
    bias: jax.Array | None = None
    relative_bias: RelativeBias | None = None
    bias_params: Any = None
    documents: jax.Array | None = None
    per_layer_fields: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    field_layers: tuple[tuple[str, tuple[bool, ...]], ...] = flax.struct.field(pytree_node=False, default=())
    per_shard: bool = flax.struct.field(pytree_node=False, default=False)

    def copied_per_shard(self, batch: int) -> "PositionSignal":
        """Returns the signal with position queries and keys that each shard of a batch has for itself.

        Unchanged where they differ by layer or sample, or the batch is not sharded.

        Args:
          batch: number of samples.
        """
        pair, count = self.position_query_key, shards(BATCH)
        if pair is None or "position_query_key" in self.per_layer_fields or count == 1 or batch % count:
            return self
        if any(len(field) > 1 for field in pair):
            return self
        copies = tuple(copy_per_shard(field, BATCH, LENGTH, HEADS, None) for field in pair)
        return self.replace(position_query_key=copies, per_shard=True)

    def split_by_layer(self) -> tuple["PositionSignal", "PositionSignal"]:
        """Returns (fields that all layers share, fields by layer with a leading axis), without `input_embedding`.

        Raises:
          ValueError: some layers lack a field: split the signals of `at_layers`.
        """
        if self.field_layers:
            raise ValueError("layers that lack a field of the signal do not share the others' structure")
        own = {name: getattr(self, name) for name in self.per_layer_fields}
        shared = self.replace(input_embedding=None, per_layer_fields=(), **dict.fromkeys(own))
        return shared, PositionSignal(**own)

    def at_layer(self, layer: int) -> "PositionSignal":
        """Returns the signal of one layer."""
        here = self._with_fields_of(layer)
        if not here.per_layer_fields:
            return here
        shared, own = here.split_by_layer()
        return shared.joined(jax.tree.map(lambda field: field[layer], own))

    def at_layers(self, first: int, period: int) -> "PositionSignal":
        """Returns the signal of the layers first, first + period, ..., which lack the same fields."""
        here = self._with_fields_of(first)
        if period == 1:
            return here
        own = {name: getattr(here, name) for name in here.per_layer_fields}
        return here.replace(**jax.tree.map(lambda field: field[first::period], own))

    def absent(self, layer: int) -> frozenset[str]:
        """Returns the names of the fields that a layer lacks and others have."""
        return frozenset(name for name, flags in self.field_layers if not flags[layer])

    def for_layers(self, flags: tuple[bool, ...]) -> "PositionSignal":
        """Returns the signal for some layers of a model; the others see no position.

        Args:
          flags: whether a layer gets it, one for each.

        Raises:
          ValueError: the signal is added to the tokens, which all layers read.
        """
        if all(flags):
            return self
        if self.input_embedding is not None:
            raise ValueError("what is added to tokens reaches all layers")
        own = (field.name for field in dataclasses.fields(self) if field.name in LAYER_FIELDS)
        return self.replace(field_layers=tuple((name, flags) for name in own if getattr(self, name) is not None))

    def _with_fields_of(self, layer: int) -> "PositionSignal":
        """The signal without the fields that a layer lacks."""
        absent = self.absent(layer)
        rest = tuple(name for name in self.per_layer_fields if name not in absent)
        return self.replace(per_layer_fields=rest, field_layers=(), **dict.fromkeys(absent))

    def at_tokens(self, index_PL: jax.Array) -> "PositionSignal":
        """Returns one layer's signal of tokens of a window, as P position sets without `bias`.

        Args:
          index_PL: int32[P, L], token indices; the window's signal has one position set. Biases are of pairs of tokens:
            rows of `bias` are left to the caller, and `relative_bias` is that of these queries and all keys of the window.
        """
        of_pairs = {"bias": None, "relative_bias": None, "bias_params": None, "polar_key_phase": None}
        here = jax.tree.map(lambda field: field[0][index_PL], self.replace(**of_pairs))
        bias = self.relative_bias and self.relative_bias.replace(query=self.relative_bias.query[0][index_PL])
        return here.replace(relative_bias=bias, bias_params=self.bias_params, polar_key_phase=self.polar_key_phase)

    def in_documents(self, documents_BL: jax.Array, index_BL: jax.Array, fields: Collection[str]) -> "PositionSignal":
        """Returns the signal of samples that hold several documents; its fields then have a position set for each sample.

        Args:
          documents_BL: int32, the field `documents`.
          index_BL: int32, index of each token in its document: it gets what the token at that index of the window has.
          fields: names of the fields of which this is so; the others stay as they are.

        Raises:
          ValueError: a field is a bias of pairs of tokens.
        """
        if self.bias is not None and "bias" in fields:
            raise ValueError(
                "a bias of pairs of tokens is the same in all samples: it cannot begin anew in each document"
            )

        def at_index(field: jax.Array) -> jax.Array:
            set_B1 = (jnp.arange(len(index_BL)) % len(field))[:, None]
            return with_logical_constraint(field[set_B1, index_BL], BATCH, LENGTH, *(None,) * (field.ndim - 2))

        changed: dict[str, Any] = {"documents": documents_BL}
        for name in set(fields) & {*IDENTITY_VALUES, "input_embedding", "polar_phase"}:
            by_layer = name in self.per_layer_fields
            changed[name] = jax.tree.map(jax.vmap(at_index) if by_layer else at_index, getattr(self, name))
        if self.relative_bias is not None and "relative_bias" in fields:
            query, key = at_index(self.relative_bias.query), at_index(self.relative_bias.key)
            changed["relative_bias"] = self.relative_bias.replace(query=query, key=key)
        return self.replace(**changed)

    def joined(self, other: "PositionSignal") -> "PositionSignal":
        """Returns the signal with the fields of both. Raises: ValueError: both fill the same one."""
        fields = {}
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name in ("per_layer_fields", "field_layers", "per_shard"):
                fields[field.name] = mine or theirs if field.name == "per_shard" else mine + theirs
                continue
            if mine is not None and theirs is not None:
                raise ValueError(f"two parts of a position encoding both fill '{field.name}'")
            fields[field.name] = theirs if mine is None else mine
        return PositionSignal(**fields)

    def scaled(self, scale: jax.Array) -> "PositionSignal":
        """Returns the signal between none, at 0, and itself, at 1.

        Args:
          scale: float32[H], or [layers, H] where the fields differ by layer; [1] for what is added to tokens.
        """
        if self.input_embedding is not None:
            return self.replace(input_embedding=scale * self.input_embedding)
        fields: dict[str, Any] = {}
        for name, neutral in IDENTITY_VALUES.items():
            pair = getattr(self, name)
            if pair is None:
                continue
            factor = jnp.expand_dims(scale, (-3, -2) if name in self.per_layer_fields else -2)[..., None]
            parts = [value + factor * (part - value) for part, value in zip(pair, neutral, strict=True)]
            fields[name] = (parts[0], pair[1] if name == "position_query_key" else parts[1])  # a product, scaled once
        if self.relative_bias is not None:
            function = ScaledBias(self.relative_bias.function)
            fields["relative_bias"] = self.relative_bias.replace(function=function)
            fields["bias_params"] = {"own": self.bias_params, "start_scale": scale}
        return self.replace(**fields)

    def for_heads(self, count: int, heads: int) -> "PositionSignal":
        """Returns the signal for the first heads of a model; the others see no position.

        Args:
          count: heads that get it; fields have one head, or at least that many.
          heads: number of heads of the model.

        Raises:
          ValueError: the signal is added to the tokens, which all heads read, or is a bias.
        """
        if count == heads:
            return self
        if self.input_embedding is not None or self.bias is not None:
            raise ValueError("what is added to tokens, or as a bias, reaches all heads")
        fields = {}
        for name, neutral in IDENTITY_VALUES.items():
            pair = getattr(self, name)
            if pair is not None:
                fields[name] = tuple(
                    _pad_heads(part, count, heads, value) for part, value in zip(pair, neutral, strict=True)
                )
        if self.polar_phase is not None:
            fields["polar_num_heads"] = count
        if self.relative_bias is not None:
            fields["relative_bias"] = self.relative_bias.replace(heads=count)
        return self.replace(**fields)


def _pad_heads(field: jax.Array, count: int, heads: int, neutral: float) -> jax.Array:
    """[..., L, heads, F] of a field [..., L, 1 or more, F]: its first `count` heads, then heads of the neutral value."""
    *lead, own_heads, width = field.shape
    own = jnp.broadcast_to(field, (*lead, count, width)) if own_heads == 1 else field[..., :count, :]
    rest = ((0, 0),) * len(lead) + ((0, heads - count), (0, 0))
    return jnp.pad(own, rest, constant_values=neutral)


def broadcast_to_batch(field: jax.Array, batch: int) -> jax.Array:
    """Returns [1 or batch, ...] of a field of P position sets: sample i uses set i mod P."""
    sets = field.shape[0]
    return field if sets == 1 else jnp.tile(field, (batch // sets,) + (1,) * (field.ndim - 1))


def clip_straight_through(parameter: jax.Array, bounds: tuple[float, float]) -> jax.Array:
    """Returns a clipped parameter, with the gradient of the unclipped one.

    Training limits the parameter itself after each update (`training.optimizer.projection`), so that one at a bound has a
    gradient and can come back. A parameter outside of its bounds comes from a checkpoint of version 0.1.0 or older, whose
    model clipped it.
    """
    return parameter + jax.lax.stop_gradient(jnp.clip(parameter, *bounds) - parameter)
