"""Shape letters, logical names of array dimensions, and constraints by these names; imports nothing of this package.

Array names end in shape letters where two shapes could be confused, and einsum letters match them:

    B batch           L length (query)   S length (key)     A coordinate axes   P position sets
    N digits          R encoder rows     E signal width     D model width       F feature width
    H heads           K head width       C candidates       M distillation window
    V vocabulary or classes

Models and losses name the dimensions of their arrays. `distributed.sharding.MeshSharding` maps the names to the axes of a
device mesh; it is set while a function is traced (`use_sharding`). Without one, the functions below have no effect.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

BATCH = "batch"
LENGTH = "length"
ENCODER_ROWS = "encoder_rows"  # positions that the encoder encodes, of all sets
POSITIONS = "positions"  # of a signal while it is computed
WIDTH = "width"
HEADS = "heads"
MLP = "mlp"
VOCABULARY = "vocabulary"
RESIDUAL_LENGTH = "residual_length"  # of the states between the parts of a block, where no head or hidden unit is split
OUTER_BATCH = "outer_batch"  # samples of all devices that share the stored parameters
OUTER_TOKENS = "outer_tokens"  # the same of tokens
PARAM_SHARDS = "param_shards"  # WIDTH of parameters as stored
BATCH_SHARDS = "batch_shards"  # WIDTH of states on their way from PARAM_SHARDS to BATCH
VOCABULARY_SHARDS = "vocabulary_shards"  # over as many devices as share the stored parameters

_CURRENT: contextvars.ContextVar[Any] = contextvars.ContextVar("sharding", default=None)  # a MeshSharding, or None
# Collectives of a mesh, inside `shard_map`; None outside.
_COLLECTIVES: contextvars.ContextVar[Any] = contextvars.ContextVar("collectives", default=None)


@contextlib.contextmanager
def use_sharding(sharding: Any) -> Iterator[None]:
    """Sets the sharding of what is traced in the block.

    Args:
      sharding: a `distributed.sharding.MeshSharding`; None = constraints have no effect.
    """
    token = _CURRENT.set(sharding)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def with_logical_constraint(array: Any, *names: str | None) -> Any:
    """Returns an array, sharded by the names of its dimensions; None = replicated."""
    sharding = _CURRENT.get()
    return array if sharding is None else sharding.with_logical_constraint(array, names)


def shards(name: str) -> int:
    """Returns the number of shards of a dimension of this name."""
    sharding = _CURRENT.get()
    return 1 if sharding is None else sharding.shards(name)


def is_sharded() -> bool:
    """Returns whether arrays are split over several devices here."""
    return shards(ENCODER_ROWS) > 1  # split over every axis of a mesh


def mesh_axes(name: str) -> tuple[str, ...]:
    """Returns the mesh axes over which a dimension of this name is split; () = it is not."""
    sharding = _CURRENT.get()
    return () if sharding is None else sharding.mesh_axes(name)


def all_gather_param(param: Any, *names: str | None) -> Any:
    """Returns a parameter, gathered over fsdp for use; its gradient is sharded as the parameter is stored.

    Args:
      param: a parameter, or a cast of it.
      names: logical names of its dimensions.
    """
    sharding = _CURRENT.get()
    return param if sharding is None else sharding.all_gather_param(param, names)


def all_gather_params(params: Any, root: str) -> Any:
    """Returns parameters, gathered over fsdp for use; gradients as in `all_gather_param`.

    Args:
      params: tree of arrays.
      root: first part of their names, "model" or "encoding".
    """
    sharding = _CURRENT.get()
    return params if sharding is None else sharding.all_gather_params(params, root)


def copy_per_shard(field: Any, over: str = BATCH, *names: str | None) -> Any:
    """Returns a copy of an array [1, L, ...] for each shard of a logical name, [shards, L, ...], each on its own devices.

    A loop over layers that read the copies adds up a gradient on each device by itself; it is summed over devices once.

    Args:
      field: the array.
      over: logical name of the shards.
      names: logical names of the other dimensions of a copy; () = a device has all of it.
    """
    sharding = _CURRENT.get()
    return field if sharding is None else sharding.copy_per_shard(field, over, names)


def gather_sets(rows_RE: Any, num_sets: int, length: int, batch: int) -> Any:
    """Returns the sets of positions that each device reads, where a batch is split over devices.

    Args:
      rows_RE: the rows [P, L, E] of all sets, and padding, split over ENCODER_ROWS.
      num_sets: P, a multiple of the samples of a shard of the batch.
      length: L.
      batch: B.

    Returns:
      (set i mod P of each sample i, [B, L, E], split as the batch is; the first set, a copy for each device, [devices, L, E]).
    """
    return _CURRENT.get().gather_sets(rows_RE, num_sets, length, batch)


def device() -> Any:
    """Returns one of the devices that are compiled for; None = the default ones."""
    sharding = _CURRENT.get()
    return None if sharding is None else sharding.device


def shard_map(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    names: Sequence[tuple[str | None, ...]],
    multiple: int = 1,
    results: Sequence[tuple[str | None, ...]] | None = None,
    params: Any = None,
    root: str = "",
) -> Any:
    """Returns function(*arguments), computed by each device on its shards; inside, constraints have no effect.

    Args:
      function: a function of arrays and None; it may call the collectives below.
      arguments: arrays and None; the first has all dimensions of the result that are sharded.
      names: logical names of the dimensions of each argument, None = replicated. A dimension that its mesh axes do not
        divide is replicated too; LENGTH is padded instead.
      multiple: LENGTH is padded such that each shard is a multiple of it.
      results: logical names of the dimensions of each array of a tuple that the function returns; then all sharded
        dimensions must divide evenly. None = one array, with the names of the first argument.
      params: tree of parameters as they are stored, the last argument of the function, which gets them gathered; None = there
        is no such argument.
      root: first part of their names, "model" or "encoding".
    """
    sharding = _CURRENT.get()
    if sharding is not None:
        return sharding.shard_map(function, arguments, names, multiple, results, params, root)
    return function(*arguments) if params is None else function(*arguments, params)


@contextlib.contextmanager
def use_collectives(collectives: Any) -> Iterator[None]:
    """Sets the collectives of what is traced in the block.

    Args:
      collectives: `distributed.sharding.Collectives`; None = those below return arrays as they are.
    """
    token = _COLLECTIVES.set(collectives)
    try:
        yield
    finally:
        _COLLECTIVES.reset(token)


def psum(array: Any, name: str) -> Any:
    """Returns the sum over the shards of a logical name, inside `shard_map`; outside of it the array itself."""
    collectives = _COLLECTIVES.get()
    return array if collectives is None else collectives.psum(array, name)


def pmax(array: Any, name: str) -> Any:
    """Returns the maximum over the shards of a logical name, inside `shard_map`; outside of it the array itself."""
    collectives = _COLLECTIVES.get()
    return array if collectives is None else collectives.pmax(array, name)


def all_gather(array: Any, name: str, dimension: int = 0) -> Any:
    """Returns all shards of a logical name, concatenated along a dimension; outside of `shard_map` the array itself."""
    collectives = _COLLECTIVES.get()
    return array if collectives is None else collectives.all_gather(array, name, dimension)


def matmul_reduce_scatter(left_TV: Any, right_VD: Any, name: str) -> Any:
    """Returns this shard's rows of the sum over shards of left @ right, in the dtype of `left`.

    Inside `shard_map`, where the rows divide over the shards; outside of it the product itself.

    Args:
      left_TV: first factor.
      right_VD: second factor.
      name: logical name of the shards.
    """
    collectives = _COLLECTIVES.get()
    return left_TV @ right_VD if collectives is None else collectives.matmul_reduce_scatter(left_TV, right_VD, name)


def shard_index(name: str) -> Any:
    """Returns the index of this shard of a logical name, inside `shard_map`; outside of it 0."""
    collectives = _COLLECTIVES.get()
    return 0 if collectives is None else collectives.shard_index(name)


def size_label(eval_size: Sequence[int]) -> str:
    """Returns the name of a length or size: 512, 32 for a square, 24x32, or 8x32x32 for a clip of 8 frames."""
    if len(eval_size) == 2 and eval_size[0] == eval_size[1]:
        return str(eval_size[0])
    return "x".join(map(str, eval_size))
