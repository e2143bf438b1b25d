"""Delays: each channel of a sequence read from a step of its own, between two neighbouring steps.

    output[t, b, n] = parts[0, n] sequence[t + start[n], b, n]
                    + parts[1, n] sequence[t + start[n] + 1, b, n]

with zeros for the steps that the sequence does not have. The gradient of the sequence is the same
sum of the output's gradient, which begins at other steps, and that of the parts is a sum over all
steps of two products. So two operators are all that is needed, for derivatives of any order. Their
kernels are the backend's ``delays`` if it has some. Elsewhere PyTorch gathers.
"""

from typing import Any

import torch
from torch import Tensor

from snn_lib.kernels import backend_for
from snn_lib.pytorch_private import is_transformed


def interpolate(sequence: Tensor, start: Tensor, parts: Tensor, steps: int) -> Tensor:
    """The channels of a sequence, each from a step of its own.

    Args:
        sequence: ``(T, B, N)``, float32 or float64.
        start: int64 ``(N,)``.
        parts: ``(2, N)``, in the dtype of the sequence.
        steps: the number of steps of the output.

    Returns:
        ``(steps, B, N)``.
    """
    if is_transformed():  # plain PyTorch, which has every derivative
        return _interpolate_plainly(sequence, start, parts, steps)
    return torch.ops.snn.interpolate(sequence, start, parts, steps)


def _interpolate_plainly(sequence: Tensor, start: Tensor, parts: Tensor, steps: int) -> Tensor:
    now, later = (_read(sequence, start + k, steps) for k in (0, 1))
    return parts[0] * now + parts[1] * later


def _correlate_plainly(gradient: Tensor, sequence: Tensor, start: Tensor) -> Tensor:
    steps = gradient.shape[0]
    return torch.stack([(gradient * _read(sequence, start + k, steps)).sum((0, 1)) for k in (0, 1)])


def _read(sequence: Tensor, start: Tensor, steps: int) -> Tensor:
    """So many steps of each channel from its start on."""
    total = sequence.shape[0]
    if total == 0:
        return sequence.new_zeros(steps, *sequence.shape[1:])
    places = torch.arange(steps, device=start.device)[:, None] + start  # (steps, N)
    inside = ((places >= 0) & (places < total))[:, None]
    index = places.clamp(0, total - 1)[:, None].expand(steps, *sequence.shape[1:])
    return torch.where(inside, sequence.gather(0, index), 0.0)


@torch.library.custom_op(
    "snn::interpolate",
    mutates_args=(),
    schema="(Tensor sequence, Tensor start, Tensor parts, SymInt steps) -> Tensor",
)
def _interpolate(sequence, start, parts, steps):
    _check(sequence, start, parts)
    delays = getattr(backend_for(sequence), "delays", None)
    compute = _interpolate_plainly if delays is None else delays.interpolate
    return compute(sequence, start, parts, steps)


@_interpolate.register_fake
def _(sequence, start, parts, steps):
    _check(sequence, start, parts)
    return sequence.new_empty(steps, *sequence.shape[1:])


@torch.library.custom_op(
    "snn::correlate",
    mutates_args=(),
    schema="(Tensor gradient, Tensor sequence, Tensor start) -> Tensor",
)
def _correlate(gradient, sequence, start):
    _check(sequence, start, gradient)
    delays = getattr(backend_for(sequence), "delays", None)
    compute = _correlate_plainly if delays is None else delays.correlate
    return compute(gradient, sequence, start)


@_correlate.register_fake
def _(gradient, sequence, start):
    _check(sequence, start, gradient)
    return gradient.new_empty(2, gradient.shape[2])


def _check(sequence: Tensor, start: Tensor, other: Tensor) -> None:
    """Refuses what the kernels, which trust their arguments, cannot compute."""
    channels = sequence.shape[-1:]
    fits = sequence.dim() == 3 and start.shape == channels == other.shape[-1:]
    same = sequence.dtype == other.dtype and sequence.device == start.device == other.device
    if not (fits and same and start.dtype == torch.int64):
        raise ValueError(
            f"a sequence {tuple(sequence.shape)} in {sequence.dtype}, starts {tuple(start.shape)} "
            f"in {start.dtype} and {tuple(other.shape)} in {other.dtype} do not fit each other"
        )


def _remember_parts(ctx: Any, inputs: tuple, output: Tensor) -> None:
    sequence, start, parts, _ = inputs
    ctx.total = sequence.shape[0]
    ctx.save_for_backward(sequence if ctx.needs_input_grad[2] else None, start, parts)


def _differentiate_parts(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    sequence, start, parts = ctx.saved_tensors
    of_sequence = of_parts = None
    if ctx.needs_input_grad[0]:
        of_sequence = interpolate(gradient, -1 - start, parts.flip(0), ctx.total)
    if ctx.needs_input_grad[2]:
        of_parts = torch.ops.snn.correlate(gradient, sequence, start)
    return of_sequence, None, of_parts, None


def _remember_products(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_products(ctx: Any, parts: Tensor) -> tuple[Tensor | None, ...]:
    gradient, sequence, start = ctx.saved_tensors
    of_gradient = interpolate(sequence, start, parts, gradient.shape[0])
    of_sequence = interpolate(gradient, -1 - start, parts.flip(0), sequence.shape[0])
    return of_gradient, of_sequence, None


_interpolate.register_autograd(_differentiate_parts, setup_context=_remember_parts)
_correlate.register_autograd(_differentiate_products, setup_context=_remember_products)
