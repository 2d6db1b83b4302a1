"""Options of XLA with which a training step is compiled, by platform, chip and mesh.

They are given to the compiler with the step, so that `aot` compiles for a slice what `train` compiles on it, and an option
that an installed XLA does not know is found by compiling a tiny program, not by the end of the process, as in XLA_FLAGS.

Sources: MaxText (benchmarks/xla_flags_library.py, its configs for v5e, v5p and v6e, and for A3 machines), NVIDIA's
JAX-Toolbox (docs/GPU_performance.md), axlearn (common/compiler_options.py).
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from seqpe_jax.errors import InputError

AUTO = "auto"
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
HARMLESS = ("--xla_force_host_platform_device_count", "--xla_dump")
Value = bool | int | str
Options = dict[str, Value]

# Gathers of sharded weights run while the matrix units compute ("continuation fusion").
TPU_OVERLAP: Options = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# Between slices, over the data center's network: the sum of one layer's gradients runs while those of the next are computed.
TPU_SLICES: Options = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}
# By device kind. TPU7x gathers on its SparseCores by default, which excludes the fusion.
TPU_KINDS: dict[str, Options] = {
    "TPU v4": TPU_OVERLAP,
    "TPU v5 lite": TPU_OVERLAP,
    "TPU v5e": TPU_OVERLAP,
    "TPU v5": TPU_OVERLAP,
    "TPU v5p": TPU_OVERLAP,
    "TPU v6 lite": TPU_OVERLAP,
    "TPU v6e": TPU_OVERLAP,
    "TPU7x": {},
}
GPU_OVERLAP: Options = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
}
# Collectives of a GPU are combined up to the bytes of a layer: its gathered weights, and its gradients.
GPU_GATHER = "xla_gpu_all_gather_combine_threshold_bytes"
GPU_GRADIENTS = ("xla_gpu_reduce_scatter_combine_threshold_bytes", "xla_gpu_all_reduce_combine_threshold_bytes")
LEAST_COMBINED = 2**25  # about XLA's default, 30 MB
MOST_COMBINED = 2**30  # more delays the first collective without gain in bandwidth


def platform_options(
    platform: str, kind: str, *, devices: int, slices: int = 1, layer_params: int = 0, compute_bytes: int = 4
) -> Options:
    """Returns the options of a training step where the user names none.

    Args:
      platform: "cpu", "gpu" or "tpu".
      kind: JAX's device kind.
      devices: number of devices.
      slices: number of TPU slices.
      layer_params: parameters of a layer of the network.
      compute_bytes: bytes of a gathered weight.
    """
    if devices == 1 or platform not in ("gpu", "tpu"):
        return {}
    if platform == "tpu":
        return TPU_KINDS.get(kind, {}) | (TPU_SLICES if slices > 1 else {})
    gradients = dict.fromkeys(GPU_GRADIENTS, _combined(4 * layer_params))
    return GPU_OVERLAP | {GPU_GATHER: _combined(compute_bytes * layer_params)} | gradients


def _combined(size: int) -> int:
    """Returns a number of bytes, rounded up to a power of two within the limits."""
    return min(max(1 << max(0, size - 1).bit_length(), LEAST_COMBINED), MOST_COMBINED)


def parse_options(given: Sequence[str]) -> Options:
    """Returns options NAME=VALUE by name, the last of each name; `AUTO` is left out."""
    pairs = (text.partition("=")[::2] for text in given if text != AUTO)
    return {name: _parse_value(value) for name, value in pairs}


def _parse_value(value: str) -> Value:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if re.fullmatch(r"-?\d+", value) else value


def format_options(options: Mapping[str, Value]) -> tuple[str, ...]:
    """Returns options as NAME=VALUE, as `parse_options` reads them."""
    return tuple(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()
    )


def resolve(given: Sequence[str], automatic: Options, device: jax.Device) -> tuple[tuple[str, ...], str]:
    """Returns the options of a step as NAME=VALUE, and a line about automatic ones that are left out, or "".

    An automatic option is left out where a variable of the environment names it, or where the installed XLA does not know it.

    Args:
      given: `mesh.compiler_options`.
      automatic: what `AUTO` stands for.
      device: device to compile for.

    Raises:
      InputError: the installed XLA does not know an option that the user names.
    """
    own, from_environment = parse_options(given), environment_flags()
    chosen = {}
    if AUTO in given:
        chosen = {name: value for name, value in automatic.items() if name not in from_environment and name not in own}
    refused = refused_options(format_options(chosen | own), device) if chosen or own else {}
    for name in own:
        if name in refused:
            raise InputError(
                f"mesh.compiler_options: the compiler for {device.platform} refuses {format_options({name: own[name]})[0]} "
                f"({refused[name]}): leave it out"
            )
    left_out = [name for name in chosen if name in refused]
    options = {name: value for name, value in (chosen | own).items() if name not in refused}
    return format_options(options), (
        f"options that this version of XLA refuses are left out: {', '.join(left_out)}" if left_out else ""
    )


def environment_flags() -> set[str]:
    """Returns the names of the flags with which this process compiles everything."""
    texts = (os.environ.get(name, "") for name in VARIABLES)
    return {name for text in texts for name in re.findall(r"--(?:no)?(\w+)", text)}


def environment_facts() -> dict[str, str]:
    """Returns the flags of this process by variable, without those that do not change a program."""
    return {
        name: " ".join(sorted(flag for flag in os.environ.get(name, "").split() if not flag.startswith(HARMLESS)))
        for name in VARIABLES
    }


@functools.cache
def refused_options(options: tuple[str, ...], device: jax.Device) -> dict[str, str]:
    """Returns the options that the compiler for a device refuses, with its reason, found by compiling a tiny program."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=sharding)
    program = jax.jit(lambda x: x + 1, out_shardings=sharding).lower(shape)

    def reason(some: Options) -> str:
        try:
            program.compile(compiler_options=some)
        except jax.errors.JaxRuntimeError as error:
            return str(error).splitlines()[0]
        return ""

    parsed = parse_options(options)
    if not reason(parsed):
        return {}
    return {name: found for name, value in parsed.items() if (found := reason({name: value}))}
