"""The reference backend: plain PyTorch, any device, any floating dtype, one step after the other.

The other backends agree with this one; read the equations here. All tensors are time first with
flattened features: sequences ``(T, B, N)``, coefficients ``(order, N)`` or ``(N,)``. The functions
run below autograd, so their loops leave no graph behind.
"""

import torch
from torch import Tensor

from snn_lib.surrogate import SURROGATES, THRESHOLD


def filter_forward(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """F[t] = sum_q beta_q x[t-q] + sum_p alpha_p F[t-p], and its last P values.

    Args:
        x: ``(T, B, N)``.
        alpha: ``(P, N)``, ``alpha[p - 1]`` weights F[t-p].
        beta: ``(Q + 1, N)``.
        past_output: ``(P, B, N)``, F before the first step, oldest first.
        past_input: ``(Q, B, N)``, x before the first step, oldest first.
        dtype: F is rounded to it when it is handed out; the recurrence goes on unrounded.

    Returns:
        F, ``(T, B, N)`` in ``dtype``, and what the next call takes as ``past_output``.
    """
    order_p, order_q = len(past_output), len(past_input)
    inputs = [*past_input.unbind(), *x.unbind()]
    outputs = [*past_output.unbind()]
    for t in range(len(x)):
        f = beta[0] * inputs[order_q + t]
        for q in range(1, order_q + 1):
            f = f + beta[q] * inputs[order_q + t - q]
        for p in range(1, order_p + 1):
            f = f + alpha[p - 1] * outputs[order_p + t - p]
        outputs.append(f)
    output = torch.stack(outputs[order_p:]) if len(x) else torch.empty(x.shape).to(x)
    last = torch.stack(outputs[len(x) :]) if order_p else past_output.clone()
    return output.to(dtype), last


def filter_backward(
    grad_output: Tensor,
    grad_last: Tensor,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    output: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, alpha, beta, past_output, past_input; those not needed come back empty.

    The adjoint A of F runs the same filter backwards in time:
        A[t] = dL/dF[t] + sum_p alpha_p A[t+p]
    and every gradient is a correlation with it:
        dL/dx[t]    = sum_q beta_q A[t+q]
        dL/dalpha_p = sum_{t,b} A[t] F[t-p]
        dL/dbeta_q  = sum_{t,b} A[t] x[t-q]
    dL/dF[t] is ``grad_output[t]`` and, for the last P steps, what ``grad_last`` adds.
    ``x`` is read for beta's gradient only and ``output`` for alpha's; pass anything otherwise.
    """
    need_x, need_alpha, need_beta, need_past_output, need_past_input = needed
    steps, order_p, order_q = len(grad_output), len(past_output), len(past_input)

    direct = torch.cat([torch.zeros(past_output.shape).to(alpha), grad_output.to(alpha)])
    direct[steps:] += grad_last  # direct[order_p + t] is dL/dF[t], from t = -P on
    adjoint = torch.empty(grad_output.shape).to(alpha)
    for t in reversed(range(steps)):
        a = direct[order_p + t]
        for p in range(1, min(order_p, steps - 1 - t) + 1):
            a = a + alpha[p - 1] * adjoint[t + p]
        adjoint[t] = a

    grad_x, grad_alpha, grad_beta, grad_past_output, grad_past_input = (
        adjoint.new_empty(0) for _ in range(5)
    )
    if need_x:
        grad_x = beta[0] * adjoint
        for q in range(1, min(order_q, steps) + 1):
            grad_x[: steps - q] += beta[q] * adjoint[q:]
    if need_alpha:
        outputs = torch.cat([past_output, output.to(past_output)])
        grad_alpha = torch.empty(alpha.shape).to(alpha)
        for p in range(1, order_p + 1):
            grad_alpha[p - 1] = (adjoint * outputs[order_p - p :][:steps]).sum((0, 1))
    if need_beta:
        inputs = torch.cat([past_input, x])
        grad_beta = torch.empty(beta.shape).to(beta)
        for q in range(order_q + 1):
            grad_beta[q] = (adjoint * inputs[order_q - q :][:steps]).sum((0, 1))
    if need_past_output:
        grad_past_output = direct[:order_p] + _past_gradient(adjoint, alpha)
    if need_past_input:
        grad_past_input = _past_gradient(adjoint, beta[1:])
    return grad_x, grad_alpha, grad_beta, grad_past_output, grad_past_input


def _past_gradient(adjoint: Tensor, weights: Tensor) -> Tensor:
    """Gradient for the values before the first step, which ``weights[k - 1]`` carry k steps on."""
    order = len(weights)
    gradient = torch.zeros(order, *adjoint.shape[1:]).to(adjoint)
    for past in range(order):  # the value at time past - order
        for t in range(min(past + 1, len(adjoint))):
            gradient[past] += weights[t + order - past - 1] * adjoint[t]
    return gradient


def neuron_forward(
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    membrane: Tensor,
    reset: Tensor,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes of all steps, and the membrane potential and reset that the last step leaves behind.

    V[t] = lambda V[t-1] + I[t] - R[t],   S[t] = V[t] > 1,   R[t+1] = theta R[t] + v_reset S[t]

    Args:
        current: I, ``(T, B, N)``, in the dtype of the others or in bfloat16.
        reset_decay, reset_strength, membrane_decay: theta, v_reset and lambda, ``(N,)``.
        membrane, reset: V before the first step and R at it, ``(B, N)``.
        dropout, seed: each spike that is passed on is dropped with this probability, the others
            scaled by 1 / (1 - dropout); the reset sees all of them.
    """
    spikes = torch.empty(current.shape).to(reset_decay)
    for t, i in enumerate(current):
        membrane = membrane_decay * membrane + i - reset
        spikes[t] = membrane > THRESHOLD
        reset = reset_decay * reset + reset_strength * spikes[t]
    if dropout:
        spikes *= dropout_scale(spikes.shape, dropout, seed, spikes.dtype)
    return spikes, membrane.clone(), reset.clone()


def neuron_backward(
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
    slope: Tensor | None,
    dropout: float,
    seed: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the six tensors of ``neuron_forward``, in its order; not needed: empty.

    Runs the neuron again to have V, S and R, which is cheaper than to store them, then backwards,
    with v[t] = dL/dV[t] and r[t] = dL/dR[t]:
        v[t] = (dL/dS[t] + v_reset r[t+1]) S'(V[t]) + lambda v[t+1]
        r[t] = theta r[t+1] - v[t]
    S' is the derivative of the ``surrogate`` of this name and ``width``; for "given", S'(V[t]) is
    ``slope[t]``.
    dL/dI[t] is v[t], and the coefficients' gradients are sums over time and batch:
        dL/dtheta = sum r[t+1] R[t],  dL/dv_reset = sum r[t+1] S[t],  dL/dlambda = sum v[t] V[t-1]
    """
    steps = len(current)
    if dropout:
        grad_spikes = grad_spikes * dropout_scale(grad_spikes.shape, dropout, seed, reset.dtype)

    membranes, resets = [membrane], [reset]  # membranes[t] is V[t-1], resets[t] is R[t]
    for i in current:
        membranes.append(membrane_decay * membranes[-1] + i - resets[-1])
        spike = (membranes[-1] > THRESHOLD).to(reset_decay)
        resets.append(reset_decay * resets[-1] + reset_strength * spike)

    grad_current = torch.empty(current.shape).to(current)
    grad_theta, grad_strength, grad_lambda = (torch.zeros_like(reset_decay) for _ in range(3))
    # what flows into V[t] and R[t+1] from the steps after t
    v, r = grad_membrane, grad_reset
    for t in reversed(range(steps)):
        spike = (membranes[t + 1] > THRESHOLD).to(reset_decay)
        grad_theta += (r * resets[t]).sum(0)
        grad_strength += (r * spike).sum(0)
        slope_t = _slope(membranes[t + 1], surrogate, width, slope, t)
        v = (grad_spikes[t] + reset_strength * r) * slope_t + v
        grad_lambda += (v * membranes[t]).sum(0)
        grad_current[t] = v
        r = reset_decay * r - v
        v = membrane_decay * v

    gradients = (grad_current, grad_theta, grad_strength, grad_lambda, v.clone(), r.clone())
    return tuple(
        gradient if need else gradient.new_empty(0)
        for gradient, need in zip(gradients, needed, strict=True)
    )


def _slope(membrane: Tensor, surrogate: str, width: float, slope: Tensor | None, t: int) -> Tensor:
    """S'(V[t])."""
    return slope[t] if surrogate == "given" else SURROGATES[surrogate](width).derivative(membrane)


def neuron_jvp(
    d_current: Tensor,
    d_reset_decay: Tensor,
    d_reset_strength: Tensor,
    d_membrane_decay: Tensor,
    d_membrane: Tensor,
    d_reset: Tensor,
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
    membrane: Tensor,
    reset: Tensor,
    surrogate: str,
    width: float,
    slope: Tensor | None,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of the three results of ``neuron_forward``, for tangents of its six tensors.

    Forward mode: each equation of the neuron differentiated, with S' as in ``neuron_backward``:
        dV[t] = lambda dV[t-1] + dlambda V[t-1] + dI[t] - dR[t]
        dS[t] = S'(V[t]) dV[t]
        dR[t+1] = theta dR[t] + dtheta R[t] + v_reset dS[t] + dv_reset S[t]
    No other backend has it, and nothing is written in place, so that ``torch.func.vmap`` maps it.
    """
    d_spikes = []
    for t, i in enumerate(current):
        d_membrane = membrane_decay * d_membrane + d_membrane_decay * membrane
        d_membrane = d_membrane + d_current[t] - d_reset
        membrane = membrane_decay * membrane + i - reset
        spike = (membrane > THRESHOLD).to(reset)
        d_spikes.append(_slope(membrane, surrogate, width, slope, t) * d_membrane)
        d_reset = reset_decay * d_reset + d_reset_decay * reset
        d_reset = d_reset + reset_strength * d_spikes[-1] + d_reset_strength * spike
        reset = reset_decay * reset + reset_strength * spike
    d_spikes = torch.stack(d_spikes) if d_spikes else torch.zeros_like(d_current).to(reset)
    if dropout:
        d_spikes = d_spikes * dropout_scale(d_spikes.shape, dropout, seed, d_spikes.dtype)
    return d_spikes, d_membrane.clone(), d_reset.clone()


def dropout_scale(shape: torch.Size, dropout: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where an element is dropped and 1 / (1 - dropout) elsewhere.

    A counter-based generator: element number i (row-major over ``shape``) is dropped if the hash
    of i under the seed, uniform in 0 ... 2^32 - 1, is below dropout * 2^32. Nothing is stored, any
    backend draws the same mask in any order, and the backward pass draws it again.
    The hash is the finaliser of MurmurHash3 (Appleby, public domain), once per half of the seed.
    """
    index = torch.arange(shape.numel(), device=seed.device).view(shape)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    kept = _mix(_mix((index & 0xFFFFFFFF) ^ low) ^ high) >= int(dropout * 2**32)
    return kept.to(dtype) * (1.0 / (1.0 - dropout))


def _mix(h: Tensor) -> Tensor:
    """32-bit finaliser of MurmurHash3, on int64 tensors that hold 32-bit values."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)
