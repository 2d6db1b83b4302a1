"""Collectives of a compiled program: kind, device groups, count and bytes, from its HLO text."""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from seqpe_jax.profiling.hlo import HloModule, Instruction, array_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
REDUCE_SCATTER = "all-reduce-scatter"  # name of the computations that a TPU's compiler fuses a reduce-scatter into
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind between the same devices, in one run of a program.

    Attributes:
      kind: one of `KINDS`.
      groups: device numbers in the mesh that communicate with each other; () = all devices.
      count: number of executions.
      bytes: bytes of the arrays on one device that are reduced or sent, or of the result of an all-gather.
      hidden: it runs in the background, while other instructions run; else the device waits for it.
      largest: most bytes of one execution.
    """

    kind: str
    groups: Groups
    count: int
    bytes: int
    hidden: bool = False
    largest: int = 0

    def bytes_received(self, devices: int) -> float:
        """Returns the least bytes that must enter each device, with any algorithm.

        Args:
          devices: devices of the mesh.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.bytes)
        together = max(map(len, self.groups), default=devices)
        return self.bytes * (together - 1) / together * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Collectives of one device in one run of a program.

    Attributes:
      collectives: collectives by kind and devices.
      unknown_trip_loops: loops with collectives whose trip count is unknown; they count once.
    """

    collectives: tuple[Collective, ...]
    unknown_trip_loops: int

    @property
    def by_kind(self) -> dict[str, dict[str, int]]:
        """Kind -> {"count", "bytes"}."""
        found: dict[str, dict[str, int]] = {}
        for kind in KINDS:
            of = [one for one in self.collectives if one.kind == kind]
            if of:
                found[kind] = {"count": sum(one.count for one in of), "bytes": sum(one.bytes for one in of)}
        return found


def collectives(program: HloModule) -> Collectives:
    """Returns the collectives of a program: loop bodies times their trip counts, and all branches of a conditional."""
    totals: dict[tuple[str, Groups, bool], list[int]] = {}
    counted: set[tuple[str, str]] = set()
    fused = Counter(
        _fused_part(program, computation, one)
        for computation, one in program.instructions()
        if one.opcode in KINDS and not computation.startswith(REDUCE_SCATTER)
    )
    for computation, one in program.instructions():
        sent = _between_slices(one)
        kind = sent or one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        hidden = bool(sent) or one.opcode.endswith("-start")
        # A TPU's reduce-scatter is an all-reduce fused with a slice of its result.
        if kind == "all-reduce" and computation.startswith(REDUCE_SCATTER):
            kind = "reduce-scatter"
        # A TPU's compiler fuses an asynchronous collective with each product that hides it; they share its channel.
        elif all(part := _fused_part(program, computation, one)):
            if part in counted:
                continue
            counted.add(part)
            hidden = fused[part] > 1
        groups = device_groups(one)
        if groups and max(map(len, groups)) == 1:  # each device with itself
            continue
        operand_bytes = sum(array_bytes(operand.shape) for operand in program.operands(computation, one))
        result_bytes = array_bytes(one.shape) - (operand_bytes if one.opcode == "all-gather-start" else 0)
        operands_alone = sent or kind == "collective-permute"  # their result includes their operands
        count = program.execution_counts[computation]
        size = operand_bytes if operands_alone else max(operand_bytes, result_bytes)
        total = totals.setdefault((kind, groups, hidden), [0, 0, 0])
        total[:] = total[0] + count, total[1] + count * size, max(total[2], size)
    each = [
        Collective(kind, groups, count, size, hidden, largest)
        for (kind, groups, hidden), (count, size, largest) in totals.items()
    ]
    order = sorted((one for one in each if one.count), key=lambda one: (KINDS.index(one.kind), -one.bytes))
    return Collectives(tuple(order), program.unknown_trip_loops(KINDS))


def _fused_part(program: HloModule, computation: str, one: Instruction) -> tuple[str, str]:
    """Returns (computation that has the fusion with a collective, its channel); "" for what it does not have."""
    return program.enclosing_computations.get(computation, ""), one.attribute("channel_id")


def _between_slices(one: Instruction) -> str:
    """Returns the kind of a collective between TPU slices, which is a transfer to the host in HLO; "" for others."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest) if one.opcode == "send" else None
    return found.group(1).lower().replace("_", "-") if found else ""


def device_groups(one: Instruction) -> Groups:
    """Returns the groups of devices that communicate in a collective; () = all devices."""
    return _groups(one.rest)


@functools.cache
def _groups(rest: str) -> Groups:
    """Parses XLA's notations of groups: pairs, lists, a reshaped range, axes of a mesh, and slices with their devices."""
    if found := re.search(r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}"', rest):
        slices, each = len(_numbers(found.group(1))), int(found.group(2)) + 1
        return _rows(np.arange(slices * each).reshape(slices, each).T)
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", rest):
        return _listed(found.group(1))
    if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", rest):
        return _listed(found.group(1))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _rows(_range(found.group(2)).reshape(_numbers(found.group(1))))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(([^{]*)\))? ?\{([^}]*)\}", rest):
        return _of_mesh(*found.groups())
    return ()


def _listed(text: str) -> Groups:
    return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(int(number) for number in row) for row in array)


def _range(text: str) -> np.ndarray:
    """Returns the numbers of a range in the order of [2,4]T(1,0): reshaped to these sides and transposed."""
    sides = _numbers(text[1 : text.index("]")])
    array = np.arange(math.prod(sides)).reshape(sides)
    if order := re.search(r"T\(([\d,]+)\)", text):
        array = array.transpose(_numbers(order.group(1)))
    return array.reshape(-1)


def _of_mesh(axes: str, devices: str | None, along: str) -> Groups:
    """Returns the groups along some axes of a mesh.

    Args:
      axes: sizes of the mesh, "'a'=2,'b'=4".
      devices: their order; None = ascending.
      along: axes over which a group extends, or parts of them such as a:(4)2.
    """
    names = [(name, int(size)) for name, size in re.findall(r"'?(\w+)'?=(\d+)", axes)]
    wanted = re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?(?:,|$)", along.replace(" ", ""))
    parts = {name: (int(before or 1), int(size) if size else 0) for name, before, size in wanted if name}
    sides, chosen = [], []
    for name, size in names:
        before, part = parts.get(name, (size, 1))
        part = part or size
        for side, inside in ((before, False), (part, True), (size // before // part, False)):
            chosen += [len(sides)] if inside and name in parts else []
            sides.append(side)
    count = math.prod(sides)
    order = (
        _range(devices) if devices and "[" in devices else np.array(_numbers(devices)) if devices else np.arange(count)
    )
    others = [axis for axis in range(len(sides)) if axis not in chosen]
    together: Sequence[int] = [sides[axis] for axis in chosen]
    return _rows(order.reshape(sides).transpose(others + chosen).reshape(-1, math.prod(together)))
