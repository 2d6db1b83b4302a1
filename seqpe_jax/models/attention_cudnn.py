"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

The kernel takes bfloat16 and one width for queries, keys and values; heads of keys that several query heads share, and windows. Float32
position queries and keys are appended to queries and keys as sums of bfloat16 parts whose products keep the precision of float32, and
values are padded with zeros to the same width.
"""

import jax
import jax.numpy as jnp

from seqpe_jax.models.attention_inputs import AttentionInputs

# (part of position_query, part of position_key) whose products matter at float32 precision; 0 is the most significant part.
PART_PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))


def unsupported_reason(inputs: AttentionInputs, capability: float, split: bool) -> str:
    """Returns why cuDNN cannot serve inputs, or "".

    Args:
      inputs: inputs of all devices, or their shapes.
      capability: compute capability of the GPU, such as 9.0.
      split: queries are split over devices.
    """
    query, key = inputs.query, inputs.key
    if inputs.documents is not None:
        return "cuDNN's attention is used without documents (data.packing='documents')"
    if query.dtype != jnp.bfloat16:
        return f"cuDNN's attention needs precision.compute='bfloat16', not '{query.dtype}'"
    if inputs.dropout_seed is not None:
        return "cuDNN's attention is used without dropout on attention weights (model.attention_dropout)"
    if inputs.cap:
        return "cuDNN's attention has no soft cap on logits (model.attention_cap)"
    if inputs.position_query_key is not None and inputs.position_query_key[1].shape[2] not in (1, key.shape[2]):
        return (
            "position keys that differ by query heads cannot be appended to the keys that these share (model.kv_heads)"
        )
    width = padded_width(inputs)
    limit = 256 if capability >= 9 else 128
    if width > limit:
        return f"queries with the parts of position queries are {width} wide, and cuDNN takes {limit} at most"
    if inputs.causal_offset is not None and (split or query.shape[1] != key.shape[1]):
        return "cuDNN's causal attention needs as many queries as keys on each device"
    if query.shape[1] % 2 or key.shape[1] % 2:
        return "cuDNN's attention needs even lengths"
    return ""


def flash(inputs: AttentionInputs, implementation: str = "cudnn") -> jax.Array:
    """Returns the result of `reference_attention`, [B, L, H, V].

    Args:
      inputs: inputs of one device, which `unsupported_reason` does not refuse.
      implementation: argument of `jax.nn.dot_product_attention`.
    """
    query, key, value = append_position(inputs)
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=1.0,
        is_causal=inputs.causal_offset is not None,
        local_window_size=(inputs.window - 1, 0) if inputs.window else None,
        implementation=implementation,
    )
    return out[..., : inputs.value.shape[-1]]


def padded_width(inputs: AttentionInputs) -> int:
    """Returns the common width of queries, keys and values after `append_position`, a multiple of 8."""
    features = 0 if inputs.position_query_key is None else len(PART_PAIRS) * inputs.position_query_key[0].shape[-1]
    width = max(inputs.query.shape[-1] + features, inputs.value.shape[-1])
    return -(-width // 8) * 8


def append_position(inputs: AttentionInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns bfloat16 queries, keys and values of one width; q . k includes position_query . position_key."""
    columns = [inputs.query], [inputs.key], [inputs.value]
    batch = inputs.query.shape[0]
    for side, field in enumerate(inputs.position_query_key or ()):
        heads = columns[side][0].shape[2]
        parts = [jnp.broadcast_to(part, (*part.shape[:2], heads, part.shape[3])) for part in split_float32(field)]
        parts = [jnp.tile(part, (batch // len(part), 1, 1, 1)) for part in parts]
        columns[side].extend(parts[pair[side]] for pair in PART_PAIRS)
    width = padded_width(inputs)
    joined = (jnp.concatenate([part.astype(inputs.query.dtype) for part in side], axis=-1) for side in columns)
    return tuple(jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, width - array.shape[-1]))) for array in joined)


def split_float32(field: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns three bfloat16 arrays that add up to a float32 array, the most significant first.

    Gradients flow through the first part alone, which is multiplied with all parts of the other side.
    """
    # Not by casts there and back, which a compiler may leave out.
    high = jax.lax.reduce_precision(field, exponent_bits=8, mantissa_bits=7)
    rest = field - high
    middle = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), middle.astype(jnp.bfloat16), (rest - middle).astype(jnp.bfloat16)
