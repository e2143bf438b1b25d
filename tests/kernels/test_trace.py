"""What is recorded of a step and of its adjoint, against PyTorch's own results."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from snn_lib.data.batches import default_dtype
from snn_lib.kernels.trace import (
    ARITHMETIC,
    COMPARISONS,
    FUNCTIONS,
    LOGIC,
    Line,
    Trace,
    UnknownOperationError,
    trace,
)

# Functions of two tensors, by the operations that they record.
RECORDED = {
    "add": lambda a, b: a + b + 2,
    "sub": lambda a, b: a - b - 1.5,
    "rsub": lambda a, b: 1 - a * b,
    "mul": lambda a, b: 3 * a * b,
    "div": lambda a, b: a / b,
    "rdiv": lambda a, b: 2.0 / b,
    "neg": lambda a, b: -a,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "maximum of equals": lambda a, b: torch.maximum(a, a),
    **{name: (lambda a, b, f=name: getattr(torch, f)(a)) for name in FUNCTIONS},
    "log of what is positive": lambda a, b: torch.log(a * a + 1.0),
    "sqrt of what is positive": lambda a, b: torch.sqrt(b * b + 1.0),
    **{
        name: (lambda a, b, f=name: torch.where(getattr(torch, f)(a, b), a, b))
        for name in COMPARISONS
    },
    "compared with a number": lambda a, b: torch.where(a > 0.25, b, 1.0),
    "and": lambda a, b: ((a > 0) & (b > 0)).to(a) * b,
    "or": lambda a, b: torch.logical_or(a > 0, b > 0) * b,
    "not": lambda a, b: torch.where(~(a > 0), a, 0.0),
    "logic of numbers": lambda a, b: (
        torch.logical_not(torch.relu(a)) * b
        + torch.logical_or(torch.relu(a), b > 0).to(a)
        + torch.logical_and(a, torch.relu(b)) * a
    ),
    "a condition as a number": lambda a, b: a * (b < 0).float() + 1 - (a >= b).to(a),
    "clamp": lambda a, b: torch.clamp(a, -0.5, 0.5),
    "clamp from below": lambda a, b: a.clamp(min=-0.5),
    "clamp from above": lambda a, b: a.clamp(max=b),
    "square": lambda a, b: a.square() + b**2,
    "cube": lambda a, b: a**3,
    "reciprocal": lambda a, b: b.reciprocal(),
    "rsqrt": lambda a, b: (a * a + 1).rsqrt(),
    "sigmoid": lambda a, b: torch.sigmoid(a) * b,
    "relu": lambda a, b: torch.relu(a),
    "sign": lambda a, b: torch.sign(a) * b,
    "masked": lambda a, b: a.masked_fill(b > 0, 2.0),
    "constants": lambda a, b: (
        a * torch.ones_like(b) + torch.full_like(a, 3.0) + a.new_zeros(a.shape)
    ),
    "detached": lambda a, b: a.detach() * b,
    "the input itself": lambda a, b: b,
    "no gradient": lambda a, b: (a > b).float(),
    "rounded": lambda a, b: a.to(torch.bfloat16).to(a.dtype) * b,
}


def evaluate(found, values):
    """The results of a trace for these inputs."""
    known = dict(values)
    for line in found.lines:
        given = [torch.as_tensor(known.get(argument, argument)) for argument in line.arguments]
        conditions = given[:1] if line.operation == "where" else given
        if line.operation in {"where", *LOGIC}:  # languages other than PyTorch take no numbers
            assert all(one.dtype == torch.bool for one in conditions)
        if line.operation == "round":
            known[line.name] = given[0].bfloat16().float()
        else:
            known[line.name] = getattr(torch, line.operation)(*given)
    return [torch.as_tensor(known.get(result, result)).expand(2) for result in found.results]


@pytest.mark.parametrize("name", RECORDED)
def test_a_traced_function_and_its_adjoint_compute_what_pytorch_computes(name):
    function = RECORDED[name]
    forward, adjoint = trace(lambda a, b: [function(a, b)], ["a", "b"])
    for _ in range(20):
        a, b, g = (torch.randn(2) for _ in range(3))
        values = {"a": a, "b": b, "_g0": g}
        leaves = [tensor.clone().requires_grad_() for tensor in (a, b)]
        result = function(*leaves)
        (found,) = evaluate(forward, values)
        torch.testing.assert_close(found, result.detach(), rtol=1e-6, atol=1e-7, equal_nan=True)
        if not result.requires_grad:
            continue
        expected = torch.autograd.grad(result, leaves, g, materialize_grads=True)
        gradients = evaluate(adjoint, values)
        torch.testing.assert_close(gradients, list(expected), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_operation_of_the_tables_is_recorded_and_no_other():
    known = {*ARITHMETIC, *FUNCTIONS, *COMPARISONS, *LOGIC, "where", "round"}
    used = {
        line.operation
        for function in RECORDED.values()
        for one in trace(lambda a, b, f=function: [f(a, b)], ["a", "b"])
        for line in one.lines
    }
    assert used == known


def test_a_trace_has_the_lines_that_its_results_need_and_no_more():
    def step(x, v):
        torch.exp(x)  # which nobody asks for
        v = 0.5 * v + x
        return [v * v, v]

    forward, adjoint = trace(step, ["x", "v"])
    assert [line.operation for line in forward.lines] == ["mul", "add", "mul"]
    assert forward.results == (forward.lines[-1].name, forward.lines[1].name)
    assert forward.reads("x")
    assert forward.reads("nothing", "v")
    assert not forward.reads("_g0")
    assert adjoint.reads("_g0", "_g1")
    assert forward.only(forward.results[1:]) == Trace(forward.lines[:2], forward.results[1:])
    assert forward.only(["x", 1.0]) == Trace((), ("x", 1.0))


def test_products_and_sums_with_zeros_and_ones_are_left_out_of_a_trace():
    lines = (
        Line("a", "mul", ("zero", "x")),
        Line("b", "mul", ("y", "one")),
        Line("c", "add", ("a", "b")),
        Line("d", "sub", ("c", "zero")),
        Line("e", "sub", ("zero", "d")),  # a negation, which has to be computed
        Line("f", "div", ("e", "one")),
    )
    short = Trace(lines, ("f", "a", "one")).without({"zero": 0.0, "one": 1.0})
    kept = Line("e", "sub", (0.0, "y")), Line("f", "div", ("e", 1.0))
    assert short == Trace(kept, ("f", 0.0, 1.0))


def test_modes_devices_and_transforms_change_no_trace():
    def step(x, v):
        return [torch.where(x > v, x, 1.0) * v + torch.where(x > v, 1.5, 1.0) + (x > 0) * 0.5]

    expected = trace(step, ["x", "v"])
    with default_dtype(torch.float64):
        with torch.device("meta"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert trace(step, ["x", "v"]) == expected
        with pytest.raises(UnknownOperationError, match="_to_copy"):
            trace(lambda x: [x.double() * 2.0], ["x"])
    torch.func.vmap(lambda x: [x, trace(step, ["x", "v"])][0])(torch.zeros(3))


OUTSIDE = torch.ones(2)


def _put(tensor, place):
    tensor[place] = 0
    return tensor


UNKNOWN = {  # what runs in plain PyTorch
    "erf": lambda a, b: torch.erf(a),
    "sort": lambda a, b: torch.sort(a).values - torch.quantile(a, 0.5, dim=-1, keepdim=True),
    "rand_like": lambda a, b: torch.rand_like(a),
    "sum": lambda a, b: a - a.sum(-1, keepdim=True),
    "mean": lambda a, b: a - a.mean(),
    "select": lambda a, b: a - a[0],
    "unsqueeze": lambda a, b: a.unsqueeze(0) * b,
    "slice": lambda a, b: a - a[:1],
    "cat": lambda a, b: torch.cat([a, b]),
    "t": lambda a, b: a.t() * b,
    "flip": lambda a, b: a.flip(0),
    "div": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "add": lambda a, b: torch.add(a, b, alpha=2.0),  # PyTorch fuses them, so the bits differ
    "pow": lambda a, b: a**0.7,
    "mul": lambda a, b: (a.bfloat16() * b.bfloat16()).float(),
    "_to_copy": lambda a, b: a.int() * b,
    "bitwise_xor": lambda a, b: ((a > 0) ^ (b > 0)).float(),
    # what changes a tensor of its own, or reads a number within a function of PyTorch's
    "empty_like": lambda a, b: _put(torch.empty_like(a), slice(None)) * b,
    "tan": lambda a, b: _put(torch.tan(a), slice(0, 1)) + b,
    "argmax": lambda a, b: (
        torch.zeros_like(a).scatter_(-1, a.argmax(-1, True), 1.0) * F.one_hot(b.argmax(-1), 1)
    ),
}
REFUSED = {  # what is a mistake
    "reads a tensor that it is not given": lambda a, b: a * OUTSIDE,
    "changes a tensor in place, by add_": lambda a, b: a.add_(b),
    "changes a tensor in place, by mul_": lambda a, b: (a + b).mul_(b),
    "a step's course depends on values: expected": lambda a, b: a if a > b else b,
    "a step's course depends on values": lambda a, b: a * float(b.detach()),
    "course depends on values": lambda a, b: a * b.tolist()[0],
    "and no number read from": lambda a, b: a * np.exp(b),
    "step's course depends on values: expected torch": lambda a, b: a * b.detach().numpy()[0],
    # after what no kernel can compute, too
    "depends on values: expected torch.where": lambda a, b: a if (a > b).any() else b,
    "and no number read from a tensor": lambda a, b: a * torch.erf(b).max().item(),
    "in place, by (index_put|masked_fill)_": lambda a, b: _put(a + b, a > 0),
    "in place, by fill_": lambda a, b: _put(a + b, slice(None)),
    "tensor in place, by mul_": lambda a, b: torch.erf(a) + a.detach().mul_(0.0),
    "a tensor in place, by zero_": lambda a, b: torch.erf(a) + a[..., 1:].zero_().sum(),
    "in place, by _foreach_add_": lambda a, b: torch._foreach_add_([a], [b]),
    "expected torch.where instead of if, and": lambda a, b: (
        a if torch.is_nonzero(torch.erf(b)) else b
    ),
    "returns what is no tensor": lambda a, b: 1.0,
    "returns what is no tensor of numbers": lambda a, b: a > b,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operations_that_no_kernel_can_compute_are_named(name):
    with pytest.raises(UnknownOperationError, match=f"^a step calls {name}, which no kernel can"):
        trace(lambda a, b: [UNKNOWN[name](a, b)], ["a", "b"])


def test_pytorch_s_search_for_nan_changes_no_trace():
    def step(x, y):
        return [torch.where(x > y, x * y, torch.exp(y))]

    expected = trace(step, ["x", "y"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autograd.set_detect_anomaly(True):
            assert repr(trace(step, ["x", "y"])) == repr(expected)
            assert torch.is_anomaly_enabled()


def test_a_step_that_draws_is_traced_without_a_draw():
    """Else a run that is resumed, and traces its cells anew, would draw other numbers."""
    before = torch.get_rng_state()
    with pytest.raises(UnknownOperationError):
        trace(lambda a, b: [a + torch.rand_like(a) + torch.randn_like(b)], ["a", "b"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("words", REFUSED)
def test_mistakes_of_a_step_are_refused_in_a_line(words):
    with pytest.raises(ValueError, match=words) as error:
        trace(lambda a, b: [REFUSED[words](a, b)], ["a", "b"])
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, UnknownOperationError)
