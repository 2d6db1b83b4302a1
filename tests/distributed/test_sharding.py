"""The mesh takes all devices or says why not."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from seqpe_jax import config
from seqpe_jax.axes import BATCH, HEADS, LENGTH, MLP, WIDTH
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.errors import InputError
from seqpe_jax.profiling.aot import GENERATIONS
from seqpe_jax.profiling.collectives import collectives
from seqpe_jax.profiling.hlo import HloModule
from tests.tiny import ROOT
from tests.tpu_slices import topology_devices


def test_zero_takes_the_rest():
    assert layout.make_mesh(0, 2).shape == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    assert layout.make_mesh(0, 1, 2, 2).shape == {"data": 2, "fsdp": 1, "context": 2, "tensor": 2}


@pytest.mark.parametrize("data,fsdp", [(3, 1), (0, 3), (2, 2)])
def test_axes_that_do_not_fit_are_named(data, fsdp):
    with pytest.raises(InputError, match=f"mesh.data={data} x mesh.fsdp={fsdp} .* 8 devices"):
        layout.make_mesh(data, fsdp)


def test_an_axis_may_take_a_part_of_a_torus_side():
    """What `jax.make_mesh` refuses."""
    mesh = layout.make_mesh(0, 8, devices=topology_devices("v5p:4x4x4"))
    assert mesh.shape == {"data": 8, "fsdp": 8, "context": 1, "tensor": 1}
    spans = np.ptp([[chip.coords for chip in row] for row in mesh.devices[:, :, 0, 0]], axis=1)
    assert (spans.sum(axis=1) <= 4).all(), "8 chips of an axis lie together: half of a plane"


TOPOLOGIES = [f"{name}:{sides}" for name, (_, usual, _) in GENERATIONS.items() for sides in usual]
PAGES = sorted((ROOT / "configs").glob("*.py"))
SMALL = [name for name in TOPOLOGIES if len(topology_devices(name)) <= 256]
# (fsdp, context, tensor): those of the docs, axes that are wider than a host, and the mesh of each page in configs/.
MESHES = dict.fromkeys(
    ((1, 1, 1), (8, 1, 1), (16, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 4), (1, 4, 2), (1, 8, 1), (1, 1, 16))
    + tuple((mesh.fsdp, mesh.context, mesh.tensor) for mesh in (config.load(str(page)).mesh for page in PAGES))
)


def held_by(mesh, process, batch, monkeypatch):
    """Returns what each device of a process gets of its local part of a batch: device -> rows."""

    def assemble(shape, sharding, callback):
        return {d: callback(at) for d, at in sharding.devices_indices_map(shape).items() if d.process_index == process}

    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "make_array_from_callback", assemble)
    rows = layout.rows_by_process(mesh, len(batch))[process]
    found = layout.from_local_rows(mesh, {"tokens": batch[rows]})["tokens"]
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("topology, slices", [(name, 1) for name in TOPOLOGIES] + [(name, 2) for name in SMALL])
def test_the_processes_of_a_slice_hold_a_batch_together(topology, slices, monkeypatch):
    """Each row of a batch lies on the devices at its index of data and fsdp, and nowhere else."""
    devices = topology_devices(topology, slices)
    for fsdp, context, tensor in MESHES:
        if len(devices) // slices % (fsdp * context * tensor):
            continue
        mesh = layout.make_mesh(0, fsdp, context, tensor, devices)
        count = layout.batch_shards(mesh)
        grid = mesh.devices.reshape(count, -1)
        expected = {}
        for part, process in sorted({(part, one.process_index) for part, row in enumerate(grid) for one in row}):
            expected.setdefault(process, []).append(part)
        assert layout.shards_by_process(mesh) == expected
        if len(devices) > 64:
            continue
        batch = np.arange(count * 4).reshape(count * 2, 2)
        for process in expected:
            found = held_by(mesh, process, batch, monkeypatch)
            assert found.keys() == {device for device in devices if device.process_index == process}
            for part, row in enumerate(grid):
                for device in found.keys() & set(row):
                    np.testing.assert_array_equal(found[device], batch[2 * part : 2 * part + 2])


@pytest.mark.parametrize("number", [0, 2])
def test_data_is_split_over_slices_first(number):
    devices = topology_devices("v5e:4x4", 2)
    mesh = layout.make_mesh(0, 4, 2, 1, devices[::-1], number)
    assert mesh.shape == {"data": 4, "fsdp": 4, "context": 2, "tensor": 1}
    of_data = [{chip.slice_index for chip in part.flat} for part in mesh.devices]
    assert of_data == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(
    "devices, sizes, number, words",
    [
        (
            topology_devices("v5e:4x4", 2),
            (0, 1),
            3,
            "mesh.slices=3, but the 32 devices there are belong to 2 TPU slice.*=2, or 0",
        ),
        (topology_devices("v5e:4x4"), (0, 1), 2, "mesh.slices=2, but the 16 devices .* belong to 1 TPU slice"),
        (None, (0, 1), 2, "mesh.slices=2, but the 8 devices .* belong to 1 TPU slice"),
        (
            topology_devices("v5e:4x4", 2),
            (1, 16, 2),
            0,
            r"mesh.data=1 is not a multiple of the 2 TPU slices.*\(now 32\) .* 16",
        ),
        (
            topology_devices("v5e:4x4", 3)[:-8],
            (0, 1),
            0,
            "the TPU slices have 16, 16, 8 devices: give slices of one size",
        ),
    ],
)
def test_slices_that_do_not_fit_end_with_one_line(devices, sizes, number, words):
    with pytest.raises(InputError, match=words) as caught:
        layout.make_mesh(*sizes, devices=devices, slices=number)
    assert "\n" not in str(caught.value)


def test_a_pod_of_the_large_recipe():
    """16 x 16 chips, on which the first process has rows of two sides of its block."""
    mesh = layout.make_mesh(0, 16, devices=topology_devices("v5e:16x16"))
    parts, rows = layout.shards_by_process(mesh), layout.rows_by_process(mesh, 512)
    assert (len(parts), parts[0], rows[0]) == (64, [0, 1, 16, 17], [0, 1, 2, 3, 32, 33, 34, 35])


def test_a_batch_is_split_over_all_devices():
    mesh = layout.make_mesh(4, 2)
    batch = layout.from_local_rows(mesh, {"tokens": np.arange(32).reshape(16, 2)})["tokens"]
    assert batch.shape == (16, 2)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(jax.device_get(batch), np.arange(32).reshape(16, 2))


def state(**shapes):
    params = {"model": {}, "encoding": {}}
    for name, shape in shapes.items():
        node = params
        *path, last = name.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jax.ShapeDtypeStruct(shape, np.float32)
    return {"params": params, "opt_state": [{"mu": params, "count": jax.ShapeDtypeStruct((), np.int32)}]}


def test_each_parameter_lies_as_its_rule_says():
    found, whole = layout.abstract_state_with_shardings(
        layout.make_mesh(1, 2, 1, 4),
        state(
            model__token_embedding__embedding=(50257, 8),
            model__blocks_0__qkv__kernel=(8, 3, 4, 2),
            model__blocks__layers__mlp_out__kernel=(5, 32, 8),
            encoding__encoder__block_1__qkv__kernel=(7, 21),
        ),
    )
    for tree in (found["params"], found["opt_state"][0]["mu"]):
        specs = {
            "/".join(entry.key for entry in path): leaf.sharding.spec
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        assert specs == {
            "model/token_embedding/embedding": Spec(None, ("fsdp",)),
            "model/blocks_0/qkv/kernel": Spec(("fsdp",), None, ("tensor",), None),
            "model/blocks/layers/mlp_out/kernel": Spec(None, ("tensor",), ("fsdp",)),
            "encoding/encoder/block_1/qkv/kernel": Spec(None, None),
        }
    assert found["opt_state"][0]["count"].sharding.spec == Spec()
    held = 50257 * 8 * 4
    assert whole == [
        ("encoding/encoder/block_1/qkv/kernel", 7, "fsdp=2", 7 * 21 * 4 // 2),
        ("model/token_embedding/embedding", 50257, "tensor=4", held - held // 4),
    ]

    words = layout.describe_unsharded(whole, shown=1)
    assert words.endswith("at 1.2 MiB more: encoding/encoder/block_1/qkv/kernel (7 over fsdp=2) and 1 more")


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule .* parameter model/blocks_0/gate/kernel"):
        layout.abstract_state_with_shardings(layout.make_mesh(8, 1), state(model__blocks_0__gate__kernel=(8, 8)))


def sent_by(mesh, function, *arguments):
    """Collectives of a compiled function: (kind, whether between groups of fsdp, times, bytes of the largest)."""
    found = collectives(HloModule(jax.jit(function).lower(*arguments).compile().as_text()))
    per_group = mesh.size // mesh.shape["data"]
    return [(one.kind, max(one.groups[0]) >= per_group, one.count, one.largest) for one in found.collectives]


def abstract(mesh, shape, spec, dtype=np.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


@pytest.mark.parametrize("shape, names", [((16, 32), (WIDTH, MLP)), ((16, 32), (MLP, WIDTH))])
def test_a_gradient_is_summed_in_the_shards_that_are_stored(shape, names):
    """Between groups of fsdp, that is; the sum in a group is a reduce-scatter where the platform has one."""
    mesh = layout.make_mesh(2, 4)
    sharding = layout.MeshSharding(mesh)
    stored = sharding.spec(shape, names, layout.PARAM_RULES)

    def loss(kernel, x):
        return jnp.sin(x @ sharding.all_gather_param(kernel, names)).sum()

    sent = sent_by(
        mesh, jax.grad(loss), abstract(mesh, shape, stored), abstract(mesh, (8, 16), Spec(layout.BATCH_AXES))
    )
    assert [(kind, largest) for kind, between, _, largest in sent if between] == [("all-reduce", 16 * 32 * 4 // 4)]


def test_copies_for_each_shard_are_summed_once_for_all_layers():
    mesh = layout.make_mesh(2, 4)
    sharding = layout.MeshSharding(mesh)
    names = (BATCH, None, HEADS, None)

    def loss(field, x, copy):
        copies = sharding.copy_per_shard(field, BATCH, names[1:]) if copy else field

        def layer(x, _):
            return sharding.shard_map(lambda x, own: jnp.sin(x * own), (x, copies), (names, names)), None

        return jax.lax.scan(layer, x, None, length=3)[0].sum()

    arguments = abstract(mesh, (1, 8, 2, 4), Spec()), abstract(mesh, (8, 8, 2, 4), Spec(layout.BATCH_AXES))
    found = {copy: sent_by(mesh, jax.grad(functools.partial(loss, copy=copy)), *arguments) for copy in (True, False)}
    assert sum(count for _, _, count, _ in found[False]) >= 3
    # Over fsdp in parts that travel, in both directions of a ring of four; of one part alone over data.
    part = 8 * 2 * 4 * 4 // 4
    sums = [(between, kind, count, largest) for kind, between, count, largest in found[True] if kind != "all-gather"]
    assert sorted(sums) == [
        (False, "collective-permute", 3, part // 2),
        (False, "collective-permute", 3, part // 2),
        (True, "reduce-scatter", 1, part),
    ]


def test_every_row_of_the_pods_table_starts(monkeypatch):
    """Its slice takes its mesh, and processes read each row of its batch."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name, row in importlib.import_module("pods_table").ROWS.items():
        settings = config.load(
            f"{ROOT}/configs/{row.config}", {field: int(value) for field, value in row.fields.items()}
        )
        count, topology = re.fullmatch(r"(?:(\d+)x)?(v.*)", row.topology).groups(default="1")
        axes, devices = settings.mesh, topology_devices(topology, int(count))
        mesh = layout.make_mesh(axes.data, axes.fsdp, axes.context, axes.tensor, devices, axes.slices)
        layout.check_batch(mesh, settings.batch_size, settings.optimizer.accumulate)
        rows = layout.rows_by_process(mesh, settings.batch_size)
        assert {row for of in rows.values() for row in of} == set(range(settings.batch_size)), name


def test_arrays_in_use_are_split_where_they_divide():
    spec = layout.MeshSharding(layout.make_mesh(2, 1, 2, 2)).spec
    assert spec((4, 6, 2, 3), (BATCH, LENGTH, HEADS, None)) == Spec(("data", "fsdp"), ("context",), ("tensor",), None)
    assert spec((4, 7, 3), (BATCH, LENGTH, HEADS)) == Spec(("data", "fsdp"), None, None)
