"""The pre-LayerNorm transformer block."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.activations import ACTIVATIONS
from seqpe_jax.axes import BATCH, HEADS, LENGTH, MLP, WIDTH, with_logical_constraint
from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.models.attention import KVCache, attend, attend_cached, attention_weights

# The forgetting transformer lets a token through by a share sigmoid(x) (Lin et al. 2025, arXiv 2503.02130); CABLE takes a
# bias softplus(x) from it (Veisi et al. 2025, arXiv 2503.08067), which is the same with the sign of x turned.
GATES = {"forget": jax.nn.log_sigmoid, "cable": lambda x: -jax.nn.softplus(x)}
REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Linear(nn.Module):
    """A linear map between any numbers of dimensions.

    Its kernel is laid out for use after it is cast: what several devices store together travels in the smaller type.

    Attributes:
      shape: of the kernel, the dimensions that are summed over first; names: of these dimensions (`axes`).
      summed: number of dimensions that are summed over; dtype: of the arithmetic; kernel_init: of the weights;
      bias: that all outputs begin with.
    """

    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer
    summed: int = 1
    bias: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x @ kernel + bias."""
        kernel = self.param("kernel", self.kernel_init, self.shape, jnp.float32)
        bias = self.param("bias", nn.initializers.constant(self.bias), self.shape[self.summed :], jnp.float32)
        kernel = with_logical_constraint(kernel.astype(self.dtype), *self.names)
        return jnp.tensordot(x.astype(self.dtype), kernel, self.summed) + bias.astype(self.dtype)


def summed(log_gate_BLH: jax.Array) -> jax.Array:
    """Returns the sums over all places up to each, float32[B, L, H]; their number may be symbolic (jax.export)."""
    if isinstance(log_gate_BLH.shape[1], int):
        return jnp.cumsum(log_gate_BLH, axis=1)

    def add(total_BH: jax.Array, step_BH: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (total_BH + step_BH,) * 2

    steps_LBH = jnp.moveaxis(log_gate_BLH, 1, 0)
    return jnp.moveaxis(jax.lax.scan(add, jnp.zeros_like(log_gate_BLH[:, 0]), steps_LBH)[1], 0, 1)


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and in front of a residual sum.

    Attributes:
      width, heads, mlp_width: sizes; layers: of the whole model.
      dropout: after attention and MLP; attention_dropout: on attention weights.
      attention_kind, attention_block: kind and block of `models.attention.attend`; causal: attend to the past only.
      scale_residual: residual projections start smaller by sqrt(2 * layers).
      fade: how the block computes by how much each token lets those before it fade from sight, one of `GATES`; "" = not.
      gate_bias_init: each token lets those before it through by a share that begins near sigmoid(gate_bias_init).
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
    gate: str = ""
    gate_bias_init: float = 0.0
    drop_path: float = 0.0

    def setup(self) -> None:
        """Makes the two norms and the four linear maps."""
        normal, heads, head_width = nn.initializers.normal, self.heads, self.width // self.heads
        residual_init = normal(self.init_std / (math.sqrt(2 * self.layers) if self.scale_residual else 1.0))
        norm = functools.partial(nn.LayerNorm, epsilon=self.layer_norm_epsilon, dtype=self.dtype)
        linear = functools.partial(Linear, dtype=self.dtype, kernel_init=normal(self.init_std))
        self.norm_1, self.norm_2 = norm(), norm()
        self.qkv = linear((self.width, 3, heads, head_width), (WIDTH, None, HEADS, None))
        self.out = linear((heads, head_width, self.width), (HEADS, None, WIDTH), kernel_init=residual_init, summed=2)
        self.mlp_in = linear((self.width, self.mlp_width), (WIDTH, MLP))
        self.mlp_out = linear((self.mlp_width, self.width), (MLP, WIDTH), kernel_init=residual_init)
        self.drop = nn.Dropout(self.dropout)
        if self.gate:
            bias = {"forget": self.gate_bias_init, "cable": -self.gate_bias_init}[self.gate]
            self.fading = linear((self.width, heads), (WIDTH, HEADS), bias=bias)

    def __call__(
        self, x_BLD: jax.Array, signal: PositionSignal, deterministic: bool = True, drop_path: jax.Array | None = None
    ) -> jax.Array:
        """Returns the next states [B, L, D].

        Args:
          signal: of this layer; drop_path: in place of the attribute.
        """
        dropping = self.attention_dropout > 0 and not deterministic
        log_gate_BLH = self._fade(x_BLD)
        cum_log_gate_BLH = (
            None if log_gate_BLH is None else with_logical_constraint(summed(log_gate_BLH), BATCH, LENGTH, HEADS)
        )
        mixed = attend(
            *self._project(x_BLD),
            signal,
            cum_log_gate_BLH,
            causal=self.causal,
            **self._how,
            dropout_rate=self.attention_dropout,
            dropout_key=self.make_rng("dropout") if dropping else None,
        )
        return self._finish(x_BLD, mixed, deterministic, self.drop_path if drop_path is None else drop_path)

    def forward_cached(
        self,
        x_BLD: jax.Array,
        signal: PositionSignal,
        cache: KVCache,
        token_index_PL: jax.Array,
        added_PHLS: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Returns the next states of some places of a window, and the cache with them in it.

        Args:
          signal: of this layer; cache, places_PL, added_PHLS: see `models.attention.attend_cached`.
        """
        read = (signal, cache, token_index_PL, added_PHLS, self._fade(x_BLD))
        mixed, cache = attend_cached(*self._project(x_BLD), *read, **self._how)
        return self._finish(x_BLD, mixed), cache

    def weights(self, x_BLD: jax.Array, signal: PositionSignal) -> jax.Array:
        """Returns the attention weights, float32[B, H, L, L]; signal: of this layer."""
        query, key, _ = self._project(x_BLD)
        return attention_weights(query, key, signal, causal=self.causal)

    @property
    def _how(self) -> dict[str, Any]:
        """Kind and block of the attention; while parameters are drawn, the one that needs least compilation."""
        return {"kind": "reference" if self.is_initializing() else self.attention_kind, "block": self.attention_block}

    def _fade(self, x_BLD: jax.Array) -> jax.Array | None:
        """By how much each token raises the fade of all before it, float32[B, L, H], at most 0; None = not at all."""
        return GATES[self.gate](self.fading(self.norm_1(x_BLD)).astype(jnp.float32)) if self.gate else None

    def _project(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each [B, L, H, K]."""
        qkv = self.qkv(self.norm_1(with_logical_constraint(x_BLD, BATCH, LENGTH, None)))
        query, key, value = (with_logical_constraint(qkv[:, :, part], BATCH, LENGTH, HEADS, None) for part in range(3))
        return query, key, value

    def _finish(
        self, x_BLD: jax.Array, mixed_BLHK: jax.Array, deterministic: bool = True, rate: jax.Array | float = 0.0
    ) -> jax.Array:
        """The next states, given the mixed values of all heads; rate: of left out branches."""
        keep = functools.partial(self._keep, rate=0.0 if deterministic else rate)
        drop = functools.partial(self.drop, deterministic=deterministic)
        x_BLD = with_logical_constraint(x_BLD, BATCH, LENGTH, None)
        x_BLD = x_BLD + keep(drop(with_logical_constraint(self.out(mixed_BLHK), BATCH, LENGTH, None)))
        hidden = with_logical_constraint(self.mlp_in(self.norm_2(x_BLD)), BATCH, LENGTH, MLP)
        out = self.mlp_out(ACTIVATIONS[self.activation](hidden))
        return x_BLD + keep(drop(with_logical_constraint(out, BATCH, LENGTH, None)))

    def _keep(self, branch_BLD: jax.Array, rate: jax.Array | float) -> jax.Array:
        """A branch, left out for a share of the samples."""
        if isinstance(rate, float) and not rate:
            return branch_BLD
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (branch_BLD.shape[0], 1, 1))
        return jnp.where(kept, branch_BLD / (1 - rate), 0).astype(branch_BLD.dtype)


class ScannedBlocks(nn.Module):
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
        if self.is_initializing():
            return x_BLD  # what is drawn further on depends on its shape alone
        dropping = self.has_rng("dropout") and not deterministic
        keys = jax.random.split(self.make_rng("dropout"), self.layers) if dropping else None
        rates = jnp.array(self.drop_path) if dropping and any(self.drop_path) else None
        shared, stacked = signal.split_by_layer()

        def body(x_BLD: jax.Array, parts: tuple) -> tuple[jax.Array, None]:
            params, key, rate, own = parts
            rngs = {} if key is None else {"dropout": key}
            seen = shared.joined(own)
            return block.apply({"params": params}, x_BLD, seen, deterministic, drop_path=rate, rngs=rngs), None

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        return jax.lax.scan(body, x_BLD, (params, keys, rates, stacked))[0]

    def one(self, layer: int, method: str, *arguments: Any) -> Any:
        """Returns what a method of one block returns, which draws nothing."""
        params = jax.tree.map(lambda leaf: leaf[layer], self.get_variable("params", "layers"))
        return self.make(parent=None).apply({"params": params}, *arguments, method=method)


def stack_layers(params: dict, layers: int) -> dict:
    """Returns the parameters of a model with `ScannedBlocks` blocks, given those of one with a block for each layer."""
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    blocks = [params[f"blocks_{layer}"] for layer in range(layers)]
    return rest | {"blocks": {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}}


def unstack_layers(params: dict, layers: int) -> dict:
    """Returns the parameters that `stack_layers` was given."""
    rest, stacked = {name: value for name, value in params.items() if name != "blocks"}, params["blocks"]["layers"]
    return rest | {f"blocks_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(layers)}


def make_blocks(model: Any, drop_path: tuple[float, ...] = (), **fields: Any) -> "list[Block] | ScannedBlocks":
    """Returns the blocks of a model, made of its attributes; inside its `setup`.

    Args:
      drop_path: of each layer; fields: further attributes of a block.
    """
    make = functools.partial(
        Block,
        model.width,
        model.heads,
        model.mlp_width or 4 * model.width,
        model.layers,
        model.dropout,
        model.attention_dropout,
        model.activation,
        model.layer_norm_epsilon,
        model.init_std,
        model.dtype,
        model.attention_kind,
        model.attention_block,
        **fields,
    )
    rates = drop_path or (0.0,) * model.layers
    if model.scan:
        return ScannedBlocks(make, model.layers, model.remat, rates)
    if model.remat == "none":
        return [make(drop_path=rate) for rate in rates]
    remade = nn.remat(Block, policy=REMAT[model.remat], static_argnums=3)
    return [remade(*make.args, **make.keywords, drop_path=rate) for rate in rates]


def run_blocks(
    blocks: "list[Block] | ScannedBlocks", x_BLD: jax.Array, signal: PositionSignal, deterministic: bool
) -> jax.Array:
    """Returns the states after all blocks, each with its own part of the signal."""
    if isinstance(blocks, ScannedBlocks):
        return blocks(x_BLD, signal, deterministic)
    for layer, block in enumerate(blocks):
        x_BLD = block(x_BLD, signal.at_layer(layer), deterministic)
    return x_BLD


def run_block(blocks: "list[Block] | ScannedBlocks", layer: int, method: str, *arguments: Any) -> Any:
    """Returns what a method of one block returns, without dropout."""
    if isinstance(blocks, ScannedBlocks):
        return blocks.one(layer, method, *arguments)
    return getattr(blocks[layer], method)(*arguments)
