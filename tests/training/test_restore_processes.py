"""Restoring on several processes: replicas of the same shards read a checkpoint once, all together."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from seqpe_jax.distributed.sharding import abstract_state_with_shardings, make_mesh
from seqpe_jax.training.checkpoint import Checkpointer
from tests.commands import ROOT

SHAPE = (256, 1024)
VALUES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
READER = """
import json, sys
import jax
import numpy as np
import tensorstore
from seqpe_jax.distributed.sharding import abstract_state_with_shardings, make_mesh
from seqpe_jax.training.checkpoint import Checkpointer

port, index, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
target = {"params": {"model": {"head": {"kernel": jax.ShapeDtypeStruct((256, 1024), np.float32)}}}}
mesh = make_mesh(2, 2)
found, _ = Checkpointer(folder, create=False).restore_params(abstract_state_with_shardings(mesh, target)[0]["params"], 1)
[metric] = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
kernel = found["model"]["head"]["kernel"]
sums = [float(np.asarray(shard.data, np.float64).sum()) for shard in kernel.addressable_shards]
print(json.dumps({"read": metric["values"][0]["value"], "sums": sums, "shape": kernel.sharding.shard_shape(kernel.shape)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    state = {"params": {"model": {"head": {"kernel": VALUES}}}}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state_with_shardings(make_mesh(4, 2), shapes)[0])
    checkpoints = Checkpointer(folder)
    checkpoints.save(1, jax.device_put(state, shardings), {})
    checkpoints.close()
    return folder


def read(folder):
    """What each of two processes with two devices reads."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(port), str(index), str(folder)],
            cwd=ROOT,
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert not any(process.returncode for process in started), ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


@pytest.mark.slow
def test_replicas_on_two_processes_read_a_checkpoint_once(folder):
    parts = [float(part.astype(np.float64).sum()) for part in np.split(VALUES, 2)]
    first, second = read(folder)
    for found in (first, second):
        assert found["shape"] == [SHAPE[0] // 2, SHAPE[1]] and found["sums"] == pytest.approx(parts)
    assert first["read"] > 0.9 * VALUES.nbytes > 10 * second["read"], (first, second)
