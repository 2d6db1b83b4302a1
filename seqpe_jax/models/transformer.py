"""Pre-LayerNorm transformer blocks, one after another or stacked and scanned over."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import Offloadable

from seqpe_jax.axes import (
    BATCH,
    HEADS,
    LENGTH,
    MLP,
    RESIDUAL_LENGTH,
    WIDTH,
    all_gather_param,
    shards,
    with_logical_constraint,
)
from seqpe_jax.encodings.digit_encoder import ACTIVATIONS
from seqpe_jax.encodings.position_signal import Pair, PositionSignal, broadcast_to_batch
from seqpe_jax.models.attention import KVCache, attend, attend_cached, attention_weights
from seqpe_jax.models.attention_inputs import ATTENTION_RESULT
from seqpe_jax.models.attention_tpu import AUTO_BLOCKS, KernelBlocks

# Gate -> log of the share that a token lets through of those before it, at most 0. "forget": log sigmoid(x), the forgetting
# transformer (Lin et al. 2025, arXiv 2503.02130). "cable": a bias of -softplus(x) (Veisi et al. 2025, arXiv 2503.08067),
# which is log sigmoid(-x).
GATES = {"forget": jax.nn.log_sigmoid, "cable": lambda x: -jax.nn.softplus(x)}


def _with_attention(policy: Callable[..., Any], decision: Any) -> Callable[..., Any]:
    """Returns a policy of `jax.checkpoint` that treats the results of attention kernels as given, and the rest as another.

    Args:
      policy: policy for all other values.
      decision: what it would return of a value that is treated alike.
    """
    is_attention = jax.checkpoint_policies.save_only_these_names(ATTENTION_RESULT)

    def of_value(primitive: Any, *arguments: Any, **options: Any) -> Any:
        named = is_attention(primitive, *arguments, **options)
        return decision if named else policy(primitive, *arguments, **options)

    return of_value


_SAVE_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_OFFLOAD_DOTS = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
REMAT_POLICIES = {
    "full": None,
    "dots": _with_attention(_SAVE_DOTS, True),
    "offload": _with_attention(_OFFLOAD_DOTS, Offloadable("device", "pinned_host")),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Hyperparameters that the blocks and the embedding of a model share.

    Attributes:
      layers: number of blocks.
      width: D, size of the states.
      heads: H, number of attention heads; divides `width`.
      mlp_width: hidden size of the MLP; 0 = 4 D.
      dropout: rate after attention and after the MLP.
      attention_dropout: rate on attention weights.
      embedding_dropout: rate on the embedded tokens or patches.
      drop_path: stochastic depth (Huang et al. 2016), probability that a sample skips a branch of the last block; it grows
        linearly from 0 at the first block.
      activation: activation of the MLP, one of `ACTIVATIONS`.
      layer_norm_epsilon: added to the variance.
      init_std: standard deviation of normal initial weights.
      dtype: dtype of the arithmetic; parameters are float32.
      matmul_precision: precision of products of float32 arrays, as `jax.default_matmul_precision` names it.
      remat: recomputation in the backward pass: "none", "full" (whole blocks), "dots" (all but matrix products
        and attention kernels) or "offload" (these are saved in host memory).
      attention_kind: "auto" or one of `attention_dispatch.BACKENDS`.
      attention_block: queries and keys per block of attention; 0 = automatic.
      kernel_blocks: sizes of the tiles of the TPU kernels of attention.
      context_attention: "auto" or one of `attention_context.MODES`, where tokens are split over devices.
      scan: compile one block and loop over stacked weights.
      causal: tokens attend to the past only.
      scale_residual: initial weights of residual projections are smaller by sqrt(2 * layers).
      gate: one of `GATES`, or "" for none.
      gate_bias_init: forget gates start near sigmoid(gate_bias_init).
      parabolas: M of a signal's `parabola`; 0 = it has none.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    drop_path: float = 0.0
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-5
    init_std: float = 0.02
    dtype: Any = jnp.float32
    matmul_precision: str = "default"
    remat: str = "none"
    attention_kind: str = "auto"
    attention_block: int = 0
    kernel_blocks: KernelBlocks = AUTO_BLOCKS
    context_attention: str = "auto"
    scan: bool = False
    causal: bool = True
    scale_residual: bool = True
    gate: str = ""
    gate_bias_init: float = 0.0
    parabolas: int = 0

    @property
    def head_width(self) -> int:
        """K, the size of a head."""
        return self.width // self.heads


class Network(nn.Module):
    """Base class of networks, whose products of float32 arrays have the precision of their config.

    Attributes:
      config: hyperparameters.
    """

    config: TransformerConfig

    def apply(self, *arguments: Any, **options: Any) -> Any:
        """Returns the result of a method, as `nn.Module.apply` does."""
        with jax.default_matmul_precision(self.config.matmul_precision):
            return super().apply(*arguments, **options)


class Linear(nn.Module):
    """A linear map between tensors with any number of dimensions.

    The kernel is cast before it is gathered for use, so that sharded storage travels in the smaller dtype.

    Attributes:
      shape: shape of the kernel, contracted dimensions first; 0 = as the input has it.
      logical_axes: names of these dimensions (`axes`).
      dtype: dtype of the arithmetic.
      kernel_init: initializer of the kernel.
      contract_dims: number of dimensions that are summed over.
      bias_init: initial value of the bias; None = there is no bias.
    """

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer
    contract_dims: int = 1
    bias_init: float | None = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x @ kernel + bias."""
        inputs = x.shape[x.ndim - self.contract_dims :]
        shape = tuple(size or of_x for size, of_x in zip(self.shape, inputs, strict=False))
        shape += self.shape[self.contract_dims :]
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = None
        if self.bias_init is not None:
            bias_init = nn.initializers.constant(self.bias_init)
            bias = self.param("bias", bias_init, self.shape[self.contract_dims :], jnp.float32)
        kernel = all_gather_param(kernel.astype(self.dtype), *self.logical_axes)
        product = jnp.tensordot(x.astype(self.dtype), kernel, self.contract_dims)
        return product if bias is None else product + bias.astype(self.dtype)


def cumsum(log_gate_BLH: jax.Array) -> jax.Array:
    """Returns the cumulative sum along L, float32[B, L, H]; L may be symbolic, which jnp.cumsum does not export."""
    if isinstance(log_gate_BLH.shape[1], int):
        return jnp.cumsum(log_gate_BLH, axis=1)

    def add(total_BH: jax.Array, log_gate_BH: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (total_BH + log_gate_BH,) * 2

    log_gate_LBH = jnp.moveaxis(log_gate_BLH, 1, 0)
    return jnp.moveaxis(jax.lax.scan(add, jnp.zeros_like(log_gate_BLH[:, 0]), log_gate_LBH)[1], 0, 1)


def parabola_query_key(
    shape_BLSHM: jax.Array, coordinates_PLHM: jax.Array, has_position: jax.Array, head_width: int
) -> Pair:
    """Returns the position queries and keys of parabolas (PaPE), each float32[B, L, H, 2 M + 1].

    Their dot product is sum over m of -a_m (p_m[query] - p_m[key])^2 + b_m (p_m[query] - p_m[key]), over sqrt(head width), with
    a = softplus(shape[:, :, 0]) and b = shape[:, :, 1]; 0 where query or key has no position.

    Args:
      shape_BLSHM: float32, S = 2 numbers for each parabola, of the queries' tokens.
      coordinates_PLHM: float32, coordinates p; 0 for a token without position.
      has_position: float32[P, L, H or 1, 1], 1 or 0.
      head_width: K.
    """
    curvature, slope = jax.nn.softplus(shape_BLSHM[:, :, 0]), shape_BLSHM[:, :, 1]
    p, valid = (broadcast_to_batch(field, curvature.shape[0]) for field in (coordinates_PLHM, has_position))
    constant = ((slope - curvature * p) * p).sum(axis=-1, keepdims=True)
    query = jnp.concatenate([constant, curvature, 2 * curvature * p - slope], axis=-1)
    key = jnp.concatenate([jnp.broadcast_to(valid, (*p.shape[:-1], 1)), -(p**2), p], axis=-1)
    return query * valid / math.sqrt(head_width), jnp.broadcast_to(key, query.shape)


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to the residual stream.

    Under the mesh axis `tensor`, which splits heads and hidden units, the residual stream is split along the sequence: each
    map into heads or hidden units gathers it, each map out of them ends with a reduce-scatter.

    Attributes:
      config: hyperparameters of the model.
      drop_path: probability that a sample skips a branch of this block while training; the others' branches are scaled up
        by 1 / (1 - drop_path).
    """

    config: TransformerConfig
    drop_path: float = 0.0

    def setup(self) -> None:
        """Creates the two norms and the four linear maps."""
        config, normal, head_width = self.config, nn.initializers.normal, self.config.head_width
        heads, width, mlp_width = config.heads, config.width, config.mlp_width or 4 * config.width
        residual_std = config.init_std / (math.sqrt(2 * config.layers) if config.scale_residual else 1.0)
        norm = functools.partial(nn.LayerNorm, epsilon=config.layer_norm_epsilon, dtype=config.dtype)
        linear = functools.partial(Linear, dtype=config.dtype, kernel_init=normal(config.init_std))
        residual = functools.partial(Linear, dtype=config.dtype, kernel_init=normal(residual_std))
        self.norm_1, self.norm_2 = norm(), norm()
        self.qkv = linear((width, 3, heads, head_width), (WIDTH, None, HEADS, None))
        self.out = residual((heads, head_width, width), (HEADS, None, WIDTH), contract_dims=2)
        self.mlp_in = linear((width, mlp_width), (WIDTH, MLP))
        self.mlp_out = residual((mlp_width, width), (MLP, WIDTH))
        self.drop = nn.Dropout(config.dropout)
        if config.gate:
            bias = {"forget": config.gate_bias_init, "cable": -config.gate_bias_init}[config.gate]
            # The name is that of its parameters in checkpoints.
            self.forget_gate = linear((width, heads), (WIDTH, HEADS), bias_init=bias, name="fading")
        if config.parabolas:
            sizes = (width, 2, heads, config.parabolas)
            self.parabola_shape = linear(sizes, (WIDTH, None, HEADS, None), bias_init=None)

    def __call__(
        self, x_BLD: jax.Array, signal: PositionSignal, deterministic: bool = True, drop_path: jax.Array | None = None
    ) -> jax.Array:
        """Returns the next states [B, L, D].

        Args:
          x_BLD: states.
          signal: PositionSignal of this layer.
          deterministic: no dropout and no stochastic depth.
          drop_path: replaces the attribute, where layers are scanned over.
        """
        rate = self.config.attention_dropout
        log_gate_BLH, cum_log_gate_BLH = self._log_forget_gate(x_BLD), None
        if log_gate_BLH is not None:
            cum_log_gate_BLH = with_logical_constraint(cumsum(log_gate_BLH), BATCH, LENGTH, HEADS)
        attended = attend(
            *self._query_key_value(x_BLD),
            self._with_parabolas(x_BLD, signal),
            cum_log_gate_BLH,
            causal=self.config.causal,
            **self._backend,
            dropout_rate=rate,
            dropout_key=self.make_rng("dropout") if rate > 0 and not deterministic else None,
        )
        return self._residual_and_mlp(
            x_BLD, attended, deterministic, self.drop_path if drop_path is None else drop_path
        )

    def forward_cached(
        self,
        x_BLD: jax.Array,
        signal: PositionSignal,
        cache: KVCache,
        token_index_PL: jax.Array,
        position_logits_PHLS: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Returns the next states of new tokens of a window, and the cache with them written.

        Args:
          x_BLD: states of the new tokens.
          signal: PositionSignal of this layer and the whole window.
          cache, token_index_PL, position_logits_PHLS: see `attention.attend_cached`.
        """
        inputs = (signal, cache, token_index_PL, position_logits_PHLS, self._log_forget_gate(x_BLD))
        attended, cache = attend_cached(*self._query_key_value(x_BLD), *inputs, **self._backend)
        return self._residual_and_mlp(x_BLD, attended), cache

    def attention_weights(self, x_BLD: jax.Array, signal: PositionSignal) -> jax.Array:
        """Returns the attention weights, float32[B, H, L, L]; signal: of this layer."""
        query, key, _ = self._query_key_value(x_BLD)
        return attention_weights(query, key, self._with_parabolas(x_BLD, signal), causal=self.config.causal)

    @property
    def _backend(self) -> dict[str, Any]:
        """Backend of attention and its settings; at initialisation the reference, which compiles fastest."""
        config = self.config
        if self.is_initializing():
            return {"kind": "reference", "context": "gather"}
        return {
            "kind": config.attention_kind,
            "block": config.attention_block,
            "kernel_blocks": config.kernel_blocks,
            "context": config.context_attention,
        }

    def _log_forget_gate(self, x_BLD: jax.Array) -> jax.Array | None:
        """Log forget gate of each token and head, float32[B, L, H], at most 0; None without gates."""
        if not self.config.gate:
            return None
        return GATES[self.config.gate](self.forget_gate(_gathered(self.norm_1(x_BLD))).astype(jnp.float32))

    def _with_parabolas(self, x_BLD: jax.Array, signal: PositionSignal) -> PositionSignal:
        """The signal of this layer with its `parabola`, if it has one, as position queries and keys of each sample."""
        if signal.parabola is None:
            return signal
        shape_BLSHM = self.parabola_shape(_gathered(self.norm_1(x_BLD))).astype(jnp.float32)
        pair = parabola_query_key(shape_BLSHM, *signal.parabola, self.config.head_width)
        query_key = tuple(with_logical_constraint(part, BATCH, LENGTH, HEADS, None) for part in pair)
        return signal.replace(position_query_key=query_key, parabola=None)

    def _query_key_value(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each [B, L, H, K]."""
        qkv = self.qkv(_gathered(self.norm_1(_residual(x_BLD))))
        query, key, value = (with_logical_constraint(qkv[:, :, part], BATCH, LENGTH, HEADS, None) for part in range(3))
        return query, key, value

    def _residual_and_mlp(
        self, x_BLD: jax.Array, attended_BLHK: jax.Array, deterministic: bool = True, rate: jax.Array | float = 0.0
    ) -> jax.Array:
        """The next states, from the attention output of all heads; rate: of stochastic depth."""
        drop_path = functools.partial(self._drop_path, rate=0.0 if deterministic else rate)
        drop = functools.partial(self.drop, deterministic=deterministic)
        x_BLD = _residual(x_BLD)
        x_BLD = x_BLD + drop_path(drop(_residual(self.out(attended_BLHK))))
        hidden = with_logical_constraint(self.mlp_in(_gathered(self.norm_2(x_BLD))), BATCH, LENGTH, MLP)
        out = self.mlp_out(ACTIVATIONS[self.config.activation](hidden))
        return _residual(x_BLD + drop_path(drop(_residual(out))))

    def _drop_path(self, branch_BLD: jax.Array, rate: jax.Array | float) -> jax.Array:
        """A branch, set to 0 for each sample with probability `rate`."""
        if isinstance(rate, float) and not rate:
            return branch_BLD
        keep_B11 = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (branch_BLD.shape[0], 1, 1))
        return jnp.where(keep_B11, branch_BLD / (1 - rate), 0).astype(branch_BLD.dtype)


def _residual(x_BLD: jax.Array) -> jax.Array:
    """States of the residual stream, split along the sequence where the devices divide it."""
    divides = shards(RESIDUAL_LENGTH) == 1 or x_BLD.shape[1] % shards(RESIDUAL_LENGTH) == 0
    return with_logical_constraint(x_BLD, BATCH, RESIDUAL_LENGTH if divides else LENGTH, None)


def _gathered(x_BLD: jax.Array) -> jax.Array:
    """States of which each device along `tensor` has all tokens, for its heads or hidden units."""
    return with_logical_constraint(x_BLD, BATCH, LENGTH, None)


class ScannedBlocks(nn.Module):
    """Blocks whose weights are stacked [layers, ...] in one parameter `layers`: compiled once, looped over.

    Not `nn.scan`: that would draw other initial weights and dropout masks from the same seed, trace a block for each
    initialisation, and cannot run a single block, as decoding does.

    Attributes:
      config: hyperparameters of the model.
      drop_path: probability for each layer.
    """

    config: TransformerConfig
    drop_path: tuple[float, ...]

    @nn.compact
    def __call__(self, x_BLD: jax.Array, signal: PositionSignal, deterministic: bool) -> jax.Array:
        """Returns the states after all blocks."""
        block, layers, remat = self._block(), self.config.layers, self.config.remat

        def init(key: jax.Array) -> dict:
            first = signal.at_layer(0)
            return jax.vmap(lambda key: block.init(key, x_BLD, first)["params"])(jax.random.split(key, layers))

        params = self.param("layers", init)
        if self.is_initializing():
            return x_BLD  # later parameters depend on its shape alone
        training = self.has_rng("dropout") and not deterministic
        keys = jax.random.split(self.make_rng("dropout"), layers) if training else None
        rates = jnp.array(self.drop_path) if training and any(self.drop_path) else None
        shared, per_layer = signal.split_by_layer()

        def apply_block(x_BLD: jax.Array, layer: tuple) -> tuple[jax.Array, None]:
            params, key, rate, own = layer
            rngs = {} if key is None else {"dropout": key}
            of_layer = shared.joined(own)
            return block.apply({"params": params}, x_BLD, of_layer, deterministic, drop_path=rate, rngs=rngs), None

        if remat != "none":
            apply_block = jax.checkpoint(apply_block, policy=REMAT_POLICIES[remat], prevent_cse=False)
        return jax.lax.scan(apply_block, x_BLD, (params, keys, rates, per_layer))[0]

    def apply_one(self, layer: int, method: str, *arguments: Any) -> Any:
        """Returns the result of a method of one block, without dropout."""
        params = jax.tree.map(lambda leaf: leaf[layer], self.get_variable("params", "layers"))
        return self._block().apply({"params": params}, *arguments, method=method)

    def _block(self) -> Block:
        return Block(self.config, parent=None)


def stack_layers(params: dict, layers: int) -> dict:
    """Returns the parameters of a model with `ScannedBlocks`, from those of a model with one block per layer."""
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    blocks = [params[f"blocks_{layer}"] for layer in range(layers)]
    return rest | {"blocks": {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}}


def unstack_layers(params: dict, layers: int) -> dict:
    """Returns the parameters of a model with one block per layer: the inverse of `stack_layers`."""
    rest, stacked = {name: value for name, value in params.items() if name != "blocks"}, params["blocks"]["layers"]
    return rest | {f"blocks_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(layers)}


def make_blocks(config: TransformerConfig) -> list[Block] | ScannedBlocks:
    """Returns the blocks of a model; to be called in its `setup`."""
    rates = tuple(config.drop_path * layer / max(config.layers - 1, 1) for layer in range(config.layers))
    if config.scan:
        return ScannedBlocks(config, rates)
    block = Block
    if config.remat != "none":
        block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], static_argnums=3)
    return [block(config, rate) for rate in rates]


def run_blocks(
    blocks: list[Block] | ScannedBlocks, x_BLD: jax.Array, signal: PositionSignal, deterministic: bool
) -> jax.Array:
    """Returns the states after all blocks; signal: of all layers."""
    signal = signal.copied_per_shard(x_BLD.shape[0])
    if isinstance(blocks, ScannedBlocks):
        return blocks(x_BLD, signal, deterministic)
    for layer, block in enumerate(blocks):
        x_BLD = block(x_BLD, signal.at_layer(layer), deterministic)
    return x_BLD


def run_block(blocks: list[Block] | ScannedBlocks, layer: int, method: str, *arguments: Any) -> Any:
    """Returns the result of a method of one block, without dropout."""
    if isinstance(blocks, ScannedBlocks):
        return blocks.apply_one(layer, method, *arguments)
    return getattr(blocks[layer], method)(*arguments)
