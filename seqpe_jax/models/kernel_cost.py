"""What a call of the TPU's attention kernels costs, told to the compiler, which cannot see into them."""

import math
from typing import Any

from jax.experimental import pallas as pl

# Kernel -> products over the width of queries and keys, of values, and of features, of each query with each key.
PRODUCTS = {"_forward_kernel": (1, 1, 1), "_query_kernel": (2, 1, 2), "_key_kernel": (2, 2, 2)}


def estimate(kernel: str, arrays: Any, plan: Any, moved: list[Any]) -> pl.CostEstimate:
    """Returns the cost of a call on one device.

    Blocks of queries and keys that causality hides are left out, as they are by the kernels, where the last query meets the
    last key: on the device that holds the last part of the queries, for which the others wait.

    Args:
      kernel: its name; arrays, plan: of `models.tpu`; moved: arrays, or their shapes, that are read and written, once each.
    """
    *samples, heads, length, width = arrays.query.shape
    keys, logit_query_key = arrays.key.shape[3], 0 if arrays.f_q is None else arrays.f_q.shape[-1]
    offset, seen = max(0, plan.keys - length), 0
    for row in range(0, length, plan.block_q):
        blocks = keys // plan.block_k
        if plan.causal:
            blocks = min(blocks, (offset + row + plan.block_q - 1) // plan.block_k + 1)
        seen += plan.block_q * plan.block_k * blocks
    in_width, in_values, in_features = PRODUCTS[kernel]
    calls = math.prod(samples) * heads
    each = in_width * width + in_values * arrays.value.shape[-1]
    flops = 2 * seen * calls * each + 2 * seen * calls // plan.together * in_features * logit_query_key
    return pl.CostEstimate(
        flops=flops,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
        transcendentals=seen * calls,
    )
