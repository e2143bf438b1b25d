"""The reference backend: plain PyTorch on any device, one time step after the other.

The equations are here, and the other backends must agree with them. All tensors are time first with
folded features: sequences ``(T, B, N)``, coefficients ``(order, N)`` or ``(N,)``.

The functions run below autograd, so they record no graph and may work in place. A loop holds only
what the recurrence carries on; everything else is one call over all steps. Products and sums are
separate calls, because a fused one (``addcmul``) rounds differently, and every backend must give
the same spikes bit for bit.
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
        dtype: the F that is returned is rounded to it; the recurrence goes on unrounded.

    Returns:
        F, ``(T, B, N)`` in ``dtype``, and the ``past_output`` of the next call.
    """
    order_p, order_q, steps = len(past_output), len(past_input), len(x)
    outputs = alpha.new_empty(order_p + steps, *x.shape[1:])  # outputs[order_p + t] is F[t]
    outputs[:order_p] = past_output
    output = torch.mul(beta[0], x, out=outputs[order_p:])
    for q in range(1, order_q + 1):
        output[:q] += beta[q] * past_input[order_q - q :][:steps]
        output[q:] += beta[q] * x[: max(steps - q, 0)]
    f, product = outputs.unbind(), alpha.new_empty(x.shape[1:])
    for t in range(order_p, order_p + steps):
        for p in range(1, order_p + 1):
            f[t].add_(torch.mul(alpha[p - 1], f[t - p], out=product))
    return output.to(dtype), outputs[steps:].clone()


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
    """Gradients for x, alpha, beta, past_output, past_input; one that is not needed is empty.

    The adjoint A of F runs the same filter backwards in time:
        A[t] = dL/dF[t] + sum_p alpha_p A[t+p]
    and every gradient is a correlation with it:
        dL/dx[t]    = sum_q beta_q A[t+q]
        dL/dalpha_p = sum_{t,b} A[t] F[t-p]
        dL/dbeta_q  = sum_{t,b} A[t] x[t-q]
    dL/dF[t] is ``grad_output[t]``, to which ``grad_last`` is added for the last P steps.
    ``x`` is read for beta's gradient only, and ``output`` for alpha's. Where that gradient is not
    needed, any tensor may be passed.
    """
    need_x, need_alpha, need_beta, need_past_output, need_past_input = needed
    steps, order_p, order_q = len(grad_output), len(past_output), len(past_input)

    # ``flowing`` first holds dL/dF[t] from t = -P on. Then A[t] takes its place from t = 0 on.
    flowing = torch.cat([past_output.new_zeros(past_output.shape), grad_output.to(alpha)])
    flowing[steps:] += grad_last
    adjoint, product = flowing[order_p:], alpha.new_empty(grad_output.shape[1:])
    a = adjoint.unbind()
    for t in reversed(range(steps)):
        for p in range(1, min(order_p, steps - 1 - t) + 1):
            a[t].add_(torch.mul(alpha[p - 1], a[t + p], out=product))

    grad_x, grad_alpha, grad_beta, grad_past_output, grad_past_input = (
        alpha.new_empty(0) for _ in range(5)
    )
    if need_x:
        grad_x = beta[0] * adjoint
        for q in range(1, min(order_q, steps) + 1):
            grad_x[: steps - q] += beta[q] * adjoint[q:]
    if need_alpha:
        grad_alpha = torch.empty_like(alpha, memory_format=torch.contiguous_format)
        for p in range(1, order_p + 1):
            grad_alpha[p - 1] = _correlation(adjoint, output, past_output, p)
    if need_beta:
        grad_beta = torch.empty_like(beta, memory_format=torch.contiguous_format)
        for q in range(order_q + 1):
            grad_beta[q] = _correlation(adjoint, x, past_input, q)
    if need_past_output:
        grad_past_output = flowing[:order_p] + _past_gradient(adjoint, alpha)
    if need_past_input:
        grad_past_input = _past_gradient(adjoint, beta[1:])
    return grad_x, grad_alpha, grad_beta, grad_past_output, grad_past_input


def _correlation(adjoint: Tensor, sequence: Tensor, past: Tensor, lag: int) -> Tensor:
    """sum_{t,b} A[t] F[t-lag] for F = ``sequence``, which ``past`` precedes."""
    steps = len(adjoint)
    within = _total(adjoint[lag:] * sequence[: max(steps - lag, 0)])
    return within + _total(adjoint[:lag] * past[len(past) - lag :][:steps])


def _total(products: Tensor) -> Tensor:
    """The sum over all dimensions but the channels, in float64 if the device has it."""
    return products.sum(tuple(range(products.dim() - 1)), dtype=_widest(products.device))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _past_gradient(adjoint: Tensor, weights: Tensor) -> Tensor:
    """Gradient for the values before the first step; ``weights[k - 1]`` is that of lag k."""
    order = len(weights)
    gradient = adjoint.new_zeros(order, *adjoint.shape[1:])
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
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes of all steps, and the membrane potential and the reset after the last step.

    V[t] = lambda V[t-1] + I[t] - R[t],   S[t] = V[t] > 1,   R[t+1] = theta R[t] + v_reset S[t]

    Args:
        current: I, ``(T, B, N)``, in the dtype of the others or in bfloat16.
        reset_decay, reset_strength, membrane_decay: theta, v_reset and lambda, ``(N,)``.
        membrane, reset: V before the first step and R at it, ``(B, N)``.
        dropout, seed: each spike is dropped with this probability, and the others are scaled by
            1 / (1 - dropout). The reset sees all spikes. Without dropout the seed may be ``None``.
    """
    spikes = reset_decay.new_empty(current.shape)
    membrane, reset = contiguous_copy(membrane), contiguous_copy(reset)
    for i, spike in zip(current.unbind(), spikes.unbind(), strict=True):
        _advance(membrane, reset, spike, i, reset_decay, reset_strength, membrane_decay)
    if dropout:
        spikes *= dropout_scale(spikes, dropout, seed)
    return spikes, membrane, reset


def contiguous_copy(tensor: Tensor) -> Tensor:
    """A copy that lies in memory as the operators promise, however the tensor does."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _advance(
    membrane: Tensor,
    reset: Tensor,
    spike: Tensor,
    current: Tensor,
    reset_decay: Tensor,
    reset_strength: Tensor,
    membrane_decay: Tensor,
) -> None:
    """One step in place: V[t-1] becomes V[t], R[t] becomes R[t+1], and ``spike`` becomes S[t]."""
    membrane.mul_(membrane_decay).add_(current).sub_(reset)
    torch.gt(membrane, THRESHOLD, out=spike)
    reset.mul_(reset_decay).add_(reset_strength * spike)


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
    seed: Tensor | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the six tensors of ``neuron_forward``, in its order; empty if not needed.

    The neuron runs again for V, S and R, which is cheaper than to store them. Then time runs
    backwards, with v[t] = dL/dV[t] and r[t] = dL/dR[t]:
        v[t] = (dL/dS[t] + v_reset r[t+1]) S'(V[t]) + lambda v[t+1]
        r[t] = theta r[t+1] - v[t]
    S' is the derivative of the ``surrogate`` with this name and ``width``. If the name is "given",
    S'(V[t]) is ``slope[t]``. dL/dI[t] is v[t], and the coefficients' gradients are sums over time
    and batch:
        dL/dtheta = sum r[t+1] R[t],  dL/dv_reset = sum r[t+1] S[t],  dL/dlambda = sum v[t] V[t-1]
    """
    _, need_theta, need_strength, need_lambda, _, _ = needed
    if dropout:
        scale = dropout_scale(grad_spikes, dropout, seed)
        grad_spikes = grad_spikes * scale

    # membranes[t + 1] is V[t], resets[t] is R[t]
    membranes = reset_decay.new_empty(1 + len(current), *membrane.shape)
    resets = reset_decay.new_empty(current.shape if need_theta else (0, *reset.shape))
    membranes[0] = membrane
    v, r, spike = membrane.clone(), reset.clone(), torch.empty_like(membrane)
    for t, i in enumerate(current.unbind()):
        if need_theta:
            resets[t] = r
        _advance(v, r, spike, i, reset_decay, reset_strength, membrane_decay)
        membranes[t + 1] = v
    if slope is None:
        slope = SURROGATES[surrogate](width).derivative(membranes[1:])

    grad_current = torch.empty_like(current, memory_format=torch.contiguous_format)
    grad_theta, grad_strength, grad_lambda = (
        torch.zeros_like(reset_decay, dtype=_widest(reset_decay.device)) for _ in range(3)
    )
    # v and r are the gradients that reach V[t] and R[t+1] from the steps after t.
    v, r = contiguous_copy(grad_membrane), contiguous_copy(grad_reset)
    for t in reversed(range(len(current))):
        if need_theta:
            grad_theta += _total(r * resets[t])
        if need_strength:
            grad_strength += _total(r * (membranes[t + 1] > THRESHOLD))
        v += (reset_strength * r).add_(grad_spikes[t]).mul_(slope[t])
        if need_lambda:
            grad_lambda += _total(v * membranes[t])
        grad_current[t] = v
        r.mul_(reset_decay).sub_(v)
        v.mul_(membrane_decay)

    sums = (total.to(reset_decay) for total in (grad_theta, grad_strength, grad_lambda))
    return only_needed((grad_current, *sums, v, r), needed)


def only_needed(gradients: tuple[Tensor, ...], needed: list[bool]) -> tuple[Tensor, ...]:
    """The gradients, with an empty tensor for each that is not needed."""
    return tuple(
        gradient if need else gradient.new_empty(0)
        for gradient, need in zip(gradients, needed, strict=True)
    )


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
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of the three results of ``neuron_forward``, for tangents of its six tensors.

    In forward mode, each equation of the neuron is differentiated, with S' as in
    ``neuron_backward``:
        dV[t] = lambda dV[t-1] + dlambda V[t-1] + dI[t] - dR[t]
        dS[t] = S'(V[t]) dV[t]
        dR[t+1] = theta dR[t] + dtheta R[t] + v_reset dS[t] + dv_reset S[t]
    No other backend has this function. It writes nothing in place, so ``torch.func.vmap`` can map
    it.
    """
    d_spikes = []
    derivative = None if slope is not None else SURROGATES[surrogate](width).derivative
    for t, i in enumerate(current):
        d_membrane = membrane_decay * d_membrane + d_membrane_decay * membrane
        d_membrane = d_membrane + d_current[t] - d_reset
        membrane = membrane_decay * membrane + i - reset
        spike = (membrane > THRESHOLD).to(reset)
        s = slope[t] if derivative is None else derivative(membrane)  # S'(V[t])
        d_spikes.append(s * d_membrane)
        d_reset = reset_decay * d_reset + d_reset_decay * reset
        d_reset = d_reset + reset_strength * d_spikes[-1] + d_reset_strength * spike
        reset = reset_decay * reset + reset_strength * spike
    d_spikes = torch.stack(d_spikes) if d_spikes else torch.zeros_like(d_current).to(reset)
    if dropout:
        d_spikes = d_spikes * dropout_scale(d_spikes, dropout, seed)
    return d_spikes, d_membrane.clone(), d_reset.clone()


def dropout_scale(spikes: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """0 where an element of ``spikes`` is dropped and 1 / (1 - dropout) elsewhere.

    The generator is counter-based. Element number i is dropped if the hash of i under a key, a
    uniform number from 0 to 2^32 - 1, is below dropout * 2^32. ``seed``, int64 ``(2,)``, holds the
    key and the number of the first element; the others are numbered row-major. No mask is stored:
    any backend draws the same one in any order, and the backward pass draws it again. The hash is
    the finaliser of MurmurHash3 (Appleby, public domain), once for each half of the key.
    """
    # int32 wraps around as the hash needs it, and is several times faster than int64.
    key, first = seed.unbind()
    h = (first + torch.arange(spikes.numel(), device=seed.device)).to(torch.int32)
    for half in (key, key >> 32):
        _mix(h.bitwise_xor_(half.to(torch.int32)))
    kept = h.bitwise_xor_(-(2**31)) >= int(dropout * 2**32) - 2**31  # compares them unsigned
    return kept.view(spikes.shape).to(spikes.dtype).mul_(1.0 / (1.0 - dropout))


def _mix(h: Tensor) -> None:
    """32-bit finaliser of MurmurHash3, in place; the masks make ``>>`` shift zeros in."""
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(0x85EBCA6B - 2**32)
    h.bitwise_xor_((h >> 13).bitwise_and_(0x7FFFF)).mul_(0xC2B2AE35 - 2**32)
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))
