"""Parser of a compiled program's HLO text: computations, instructions, trip counts of loops, and bytes of arrays."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator

BITS = {"pred": 8, "bf16": 16, "token": 0} | {
    f"{letter}{bits}": bits for letter in "suf" for bits in (2, 4, 8, 16, 32, 64)
}

INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: NAME = SHAPE OPCODE(OPERANDS), REST."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, name: str) -> str:
        """Returns the computation, number or word that an attribute names, or ""."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else ""

    def int_list(self, name: str) -> list[int]:
        """Returns the numbers of an attribute such as dimensions={0,2}; [] without it."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.rest)
        return [int(number) for number in found.group(1).split(",") if number] if found else []

    def raw_attribute(self, name: str) -> str:
        """Returns all of an attribute up to the comma, such as the labels of a convolution; "" without it."""
        found = re.search(rf"\b{name}=([^,\s]+)", self.rest)
        return found.group(1) if found else ""

    def window_value(self, name: str, axis: int) -> int:
        """Returns a number of a convolution's window={size=2x3 pad=0_0x1_1 ...} along an axis; of pads, the first."""
        found = re.search(rf"\bwindow=\{{[^}}]*\b{name}=([\dx_-]+)", self.rest)
        return int(found.group(1).split("x")[axis].split("_")[0]) if found else 0

    @property
    def called_computations(self) -> list[str]:
        """Names of the computations that it calls."""
        found = CALLED.findall(self.rest)
        for names in BRANCHES.findall(self.rest):
            found += [name.strip().lstrip("%") for name in names.split(",")]
        return found


def array_bytes(shape: str, *, memory: str = "any") -> int:
    """Returns the bytes of an HLO shape such as `f32[2,3]{1,0:T(8,128)}`, or of all arrays of a tuple.

    Args:
      shape: text of the shape.
      memory: "any", or "hbm" for arrays in a device's main memory alone, not in a TPU's vector memory, semaphores or the
        host's memory.
    """
    total = 0
    for name, dimensions, layout in ARRAY.findall(shape):
        if memory == "hbm" and re.search(r"S\([1-9]\d*\)", layout):
            continue
        bits = BITS.get(name, 0)
        for side in filter(None, dimensions.split(",")):
            bits *= int(side)
        total += (bits + 7) // 8
    return total


def dimensions(shape: str) -> list[int]:
    """Returns the dimensions of an array's shape, or of the first array of a tuple."""
    found = ARRAY.search(shape)
    return [int(side) for side in found.group(2).split(",") if side] if found else []


class HloModule:
    """A parsed HLO module.

    Attributes:
      computations: {computation: {instruction name: instruction, in order}}.
      roots: {computation: name of the instruction that it returns}.
      entry: name of the computation that starts.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry = ""
        inside = ""
        for line in text.splitlines():
            if found := COMPUTATION.match(line):
                inside = found.group(2)
                self.computations[inside] = {}
                self.entry = inside if found.group(1) else self.entry
            elif inside and (found := INSTRUCTION.match(line)):
                made = _instruction(found.group(2), found.group(3))
                self.computations[inside][made.name] = made
                if found.group(1):
                    self.roots[inside] = made.name

    @functools.cached_property
    def execution_counts(self) -> Counter[str]:
        """Number of executions of each computation in one run; a loop of unknown trip count counts once."""
        return self._count(fused=True)

    @functools.cached_property
    def unfused_counts(self) -> Counter[str]:
        """The same, without computations inside one instruction: fused ones, and those applied to each element."""
        return self._count(fused=False)

    def _count(self, fused: bool) -> Counter[str]:
        found = Counter({self.entry: 1})
        for name in reversed(self._order):
            for one in self.computations[name].values():
                if fused or one.opcode in ("while", "conditional", "call", "async-start"):
                    trips = self.trip_count(name, one) if one.opcode == "while" else 1
                    for callee in one.called_computations:
                        found[callee] += found[name] * (1 if trips is None else trips)
        return found

    @functools.cached_property
    def _order(self) -> list[str]:
        """Names of the computations, each after those that it calls."""
        order: dict[str, None] = {}

        def visit(name: str) -> None:
            if name in order or name not in self.computations:
                return
            for one in self.computations[name].values():
                for callee in one.called_computations:
                    visit(callee)
            order[name] = None

        visit(self.entry)
        return list(order)

    @functools.cached_property
    def enclosing_computations(self) -> dict[str, str]:
        """{computation inside a fusion: computation that has the fusion instruction}."""
        found: dict[str, str] = {}

        def visit(name: str, home: str) -> None:
            if name not in found:
                found[name] = home
                for one in self.computations.get(name, {}).values():
                    for callee in one.called_computations:
                        visit(callee, home)

        for name, one in self.instructions(self.unfused_counts):
            for callee in one.called_computations if one.opcode == "fusion" else ():
                visit(callee, name)
        return found

    def unknown_trip_loops(self, opcodes: tuple[str, ...] = ()) -> int:
        """Returns the number of loops without a known trip count.

        Args:
          opcodes: count loops with one of these instructions alone; () = all.
        """

        @functools.cache
        def holds(name: str) -> bool:
            body = self.computations.get(name, {}).values()
            return any(
                one.opcode.removesuffix("-start") in opcodes or any(map(holds, one.called_computations)) for one in body
            )

        loops = [
            (name, one)
            for name, one in self.instructions()
            if one.opcode == "while" and self.trip_count(name, one) is None
        ]
        return sum(not opcodes or any(map(holds, one.called_computations)) for _, one in loops)

    def instructions(self, names: Counter[str] | None = None) -> Iterator[tuple[str, Instruction]]:
        """Yields (computation, instruction) for all instructions that are executed.

        Args:
          names: computations to look at; None = all.
        """
        for name in self.execution_counts if names is None else names:
            for one in self.computations.get(name, {}).values():
                yield name, one

    def operands(self, computation: str, one: Instruction) -> list[Instruction]:
        """Returns the operands of an instruction of a computation."""
        body = self.computations[computation]
        return [body[name] for name in one.operands if name in body]

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """Returns the trip count of a loop that counts from one constant up to another; None for any other loop."""
        if found := re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', loop.rest):
            return int(found.group(1))
        condition, body = loop.attribute("condition"), loop.attribute("body")
        test = self.defining_instruction(condition, self.roots.get(condition, ""))
        if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, limit = (self.defining_instruction(condition, name) for name in test.operands)
        if counter is None or counter.opcode != "get-tuple-element":
            return None
        index = int(counter.attribute("index"))
        step = self.defining_instruction(body, self.loop_output(body, index))
        if step is None or step.opcode != "add" or not all(step.operands):
            return None
        first, last = (
            self.initial_constant(computation, loop, index),
            self.constant_in_loop(computation, loop, condition, limit),
        )
        sides = [self.defining_instruction(body, name) for name in step.operands]
        by = [
            self.constant_in_loop(computation, loop, body, side)
            for side in sides
            if side != self.loop_input(body, index)
        ]
        if first is None or last is None or len(by) != 1 or not by[0] or by[0] < 0:
            return None
        return max(0, -(-(last - first) // by[0]))

    def defining_instruction(self, computation: str, name: str) -> Instruction | None:
        """Returns the instruction that computes a value, through copies and conversions."""
        one = self.computations.get(computation, {}).get(name)
        while one is not None and one.opcode in ("copy", "bitcast", "convert"):
            one = self.computations[computation].get(one.operands[0])
        return one

    def loop_output(self, body: str, index: int) -> str:
        """Returns the name of the value that a loop's body passes to the next iteration at an index."""
        root = self.defining_instruction(body, self.roots.get(body, ""))
        return root.operands[index] if root is not None and root.opcode == "tuple" else ""

    def loop_input(self, body: str, index: int) -> Instruction | None:
        """Returns the instruction by which a loop's body reads its carried value at an index."""
        found = [one for one in self.computations[body].values() if one.opcode == "get-tuple-element"]
        return next(
            (one for one in found if one.attribute("index") == str(index) and self.reads_parameter(body, one)), None
        )

    def reads_parameter(self, computation: str, one: Instruction) -> bool:
        """Returns whether an instruction takes an element of the computation's parameter."""
        source = self.computations[computation].get(one.operands[0])
        return source is not None and source.opcode == "parameter"

    def initial_constant(self, computation: str, loop: Instruction, index: int) -> int | None:
        """Returns the constant that a loop starts with at an index; None if it is no constant."""
        start = self.defining_instruction(computation, loop.operands[0])
        one = (
            self.defining_instruction(computation, start.operands[index])
            if start is not None and start.opcode == "tuple"
            else None
        )
        return _constant(one)

    def constant_in_loop(self, computation: str, loop: Instruction, inside: str, one: Instruction | None) -> int | None:
        """Returns the constant value of an instruction inside a loop, also one that the loop carries unchanged, else None."""
        if one is None or one.opcode != "get-tuple-element" or not self.reads_parameter(inside, one):
            return _constant(one)
        index = int(one.attribute("index"))
        body = loop.attribute("body")
        if self.defining_instruction(body, self.loop_output(body, index)) != self.loop_input(body, index):
            return None
        return self.initial_constant(computation, loop, index)


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.operands[0]):
        return None
    return int(one.operands[0])


def _instruction(name: str, line: str) -> Instruction:
    """Parses SHAPE OPCODE(OPERANDS), REST; the shape of a tuple has parentheses too."""
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    shape, line = line[:end], line[end:].lstrip()
    opening = line.index("(")
    closing = _closing(line, opening)
    operands = re.sub(r"/\*.*?\*/", "", line[opening + 1 : closing])
    names = tuple(part.strip().rpartition(" ")[2].lstrip("%") for part in operands.split(","))
    return Instruction(name, shape, line[:opening], names, line[closing + 1 :])


def _closing(line: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if not depth:
            return at
    raise ValueError(f"no closing parenthesis: {line[:80]}")
