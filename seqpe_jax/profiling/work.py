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

from seqpe_jax.profiling.hlo import Hlo, Instruction, array_bytes, sides

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
class Work:
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
    loops: int


def work(program: Hlo) -> Work:
    """Returns what a device does in a program, loops times their turns; of branches all are counted."""
    flops = kernels = 0.0
    for name, one in program.each():
        counted = _flops(program, name, one)
        if counted is None:
            kernels += program.times[name]
        else:
            flops += program.times[name] * counted
    moved = cycles = 0.0
    for name, one in program.each(program.times_alone):
        moved += program.times_alone[name] * _moved(program, name, one)
        if found := re.search(r'"estimated_cycles":"(\d+)"', one.rest):
            cycles += program.times_alone[name] * int(found.group(1))
    return Work(flops, moved, int(kernels), cycles, program.open_loops(COMPUTING))


def _flops(program: Hlo, computation: str, one: Instruction) -> float | None:
    """The FLOPs of an instruction; None of a kernel that does not say."""
    if one.opcode == "dot":
        left = sides(program.operands(computation, one)[0].kind)
        return 2.0 * math.prod(sides(one.kind)) * math.prod(left[axis] for axis in one.listed("lhs_contracting_dims"))
    if one.opcode == "convolution":
        left, right = (sides(operand.kind) for operand in program.operands(computation, one))
        return _convolution(one, left, right)
    if one.opcode != "custom-call":
        return 0.0
    if found := re.search(r'"cost_estimate":\{"flops":"?(\d+)', one.rest):
        return float(found.group(1))
    target = re.search(r'custom_call_target="([^"]*)"', one.rest)
    if found := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.rest):  # cuBLAS, cuDNN, oneDNN
        left = sides(program.operands(computation, one)[0].kind)
        summed = [int(axis.strip('" ')) for axis in found.group(1).split(",") if axis]
        return 2.0 * math.prod(sides(one.kind)) * math.prod(left[axis] for axis in summed)
    silent = target is not None and re.search(r"tpu_custom_call|fmha|gemm|matmul|conv|triton", target.group(1))
    return None if silent else 0.0


def _convolution(one: Instruction, left: list[int], right: list[int]) -> float:
    """Multiplications and additions of those places of the window that lie inside, which are few where a TPU's compiler
    writes a batch of products as one convolution. Source: XLA's HloCostAnalysis::GetConvolutionFlops.
    """
    inputs, kernels, outputs = one.word("dim_labels").replace("->", "_").split("_")
    made = sides(one.kind)
    count = 2.0 * right[kernels.index("i")] * made[outputs.index("f")] * made[outputs.index("b")]
    for axis in sorted(filter(str.isdigit, kernels)):
        window = tuple(one.window(name, int(axis)) for name in ("stride", "lhs_dilate", "rhs_dilate", "pad"))
        count *= _inside(left[inputs.index(axis)], right[kernels.index(axis)], made[outputs.index(axis)], *window)
    return count


@functools.cache
def _inside(size: int, kernel: int, made: int, stride: int, dilate: int, spread: int, pad: int) -> int:
    """Pairs of a place of the result and one of the window that meet a number of the input along an axis."""
    results, places = np.arange(made)[:, None], np.arange(kernel)
    at = results * (stride or 1) + places * (spread or 1) - pad
    return int(((at >= 0) & (at % (dilate or 1) == 0) & (at // (dilate or 1) < size)).sum())


def _moved(program: Hlo, computation: str, one: Instruction) -> float:
    """The bytes of memory that an instruction which stands alone reads and writes."""
    if one.opcode in FREE or one.opcode.endswith("-done"):
        return 0.0
    operands = program.operands(computation, one)
    if one.opcode == "custom-call" and any(f'"{name}"' in one.rest for name in NOTHING):
        return 0.0
    if one.opcode == "fusion":
        inside = one.attribute("calls")
        made, taken = _passed_on(one)
        read = sum(_read(program, inside, at, operand.kind) for at, operand in enumerate(operands) if at not in taken)
        return read + _written(program, inside, program.roots.get(inside, ""), one.kind, made)
    if one.opcode in SLICES:
        return 2.0 * array_bytes(one.kind, of="hbm")
    if one.opcode == "dynamic-update-slice":
        return 2.0 * array_bytes(operands[1].kind, of="hbm")
    if one.opcode == "copy-start":  # its type holds both sides, and a semaphore
        return float(array_bytes(one.kind, of="hbm"))
    read = sum(array_bytes(operand.kind, of="hbm") for operand in operands)
    if one.opcode.endswith("-start"):  # its type may hold what was given, too
        return read + max(array_bytes(one.kind, of="hbm") - read, 0)
    return float(read + array_bytes(one.kind, of="hbm"))


def _read(program: Hlo, fused: str, index: int, kind: str) -> float:
    """The bytes that a fused computation reads of an operand, which is of that kind."""
    whole = array_bytes(kind, of="hbm")
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
            read += array_bytes(one.kind)
        elif one.opcode == "fusion":
            read += sum(_read(program, one.attribute("calls"), at, kind) for at in users)
        elif one.opcode != "dynamic-update-slice" or users != [0]:  # of which the operand is changed in place
            return float(whole)
    return min(read, float(whole))


def _passed_on(one: Instruction) -> tuple[set[int], set[int]]:
    """The results of a fusion that are operands as they were, and these operands: what a hidden collective holds.

    A single result has the number -1.
    """
    found = re.findall(
        r"\{(\d*)\}: \((\d+), \{\}\)", one.rest.partition("output_to_operand_aliasing=")[2].partition("calls=")[0]
    )
    return {int(made or -1) for made, _ in found}, {int(taken) for _, taken in found}


def _written(program: Hlo, fused: str, root: str, kind: str, passed: Iterable[int] = ()) -> float:
    """The bytes that a fused computation writes of a result of that kind; passed: results that it does not write."""
    if -1 in passed:
        return 0.0
    body = program.computations.get(fused, {})
    one = body.get(root)
    if one is None or not array_bytes(kind, of="hbm"):
        return float(array_bytes(kind, of="hbm"))
    if one.opcode == "tuple":
        made = [name for at, name in enumerate(one.operands) if at not in passed]
        return sum(_written(program, fused, name, body[name].kind) for name in made)
    while one.opcode == "bitcast" and one.operands[0] in body:
        one = body[one.operands[0]]
    if one.opcode == "dynamic-update-slice" and one.operands[1] in body:
        return float(array_bytes(body[one.operands[1]].kind))
    if one.opcode == "fusion":
        inside = one.attribute("calls")
        return min(_written(program, inside, program.roots.get(inside, ""), one.kind), array_bytes(kind, of="hbm"))
    return float(array_bytes(kind, of="hbm"))
