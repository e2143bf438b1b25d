"""Weights that receive spikes: products that leave out the neurons that did not fire.

:func:`linear` computes what PyTorch's function of this name does, and adds up in another order. Its
forward pass and the gradient of the weights read nothing for inputs that are zero. The gradient of
the input reads nothing where that of the output is zero, as it is for neurons far from their
threshold. In the context :class:`SkippingZeros` it takes the other's place.

Whether it has a kernel depends on the layer alone, and what the kernel computes for a step on no
other step, so a sequence in chunks gives the bits of the whole. The gradient of the weights, to
which all steps add, is left to PyTorch where many inputs fired.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from snn_lib.kernels import backend_for
from snn_lib.kernels.operator import PLAIN
from snn_lib.pytorch_private import is_transformed, sees_operations
from snn_lib.recomputing import decide

# By the dtype of the weights, the part of all inputs up to which their gradient skips zeros.
FEW = {torch.float32: 0.5, torch.bfloat16: 0.15}


class SkippingZeros(TorchFunctionMode):
    """The context in which ``torch.nn.functional.linear`` leaves out inputs that are zero.

    Args:
        known: whether most inputs are known to be zero, see :func:`linear`.
    """

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Calls the function, or what :func:`linear` computes in its place."""
        kwargs = kwargs or {}
        if function is F.linear:
            return _linear(*args, **kwargs, known=self.known)
        return function(*args, **kwargs)


def may_skip_zeros() -> bool:
    """Whether no compiler, transform or mode has to see PyTorch's own product.

    A chunk asks in its first run alone: in the second, for the backward pass, a mode may look on.
    """
    return not (torch.compiler.is_compiling() or is_transformed() or sees_operations())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, known: bool = True) -> Tensor:
    """Weighs an input of which most is zero: ``x @ weight.T + bias``.

    There are kernels for the CPU, in float32 and, under autocast too, in bfloat16 with sums in
    float32. Layers of few inputs or outputs and all else are left to PyTorch.

    Args:
        x: ``(*, K)``.
        weight: ``(N, K)``.
        bias: ``(N,)``.
        known: whether most of x is known to be zero. If not, products in bfloat16 are left to
            PyTorch, which is twice as fast where nothing is zero; in float32 it is not faster.

    Returns:
        ``(*, N)``.
    """
    return _linear(x, weight, bias, known) if may_skip_zeros() else F.linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, known: bool = True) -> Tensor:
    """As :func:`linear`, where modes do not count."""
    casts = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if casts else weight.dtype
    tensors = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if (
        not (torch.compiler.is_compiling() or is_transformed())
        and all(type(tensor) in PLAIN and tensor.device.type == "cpu" for tensor in tensors)
        and (known or dtype == torch.float32)
        and (casts or all(tensor.dtype == dtype for tensor in tensors))
        and decide(lambda: _have_kernels(x, weight, bias, dtype))
    ):
        output, _ = torch.ops.snn.weigh(x.flatten(0, -2), weight.to(dtype), bias)
        return output.unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


def _have_kernels(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the backend has a kernel for these shapes and dtypes, weights being cast to one."""
    products = getattr(backend_for(x), "products", None)
    return (
        products is not None
        and x.dim() > 1
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
        and products.serves(x.dtype, dtype, weight.shape)
    )


@torch.library.custom_op(
    "snn::weigh",
    mutates_args=(),
    schema="(Tensor spikes, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    device_types="cpu",
)
def _weigh(spikes, weight, bias):
    if not _have_kernels(spikes, weight, bias, weight.dtype):  # on this backend
        bias = None if bias is None else bias.to(weight.dtype)
        return F.linear(spikes.to(weight.dtype), weight, bias), spikes.count_nonzero()
    return backend_for(spikes).products.weigh(spikes, weight, bias)


@_weigh.register_fake
def _(spikes, weight, bias):
    return weight.new_empty(len(spikes), len(weight)), spikes.new_empty((), dtype=torch.int64)


@torch.library.custom_op(
    "snn::weigh_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor spikes, Tensor fired) -> Tensor",
    device_types="cpu",
)
def _weigh_backward(grad_output, spikes, fired):
    weight = grad_output.new_empty(grad_output.shape[1], spikes.shape[1])
    many = fired.item() > FEW[grad_output.dtype] * spikes.numel()
    if many or not _have_kernels(spikes, weight, None, weight.dtype):  # on this backend
        return _dense_gradient(grad_output, spikes)
    return backend_for(spikes).products.gradient(grad_output, spikes)


@_weigh_backward.register_fake
def _(grad_output, spikes, fired):
    return grad_output.new_empty(grad_output.shape[1], spikes.shape[1])


def _dense_gradient(grad_output: Tensor, spikes: Tensor) -> Tensor:
    return grad_output.t() @ spikes.to(grad_output.dtype)


def _remember(ctx: Any, inputs: tuple, output: tuple) -> None:
    spikes, weight, bias = inputs
    _, fired = output
    ctx.mark_non_differentiable(fired)
    # As PyTorch does, keeps only what a gradient reads: the rest may change in place.
    need_spikes, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(spikes if need_weight else None, weight if need_spikes else None, fired)
    ctx.dtypes = spikes.dtype, None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    spikes, weight, fired = ctx.saved_tensors
    need_spikes, need_weight, need_bias = ctx.needs_input_grad
    grad_spikes = grad_weight = grad_bias = None
    if need_spikes:
        grad_spikes = linear(grad_output, weight.t(), known=False).to(ctx.dtypes[0])
    if need_weight and torch.is_grad_enabled():  # somebody differentiates the gradient
        grad_weight = _dense_gradient(grad_output, spikes)
    elif need_weight:
        grad_weight = torch.ops.snn.weigh_backward(grad_output, spikes, fired)
    if need_bias:
        grad_bias = grad_output.sum(0).to(ctx.dtypes[1])
    return grad_spikes, grad_weight, grad_bias


_weigh.register_autograd(_differentiate, setup_context=_remember)
