"""What both operators do for autograd and for the transforms of ``torch.func``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snn_lib.pytorch_private import is_transformed, is_watched

PLAIN = (Tensor, torch.nn.Parameter)  # other subclasses of a tensor may change what operators do


def can_skip_dispatch(inputs: Sequence[Any]) -> bool:
    """Whether a backend may be called directly, because no part of PyTorch has to see the operator.

    That is so if no gradient is needed and no compiler, mode or subclass of a tensor is at work. A
    direct call leaves out PyTorch's dispatch and the operator's checks, which take most of the time
    of a single step of a stream. Tensors on several devices are left to those checks.
    """
    if torch.compiler.is_compiling() or is_watched():
        return False
    differentiable = torch.is_grad_enabled()
    device = inputs[0].device
    for tensor in inputs:
        if isinstance(tensor, Tensor) and (
            type(tensor) not in PLAIN
            or tensor.device != device
            or tensor.is_neg()  # its memory holds numbers of the opposite sign
            or (differentiable and tensor.requires_grad)
        ):
            return False
    return device.type != "meta"


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keeps tensors for the backward pass, and where a transform is at work for forward mode too.

    Tensors that are kept for forward mode live as long as the graph. The backward pass does not
    free them step by step, and the hooks of saved tensors, which checkpointing uses, do not see
    them.
    """
    ctx.save_for_backward(*tensors)
    if is_transformed():
        ctx.save_for_forward(*tensors)


def run_backward(operator: Callable, needed: list[bool], *arguments: Any) -> tuple:
    """Runs a backward operator; returns ``None`` for each gradient that is not needed.

    The operator has no derivative registered, so without a transform PyTorch itself refuses a
    second derivative. Where a transform is at work, ``refuse_second`` refuses it.
    """
    if is_transformed():
        name = str(operator)
        gradients = refuse_second(name, lambda *args: operator(*args, needed), *arguments)
    else:
        gradients = operator(*arguments, needed)
    return tuple(
        gradient if need else None for gradient, need in zip(gradients, needed, strict=True)
    )


def refuse_second(name: str, function: Callable, *arguments: Any) -> tuple[Tensor, ...]:
    """Runs ``function``, a derivative called ``name``, so that its own derivative is refused."""
    return _FirstDerivative.apply(name, function, *arguments)


class _FirstDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, function: Callable, *arguments: Any) -> tuple[Tensor, ...]:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.name, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        _refuse_second_derivative(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        _refuse_second_derivative(ctx.name)


def _refuse_second_derivative(name: str) -> None:
    raise NotImplementedError(
        f"second derivative: neither backward through {name} nor forward mode over it is possible"
    )


def fill_tangents(tangents: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tangents, with zeros in place of ``None``."""
    return [
        torch.zeros_like(tensor) if tangent is None else tangent
        for tangent, tensor in zip(tangents, tensors, strict=True)
    ]


def register_vmap(operator: Callable, dropout_at: int | None = None) -> None:
    """Tells ``torch.func.vmap`` how to map an operator: by more channels in a single call.

    Channels do not depend on each other. Only dropout does on their number, by which a seed decides
    which spikes it drops: if argument number ``dropout_at`` is not zero, the operator is called
    once for each mapped element.
    """

    def rule(info: Any, in_dims: tuple, *arguments: Any) -> tuple[tuple, tuple]:
        size = info.batch_size
        if dropout_at is not None and arguments[dropout_at]:
            calls = [
                operator(*(_select(*pair, number) for pair in zip(arguments, in_dims, strict=True)))
                for number in range(size)
            ]
            outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
            return outputs, (0,) * len(outputs)
        folded = [_more_channels(*pair, size) for pair in zip(arguments, in_dims, strict=True)]
        channels = folded[0].shape[-1]
        results = [
            (output.unflatten(-1, (size, channels // size)), output.dim() - 1)
            if output.shape[-1] == channels
            else (output, None)  # empty, a gradient that is not needed
            for output in operator(*folded)
        ]
        return tuple(zip(*results, strict=True))

    torch.library.register_vmap(operator.default, rule)


def _select(argument: Any, dim: Any, number: int) -> Any:
    """Element ``number`` of an argument that is mapped along ``dim``."""
    return argument.select(dim, number) if isinstance(dim, int) else argument


def _more_channels(argument: Any, dim: Any, size: int) -> Any:
    """``size`` tensors (..., N), mapped along ``dim`` or all the same, as one (..., size * N)."""
    if not isinstance(argument, Tensor) or not argument.is_floating_point():  # a setting or seed
        return argument
    if isinstance(dim, int):
        return argument.movedim(dim, -2).flatten(-2)
    return argument.unsqueeze(-2).expand(*argument.shape[:-1], size, -1).flatten(-2)
