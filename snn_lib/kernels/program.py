"""A program: the step of a cell, or of two neighbouring cells, which a backend runs over time.

Cells hand their steps in by :func:`register`, in ``Cell.__init_subclass__``. A key such as
``IIRSynapse[2,0;2,1]`` names a cell, how many rows each of its states has, and how many each of its
coefficients; ``-`` is a single row. Two keys with ``+`` between them are neighbours that run as one
program; with ``~``, the output of the first is rounded to bfloat16, as it is under autocast. So a
key is a text, which an operator takes as an argument and an exported program can hold. It only
chooses among the steps that are registered.
"""

import copy
import inspect
import keyword
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain, count
from numbers import Number
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_lib.kernels.trace import Line, Trace, UnknownOperationError, Value, trace
from snn_lib.pytorch_private import assume_constant_result
from snn_lib.surrogate import SURROGATES, THRESHOLD, Surrogate, check_surrogate

Fire = Callable[[Tensor], Tensor]
# step(x, state, coefficients, fire) -> (output, state), see ``snn_lib.cells``
Step = Callable[[Tensor, tuple, tuple, Fire], tuple[Tensor, tuple]]
Orders = tuple[int | None, ...]  # rows of each tensor; None if it is a single row


@dataclass(frozen=True)
class Kind:
    """A kind of cell: its name, its step, and the names of its states and coefficients."""

    name: str
    step: Step
    states: tuple[str, ...]
    coefficients: tuple[str, ...]


_kinds: dict[str, Kind] = {}


def register(kind: Kind) -> str:
    """Makes a kind of cell known, and returns the name that keys give it.

    The second of a name, such as one that is defined anew in a notebook, gets a number behind it:
    layers of the first keep their own step.

    Raises:
        ValueError: the step reads what surrounds it, which a compiled step would never see change.
    """
    if getattr(kind.step, "__closure__", None):
        raise ValueError(
            f"the step of {kind.name} reads variables of the function around it, which a compiled "
            "step would not see change: make them coefficients"
        )
    own = re.sub(r"[+~;\[\]]", "_", kind.name)  # a file may have a name with signs of a key
    names = chain([own], (f"{own}#{number}" for number in count(2)))
    named = (replace(kind, name=name) for name in names)
    # setdefault finds and takes a name in one step, since threads may define cells at once
    return next(one.name for one in named if _kinds.setdefault(one.name, one) is one)


def key_of(name: str, states: Orders, coefficients: Orders) -> str:
    """The key of a cell whose states and coefficients have so many rows."""

    def text(orders: Orders) -> str:
        # index, because torch.compile cannot make a text of a size that may change
        return ",".join("-" if order is None else str(index(order)) for order in orders)

    return f"{name}[{text(states)};{text(coefficients)}]"


@dataclass(frozen=True)
class Part:
    """A cell within a program: its kind, and the rows of its states and of its coefficients."""

    kind: Kind
    states: Orders
    coefficients: Orders

    def step(
        self, x: Tensor, states: Iterator[Tensor], coefficients: Iterator[Tensor], fire: Fire
    ) -> tuple[Tensor, list[Tensor]]:
        """The step on the next rows of states and of coefficients; returns the new rows."""
        own_states, own_coefficients = (
            tuple(next(rows) if n is None else tuple(next(rows) for _ in range(n)) for n in orders)
            for rows, orders in ((states, self.states), (coefficients, self.coefficients))
        )
        returned = self.kind.step(x, own_states, own_coefficients, fire)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise ValueError(
                f"the step of {self.kind.name} returns {type(returned).__name__}, expected a tuple "
                "of the output and of the states after the step"
            )
        output, after = returned
        if not isinstance(after, (tuple, list)):
            raise ValueError(
                f"the step of {self.kind.name} returns its states as {type(after).__name__}, "
                "expected a tuple, such as (state,) for a single one"
            )
        rows = (group if isinstance(group, (tuple, list)) else [group] for group in after)
        return output, list(chain.from_iterable(rows))


class Program:
    """The step of one or two cells.

    Attributes:
        key: its key.
        cells: the cells, in order.
        states, coefficients: the names of all rows of states and of coefficients, cell by cell.
        spikes: of each cell, whether its output is spikes.
        fires: of each cell, whether it has a threshold.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.cells = tuple(map(_read, key.replace("~", "+").split("+")))
        self._rounds = "~" in key
        self.states = _names((cell.kind.states, cell.states) for cell in self.cells)
        self.coefficients = _names(
            ((cell.kind.coefficients, cell.coefficients) for cell in self.cells),
            taken=("x", "dropout_scale", *self.states),
        )
        tried = [_try(cell) for cell in self.cells]
        self.spikes, self.fires = ([one[place] for one in tried] for place in (0, 1))

    def step(
        self, x: Tensor, dropout_scale: Any, states: Sequence, coefficients: Sequence, fire: Fire
    ) -> tuple[Tensor, list[Tensor]]:
        """One step of all cells: the output of the last, and the new rows of states.

        Spikes are multiplied by ``dropout_scale`` where they are passed on, unless it is ``None``.
        """
        before, given, after = iter(states), iter(coefficients), []
        for number, (cell, spikes) in enumerate(zip(self.cells, self.spikes, strict=True)):
            if number and self._rounds:
                x = x.to(torch.bfloat16).to(x.dtype)
            x, rows = cell.step(x, before, given, fire)
            x = x * dropout_scale if spikes and dropout_scale is not None else x
            after += rows
        return x, after

    def inputs(self, surrogate: str = "") -> list[str]:
        """The names of a trace's inputs; ``dropout_scale`` is there only if a cell spikes."""
        scale = ["dropout_scale"] if any(self.spikes) else []
        return ["x", *scale, *self.states, *self.coefficients, *parameters(surrogate)]

    @cached_property
    def forward(self) -> Trace:
        """The trace of a step: its output, and the new rows of states."""
        return self._trace("")[0]

    @cache  # noqa: B019 (a program is kept for good)
    def adjoint(self, surrogate: str) -> Trace:
        """The trace of the gradients of :meth:`inputs`; ``_g0``, ``_g1`` ... are the results'."""
        return self._trace(surrogate)[1]

    @cache  # noqa: B019 (as above)
    def has_kernels(self, surrogate: str = "") -> bool:
        """Whether kernels can compute it, and its gradients with a surrogate, if one is named.

        A surrogate may hold what shows no change from outside, such as an object with a number. No
        kernel then has its gradient.

        Raises:
            ValueError: the step does what not even plain PyTorch may do.
        """
        try:
            self.forward  # noqa: B018 (a property that is computed once)
        except UnknownOperationError:
            return False
        if not surrogate:
            return True
        try:
            return _is_plain(_attributes(_surrogates[surrogate])) and bool(self.adjoint(surrogate))
        except ValueError:  # a surrogate may read tensors, and its course may depend on values
            return False

    def _trace(self, surrogate: str) -> tuple[Trace, Trace]:
        names = self.inputs(surrogate)
        groups = self.states, self.coefficients, parameters(surrogate)

        def run(*tensors: Tensor) -> list[Tensor]:
            given = dict(zip(names, tensors, strict=True))
            states, coefficients, numbers = ([given[name] for name in group] for group in groups)
            fire = fire_with(surrogate_of(surrogate, numbers))
            x, scale = given["x"], given.get("dropout_scale")
            output, after = self.step(x, scale, states, coefficients, fire)
            return [output, *after]

        return trace(run, names)


@cache
def program(key: str) -> Program:
    """The program of a key.

    Raises:
        ValueError: no kind of cell has this name.
    """
    return Program(key)


def kind_of(name: str) -> Kind:
    """The kind of cell that has this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _kinds:
        raise ValueError(f"no cell is called {name!r}: import its module, or name it module.Class")
    return _kinds[name]


def _read(key: str) -> Part:
    name, _, orders = key.removesuffix("]").partition("[")
    kind = kind_of(name)  # refuses a name that is not known
    states, coefficients = (
        tuple(None if order == "-" else int(order) for order in group.split(",") if order)
        for group in orders.split(";")
    )
    return Part(kind, states, coefficients)


def _names(groups: Any, taken: Sequence[str] = ("x", "dropout_scale")) -> list[str]:
    """A name for each row, such as membrane, or alpha_0 and alpha_1; all names are different."""
    found: list[str] = []
    for names, orders in groups:
        for name, order in zip(names, orders, strict=True):
            name = f"own{name}" if name.startswith("_") else name  # as lines of a trace do
            for row in [name] if order is None else [f"{name}_{row}" for row in range(order)]:
                while keyword.iskeyword(row) or row in found or row in taken:
                    row += "_"
                found.append(row)
    return found


@cache  # so that nothing runs, and is recorded, where a network is first exported or traced
def _try(cell: Part) -> tuple[bool, bool]:
    """Whether the output of a cell is what its threshold returns, and whether it has one."""
    fired: list[Tensor] = []

    def fire(potential: Tensor) -> Tensor:
        if not isinstance(potential, Tensor):
            raise ValueError(
                f"the step of {cell.kind.name} gives fire a {type(potential).__name__}, expected a "
                "tensor"
            )
        fired.append((potential > THRESHOLD).to(potential.dtype))
        return fired[-1]

    def rows(orders: Orders) -> list[Tensor]:
        return [torch.zeros(1) for n in orders for _ in range(1 if n is None else n)]

    before = rows(cell.states)
    named = zip(cell.kind.coefficients, cell.coefficients, strict=True)
    several = [name for name, order in named if order is not None]
    with torch.no_grad():
        try:
            coefficients = iter(rows(cell.coefficients))
            output, after = cell.step(torch.zeros(1), iter(before), coefficients, fire)
        except (AttributeError, TypeError) as error:
            if not several:
                raise
            raise TypeError(
                f"the step of {cell.kind.name}: {error}. A list gives a coefficient several rows, "
                f"so the step is given {', '.join(several)} as a tuple: if one number for each "
                "channel is meant, give a tensor"
            ) from error
    if len(after) != len(before):
        raise ValueError(
            f"the step of {cell.kind.name} returns {len(after)} rows of states, expected "
            f"{len(before)}, in the order of its states: {', '.join(cell.kind.states)}"
        )
    return any(output is spikes for spikes in fired), bool(fired)


# --------------------------------------------------------------------------------------------------
# The backward pass


class Product(NamedTuple):
    """A part of a coefficient's gradient: one value, or two that are multiplied.

    The parts are added up, and the products computed, in double precision.
    """

    negative: bool
    factors: tuple[Value, ...]


class Adjoint:
    """A step of the backward pass, as kernels run it.

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


adjoint_of = cache(Adjoint)  # the same object whenever the same is asked for


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


# --------------------------------------------------------------------------------------------------
# The threshold, and the surrogates of its gradient


class _Threshold(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(potential: Tensor, surrogate: Surrogate) -> Tensor:
        return (potential > THRESHOLD).to(potential.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        potential, ctx.surrogate = inputs
        ctx.save_for_backward(potential)
        ctx.save_for_forward(potential)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (potential,) = ctx.saved_tensors
        return gradient * ctx.surrogate.derivative(potential), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (potential,) = ctx.saved_tensors
        return tangent * ctx.surrogate.derivative(potential)


def fire_with(surrogate: Surrogate) -> Fire:
    """The threshold: 1 where a potential is above it, else 0, with the surrogate's gradient."""
    return lambda potential: _Threshold.apply(potential, surrogate)


# By a name, a surrogate whose numbers are set when it runs: its attributes, in order.
_surrogates: dict[str, Surrogate] = {name: kind() for name, kind in SURROGATES.items()}


def name_of(surrogate: Any) -> tuple[str, list[float]]:
    """The name by which an operator knows a surrogate, and its numbers.

    Raises:
        TypeError: it has no ``derivative``.
    """
    if type(surrogate) in SURROGATES.values():
        return surrogate.name, [surrogate.width]
    check_surrogate(surrogate)
    numbers = _numbers(surrogate)
    fixed = {name: value for name, value in _attributes(surrogate).items() if name not in numbers}
    kind = type(surrogate)
    name = f"{kind.__module__}.{kind.__qualname__}-{id(kind):x}{[*numbers]}{fixed}"
    _remember(name, surrogate)
    return name, list(numbers.values())


@assume_constant_result  # a compiled function would remember it too late
def _remember(name: str, surrogate: Surrogate) -> None:
    if name not in _surrogates:
        # A name tells what is in plain lists, so they may not change with those of the user.
        duplicate = copy.deepcopy if _is_plain(_attributes(surrogate)) else copy.copy
        _surrogates[name] = duplicate(surrogate)


def parameters(surrogate: str) -> list[str]:
    """The names of a surrogate's numbers.

    Raises:
        ValueError: no surrogate of this name is known, as one of another process.
    """
    if surrogate and surrogate not in _surrogates:
        raise ValueError(f"no surrogate is called {surrogate!r}: expected {', '.join(SURROGATES)}")
    return [f"surrogate.{n}" for n in _numbers(_surrogates[surrogate])] if surrogate else []


def surrogate_of(name: str, numbers: Sequence[Any]) -> Surrogate:
    """The surrogate that has this name and these numbers.

    Raises:
        ValueError: as :func:`parameters`.
    """
    parameters(name)  # refuses a name that is not known
    made = copy.copy(_surrogates[name or "gaussian"])
    for attribute, value in zip(_numbers(made), numbers, strict=bool(name)):
        object.__setattr__(made, attribute, value)  # which a frozen one allows, too
    return made


def _attributes(surrogate: Surrogate) -> dict[str, Any]:
    """What its derivative may read: its own attributes, and those of its class."""
    if isinstance(surrogate, tuple):
        return {"items": tuple(surrogate)}
    shared = {name: getattr(surrogate, name) for name in _shared_names(type(surrogate))}
    return {**shared, **getattr(surrogate, "__dict__", {})}


@assume_constant_result
def _shared_names(kind: type) -> list[str]:
    """The names of what a class holds beside methods and what Python puts there, and its slots."""

    def is_method(name: str, value: Any) -> bool:
        of_python = name.startswith(("__", "_abc_"))
        return of_python or hasattr(value, "__get__") or inspect.isbuiltin(value)

    return [
        name
        for part in reversed(kind.__mro__)
        for name, value in vars(part).items()
        if inspect.ismemberdescriptor(value) or not is_method(name, value)
    ]


def _numbers(surrogate: Surrogate) -> dict[str, float]:
    return {name: value for name, value in _attributes(surrogate).items() if type(value) is float}


def _is_plain(value: Any) -> bool:
    """Whether a value is a number or a text, or a container of these, which ``repr`` tells all."""
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, chain(value, value.values())))
    return value is None or isinstance(value, (Number, str))  # also of NumPy
