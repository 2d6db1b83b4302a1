"""The memory that training needs at least, from the config alone: tracing a model that can never fit may take minutes."""

import math
import os
from collections.abc import Sequence

import jax

from seqpe_jax.config import Config
from seqpe_jax.distributed.hardware import find_chip
from seqpe_jax.errors import InputError

PARAMETER_BYTES = 4  # float32; optimizer and gradients come on top
ACTIVATION_BYTES = 2  # bfloat16
GIB = 2**30


def least_bytes(config: Config) -> tuple[int, int]:
    """Returns (bytes of the parameters, bytes of the states between layers in one pass), each less than it really is.

    Args:
      config: config of the run.
    """
    model = config.model
    width = model.width
    attention = 2 * width * model.heads * model.parts.head_width  # of queries, and of outputs
    layer = attention + 2 * width * (model.mlp_width or 4 * width)
    parameters = model.layers * layer + model.vocabulary * width
    examples = config.batch_size // config.optimizer.accumulate
    states = model.layers * examples * math.prod(config.grid) * width
    return PARAMETER_BYTES * parameters, ACTIVATION_BYTES * states


def device_memory(device: jax.Device) -> int:
    """Returns the bytes of memory of a device; those of a CPU are a share of the machine's. 0 = unknown."""
    chip = find_chip(device.device_kind)
    if chip is not None:
        return chip.memory
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", 0)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine // jax.local_device_count()


def check_memory(config: Config, devices: Sequence[jax.Device]) -> None:
    """Refuses a model or batch that cannot fit, however it is split over the devices.

    Args:
      config: config of the run.
      devices: all devices of the run.

    Raises:
      InputError: names the sizes and the fields that set them.
    """
    memory = [device_memory(device) for device in devices]
    available, (parameters, states) = sum(memory), least_bytes(config)
    if not all(memory) or parameters + states <= available:
        return
    model, positions = config.model, math.prod(config.grid)
    raise InputError(
        f"this training needs at least {(parameters + states) / GIB:,.0f} GiB, and the {len(devices)} device(s) have "
        f"{available / GIB:,.0f}: {parameters / GIB:,.1f} for the parameters of model.layers={model.layers} of "
        f"model.width={model.width}, {states / GIB:,.1f} for what these layers pass on of batch_size={config.batch_size} "
        f"examples of {positions} positions in optimizer.accumulate={config.optimizer.accumulate} pass(es): lower one of them, "
        "or accumulate more"
    )
