"""A long causal window, block by block: each block of places goes through all layers before the next one begins.

Keys and values of the places before are remembered. No array of L x L elements exists, keys past a block's group are never
read, and what positions add to the logits of a block is computed once for all layers that share it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqpe_jax.axes import LENGTH, shards
from seqpe_jax.encodings.signal import PositionSignal

SHORT = 1024  # places of a window that is read at once
GROUPS = 4  # of blocks: each group's programs read as many keys as its last block sees, and are compiled apart
LOGITS = 2**22  # elements of one layer's logits, or the smallest block's


def hidden(model: nn.Module, variables: Any, tokens_BL: jax.Array, signal: PositionSignal) -> jax.Array:
    """Returns the final states [B, L, D] of windows without dropout, read in the way that costs least.

    Args: as of `walk`.
    """

    def at_once(tokens_BL: jax.Array) -> jax.Array:
        return model.apply(variables, tokens_BL, signal, method="hidden")

    batch, length = tokens_BL.shape
    if length <= SHORT or shards(LENGTH) > 1:
        return at_once(tokens_BL)
    block = block_size(length, batch * model.heads)
    # Accelerators have attention of their own for this (`models.attention`).
    return jax.lax.platform_dependent(
        tokens_BL, cpu=lambda tokens_BL: walk(model, variables, tokens_BL, signal, block), default=at_once
    )


def block_size(places: int, rows: int) -> int:
    """Returns how many places of a window to read at once.

    Args:
      rows: samples times heads.
    """
    size = 256
    while size > 64 and size * places * rows > LOGITS:
        size //= 2
    return size


def walk(model: nn.Module, variables: Any, tokens_BL: jax.Array, signal: PositionSignal, block: int) -> jax.Array:
    """Returns the final states [B, L, D] of a window, equal to those that `model.hidden` returns.

    Args:
      model: has `extend` and `empty_cache` (`models.gpt2.GPT2`); variables: of it.
      signal: of the whole window, one position set.
    """
    batch, length = tokens_BL.shape
    count = -(-length // block)
    tokens_BL = jnp.pad(tokens_BL, ((0, 0), (0, count * block - length)))
    signal = _padded(signal, count * block - length)
    cache, first, found = model.empty_cache(batch, 0), 0, []
    for group in range(GROUPS):
        end = -(-count * (group + 1) // GROUPS)
        more = ((0, 0), (0, end * block - cache[0].key.shape[1]), (0, 0), (0, 0))
        cache = jax.tree.map(lambda field, more=more: jnp.pad(field, more), cache)

        def read(cache: Any, number: jax.Array) -> tuple[Any, jax.Array]:
            places_PL = (number * block + jnp.arange(block))[None]
            tokens = jax.lax.dynamic_slice_in_dim(tokens_BL, number * block, block, axis=1)
            hidden, cache = model.apply(variables, tokens, signal, cache, places_PL, method="extend")
            return cache, hidden

        if end > first:
            cache, hidden = jax.lax.scan(read, cache, jnp.arange(first, end))
            found.append(jnp.moveaxis(hidden, 0, 1).reshape(batch, -1, hidden.shape[-1]))
        first = end
    return jnp.concatenate(found, axis=1)[:, :length]


def _padded(signal: PositionSignal, missing: int) -> PositionSignal:
    """The signal of a window with places after its end."""
    if not missing:
        return signal

    def longer(field: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(field, [(0, missing) if at == axis else (0, 0) for at in range(field.ndim)])

    lead = int(signal.stacked)
    added, bias = signal.added, signal.bias
    signal = jax.tree.map(lambda field: longer(field, lead + 1), signal.replace(added=None, bias=None))
    return signal.replace(
        added=None if added is None else longer(added, 1),
        bias=None if bias is None else longer(longer(bias, lead + 1), lead + 2),
    )
