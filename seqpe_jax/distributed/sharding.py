"""The device mesh, and the sharding of every parameter, activation and batch on it.

Mesh axes: `data` shards the batch; `fsdp` shards the batch and also parameters and optimizer state; `context` shards the
length of a sequence and, as fsdp does, parameters and optimizer state; `tensor` shards heads, MLP units and vocabulary.
"""

import dataclasses
import fnmatch
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seqpe_jax.axes import (
    BATCH,
    BATCH_SHARDS,
    ENCODER_ROWS,
    HEADS,
    LENGTH,
    MLP,
    OUTER_BATCH,
    OUTER_TOKENS,
    PARAM_SHARDS,
    POSITIONS,
    RESIDUAL_LENGTH,
    VOCABULARY,
    VOCABULARY_SHARDS,
    WIDTH,
    use_collectives,
    use_sharding,
)
from seqpe_jax.errors import InputError
from seqpe_jax.ring import matmul_reduce_scatter, reduce_scatter

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical name -> mesh axes. Parameters are sharded over fsdp and context when stored and all-gathered before use, so WIDTH is unsharded
# for activations.
ACTIVATION_RULES = {
    BATCH: BATCH_AXES,
    LENGTH: ("context",),
    # The part of a sequence comes first, so that its positions are whole parts of what the devices of `context` gather.
    # fsdp comes before data, so that sums over fsdp alone, in parts, can be followed by those over data (`copy_per_shard`).
    ENCODER_ROWS: ("context", "fsdp", "data", "tensor"),
    POSITIONS: ("context", "fsdp", "data"),
    HEADS: ("tensor",),
    MLP: ("tensor",),
    VOCABULARY: ("tensor",),
    WIDTH: (),
    RESIDUAL_LENGTH: ("context", "tensor"),
    OUTER_BATCH: ("data",),
    OUTER_TOKENS: ("data",),
    PARAM_SHARDS: ("fsdp", "context"),
    BATCH_SHARDS: ("fsdp",),
    VOCABULARY_SHARDS: ("tensor", "fsdp", "context"),
}
PARAM_RULES = ACTIVATION_RULES | {WIDTH: ("fsdp", "context")}

# Logical names of the last dimensions of each parameter; a leading axis of stacked layers has none.
PARAM_AXES = {
    "model/token_embedding/embedding": (VOCABULARY, WIDTH),
    "model/output_embedding/embedding": (VOCABULARY, WIDTH),
    "model/blocks*/qkv/kernel": (WIDTH, None, HEADS, None),
    "model/blocks*/qkv/bias": (None, HEADS, None),
    "model/blocks*/q/kernel": (WIDTH, HEADS, None),
    "model/blocks*/q/bias": (HEADS, None),
    "model/blocks*/kv/kernel": (WIDTH, None, HEADS, None),
    "model/blocks*/kv/bias": (None, HEADS, None),
    "model/blocks*/?_norm/*": (None, None),  # of queries and keys: of a head, or of all
    "model/blocks*/out/kernel": (HEADS, None, WIDTH),
    "model/blocks*/mlp_in/kernel": (WIDTH, MLP),
    "model/blocks*/mlp_in/bias": (MLP,),
    "model/blocks*/mlp_gate/kernel": (WIDTH, MLP),
    "model/blocks*/mlp_gate/bias": (MLP,),
    "model/blocks*/mlp_out/kernel": (MLP, WIDTH),
    "model/blocks*/fading/kernel": (WIDTH, HEADS),  # forget gate
    "model/blocks*/fading/scale": (None,),
    "model/blocks*/parabola_shape/kernel": (WIDTH, None, HEADS, None),
    "model/blocks*/*/bias": (None,),
    "model/blocks*/norm_?/scale": (None,),
    "model/blocks*/layer_scale_?": (None,),
    "model/blocks*/post_norm_?/scale": (None,),
    "model/final_norm/*": (None,),
    "model/projection/kernel": (None, WIDTH),
    "model/projection/bias": (None,),
    "model/class_token": (None, None),
    "model/registers": (None, None),
    "model/head/kernel": (WIDTH, VOCABULARY),
    "model/head/bias": (VOCABULARY,),
    "encoding/encoder/*_embedding": (None, WIDTH),
    "encoding/encoder/cls": (None, None),
    "encoding/encoder/block_*/*/kernel": (WIDTH, None),
    "encoding/encoder/block_*/*/bias": (None,),
    "encoding/encoder/block_*/norm_?/scale": (None,),
    "encoding/encoder/final_norm/*": (None,),
    "encoding/encoder/projection/kernel": (WIDTH, None),
    "encoding/encoder/projection/bias": (None,),
    "encoding/qk_map/kernel": (WIDTH, None),
    "encoding/qk_map/bias": (None,),
    "encoding/prefix_vectors": (None, None),
    "encoding/table": (None, WIDTH),  # learned, or an export's
    "encoding/frequencies": (None, None),
    "encoding/buckets": (None, None),  # parameters of relative biases are small: replicated
    "encoding/slope": (None,),
    "encoding/scale": (None,),
    "encoding/start_scale": (None,),
    "encoding/threshold": (None,),
    # FIRE MLP: first and second layer
    "encoding/inward": (None,),
    "encoding/inward_bias": (None,),
    "encoding/outward": (None, None),
    "encoding/outward_bias": (None,),
    "encoding/shift": (None, None),
    "encoding/directions": (None, None, None),  # of PaPE's coordinates
    "encoding/given": (None, None, None),  # precomputed position embeddings
}
# Parameters that are used inside `shard_map` alone, where each device gathers them.
GATHERED_BY_EACH = ("encoding/qk_map/kernel", "encoding/qk_map/bias")


def make_mesh(
    data: int,
    fsdp: int,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    slices: int = 0,
) -> Mesh:
    """Returns a mesh of `AXES`.

    Args:
      data: size of the axis; 0 = as many devices as the other axes leave.
      fsdp: size of the axis.
      context: size of the axis.
      tensor: size of the axis.
      devices: None = all.
      slices: TPU slices, over which `data` is split first, since the network between slices is slower than inside them;
        0 = as many as the devices belong to.

    Raises:
      InputError: the axes do not multiply to the number of devices, or do not fit into slices.
    """
    devices = jax.devices() if devices is None else devices
    count, others = len(devices), fsdp * context * tensor
    if count % others or (data and data * others != count):
        raise InputError(
            f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.context={context} x mesh.tensor={tensor} multiply to "
            f"{(data or 1) * others}, but there are {count} devices: set mesh.data=0 and the others so that their product divides "
            f"{count}"
        )
    shape = (count // others, fsdp, context, tensor)
    slices = _check_slices(devices, slices, shape)
    # Neighbors on the mesh are neighbors in the network where possible. An axis of 8 on a 4 x 4 x 4 torus splits a physical
    # axis, which `jax.make_mesh` would refuse.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        of_slice = (shape[0] // slices, *shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(
            of_slice, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_index(device: jax.Device) -> int:
    """Returns the index of a device's TPU slice; 0 for other devices and for a single slice."""
    return (getattr(device, "slice_index", None) or 0) if device.platform == "tpu" else 0


def _check_slices(devices: Sequence[jax.Device], slices: int, shape: tuple[int, ...]) -> int:
    """Returns the number of slices of a mesh of this shape.

    Raises:
      InputError: the devices belong to another number of slices, slices differ in size, or `data` is no multiple of it.
    """
    sizes = Counter(map(slice_index, devices))
    if slices not in (0, len(sizes)):
        raise InputError(
            f"mesh.slices={slices}, but the {len(devices)} devices there are belong to {len(sizes)} TPU slice(s): set "
            f"mesh.slices={len(sizes)}, or 0 for as many as there are"
        )
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"the TPU slices have {', '.join(map(str, sizes.values()))} devices: give slices of one size, for each holds "
            "an equal part of the batch"
        )
    if shape[0] % len(sizes):
        raise InputError(
            f"mesh.data={shape[0]} is not a multiple of the {len(sizes)} TPU slices, over which it is split: make "
            f"mesh.fsdp x mesh.context x mesh.tensor (now {math.prod(shape[1:])}) divide the "
            f"{len(devices) // len(sizes)} devices of a slice"
        )
    return len(sizes)


class Collectives:
    """The collectives of `axes`, over the mesh axes of a logical name; inside `shard_map`."""

    def psum(self, array: jax.Array, name: str) -> jax.Array:
        """Returns the sum over shards."""
        return jax.lax.psum(array, ACTIVATION_RULES[name])

    def pmax(self, array: jax.Array, name: str) -> jax.Array:
        """Returns the maximum over shards."""
        return jax.lax.pmax(array, ACTIVATION_RULES[name])

    def all_gather(self, array: jax.Array, name: str, dimension: int) -> jax.Array:
        """Returns all shards, concatenated along a dimension."""
        return jax.lax.all_gather(array, ACTIVATION_RULES[name], axis=dimension, tiled=True)

    def matmul_reduce_scatter(self, left_TV: jax.Array, right_VD: jax.Array, name: str) -> jax.Array:
        """Returns this shard's rows of the sum over shards of left @ right."""
        return matmul_reduce_scatter(left_TV, right_VD, ACTIVATION_RULES[name])

    def shard_index(self, name: str) -> jax.Array:
        """Returns the index of this shard."""
        return jax.lax.axis_index(ACTIVATION_RULES[name])


@dataclasses.dataclass(frozen=True)
class MeshSharding:
    """Shardings of activations on a mesh by logical names (`ACTIVATION_RULES`); set by `axes.use_sharding`."""

    mesh: Mesh

    @property
    def device(self) -> jax.Device:
        """One of the mesh's devices, which are all of one kind."""
        return self.mesh.devices.flat[0]

    def shards(self, name: str) -> int:
        """Returns the number of shards of a dimension of this logical name."""
        return math.prod(self.mesh.shape[axis] for axis in ACTIVATION_RULES[name])

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes over which a dimension of this logical name is split; () = it is not."""
        return tuple(axis for axis in ACTIVATION_RULES[name] if self.mesh.shape[axis] > 1)

    def sharding(self, *names: str | None) -> NamedSharding:
        """Returns the sharding of arrays whose first dimensions have these names; they must divide evenly."""
        axes = (None if name is None else ACTIVATION_RULES[name] for name in names)
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def spec(
        self, shape: Sequence[int], names: Sequence[str | None], rules: Mapping[str, tuple[str, ...]] = ACTIVATION_RULES
    ) -> PartitionSpec:
        """Returns the PartitionSpec of an array; a dimension that its mesh axes do not divide is replicated.

        Args:
          shape: shape of the array.
          names: logical names of its dimensions.
          rules: mesh axes by logical name; `PARAM_RULES` for parameters as they are stored.
        """

        def axes_of(size: int, name: str | None) -> tuple[str, ...] | None:
            axes = () if name is None else rules[name]
            count = math.prod(self.mesh.shape[axis] for axis in axes)
            return None if count == 1 or size % count else axes

        return PartitionSpec(*(axes_of(size, name) for size, name in zip(shape, names, strict=True)))

    def with_logical_constraint(self, array: jax.Array, names: Sequence[str | None]) -> jax.Array:
        """Returns an array of a traced function, sharded by the names of its dimensions."""
        return self._constrain(array, self.spec(array.shape, names))

    def all_gather_param(self, param: jax.Array, names: Sequence[str | None]) -> jax.Array:
        """Returns a parameter gathered over fsdp for use, whose gradient is sharded as the parameter is stored.

        The transpose of a plain constraint would constrain the gradient to the layout of use, so that all devices of fsdp
        sum all of it and then drop all but their shard; in this layout each receives the sum of its shard alone.

        Args:
          param: the parameter, or a cast of it.
          names: logical names of its dimensions.
        """
        used, stored = self.spec(param.shape, names), self.spec(param.shape, names, PARAM_RULES)
        return self._relayout(param, used, stored)

    def all_gather_params(self, params: Any, root: str) -> Any:
        """Returns parameters gathered over fsdp, once for all uses inside a loop; gradients as in `all_gather_param`.

        Args:
          params: tree of arrays.
          root: first part of their names, "model" or "encoding".
        """

        def gather(path: Any, leaf: jax.Array) -> jax.Array:
            name = f"{root}/{_path_name(path)}"
            return leaf if name in GATHERED_BY_EACH else self.all_gather_param(leaf, _param_axes(name, leaf.ndim))

        return jax.tree_util.tree_map_with_path(gather, params)

    def copy_per_shard(self, field: jax.Array, over: str, names: Sequence[str | None]) -> jax.Array:
        """Returns `axes.copy_per_shard`; the gradient is summed into shards of positions.

        Both go over fsdp and context by themselves, where parts are large enough, and over data with those parts alone: a TPU's
        compiler makes one gather or sum of few rows for each of all devices an all-reduce of the whole, for which they wait.
        """
        if self.mesh.size == 1:
            return field
        shape = (self.shards(over), *field.shape[1:])
        copied = self.spec(shape, (over, *(names or (None,) * (field.ndim - 1))))
        split = self.mesh_axes(LENGTH) if copied[1] else ()
        inner = tuple(axis for axis in self.mesh_axes(POSITIONS) if axis not in ("data", *split))
        inner = inner if self._divides(field.shape[1], (*split, *inner)) else ()
        outer = ("data",) if self._divides(field.shape[1], (*split, *inner, "data")) else ()
        added = tuple(axis for axis in ACTIVATION_RULES[over] if axis not in (*inner, *outer))

        @jax.custom_vjp
        def copy(field: jax.Array) -> jax.Array:
            field = self._constrain(field, PartitionSpec(None, (*split, *inner), *copied[2:]))
            return self._constrain(jnp.broadcast_to(field, shape), copied)

        def add_up(gradient: jax.Array) -> jax.Array:
            rows = gradient.reshape(gradient.shape[1], -1)
            if inner:
                rows = reduce_scatter(rows, 0, inner)
            rows = jax.lax.psum(rows, added)
            if outer:
                rows = jax.lax.psum_scatter(rows, outer, tiled=True)
            return rows.reshape(1, len(rows), *gradient.shape[2:])

        def sum_shards(_: None, gradient: jax.Array) -> tuple[jax.Array]:
            summed = PartitionSpec(None, (*split, *inner, *outer), *copied[2:])
            add = jax.shard_map(add_up, mesh=self.mesh, in_specs=copied, out_specs=summed, check_vma=False)
            return (add(self._constrain(gradient, copied)),)

        copy.defvjp(lambda field: (copy(field), None), sum_shards)
        return copy(field)

    def gather_sets(self, rows_RE: jax.Array, num_sets: int, length: int, batch: int) -> tuple[jax.Array, jax.Array]:
        """Returns `axes.gather_sets`; each device gathers all rows, and the gradient is summed into shards of rows."""
        rows, samples = ACTIVATION_RULES[ENCODER_ROWS], ACTIVATION_RULES[BATCH]
        own = batch // self.shards(BATCH)

        @jax.custom_vjp
        def gather(shard_RE: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
            all_RE = jax.lax.all_gather(shard_RE, rows, tiled=True)
            sets_PLE = all_RE[: num_sets * length].reshape(num_sets, length, -1)
            return jax.lax.dynamic_slice_in_dim(sets_PLE, first[0] % num_sets, own), sets_PLE[:1]

        def scatter(residuals: tuple[jax.Array, int], gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            (first, padded), (of_samples, of_first_set) = residuals, gradients
            sets_PLE = jnp.zeros((num_sets, *of_samples.shape[1:]), of_samples.dtype)
            sets_PLE = jax.lax.dynamic_update_slice_in_dim(sets_PLE, of_samples, first[0] % num_sets, 0)
            sets_PLE = sets_PLE.at[:1].add(of_first_set)
            all_RE = jnp.pad(sets_PLE.reshape(num_sets * length, -1), ((0, padded - num_sets * length), (0, 0)))
            # As in `copy_per_shard`: over data with the parts of the others alone.
            inner = rows[: rows.index("data")]
            summed = jax.lax.psum_scatter(reduce_scatter(all_RE, 0, inner), rows[len(inner) :], tiled=True)
            return summed, None

        gather.defvjp(lambda shard, first: (gather(shard, first), (first, len(rows_RE))), scatter)
        mapped = jax.shard_map(
            gather,
            mesh=self.mesh,
            in_specs=(PartitionSpec(rows), PartitionSpec(samples)),
            out_specs=(PartitionSpec(samples), PartitionSpec(rows)),
            check_vma=False,
        )
        return mapped(rows_RE, jnp.arange(batch))

    def _divides(self, size: int, axes: Sequence[str]) -> bool:
        return size % math.prod(self.mesh.shape[axis] for axis in axes) == 0

    def _constrain(self, array: jax.Array, spec: PartitionSpec) -> jax.Array:
        if self.mesh.size == 1:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))

    def _relayout(self, array: jax.Array, forward: PartitionSpec, backward: PartitionSpec) -> jax.Array:
        if self.mesh.size == 1:
            return array

        @jax.custom_vjp
        def relayout(array: jax.Array) -> jax.Array:
            return self._constrain(array, forward)

        def constrain_gradient(_: None, gradient: jax.Array) -> tuple[jax.Array]:
            shape, last = gradient.shape, gradient.ndim - 1
            moves = last > 0 and backward[last] is not None
            spec = PartitionSpec(backward[last], *backward[:last]) if moves else backward
            if moves:
                gradient = jnp.moveaxis(gradient, last, 0)
            # A TPU's compiler makes no reduce-scatter along the last dimension of a bfloat16 array, nor of heads whose width
            # is no multiple of its lanes, which are one dimension with their width here.
            if last > 1 and spec[last] is None:
                moved = gradient.shape
                gradient = gradient.reshape(*moved[:-2], -1)
                gradient = self._constrain(gradient, PartitionSpec(*spec[:last])).reshape(moved)
            else:
                gradient = self._constrain(gradient, spec)
            if moves:
                gradient = jnp.moveaxis(gradient, 0, last)
            return (self._constrain(gradient.reshape(shape), backward),)

        relayout.defvjp(lambda array: (self._constrain(array, forward), None), constrain_gradient)
        return relayout(array)

    def shard_map(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        names: Sequence[Any],
        multiple: int = 1,
        results: Sequence[Any] | None = None,
        params: Any = None,
        root: str = "",
    ) -> Any:
        """Returns `axes.shard_map`; all mesh axes are manual inside, so that Pallas kernels can be called."""
        if self.mesh.size == 1:
            return function(*arguments) if params is None else function(*arguments, params)
        length = arguments[0].shape[names[0].index(LENGTH)] if LENGTH in names[0] and results is None else 0
        padding = -length % (self.shards(LENGTH) * multiple)

        def pad(array: jax.Array | None, names: Sequence[str | None]) -> jax.Array | None:
            if array is None or LENGTH not in names or not padding:
                return array
            return jnp.pad(array, [(0, padding if name == LENGTH else 0) for name in names])

        def stored(path: Any, leaf: jax.Array) -> PartitionSpec:
            return self.spec(leaf.shape, _param_axes(f"{root}/{_path_name(path)}", leaf.ndim), PARAM_RULES)

        def without_constraints(*arguments: Any) -> Any:
            if params is not None:
                arguments = *arguments[:-1], _all_gather_tree(arguments[-1], specs[-1])
            with use_sharding(None), use_collectives(Collectives()):
                return function(*arguments)

        arguments = [pad(array, own) for array, own in zip(arguments, names, strict=True)]
        specs = [None if a is None else self.spec(a.shape, own) for a, own in zip(arguments, names, strict=True)]
        out_specs = specs[0] if results is None else tuple(self.sharding(*own).spec for own in results)
        if params is not None:
            arguments.append(params)
            specs.append(jax.tree_util.tree_map_with_path(stored, params))
        mapped = jax.shard_map(
            without_constraints, mesh=self.mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False
        )
        result = mapped(*arguments)
        return result[:, :length] if padding else result


def _all_gather_tree(shards: Any, specs: Any) -> Any:
    """Returns the whole arrays of a tree of a device's shards, inside `shard_map`; gradients leave as the shards are.

    They are summed as one array on a ring (`seqpe_jax.ring`): where an axis of the mesh spans two sides of a slice, a TPU's
    compiler makes their reduce-scatters one all-reduce of whole arrays, for which the devices wait.

    Args:
      shards: tree of arrays of one dtype.
      specs: tree of PartitionSpecs, each with at most one dimension that is split.
    """
    leaves, structure = jax.tree.flatten(shards)
    dimensions = [_split_dimension(spec) for spec in structure.flatten_up_to(specs)]

    @jax.custom_vjp
    def gather(leaves: list[jax.Array]) -> list[jax.Array]:
        return [
            leaf if names is None else jax.lax.all_gather(leaf, names, axis=dimension, tiled=True)
            for leaf, (dimension, names) in zip(leaves, dimensions, strict=True)
        ]

    def scatter(_: None, gradients: list[jax.Array]) -> tuple[list[jax.Array]]:
        gradients = list(gradients)
        for axes in sorted({names for _, names in dimensions if names}):
            group = [number for number, (_, names) in enumerate(dimensions) if names == axes]
            parts = [jnp.moveaxis(gradients[number], dimensions[number][0], 0) for number in group]
            for number, part in zip(group, _reduce_scatter_together(parts, axes), strict=True):
                gradients[number] = jnp.moveaxis(part, 0, dimensions[number][0])
        return (gradients,)

    gather.defvjp(lambda leaves: (gather(leaves), None), scatter)
    return jax.tree.unflatten(structure, gather(leaves))


def _split_dimension(spec: PartitionSpec) -> tuple[int, tuple[str, ...] | None]:
    """Returns the dimension of an array that is split, and over which mesh axes; (0, None) if there is none."""
    for dimension, names in enumerate(spec):
        if names is not None:
            return dimension, names if isinstance(names, tuple) else (names,)
    return 0, None


def _reduce_scatter_together(arrays: Sequence[jax.Array], mesh_axes: tuple[str, ...]) -> list[jax.Array]:
    """Returns this device's shard of the sum over devices of each array, along the first dimension, inside `shard_map`."""
    shards, lanes = jax.lax.axis_size(mesh_axes), 1024  # rows of whole tiles of a TPU
    packed = jnp.concatenate([array.reshape(shards, -1) for array in arrays], axis=1)
    columns = packed.shape[1]
    packed = jnp.pad(packed, ((0, 0), (0, -columns % lanes))).reshape(shards, -1, lanes)
    summed = reduce_scatter(packed, 0, mesh_axes).reshape(-1)[:columns]
    ends = np.cumsum([array.size // shards for array in arrays])
    return [
        part.reshape(len(array) // shards, *array.shape[1:])
        for array, part in zip(arrays, jnp.split(summed, ends[:-1]), strict=True)
    ]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch [B, ...]."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Refuses a batch whose accumulated parts the mesh does not divide. Raises: InputError."""
    part, parts = batch_size // accumulate, batch_shards(mesh)
    if part % parts:
        raise InputError(
            f"microbatch size {part} (batch_size={batch_size} / {accumulate}) is not divisible by mesh.data x mesh.fsdp = "
            f"{parts}: use a multiple of {parts * accumulate} as batch_size"
        )


@functools.lru_cache(maxsize=8)  # called for each batch
def shards_by_process(mesh: Mesh) -> dict[int, list[int]]:
    """Returns the indices of the batch shards on each process's devices, rising, by process index.

    A batch has `batch_shards(mesh)` equal shards of consecutive rows. Those of one process need not be consecutive: the mesh
    follows the network, and on a TPU slice a process has a block of 2 x 2 chips. Processes among which `tensor` or `context`
    is split have the same shards.
    """
    count = batch_shards(mesh)
    held: dict[int, set[int]] = {}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((count,)).items():
        held.setdefault(device.process_index, set()).add(part.indices(count)[0])
    return {process: sorted(parts) for process, parts in sorted(held.items())}


def rows_by_process(mesh: Mesh, batch_size: int) -> dict[int, list[int]]:
    """Returns the indices of the rows of a batch that each process reads, by process index, shard after shard.

    Args:
      mesh: mesh of the run.
      batch_size: a multiple of `batch_shards(mesh)` (`check_batch`).
    """
    size = batch_size // batch_shards(mesh)
    return {
        process: [part * size + row for part in parts for row in range(size)]
        for process, parts in shards_by_process(mesh).items()
    }


class UnshardedDim(NamedTuple):
    """A parameter's dimension that is replicated because its mesh axes do not divide it.

    Attributes:
      parameter: its path.
      size: size of the dimension.
      over: the mesh axes, with their sizes.
      bytes: additional memory on each device, in bytes.
    """

    parameter: str
    size: int
    over: str
    bytes: int


def describe_unsharded(dims: Sequence[UnshardedDim], shown: int = 5) -> str:
    """Returns a line on the replicated dimensions and their memory cost."""
    names = ", ".join(f"{dim.parameter} ({dim.size} over {dim.over})" for dim in dims[:shown])
    more = f" and {len(dims) - shown} more" if len(dims) > shown else ""
    extra = sum(dim.bytes for dim in dims) / 2**20
    return f"replicated, since the mesh axes do not divide them, at {extra:,.1f} MiB more: {names}{more}"


def abstract_state_with_shardings(mesh: Mesh, abstract_state: Any) -> tuple[Any, list[UnshardedDim]]:
    """Adds shardings to the shapes of a train state; also returns the dimensions that could not be sharded.

    Arrays of the optimizer state that have the shape of their parameter are split as it is; the others are replicated.

    Args:
      mesh: mesh of the run.
      abstract_state: tree of ShapeDtypeStructs, with parameters below "model" and "encoding".

    Raises:
      ValueError: a parameter matches no pattern of `PARAM_AXES`; a new one needs a line there.
    """
    unsharded: list[UnshardedDim] = []
    leaves = jax.tree_util.tree_leaves_with_path(abstract_state)
    params = {_path_name(path): leaf.shape for path, leaf in leaves}

    def spec_of(path: Any, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        keys = _path_name(path).split("/")
        roots = [index for index, key in enumerate(keys) if key in ("model", "encoding")]
        if not leaf.ndim or not roots:  # counters, the random key
            return PartitionSpec()
        name = "/".join(keys[roots[-1] :])
        if keys[0] != "params" and params.get(f"params/{name}") != leaf.shape:  # such as sums of rows and columns
            return PartitionSpec()
        spec: list[Any] = [None] * leaf.ndim
        for dimension, logical in enumerate(_param_axes(name, leaf.ndim)):
            axes = [axis for axis in PARAM_RULES.get(logical, ()) if mesh.shape[axis] > 1]
            shards = math.prod(mesh.shape[axis] for axis in axes)
            if axes and leaf.shape[dimension] % shards == 0:
                spec[dimension] = tuple(axes)
            elif axes and keys[0] == "params":
                size = leaf.size * leaf.dtype.itemsize
                over = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
                unsharded.append(UnshardedDim(name, leaf.shape[dimension], over, size - size // shards))
        return PartitionSpec(*spec)

    def with_sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec_of(path, leaf)))

    return jax.tree_util.tree_map_with_path(with_sharding, abstract_state), unsharded


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _path_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _param_axes(name: str, count: int) -> tuple[str | None, ...]:
    """The logical names of a parameter's `count` dimensions. Raises: ValueError: no pattern matches."""
    names = next((names for pattern, names in PARAM_AXES.items() if fnmatch.fnmatchcase(name, pattern)), None)
    if names is None:
        raise ValueError(
            f"no rule of distributed.sharding.PARAM_AXES gives the dimensions of parameter {name}: add one"
        )
    return ((None,) * count + names)[-count:]


def from_local_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the global arrays of a batch from this process's rows (`rows_by_process`)."""
    sharding, count = batch_sharding(mesh), batch_shards(mesh)
    parts = shards_by_process(mesh)[jax.process_index()]

    def global_array(value: np.ndarray) -> jax.Array:
        size = len(value) // len(parts)
        shape = (size * count, *value.shape[1:])

        def part_at(index: tuple[slice, ...]) -> np.ndarray:
            first = size * parts.index(index[0].indices(shape[0])[0] // size)
            return value[first : first + size]

        return jax.make_array_from_callback(shape, sharding, part_at)

    return {name: global_array(value) for name, value in batch.items()}


def from_full_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the global arrays of a batch of which every process has all rows."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(value.shape, sharding, value.__getitem__) for name, value in batch.items()
    }
