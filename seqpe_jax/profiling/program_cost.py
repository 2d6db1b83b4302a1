"""FLOPs and memory traffic of one device in a compiled program, from its HLO text.

FLOPs are those of matrix products and convolutions, also inside fusions, and of kernels with a cost estimate. Memory
traffic counts the operands and results of each instruction once: of a fusion as a whole; of an array that it slices or
updates in place, that part alone. Arrays in a TPU's vector memory cost nothing, copies to and from it do. Caches are not
modelled: on a CPU, the true traffic is smaller.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from seqpe_jax.profiling.hlo import HloModule, Instruction, array_bytes, dimensions

# Instructions without traffic of their own: names for values, and calls of computations that are counted instead.
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
    """Cost of one run of a program on one device.

    Attributes:
      flops: floating-point operations.
      bytes: read from and written to its memory.
      kernels: calls whose FLOPs are unknown and not counted.
      cycles: estimate of the compiler for its instructions, on TPUs; else 0.
      unknown_trip_loops: loops with computing instructions whose trip count is unknown; they count once.
    """

    flops: float
    bytes: float
    kernels: int
    cycles: float
    unknown_trip_loops: int


def program_cost(program: HloModule) -> ProgramCost:
    """Returns the cost of a program: loop bodies times their trip counts, and all branches of a conditional."""
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
    """Returns the FLOPs of an instruction; None for a kernel without a cost estimate."""
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
    """Returns the pairs of a result index and a window index that meet an input element along an axis."""
    results, offsets = np.arange(made)[:, None], np.arange(kernel)
    at = results * (stride or 1) + offsets * (spread or 1) - pad
    return int(((at >= 0) & (at % (dilate or 1) == 0) & (at // (dilate or 1) < size)).sum())


def _instruction_bytes(program: HloModule, computation: str, one: Instruction) -> float:
    """Returns the bytes of memory that an instruction outside a fusion reads and writes."""
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
        return 2.0 * array_bytes(one.shape, memory="hbm")
    if one.opcode == "dynamic-update-slice":
        return 2.0 * array_bytes(operands[1].shape, memory="hbm")
    if one.opcode == "copy-start":  # its type holds both sides, and a semaphore
        return float(array_bytes(one.shape, memory="hbm"))
    read = sum(array_bytes(operand.shape, memory="hbm") for operand in operands)
    if one.opcode.endswith("-start"):  # its type may hold what was given, too
        return read + max(array_bytes(one.shape, memory="hbm") - read, 0)
    return float(read + array_bytes(one.shape, memory="hbm"))


def _fusion_bytes_read(program: HloModule, fused: str, index: int, shape: str) -> float:
    """Returns the bytes that a fused computation reads of one operand."""
    size = array_bytes(shape, memory="hbm")
    body = program.computations.get(fused, {})
    names = {one.name for one in body.values() if one.opcode == "parameter" and one.operands == (str(index),)}
    if not size or not names:
        return float(size)
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
            return float(size)
    return min(read, float(size))


def _aliased(one: Instruction) -> tuple[set[int], set[int]]:
    """Returns (results, operands) of a fusion that alias each other, such as the buffers of an asynchronous collective.

    A single result has the number -1.
    """
    found = re.findall(
        r"\{(\d*)\}: \((\d+), \{\}\)", one.rest.partition("output_to_operand_aliasing=")[2].partition("calls=")[0]
    )
    return {int(made or -1) for made, _ in found}, {int(taken) for _, taken in found}


def _fusion_bytes_written(program: HloModule, fused: str, root: str, shape: str, passed: Iterable[int] = ()) -> float:
    """Returns the bytes that a fused computation writes of a result.

    Args:
      program: program that contains the computation.
      fused: name of the computation.
      root: name of the instruction that computes the result.
      shape: shape of the result.
      passed: numbers of the results that alias operands, and are not written.
    """
    if -1 in passed:
        return 0.0
    body = program.computations.get(fused, {})
    one = body.get(root)
    if one is None or not array_bytes(shape, memory="hbm"):
        return float(array_bytes(shape, memory="hbm"))
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
            array_bytes(shape, memory="hbm"),
        )
    return float(array_bytes(shape, memory="hbm"))
