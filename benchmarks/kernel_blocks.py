"""Which tiles of the TPU attention kernels compile for a chip, and how much of its vector memory they take.

python benchmarks/kernel_blocks.py --chip=v5e                     the table of docs/performance.md
python benchmarks/kernel_blocks.py --chip=v5p --sizes=1024x1024   one size

Each size is compiled as forward pass and gradients of one window, without a TPU; needs libtpu. A size that does not fit is
one of the rows, not an error.
"""

import argparse
import pathlib
import re
import sys

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from seqpe_jax.axes import use_sharding  # noqa: E402
from seqpe_jax.distributed.sharding import MeshSharding, make_mesh  # noqa: E402
from seqpe_jax.encodings.position_signal import PositionSignal  # noqa: E402
from seqpe_jax.models.attention import attend  # noqa: E402
from seqpe_jax.models.attention_tpu import KernelBlocks  # noqa: E402
from seqpe_jax.profiling.aot import topology_devices  # noqa: E402

SIZES = ("256x256", "512x512", "512x1024", "1024x512", "1024x1024", "1024x2048", "2048x1024", "2048x2048")
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MIB = 2**20


def vector_memory(chip: str, blocks: KernelBlocks, length: int, width: int, features: int) -> str:
    """Returns the vector memory of the forward and the two backward kernels in MiB, or why they do not compile.

    Args:
      chip: one of `TOPOLOGIES`.
      blocks: sizes of the tiles.
      length: tokens of the window.
      width: of a head.
      features: width of position queries and keys, 0 = none.
    """
    mesh = make_mesh(1, 1, devices=topology_devices(TOPOLOGIES[chip])[:1])
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(width: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, length, 2, width), dtype, sharding=placed)

    position = (shape(features, jnp.float32),) * 2 if features else None

    def total(qkv: tuple[jax.Array, ...], position: tuple[jax.Array, ...] | None) -> jax.Array:
        with use_sharding(MeshSharding(mesh)):
            signal = PositionSignal(position_query_key=position)
            return attend(*qkv, signal, kind="flash", kernel_blocks=blocks).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(total, argnums=(0, 1))).lower((shape(width, jnp.bfloat16),) * 3, position)
    try:
        text = lowered.compile().as_text()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"[Ss]coped allocation with size ([\d.]+\w) and limit ([\d.]+\w)", str(error))
        if found is None:
            raise
        return f"does not fit: {found[1]} of {found[2]}"
    sizes = re.findall(r'tpu_custom_call.*?"memory_space":"1","offset":"\d+","size":"(\d+)"', text)
    return ", ".join(f"{int(size) / MIB:.1f}" for size in sizes)


def main() -> None:
    """Prints a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, default="v5e")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="queries x keys of a tile")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--features", type=int, default=16)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print("| queries x keys of a tile | vector memory of each kernel, MiB |\n| --- | --- |")
    for size in options.sizes:
        blocks = KernelBlocks(*map(int, size.split("x")))
        found = vector_memory(options.chip, blocks, options.length, options.width, options.features)
        print(f"| {size} | {found} |", flush=True)


if __name__ == "__main__":
    main()
