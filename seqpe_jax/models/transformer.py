"""Transformer blocks with the parts that a config chooses, one after another or stacked and scanned over."""

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
from seqpe_jax.encodings.position_signal import Pair, PositionSignal, broadcast_to_batch, clip_straight_through
from seqpe_jax.matmul import matmul
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
      heads: H, number of attention heads.
      mlp_width: hidden size of the MLP; 0 = 4 D.
      dropout: rate after attention and after the MLP.
      attention_dropout: rate on attention weights.
      embedding_dropout: rate on the embedded tokens or patches.
      drop_path: stochastic depth (Huang et al. 2016), probability that a sample skips a branch of the last block; it grows
        linearly from 0 at the first block.
      activation: activation of the MLP, one of `ACTIVATIONS`.
      layer_norm_epsilon: added to the variance, or to the mean square.
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
      gate_start_at_zero: log gates are multiplied by factors that start at 0.
      parabolas: M of a signal's `parabola`; 0 = it has none.
      layer_scale: initial value of the factors of each branch's features (Touvron et al. 2021); 0 = there are none.
      norm, norm_placement, mlp, bias, qk_norm, residual, attention_cap, logit_cap, embedding_multiplier,
        residual_multiplier, logit_multiplier, window, window_layers: see `config.decoder_presets.Parts`.
      kv_heads: G, heads of keys and values; divides H; 0 = H.
      head_width: K, size of a head; 0 = D / H.
      attention_scale: factor of q . k; None = 1 / sqrt(K).
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
    gate_start_at_zero: bool = False
    parabolas: int = 0
    norm: str = "layer_norm"
    norm_placement: str = "pre"
    mlp: str = "plain"
    kv_heads: int = 0
    head_width: int = 0
    bias: str = "all"
    qk_norm: str = "none"
    residual: str = "sequential"
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    attention_scale: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    window: int = 0
    window_layers: tuple[bool, ...] = ()
    layer_scale: float = 0.0

    def __post_init__(self) -> None:
        """Fills in the sizes that follow from others."""
        object.__setattr__(self, "mlp_width", self.mlp_width or 4 * self.width)
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_width", self.head_width or self.width // self.heads)

    def window_of(self, layer: int) -> int:
        """Returns the keys that a query of a layer sees; 0 = all."""
        return self.window if self.window and self.window_layers[layer] else 0


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
        product = matmul(x.astype(self.dtype), kernel, self.contract_dims)
        return product if bias is None else product + bias.astype(self.dtype)


class RMSNorm(nn.Module):
    """Division by the root of the mean square (Zhang and Sennrich 2019), computed in float32.

    Attributes:
      epsilon: added to the mean square.
      dtype: dtype of the result.
      plus_one: the weight is 1 + the parameter, which begins at 0 (Gemma).
      dims: number of last dimensions that are normalized together; the parameter has their shape.
    """

    epsilon: float
    dtype: Any
    plus_one: bool = False
    dims: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the normalized array."""
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", init, x.shape[-self.dims :], jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=range(-self.dims, 0), keepdims=True)
        normalized = x * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normalized * (1.0 + scale if self.plus_one else scale)).astype(self.dtype)


def make_norm(config: TransformerConfig, dims: int = 1) -> nn.Module:
    """Returns a norm of a model.

    Args:
      config: hyperparameters of the model.
      dims: number of last dimensions that are normalized together.
    """
    if config.norm == "layer_norm":
        axes = tuple(range(-dims, 0))
        return nn.LayerNorm(config.layer_norm_epsilon, config.dtype, reduction_axes=axes, feature_axes=axes)
    return RMSNorm(config.layer_norm_epsilon, config.dtype, config.norm == "rms_norm_plus_one", dims)


class ForgetGate(Linear):
    """The log gate of each token and head, at most 0, from the token.

    Attributes:
      gate: one of `GATES`.
      start_at_zero: it is multiplied by a learned factor of each head, at least 0, which starts at 0: it lets all through.
    """

    gate: str = "forget"
    start_at_zero: bool = False

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Returns float32[B, L, H]."""
        log_gate_BLH = GATES[self.gate](super().__call__(x_BLD).astype(jnp.float32))
        if not self.start_at_zero:
            return log_gate_BLH
        scale_H = self.param("scale", nn.initializers.zeros, self.shape[1:], jnp.float32)
        return clip_straight_through(scale_H, (0.0, math.inf)) * log_gate_BLH


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
    """Attention and MLP, each added to the residual stream, with norms before, after or on both sides.

    Under the mesh axis `tensor`, which splits heads and hidden units, the residual stream is split along the sequence: each
    map into heads or hidden units gathers it, each map out of them ends with a reduce-scatter.

    Attributes:
      config: hyperparameters of the model.
      drop_path: probability that a sample skips a branch of this block while training; the others' branches are scaled up
        by 1 / (1 - drop_path).
      window: keys that a query sees; 0 = all.
    """

    config: TransformerConfig
    drop_path: float = 0.0
    window: int = 0

    def setup(self) -> None:
        """Creates the norms and the linear maps."""
        config, normal, head_width = self.config, nn.initializers.normal, self.config.head_width
        heads, kv_heads, width, mlp_width = config.heads, config.kv_heads, config.width, config.mlp_width
        residual_std = config.init_std / (math.sqrt(2 * config.layers) if config.scale_residual else 1.0)
        linear = functools.partial(Linear, dtype=config.dtype, kernel_init=normal(config.init_std))
        biased = {"bias_init": None if config.bias == "none" else 0.0}  # maps of queries, keys and values
        plain = {"bias_init": 0.0 if config.bias == "all" else None}
        residual = functools.partial(Linear, dtype=config.dtype, kernel_init=normal(residual_std), **plain)
        if config.norm_placement != "post":
            self.norm_1, self.norm_2 = make_norm(config), make_norm(config)
        if config.norm_placement != "pre":
            self.post_norm_1, self.post_norm_2 = make_norm(config), make_norm(config)
        if kv_heads == heads:
            self.qkv = linear((width, 3, heads, head_width), (WIDTH, None, HEADS, None), **biased)
        else:
            self.q = linear((width, heads, head_width), (WIDTH, HEADS, None), **biased)
            self.kv = linear((width, 2, kv_heads, head_width), (WIDTH, None, HEADS, None), **biased)
        if config.qk_norm != "none":
            dims = 1 if config.qk_norm == "head" else 2
            self.q_norm, self.k_norm = make_norm(config, dims), make_norm(config, dims)
        self.out = residual((heads, head_width, width), (HEADS, None, WIDTH), contract_dims=2)
        self.mlp_in = linear((width, mlp_width), (WIDTH, MLP), **plain)
        if config.mlp != "plain":
            self.mlp_gate = linear((width, mlp_width), (WIDTH, MLP), **plain)
        self.mlp_out = residual((mlp_width, width), (MLP, WIDTH))
        if config.layer_scale:
            init = nn.initializers.constant(config.layer_scale)
            self.layer_scale_1, self.layer_scale_2 = (
                self.param(f"layer_scale_{branch}", init, (width,), jnp.float32) for branch in (1, 2)
            )
        self.drop = nn.Dropout(config.dropout)
        if config.gate:
            bias = {"forget": config.gate_bias_init, "cable": -config.gate_bias_init}[config.gate]
            # The name is that of its parameters in checkpoints.
            self.forget_gate = ForgetGate(
                (width, heads),
                (WIDTH, HEADS),
                config.dtype,
                normal(config.init_std),
                bias_init=bias,
                gate=config.gate,
                start_at_zero=config.gate_start_at_zero,
                name="fading",
            )
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
            **self._logit_options,
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
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Returns the next states of new tokens of a window, and the cache with them written.

        Args:
          x_BLD: states of the new tokens.
          signal: PositionSignal of this layer and the whole window.
          cache, token_index_PL, position_logits_PHLS, lengths_B: see `attention.attend_cached`.
        """
        inputs = (signal, cache, token_index_PL, position_logits_PHLS, self._log_forget_gate(x_BLD), lengths_B)
        options = self._logit_options | self._backend
        attended, cache = attend_cached(*self._query_key_value(x_BLD), *inputs, **options)
        return self._residual_and_mlp(x_BLD, attended), cache

    def attention_weights(self, x_BLD: jax.Array, signal: PositionSignal) -> jax.Array:
        """Returns the attention weights, float32[B, H, L, L]; signal: of this layer."""
        query, key, _ = self._query_key_value(x_BLD)
        signal = self._with_parabolas(x_BLD, signal)
        return attention_weights(query, key, signal, causal=self.config.causal, **self._logit_options)

    @property
    def _logit_options(self) -> dict[str, Any]:
        """Arguments of attention that change its logits."""
        return {"window": self.window, "cap": self.config.attention_cap, "scale": self.config.attention_scale}

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
        return self.forget_gate(self._normed(x_BLD, 1))

    def _with_parabolas(self, x_BLD: jax.Array, signal: PositionSignal) -> PositionSignal:
        """The signal of this layer with its `parabola`, if it has one, as position queries and keys of each sample."""
        if signal.parabola is None:
            if self.config.parabolas and self.is_initializing():
                self.parabola_shape(
                    self._normed(x_BLD, 1)
                )  # all layers have the parameters, so that they can be stacked
            return signal
        shape_BLSHM = self.parabola_shape(self._normed(x_BLD, 1)).astype(jnp.float32)
        pair = parabola_query_key(shape_BLSHM, *signal.parabola, self.config.head_width)
        query_key = tuple(with_logical_constraint(part, BATCH, LENGTH, HEADS, None) for part in pair)
        return signal.replace(position_query_key=query_key, parabola=None)

    def _normed(self, x_BLD: jax.Array, branch: int) -> jax.Array:
        """Input of attention (branch 1) or the MLP (branch 2), with all tokens on each device along `tensor`."""
        if self.config.norm_placement != "post":
            x_BLD = (self.norm_1 if branch == 1 else self.norm_2)(x_BLD)
        return _gathered(x_BLD)

    def _query_key_value(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, H, K], keys and values [B, L, G, K]."""
        x_BLD = self._normed(_residual(x_BLD), 1)
        if self.config.kv_heads == self.config.heads:
            qkv = self.qkv(x_BLD)
            parts = [qkv[:, :, part] for part in range(3)]
        else:
            kv = self.kv(x_BLD)
            parts = [self.q(x_BLD), kv[:, :, 0], kv[:, :, 1]]
        query, key, value = (with_logical_constraint(part, BATCH, LENGTH, HEADS, None) for part in parts)
        if self.config.qk_norm != "none":
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def _residual_and_mlp(
        self, x_BLD: jax.Array, attended_BLHK: jax.Array, deterministic: bool = True, rate: jax.Array | float = 0.0
    ) -> jax.Array:
        """The next states, from the attention output of all heads; rate: of stochastic depth."""
        dropped = functools.partial(self._dropped, deterministic=deterministic, rate=rate)
        x_BLD = _residual(x_BLD)
        before_BLD = x_BLD
        x_BLD = x_BLD + dropped(self.out(attended_BLHK), 1)
        mlp_BLD = self._mlp(before_BLD if self.config.residual == "parallel" else x_BLD)
        return _residual(x_BLD + dropped(mlp_BLD, 2))

    def _mlp(self, x_BLD: jax.Array) -> jax.Array:
        """The MLP of the states."""
        x_BLD, activation = self._normed(x_BLD, 2), ACTIVATIONS[self.config.activation]
        hidden_BLF = with_logical_constraint(self.mlp_in(x_BLD), BATCH, LENGTH, MLP)
        if self.config.mlp == "plain":
            return self.mlp_out(activation(hidden_BLF))
        gate_BLF = with_logical_constraint(self.mlp_gate(x_BLD), BATCH, LENGTH, MLP)
        return self.mlp_out(activation(gate_BLF) * hidden_BLF)

    def _dropped(self, out_BLD: jax.Array, branch: int, *, deterministic: bool, rate: jax.Array | float) -> jax.Array:
        """Term that a branch adds to the states, from the output of its last map; rate: of stochastic depth."""
        out_BLD = _residual(out_BLD)
        if self.config.norm_placement != "pre":
            out_BLD = (self.post_norm_1 if branch == 1 else self.post_norm_2)(out_BLD)
        if self.config.layer_scale:
            scale_D = self.layer_scale_1 if branch == 1 else self.layer_scale_2
            out_BLD = out_BLD * scale_D.astype(out_BLD.dtype)
        if self.config.residual_multiplier != 1.0:
            out_BLD = out_BLD * self.config.residual_multiplier
        out_BLD = self.drop(out_BLD, deterministic=deterministic)
        return self._drop_path(out_BLD, 0.0 if deterministic else rate)

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

    Where layers differ (windows, layers without positions), the layers of one period are compiled and run in each turn.

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
        layers, remat = self.config.layers, self.config.remat

        def init(key: jax.Array) -> dict:
            block, first = self._block(0), signal.at_layer(0)
            return jax.vmap(lambda key: block.init(key, x_BLD, first)["params"])(jax.random.split(key, layers))

        params = self.param("layers", init)
        if self.is_initializing():
            return x_BLD  # later parameters depend on its shape alone
        training = self.has_rng("dropout") and not deterministic
        keys = jax.random.split(self.make_rng("dropout"), layers) if training else None
        rates = jnp.array(self.drop_path) if training and any(self.drop_path) else None
        period = layer_period(self.config, signal)
        signals = [signal.at_layers(number, period).split_by_layer() for number in range(period)]

        def apply_block(number: int, x_BLD: jax.Array, layer: tuple) -> jax.Array:
            (params, key, rate), own = layer
            rngs = {} if key is None else {"dropout": key}
            of_layer, block = signals[number][0].joined(own), self._block(number)
            return block.apply({"params": params}, x_BLD, of_layer, deterministic, drop_path=rate, rngs=rngs)

        blocks = [functools.partial(apply_block, number) for number in range(period)]
        if remat != "none":
            blocks = [jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=False) for block in blocks]

        layers_of, signals_of = (params, keys, rates), [own for _, own in signals]
        if period == 1:
            layers_of = layers_of, signals_of[0]
            return jax.lax.scan(lambda x_BLD, layer: (blocks[0](x_BLD, layer), None), x_BLD, layers_of)[0]

        def apply_period(x_BLD: jax.Array, period_layers: tuple) -> tuple[jax.Array, None]:
            stacked, owns = period_layers
            for number, block in enumerate(blocks):
                layer = jax.tree.map(lambda leaf, number=number: leaf[number], stacked)
                x_BLD = block(x_BLD, (layer, owns[number]))
            return x_BLD, None

        by_period = jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), layers_of)
        return jax.lax.scan(apply_period, x_BLD, (by_period, signals_of))[0]

    def apply_one(self, layer: int, method: str, *arguments: Any) -> Any:
        """Returns the result of a method of one block, without dropout."""
        params = jax.tree.map(lambda leaf: leaf[layer], self.get_variable("params", "layers"))
        return self._block(layer).apply({"params": params}, *arguments, method=method)

    def _block(self, layer: int) -> Block:
        return Block(self.config, window=self.config.window_of(layer), parent=None)


def layer_period(config: TransformerConfig, signal: PositionSignal) -> int:
    """Returns the least number of layers after which their windows and the fields of their signal repeat; divides `layers`."""
    kinds = [(config.window_of(layer), signal.absent(layer)) for layer in range(config.layers)]
    periods = (number for number in range(1, config.layers + 1) if config.layers % number == 0)
    return next(number for number in periods if kinds == kinds[:number] * (config.layers // number))


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
    return [block(config, rate, config.window_of(layer)) for layer, rate in enumerate(rates)]


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


def measure_attention(
    blocks: list[Block] | ScannedBlocks,
    layers: int,
    x_BLD: jax.Array,
    signal: PositionSignal,
    measure: Callable[[jax.Array], Any],
) -> list[Any]:
    """Returns the results of a function of the attention weights of each layer, which are held one layer at a time.

    Args:
      blocks: blocks of the model.
      layers: number of blocks.
      x_BLD: tokens that enter the first block.
      signal: of all layers.
      measure: function of float32[B, H, L, L].
    """
    found = []
    for layer in range(layers):
        own = signal.at_layer(layer)
        found.append(measure(run_block(blocks, layer, "attention_weights", x_BLD, own)))
        x_BLD = run_block(blocks, layer, "__call__", x_BLD, own)
    return found
