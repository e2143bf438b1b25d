"""What the way back through time computes at each step, for the backends that write kernels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from snn_lib.kernels.program import Program
from snn_lib.kernels.trace import Trace, Value


@dataclass(frozen=True)
class Way:
    """What a backward pass is asked for.

    Attributes:
        surrogate: the name of the surrogate.
        need_x: whether the gradient of x is needed.
        needed: of each row of coefficients, whether its gradient is needed.
    """

    surrogate: str
    need_x: bool
    needed: tuple[bool, ...]


class Product(NamedTuple):
    """A part of a coefficient's gradient: one value, or two that are multiplied.

    The parts are added up, and the products computed, in double precision.
    """

    negative: bool
    factors: tuple[Value, ...]


class Adjoint:
    """The step of a way back.

    Attributes:
        step: the trace that has the values of all that follows among its lines.
        arriving: the names of the gradients that arrive at the states after the step.
        carried: the gradients of the states before it.
        x: the gradient of x.
        sums: by name, what each coefficient's gradient grows by, if it is needed.
        states: the names of the states before the step that it reads.
        again: the trace of the states after a step, to compute them again.
    """

    def __init__(self, made: Program, way: Way) -> None:
        whole = made.adjoint(way.surrogate)
        gradients = dict(zip(made.inputs(way.surrogate), whole.results, strict=True))
        needed = zip(made.coefficients, way.needed, strict=True)
        self.arriving = [f"_g{number}" for number in range(1, 1 + len(made.states))]
        self.carried = [gradients[name] for name in made.states]
        self.x = gradients["x"]
        self.sums = {name: [*_products(whole, gradients[name])] for name, need in needed if need}
        factors = [f for parts in self.sums.values() for part in parts for f in part.factors]
        self.step = whole.only([*self.carried, *[self.x] * way.need_x, *factors])
        self.states = [name for name in made.states if self.step.reads(name)]
        self.again = made.forward.only(made.forward.results[1:])


def _products(trace: Trace, value: Value, negative: bool = False) -> Iterator[Product]:
    """The products that add up to a value."""
    line = next((line for line in trace.lines if line.name == value), None)
    match line and line.operation:
        case "add":
            for argument in line.arguments:
                yield from _products(trace, argument, negative)
        case "neg":
            yield from _products(trace, *line.arguments, not negative)
        case "mul":
            yield Product(negative, line.arguments)
        case _:
            yield Product(negative, (value,))
