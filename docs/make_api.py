"""Writes docs/api.md: every public name of the library, with the first line of its docstring.

    python docs/make_api.py

The files are read, not imported, so that a backend whose package is missing is listed as well.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "snn_lib"
PAGE = ROOT / "docs" / "api.md"
HEAD = """\
# Every public name

A line each; `help(name)` has shapes, units and errors. Names in bold are those that `snn_lib`,
`snn_lib.tasks` and `snn_lib.training` export: import them from there. This page is written by
`python docs/make_api.py`.
"""
MODEL = "The model"  # whatever lies beside the other floors
FLOORS = {
    MODEL: (),
    "Data": ("data",),
    "Tasks": ("tasks",),
    "Training": ("training",),
    "Inspection": ("inspection",),
    "Inference": ("inference",),
    "What all stand on": ("settings", "errors", "files"),
    "The interface of 2020": (
        "snn_layers",
        "optimizers",
        "schedulers",
        "data_loaders",
        "utilities",
        "checkpoints",
    ),
}


def page() -> str:
    """The text of docs/api.md."""
    sections = dict.fromkeys(FLOORS, "")
    exports = set(exported())
    for path in sorted(LIBRARY.rglob("*.py")):
        parts = path.relative_to(LIBRARY).with_suffix("").parts
        module = ".".join(("snn_lib", *parts)).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        names = list(public(tree))
        if names:
            floor = next((f for f, rooms in FLOORS.items() if parts[0] in rooms), MODEL)
            sections[floor] += f"\n### `{module}`\n\n{first_line(tree)}\n\n"
        for name, line in names:
            shown = f"**`{name}`**" if (module, name) in exports else f"`{name}`"
            sections[floor] += f"- {shown}: {line}\n"
    return HEAD + "".join(f"\n## {floor}\n{text}" for floor, text in sections.items())


def public(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and first line of every function and class that a module defines for others."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            names.add(node.name)
            yield node.name, first_line(node)
        elif isinstance(node, ast.Assign) and ast.unparse(node.value) in names:
            yield ast.unparse(node.targets[0]), f"The same as `{ast.unparse(node.value)}`."


def exported() -> Iterator[tuple[str, str]]:
    """Module and name of what the packages import for those who use them."""
    for path in LIBRARY.rglob("__init__.py"):
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and "__all__" in text:
                yield from ((node.module, alias.name) for alias in node.names)


def first_line(node: ast.AST) -> str:
    """The first line of a docstring, its marks being those of this page."""
    line = (ast.get_docstring(node) or "").partition("\n")[0]
    return re.sub(r":\w+:(?=`)", "", line).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
