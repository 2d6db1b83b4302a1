"""What devices send each other in a compiled program, read from its HLO text."""

import dataclasses
import functools
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")  # fmt: skip
BITS = {"pred": 8, "bf16": 16, "token": 0} | {f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)}

INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: NAME = KIND OPCODE(OPERANDS), REST."""

    name: str
    kind: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, name: str) -> str:
        """Returns the computation or number that an attribute names, or ""."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What one device does in one run of a program.

    Attributes:
      kinds: kind -> {"count", "bytes"}; bytes of an operation are those of its whole array on a device: of what is reduced
        or sent, of what has been gathered.
      loops: loops with collectives of which the text does not say how often they turn; these count for one turn.
    """

    kinds: dict[str, dict[str, int]]
    loops: int


def collectives(text: str) -> Collectives:
    """Returns the collectives of a compiled module, those in loops times their turns; of branches all are counted."""
    return _Module(text).collectives()


def array_bytes(kind: str) -> int:
    """Returns the bytes of an HLO type such as `f32[2,3]{1,0:T(8,128)}`, or of all arrays of a tuple."""
    total = 0
    for name, sides in ARRAY.findall(kind):
        bits = BITS.get(name, 0)
        for side in filter(None, sides.split(",")):
            bits *= int(side)
        total += (bits + 7) // 8
    return total


class _Module:
    """The computations of a module by name; instructions in order."""

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

    def collectives(self) -> Collectives:
        counts, sizes = self.sent(self.entry)
        names = [kind for kind in KINDS if counts[kind]]
        kinds = {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in names}
        return Collectives(kinds, counts["loops"])

    @functools.cache  # noqa: B019  a module is read once
    def sent(self, computation: str) -> tuple[Counter, Counter]:
        """Counts and bytes by kind in one run of a computation and of those that it calls."""
        counts, sizes = Counter(), Counter()
        body = self.computations.get(computation, {})
        for one in body.values():
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS:
                # A TPU's reduce-scatter is an all-reduce fused with the slice that a device keeps of it.
                if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                given = sum(array_bytes(body[name].kind) for name in one.operands if name in body)
                made = array_bytes(one.kind) - (given if one.opcode == "all-gather-start" else 0)
                permuted = kind == "collective-permute"  # its start returns what was given, too
                counts[kind] += 1
                sizes[kind] += given if permuted else max(given, made)
                continue
            turns = 1
            if one.opcode == "while":
                turns = self.turns(computation, one)
            for called in _called(one):
                inner_counts, inner_sizes = self.sent(called)
                if turns is None and any(inner_counts.values()):
                    counts["loops"] += 1
                for kind in inner_counts:
                    counts[kind] += inner_counts[kind] * (1 if kind == "loops" else turns or 1)
                    sizes[kind] += inner_sizes[kind] * (turns or 1)
        return counts, sizes

    def turns(self, computation: str, loop: Instruction) -> int | None:
        """How often a loop turns that counts up from one constant to another; None for any other."""
        if found := re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', loop.rest):
            return int(found.group(1))
        condition, body = loop.attribute("condition"), loop.attribute("body")
        test = self.follow(condition, self.roots.get(condition, ""))
        if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, limit = (self.follow(condition, name) for name in test.operands)
        if counter is None or counter.opcode != "get-tuple-element":
            return None
        index = int(counter.attribute("index"))
        step = self.follow(body, self.carried(body, index))
        if step is None or step.opcode != "add" or not all(step.operands):
            return None
        first, last = self.initial(computation, loop, index), self.value(computation, loop, condition, limit)
        sides = [self.follow(body, name) for name in step.operands]
        by = [self.value(computation, loop, body, side) for side in sides if side != self.entering(body, index)]
        if first is None or last is None or by != [1]:
            return None
        return max(0, last - first)

    def follow(self, computation: str, name: str) -> Instruction | None:
        """The instruction that a value comes from, past copies."""
        one = self.computations.get(computation, {}).get(name)
        while one is not None and one.opcode in ("copy", "bitcast", "convert"):
            one = self.computations[computation].get(one.operands[0])
        return one

    def carried(self, body: str, index: int) -> str:
        """The name of what a loop's body hands to its next turn at an index."""
        root = self.follow(body, self.roots.get(body, ""))
        return root.operands[index] if root is not None and root.opcode == "tuple" else ""

    def entering(self, body: str, index: int) -> Instruction | None:
        """The instruction by which a loop's body reads what it carries at an index."""
        found = [one for one in self.computations[body].values() if one.opcode == "get-tuple-element"]
        return next((one for one in found if one.attribute("index") == str(index) and self.is_parameter(body, one)), None)

    def is_parameter(self, computation: str, one: Instruction) -> bool:
        source = self.computations[computation].get(one.operands[0])
        return source is not None and source.opcode == "parameter"

    def initial(self, computation: str, loop: Instruction, index: int) -> int | None:
        """The constant that a loop begins with at an index."""
        start = self.follow(computation, loop.operands[0])
        one = self.follow(computation, start.operands[index]) if start is not None and start.opcode == "tuple" else None
        return _constant(one)

    def value(self, computation: str, loop: Instruction, inside: str, one: Instruction | None) -> int | None:
        """The constant of a value inside of a loop, be it handed in unchanged."""
        if one is None or one.opcode != "get-tuple-element" or not self.is_parameter(inside, one):
            return _constant(one)
        index = int(one.attribute("index"))
        body = loop.attribute("body")
        if self.follow(body, self.carried(body, index)) != self.entering(body, index):
            return None
        return self.initial(computation, loop, index)


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.operands[0]):
        return None
    return int(one.operands[0])


def _called(one: Instruction) -> list[str]:
    found = CALLED.findall(one.rest)
    for names in BRANCHES.findall(one.rest):
        found += [name.strip().lstrip("%") for name in names.split(",")]
    return found


def _instruction(name: str, line: str) -> Instruction:
    """Reads KIND OPCODE(OPERANDS), REST; a tuple's kind has parentheses of its own."""
    end = _closing(line, 0) + 1 if line.startswith("(") else line.index(" ")
    kind, line = line[:end], line[end:].lstrip()
    opening = line.index("(")
    closing = _closing(line, opening)
    operands = re.sub(r"/\*.*?\*/", "", line[opening + 1 : closing])
    names = tuple(part.strip().rpartition(" ")[2].lstrip("%") for part in operands.split(","))
    return Instruction(name, kind, line[:opening], names, line[closing + 1 :])


def _closing(line: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if not depth:
            return at
    raise ValueError(f"no closing parenthesis: {line[:80]}")
