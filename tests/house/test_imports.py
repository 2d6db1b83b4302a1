"""Imports run one way, and never in a circle. The source is parsed, not run."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = "seqpe_jax"

# Which rooms a room may import, besides itself. A room is a folder or a module; the longest name that fits counts.
# The rooms stand in the order of the house: each is made of those above it.
EVERYBODY = {"errors", "axes", "files", "trees", "archives"}
MAY_IMPORT = {
    "axes": set(),
    "errors": set(),
    "archives": set(),
    "trees": set(),
    "stores": {"errors"},
    "files": {"errors", "stores"},
    "activations": set(),
    "positions": EVERYBODY,
    "config": EVERYBODY | {"positions.counting"},
    "encodings": EVERYBODY | {"positions", "activations"},
    "models": EVERYBODY | {"encodings.signal", "activations"},
    "architecture": EVERYBODY | {"config", "models", "encodings", "positions"},
    "objectives": EVERYBODY | {"architecture", "config", "models", "encodings", "positions"},
    "data": {"errors", "files", "archives"},
    "runtime": EVERYBODY,
    "evaluation": EVERYBODY,
    "reporting": EVERYBODY | {"config", "runtime.digests", "runtime.progress"},
    "inference": EVERYBODY | {"architecture", "config", "models", "encodings", "positions", "runtime", "evaluation"},
    "serving.exported": EVERYBODY,
    "training.step": EVERYBODY | {"training.state", "training.optimizer"},
    "training.state": EVERYBODY,
    "training.optimizer": EVERYBODY,
    "training.clock": set(),
    "training.events": EVERYBODY | {"training.clock", "training.state", "runtime"},
    "training.loop": EVERYBODY | {"training.events", "training.state", "training.step", "runtime"},
    "command": {"errors", "config", "runtime", "files", "trees"},
}
TASKS = EVERYBODY | {
    "architecture",
    "config",
    "data",
    "evaluation",
    "inference",
    "objectives",
    "runtime",
    "serving.exported",
}
MAY_IMPORT |= {
    "tasks": TASKS,
    "serving": TASKS | {"tasks", "models", "reporting"},
    "interop": TASKS | {"tasks", "encodings"},
    "model": TASKS | {"tasks", "serving", "interop.writing", "encodings.seqpe"},
    "interop.reference": TASKS | {"interop", "model", "encodings"},
    "loading": TASKS | {"tasks", "model", "interop"},
    "interop.conversion": TASKS | {"interop", "loading"},
    "training": TASKS | {"tasks", "models"},
    "profiling": TASKS | {"training"},
    "sweeps": EVERYBODY | {"architecture", "config", "runtime", "tasks"},
}
# Any other module beside these is a command.
COMMAND = EVERYBODY | {
    "command",
    "config",
    "inference",
    "interop",
    "loading",
    "profiling",
    "reporting",
    "runtime",
    "serving",
    "sweeps",
    "tasks",
    "training.trainer",
}
FACE = {"", "__main__"}  # the package itself, and the one name of all commands

# Packages from outside that a room must do without.
WITHOUT = {
    "axes": {"jax", "flax", "optax", "numpy"},
    "errors": {"jax", "flax", "optax", "numpy"},
    "data": {"jax", "flax", "optax"},
    "positions": {"flax", "optax"},
    "runtime.progress": {"jax", "flax"},
}


def modules() -> dict[str, pathlib.Path]:
    """Returns dotted names below the package -> files; the package itself is ""."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str) -> tuple[set[str], set[str]]:
    """Returns (modules of the package, top-level packages from outside) that a module imports anywhere."""
    inside, outside = set(), set()

    def add(target: str) -> None:
        top, _, rest = target.partition(".")
        if top != PACKAGE:
            outside.add(top)
            return
        while rest and rest not in MODULES and rest not in FOLDERS:
            rest = rest.rpartition(".")[0]
        inside.add(rest)

    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports in full, not relative"
            for alias in node.names:
                add(f"{node.module}.{alias.name}")
    return inside - {"", name}, outside


FOLDERS = {".".join(path.parent.relative_to(ROOT / PACKAGE).parts) for path in MODULES.values()}
IMPORTED = {name: imported(name) for name in MODULES}


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def room_of(name: str) -> str:
    """Returns the rule's name for a module, or "" for a command."""
    fitting = [room for room in MAY_IMPORT if within(name, {room})]
    return max(fitting, key=len, default="")


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FACE])
def test_a_room_imports_only_what_it_may(name):
    room = room_of(name)
    assert room or "." not in name, f"{name} is in no room of this test: add its folder and what it may import"
    allowed = MAY_IMPORT[room] | {room} if room else COMMAND
    inside, outside = IMPORTED[name]
    wrong = {target for target in inside if not within(target, allowed)}
    assert not wrong, f"{name} imports {sorted(wrong)}; it may import {sorted(allowed)}"
    for folder, packages in WITHOUT.items():
        if within(name, {folder}):
            assert not outside & packages, f"{name} imports {sorted(outside & packages)}"


def test_no_circles():
    state: dict[str, bool] = {}  # False while open, True when done

    def visit(name: str, trail: list[str]) -> None:
        if state.get(name):
            return
        assert name not in state, "import circle: " + " -> ".join([*trail[trail.index(name) :], name])
        state[name] = False
        for target in sorted(IMPORTED.get(name, (set(),))[0]):
            visit(target, [*trail, name])
        state[name] = True

    for name in MODULES:
        visit(name, [])


def test_the_rules_bite():
    assert "positions.counting" in MODULES and "positions.counting" in IMPORTED["config.schema"][0]
    assert not within("training.loop", MAY_IMPORT["objectives"]) and not within("data", MAY_IMPORT["architecture"])
    assert not within("encodings.seqpe", MAY_IMPORT["models"])
