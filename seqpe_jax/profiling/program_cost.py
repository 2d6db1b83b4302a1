"""What one device computes, and what it moves to and from its memory, in a compiled program, read from its HLO text.

FLOPs are those of matrix products and convolutions, wherever they are fused, and of kernels that say how many they take.
Memory traffic is what instructions read and write beside the first one that makes a value: a fusion its operands and
results once, of an array that it takes a slice of or changes in place that part alone. Arrays that a TPU's compiler keeps
in vector memory cost nothing, and the copies there and back do. Caches are not known of: on a CPU, the true traffic is
smaller.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from seqpe_jax.profiling.hlo import HloModule, Instruction, array_bytes, dimensions

# What moves nothing by itself: names for values, and instructions whose computations are looked at instead.
FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "async-start",
    "async-update",
    "async-done",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "domain",
}
SLICES = ("dynamic-slice", "slice", "gather")
COMPUTING = ("dot", "convolution", "custom-call")
NOTHING = ("AllocateBuffer", "Sharding", "AssumeGatherIndicesInBound")


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Of one device, in one run of a program.

    Attributes:
      flops: floating-point operations; bytes: read from and written to its memory.
      kernels: calls of which the text does not say how much they compute; their FLOPs are missing.
      cycles: that the compiler expects its instructions to take, where it says so (TPU), else 0; loops: as of
        `collectives.Collectives`, of those that compute.
    """

    flops: float
    bytes: float
    kernels: int
    cycles: float
    unknown_trip_loops: int


def program_cost(program: HloModule) -> ProgramCost:
    """Returns what a device does in a program, loops times their turns; of branches all are counted."""
    flops = kernels = 0.0
    for name, one in program.instructions():
        counted = _instruction_flops(program, name, one)
        if counted is None:
            kernels += program.execution_counts[name]
        else:
            flops += program.execution_counts[name] * counted
    moved = cycles = 0.0
    for name, one in program.instructions(program.unfused_counts):
        moved += program.unfused_counts[name] * _instruction_bytes(program, name, one)
        if found := re.search(r'"estimated_cycles":"(\d+)"', one.rest):
            cycles += program.unfused_counts[name] * int(found.group(1))
    return ProgramCost(flops, moved, int(kernels), cycles, program.unknown_trip_loops(COMPUTING))


def _instruction_flops(program: HloModule, computation: str, one: Instruction) -> float | None:
    """The FLOPs of an instruction; None of a kernel that does not say."""
    if one.opcode == "dot":
        left = dimensions(program.operands(computation, one)[0].shape)
        return (
            2.0
            * math.prod(dimensions(one.shape))
            * math.prod(left[axis] for axis in one.int_list("lhs_contracting_dims"))
        )
    if one.opcode == "convolution":
        left, right = (dimensions(operand.shape) for operand in program.operands(computation, one))
        return _convolution(one, left, right)
    if one.opcode != "custom-call":
        return 0.0
    if found := re.search(r'"cost_estimate":\{"flops":"?(\d+)', one.rest):
        return float(found.group(1))
    target = re.search(r'custom_call_target="([^"]*)"', one.rest)
    if found := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest):  # cuBLAS, cuDNN, oneDNN
        left = dimensions(program.operands(computation, one)[0].shape)
        summed = [int(axis.strip('" ')) for axis in found.group(1).split(",") if axis]
        return 2.0 * math.prod(dimensions(one.shape)) * math.prod(left[axis] for axis in summed)
    silent = target is not None and re.search(r"tpu_custom_call|fmha|gemm|matmul|conv|triton", target.group(1))
    return None if silent else 0.0


def _convolution(one: Instruction, left: list[int], right: list[int]) -> float:
    """Returns the multiplications and additions of window positions inside the input.

    They are few where a TPU's compiler writes a batch of products as one convolution. Source: XLA's
    HloCostAnalysis::GetConvolutionFlops.
    """
    inputs, kernels, outputs = one.raw_attribute("dim_labels").replace("->", "_").split("_")
    made = dimensions(one.shape)
    count = 2.0 * right[kernels.index("i")] * made[outputs.index("f")] * made[outputs.index("b")]
    for axis in sorted(filter(str.isdigit, kernels)):
        window = tuple(one.window_value(name, int(axis)) for name in ("stride", "lhs_dilate", "rhs_dilate", "pad"))
        count *= _window_pairs(left[inputs.index(axis)], right[kernels.index(axis)], made[outputs.index(axis)], *window)
    return count


@functools.cache
def _window_pairs(size: int, kernel: int, made: int, stride: int, dilate: int, spread: int, pad: int) -> int:
    """Pairs of a place of the result and one of the window that meet a number of the input along an axis."""
    results, places = np.arange(made)[:, None], np.arange(kernel)
    at = results * (stride or 1) + places * (spread or 1) - pad
    return int(((at >= 0) & (at % (dilate or 1) == 0) & (at // (dilate or 1) < size)).sum())


def _instruction_bytes(program: HloModule, computation: str, one: Instruction) -> float:
    """The bytes of memory that an instruction which stands alone reads and writes."""
    if one.opcode in FREE or one.opcode.endswith("-done"):
        return 0.0
    operands = program.operands(computation, one)
    if one.opcode == "custom-call" and any(f'"{name}"' in one.rest for name in NOTHING):
        return 0.0
    if one.opcode == "fusion":
        inside = one.attribute("calls")
        made, taken = _aliased(one)
        read = sum(
            _fusion_bytes_read(program, inside, at, operand.shape)
            for at, operand in enumerate(operands)
            if at not in taken
        )
        return read + _fusion_bytes_written(program, inside, program.roots.get(inside, ""), one.shape, made)
    if one.opcode in SLICES:
        return 2.0 * array_bytes(one.shape, of="hbm")
    if one.opcode == "dynamic-update-slice":
        return 2.0 * array_bytes(operands[1].shape, of="hbm")
    if one.opcode == "copy-start":  # its type holds both sides, and a semaphore
        return float(array_bytes(one.shape, of="hbm"))
    read = sum(array_bytes(operand.shape, of="hbm") for operand in operands)
    if one.opcode.endswith("-start"):  # its type may hold what was given, too
        return read + max(array_bytes(one.shape, of="hbm") - read, 0)
    return float(read + array_bytes(one.shape, of="hbm"))


def _fusion_bytes_read(program: HloModule, fused: str, index: int, shape: str) -> float:
    """The bytes that a fused computation reads of an operand, which is of that kind."""
    whole = array_bytes(shape, of="hbm")
    body = program.computations.get(fused, {})
    names = {one.name for one in body.values() if one.opcode == "parameter" and one.operands == (str(index),)}
    if not whole or not names:
        return float(whole)
    read = 0.0
    for one in body.values():
        users = [at for at, name in enumerate(one.operands) if name in names]
        if not users:
            continue
        if one.opcode == "bitcast":
            names.add(one.name)
        elif one.opcode in SLICES and users == [0]:
            read += array_bytes(one.shape)
        elif one.opcode == "fusion":
            read += sum(_fusion_bytes_read(program, one.attribute("calls"), at, shape) for at in users)
        elif one.opcode != "dynamic-update-slice" or users != [0]:  # of which the operand is changed in place
            return float(whole)
    return min(read, float(whole))


def _aliased(one: Instruction) -> tuple[set[int], set[int]]:
    """The results of a fusion that are operands as they were, and these operands: what a hidden collective holds.

    A single result has the number -1.
    """
    found = re.findall(
        r"\{(\d*)\}: \((\d+), \{\}\)", one.rest.partition("output_to_operand_aliasing=")[2].partition("calls=")[0]
    )
    return {int(made or -1) for made, _ in found}, {int(taken) for _, taken in found}


def _fusion_bytes_written(program: HloModule, fused: str, root: str, shape: str, passed: Iterable[int] = ()) -> float:
    """The bytes that a fused computation writes of a result of that kind; passed: results that it does not write."""
    if -1 in passed:
        return 0.0
    body = program.computations.get(fused, {})
    one = body.get(root)
    if one is None or not array_bytes(shape, of="hbm"):
        return float(array_bytes(shape, of="hbm"))
    if one.opcode == "tuple":
        made = [name for at, name in enumerate(one.operands) if at not in passed]
        return sum(_fusion_bytes_written(program, fused, name, body[name].shape) for name in made)
    while one.opcode == "bitcast" and one.operands[0] in body:
        one = body[one.operands[0]]
    if one.opcode == "dynamic-update-slice" and one.operands[1] in body:
        return float(array_bytes(body[one.operands[1]].shape))
    if one.opcode == "fusion":
        inside = one.attribute("calls")
        return min(
            _fusion_bytes_written(program, inside, program.roots.get(inside, ""), one.shape),
            array_bytes(shape, of="hbm"),
        )
    return float(array_bytes(shape, of="hbm"))
