"""Functions of a trained model, each compiled for a mesh at its first call: signal, vectors, logits, evaluation step."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqpe_jax import axes
from seqpe_jax.distributed import sharding
from seqpe_jax.encodings.position_signal import PositionSignal
from seqpe_jax.inference import attention_spread, position_curves
from seqpe_jax.inference.attention_spread import Spread
from seqpe_jax.models.build import ModelSpec, Params, Shape
from seqpe_jax.positions.grids import PositionGrid
from seqpe_jax.positions.prefix_trie import PositionStructure

POSITIONS_PER_CHUNK = 1024  # positions that the encoder encodes in one call

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Ignores progress."""


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledModel:
    """A model's functions, compiled for the devices of a mesh.

    Attributes:
      model_spec: encoding and network.
      mesh: devices, over which arrays are sharded.
    """

    model_spec: ModelSpec
    mesh: jax.sharding.Mesh

    def signal(self, params: Params, shape: Shape, rows: int | None = None, start: Shape = ()) -> PositionSignal:
        """Returns the signal of a window or grid, one position set; SeqPE's vectors are computed chunk by chunk.

        Args:
          params: {"encoding": ..., "model": ...}.
          shape: shape of the window or grid, tokens or patches along each axis.
          rows: only the first indices of the first axis; None = all.
          start: tokens or patches from the origin to the first position along each axis; () = at the origin.
        """
        model_spec, rows = self.model_spec, shape[0] if rows is None else min(rows, shape[0])
        offset = start if any(start) else (0,) * len(shape)
        if not model_spec.has_vectors:
            return self._signal(params, jnp.array(offset, jnp.int32), shape, rows)
        grid = model_spec.position_grid
        positions_LA = grid.positions(shape, rows=rows) + grid.position_resolution * np.array(offset, np.int32)
        positions_PLA = positions_LA[None]
        if any(offset) and (len(shape) > 1 or any(grid.interpolated_sides)):
            vectors_LE = self.vectors_of(params, positions_PLA[0])
        else:
            vectors_LE = self.vectors(params, shape, rows, start=offset[0])
        return self._signal_of_vectors(params, vectors_LE[None], positions_PLA, shape)

    def signal_of(self, params: Params, positions_PLA: jax.Array, shape: Shape) -> PositionSignal:
        """Returns the signal of any positions of windows or grids of a shape; positions_PLA: int32."""
        return self._signal_of_positions(params, positions_PLA, shape)

    def vectors(
        self,
        params: Params,
        shape: Shape,
        rows: int | None = None,
        position_grid: PositionGrid | None = None,
        progress: Progress = no_progress,
        start: int = 0,
    ) -> jax.Array:
        """Returns SeqPE's vectors for the positions of a window or grid, float32[rows * prod(shape[1:]), E].

        Chunks of a window begin at multiples of `POSITIONS_PER_CHUNK` and share one program, so that a position has the same
        vector to the last bit in windows of every length, wherever they start, and in an export.

        Args:
          params: {"encoding": ..., "model": ...}.
          shape: shape of the window or grid.
          rows: only the first indices of the first axis; None = all.
          position_grid: replaces that of the model.
          progress: called with the positions done and their total.
          start: tokens from the origin to the first token of a window.
        """
        rows, per_row = rows or shape[0], math.prod(shape[1:])
        grid = position_grid or self.model_spec.position_grid
        if len(shape) == 1 and not any(grid.interpolated_sides):
            skip, chunk_rows = start % POSITIONS_PER_CHUNK, POSITIONS_PER_CHUNK
            first_rows, shape = range(start - skip, start + rows, chunk_rows), (chunk_rows,)
        else:
            skip, chunk_rows = 0, min(rows, max(1, POSITIONS_PER_CHUNK // per_row))
            first_rows = range(0, rows, chunk_rows)
        chunks = []
        for done, first in enumerate(first_rows, 1):
            chunks.append(self._vectors(params, first, chunk_rows, shape, grid))
            progress(min(done * chunk_rows, rows) * per_row, rows * per_row)
        vectors_RE = jnp.concatenate(chunks) if len(chunks) > 1 else chunks[0]
        return vectors_RE[skip * per_row : (skip + rows) * per_row]

    def vectors_of(self, params: Params, positions_RA: jax.Array) -> jax.Array:
        """Returns SeqPE's vectors for any positions, float32[R, E].

        Args:
          params: {"encoding": ..., "model": ...}.
          positions_RA: int32, in units of the last digit.
        """
        return self._vectors_of(params, positions_RA)

    def logits(self, params: Params, inputs: jax.Array, start: Shape = ()) -> jax.Array:
        """Returns logits as `ModelSpec.logits`, with vectors computed chunk by chunk.

        Args:
          params: {"encoding": ..., "model": ...}.
          inputs: tokens int32[B, L] or images float32[B, sides..., C].
          start: tokens or patches from the origin to the first position along each axis; () = at the origin.
        """
        return self._logits(params, inputs, self.signal(params, self.model_spec.grid_of(inputs.shape), start=start))

    @functools.cache  # noqa: B019  one instance per model, one loss per instance
    def eval_step(self, task_loss: Any) -> Callable[[Params, PositionSignal, dict[str, Any]], dict[str, jax.Array]]:
        """Returns the compiled evaluation step: (params, signal, batch) -> arrays with one entry per example.

        Args:
          task_loss: a loss of `losses.task`; its `eval_step` names the arrays.
        """

        def eval_step(params: Params, signal: PositionSignal, batch: dict[str, Any]) -> dict[str, jax.Array]:
            return task_loss.eval_step(self.model_spec.network, {"params": params["model"]}, signal, batch)

        return jax.jit(with_mesh(self.mesh, eval_step), out_shardings=sharding.replicated(self.mesh))

    def similarity(
        self, params: Params, shape: Shape, num_anchors: int = 5, columns: int = 512
    ) -> dict[str, np.ndarray] | None:
        """Returns the cosine similarity of a window's or grid's vectors to a few anchors', or None without vectors.

        Args:
          params: {"encoding": ..., "model": ...}.
          shape: shape of the window or grid.
          num_anchors: anchors, evenly spaced.
          columns: positions of a window, evenly spaced; a grid has all of its positions, row-major.

        Returns:
          The arrays of similarity.npz: token or patch indices of the anchors, int[n, A], and of the positions that they are
          compared with, int[m, A], and the cosines, float32[n, m].
        """
        if not self.model_spec.has_vectors:
            return None
        indices_RA = np.asarray(PositionGrid().positions(shape))
        positions_RA = np.asarray(self.model_spec.position_grid.positions(shape))
        if len(shape) == 1:
            columns_R = np.unique(np.linspace(0, len(positions_RA) - 1, columns).astype(int))
            indices_RA, positions_RA = indices_RA[columns_R], positions_RA[columns_R]
        anchors = np.unique(np.linspace(0, len(positions_RA) - 1, num_anchors + 2).astype(int)[1:-1])
        vectors_RE = self.vectors_of(params, jnp.asarray(positions_RA))
        return {
            "pivots": indices_RA[anchors],
            "positions": indices_RA,
            "cosine": np.asarray(cosine_similarity(vectors_RE, anchors), np.float32),
        }

    def position_curves(
        self, params: Params, shape: Shape, tokens_L: np.ndarray | None = None
    ) -> dict[str, np.ndarray] | None:
        """Returns what attention gains by distance in each layer and head, or None of an encoding without such terms.

        Args:
          params: {"encoding": ..., "model": ...}.
          shape: shape of the window or grid; its last token, or the patch at its centre, is the query.
          tokens_L: int32, a text of at most that window, on which gates are measured; None = they are left out.

        Returns:
          The arrays of position_curves.npz: "distances" of the keys, int32[D], or float32[rows, columns] of a grid, and some
          of "logit", "kernel" and "factor" (`inference.position_curves.position_terms`) and "gate" (`mean_gate_products`),
          each float32[layers, heads, D] or [layers, heads, rows, columns].
        """
        network, distances = self.model_spec.network, position_curves.distances_of(shape)
        query, keys_S = position_curves.query_and_keys(shape, self.model_spec.prefix_tokens)
        signal = self.signal(params, shape)
        terms = self._position_terms(signal, query, jnp.asarray(keys_S))
        if network.config.gate and tokens_L is not None:
            window_L = np.pad(np.asarray(tokens_L, np.int32), (0, shape[0] - len(tokens_L)))  # causal: no effect
            arguments = jnp.asarray(window_L), signal, jnp.asarray(distances), len(tokens_L)
            terms = terms | {"gate": self._mean_gates(params, *arguments)}
        sizes = (network.config.layers, network.config.heads, *distances.shape)
        arrays = {name: np.asarray(term, np.float32).reshape(sizes) for name, term in terms.items()}
        return {"distances": distances, **arrays} if arrays else None

    def attention_spread(
        self, params: Params, inputs: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None] | None:
        """Returns how far and how evenly heads attend, and what the class token attends to.

        Args:
          params: {"encoding": ..., "model": ...}.
          inputs: int32[L], a text, cut to `attention_spread.MAX_TOKENS`; or float32[n, sides..., C], normalized images.

        Returns:
          {"distance", "entropy"}, each float32[layers, H] (`attention_spread.Spread`), means over the second half of the
          text, whose queries have the most keys, or over all patches; and the last layer's weights from the class token,
          float32[n, H, patches per axis...], None of a text. None where the mesh splits tokens.
        """
        if self.mesh.shape.get("context", 1) > 1:
            return None
        is_text = inputs.ndim == 1
        inputs = inputs[None, : attention_spread.MAX_TOKENS] if is_text else inputs
        shape = self.model_spec.grid_of(inputs.shape)
        distance_LS = attention_spread.distances_between(shape, self.model_spec.prefix_tokens)
        is_query_L = np.arange(len(distance_LS)) >= (shape[0] // 2 if is_text else self.model_spec.prefix_tokens)
        layers = self._attention_spread(
            params, jnp.asarray(inputs), self.signal(params, shape), distance_LS, is_query_L, not is_text
        )
        spread = {
            name: np.stack([np.asarray(getattr(layer, f"{name}_H")) for layer in layers])
            for name in ("distance", "entropy")
        }
        if is_text:
            return spread, None
        weights_BHL = np.asarray(layers[-1].weights_BHS, np.float32)[..., self.model_spec.prefix_tokens :]
        return spread, weights_BHL.reshape(*weights_BHL.shape[:2], *shape)

    def params_with_table(self, params: Params, max_grid: Shape, progress: Progress = no_progress) -> Params:
        """Returns the parameters of `ModelSpec.with_precomputed_table(max_grid)`: a table of vectors replaces the encoder."""
        if not self.model_spec.has_vectors:
            return params
        sides, step = self.model_spec.position_grid.table_shape(max_grid)
        vectors = self.vectors(params, sides, position_grid=PositionGrid(step), progress=progress)
        rest = {name: value for name, value in params["encoding"].items() if name != "encoder"}
        return params | {"encoding": rest | {"table": np.asarray(vectors).reshape(*sides, -1)}}

    @functools.cached_property
    def _signal(self) -> Callable[[Params, jax.Array, Shape, int], PositionSignal]:
        def signal(params: Params, start_A: jax.Array, shape: Shape, rows: int) -> PositionSignal:
            position_grid = self.model_spec.position_grid
            positions_LA = position_grid.positions(shape, rows=rows) + position_grid.position_resolution * start_A
            return self.model_spec.signal(params, positions_LA[None], shape)

        return jax.jit(with_mesh(self.mesh, signal), static_argnums=(2, 3))

    @functools.cached_property
    def _signal_of_positions(self) -> Callable[[Params, jax.Array, Shape], PositionSignal]:
        return jax.jit(with_mesh(self.mesh, self.model_spec.signal), static_argnums=2)

    @functools.cached_property
    def _signal_of_vectors(self) -> Callable[[Params, jax.Array, jax.Array, Shape], PositionSignal]:
        def signal(params: Params, vectors_PLE: jax.Array, positions_PLA: jax.Array, shape: Shape) -> PositionSignal:
            return self.model_spec.encode(params, vectors_PLE, positions_PLA, shape=shape, method="signal")

        return jax.jit(with_mesh(self.mesh, signal), static_argnums=3)

    @functools.cached_property
    def _vectors(self) -> Callable[[Params, int, int, Shape, PositionGrid], jax.Array]:
        def vectors(
            params: Params, first: jax.Array, rows: int, shape: Shape, position_grid: PositionGrid
        ) -> jax.Array:
            structure = PositionStructure(1, (rows, *shape[1:]), spans=position_grid.spans(shape, rows))
            positions_RA = position_grid.positions(shape, first, rows)
            return self.model_spec.encode(params, positions_RA, structures=(structure,), method="vectors")

        return jax.jit(
            with_mesh(self.mesh, vectors), static_argnums=(2, 3, 4), out_shardings=sharding.replicated(self.mesh)
        )

    @functools.cached_property
    def _vectors_of(self) -> Callable[[Params, jax.Array], jax.Array]:
        vectors_of = with_mesh(self.mesh, functools.partial(self.model_spec.encode, method="vectors"))
        return jax.jit(vectors_of, out_shardings=sharding.replicated(self.mesh))

    @functools.cached_property
    def _logits(self) -> Callable[..., jax.Array]:
        def logits(params: Params, inputs: jax.Array, signal: PositionSignal) -> jax.Array:
            return self.model_spec.network.apply({"params": params["model"]}, inputs, signal)

        return jax.jit(with_mesh(self.mesh, logits))

    @functools.cached_property
    def _position_terms(self) -> Callable[[PositionSignal, int, jax.Array], dict[str, jax.Array]]:
        config = self.model_spec.network.config

        def terms(signal: PositionSignal, query: int, keys_S: jax.Array) -> dict[str, jax.Array]:
            return position_curves.position_terms(signal, query, keys_S, config.layers, config.heads)

        return jax.jit(with_mesh(self.mesh, terms), static_argnums=1, out_shardings=sharding.replicated(self.mesh))

    @functools.cached_property
    def _attention_spread(self) -> Callable[..., list[Spread]]:
        def spread(
            params: Params,
            inputs: jax.Array,
            signal: PositionSignal,
            distance_LS: jax.Array,
            is_query_L: jax.Array,
            with_weights: bool,
        ) -> list[Spread]:
            measure = attention_spread.measure(distance_LS, is_query_L, with_weights)
            variables = {"params": params["model"]}
            return self.model_spec.network.apply(variables, inputs, signal, measure, method="attention")

        return jax.jit(with_mesh(self.mesh, spread), static_argnums=5, out_shardings=sharding.replicated(self.mesh))

    @functools.cached_property
    def _mean_gates(self) -> Callable[[Params, jax.Array, PositionSignal, jax.Array, int], jax.Array]:
        def gates(
            params: Params, tokens_L: jax.Array, signal: PositionSignal, distances_D: jax.Array, length: int
        ) -> jax.Array:
            log_gate_NLH = position_curves.log_gates(self.model_spec.network, params["model"], tokens_L, signal)
            return position_curves.mean_gate_products(log_gate_NLH[:, :length], distances_D)

        return jax.jit(with_mesh(self.mesh, gates), static_argnums=4, out_shardings=sharding.replicated(self.mesh))


@functools.lru_cache(maxsize=16)
def compiled_model(model_spec: ModelSpec, mesh: jax.sharding.Mesh) -> CompiledModel:
    """Returns the functions of a model, the same for every run of equal sizes: only the first one's calls compile."""
    return CompiledModel(model_spec, mesh)


def cosine_similarity(vectors_RE: jax.Array, rows: np.ndarray) -> jax.Array:
    """Returns the cosines float32[len(rows), R] of some rows with all rows."""
    unit_RE = vectors_RE / jnp.linalg.norm(vectors_RE, axis=-1, keepdims=True)
    return unit_RE[jnp.asarray(rows)] @ unit_RE.T


def with_mesh(mesh: jax.sharding.Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is traced under the sharding rules of a mesh (`axes.use_sharding`)."""

    @functools.wraps(function)
    def traced(*arguments: Any, **options: Any) -> Any:
        with axes.use_sharding(sharding.MeshSharding(mesh)):
            return function(*arguments, **options)

    return traced
