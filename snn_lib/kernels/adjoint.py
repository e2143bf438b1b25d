"""What the backward pass computes at each time step, for the backends that write kernels."""

from collections.abc import Iterator
from typing import NamedTuple

from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.program import parameters, program, remember
from snn_lib.kernels.trace import Line, Trace, Value


class Product(NamedTuple):
    """A part of a coefficient's gradient: one value, or two that are multiplied.

    The parts are added up, and the products computed, in double precision.
    """

    negative: bool
    factors: tuple[Value, ...]


class Adjoint:
    """A step of the backward pass.

    Attributes:
        program: the program.
        need_x: whether the gradient of x is needed.
        numbers: the names of the surrogate's numbers.
        step: the trace of one backward step; ``carried``, ``x`` and ``sums`` name lines of it.
        arriving: the names of the gradients that arrive at the states after the step.
        carried: the gradients of the states before it.
        x: the gradient of x.
        sums: by name, what each coefficient's gradient grows by, if it is needed.
        states: the names of the states before the step that it reads.
        again: the trace of the states after a step, to compute them again.
    """

    def __init__(self, key: str, surrogate: str, need_x: bool, needed: tuple[bool, ...]) -> None:
        made = program(key)
        self.program, self.need_x, self.numbers = made, need_x, parameters(surrogate)
        whole = made.adjoint(surrogate)
        gradients = dict(zip(made.inputs(surrogate), whole.results, strict=True))
        self.arriving = [f"_g{number}" for number in range(1, 1 + len(made.states))]
        self.carried = [gradients[name] for name in made.states]
        self.x = gradients["x"]
        pairs = zip(made.coefficients, needed, strict=True)
        self.sums = {name: [*_products(whole, gradients[name])] for name, need in pairs if need}
        factors = [f for parts in self.sums.values() for part in parts for f in part.factors]
        self.step = whole.only([*self.carried, *[self.x] * need_x, *factors])
        self.states = [name for name in made.states if self.step.reads(name)]
        self.again = made.forward.only(made.forward.results[1:])


_adjoint = remember(Adjoint)


def adjoint_of(inputs: Inputs, need_x: bool) -> Adjoint:
    """A backward step of a program; the same object whenever the same is asked for."""
    return _adjoint(inputs.key, inputs.surrogate, need_x, tuple(inputs.needed))


def _products(trace: Trace, value: Value, negative: bool = False) -> Iterator[Product]:
    """The products that add up to a value."""
    match next((line for line in trace.lines if line.name == value), None):
        case Line(operation="add", arguments=arguments):
            for argument in arguments:
                yield from _products(trace, argument, negative)
        case Line(operation="neg", arguments=(argument,)):
            yield from _products(trace, argument, not negative)
        case Line(operation="mul", arguments=factors):
            yield Product(negative, factors)
        case _:
            yield Product(negative, (value,))
