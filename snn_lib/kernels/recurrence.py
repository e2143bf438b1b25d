"""A program whose output comes back through weights, one step later.

    current[t] = x[t] + W fed[t]
    output[t], state = step(current[t], state)
    fed[t + 1] = output[t]

:func:`run_plainly` is the definition, with any weights. For a matrix there is an operator, which
takes each step on the backend that serves its tensors. In the backward pass, the gradient of a
current goes to the output of the step before it through the transposed matrix, and all steps share
one product for the gradient of the matrix.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from snn_lib.kernels import backend_for, eager
from snn_lib.kernels.inputs import Inputs
from snn_lib.kernels.operator import SCHEMA, has_kernels
from snn_lib.kernels.program import fire_with, name_of, surrogate_of
from snn_lib.pytorch_private import is_transformed, run_uncompiled
from snn_lib.surrogate import Surrogate

PLACES = 0, 1, 3, 4, 5  # among the operator's arguments, of those that have gradients
FEW = 0.5  # the part of all outputs up to which the gradient of the weights skips zeros


@run_uncompiled  # a transform, or what no kernel can compute, runs step by step
def run_plainly(
    inputs: Inputs, surrogate: Surrogate, weigh: Callable[[Tensor], Tensor], fed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a program on ``x`` and what comes back, one step after the other.

    Args:
        inputs: the program and what it runs with, without dropout.
        surrogate: the surrogate gradient.
        weigh: the weights, ``(B, N)`` to ``(B, N)``.
        fed: what comes back at the first step, ``(B, N)``.

    Returns:
        The currents and the output, each ``(T, B, N)``, and the states ``(S, B, N)`` after the last
        step, or each sequence's own.
    """
    rows, ends, coefficients = inputs.first.unbind(), inputs.first, inputs.coefficients.unbind()
    fire, currents, outputs = fire_with(surrogate), [], []
    for t, now in enumerate(inputs.x.unbind()):
        currents.append(now + weigh(fed))
        fed, rows = inputs.program.step(currents[-1], None, rows, coefficients, fire)
        if any(one.shape != now.shape for one in (fed, *rows)):  # a coefficient, perhaps
            fed, *rows = (one.expand(now.shape) for one in (fed, *rows))
        outputs.append(fed)
        ends = _at_end(inputs, t, torch.stack(rows), ends) if rows else ends
    if not outputs:
        return inputs.x, inputs.x, ends
    return torch.stack(currents), torch.stack(outputs), ends


def run(
    inputs: Inputs, surrogate: Surrogate, weight: Tensor, fed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`run_plainly`, with a matrix ``(N, N)`` as weights."""
    tensors = inputs.x, inputs.coefficients, inputs.state, weight, fed
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        name, numbers = name_of(surrogate)
        inputs = inputs._replace(surrogate=name, numbers=numbers, keep=True)
    if is_transformed() or not has_kernels(inputs.key, inputs.surrogate):
        return run_plainly(inputs, surrogate, lambda spikes: F.linear(spikes, weight), fed)
    return torch.ops.snn.recur(weight, fed, *inputs)[:3]


@torch.library.custom_op(
    "snn::recur",
    mutates_args=(),
    schema=f"(Tensor weight, Tensor fed, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _recur(weight, fed, *arguments):
    inputs = Inputs(*arguments)
    _check(inputs, weight, fed)
    currents, outputs, _, kept = _new_results(inputs)
    backend = backend_for(weight)
    if hasattr(backend, "recurrence"):
        ends = backend.recurrence.forward(inputs, weight, fed, currents, outputs, kept)
        return currents, outputs, ends, kept
    after = ends = inputs.first.contiguous()
    with torch.autocast(weight.device.type, enabled=False):
        for t, one in enumerate(_steps(inputs, currents)):
            if inputs.keep:
                kept[t] = after
            torch.addmm(inputs.x[t], fed, weight.t(), out=currents[t])
            output, after, _ = backend.forward(one._replace(state=after))
            fed = outputs[t].copy_(output[0])
            ends = _at_end(inputs, t, after, ends)
    return currents, outputs, ends.clone(), kept


@_recur.register_fake
def _(weight, fed, *arguments):
    inputs = Inputs(*arguments)
    _check(inputs, weight, fed)
    return _new_results(inputs)


@torch.library.custom_op(
    "snn::recur_backward",
    mutates_args=(),
    schema="(Tensor grad_currents, Tensor grad_outputs, Tensor grad_last, Tensor currents, "
    "Tensor outputs, Tensor kept, bool need_weight, Tensor weight, Tensor fed, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _recur_backward(
    grad_currents,
    grad_outputs,
    grad_last,
    currents,
    outputs,
    kept,
    need_weight,
    weight,
    fed,
    *arguments,
):
    inputs = Inputs(*arguments)
    backend, before = backend_for(weight), torch.cat([fed[None], outputs])[:-1]
    grad_x, grad_coefficients = torch.empty_like(currents), torch.zeros_like(inputs.coefficients)
    grad_fed, checkpoints = torch.zeros_like(fed), fed.new_empty(2)
    # Without lengths, the gradient of the last state is where the backward pass begins.
    reaching, lengths = grad_last, inputs.lengths
    if lengths is not None:
        lengths = lengths.clamp(max=len(currents))
        reaching = torch.where((lengths == len(currents))[:, None], grad_last, 0.0)
    for t, one in reversed([*enumerate(_steps(inputs, currents))]):
        arriving = grad_outputs[t] + grad_fed
        of_current, of_coefficients, reaching = backend.backward(
            one._replace(state=kept[t]), arriving[None], reaching, checkpoints, True
        )
        torch.add(of_current[0], grad_currents[t], out=grad_x[t])
        grad_fed = grad_x[t] @ weight
        grad_coefficients += of_coefficients
        if lengths is not None:
            reaching = reaching + torch.where((lengths == t)[:, None], grad_last, 0.0)
    grad_weight = torch.zeros_like(weight)
    if need_weight:
        grad_weight = _gradient(inputs, grad_x.flatten(0, 1), before.flatten(0, 1))
    return grad_weight, grad_fed, grad_x, grad_coefficients, reaching.clone()


@_recur_backward.register_fake
def _(grad_currents, grad_outputs, grad_last, currents, *rest):
    _, _, _, weight, fed, *others = rest
    like = weight, fed, currents, Inputs(*others).coefficients, grad_last
    return tuple(map(torch.empty_like, like))


def _steps(inputs: Inputs, currents: Tensor) -> list[Inputs]:
    """What the program runs with at each step, but for its state."""
    return [inputs._replace(x=current, lengths=None) for current in currents[:, None]]


def _at_end(inputs: Inputs, t: int, after: Tensor, before: Tensor) -> Tensor:
    """The states after step t, of sequences that end before it those that they ended with."""
    if inputs.lengths is None:
        return after
    return torch.where((t < inputs.lengths)[:, None], after, before)


def _gradient(inputs: Inputs, gradient: Tensor, outputs: Tensor) -> Tensor:
    """The gradient of the weights, from that of all currents ``(R, N)``."""
    products = _products(inputs, gradient)
    if products is None or outputs.count_nonzero() > FEW * outputs.numel():
        return gradient.t() @ outputs
    return products.gradient(gradient, outputs)


def _products(inputs: Inputs, tensor: Tensor) -> ModuleType | None:
    """The backend's products of spikes, if spikes come back and there are kernels for them."""
    products, channels = getattr(backend_for(tensor), "products", None), inputs.x.shape[2]
    dtypes = tensor.dtype, tensor.dtype
    serves = products and products.serves(*dtypes, torch.Size((channels, channels)))
    return products if serves and inputs.program.spikes[-1] else None


def _new_results(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the currents, the output, the last state, and the states before all steps."""
    shape, own = inputs.x.shape, inputs.coefficients
    last = own.new_empty(len(inputs.program.states), *shape[1:])
    kept = own.new_empty(shape[0] if inputs.keep else 0, *last.shape)
    return own.new_empty(shape), own.new_empty(shape), last, kept


def _check(inputs: Inputs, weight: Tensor, fed: Tensor) -> None:
    """Refuses what the kernels, which trust their arguments, cannot compute."""
    inputs.check()
    batch, channels = inputs.x.shape[1:]
    own = inputs.coefficients
    for name, tensor, shape in (
        ("weight", weight, (channels, channels)),
        ("fed", fed, (batch, channels)),
    ):
        if (tensor.shape, tensor.dtype, tensor.device) != (
            torch.Size(shape),
            own.dtype,
            own.device,
        ):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}, "
                f"expected {shape} in {own.dtype} on {own.device}"
            )
    if inputs.dropout or not inputs.x.dtype == inputs.dtype == own.dtype:
        raise ValueError(f"expected no dropout, and x and the output in {own.dtype}")


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    currents, outputs, _, kept = output
    ctx.settings = [None if isinstance(value, Tensor) else value for value in inputs]
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, currents, outputs, kept)


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, currents, outputs, kept = ctx.saved_tensors
    pairs = zip(ctx.settings, tensors, strict=True)
    weight, fed, *others = (setting if tensor is None else tensor for setting, tensor in pairs)
    inputs, needs = Inputs(*others), ctx.needs_input_grad
    zeros = currents.new_zeros(()).expand_as(currents)
    rest = zeros, zeros, inputs.rest
    arriving = [zero if own is None else own for own, zero in zip(gradients, rest, strict=False)]
    if torch.is_grad_enabled():  # somebody differentiates the gradient
        surrogate = surrogate_of(inputs.surrogate, inputs.numbers)

        def run_by_hand(
            weight: Tensor, fed: Tensor, x: Tensor, coefficients: Tensor, state: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            given = inputs._replace(x=x, coefficients=coefficients, state=state)
            return run_plainly(given, surrogate, lambda spikes: F.linear(spikes, weight), fed)

        tensors = weight, fed, inputs.x, inputs.coefficients, inputs.state
        wanted = [needs[place] for place in PLACES]
        found = eager.differentiate(run_by_hand, tensors, wanted, arriving)
    else:
        found = torch.ops.snn.recur_backward(
            *arriving, currents, outputs, kept, needs[0], weight, fed, *inputs
        )
    by_place: dict[int, Tensor | None] = dict(zip(PLACES, found, strict=True))
    return tuple(by_place.get(place) if need else None for place, need in enumerate(needs))


_recur.register_autograd(_differentiate, setup_context=_remember)
