"""Writes docs/api.md: what users import from the library, with the first line of each docstring.

    python docs/make_api.py

That is what the packages export, what README, docs, notebooks, scripts and examples import, and
every public name of the modules that are for users alone.
"""

import ast
import importlib
import inspect
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "api.md"
HEAD = """\
# What to import

A line for each name; `help(name)` has shapes, units and errors. This page is written by
`python docs/make_api.py`.
"""
DOORS = "snn_layers", "utilities", "data_loaders", "optimizers", "schedulers"
# From the ground up; a room imports from its own floor and from those below it.
FLOORS = {
    "What all stand on": {
        *("errors", "files", "settings", "time_constants", "stability", "rounding"),
        *("pytorch_private", "seeds"),
    },
    "Surrogates and kernels": {"surrogate", "kernels"},
    "Cells and products as functions": {"functional", "products", "recomputing"},
    "Layers": {"containers", "chunks", "cells", "observing"},
    "Around the layers": {"chain", "encoding", "readout", "initialisation", "penalties"},
    "Data, inspection, inference": {"data", "inspection", "inference"},
    "Tasks": {"tasks"},
    "Training": {"training", "sweep"},
    "Time series": {"time_series", "classifier"},
    "The interface of 2020": {"release_2020", "checkpoints", *DOORS},
}
EXPORTING = "snn_lib", "snn_lib.inference", "snn_lib.tasks", "snn_lib.training"
FOR_USERS = (
    "functional",
    "encoding",
    "readout",
    "penalties",
    "classifier",
    "inspection.activity",
    "inspection.metrics",
    "inspection.operations",
)


def page() -> str:
    """The text of docs/api.md."""
    listed: dict[str, dict[str, dict[str, str]]] = {floor: defaultdict(dict) for floor in FLOORS}
    for module, name in sorted(names_for_users()):
        thing = getattr(importlib.import_module(module), name)
        if inspect.isroutine(thing) or inspect.isclass(thing):  # a constant explains itself
            home = module if module.split(".")[-1] in DOORS else thing.__module__
            listed[floor_of(home)][module][name] = first_line(thing)
    sections = (
        f"\n## {floor}\n"
        + "".join(
            f"\n### `{module}`\n\n"
            + "".join(f"- `{name}`: {line}\n" for name, line in names.items())
            for module, names in modules.items()
        )
        for floor, modules in listed.items()
        if modules
    )
    return HEAD + "".join(sections)


def floor_of(module: str) -> str:
    """The floor on which a module of the library lies."""
    room = module.split(".")[1]
    return next(floor for floor, rooms in FLOORS.items() if room in rooms)


def names_for_users() -> set[tuple[str, str]]:
    """Module and name of everything that a user is shown how to import."""
    found = {
        (module, name) for module in EXPORTING for name in importlib.import_module(module).__all__
    }
    exported = {name for _, name in found}
    for door in DOORS:
        module = f"snn_lib.{door}"
        found |= {(module, n) for n in vars(importlib.import_module(module)) if n[0] != "_"}
    for module in map(importlib.import_module, (f"snn_lib.{name}" for name in FOR_USERS)):
        found |= {(module.__name__, name) for name in public_names(module)}
    for code in code_for_users():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("snn_lib"):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names if alias.name != "*"):
                    inner = getattr(module, name, None)
                    if inner is None:
                        inner = importlib.import_module(f"{node.module}.{name}")
                    if isinstance(inner, ModuleType):
                        found |= {(inner.__name__, public) for public in public_names(inner)}
                    elif name not in exported:
                        found.add((node.module, name))
    return found


def code_for_users() -> Iterator[str]:
    """The Python code that users read."""
    scripts = [path for path in ROOT.glob("*.py") if has_a_network(path)]
    for path in (*scripts, *ROOT.glob("examples/*.py")):
        yield path.read_text()
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        yield from re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    for path in ROOT.glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield "".join(cell["source"])


def has_a_network(script: Path) -> bool:
    """Whether a script has a pretrained network, which those of users have not."""
    return any(ROOT.glob(f"*checkpoint/pretrained_{script.stem}"))


def public_names(module: ModuleType) -> Iterator[str]:
    """What a module defines for others."""
    for name, thing in vars(module).items():
        if getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_"):
            yield name


def first_line(thing: object) -> str:
    """The first line of a docstring, its marks being those of this page."""
    line = (inspect.getdoc(thing) or "").partition("\n")[0]
    return re.sub(r":\w+:(?=`)", "", line).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
