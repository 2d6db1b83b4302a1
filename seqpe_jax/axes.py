"""Shape letters, names of sizes, and the logical names that link dimensions to a device mesh. Imports nothing of ours.

Array names end in shape letters where two shapes could be confused, and einsum letters match them:

    B batch           L length (query)   S length (key)     A coordinate axes   P position sets
    N digits          R encoder rows     E signal width     D model width       F feature width
    H heads           K head width       C candidates       M distillation window
    V vocabulary or classes

A model names the dimensions of its arrays (`with_logical_constraint`); which devices that means is said elsewhere, by the layout that is in
force while it is traced (`use_sharding`). Without one, all arrays stay as they are.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

BATCH = "batch"
LENGTH = "length"
ENCODER_ROWS = "rows"  # positions that the encoder encodes
POSITIONS = "positions"  # of a signal while it is computed
WIDTH = "width"
HEADS = "heads"
MLP = "hidden"
VOCABULARY = "vocabulary"


class ShardingRules(Protocol):
    """Where the dimensions of arrays lie (`runtime.mesh.MeshSharding`); device: one of those that programs are compiled for."""

    device: Any

    def with_logical_constraint(self, array: Any, names: Sequence[str | None]) -> Any:
        """Returns the array, its dimensions split over the devices of their names."""

    def sharding(self, *names: str | None) -> Any:
        """Returns the layout of arrays whose first dimensions have these names."""

    def shards(self, name: str) -> int:
        """Returns the number of parts of a dimension of this name."""

    def all_gather_params(self, params: Any, root: str) -> Any:
        """Returns the parameters of a part as they are used."""

    def shard_map(self, function: Callable[..., Any], arguments: Any, names: Any) -> Any:
        """Returns function(*arguments), computed by each device for its own part."""


_CURRENT: contextvars.ContextVar[ShardingRules | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use_sharding(layout: ShardingRules | None) -> Iterator[None]:
    """Puts a layout in force for what is traced inside; None = arrays stay as they are."""
    token = _CURRENT.set(layout)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def with_logical_constraint(array: Any, *names: str | None) -> Any:
    """Returns an array laid out by the names of its dimensions, None = whole; as it is where no layout is in force."""
    layout = _CURRENT.get()
    return array if layout is None else layout.with_logical_constraint(array, names)


def shards(name: str) -> int:
    """Returns the number of parts of a dimension of this name; 1 where no layout is in force."""
    layout = _CURRENT.get()
    return 1 if layout is None else layout.shards(name)


def all_gather_params(params: Any, root: str) -> Any:
    """Returns the parameters of a part, "model" or "encoding", laid out as they are used."""
    layout = _CURRENT.get()
    return params if layout is None else layout.all_gather_params(params, root)


def device() -> Any:
    """Returns one of the devices that what is traced will be compiled for; None where no layout is in force."""
    layout = _CURRENT.get()
    return None if layout is None else layout.device


def shard_map(function: Callable[..., Any], arguments: Sequence[Any], names: Sequence[tuple[str | None, ...]]) -> Any:
    """Returns function(*arguments), computed by each device for its own part; inside, no layout is in force.

    Args:
      arguments: arrays and None; the first has all dimensions of the result that are split.
      names: of the dimensions of each, None = whole. One that its devices do not divide is whole, too; a LENGTH is padded.
    """
    layout = _CURRENT.get()
    return function(*arguments) if layout is None else layout.shard_map(function, arguments, names)


def size_label(eval_size: Sequence[int]) -> str:
    """Returns the name of a length or size: 512, 32 for a square, 24x32, or 8x32x32 for a clip of 8 frames."""
    if len(eval_size) == 2 and eval_size[0] == eval_size[1]:
        return str(eval_size[0])
    return "x".join(map(str, eval_size))
