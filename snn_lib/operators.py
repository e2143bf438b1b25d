"""The two operators as PyTorch sees them: checked, differentiated and mapped.

Each is a ``torch.library`` custom operator on folded features, sequences ``(T, B, N)``, and so is
its backward pass. An operator runs on the backend of its tensors' device, see ``snn_lib.kernels``.

``torch.library`` gives an operator reverse mode. The transforms of ``torch.func`` and forward mode
need an ``autograd.Function`` around it, which ``torch.compile`` does not take and which is slower:
so each operator has one too, used where such a transform is at work, and the backward pass of that
Function is the operator's own. Second derivatives are refused in every way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snn_lib.kernels import COMPUTE_DTYPES, backend_for, eager
from snn_lib.pytorch_private import carries_tangents, transformed, watched
from snn_lib.stability import warn_if_unstable
from snn_lib.surrogate import SURROGATES

FilterState = tuple[Tensor, Tensor]
NeuronState = tuple[Tensor, Tensor]

# What a matrix product reads or gives, which may be in bfloat16 beside float32.
ROUNDED = ("current", "output", "grad_output")

PLAIN = (Tensor, torch.nn.Parameter)  # what is no subclass that does as it likes


def iir_filter(*inputs: Any) -> tuple[Tensor, Tensor]:
    """F and its last values; see ``kernels.eager.filter_forward``. Shapes and dtypes fit."""
    if transformed():
        return _IIRFilter.apply(*inputs)
    if unobserved(inputs):
        return backend_for(inputs[0]).filter_forward(*inputs)
    return torch.ops.snn.iir_filter(*inputs)


def spiking_neuron(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes and the state; see ``kernels.eager.neuron_forward``. Shapes and dtypes fit."""
    if transformed():
        return _SpikingNeuron.apply(*inputs)
    *tensors, _, _, _, dropout, seed = inputs
    if not dropout and unobserved(tensors):  # with dropout, the seed is still to be checked
        return backend_for(tensors[0]).neuron_forward(*tensors, dropout, seed)
    return torch.ops.snn.spiking_neuron(*inputs)


def unobserved(inputs: Sequence[Any]) -> bool:
    """Whether PyTorch need not see an operator: no gradient, compiler, mode or subclass is at work.

    Its dispatch and the operator's own checks are then left out, the better part of a single step
    of a stream. Tensors on several devices are left to those checks.
    """
    if torch.compiler.is_compiling() or watched():
        return False
    differentiable = torch.is_grad_enabled()
    device = inputs[0].device
    for tensor in inputs:
        if isinstance(tensor, Tensor) and (
            type(tensor) not in PLAIN
            or tensor.device != device
            or tensor.is_neg()  # its memory holds the opposite sign
            or (differentiable and tensor.requires_grad)
        ):
            return False
    return device.type != "meta"


# --------------------------------------------------------------------------------------------------
# Checks: of what a user hands in, and once more of what reaches a registered operator, which a user
# may call as well and whose kernels trust the shapes.


def check_filter(
    x: Tensor, alpha: Tensor, beta: Tensor, state: FilterState | None, name: str = "x"
) -> None:
    """Raises a ValueError where a shape does not fit; ``name`` is what ``x`` is called."""
    shape = x.shape
    _check_time_first(shape, name)
    features = shape[2:]
    for coefficient, tensor, least in (("alpha", alpha, 0), ("beta", beta, 1)):
        if tensor.shape[1:] != features or tensor.shape[0] < least:
            raise ValueError(
                f"{coefficient} has shape {tuple(tensor.shape)}, expected (order, *features) "
                f"for {name} of shape {tuple(shape)} (T, B, *features)"
            )
    if state is not None:
        past_output, past_input = state
        _check_shape("state past_output", past_output, (alpha.shape[0], *shape[1:]))
        _check_shape("state past_input", past_input, (beta.shape[0] - 1, *shape[1:]))


def check_neuron(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    state: NeuronState | None,
) -> None:
    """Raises a ValueError where a shape does not fit."""
    shape = current.shape
    _check_time_first(shape, "current")
    features = shape[2:]
    for name, coefficient in (
        ("reset_decay", reset_decay),
        ("reset_strength", reset_strength),
        ("membrane_decay", membrane_decay),
    ):
        if coefficient.shape != features:
            raise ValueError(
                f"{name} has shape {tuple(coefficient.shape)}, expected {tuple(features)} "
                f"for current of shape {tuple(shape)} (T, B, *features)"
            )
    if state is not None:
        membrane, reset = state
        _check_shape("state membrane", membrane, shape[1:])
        _check_shape("state reset", reset, shape[1:])


def _check_time_first(shape: tuple[int, ...], name: str) -> None:
    if len(shape) < 3:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, expected at least three dimensions (T, B, *features)"
        )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _check_operands(**tensors: Tensor) -> None:
    """Raises unless all are in one dtype on one device, those of the second, a coefficient.

    The first is a folded sequence. What a matrix product gave may be in bfloat16 beside float32.
    """
    (name, sequence), (like_name, like), *_ = tensors.items()
    dtype, device = like.dtype, like.device
    _refuse_forward_mode()
    if sequence.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(sequence.shape)}, expected (T, B, N)")
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{like_name} is in {dtype}, expected float32 or float64")
    for name, tensor in tensors.items():
        if tensor.dtype != dtype and not (
            name in ROUNDED and (tensor.dtype, dtype) == (torch.bfloat16, torch.float32)
        ):
            raise ValueError(f"{name} is in {tensor.dtype}, expected {dtype} as {like_name}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device} as {like_name}")


# --------------------------------------------------------------------------------------------------
# What both have in common


class _FirstDerivative(torch.autograd.Function):
    """Runs ``function``, which is a derivative called ``name``, and refuses its own."""

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


def _refuse_forward_mode() -> None:
    """Inside the Functions below forward mode is off; elsewhere it would drop the tangents."""
    if carries_tangents():
        raise NotImplementedError(
            "forward mode through torch.ops.snn is not possible, nor under torch.compile: "
            "call the functions of snn_lib.functional, uncompiled"
        )


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keeps tensors for the backward pass, and for forward mode only where it is at work.

    What is kept for forward mode lives as long as the graph: neither the backward pass frees it
    step by step, nor do the hooks of saved tensors see it, by which checkpoints do without.
    """
    ctx.save_for_backward(*tensors)
    if transformed():
        ctx.save_for_forward(*tensors)


def _gradients(operator: Callable, *arguments: Any, needed: list[bool]) -> tuple:
    """What a backward operator gives, ``None`` for what is not needed.

    It has no derivative registered: PyTorch itself refuses a second one where no transform is.
    """
    if transformed():
        name = str(operator)
        gradients = _FirstDerivative.apply(name, lambda *args: operator(*args, needed), *arguments)
    else:
        gradients = operator(*arguments, needed)
    return tuple(
        gradient if need else None for gradient, need in zip(gradients, needed, strict=True)
    )


def _tangents(tangents: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tangents, zeros for those that are ``None``."""
    return [
        torch.zeros_like(tensor) if tangent is None else tangent
        for tangent, tensor in zip(tangents, tensors, strict=True)
    ]


def _register_vmap(operator: Callable, dropout_at: int | None = None) -> None:
    """Maps an operator by giving it more channels, since every channel is on its own.

    With dropout, argument number ``dropout_at``, one call after the other: which spikes a seed
    drops depends on the number of channels.
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
    """Number ``number`` of what is mapped in ``dim``."""
    return argument.select(dim, number) if isinstance(dim, int) else argument


def _more_channels(argument: Any, dim: Any, size: int) -> Any:
    """``(..., N)`` for each of ``size`` as ``(..., size * N)``."""
    if not isinstance(argument, Tensor) or not argument.is_floating_point():  # a setting, the seed
        return argument
    if isinstance(dim, int):
        return argument.movedim(dim, -2).flatten(-2)
    return argument.unsqueeze(-2).expand(*argument.shape[:-1], size, -1).flatten(-2)


# --------------------------------------------------------------------------------------------------
# The filter

FILTER = "Tensor x, Tensor alpha, Tensor beta, Tensor past_output, Tensor past_input"
FILTER_BACKWARD = (
    "Tensor grad_output, Tensor grad_last, Tensor x, Tensor alpha, Tensor beta, Tensor output, "
    "Tensor past_output, Tensor past_input, bool[] needed"
)


def _run_filter(x, alpha, beta, past_output, past_input, dtype):
    _check_operands(x=x, alpha=alpha, beta=beta, past_output=past_output, past_input=past_input)
    check_filter(x, alpha, beta, (past_output, past_input))
    if dtype != alpha.dtype and (alpha.dtype, dtype) != (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}, expected {alpha.dtype}, or bfloat16 for float32")
    return backend_for(alpha).filter_forward(x, alpha, beta, past_output, past_input, dtype)


_filter_forward = torch.library.custom_op(
    "snn::iir_filter",
    _run_filter,
    mutates_args=(),
    schema=f"({FILTER}, ScalarType dtype) -> (Tensor, Tensor)",
)


@_filter_forward.register_fake
def _(x, alpha, beta, past_output, past_input, dtype):
    _refuse_forward_mode()
    return x.new_empty(x.shape, dtype=dtype), alpha.new_empty(past_output.shape)


@torch.library.custom_op(
    "snn::iir_filter_backward",
    mutates_args=(),
    schema=f"({FILTER_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _filter_backward(
    grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed
):
    _check_operands(
        grad_output=grad_output,
        alpha=alpha,
        grad_last=grad_last,
        x=x,
        beta=beta,
        output=output,
        past_output=past_output,
        past_input=past_input,
    )
    check_filter(grad_output, alpha, beta, (past_output, past_input), "grad_output")
    _check_shape("grad_last", grad_last, past_output.shape)
    _, need_alpha, need_beta, _, _ = needed
    if need_alpha:
        _check_shape("output", output, grad_output.shape)
        warn_if_unstable(alpha)
    if need_beta:
        _check_shape("x", x, grad_output.shape)
    return backend_for(alpha).filter_backward(
        grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed
    )


@_filter_backward.register_fake
def _(grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed):
    like = grad_output, alpha, beta, past_output, past_input
    return tuple(
        alpha.new_empty(tensor.shape if need else (0,))
        for tensor, need in zip(like, needed, strict=True)
    )


_register_vmap(torch.ops.snn.iir_filter)
_register_vmap(torch.ops.snn.iir_filter_backward)


class _IIRFilter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, alpha, beta, past_output, past_input, dtype):
        return torch.ops.snn.iir_filter(x, alpha, beta, past_output, past_input, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, alpha, beta, past_output, past_input, _ = inputs
        output, _ = output
        if not transformed():
            # Kept only where a gradient reads them: the output for alpha's, the input for beta's.
            # What stands in for the other is never read.
            _, need_alpha, need_beta, *_ = ctx.needs_input_grad
            output = output if need_alpha else beta
            x = x if need_beta else beta
        saved = x, alpha, beta, output, past_output, past_input
        _save(ctx, *saved)

    @staticmethod
    def backward(ctx, grad_output, grad_last):
        operator, needed = torch.ops.snn.iir_filter_backward, list(ctx.needs_input_grad[:5])
        gradients = _gradients(operator, grad_output, grad_last, *ctx.saved_tensors, needed=needed)
        return *gradients, None

    @staticmethod
    def jvp(ctx, *tangents):
        x, alpha, beta, output, past_output, past_input = ctx.saved_tensors
        tensors = x, alpha, beta, past_output, past_input
        tangents = _tangents(tangents[:5], tensors)
        return _FirstDerivative.apply(
            "snn.iir_filter_jvp", _filter_jvp, *tangents, *tensors, output
        )


_filter_forward.register_autograd(_IIRFilter.backward, setup_context=_IIRFilter.setup_context)


def _filter_jvp(
    d_x, d_alpha, d_beta, d_past_output, d_past_input, x, alpha, beta, past_output, past_input, F
):
    """Tangents of F and of its last values: the same filter, driven by

    sum_q beta_q dx[t-q] + sum_q dbeta_q x[t-q] + sum_p dalpha_p F[t-p]
    """

    def run(x, alpha, beta, past_output, past_input):
        return torch.ops.snn.iir_filter(x, alpha, beta, past_output, past_input, alpha.dtype)

    no_alpha, no_output, no_input = alpha[:0], past_output[:0], past_input[:0]
    from_beta, _ = run(x, no_alpha, d_beta, no_output, past_input)
    lagged = torch.cat([torch.zeros_like(beta[:1]), d_alpha])  # F from one step ago on
    from_alpha, _ = run(F.to(alpha.dtype), no_alpha, lagged, no_output, past_output)
    coefficients, last = run(
        from_beta + from_alpha,
        alpha,
        torch.ones_like(beta[:1]),
        torch.zeros_like(past_output),
        no_input,
    )
    # what is linear: the input and the state
    inputs, last_of_inputs = run(d_x, alpha, beta, d_past_output, d_past_input)
    return (inputs + coefficients).to(F.dtype), last_of_inputs + last


# --------------------------------------------------------------------------------------------------
# The neuron

NEURON = (
    "Tensor current, Tensor reset_decay, Tensor reset_strength, Tensor membrane_decay, "
    "Tensor membrane, Tensor reset, "
    "str surrogate, float width, Tensor? slope, float dropout, Tensor? seed"
)
NEURON_BACKWARD = (
    f"Tensor grad_spikes, Tensor grad_membrane, Tensor grad_reset, {NEURON}, bool[] needed"
)


def _check_neuron_operands(
    current, reset_decay, reset_strength, membrane_decay, membrane, reset, dropout, seed, **others
):
    _check_operands(
        current=current,
        reset_decay=reset_decay,
        reset_strength=reset_strength,
        membrane_decay=membrane_decay,
        membrane=membrane,
        reset=reset,
        **others,
    )
    check_neuron(current, reset_decay, reset_strength, membrane_decay, (membrane, reset))
    if seed is None and not dropout:
        return
    given = (tuple(seed.shape), seed.dtype, seed.device) if seed is not None else (None,) * 3
    if given != ((2,), torch.int64, current.device):
        raise ValueError(
            "seed is {} in {} on {}, ".format(*given)
            + f"expected (2,) in torch.int64 on {current.device}"
        )


def _run_neuron(*inputs):
    *tensors, _, _, _, dropout, seed = inputs
    _check_neuron_operands(*tensors, dropout, seed)
    return backend_for(tensors[1]).neuron_forward(*tensors, dropout, seed)


_neuron_forward = torch.library.custom_op(
    "snn::spiking_neuron",
    _run_neuron,
    mutates_args=(),
    schema=f"({NEURON}) -> (Tensor, Tensor, Tensor)",
)


@_neuron_forward.register_fake
def _(current, reset_decay, reset_strength, membrane_decay, membrane, reset, *_):
    _refuse_forward_mode()
    return tuple(reset_decay.new_empty(like.shape) for like in (current, membrane, reset))


@torch.library.custom_op(
    "snn::spiking_neuron_backward",
    mutates_args=(),
    schema=f"({NEURON_BACKWARD}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _neuron_backward(grad_spikes, grad_membrane, grad_reset, *inputs):
    *tensors, surrogate, _, slope, dropout, seed, _ = inputs
    current, reset_decay, _, _, membrane, _ = tensors
    if surrogate not in SURROGATES and (surrogate != "given" or slope is None):
        names = ", ".join(SURROGATES)
        raise ValueError(f"surrogate is {surrogate!r}, expected {names}, or given with a slope")
    others = {"grad_spikes": grad_spikes, "grad_membrane": grad_membrane, "grad_reset": grad_reset}
    shapes = [current.shape, membrane.shape, membrane.shape]
    if slope is not None:
        others["slope"] = slope
        shapes.append(current.shape)
    _check_neuron_operands(*tensors, dropout, seed, **others)
    for (name, tensor), shape in zip(others.items(), shapes, strict=True):
        _check_shape(name, tensor, shape)
    return backend_for(reset_decay).neuron_backward(grad_spikes, grad_membrane, grad_reset, *inputs)


@_neuron_backward.register_fake
def _(grad_spikes, grad_membrane, grad_reset, *inputs):
    *inputs, needed = inputs
    return tuple(
        tensor.new_empty(tensor.shape if need else (0,))
        for tensor, need in zip(inputs[:6], needed, strict=True)
    )


_register_vmap(torch.ops.snn.spiking_neuron, dropout_at=-2)
_register_vmap(torch.ops.snn.spiking_neuron_backward, dropout_at=-3)


class _SpikingNeuron(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        current,
        reset_decay,
        reset_strength,
        membrane_decay,
        membrane,
        reset,
        surrogate,
        width,
        slope,
        dropout,
        seed,
    ):
        tensors = current, reset_decay, reset_strength, membrane_decay, membrane, reset
        return torch.ops.snn.spiking_neuron(*tensors, surrogate, width, slope, dropout, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.surrogate, ctx.width, slope, ctx.dropout, seed = inputs
        _save(ctx, *tensors, slope, seed)

    @staticmethod
    def inputs(ctx):
        *tensors, slope, seed = ctx.saved_tensors
        return *tensors, ctx.surrogate, ctx.width, slope, ctx.dropout, seed

    @staticmethod
    def backward(ctx, *gradients):
        operator, needed = torch.ops.snn.spiking_neuron_backward, list(ctx.needs_input_grad[:6])
        inputs = _SpikingNeuron.inputs(ctx)
        gradients = _gradients(operator, *gradients, *inputs, needed=needed)
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents):
        inputs = _SpikingNeuron.inputs(ctx)
        tangents = _tangents(tangents[:6], inputs[:6])
        name = "snn.spiking_neuron_jvp"
        return _FirstDerivative.apply(name, eager.neuron_jvp, *tangents, *inputs)


_neuron_forward.register_autograd(
    _SpikingNeuron.backward, setup_context=_SpikingNeuron.setup_context
)
