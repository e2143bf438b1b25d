"""What a cell's step and its adjoint compute, in lines to read.

``python -m snn_lib.kernels --show CELL`` prints them.
"""

import importlib
import re
from collections.abc import Sequence

from snn_lib.errors import one_line
from snn_lib.kernels.check import filter_key
from snn_lib.kernels.program import key_of, kind_of, program
from snn_lib.kernels.trace import SIGNS, Trace, Value


def listing(cells: str) -> str:
    """The lines of a step and of its adjoint, with the names of the cells' own.

    Args:
        cells: a program's key. A name without orders is a cell whose states and coefficients have
            a single row each, or a filter: of first order for ``LowPassSynapse``, else of second.
            ``module.Class`` is one of a user's own.

    Raises:
        ValueError: there is no such cell, or no kernel can compute its step with these rows.
        ImportError: there is no such module.
    """
    key = re.sub(r"[^+~]+", lambda name: _with_orders(name[0].strip()), cells)
    surrogate = "gaussian"
    try:
        made = program(key)
        forward, whole = made.forward, made.adjoint(surrogate)
    except (ValueError, TypeError, IndexError) as error:  # a step may be given too few rows
        raise ValueError(
            f"{one_line(error)} (with these rows of each state and coefficient: {key})"
        ) from error
    after = ["output", *(f"{name}'" for name in made.states)]
    arriving = {f"_g{number}": f"d_{name}" for number, name in enumerate(after)}
    gradients = dict(zip(made.inputs(surrogate), whole.results, strict=True))
    own = ["x", *made.states, *made.coefficients]
    adjoint = whole.only([gradients[name] for name in own])
    return "\n".join(
        [
            f"A step of {key}, where a prime marks what is after it:",
            *_lines(forward, after, {}),
            f"Its adjoint, with the surrogate {surrogate!r}, where d_ marks gradients:",
            *_lines(adjoint, [f"d_{name}" for name in own], arriving),
        ]
    )


def _with_orders(name: str) -> str:
    module, _, cell = name.partition("[")[0].rpartition(".")
    if module.startswith("."):
        raise ValueError(f"{name} is no cell, expected its name, or module.Class")
    found = getattr(importlib.import_module(module or "snn_lib"), cell, None)
    if "[" in name:
        kind_of(name.partition("[")[0])  # refuses a name that is not known
        return name
    if found is not None and not hasattr(found, "kind"):
        raise ValueError(f"{name} has no step to show, expected a cell")
    name = getattr(found, "kind", name)  # a class may have the step of another, as synapses do
    if name == "IIRSynapse":
        return filter_key(1 if cell == "LowPassSynapse" else 2, 0)
    kind = kind_of(name)
    return key_of(name, (None,) * len(kind.states), (None,) * len(kind.coefficients))


def _lines(trace: Trace, results: Sequence[str], names: dict[str, str]) -> list[str]:
    """A trace's lines, in which its results are called so, and some inputs have other names."""
    own, names, pairs = {line.name for line in trace.lines}, dict(names), []
    for value, result in zip(trace.results, results, strict=True):
        if value not in own or names.setdefault(value, result) != result:
            pairs.append((result, value))

    def text(value: Value) -> str:
        return names.get(value, value) if isinstance(value, str) else f"{value:.6g}"

    lines = []
    for line in trace.lines:
        arguments = [text(argument) for argument in line.arguments]
        sign = SIGNS.get(line.operation)
        made = f" {sign} ".join(arguments) if sign else f"{line.operation}({', '.join(arguments)})"
        lines.append(f"    {text(line.name)} = {made}")
    return lines + [f"    {result} = {text(value)}" for result, value in pairs]
