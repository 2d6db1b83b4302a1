"""Choice of the attention backend: by device, lengths, and which terms the logits have."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax.errors import InputError
from seqpe_jax.models import attention_cudnn, attention_tpu
from seqpe_jax.models.attention_blockwise import blockwise_attention, blockwise_forward, blockwise_resume
from seqpe_jax.models.attention_inputs import AttentionInputs, reference_attention
from seqpe_jax.models.attention_tpu import AUTO_BLOCKS, KernelBlocks

BACKENDS = ("reference", "blockwise", "flash")
MAX_REFERENCE_LEN_CPU = 128  # queries or keys up to which one array of all logits is made; measured
MAX_REFERENCE_LEN = 256  # the same on GPU and TPU
DEFAULT_BLOCK = 512  # queries and keys per block on GPU and TPU
LONG_KEYS = 4096  # number of keys from which on a CPU uses DEFAULT_BLOCK too


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation of attention, for the inputs of one device.

    Attributes:
      name: "reference", "blockwise", "tpu" or "cudnn".
      attend: inputs -> output [B, L, H, V], with gradients.
      forward: (inputs, dtype of the output) -> (output [B, L, H, V], log-sum-exp of the logits float32[B, H, L]), without
        gradients, from which the outputs over parts of the keys can be merged; None = it has no such form.
      resume: (inputs of a part of the keys, merged output, merged log-sum-exp) -> the merged output, with the gradients that
        this part has.
      block: queries and keys per tile of "blockwise"; else 0.
    """

    name: str
    attend: Callable[[AttentionInputs], jax.Array]
    forward: Callable[[AttentionInputs, Any], tuple[jax.Array, jax.Array]] | None = None
    resume: Callable[[AttentionInputs, jax.Array, jax.Array], jax.Array] | None = None
    block: int = 0


REFERENCE = Backend("reference", reference_attention)


def dispatch(
    kind: str,
    block: int,
    inputs: AttentionInputs,
    *,
    device: Any = None,
    split: bool = False,
    in_parts: bool = False,
    kernel_blocks: KernelBlocks = AUTO_BLOCKS,
) -> Backend:
    """Returns the backend that serves inputs.

    "auto" takes the reference up to `MAX_REFERENCE_LEN` queries and keys, beyond that the platform's flash kernel (Pallas
    on TPU, cuDNN on NVIDIA GPUs) where it can serve, else blockwise attention. A single query always takes the reference.
    Symbolic sizes (jax.export) take blockwise attention in place of the kernels, since an export serves several platforms.

    Args:
      kind: "auto", or one of `BACKENDS` to have that one.
      block: queries and keys per block; 0 = automatic. If given, "auto" takes blockwise attention for longer inputs.
      inputs: inputs of all devices, or their shapes.
      device: device that the program is compiled for; None = JAX's default.
      split: queries are split over devices.
      in_parts: outputs over parts of the keys are merged, for which a backend needs `Backend.forward`.
      kernel_blocks: sizes of the tiles of the TPU kernels.

    Raises:
      InputError: the backend asked for cannot serve.
    """
    device = device or jax.devices()[0]
    batch, length, _, _ = inputs.query.shape
    keys = inputs.key.shape[1]
    if in_parts and kind == "reference":
        raise InputError(
            "model.attention_kind='reference' computes all logits at once and cannot serve "
            "mesh.context_attention='ring': choose 'auto' or 'blockwise'"
        )
    if kind == "reference" or (isinstance(length, int) and length == 1):
        return REFERENCE
    symbolic = not all(isinstance(size, int) for size in (batch, length, keys))
    if symbolic or (block and kind == "auto"):
        size = block or DEFAULT_BLOCK
        fits_one_block = _at_most(length, size) and _at_most(keys, size)
        return REFERENCE if fits_one_block and kind != "blockwise" and not in_parts else blockwise(size)
    if kind == "auto" and max(length, keys) <= max_reference_len(device) and not in_parts:
        return REFERENCE
    if kind != "blockwise":
        reason = unsupported_reason(inputs, device, split, in_parts)
        if not reason:
            return flash_kernel(device, kernel_blocks)
        if kind == "flash":
            raise InputError(f"model.attention_kind='flash' cannot serve: {reason}. Choose 'auto' or 'blockwise'")
    concat = device.platform == "cpu" and should_concat_position(inputs)
    return blockwise(block or default_block_size(inputs, device), concat)


def blockwise(block: int, concat_position: bool = False) -> Backend:
    """Returns blockwise attention; see `blockwise_attention` for the arguments."""
    functions = (
        functools.partial(function, block=block, concat_position=concat_position)
        for function in (blockwise_attention, blockwise_forward, blockwise_resume)
    )
    return Backend("blockwise", *functions, block=block)


def flash_kernel(device: Any, blocks: KernelBlocks, interpret: bool = False) -> Backend:
    """Returns the flash kernel of a device.

    Args:
      device: a TPU or an NVIDIA GPU.
      blocks: sizes of the tiles of the TPU kernels.
      interpret: run the TPU kernels as plain JAX, on any platform.
    """
    if device.platform != "tpu" and not interpret:
        return Backend("cudnn", attention_cudnn.flash)
    functions = (
        functools.partial(function, blocks=blocks, interpret=interpret)
        for function in (attention_tpu.flash, attention_tpu.flash_forward, attention_tpu.flash_resume)
    )
    return Backend("tpu", *functions)


def max_reference_len(device: Any) -> int:
    """Returns the number of queries or keys up to which one array of all logits is made."""
    return MAX_REFERENCE_LEN_CPU if device.platform == "cpu" else MAX_REFERENCE_LEN


def unsupported_reason(inputs: AttentionInputs, device: Any, split: bool = False, in_parts: bool = False) -> str:
    """Returns why no flash kernel serves inputs on a device, or "".

    Args:
      inputs: inputs of all devices, or their shapes.
      device: device that the program is compiled for.
      split: queries are split over devices.
      in_parts: see `dispatch`.
    """
    if inputs.bias is not None:
        return "the kernels read no bias"
    if inputs.relative_bias is not None:
        return "the kernels read no pairwise function of positions (encodings whose logits have one)"
    if device.platform == "tpu":
        return ""
    if device.platform == "gpu" and device.device_kind.startswith("NVIDIA"):
        if in_parts:
            return "cuDNN's attention gives no log-sum-exp, with which mesh.context_attention='ring' merges its parts"
        return attention_cudnn.unsupported_reason(inputs, float(device.compute_capability), split)
    return f"there is no kernel for {device.platform} ({device.device_kind})"


def default_block_size(inputs: AttentionInputs, device: Any) -> int:
    """Returns the queries and keys per block; on a CPU few, so that the blocks of all samples fit into its cache.

    Wide position queries and keys have products and gradients of their own, which leaves less memory.
    """
    if device.platform != "cpu":
        return DEFAULT_BLOCK
    batch, _, heads, _ = inputs.query.shape
    if min(inputs.key.shape[1], inputs.window or inputs.key.shape[1]) >= LONG_KEYS:
        return DEFAULT_BLOCK
    separate = inputs.position_query_key is not None and not should_concat_position(inputs)
    return 64 if separate and batch * heads >= 32 else 128


def should_concat_position(inputs: AttentionInputs) -> bool:
    """Returns True where one product of [q, position_query] and [k, position_key] is faster than two narrow products.

    Queries must be float32, as position queries are. Not possible with a relative bias, which applies to q . k alone, nor
    where position keys differ by query heads that share a key head.
    """
    if inputs.position_query_key is None or inputs.relative_bias is not None or inputs.query.dtype != jnp.float32:
        return False
    if inputs.position_query_key[1].shape[2] not in (1, inputs.key.shape[2]):
        return False
    return 4 * inputs.position_query_key[0].shape[-1] <= inputs.query.shape[-1]


def _at_most(size: Any, limit: int) -> bool:
    """Returns True if a size, which may be symbolic, never exceeds a limit."""
    return jax.core.max_dim(size, limit) == limit
