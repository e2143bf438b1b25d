"""Records what a cell's step and its adjoint compute, as lines of elementary operations.

PyTorch runs the step, on tensors of one element, and differentiates it. A mode notes each
operation that is called on the way. So nobody derives an adjoint by hand, and whatever PyTorch can
differentiate has one. A line is an operation of this file's tables, which every backend can write
in its own language. Steps that need anything else, and those whose course depends on values, are
refused.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Value = str | float  # a name of a line or an input, or a number

# Operations of PyTorch that stand for themselves, with the number of their arguments.
ARITHMETIC = {"add": 2, "sub": 2, "mul": 2, "div": 2, "neg": 1, "maximum": 2, "minimum": 2}
FUNCTIONS = {"abs": 1, "exp": 1, "log": 1, "sqrt": 1, "tanh": 1, "sin": 1, "cos": 1}
COMPARISONS = {"gt": 2, "ge": 2, "lt": 2, "le": 2, "eq": 2, "ne": 2}
LOGIC = {"logical_and": 2, "logical_or": 2, "logical_not": 1}
# What is written between two arguments, in lines to read and in languages.
SIGNS = {
    **{"add": "+", "sub": "-", "mul": "*", "div": "/", "logical_and": "&", "logical_or": "|"},
    **{"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="},
}
SAME = {"bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_not": "logical_not"}
VIEWS = ("detach", "alias", "view")  # the same values under another name
READING = (  # what makes numbers of Python's or NumPy's of a tensor
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__),
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, torch.is_nonzero),
)
CONSTANTS = {"zeros_like": 0.0, "new_zeros": 0.0, "zeros": 0.0, "ones_like": 1.0, "ones": 1.0}


class UnknownOperationError(ValueError):
    """A step calls what no compiled backend can write."""


@dataclass(frozen=True)
class Line:
    """``name = operation(*arguments)``; ``is_condition`` if the value is true or false."""

    name: str
    operation: str
    arguments: tuple[Value, ...]
    is_condition: bool = False


@dataclass(frozen=True)
class Trace:
    """What a function computes: its lines in order, and the values that it returns."""

    lines: tuple[Line, ...]
    results: tuple[Value, ...]

    def reads(self, *names: str) -> bool:
        """Whether a line or a result is one of these inputs."""
        read = {value for line in self.lines for value in line.arguments} | set(self.results)
        return not read.isdisjoint(names)

    def only(self, results: Sequence[Value]) -> "Trace":
        """The trace of these results alone."""
        needed, lines = set(results), []
        for line in reversed(self.lines):
            if line.name in needed:
                lines.append(line)
                needed.update(line.arguments)
        return Trace(tuple(reversed(lines)), tuple(results))

    def live(self, states: Sequence[str]) -> tuple["Trace", list[str]]:
        """The trace without the states that nothing reads, and the names of the others.

        The results are the output, and the next value of each state.
        """
        output, *after = self.results
        following = dict(zip(states, after, strict=True))
        found: list[str] = []
        while True:  # a state may be read for the next value of another one alone
            trace = self.only([output, *(following[state] for state in found)])
            read = [state for state in states if trace.reads(state)]
            if read == found:
                return trace, found
            found = read

    def without(self, numbers: Mapping[str, float]) -> "Trace":
        """The trace without the products and sums that are spared if these inputs are 0 or 1."""
        known: dict[Value, Value] = {**numbers}
        lines = []
        for line in self.lines:
            values = tuple(known.get(value, value) for value in line.arguments)
            match line.operation, values:
                case "mul", (0.0, _) | (_, 0.0):
                    known[line.name] = 0.0
                case "mul", (1.0, same) | (same, 1.0):
                    known[line.name] = same
                case ("add", (0.0, same) | (same, 0.0)) | ("sub", (same, 0.0)):
                    known[line.name] = same
                case _:
                    lines.append(Line(line.name, line.operation, values, line.is_condition))
        results = [known.get(value, value) for value in self.results]
        return Trace(tuple(lines), ()).only(results)


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[str]) -> tuple[Trace, Trace]:
    """The trace of a function of tensors, and that of its adjoint.

    Args:
        function: takes a tensor for each of ``inputs``, and returns tensors, element by element.
        inputs: the names of its inputs.

    Returns:
        The trace of its results, and the trace of the inputs' gradients. The second also has the
        lines of the first that it needs; ``_g0``, ``_g1`` ... are the gradients of the results.

    Raises:
        UnknownOperationError: the function calls what is not in this file's tables.
        ValueError: it reads a tensor that is none of its inputs, or its course depends on values.
    """
    with ThreadPoolExecutor(1) as thread:  # in which no mode and no transform of the caller is on
        found, again = thread.map(lambda value: _trace(function, inputs, value), (0.5, 2.0))
    if repr(found) != repr(again):
        raise _course_depends_on_values()
    return found


def _trace(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[str], value: float
) -> tuple[Trace, Trace]:
    """The traces, recorded where all inputs have this value."""
    exact = {"dtype": torch.float32, "device": "cpu"}
    # The copies are no leaves, which autograd would let nobody change, in its own words.
    tensors = [torch.full((1,), value, **exact, requires_grad=True).clone() for _ in inputs]
    recorder = _Recorder(dict(zip(inputs, tensors, strict=True)))
    # A step that draws random numbers draws the same ones however often it was traced. PyTorch's
    # search for nan, which holds in all threads, would look at values here.
    unseen = torch.autograd.set_detect_anomaly(False)
    with torch.random.fork_rng(devices=[]), unseen, _Reading(), recorder:
        results = function(*tensors)
        if recorder.unknown is not None:
            raise recorder.unknown
        for result in results:
            if not isinstance(result, Tensor) or (result.shape, result.dtype) != (
                *(tensors[0].shape, torch.float32),
            ):
                raise ValueError(
                    "a step returns what is no tensor of numbers for each channel: expected one as "
                    "its output, and one for each row of its states"
                )
        forward = Trace(tuple(recorder.lines), tuple(map(recorder.value, results)))
        gradients = [torch.ones(1, **exact) for _ in results]
        for number, gradient in enumerate(gradients):
            recorder.name(gradient, f"_g{number}")
        recorder.differentiates = True
        found = [None] * len(tensors)
        if any(result.requires_grad for result in results):
            found = torch.autograd.grad(
                _Arrivals.apply(gradients, *results),
                tensors,
                create_graph=True,  # else gradients might be added up in place
                allow_unused=True,
            )
        found = [0.0 if gradient is None else recorder.value(gradient) for gradient in found]
    return forward.only(forward.results), Trace(tuple(recorder.lines), ()).only(found)


def _unknown(name: str) -> UnknownOperationError:
    return UnknownOperationError(f"a step calls {name}, which no kernel can compute")


def _course_depends_on_values() -> ValueError:
    return ValueError(
        "a step's course depends on values: expected torch.where instead of if, and no number "
        "read from a tensor"
    )


def _storage(tensor: Any) -> int:
    """Where the memory of a tensor begins, or of the first of a list: that of its views, too."""
    first = tensor if isinstance(tensor, Tensor) else tensor[0]
    return first.untyped_storage().data_ptr()


class _Arrivals(torch.autograd.Function):
    """Lets given gradients arrive at the results of a function."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *results: Tensor) -> Tensor:
        ctx.gradients = gradients
        return results[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        return None, *ctx.gradients


class _Reading(TorchFunctionMode):
    """Refuses what reads numbers from tensors; functions of PyTorch may do so by themselves."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function in READING:
            raise _course_depends_on_values()
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Notes each operation as a line. Tensors are known by where their values lie in memory."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # which PyTorch would import to do so, for a second
        return False

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self.differentiates = False  # whether autograd calls, and no longer the step
        self.unknown: UnknownOperationError | None = None  # after which nothing more is noted
        self._values: dict[int, Value] = {}
        self._storages: set[int] = set()  # of what the inputs are, and what is made of them
        self._kept: list[Tensor] = []  # so that no later tensor lies in the same place
        for name, tensor in inputs.items():
            self.name(tensor, name)

    def name(self, tensor: Tensor, value: Value) -> None:
        """Lets a tensor stand for this value."""
        self._values[tensor.data_ptr()] = value
        if isinstance(value, str):
            self._storages.add(_storage(tensor))
        self._kept.append(tensor)

    def value(self, tensor: Tensor | float) -> Value:
        """The value that a tensor stands for."""
        if not isinstance(tensor, Tensor):
            return float(tensor)
        if tensor.data_ptr() not in self._values:
            raise ValueError(
                "a step reads a tensor that it is not given: expected its arguments alone, and "
                "Python's numbers"
            )
        return self._values[tensor.data_ptr()]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense" and self.unknown is None:
            raise _course_depends_on_values()
        result = function(*args, **kwargs)
        in_place = name.endswith("_") and not self.differentiates
        if in_place and (self.unknown is None or _storage(args[0]) in self._storages):
            raise ValueError(f"a step changes a tensor in place, by {name}: expected a new one")
        if self.unknown is None:
            try:
                return self._recorded(name, args, kwargs, result)
            except UnknownOperationError as error:
                if self.differentiates:
                    raise
                self.unknown = error
        return result

    def _recorded(self, name: str, args: Sequence[Any], kwargs: dict, result: Any) -> Any:
        """The result of an operation, of which the value is noted."""
        if name != "_to_copy" and isinstance(result, Tensor) and result.dtype == torch.float64:
            result = result.float()  # of Python's numbers alone, where those are float64
        if name in CONSTANTS:
            self.name(result, CONSTANTS[name])
            return result
        if name in ("full_like", "full", "scalar_tensor"):
            self.name(result, float(args[0] if name == "scalar_tensor" else args[1]))
            return result
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        if not isinstance(result, Tensor) or result.shape not in {t.shape for t in tensors}:
            raise _unknown(name)  # it is not element by element
        if name.endswith("_"):  # autograd's own
            name = name.removesuffix("_")
        elif any(tensor.data_ptr() == result.data_ptr() for tensor in tensors):
            if name not in VIEWS:
                raise _unknown(name)
            return result
        if name in ("_to_copy", "clone"):
            value = self._converted(name, args[0], result)
        else:
            value = self._note(name, args, kwargs, result)
        self.name(result, value)
        return result

    def _converted(self, name: str, tensor: Tensor, result: Tensor) -> Value:
        """The value of a tensor in the dtype of a result."""
        if result.dtype == tensor.dtype:
            return self.value(tensor)
        if result.dtype == torch.float32 and tensor.dtype in (torch.bool, torch.bfloat16):
            return self._number(tensor)
        if result.dtype == torch.bfloat16 and tensor.dtype == torch.float32:
            return self._line("round", self.value(tensor))
        raise _unknown(name)

    def _note(self, name: str, args: Sequence[Any], kwargs: dict, result: Tensor) -> Value:
        """Adds the lines of an operation, and returns the name of the last."""
        name = SAME.get(name, name)
        others = [argument for argument in args if not isinstance(argument, Tensor)]
        if (
            result.dtype != (torch.bool if name in COMPARISONS | LOGIC else torch.float32)
            or not kwargs.keys() <= {"min", "max"}
            or not all(isinstance(argument, (int, float, NoneType)) for argument in others)
        ):
            raise _unknown(name)
        if name == "where":
            return self._line(name, self.value(args[0]), *map(self._number, args[1:]))
        if name in LOGIC:
            values = [self._condition(name, argument) for argument in args]
            return self._line(name, *values, is_condition=True)
        if name == "clamp":
            low, high = (*args[1:], *[None] * (3 - len(args)))
            low, high = kwargs.get("min", low), kwargs.get("max", high)
            value = self._number(args[0])
            value = value if low is None else self._line("maximum", value, self._number(low))
            return value if high is None else self._line("minimum", value, self._number(high))
        values = [self._number(argument) for argument in args]
        match name, values:
            case "rsub", [a, b]:
                return self._line("sub", b, a)
            case "reciprocal", [a]:
                return self._line("div", 1.0, a)
            case "square", [a]:
                return self._line("mul", a, a)
            case "rsqrt", [a]:
                return self._line("div", 1.0, self._line("sqrt", a))
            case "pow", [a, float(exponent)] if exponent in (1.0, 2.0, 3.0):
                power = a
                for _ in range(int(exponent) - 1):
                    power = self._line("mul", power, a)
                return power
            case "sigmoid", [a]:
                grown = self._line("add", 1.0, self._line("exp", self._line("neg", a)))
                return self._line("div", 1.0, grown)
            case "sigmoid_backward", [g, y]:
                slope = self._line("mul", y, self._line("sub", 1.0, y))
                return self._line("mul", g, slope)
            case "tanh_backward", [g, y]:
                slope = self._line("sub", 1.0, self._line("mul", y, y))
                return self._line("mul", g, slope)
            case (("sgn" | "sign"), [a]):
                above, below = self._compare("gt", a, 0.0), self._compare("lt", a, 0.0)
                return self._line("where", above, 1.0, self._line("where", below, -1.0, 0.0))
            case "masked_fill", [a, _, b]:
                return self._line("where", self.value(args[1]), b, a)
            case "relu", [a]:
                return self._line("maximum", a, 0.0)
            case "threshold_backward", [g, y, float(threshold)]:
                return self._line("where", self._compare("gt", y, threshold), g, 0.0)
        if name in COMPARISONS:
            return self._compare(name, *values)
        if {**ARITHMETIC, **FUNCTIONS}.get(name) != len(values):
            raise _unknown(name)
        return self._line(name, *values)

    def _compare(self, name: str, *values: Value) -> str:
        return self._line(name, *values, is_condition=True)

    def _condition(self, name: str, argument: Any) -> str:
        """The condition of an argument; a number is one where it is not 0."""
        value = self.value(argument)
        if not isinstance(value, str):  # a bool of Python's
            raise _unknown(name)
        return value if argument.dtype == torch.bool else self._compare("ne", value, 0.0)

    def _number(self, argument: Any) -> Value:
        """The value of an argument; 1 or 0 if it is a condition."""
        value = self.value(argument)
        condition = any(line.name == value and line.is_condition for line in self.lines)
        return self._line("where", value, 1.0, 0.0) if condition else value

    def _line(self, operation: str, *arguments: Value, is_condition: bool = False) -> str:
        line = Line(f"_{len(self.lines)}", operation, arguments, is_condition)
        self.lines.append(line)
        return line.name
