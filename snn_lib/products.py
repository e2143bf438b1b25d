"""Weights that receive spikes: products that leave out the neurons that did not fire.

:func:`linear` computes what PyTorch's function of this name does, and adds up in another order. Its
forward pass and the gradient of the weights read nothing for inputs that are zero. The gradient of
the input reads nothing where that of the output is zero, as it is for neurons far from their
threshold. In the context :class:`SkippingZeros` it takes the other's place, and convolutions do the
same.

Whether there is a kernel depends on the layer alone, and what the kernel computes for a step on no
other step, so a sequence in chunks gives the bits of the whole. Gradients are left to PyTorch where
too little is zero.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight
from torch.overrides import TorchFunctionMode

from snn_lib.kernels import backend_for
from snn_lib.kernels.operator import PLAIN
from snn_lib.pytorch_private import is_transformed, sees_operations
from snn_lib.recomputing import decide

# By the dtype of the weights, the part of all inputs up to which their gradient skips zeros.
FEW = {torch.float32: 0.5, torch.bfloat16: 0.15}
# The same for both gradients of a convolution, and how many images are looked at, at least.
FEW_IN_MAPS, SAMPLE = 0.3, 8


class SkippingZeros(TorchFunctionMode):
    """The context in which PyTorch's ``linear`` and ``conv2d`` leave out inputs that are zero.

    Args:
        known: whether most inputs are known to be zero, see :func:`linear`. If not, convolutions
            are left to PyTorch.
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
        if function is F.conv2d and self.known:
            return _conv2d(*args, **kwargs)
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


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, known: bool = True
) -> Tensor:
    """As :func:`linear`, where modes do not count."""
    casts = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if casts else weight.dtype
    tensors = [tensor for tensor in (input, weight, bias) if tensor is not None]
    if decide(
        lambda: (
            _are_plain(tensors)
            and (known or dtype == torch.float32)
            and (casts or all(tensor.dtype == dtype for tensor in tensors))
            and _have_kernels(input, weight, bias, dtype)
        )
    ):
        if input.dim() == 2:  # also where autograd runs over several gradients at once
            return torch.ops.snn.weigh(input, weight.to(dtype), bias)[0]
        output, _ = torch.ops.snn.weigh(input.flatten(0, -2), weight.to(dtype), bias)
        return output.unflatten(0, input.shape[:-1])
    return F.linear(input, weight, bias)


def _are_plain(tensors: list[Tensor]) -> bool:
    """Whether the CPU's kernels may read these tensors, and nobody wants to see them doing so."""
    return not (torch.compiler.is_compiling() or is_transformed()) and all(
        type(tensor) in PLAIN and tensor.device.type == "cpu" and tensor.layout == torch.strided
        for tensor in tensors
    )


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


# -------------------------------------------------------------------------------------------------
# Convolutions


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolves maps of which most is known to be zero, as PyTorch's function ``conv2d``.

    There are kernels for the CPU, in float32, for maps whose channels lie last in memory and for
    layers that go on by one position at a time and have at least 16 channels and as many maps, or
    more if their patches are less than 3 wide. All else is left to PyTorch.
    """
    pads = (padding, padding) if isinstance(padding, int) else padding
    if decide(
        lambda: (
            _are_plain([tensor for tensor in (input, weight, bias) if tensor is not None])
            and not torch.is_autocast_enabled("cpu")
            and stride in (1, (1, 1))
            and dilation in (1, (1, 1))
            and groups == 1
            and len(pads) == 2  # a word such as "same" is longer
            and input.is_contiguous(memory_format=torch.channels_last)
            and _have_convolutions(input, weight, bias, pads)
        )
    ):
        return torch.ops.snn.convolve(input, weight, bias, pads, True)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _have_convolutions(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]
) -> bool:
    """Whether the backend has a kernel for a convolution with this padding."""
    convolutions = getattr(backend_for(x), "convolutions", None)
    return (
        convolutions is not None
        and all(one.dtype == torch.float32 for one in (x, weight, bias) if one is not None)
        and (bias is None or bias.shape == weight.shape[:1])
        and convolutions.serves(x.shape, weight.shape, padding)
    )


def _few(maps: Tensor) -> bool:
    """Whether in some of the images little is not zero."""
    sample = maps[:: max(1, len(maps) // SAMPLE)]
    return sample.count_nonzero().item() <= FEW_IN_MAPS * sample.numel()


@torch.library.custom_op(
    "snn::convolve",
    mutates_args=(),
    schema="(Tensor spikes, Tensor weight, Tensor? bias, int[] padding, bool known) -> Tensor",
    device_types="cpu",
)
def _convolve(spikes, weight, bias, padding, known):
    if (known or _few(spikes)) and _have_convolutions(spikes, weight, bias, padding):
        return backend_for(spikes).convolutions.convolve(spikes, weight, bias, padding)
    return F.conv2d(spikes, weight, bias, padding=padding)


@_convolve.register_fake
def _(spikes, weight, bias, padding, known):
    return F.conv2d(spikes, weight, bias, padding=padding)


@torch.library.custom_op(
    "snn::convolve_backward",
    mutates_args=(),
    schema="(Tensor grad_output, Tensor spikes, Tensor weight, int[] padding) -> Tensor",
    device_types="cpu",
)
def _convolve_backward(grad_output, spikes, weight, padding):
    if _few(spikes) and _have_convolutions(spikes, weight, None, padding):  # on this backend
        kernels = backend_for(spikes).convolutions
        return kernels.gradient(grad_output, spikes, weight.shape, padding).contiguous()
    return _dense_gradient_of_patches(grad_output, spikes, weight, padding).contiguous()


@_convolve_backward.register_fake
def _(grad_output, spikes, weight, padding):
    return weight.new_empty(weight.shape)


def _dense_gradient_of_patches(
    grad_output: Tensor, spikes: Tensor, weight: Tensor, padding: Sequence[int]
) -> Tensor:
    pads: Any = tuple(padding)  # PyTorch says that it takes an int, and takes a pair, too
    return conv2d_weight(spikes, weight.shape, grad_output, padding=pads)


def _remember_maps(ctx: Any, inputs: tuple, output: Tensor) -> None:
    spikes, weight, _, ctx.padding, _ = inputs
    need_weight = ctx.needs_input_grad[1]
    ctx.save_for_backward(spikes if need_weight else None, weight)


def _differentiate_maps(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    spikes, weight = ctx.saved_tensors
    need_spikes, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_spikes = grad_weight = grad_bias = None
    if need_spikes:  # the convolution of the other direction
        turned = weight.flip(2, 3).transpose(0, 1)
        rest = [length - 1 - pad for length, pad in zip(weight.shape[2:], ctx.padding, strict=True)]
        grad_spikes = torch.ops.snn.convolve(grad_output, turned, None, rest, False)
    if need_weight:
        given = grad_output, spikes, weight, ctx.padding
        differentiable = torch.is_grad_enabled()  # somebody differentiates the gradient
        way = _dense_gradient_of_patches if differentiable else torch.ops.snn.convolve_backward
        grad_weight = way(*given)
    if need_bias:
        grad_bias = grad_output.sum((0, 2, 3))
    return grad_spikes, grad_weight, grad_bias, None, None


_convolve.register_autograd(_differentiate_maps, setup_context=_remember_maps)
