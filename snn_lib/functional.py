"""The two operators of the model, over whole sequences: the IIR filter and the spiking neuron.

Each is one ``torch.library`` custom operator with a hand-derived backward pass, so that autograd,
``torch.compile`` and ``torch.export`` see a single node however many time steps it covers. The
arithmetic is in ``snn_lib.kernels``; this file checks shapes, folds the features into one
dimension and registers forward and backward with PyTorch.

Tensors are time first, ``(T, B, *features)``.

Source: Fang, Shrestha, Zhao, Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from snn_lib.kernels import backend_for
from snn_lib.surrogate import FastSigmoid, Gaussian

FilterState = tuple[Tensor, Tensor]
NeuronState = tuple[Tensor, Tensor]


def iir_filter(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    state: FilterState | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, FilterState]:
    """Filters every channel of ``x`` along time, each with its own coefficients.

    F[t] = sum_{p=1..P} alpha_p F[t-p] + sum_{q=0..Q} beta_q x[t-q]

    Args:
        x: input, ``(T, B, *features)``. An input that is constant over time may be expanded
            instead of copied. It is converted to the dtype of ``alpha``.
        alpha: ``(P, *features)``, weights of the past outputs, P >= 0.
        beta: ``(Q + 1, *features)``, weights of the present and past inputs.
        state: ``(past_output, past_input)``, the last P outputs ``(P, B, *features)`` and the last
            Q inputs ``(Q, B, *features)`` before the first step, oldest first; zeros if ``None``.
        dtype: what F is handed out in, that of ``alpha`` if ``None``; with coefficients in float32
            it may be ``torch.bfloat16``, for a matrix product that would round F anyway.

    Returns:
        F, ``(T, B, *features)``, and the state after the last step. The recurrence and the state
        have the dtype of ``alpha`` whatever F is rounded to; the gradient of ``alpha`` is taken
        from the rounded F.

    Raises:
        ValueError: a shape does not fit the others, or F cannot be handed out in ``dtype``.
    """
    features = x.shape[2:]
    _check_time_first(x, "x")
    for name, coefficients, least in (("alpha", alpha, 0), ("beta", beta, 1)):
        if coefficients.shape[1:] != features or len(coefficients) < least:
            raise ValueError(
                f"{name} has shape {tuple(coefficients.shape)}, expected (order, *features) "
                f"for x of shape {tuple(x.shape)} (T, B, *features)"
            )
    dtype = dtype or alpha.dtype
    if dtype != alpha.dtype and (alpha.dtype, dtype) != (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}, expected {alpha.dtype}, or bfloat16 for float32")
    x = x.to(alpha.dtype)
    past_shapes = [(order, x.shape[1], *features) for order in (len(alpha), len(beta) - 1)]
    if state is None:
        past_output, past_input = (x.new_zeros(()).expand(shape) for shape in past_shapes)
    else:
        _check_state(("past_output", "past_input"), state, past_shapes)
        past_output, past_input = (tensor.to(x.dtype) for tensor in state)

    output, last_output = torch.ops.snn.iir_filter(
        _fold(x, 2),
        *(_fold(tensor, 1) for tensor in (alpha, beta)),
        *(_fold(tensor, 2) for tensor in (past_output, past_input)),
        dtype,
    )
    return output.view(x.shape), (last_output.view(past_shapes[0]), _last(past_input, x))


def spiking_neuron(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    state: NeuronState | None = None,
    surrogate: Gaussian | FastSigmoid = Gaussian(),  # noqa: B008 (immutable)
    dropout: float = 0.0,
) -> tuple[Tensor, NeuronState]:
    """Turns input currents into spikes: a threshold at 1 with a filtered reset.

    V[t] = lambda V[t-1] + I[t] - R[t]
    S[t] = 1 if V[t] > 1 else 0
    R[t+1] = theta R[t] + v_reset S[t]

    The backward pass uses the surrogate gradient for dS/dV and flows through the reset as well.

    Args:
        current: I, ``(T, B, *features)``. The membrane is computed in the dtype of
            ``reset_decay``, under autocast too.
        reset_decay: theta, ``features``.
        reset_strength: v_reset, ``features``.
        membrane_decay: lambda, ``features``; 0 for a membrane without memory.
        state: ``(membrane, reset)``, V before the first step and R at it, both
            ``(B, *features)``; zeros if ``None``.
        surrogate: the surrogate gradient.
        dropout: probability with which a spike is not passed on (the others are scaled by
            1 / (1 - dropout)), drawn for every element and time step. The reset sees every spike.

    Returns:
        S, ``(T, B, *features)``, in the dtype of ``reset_decay``, and the state after the last
        step.

    Raises:
        ValueError: a shape does not fit the others, or dropout lies outside [0, 1).
    """
    features = current.shape[2:]
    _check_time_first(current, "current")
    for name, coefficients in (
        ("reset_decay", reset_decay),
        ("reset_strength", reset_strength),
        ("membrane_decay", membrane_decay),
    ):
        if coefficients.shape != features:
            raise ValueError(
                f"{name} has shape {tuple(coefficients.shape)}, expected {tuple(features)} "
                f"for current of shape {tuple(current.shape)} (T, B, *features)"
            )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, expected a probability in [0, 1)")
    dtype = reset_decay.dtype
    if (current.dtype, dtype) != (torch.bfloat16, torch.float32):
        current = current.to(dtype)  # but the kernels read bfloat16 into a float32 membrane
    state_shape = current.shape[1:]
    if state is None:
        state = (reset_decay.new_zeros(()).expand(state_shape),) * 2
    else:
        _check_state(("membrane", "reset"), state, (state_shape, state_shape))
        state = tuple(tensor.to(dtype) for tensor in state)

    # Drawn from PyTorch's generator on the tensor's device: reproducible, and no synchronisation.
    seed = (
        torch.randint(2**63 - 1, (), device=current.device)
        if dropout
        else torch.zeros((), dtype=torch.int64, device=current.device)
    )
    spikes, membrane, reset = torch.ops.snn.spiking_neuron(
        _fold(current, 2),
        *(_fold(tensor, 0) for tensor in (reset_decay, reset_strength, membrane_decay)),
        *(_fold(tensor, 1) for tensor in state),
        surrogate.name,
        surrogate.width,
        dropout,
        seed,
    )
    return spikes.view(current.shape), (membrane.view(state_shape), reset.view(state_shape))


def _check_time_first(x: Tensor, name: str) -> None:
    if x.dim() < 3:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected at least three dimensions "
            "(T, B, *features)"
        )


def _check_state(
    names: Sequence[str], state: Sequence[Tensor], shapes: Sequence[Sequence[int]]
) -> None:
    for name, tensor, shape in zip(names, state, shapes, strict=True):
        if tensor.shape != tuple(shape):
            raise ValueError(
                f"state {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )


def _fold(tensor: Tensor, leading: int) -> Tensor:
    """Folds the feature dimensions, those after the ``leading`` ones, into a single one."""
    return tensor if tensor.dim() == leading + 1 else tensor.flatten(leading)


def _last(past: Tensor, sequence: Tensor) -> Tensor:
    """The last len(past) steps of ``past`` followed by ``sequence``.

    A copy: the state keeps neither the whole sequence alive nor changes with it.
    """
    order, steps = past.shape[0], sequence.shape[0]  # len() would fix T in torch.export
    if steps >= order:
        return sequence[steps - order :].clone()
    return torch.cat([past[steps:], sequence])


@torch.library.custom_op("snn::iir_filter", mutates_args=())
def _iir_filter(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return backend_for(alpha).filter_forward(x, alpha, beta, past_output, past_input, dtype)


@_iir_filter.register_fake
def _(x, alpha, beta, past_output, past_input, dtype):
    return (
        torch.empty(x.shape, dtype=dtype, device=x.device),
        torch.empty(past_output.shape, dtype=alpha.dtype, device=x.device),
    )


@torch.library.custom_op("snn::iir_filter_backward", mutates_args=())
def _iir_filter_backward(
    grad_output: Tensor,
    grad_last: Tensor,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    output: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backend_for(alpha).filter_backward(
        grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed
    )


@_iir_filter_backward.register_fake
def _(grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed):
    shapes = (tensor.shape for tensor in (grad_output, alpha, beta, past_output, past_input))
    return tuple(
        alpha.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)
    )


def _filter_setup_context(ctx, inputs, output):
    x, alpha, beta, past_output, past_input, _ = inputs
    output, _ = output
    _, need_alpha, need_beta, *_ = ctx.needs_input_grad
    # Kept only where a gradient reads them: the output for alpha's, the input for beta's.
    # What stands in for the other is never read.
    output = output if need_alpha else beta
    x = x if need_beta else beta
    ctx.save_for_backward(x, alpha, beta, output, past_output, past_input)


def _filter_backward(ctx, grad_output, grad_last):
    x, alpha, beta, output, past_output, past_input = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:5])
    gradients = torch.ops.snn.iir_filter_backward(
        grad_output, grad_last, x, alpha, beta, output, past_output, past_input, needed
    )
    return *_only(gradients, needed), None


_iir_filter.register_autograd(_filter_backward, setup_context=_filter_setup_context)


@torch.library.custom_op("snn::spiking_neuron", mutates_args=())
def _spiking_neuron(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    membrane: Tensor,
    reset: Tensor,
    surrogate: str,
    width: float,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return backend_for(reset_decay).neuron_forward(
        current, reset_decay, reset_strength, membrane_decay, membrane, reset, dropout, seed
    )


@_spiking_neuron.register_fake
def _(current, reset_decay, reset_strength, membrane_decay, membrane, reset, *_):
    return tuple(
        reset_decay.new_empty(shape)
        for shape in (current.shape, current.shape[1:], current.shape[1:])
    )


@torch.library.custom_op("snn::spiking_neuron_backward", mutates_args=())
def _spiking_neuron_backward(
    grad_spikes: Tensor,
    grad_membrane: Tensor,
    grad_reset: Tensor,
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    membrane: Tensor,
    reset: Tensor,
    surrogate: str,
    width: float,
    dropout: float,
    seed: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backend_for(reset_decay).neuron_backward(
        grad_spikes,
        grad_membrane,
        grad_reset,
        current,
        reset_decay,
        reset_strength,
        membrane_decay,
        membrane,
        reset,
        surrogate,
        width,
        None,
        dropout,
        seed,
        needed,
    )


@_spiking_neuron_backward.register_fake
def _(
    grad_spikes,
    grad_membrane,
    grad_reset,
    current,
    reset_decay,
    reset_strength,
    membrane_decay,
    membrane,
    reset,
    surrogate,
    width,
    dropout,
    seed,
    needed,
):
    like = (current, reset_decay, reset_strength, membrane_decay, membrane, reset)
    return tuple(
        tensor.new_empty(tensor.shape if need else (0,))
        for tensor, need in zip(like, needed, strict=True)
    )


def _neuron_setup_context(ctx, inputs, output):
    *tensors, ctx.surrogate, ctx.width, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _neuron_backward(ctx, grad_spikes, grad_membrane, grad_reset):
    *tensors, seed = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:6])
    gradients = torch.ops.snn.spiking_neuron_backward(
        grad_spikes,
        grad_membrane,
        grad_reset,
        *tensors,
        ctx.surrogate,
        ctx.width,
        ctx.dropout,
        seed,
        needed,
    )
    return *_only(gradients, needed), None, None, None, None


_spiking_neuron.register_autograd(_neuron_backward, setup_context=_neuron_setup_context)


def _only(gradients: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that were asked for, ``None`` for the others."""
    return tuple(
        gradient if need else None for gradient, need in zip(gradients, needed, strict=True)
    )
