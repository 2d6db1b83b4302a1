"""Which implementation of attention serves: by device, lengths, and what is mixed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax.errors import InputError
from seqpe_jax.models import attention_cudnn, attention_tpu
from seqpe_jax.models.attention_blockwise import blockwise_attention
from seqpe_jax.models.attention_inputs import AttentionInputs, reference_attention

KINDS = ("reference", "blockwise", "flash")
MAX_REFERENCE_LEN = {"cpu": 128}  # queries or keys, beyond which no array of all logits is made; measured on CPU
MAX_REFERENCE_LEN_ACCELERATOR = 256
BLOCK = 512  # queries and keys at once, except on a CPU
LONG = 4096  # keys from which on a CPU takes as many

Mix = Callable[[AttentionInputs], jax.Array]


def dispatch(kind: str, block: int, inputs: AttentionInputs, *, device: Any = None, split: bool = False) -> Mix:
    """Returns the implementation that serves operands; it takes those of one device.

    Automatic: up to `MAX_REFERENCE_LEN` queries and keys, all logits at once. For more, the platform's flash kernel (Pallas on
    TPU, cuDNN on NVIDIA) where it can serve, else blocks. One query meets its keys at once everywhere, and where a size is
    symbolic, blocks stand in for the kernels: an export is for several platforms.

    Args:
      kind: "auto", or one of `KINDS` to have that.
      block: queries and keys that blocks have at once; 0 = automatic. Given, "auto" takes blocks where there are more.
      operands: of all devices, or their shapes.
      device: that the program is compiled for; None = JAX's own. split: queries are divided over devices.

    Raises:
      InputError: the kind asked for cannot serve.
    """
    device = device or jax.devices()[0]
    batch, length, heads, _ = inputs.query.shape
    keys = inputs.key.shape[1]
    if kind == "reference" or (isinstance(length, int) and length == 1):
        return reference_attention
    symbolic = not all(isinstance(size, int) for size in (batch, length, keys))
    if symbolic or (block and kind == "auto"):
        size = block or BLOCK
        small = _at_most(length, size) and _at_most(keys, size)
        return (
            reference_attention if small and kind != "blockwise" else functools.partial(blockwise_attention, block=size)
        )
    if kind == "auto" and max(length, keys) <= MAX_REFERENCE_LEN.get(device.platform, MAX_REFERENCE_LEN_ACCELERATOR):
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
        join=device.platform == "cpu" and should_concatenate_features(inputs),
    )


def unsupported_reason(inputs: AttentionInputs, device: Any, split: bool = False) -> str:
    """Returns why no flash kernel serves operands on a device, or ""; arguments as of `dispatch`."""
    if inputs.bias is not None:
        return "the kernels read no bias"
    if inputs.relative_bias is not None:
        return "the kernels read no function of two places (encodings whose logits gain one)"
    if device.platform == "tpu":
        return ""
    if device.platform == "gpu" and device.device_kind.startswith("NVIDIA"):
        return attention_cudnn.unsupported_reason(inputs, float(device.compute_capability), split)
    return f"there is no kernel for {device.platform} ({device.device_kind})"


def default_block_size(inputs: AttentionInputs, device: Any) -> int:
    """Returns the queries and keys that blocks have at once: on a CPU few, so that all samples' stay in its cache.

    What each holds of wide features, in products of their own and in their gradients, makes less fit.
    """
    if device.platform != "cpu":
        return BLOCK
    batch, _, heads, _ = inputs.query.shape
    if inputs.key.shape[1] >= LONG:
        return BLOCK
    apart = inputs.logit_query_key is not None and not should_concatenate_features(inputs)
    return 64 if apart and batch * heads >= 32 else 128


def should_concatenate_features(inputs: AttentionInputs) -> bool:
    """Whether features add so little to the width of float32 queries that one product of both is faster than two.

    A relation stands between the two: it is applied to the product of queries and keys alone.
    """
    if inputs.logit_query_key is None or inputs.relative_bias is not None or inputs.query.dtype != jnp.float32:
        return False
    return 4 * inputs.logit_query_key[0].shape[-1] <= inputs.query.shape[-1]


def _at_most(size: Any, limit: int) -> bool:
    """Whether a size is at most a limit; a symbolic one, whatever it will be."""
    return jax.core.max_dim(size, limit) == limit
