"""Flash attention of cuDNN on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

It knows bfloat16 and one width for queries, keys and values. Features are appended to queries and keys in parts that keep
the precision of float32, and values are padded with zeros to that width.
"""

import jax
import jax.numpy as jnp

from seqpe_jax.models.attention_inputs import AttentionInputs

PAIRS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0))  # parts of f_q and f_k whose products count in float32


def unsupported_reason(inputs: AttentionInputs, capability: float, split: bool) -> str:
    """Returns why cuDNN cannot serve operands on a GPU of that compute capability, or ""; split: as of `choice.dispatch`."""
    query, key = inputs.query, inputs.key
    if query.dtype != jnp.bfloat16:
        return f"cuDNN's attention needs precision.compute='bfloat16', not '{query.dtype}'"
    if inputs.dropout_seed is not None:
        return "cuDNN's attention is used without dropout on attention weights (model.attention_dropout)"
    width = appended_width(inputs)
    limit = 256 if capability >= 9 else 128
    if width > limit:
        return f"queries and their features in parts are {width} wide, and cuDNN takes {limit} at most"
    if inputs.causal_offset is not None and (split or query.shape[1] != key.shape[1]):
        return "cuDNN's causal attention needs as many queries as keys on each device"
    if query.shape[1] % 2 or key.shape[1] % 2:
        return "cuDNN's attention needs even lengths"
    return ""


def flash(inputs: AttentionInputs, implementation: str = "cudnn") -> jax.Array:
    """Returns `inputs.reference_attention`; implementation: as of `jax.nn.dot_product_attention`."""
    query, key, value = appended(inputs)
    mixed = jax.nn.dot_product_attention(
        query, key, value, scale=1.0, is_causal=inputs.causal_offset is not None, implementation=implementation
    )
    return mixed[..., : inputs.value.shape[-1]]


def appended_width(inputs: AttentionInputs) -> int:
    """Returns the width of `appended` queries, keys and values: a multiple of 8."""
    extra_width = 0 if inputs.logit_query_key is None else len(PAIRS) * inputs.logit_query_key[0].shape[-1]
    width = max(inputs.query.shape[-1] + extra_width, inputs.value.shape[-1])
    return -(-width // 8) * 8


def appended(inputs: AttentionInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values of one width such that q . k are the logits."""
    sides = [inputs.query], [inputs.key], [inputs.value]
    batch, _, heads, _ = inputs.query.shape
    for side, field in enumerate(inputs.logit_query_key or ()):
        parts = [jnp.broadcast_to(part, (*part.shape[:2], heads, part.shape[3])) for part in split(field)]
        parts = [jnp.tile(part, (batch // len(part), 1, 1, 1)) for part in parts]
        sides[side].extend(parts[pair[side]] for pair in PAIRS)
    width = appended_width(inputs)
    joined = (jnp.concatenate([part.astype(inputs.query.dtype) for part in side], axis=-1) for side in sides)
    return tuple(jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, width - array.shape[-1]))) for array in joined)


def split(field: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns three bfloat16 arrays that add up to a float32 one, each the remainder of those before.

    Gradients reach the array through the first part alone, which meets all of the other side's.
    """
    # Not by casts there and back, which a compiler may leave out.
    high = jax.lax.reduce_precision(field, exponent_bits=8, mantissa_bits=7)
    rest = field - high
    middle = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), middle.astype(jnp.bfloat16), (rest - middle).astype(jnp.bfloat16)
