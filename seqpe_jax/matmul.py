"""Products with kernels, as products of matrices on a single device.

The gradient of a kernel sums over all rows of the input. Where these are two dimensions, a batch and a length, XLA on CPUs
first copies the gradient of the product into another layout: a third of the time of a gated MLP. Over several devices the
dimensions stay as they are, since each is split by itself, but heads and their width are one: a TPU's compiler makes no
reduce-scatter of a gradient whose last dimension is a head's width that is no multiple of its lanes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from seqpe_jax.axes import is_sharded


def matmul(x: jax.Array, kernel: jax.Array, contract_dims: int = 1, dtype: Any = None) -> jax.Array:
    """Returns the sum of x * kernel over the last dimensions of x, which are the first of the kernel.

    Args:
      x: [..., inputs], any number of dimensions before those that are summed over.
      kernel: [inputs, outputs].
      contract_dims: number of dimensions that are summed over.
      dtype: of the result; None = as NumPy promotes.
    """
    rows, outputs = x.shape[: x.ndim - contract_dims], kernel.shape[contract_dims:]
    if is_sharded():
        x, kernel, contract_dims = _merge_heads(x, kernel, contract_dims)
        return jnp.tensordot(x, kernel, contract_dims, preferred_element_type=dtype).reshape(*rows, *outputs)
    width = math.prod(kernel.shape[:contract_dims])
    product = jnp.matmul(x.reshape(-1, width), kernel.reshape(width, -1), preferred_element_type=dtype)
    return product.reshape(*rows, *outputs)


def _merge_heads(x: jax.Array, kernel: jax.Array, contract_dims: int) -> tuple[jax.Array, jax.Array, int]:
    """Returns x, the kernel and the number of dimensions, with heads and their width as one dimension."""
    if contract_dims == 2:
        x = x.reshape(*x.shape[:-2], -1)
        return x, kernel.reshape(-1, *kernel.shape[2:]), 1
    if kernel.ndim - contract_dims > 1:
        kernel = kernel.reshape(*kernel.shape[:-2], -1)
    return x, kernel, contract_dims


def dense_dot_general(x: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """Returns what `jax.lax.dot_general` returns to `flax.linen.Dense`, whose kernel is a matrix."""
    dot = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), precision=precision)
    return dot.reshape(*x.shape[:-1], kernel.shape[-1])
