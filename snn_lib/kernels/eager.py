"""The backend that needs nothing but PyTorch: the step and its adjoint, one step after the other.

It serves every device that has no kernels. The operator runs below autograd, so the gradients come
from the adjoint's trace, as in the kernels, and not from a graph.
"""

from collections.abc import Callable, Sequence
from itertools import chain, compress

import torch
from torch import Tensor

from snn_lib.kernels import plain
from snn_lib.kernels.program import parameters, program
from snn_lib.kernels.trace import Trace, Value

OPERATIONS: dict[str, Callable] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "abs": torch.abs,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_not": torch.logical_not,
    "where": torch.where,
    "round": lambda a: a.to(torch.bfloat16).to(a.dtype),
}


def blocks_of(steps: int) -> int:
    """None: the way back begins with a run from the first step."""
    return 0


def forward(
    key: str,
    x: Tensor,
    coefficients: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``plain.run``; the third is what a backward pass is given, and empty."""
    settings = {"dropout": dropout, "seed": seed, "dtype": dtype}
    with torch.no_grad():
        found = plain.run(program(key), x, coefficients, state, lengths, **settings)
    return *found, coefficients.new_empty(2)


def backward(
    key: str,
    grad_output: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    state: Tensor | None,
    checkpoints: Tensor,
    lengths: Tensor | None,
    surrogate: str,
    numbers: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    need_x: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the coefficients and of the state; x's is empty if not needed.

    Those of coefficients that are not ``needed`` are zero.
    """
    made, own, steps = program(key), coefficients.dtype, len(x)
    lanes = x.shape[1:]
    values = dict(zip(made.coefficients, coefficients.unbind(), strict=True))
    if state is None:
        state = coefficients.new_zeros(len(made.states), *lanes)
    if grad_last is None:
        grad_last = torch.zeros_like(state)
    kept = [coefficients.new_ones(())] * steps
    if dropout:
        kept = plain.dropout_scale(x.shape, own, dropout, seed).unbind()
    sequence = x.to(own)

    before = [dict(zip(made.states, state.unbind(), strict=True))]
    again = made.forward.only(made.forward.results[1:])
    known = numbers_of(again, coefficients)
    for t in range(steps - 1):
        now = {"x": sequence[t], "kept": kept[t], **values, **before[t]}
        after = evaluate(again, now, known)
        before.append(dict(zip(made.states, after, strict=True)))

    inputs, trained = made.inputs(surrogate), [*compress(made.coefficients, needed)]
    wanted = [*["x"] * need_x, *made.states, *trained]
    gradients = dict(zip(inputs, made.adjoint(surrogate).results, strict=True))
    adjoint = made.adjoint(surrogate).only([gradients[name] for name in wanted])
    known = numbers_of(adjoint, coefficients)
    numbers = [coefficients.new_full((), number) for number in numbers]  # new_tensor would wait
    values |= dict(zip(inputs[len(inputs) - len(parameters(surrogate)) :], numbers, strict=True))
    names = [f"_g{number}" for number in range(1, 1 + len(made.states))]
    carried = list(torch.zeros_like(grad_last).unbind())
    grad_x = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    widest = torch.float32 if x.device.type == "mps" else torch.float64
    sums = torch.zeros_like(coefficients, dtype=widest)
    for t in range(steps - 1, -1, -1):
        carried = _with_last(carried, grad_last, lengths, t + 1, steps)
        now = {"x": sequence[t], "kept": kept[t], **values, **before[t]}
        now |= {"_g0": grad_output[t].to(own), **dict(zip(names, carried, strict=True))}
        found = dict(zip(wanted, evaluate(adjoint, now, known), strict=True))
        found = {name: gradient.expand(lanes) for name, gradient in found.items()}
        carried = [found[name] for name in made.states]
        if need_x:
            grad_x[t] = found["x"]
        for name in trained:
            sums[made.coefficients.index(name)] += found[name].sum(0, dtype=widest)
    carried = _with_last(carried, grad_last, lengths, 0, steps)
    grad_state = torch.stack(carried) if carried else torch.zeros_like(state)
    return grad_x, sums.to(own), grad_state


def numbers_of(trace: Trace, like: Tensor) -> dict[float, Tensor]:
    """The numbers of a trace as tensors, in the dtype and on the device of ``like``."""
    values = (*trace.results, *chain.from_iterable(line.arguments for line in trace.lines))
    return {v: like.new_full((), v) for v in values if not isinstance(v, str)}


def evaluate(trace: Trace, values: dict[str, Tensor], numbers: dict[float, Tensor]) -> list[Tensor]:
    """The results of a trace for these inputs; ``numbers`` are those of :func:`numbers_of`."""
    known: dict[Value, Tensor] = {**numbers, **values}
    for line in trace.lines:
        known[line.name] = OPERATIONS[line.operation](*[known[a] for a in line.arguments])
    return [known[result] for result in trace.results]


def _with_last(
    carried: list[Tensor], grad_last: Tensor, lengths: Tensor | None, done: int, steps: int
) -> list[Tensor]:
    """The gradients that arrive at the state after ``done`` steps, with that of the last one."""
    pairs = zip(carried, grad_last, strict=True)
    if lengths is None:
        return [g + last for g, last in pairs] if done == steps else carried
    ends = (lengths.clamp(0, steps) == done)[:, None]
    return [torch.where(ends, g + last, g) for g, last in pairs]
