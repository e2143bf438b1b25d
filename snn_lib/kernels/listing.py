"""What a cell's step and its adjoint compute, in lines to read.

``python -m snn_lib.kernels --show CELL`` prints them.
"""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from string import ascii_lowercase

from snn_lib.kernels.check import FILTER
from snn_lib.kernels.program import key_of, kind_of, program
from snn_lib.kernels.trace import Line, Trace, Value

SIGNS = {
    **{"logical_or": "or", "logical_and": "and", "gt": ">", "ge": ">=", "lt": "<", "le": "<="},
    **{"eq": "==", "ne": "!=", "add": "+", "sub": "-", "mul": "*", "div": "/"},
}
# How tightly an operation binds; all others are written as functions.
BINDS = {"logical_or": 1, "logical_and": 2, "logical_not": 3, "add": 5, "sub": 5, "neg": 5}
BINDS |= {"mul": 6, "div": 6, **dict.fromkeys(("gt", "ge", "lt", "le", "eq", "ne"), 4)}
ALONE = 9


def listing(cells: str) -> str:
    """The lines of a step and of its adjoint, with the names of the cells' own.

    Args:
        cells: a program's key. A name without orders is a cell whose states and coefficients have
            a single row each, or a filter of second order; ``module.Class`` is one of a user's own.

    Raises:
        ValueError: there is no such cell.
        ImportError: there is no such module.
    """
    key = re.sub(r"[^+~]+", lambda name: _with_orders(name[0].strip()), cells)
    made, surrogate = program(key), "gaussian"
    after = ["output", *(f"{name}'" for name in made.states)]
    step = _lines(made.forward, after, {})

    arriving = ["_g0", *(f"_g{number}" for number, _ in enumerate(made.states, 1))]
    names = dict(zip(arriving, (f"d_{name}" for name in after), strict=True))
    names |= dict(zip(made.forward.results[1:], after[1:], strict=True))
    gradients = dict(zip(made.inputs(surrogate), made.adjoint(surrogate).results, strict=True))
    own = ["x", *made.states, *made.coefficients]
    adjoint = made.adjoint(surrogate).only([gradients[name] for name in own])
    back = _lines(adjoint, [f"d_{name}" for name in own], {n: names[n] for n in {*names} - {*own}})
    return "\n".join(
        [
            f"A step of {key}, where a prime marks what is after it:",
            *(f"    {line}" for line in step),
            f"Its adjoint, with the surrogate {surrogate!r}, where d_ marks gradients:",
            *(f"    {line}" for line in back),
        ]
    )


def _with_orders(name: str) -> str:
    if name == FILTER.partition("[")[0]:
        return FILTER
    if "[" in name:
        return name
    if "." in name:
        importlib.import_module(name.rpartition(".")[0])
    kind = kind_of(name)
    return key_of(name, (None,) * len(kind.states), (None,) * len(kind.coefficients))


def _lines(trace: Trace, results: Sequence[str], names: dict[str, str]) -> list[str]:
    """A trace's lines; those that are read once are written where they are read.

    Args:
        trace: what is written.
        results: what its results are called.
        names: what other inputs and lines are called.
    """
    named = dict(names)
    for value, result in zip(trace.results, results, strict=True):
        if isinstance(value, str) and value.startswith("_"):
            named.setdefault(value, result)
    reads = Counter(value for line in trace.lines for value in line.arguments)
    letters = (a + n for n in ("", *"123456789") for a in ascii_lowercase if a + n not in reads)
    written, lines = {}, []

    def text(value: Value, above: int = 0) -> str:
        if not isinstance(value, str):
            return f"{value:.6g}"
        expression, binds = written.get(value, (named.get(value, value), ALONE))
        return expression if binds >= above else f"({expression})"

    for line in trace.lines:
        found = _expression(line, text), BINDS.get(line.operation, ALONE)
        if line.name not in named and reads[line.name] == 1:
            written[line.name] = found
        else:
            name = named.get(line.name) or named.setdefault(line.name, next(letters))
            lines.append(f"{name} = {found[0]}")
    for value, result in zip(trace.results, results, strict=True):
        if text(value) != result:
            lines.append(f"{result} = {text(value)}")
    return lines


def _expression(line: Line, text: Callable[..., str]) -> str:
    binds, arguments = BINDS.get(line.operation, 0), line.arguments
    match line.operation:
        case "neg":
            return f"-{text(arguments[0], binds + 1)}"
        case "logical_not":
            return f"not {text(arguments[0], binds)}"
        case name if name in SIGNS:
            return f"{text(arguments[0], binds)} {SIGNS[name]} {text(arguments[1], binds + 1)}"
    return f"{line.operation}({', '.join(map(text, arguments))})"
