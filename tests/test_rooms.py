"""Which room may import which: the model knows nothing of tasks, nothing here knows a script."""

import ast
import runpy
from graphlib import TopologicalSorter
from pathlib import Path

from running import ROOT

LIBRARY = ROOT / "snn_lib"
FLOORS = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["FLOORS"].values()
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def modules():
    for path in LIBRARY.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


NAMES = {name for name, _ in modules()}


def imported(path: Path):
    """The modules of the library that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in NAMES else node.module


def ours(path, own):
    return {name for name in imported(path) if name in NAMES and name != own}


def room(module):
    return module.split(".")[1] if "." in module else "snn_lib"


def test_every_room_is_on_a_floor():
    assert {room(name) for name in NAMES} - {"snn_lib"} == set(FLOOR)


def test_imports_point_down():
    for name, path in modules():
        if name != "snn_lib":
            for other in ours(path, name) - {"snn_lib"}:
                assert FLOOR[room(other)] <= FLOOR[room(name)], f"{name} imports {other}"


def test_nothing_imports_in_a_circle():
    graph = {name: ours(path, name) for name, path in modules()}
    # A package is there before its parts: that it names them is no circle.
    for name, others in graph.items():
        others.difference_update(other for other in set(others) if name.startswith(f"{other}."))
    list(TopologicalSorter(graph).static_order())


def test_nothing_imports_a_script():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for _, path in modules():
        assert not scripts & set(imported(path))
