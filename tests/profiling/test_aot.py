"""The training step compiled for TPU slices: what fits, what does not, what cannot be; needs libtpu, and no TPU."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest

from seqpe_jax.distributed.compiler_options import TPU_OVERLAP, format_options
from seqpe_jax.errors import InputError
from seqpe_jax.profiling import aot
from tests.commands import ROOT, Commands

CONFIG = "tests/tiny_text.py"
SLICE = "v5e:2x2"


@pytest.fixture(scope="module")
def libtpu() -> str:
    """Where libtpu is, "" for this environment's own; installed into a folder of its own where it is not."""
    if importlib.util.find_spec("libtpu"):
        return ""
    pin = aot.libtpu()
    assert re.fullmatch(r"libtpu==[\d.*]+", pin)
    folder = pathlib.Path(tempfile.gettempdir()) / f"seqpe_jax_test_{re.sub('[^a-z0-9.]', '_', pin)}"
    if not (folder / "libtpu").is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={part}/new", pin]
            try:
                done = subprocess.run([*install, "--retries=1"], capture_output=True, text=True, timeout=300)
            except subprocess.TimeoutExpired:
                pytest.skip(f"{pin} cannot be installed within five minutes")
            if done.returncode:
                pytest.skip(f"{pin} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
            os.rename(f"{part}/new", folder)
    return str(folder)


@pytest.fixture(scope="module")
def commands(libtpu, tmp_path_factory):
    running = Commands(tmp_path_factory.mktemp("cache"), PYTHONPATH=libtpu)
    yield running
    running.close()


@pytest.mark.slow
def test_a_step_is_compiled_and_measured_without_data(commands, tmp_path):
    fields = ["--config.mesh.fsdp=2", "--config.optimizer.accumulate=2", "--config.data.paths=no-such-file"]
    output = tmp_path / "made" / "fits.json"
    result = commands("aot", f"--config={CONFIG}:rotary", f"--topology={SLICE}", f"--output={output}", *fields)
    assert result.code == 0, result.err
    found = json.loads(output.read_text())
    assert (found["topology"], found["devices"], found["chip"]) == (SLICE, 4, "TPU v5e")
    assert (found["mesh"]["data"], found["mesh"]["fsdp"]) == (2, 2)
    memory, parameters = found["memory"], 256 * 24 + 12 * 24**2
    # Matrices are split in two; biases and norms are whole.
    assert 0.5 * 4 * parameters <= memory["parameters"] < 0.7 * 4 * parameters
    assert memory["optimizer"] == 2 * memory["parameters"] + 4 * 4, "two moments, and the counters of two parts"
    assert memory["batch"] == 8 * 17 * 4 // 4
    parts = [memory[name] for name in memory if name not in ("total", "hbm", "shortfall")]
    assert sum(parts) == memory["total"] < memory["hbm"] == 16 * 2**30 and memory["shortfall"] == 0
    assert memory["temporaries"] > 0
    sent = found["collectives"]
    assert sent["all-gather"]["count"] > 0, "what fsdp splits in store is gathered"
    assert sum(one["bytes"] for one in sent.values()) > 4 * parameters / 2
    per_token = 2 * 12 * 24**2 + 4 * 16 * 24 + 2 * 24 * 256
    assert found["flops_full_attention"] == 3 * 8 * 16 * per_token
    assert found["flops"] == 3 * 8 * 16 * (per_token - 2 * 16 * 24)
    bound = found["roofline"]
    assert bound["flops"] == pytest.approx(found["flops_full_attention"] / 4, rel=0.05) and not bound["kernels"]
    assert bound["mfu"] == pytest.approx(found["flops"] / (4 * 197e12 * bound["seconds"]))
    assert bound["links"].keys() == {"x", "y"} and bound["compiler_s"] > 0 and bound["memory_s"] > 0
    assert "gather over fsdp (" in result.out and f"bound: {bound['bound']}; a step takes" in result.out
    assert re.search(r"\| total needed \| [\d.]+ \|", result.out) and "all-gather" in result.out


@pytest.mark.slow
def test_a_step_of_two_slices(commands, tmp_path):
    """Gradients are summed between slices over the network, of which nothing is known but the bytes."""
    output = tmp_path / "fits.json"
    fields = ["--config.mesh.fsdp=2", "--config.mesh.slices=2"]
    result = commands("aot", f"--config={CONFIG}:rotary", f"--topology=2x{SLICE}", f"--output={output}", *fields)
    assert result.code == 0, result.err
    found = json.loads(output.read_text())
    assert (found["topology"], found["devices"], found["rows"]) == (f"2x{SLICE}", 8, {"0": 4, "1": 4})
    assert found["mesh"] == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    [between] = [one for one in found["roofline"]["collectives"] if one["over"] == ["network"]]
    parameters = 256 * 24 + 12 * 24**2
    assert (between["kind"], between["axes"], between["seconds"]) == ("all-reduce", ["data"], None)
    assert between["bytes"] >= 4 * parameters / 4, "each device of a slice sends its own quarter"
    assert "2 process(es), each of which reads 4 row(s) of a batch" in result.out
    assert "what goes over the network, whose rate is not known, is not in the bound" in result.out


@pytest.mark.slow
def test_what_does_not_fit_ends_with_the_missing_bytes(commands):
    fields = ["--config.batch_size=1048576", "--config.mesh.fsdp=4"]
    result = commands("aot", f"--config={CONFIG}:rotary", f"--topology={SLICE}", *fields)
    assert result.code == 1, result.err
    short = re.search(r"does not fit: ([\d,]+) bytes short", result.err)
    assert short and int(short.group(1).replace(",", "")) > 2**30, result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    "topology, fields, words",
    [
        ("v5e:3x3", [], ["v5e:3x3", "Did you mean 'v5e:"]),
        (SLICE, ["--config.mesh.fsdp=3"], ["mesh.fsdp=3", "4 devices"]),
        (SLICE, ["--config.batch_size=6"], ["batch_size=6"]),
        (f"2x{SLICE}", ["--config.mesh.fsdp=8"], ["mesh.data=1", "2 TPU slices"]),
        (SLICE, ["--config.data.tokenizer=none.json"], ["none.json", "model.vocabulary"]),
    ],
)
def test_what_cannot_be_compiled_ends_with_one_line(commands, topology, fields, words):
    result = commands("aot", f"--config={CONFIG}:rotary", f"--topology={topology}", *fields)
    assert result.code == 2
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    "topology, words",
    [
        ("v9:2x2", "no TPU 'v9'"),
        ("v5e", "write v5e:AxB"),
        ("v5e:4x", "write v5e:AxB.* Did you mean 'v5e:4x"),
        ("v5p:4x4", "write v5p:AxBxC"),
        ("v5e:32x32", "1024 chips.*at most 256"),
        ("2xv9:2x2", "no TPU 'v9' .*2xv9:2x2.*or 2xv5e:4x4"),
        ("2xv5e:4x", "write v5e:AxB.* Did you mean 'v5e:4x"),
        ("0xv5e:4x4", "no TPU '0xv5e'"),
        ("999999xv5e:4x4", "15999984 chips: give at most 65536"),
    ],
)
def test_a_slice_that_does_not_exist(topology, words):
    with pytest.raises(InputError, match=words):
        aot.topology_devices(topology)


def test_without_libtpu_the_error_names_its_requirement(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match="pip install 'libtpu=="):
        aot.topology_devices(SLICE)


@pytest.mark.parametrize(
    "message, needed",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded", 23.5),
        ("the total memory required for HLO temporaries (32.79G) exceeds available HBM (15.75G).", 32.79),
    ],
)
def test_what_the_compiler_says_of_too_little_memory(message, needed):
    error = aot.jax.errors.JaxRuntimeError(message)
    assert aot._parse_out_of_memory(error) == (int(needed * 2**30), int(15.75 * 2**30))


def test_other_complaints_of_the_compiler_are_not_hidden():
    with pytest.raises(aot.jax.errors.JaxRuntimeError, match="something else"):
        aot._parse_out_of_memory(aot.jax.errors.JaxRuntimeError("INTERNAL: something else"))


LIBTPU = """
import jax

from seqpe_jax import config
from seqpe_jax.distributed import compiler_options as options
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.profiling import aot
from seqpe_jax.training.trainer import Trainer
from tests.tpu_slices import topology_devices

def facts(devices):
    return [
        (one.id, one.process_index, tuple(one.coords), one.core_on_chip, one.device_kind, one.platform,
         layout.slice_index(one))
        for one in devices
    ]

for name, (_, usual, _) in aot.GENERATIONS.items():
    for topology in (f"{name}:{sides}" for sides in usual):
        assert facts(aot.topology_devices(topology)) == facts(topology_devices(topology)), topology
    assert facts(aot.topology_devices(f"3x{name}:{usual[1]}")) == facts(topology_devices(f"{name}:{usual[1]}", 3)), name

settings = config.load("tests/tiny_text.py:seqpe", FIELDS)
run = Trainer.of(settings, aot.topology_devices("v5e:2x2"), data_available=False)
known = options.format_options(options.TPU_OVERLAP | options.TPU_SLICES)
print("refused", *options.refused_options(known + ("xla_tpu_no_such=true",), run.mesh.devices.flat[0]))
print("compiled with", *run.config.mesh.compiler_options)
"""
KERNELS = """
import jax

from seqpe_jax import config
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.profiling import aot
from seqpe_jax.training.trainer import Trainer

settings = config.load("tests/tiny_text.py:seqpe", FIELDS)
run = Trainer.of(settings, aot.topology_devices("v5e:2x2"), data_available=False)
split = layout.batch_sharding(run.mesh)
batch = {
    name: jax.ShapeDtypeStruct((settings.batch_size, *leaf.shape), leaf.dtype, sharding=split)
    for name, leaf in run.task.example.items()
}
text = run.jit_train_step().lower(run.abstract_state, batch).compile().as_text()
print("kernels", text.count('custom_call_target="tpu_custom_call"'))
products = [line for line in text.splitlines() if " convolution(" in line or " dot(" in line]
of_encoder = ["encoder" in line for line in products]
exact = ["operand_precision={highest,highest}" in line for line in products]
print("encoder exact", sum(of_encoder) > 3 and all(one for one, own in zip(exact, of_encoder) if own))
print("network fast", sum(not one for one, own in zip(exact, of_encoder) if not own) > 3)
"""
# The attention kernel alone where windows hold several documents, with heads of keys that two query heads share.
DOCUMENT_KERNELS = """
import jax
import jax.numpy as jnp

from seqpe_jax.models import attention_tpu
from seqpe_jax.models.attention_inputs import AttentionInputs
from seqpe_jax.profiling import aot

device = jax.sharding.SingleDeviceSharding(aot.topology_devices("v5e:2x2")[0])
array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=device)

def score(query, key, value, position, documents, offset):
    inputs = AttentionInputs(query, key, value, (position, position), documents=(documents, documents), causal_offset=offset)
    return attention_tpu.flash(inputs).astype(jnp.float32).sum()

key = array(jnp.bfloat16, 8, 1500, 2, 64)
arrays = array(jnp.bfloat16, 8, 1500, 4, 64), key, key, array(jnp.float32, 1, 1500, 1, 16)
arguments = *arrays, array(jnp.int32, 8, 1500), array(jnp.int32, 1)
text = jax.jit(jax.grad(score, argnums=(0, 1, 2, 3))).lower(*arguments).compile().as_text()
print("kernels", text.count('custom_call_target="tpu_custom_call"'))
"""
# Largest all-reduce over fsdp for which devices wait: of copies for shards, of a kernel with heads narrower than a TPU's lanes,
# and of the encoder's parameters where fsdp spans two sides of a slice.
WAITS = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from seqpe_jax.axes import BATCH, ENCODER_ROWS, HEADS, LENGTH, WIDTH, use_sharding
from seqpe_jax.distributed import sharding as layout
from seqpe_jax.distributed.hardware import find_chip
from seqpe_jax.encodings.seqpe import QKMap
from seqpe_jax.models.transformer import Linear
from seqpe_jax.profiling import aot
from seqpe_jax.profiling.collectives import collectives
from seqpe_jax.profiling.hlo import HloModule
from seqpe_jax.profiling.roofline import Interconnect

def largest(mesh, function, *arguments):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    links = Interconnect(mesh, find_chip(mesh.devices.flat[0].device_kind))
    found = [one for one in collectives(HloModule(text)).collectives if one.kind == "all-reduce" and not one.hidden]
    return max((one.largest for one in found if "fsdp" in links.mesh_axes(one.groups)), default=0)

def abstract(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

mesh = layout.make_mesh(16, 16, devices=aot.topology_devices("v5e:16x16"))
names = LENGTH, HEADS, None

def loss(field, x):
    copies = layout.MeshSharding(mesh).copy_per_shard(field, BATCH, names)
    layer = lambda total, _: (total + jnp.sin(copies * x * total), None)
    return jax.lax.scan(layer, jnp.ones_like(copies), None, length=3)[0].sum()

field = abstract(mesh, (1, 2048, 16, 16), None, ("context", "fsdp", "data"))
print(largest(mesh, jax.grad(loss), field, abstract(mesh, (256, 1, 1, 1), layout.BATCH_AXES)))

queries = Linear((0, 32, 64), (WIDTH, HEADS, None), jnp.bfloat16, jax.nn.initializers.zeros, bias_init=None)

def total(kernel, x):
    with use_sharding(layout.MeshSharding(mesh)):
        return jnp.sin(queries.apply({"params": {"kernel": kernel}}, x)).astype(jnp.float32).sum()

kernel, x = abstract(mesh, (2048, 32, 64), "fsdp"), abstract(mesh, (256, 4096, 2048), layout.BATCH_AXES)
print(largest(mesh, jax.grad(total), kernel, x))

mesh = layout.make_mesh(1, 16, devices=aot.topology_devices("v5e:4x4"))
encode = lambda rows, params: jnp.sin(rows @ params["encoder"]["block_0"]["mlp_in"]["kernel"])

def total(params, rows):
    split = ((ENCODER_ROWS, None),)
    return layout.MeshSharding(mesh).shard_map(encode, (rows,), split, params=params, root="encoding").sum()

params = {"encoder": {"block_0": {"mlp_in": {"kernel": abstract(mesh, (768, 3072), "fsdp")}}}}
print(largest(mesh, jax.grad(total), params, abstract(mesh, (4096, 768), "fsdp")))

qk_map = QKMap(None, jax.nn.initializers.zeros, 256)

def total(params, vectors):
    with use_sharding(layout.MeshSharding(mesh)):
        return jnp.sin(qk_map.apply({"params": params}, vectors)).sum()

params = {"kernel": abstract(mesh, (2048, 512), "fsdp"), "bias": abstract(mesh, (512,))}
print(largest(mesh, jax.grad(total), params, abstract(mesh, (1, 4096, 2048), None, "fsdp")))
"""
# Without the losses on vectors, which compile longest and hold no kernel.
FIELDS = {
    "data.length": 384,
    "encoding.max_position": 1000,
    "batch_size": 4,
    "mesh.tensor": 2,
    "mesh.context": 2,
    "encoding.rotary_pairs": 4,
    "encoding.rotary_heads": 1,
    "encoding.position_heads": 1,
    "encoding.feature_width": 3,
    "encoding.log_scaling": True,
    "objective.contrastive.weight": 0.0,
    "objective.distillation.weight": 0.0,
}


def printed(script: str, libtpu: str) -> list[str]:
    """Lines that a Python script prints in a process that finds libtpu."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if libtpu:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [libtpu, environment.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", script.replace("FIELDS", repr(FIELDS))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_devices_wait_for_no_large_sum_over_fsdp(libtpu):
    """Sums and gathers that a TPU's compiler makes all-reduces of whole arrays, where it is given all shards at once."""
    assert max(map(int, printed(WAITS, libtpu))) < 2**16, "bytes"


@pytest.mark.slow
def test_slices_on_libtpu(libtpu):
    """What `tests/tpu_slices.py` says of every slice, by which meshes are tested where libtpu is not.

    libtpu knows the compiler options of slices.
    """
    lines = dict(line.split(" ", 1) for line in printed(LIBTPU, libtpu) if line.startswith(("refused", "compiled")))
    assert lines["refused"] == "xla_tpu_no_such", "libtpu knows the options of slices"
    assert lines["compiled"].split()[1:] == list(format_options(TPU_OVERLAP))


@pytest.mark.long
def test_kernels_on_libtpu(libtpu):
    """The attention kernel in a step: forward, gradient of queries, gradient of keys, of the device's own heads and queries.

    The encoder's products are of float32 precision, the network's are not: every day, tests/models/test_precision.py.
    """
    lines = printed(KERNELS, libtpu)
    assert "kernels 6" in lines, "three for each half of a device's queries"
    assert "encoder exact True" in lines and "network fast True" in lines
    assert "kernels 3" in printed(DOCUMENT_KERNELS, libtpu), "with documents"
