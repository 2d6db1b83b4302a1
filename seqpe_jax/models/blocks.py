"""The pre-LayerNorm transformer block."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.activations import ACTIVATIONS
from seqpe_jax.axes import BATCH, HEADS, HIDDEN, LENGTH, WIDTH, lay_out
from seqpe_jax.encodings.signal import PositionSignal
from seqpe_jax.models.attention import Cache, attend, attend_cached, attention_weights

REMAT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Linear(nn.Module):
    """A linear map between any numbers of dimensions.

    Its kernel is laid out for use after it is cast: what several devices store together travels in the smaller type.

    Attributes:
      shape: of the kernel, the dimensions that are summed over first; names: of these dimensions (`axes`).
      summed: number of dimensions that are summed over; dtype: of the arithmetic; kernel_init: of the weights.
    """

    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer
    summed: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x @ kernel + bias."""
        kernel = self.param("kernel", self.kernel_init, self.shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, self.shape[self.summed :], jnp.float32)
        kernel = lay_out(kernel.astype(self.dtype), *self.names)
        return jnp.tensordot(x.astype(self.dtype), kernel, self.summed) + bias.astype(self.dtype)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and in front of a residual sum.

    Attributes:
      width, heads, mlp_width: sizes; layers: of the whole model.
      dropout: after attention and MLP; attention_dropout: on attention weights.
      attention_kind, attention_block: kind and block of `models.attention.attend`; causal: attend to the past only.
      scale_residual: residual projections start smaller by sqrt(2 * layers).
      drop_path: share of samples for which a branch (attention or MLP) is left out while training; the others' branch is
        scaled up by as much (stochastic depth, Huang et al. 2016).
    """

    width: int
    heads: int
    mlp_width: int
    layers: int
    dropout: float
    attention_dropout: float
    activation: str
    layer_norm_epsilon: float
    init_std: float
    dtype: jnp.dtype
    attention_kind: str
    attention_block: int
    causal: bool = True
    scale_residual: bool = True
    drop_path: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BLD: jax.Array,
        signal: PositionSignal,
        deterministic: bool = True,
        weights: bool = False,
        cache: Cache | None = None,
        places_PL: jax.Array | None = None,
        added_PHLS: jax.Array | None = None,
        drop_path: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Returns the next states [B, L, D], or the attention weights [B, H, L, L] if those are asked for.

        Args:
          signal: of this layer.
          cache, places_PL, added_PHLS: see `models.attention.attend_cached`; given, (states, cache) is returned.
          drop_path: in place of the attribute.
        """
        normal = nn.initializers.normal
        residual_init = normal(self.init_std / (math.sqrt(2 * self.layers) if self.scale_residual else 1.0))
        norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_epsilon, dtype=self.dtype)
        linear = functools.partial(Linear, dtype=self.dtype, kernel_init=normal(self.init_std))
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        rate = self.drop_path if drop_path is None else drop_path
        keep = functools.partial(self._keep, rate=0.0 if deterministic else rate)
        heads, head_width = self.heads, self.width // self.heads

        x_BLD = lay_out(x_BLD, BATCH, LENGTH, None)
        qkv = linear((self.width, 3, heads, head_width), (WIDTH, None, HEADS, None), name="qkv")(norm(name="norm_1")(x_BLD))
        query, key, value = (lay_out(qkv[:, :, part], BATCH, LENGTH, HEADS, None) for part in range(3))
        if weights:
            return attention_weights(query, key, signal, causal=self.causal)
        how = {"kind": "plain" if self.is_initializing() else self.attention_kind, "block": self.attention_block}
        if cache is None:
            dropping = self.attention_dropout > 0 and not deterministic
            mixed = attend(
                query, key, value, signal, causal=self.causal, **how,
                dropout_rate=self.attention_dropout, dropout_key=self.make_rng("dropout") if dropping else None,
            )  # fmt: skip
        else:
            mixed, cache = attend_cached(query, key, value, signal, cache, places_PL, added_PHLS, **how)
        out = linear(
            (heads, head_width, self.width), (HEADS, None, WIDTH), kernel_init=residual_init, summed=2, name="out"
        )(mixed)
        x_BLD = x_BLD + keep(drop(lay_out(out, BATCH, LENGTH, None)))
        hidden = linear((self.width, self.mlp_width), (WIDTH, HIDDEN), name="mlp_in")(norm(name="norm_2")(x_BLD))
        hidden = ACTIVATIONS[self.activation](lay_out(hidden, BATCH, LENGTH, HIDDEN))
        out = linear((self.mlp_width, self.width), (HIDDEN, WIDTH), kernel_init=residual_init, name="mlp_out")(hidden)
        x_BLD = x_BLD + keep(drop(lay_out(out, BATCH, LENGTH, None)))
        return x_BLD if cache is None else (x_BLD, cache)

    def _keep(self, branch_BLD: jax.Array, rate: jax.Array | float) -> jax.Array:
        """A branch, left out for a share of the samples."""
        if isinstance(rate, float) and not rate:
            return branch_BLD
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (branch_BLD.shape[0], 1, 1))
        return jnp.where(kept, branch_BLD / (1 - rate), 0).astype(branch_BLD.dtype)


class Scanned(nn.Module):
    """Blocks that differ in their weights alone, stacked [layers, ...] in a parameter `layers`: compiled once, looped over.

    Attributes:
      make: returns a block; layers: their number; remat: as of the models; drop_path: of each layer.
    """

    make: Callable[..., Block]
    layers: int
    remat: str
    drop_path: tuple[float, ...]

    @nn.compact
    def __call__(self, x_BLD: jax.Array, signal: PositionSignal, deterministic: bool) -> jax.Array:
        """Returns the states after all blocks."""
        block = self.make(parent=None)

        def initial(key: jax.Array) -> dict:
            first = signal.at_layer(0)
            return jax.vmap(lambda key: block.init(key, x_BLD, first)["params"])(jax.random.split(key, self.layers))

        params = self.param("layers", initial)
        dropping = self.has_rng("dropout") and not deterministic
        keys = jax.random.split(self.make_rng("dropout"), self.layers) if dropping else None
        rates = jnp.array(self.drop_path) if dropping and any(self.drop_path) else None
        shared, stacked = signal.by_layer()

        def body(x_BLD: jax.Array, parts: tuple) -> tuple[jax.Array, None]:
            params, key, rate, own = parts
            rngs = {} if key is None else {"dropout": key}
            seen = shared.joined(own)
            return block.apply({"params": params}, x_BLD, seen, deterministic, drop_path=rate, rngs=rngs), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        return jax.lax.scan(body, x_BLD, (params, keys, rates, stacked))[0]

    def one(self, layer: int, *arguments: Any, **options: Any) -> Any:
        """Returns what one block returns; arguments as of its call, which draws nothing."""
        params = jax.tree.map(lambda leaf: leaf[layer], self.get_variable("params", "layers"))
        return self.make(parent=None).apply({"params": params}, *arguments, **options)


def stack(params: dict, layers: int) -> dict:
    """Returns the parameters of a model with `Scanned` blocks, given those of one with a block for each layer."""
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    blocks = [params[f"blocks_{layer}"] for layer in range(layers)]
    return rest | {"blocks": {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}}


def unstack(params: dict, layers: int) -> dict:
    """Returns the parameters that `stack` was given."""
    rest, stacked = {name: value for name, value in params.items() if name != "blocks"}, params["blocks"]["layers"]
    return rest | {f"blocks_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(layers)}


def make_blocks(model: Any, drop_path: tuple[float, ...] = (), **fields: Any) -> "list[Block] | Scanned":
    """Returns the blocks of a model, made of its attributes; inside its `setup`.

    Args:
      drop_path: of each layer; fields: further attributes of a block.
    """
    make = functools.partial(
        Block, model.width, model.heads, model.mlp_width or 4 * model.width, model.layers, model.dropout,
        model.attention_dropout, model.activation, model.layer_norm_epsilon, model.init_std, model.dtype,
        model.attention_kind, model.attention_block, **fields,
    )  # fmt: skip
    rates = drop_path or (0.0,) * model.layers
    if model.scan:
        return Scanned(make, model.layers, model.remat, rates)
    if model.remat == "none":
        return [make(drop_path=rate) for rate in rates]
    remade = nn.remat(Block, policy=REMAT[model.remat], static_argnums=(3, 4))
    return [remade(*make.args, **make.keywords, drop_path=rate) for rate in rates]


def run_blocks(blocks: "list[Block] | Scanned", x_BLD: jax.Array, signal: PositionSignal, deterministic: bool) -> jax.Array:
    """Returns the states after all blocks, each with its own part of the signal."""
    if isinstance(blocks, Scanned):
        return blocks(x_BLD, signal, deterministic)
    for layer, block in enumerate(blocks):
        x_BLD = block(x_BLD, signal.at_layer(layer), deterministic, False)
    return x_BLD


def run_block(
    blocks: "list[Block] | Scanned",
    layer: int,
    x_BLD: jax.Array,
    signal: PositionSignal,
    weights: bool = False,
    **options: Any,
) -> Any:
    """Returns what one block returns without dropout; options: `cache`, `places_PL` and `added_PHLS`."""
    block = functools.partial(blocks.one, layer) if isinstance(blocks, Scanned) else blocks[layer]
    return block(x_BLD, signal, True, weights, **options)
