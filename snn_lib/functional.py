"""The two operators of the model, over whole sequences: the IIR filter and the spiking neuron.

Autograd, ``torch.compile`` and ``torch.export`` see a single node, however many time steps there
are. This file checks what a user hands in, converts it to one dtype and folds the features into one
dimension. ``snn_lib.operators`` then differentiates, and ``snn_lib.kernels`` computes.

Both have first derivatives in reverse and in forward mode, by ``backward`` and by the transforms of
``torch.func`` (grad, vjp, jvp, jacrev, jacfwd, vmap). Second derivatives are refused.

Tensors are time first, ``(T, B, *features)``.

Source: Fang, Shrestha, Zhao, Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from functools import reduce

import torch
from torch import Tensor

from snn_lib.kernels import COMPUTE_DTYPES
from snn_lib.operators.checks import check_tensor
from snn_lib.operators.iir_filter import FilterState, check_filter, run_filter
from snn_lib.operators.spiking_neuron import NeuronState, check_neuron, run_neuron
from snn_lib.pytorch_private import is_transformed, is_watched
from snn_lib.surrogate import SURROGATES, Gaussian, Surrogate, check_surrogate

# Coefficients in these dtypes are converted to float32 to compute with them.
LOW_PRECISION = (torch.bfloat16, torch.float16)


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
        x: input, ``(T, B, *features)``. It is converted to the dtype of the recurrence. An input
            that is constant over time may be expanded. It is copied only if it has to be converted
            while it needs a gradient, or while a compiler, a transform or a mode looks on.
        alpha: ``(P, *features)``, weights of the past outputs, P >= 0. The positions of a feature
            map may share them: ``(P, C, 1, 1)`` for maps ``(C, H, W)``. So may those of ``beta``.
        beta: ``(Q + 1, *features)``, weights of the present and past inputs.
        state: ``(past_output, past_input)``, the last P outputs ``(P, B, *features)`` and the last
            Q inputs ``(Q, B, *features)`` before the first step, oldest first; zeros if ``None``.
        dtype: the dtype of F, that of the coefficients if ``None``. If the recurrence is in
            float32, it may be ``torch.bfloat16`` or ``torch.float16``, for a matrix product that
            would round F anyway.

    Returns:
        F, ``(T, B, *features)``, and the state after the last step. The recurrence and the state
        have the dtype that ``alpha`` and ``beta`` promote to, at least float32, whatever F is
        rounded to. The gradient of ``alpha`` is computed from the rounded F.

    Raises:
        ValueError: a shape does not fit the others, the coefficients are not floating point, the
            input or the state is complex, or F cannot be rounded to ``dtype``.
        TypeError: an argument is no tensor.
    """
    check_tensor("x", x)
    (alpha, beta), own = _in_one_dtype(alpha=alpha, beta=beta)
    features = x.shape[2:]
    alpha, beta = (_over_positions(tensor, features) for tensor in (alpha, beta))
    dtype = dtype or own
    if dtype != alpha.dtype and (alpha.dtype != torch.float32 or dtype not in LOW_PRECISION):
        raise ValueError(
            f"dtype is {dtype}, expected {alpha.dtype}, or bfloat16 or float16 for float32"
        )
    check_filter(x, alpha, beta, state)
    x = _in_dtype(x, alpha.dtype, "x")
    if state is None:
        state = tuple(
            x.new_zeros(()).expand(order, *x.shape[1:]) for order in (len(alpha), len(beta) - 1)
        )
    past_output, past_input = state
    past_output = _in_dtype(past_output, alpha.dtype, "state past_output")
    past_input = _in_dtype(past_input, alpha.dtype, "state past_input")

    last = channels_last(x)
    output, last_output = run_filter(
        _fold(x, 2, last),
        _fold(alpha, 1, last),
        _fold(beta, 1, last),
        _fold(past_output, 2, last),
        _fold(past_input, 2, last),
        torch.float32 if dtype == torch.float16 else dtype,  # no kernel writes float16
    )
    return _in_dtype(_unfold(output, features, last), dtype, "F"), (
        _unfold(last_output, features, last),
        _last(past_input, x),
    )


def spiking_neuron(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    state: NeuronState | None = None,
    surrogate: Surrogate = Gaussian(),  # noqa: B008 (immutable)
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, NeuronState]:
    """Turns input currents into spikes: a threshold at 1 with a filtered reset.

    V[t] = lambda V[t-1] + I[t] - R[t]
    S[t] = 1 if V[t] > 1 else 0
    R[t+1] = theta R[t] + v_reset S[t]

    The derivatives use the surrogate gradient for dS/dV and flow through the reset as well.

    Args:
        current: I, ``(T, B, *features)``. The membrane is computed in the dtype that the
            coefficients promote to, at least float32, under autocast too.
        reset_decay: theta, ``features``. As in :func:`iir_filter`, the positions of a feature map
            may share it and the other two coefficients.
        reset_strength: v_reset, ``features``.
        membrane_decay: lambda, ``features``; 0 for a membrane without memory.
        state: ``(membrane, reset)``, V before the first step and R at it, both
            ``(B, *features)``; zeros if ``None``.
        surrogate: the surrogate gradient, any object with ``derivative(membrane)``. Gaussian and
            FastSigmoid are compiled. The derivative of any other is computed for all steps at once
            where a gradient is needed; to know the membrane, the neuron then runs once more.
        dropout: probability with which a spike is not passed on, drawn for every element and time
            step. Spikes that are passed on are scaled by 1 / (1 - dropout). The reset sees every
            spike. Under ``torch.func.vmap`` dropout follows the transform's ``randomness``.
        seed: of the dropout, int64 ``(2,)`` from :func:`draw_seed`, on the current's device; drawn
            if ``None``. Its second number is the number of the first element. Elements are counted
            in the order of ``(T, B, *features)``, or as they lie in memory if channels are last
            there. A chunk that counts on from the one before has the mask of the whole sequence.

    Returns:
        S, ``(T, B, *features)``, in the dtype that the coefficients promote to, and the state after
        the last step, in at least float32.

    Raises:
        ValueError: a shape does not fit the others, the coefficients are not floating point, the
            current or the state is complex, dropout lies outside [0, 1), or the surrogate's
            derivative has another shape.
        TypeError: the surrogate has no ``derivative``, or an argument is no tensor.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, expected a probability in [0, 1)")
    check_tensor("current", current)
    coefficients, own = _in_one_dtype(
        reset_decay=reset_decay, reset_strength=reset_strength, membrane_decay=membrane_decay
    )
    features = current.shape[2:]
    coefficients = [_over_positions(tensor, features, 0) for tensor in coefficients]
    check_neuron(current, *coefficients, state)
    dtype = coefficients[0].dtype
    if (current.dtype, dtype) != (torch.bfloat16, torch.float32):
        current = _in_dtype(current, dtype, "current")  # kernels read bfloat16 beside float32
    if state is None:
        state = (coefficients[0].new_zeros(()).expand(current.shape[1:]),) * 2
    membrane, reset = state
    state = _in_dtype(membrane, dtype, "state membrane"), _in_dtype(reset, dtype, "state reset")
    last = channels_last(current)
    if type(surrogate) in tuple(SURROGATES.values()):  # PyTorch 2.8 compiles no other form
        name, width, slope = surrogate.name, surrogate.width, None
    else:
        name, width, slope = "given", 0.0, _slope(surrogate, current, *coefficients, *state)
        slope = slope if slope is None else _fold(slope, 2, last)

    if not dropout:
        seed = None
    elif seed is None:
        seed = draw_seed(current.device)
    spikes, membrane, reset = run_neuron(
        _fold(current, 2, last),
        *[_fold(tensor, 0, last) for tensor in coefficients],
        *[_fold(tensor, 1, last) for tensor in state],
        name,
        width,
        slope,
        dropout,
        seed,
    )
    return _in_dtype(_unfold(spikes, features, last), own, "S"), (
        _unfold(membrane, features, last),
        _unfold(reset, features, last),
    )


def channels_last(sequence: Tensor) -> bool:
    """Whether the channels of feature maps ``(T, B, C, *positions)`` lie side by side in memory.

    Convolutions call this order ``channels_last``. Maps are folded as they lie, and never copied.
    """
    return sequence.dim() > 3 and sequence.stride(2) == 1


def repeats(x: Tensor) -> bool:
    """Whether a sequence is one step, expanded over time, and may be computed as one.

    A program that a compiler or a transform makes must serve other inputs too.
    """
    return (
        not torch.compiler.is_compiling()
        and x.dim() > 1
        and x.stride(0) == 0
        and x.shape[0] > 1
        and not (x.requires_grad and torch.is_grad_enabled())
        and not is_transformed()
        and not is_watched()
    )


def draw_seed(device: torch.device | str) -> Tensor:
    """A seed for the dropout of :func:`spiking_neuron`, int64 ``(2,)``.

    It is drawn from PyTorch's generator of the device, so it can be reproduced and nothing waits.
    """
    key = torch.randint(2**63 - 1, (), device=device)
    return torch.stack([key, torch.zeros_like(key)])


def neuron_traces(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    state: NeuronState | None = None,
    surrogate: Surrogate = Gaussian(),  # noqa: B008 (immutable)
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes, membrane potential and reset of a neuron at every step, for a loss on them.

    The reset is a first-order filter of the spikes, and the membrane potential is one of the
    current minus the reset. The function filters them anew, so no forward pass has to keep them.

    Args:
        current, reset_decay, reset_strength, membrane_decay, state, surrogate: as in
            :func:`spiking_neuron`.

    Returns:
        S, V and R, each ``(T, B, *features)``, with gradients, in at least float32. R[t] is
        already subtracted from V[t]. A spike at t first appears in R[t+1].

    Raises:
        ValueError, TypeError: as in :func:`spiking_neuron`.
    """
    coefficients, _ = _in_one_dtype(
        reset_decay=reset_decay, reset_strength=reset_strength, membrane_decay=membrane_decay
    )
    spikes, _ = spiking_neuron(current, *coefficients, state, surrogate)
    if state is None:
        state = (spikes.new_zeros(spikes.shape[1:]),) * 2
    theta, strength, decay = (coefficient[None] for coefficient in coefficients)  # of order 1
    membrane_before, reset_at_start = (tensor[None].to(spikes.dtype) for tensor in state)
    no_inputs = spikes.new_empty(0, *spikes.shape[1:])

    # R[t+1] = theta R[t] + v_reset S[t], which the filter returns at t
    resets_after, _ = iir_filter(spikes, theta, strength, (reset_at_start, no_inputs))
    reset = torch.cat([reset_at_start, resets_after])[:-1]
    # V[t] = lambda V[t-1] + I[t] - R[t]
    drive = current.to(spikes.dtype) - reset
    membrane, _ = iir_filter(drive, decay, torch.ones_like(decay), (membrane_before, no_inputs))
    return spikes, membrane, reset


def _slope(surrogate: Surrogate, *tensors: Tensor) -> Tensor | None:
    """S'(V[t]) at all steps, in the current's shape; ``None`` where no gradient needs it."""
    check_surrogate(surrogate)
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not (needed or is_transformed()):
        return None
    with torch.no_grad():
        *inputs, membrane, reset = (tensor.detach() for tensor in tensors)  # without tangents
        _, membrane, _ = neuron_traces(*inputs, (membrane, reset))
        slope = surrogate.derivative(membrane)
    shape = getattr(slope, "shape", ())  # a plain number has none
    if shape != membrane.shape:
        raise ValueError(
            f"{type(surrogate).__name__}.derivative has shape {tuple(shape)}, expected "
            f"{tuple(membrane.shape)} as the membrane"
        )
    return slope.to(membrane.dtype)


def _in_one_dtype(**coefficients: Tensor) -> tuple[list[Tensor], torch.dtype]:
    """The coefficients in one dtype, float32 or float64, and the dtype that they promote to."""
    tensors = list(coefficients.values())
    for name, tensor in coefficients.items():
        check_tensor(name, tensor)
    own, *others = {tensor.dtype for tensor in tensors}
    if not others and own in COMPUTE_DTYPES:
        return tensors, own
    for name, tensor in coefficients.items():
        if tensor.dtype not in COMPUTE_DTYPES + LOW_PRECISION:
            raise ValueError(
                f"{name} is in {tensor.dtype}, expected float32, float64, bfloat16 or float16"
            )
    own = reduce(torch.promote_types, others, own)
    dtype = own if own in COMPUTE_DTYPES else torch.float32
    return [tensor.to(dtype) for tensor in tensors], own


def _in_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in this dtype; without a call of PyTorch where there is nothing to do."""
    if tensor.dtype == dtype:
        return tensor
    if tensor.is_complex():
        raise ValueError(f"{name} is in {tensor.dtype}, expected real numbers")
    return tensor[:1].to(dtype).expand(tensor.shape) if repeats(tensor) else tensor.to(dtype)


def _over_positions(coefficients: Tensor, features: torch.Size, leading: int = 1) -> Tensor:
    """Repeats the coefficients of a channel, ``(C, 1, 1)``, over its feature map ``(C, H, W)``.

    Nothing is copied. Coefficients that do not fit are returned as they are; a check names them.
    """
    own = coefficients.shape[leading:]
    if own == features or len(own) != len(features) or own[:1] != features[:1]:
        return coefficients
    if any(size not in (1, whole) for size, whole in zip(own, features, strict=True)):
        return coefficients
    return coefficients.expand(*coefficients.shape[:leading], *features)


def _fold(tensor: Tensor, leading: int, last: bool) -> Tensor:
    """Folds the feature dimensions, which follow the ``leading`` ones, into a single dimension.

    With ``last``, the channels, which are the first of them, are folded behind the positions.
    """
    if tensor.dim() == leading + 1:
        return tensor
    return (tensor.movedim(leading, -1) if last else tensor).flatten(leading)


def _unfold(tensor: Tensor, features: torch.Size, last: bool) -> Tensor:
    """Undoes ``_fold``."""
    if len(features) == 1:
        return tensor
    if not last:
        return tensor.unflatten(-1, features)
    channels, *positions = features
    return tensor.unflatten(-1, (*positions, channels)).movedim(-1, tensor.dim() - 1)


def _last(past: Tensor, sequence: Tensor) -> Tensor:
    """The last len(past) steps of ``past`` followed by ``sequence``.

    They are copied, so that the state neither keeps the whole sequence alive nor changes with it.
    """
    order, steps = past.shape[0], sequence.shape[0]  # len() would fix T in torch.export
    if order == 0:
        return past.clone()
    if steps >= order:
        return sequence[steps - order :].clone()
    return torch.cat([past[steps:], sequence])
