"""The programs of a model outside of training, each compiled for a mesh when it is first called."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax import axes
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.encodings.base import PositionSignal
from seqpe_jax.evaluation.similarity import cosine
from seqpe_jax.models.build import ModelSpec, Params, Shape
from seqpe_jax.positions.grids import PositionGrid
from seqpe_jax.positions.prefix_trie import RowGroup

POSITIONS_PER_CHUNK = 1024  # positions that the encoder reads at once

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Tells nobody how far a piece of work is."""


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledModel:
    """A model, ready to be asked on the devices of a mesh.

    Attributes:
      model_spec: of the model; mesh: the devices, and how arrays are split over them.
    """

    model_spec: ModelSpec
    mesh: jax.sharding.Mesh

    def signal(self, params: Params, shape: Shape, first: int | None = None, start: Shape = ()) -> PositionSignal:
        """Returns the signal of a window or grid, or of a window's first positions; vectors are computed part by part.

        Args:
          start: tokens or patches from the origin to the first position along each axis; () = at the origin.
        """
        model_spec, rows = self.model_spec, shape[0] if first is None else min(first, shape[0])
        moved = start if any(start) else (0,) * len(shape)
        if not model_spec.has_vectors:
            return self._signal(params, jnp.array(moved, jnp.int32), shape, rows)
        position_grid = model_spec.position_grid
        positions_PLA = (
            position_grid.positions(shape, rows=rows) + position_grid.position_resolution * np.array(moved, np.int32)
        )[None]
        if any(moved) and (len(shape) > 1 or any(position_grid.interpolated_sides)):
            vectors_LE = self.vectors_of(params, positions_PLA[0])
        else:
            vectors_LE = self.vectors(params, shape, rows, start=moved[0])
        return self._signal_of(params, vectors_LE[None], positions_PLA, shape)

    def vectors(
        self,
        params: Params,
        shape: Shape,
        side: int | None = None,
        position_grid: PositionGrid | None = None,
        progress: Progress = no_progress,
        start: int = 0,
    ) -> jax.Array:
        """Returns the vectors of the positions of a window or grid, float32[prod(shape), E].

        Windows are read in parts that begin at multiples of `POSITIONS_PER_CHUNK`, all by one program, so that a position has the
        same vector to the last bit in windows of every length, wherever they begin, and in an export.

        Args:
          side: only the first places of the first axis; None = all. spacing: other than that of the model.
          start: tokens from the origin to the first one of a window.
        """
        side, rest = side or shape[0], math.prod(shape[1:])
        position_grid = position_grid or self.model_spec.position_grid
        if len(shape) == 1 and not any(position_grid.interpolated_sides):
            before, rows = start % POSITIONS_PER_CHUNK, POSITIONS_PER_CHUNK
            firsts, shape = range(start - before, start + side, rows), (rows,)
        else:
            before, rows = 0, min(side, max(1, POSITIONS_PER_CHUNK // rest))
            firsts = range(0, side, rows)
        parts = []
        for done, first in enumerate(firsts, 1):
            parts.append(self._vectors(params, first, rows, shape, position_grid))
            progress(min(done * rows, side) * rest, side * rest)
        vectors_RE = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
        return vectors_RE[before * rest : (before + side) * rest]

    def vectors_of(self, params: Params, positions_RA: jax.Array) -> jax.Array:
        """Returns the vectors of any positions int32[R, A] in units of their last digit, float32[R, E]."""
        return self._vectors_of(params, positions_RA)

    def logits(self, params: Params, inputs: jax.Array, start: Shape = ()) -> jax.Array:
        """Returns what `ModelSpec.logits` does, with the vectors of `vectors`; start: as of `signal`."""
        return self._logits(params, inputs, self.signal(params, self.model_spec.grid_of(inputs.shape), start=start))

    @functools.cache  # noqa: B019  a model has one of these, and one criterion
    def eval_step(self, task_loss: Any) -> Callable[[Params, PositionSignal, dict[str, Any]], dict[str, jax.Array]]:
        """Returns what evaluation needs to know of each example of a batch (see `objectives.task_loss`), compiled."""

        def eval_step(params: Params, signal: PositionSignal, batch: dict[str, Any]) -> dict[str, jax.Array]:
            return task_loss.eval_step(self.model_spec.network, {"params": params["model"]}, signal, batch)

        return jax.jit(use_sharding(self.mesh, eval_step), out_shardings=layout.replicated(self.mesh))

    def similarity(
        self, params: Params, shape: Shape, pivots: int = 5, columns: int = 512
    ) -> dict[str, np.ndarray] | None:
        """Returns how alike the vectors of a window or grid are to those of a few pivots, or None without vectors.

        Returns:
          {"pivots" int[n, A], "positions" int[m, A], "cosine" float32[n, m]}: places of tokens or patches, wherever they
          stand; a window is thinned out to `columns` of them, a grid comes whole, row-major.
        """
        if not self.model_spec.has_vectors:
            return None
        places_RA, positions_RA = (
            np.asarray(position_grid.positions(shape))
            for position_grid in (PositionGrid(), self.model_spec.position_grid)
        )
        if len(shape) == 1:
            taken = np.unique(np.linspace(0, len(positions_RA) - 1, columns).astype(int))
            places_RA, positions_RA = places_RA[taken], positions_RA[taken]
        chosen = np.unique(np.linspace(0, len(positions_RA) - 1, pivots + 2).astype(int)[1:-1])
        vectors_RE = self.vectors_of(params, jnp.asarray(positions_RA))
        return {
            "pivots": places_RA[chosen],
            "positions": places_RA,
            "cosine": np.asarray(cosine(vectors_RE, chosen), np.float32),
        }

    def attention(self, params: Params, images: np.ndarray) -> np.ndarray:
        """Returns where the class token looks, float32[n, H, patches along each axis...]: the last layer's weights.

        Args:
          images: float32[n, sides..., C], normalised.
        """
        shape = self.model_spec.grid_of(images.shape)
        weights = jax.jit(functools.partial(self.model_spec.network.apply, method="attention"))(
            {"params": params["model"]}, jnp.asarray(images), self.signal(params, shape)
        )
        weights_BHL = np.asarray(weights, np.float32)[:, :, 0, 1:]
        return weights_BHL.reshape(*weights_BHL.shape[:2], *shape)

    def params_with_table(self, params: Params, max_grid: Shape, progress: Progress = no_progress) -> Params:
        """Returns the parameters of `ModelSpec.with_precomputed_table(max_grid)`: vectors computed once stand in the encoder's place."""
        if not self.model_spec.has_vectors:
            return params
        sides, step = self.model_spec.position_grid.table_shape(max_grid)
        table = np.asarray(self.vectors(params, sides, position_grid=PositionGrid(step), progress=progress)).reshape(
            *sides, -1
        )
        rest = {name: value for name, value in params["encoding"].items() if name != "encoder"}
        return params | {"encoding": rest | {"table": table}}

    @functools.cached_property
    def _signal(self) -> Callable[[Params, jax.Array, Shape, int], PositionSignal]:
        def signal(params: Params, start_A: jax.Array, shape: Shape, rows: int) -> PositionSignal:
            position_grid = self.model_spec.position_grid
            positions_LA = position_grid.positions(shape, rows=rows) + position_grid.position_resolution * start_A
            return self.model_spec.signal(params, positions_LA[None], shape)

        return jax.jit(use_sharding(self.mesh, signal), static_argnums=(2, 3))

    @functools.cached_property
    def _signal_of(self) -> Callable[[Params, jax.Array, jax.Array, Shape], PositionSignal]:
        def signal(params: Params, vectors_PLE: jax.Array, positions_PLA: jax.Array, shape: Shape) -> PositionSignal:
            return self.model_spec.encode(params, vectors_PLE, positions_PLA, shape=shape, method="signal")

        return jax.jit(use_sharding(self.mesh, signal), static_argnums=3)

    @functools.cached_property
    def _vectors(self) -> Callable[[Params, int, int, Shape, PositionGrid], jax.Array]:
        def vectors(
            params: Params, first: jax.Array, rows: int, shape: Shape, position_grid: PositionGrid
        ) -> jax.Array:
            known = RowGroup(1, (rows, *shape[1:]), spans=position_grid.spans(shape, rows))
            positions_RA = position_grid.positions(shape, first, rows)
            return self.model_spec.encode(params, positions_RA, groups=(known,), method="vectors")

        return jax.jit(use_sharding(self.mesh, vectors), static_argnums=(2, 3, 4))

    @functools.cached_property
    def _vectors_of(self) -> Callable[[Params, jax.Array], jax.Array]:
        return jax.jit(use_sharding(self.mesh, functools.partial(self.model_spec.encode, method="vectors")))

    @functools.cached_property
    def _logits(self) -> Callable[..., jax.Array]:
        def logits(params: Params, inputs: jax.Array, signal: PositionSignal) -> jax.Array:
            return self.model_spec.network.apply({"params": params["model"]}, inputs, signal)

        return jax.jit(use_sharding(self.mesh, logits))


def use_sharding(mesh: jax.sharding.Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is traced with a mesh's layout in force."""

    @functools.wraps(function)
    def traced(*arguments: Any, **options: Any) -> Any:
        with axes.use_sharding(layout.MeshSharding(mesh)):
            return function(*arguments, **options)

    return traced
