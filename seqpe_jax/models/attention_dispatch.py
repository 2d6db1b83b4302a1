"""Choice of the attention backend: by device, lengths, and which terms the logits have."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax.errors import InputError
from seqpe_jax.models import attention_cudnn, attention_tpu
from seqpe_jax.models.attention_blockwise import blockwise_attention
from seqpe_jax.models.attention_inputs import AttentionInputs, reference_attention

BACKENDS = ("reference", "blockwise", "flash")
MAX_REFERENCE_LEN_CPU = 128  # queries or keys up to which one array of all logits is made; measured
MAX_REFERENCE_LEN = 256  # the same on GPU and TPU
DEFAULT_BLOCK = 512  # queries and keys per block on GPU and TPU
LONG_KEYS = 4096  # number of keys from which on a CPU uses DEFAULT_BLOCK too

AttentionFn = Callable[[AttentionInputs], jax.Array]


def dispatch(kind: str, block: int, inputs: AttentionInputs, *, device: Any = None, split: bool = False) -> AttentionFn:
    """Returns the backend that serves inputs; it takes those of one device.

    "auto" takes the reference up to `MAX_REFERENCE_LEN` queries and keys, beyond that the platform's flash kernel (Pallas
    on TPU, cuDNN on NVIDIA GPUs) where it can serve, else blockwise attention. A single query always takes the reference.
    Symbolic sizes (jax.export) take blockwise attention in place of the kernels, since an export serves several platforms.

    Args:
      kind: "auto", or one of `BACKENDS` to have that one.
      block: queries and keys per block; 0 = automatic. If given, "auto" takes blockwise attention for longer inputs.
      inputs: inputs of all devices, or their shapes.
      device: device that the program is compiled for; None = JAX's default.
      split: queries are split over devices.

    Raises:
      InputError: the backend asked for cannot serve.
    """
    device = device or jax.devices()[0]
    batch, length, _, _ = inputs.query.shape
    keys = inputs.key.shape[1]
    if kind == "reference" or (isinstance(length, int) and length == 1):
        return reference_attention
    symbolic = not all(isinstance(size, int) for size in (batch, length, keys))
    if symbolic or (block and kind == "auto"):
        size = block or DEFAULT_BLOCK
        fits_one_block = _at_most(length, size) and _at_most(keys, size)
        if fits_one_block and kind != "blockwise":
            return reference_attention
        return functools.partial(blockwise_attention, block=size)
    if kind == "auto" and max(length, keys) <= max_reference_len(device):
        return reference_attention
    if kind != "blockwise":
        reason = unsupported_reason(inputs, device, split)
        if not reason:
            return attention_tpu.flash if device.platform == "tpu" else attention_cudnn.flash
        if kind == "flash":
            raise InputError(f"model.attention_kind='flash' cannot serve: {reason}. Choose 'auto' or 'blockwise'")
    return functools.partial(
        blockwise_attention,
        block=block or default_block_size(inputs, device),
        concat_position=device.platform == "cpu" and should_concat_position(inputs),
    )


def max_reference_len(device: Any) -> int:
    """Returns the number of queries or keys up to which one array of all logits is made."""
    return MAX_REFERENCE_LEN_CPU if device.platform == "cpu" else MAX_REFERENCE_LEN


def unsupported_reason(inputs: AttentionInputs, device: Any, split: bool = False) -> str:
    """Returns why no flash kernel serves inputs on a device, or "".

    Args:
      inputs: inputs of all devices, or their shapes.
      device: device that the program is compiled for.
      split: queries are split over devices.
    """
    if inputs.bias is not None:
        return "the kernels read no bias"
    if inputs.relative_bias is not None:
        return "the kernels read no pairwise function of positions (encodings whose logits have one)"
    if device.platform == "tpu":
        return ""
    if device.platform == "gpu" and device.device_kind.startswith("NVIDIA"):
        return attention_cudnn.unsupported_reason(inputs, float(device.compute_capability), split)
    return f"there is no kernel for {device.platform} ({device.device_kind})"


def default_block_size(inputs: AttentionInputs, device: Any) -> int:
    """Returns the queries and keys per block; on a CPU few, so that the blocks of all samples fit into its cache.

    Wide position queries and keys have products and gradients of their own, which leaves less memory.
    """
    if device.platform != "cpu":
        return DEFAULT_BLOCK
    batch, _, heads, _ = inputs.query.shape
    if inputs.key.shape[1] >= LONG_KEYS:
        return DEFAULT_BLOCK
    separate = inputs.position_query_key is not None and not should_concat_position(inputs)
    return 64 if separate and batch * heads >= 32 else 128


def should_concat_position(inputs: AttentionInputs) -> bool:
    """Returns True where one product of [q, position_query] and [k, position_key] is faster than two narrow products.

    Queries must be float32, as position queries are. Not possible with a relative bias, which applies to q . k alone.
    """
    if inputs.position_query_key is None or inputs.relative_bias is not None or inputs.query.dtype != jnp.float32:
        return False
    return 4 * inputs.position_query_key[0].shape[-1] <= inputs.query.shape[-1]


def _at_most(size: Any, limit: int) -> bool:
    """Returns True if a size, which may be symbolic, never exceeds a limit."""
    return jax.core.max_dim(size, limit) == limit
