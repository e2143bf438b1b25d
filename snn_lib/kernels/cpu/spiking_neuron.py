"""The spiking neuron's two functions on the CPU; equations and arguments are in ``eager``."""

import torch
from torch import Tensor

from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.compiling import jit
from snn_lib.kernels.cpu.dropout import drop, dropout_arguments
from snn_lib.kernels.cpu.llvm import arrays
from snn_lib.kernels.cpu.rows import TINY, assign, correlate, prefetch, read, row, write
from snn_lib.kernels.cpu.surrogates import fast_sigmoid, gaussian
from snn_lib.kernels.cpu.tiles import (
    check_dtypes,
    groups,
    locate,
    share_out,
    tiles_of_all_steps,
)
from snn_lib.kernels.eager import contiguous_copy, only_needed
from snn_lib.surrogate import Gaussian


@jit
def advance(v, r, current, membrane_decay, reset_decay, reset_strength):
    """One step in place: V[t-1] in ``v`` becomes V[t], and R[t] in ``r`` becomes R[t+1]."""
    one, zero, tiny = v.dtype.type(1), v.dtype.type(0), v.dtype.type(TINY)
    for n in range(len(v)):
        v_next = membrane_decay[n] * v[n] + read(current[n]) - r[n]
        spike = one if v_next > one else zero
        r_next = reset_decay[n] * r[n] + reset_strength[n] * spike
        v[n] = zero if abs(v_next) < tiny else v_next
        r[n] = zero if abs(r_next) < tiny else r_next


@jit
def fire(spikes, v):
    """S[t] of V[t]."""
    one, zero = v.dtype.type(1), v.dtype.type(0)
    for n in range(len(spikes)):
        spikes[n] = one if v[n] > one else zero


@jit
def _neuron_forward(number, first, last, arguments):
    (rows, columns), (current, membrane, reset, spikes), coefficients, dropout = arrays(arguments)
    reset_decay, reset_strength, membrane_decay = coefficients
    dropping = dropout[0]
    steps, batch, channels = spikes.shape
    for item in range(first, last):
        tile, cut = locate(item, rows, columns, batch, channels)
        theta, strength, decay = reset_decay[cut], reset_strength[cut], membrane_decay[cut]
        for t in range(steps):
            for b in tile:
                prefetch(current, t + 1, b, cut)
                v, spike = membrane[b, cut], spikes[t, b, cut]
                advance(v, reset[b, cut], row(current, t, b, cut), decay, theta, strength)
                fire(spike, v)
                if dropping:
                    drop(spike, (t * batch + b) * channels + cut.start, dropout)


@jit
def _neuron_forward_parallel(threads, items, arguments):
    openmp.in_parallel(_neuron_forward, threads, items, arguments)


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
    """See ``eager.neuron_forward``."""
    coefficients = reset_decay, reset_strength, membrane_decay
    check_dtypes((current,), *coefficients, membrane, reset)
    shape = current.shape
    spikes = torch.empty(*shape, dtype=reset_decay.dtype)
    membrane, reset = contiguous_copy(membrane), contiguous_copy(reset)
    share_out(
        _neuron_forward,
        _neuron_forward_parallel,
        shape,
        (current, membrane, reset, spikes),
        coefficients,
        dropout_arguments(dropout, seed),
    )
    return spikes, membrane, reset


@jit
def retreat(
    grad_v,
    grad_r,
    grad_current,
    derivative,
    grad_spike,
    membrane_decay,
    reset_decay,
    reset_strength,
):
    """One step back in time.

    ``grad_v`` and ``grad_r`` hold the gradients that reach V[t] and R[t+1] from later steps; in
    their place the function leaves those that V[t-1] and R[t] get. ``grad_current`` gets dL/dI[t].
    """
    zero, tiny = grad_v.dtype.type(0), grad_v.dtype.type(TINY)
    for n in range(len(grad_v)):
        g = (grad_spike[n] + reset_strength[n] * grad_r[n]) * derivative[n] + grad_v[n]
        g = zero if abs(g) < tiny else g
        r = reset_decay[n] * grad_r[n] - g
        v = membrane_decay[n] * g
        grad_current[n] = g
        grad_r[n] = zero if abs(r) < tiny else r
        grad_v[n] = zero if abs(v) < tiny else v


@jit
def _neuron_backward(number, first, last, arguments):
    """The gradient of a coefficient that is not needed has length 0 and is not computed.

    A coefficient's gradient is summed for every group of batch rows on its own, so no two threads
    write to the same place.
    """
    (rows, columns), inputs, coefficients, surrogate, dropout, scratch, gradients = arrays(
        arguments
    )
    grad_spikes, current, membrane = inputs
    reset_decay, reset_strength, membrane_decay = coefficients
    dropping = dropout[0]
    is_gaussian, width, slopes = surrogate
    state, work, potentials, resets = scratch
    grad_current, grad_theta, grad_strength, grad_lambda, grad_v, grad_r = gradients
    steps, batch, channels = grad_current.shape
    for item in range(first, last):
        tile, cut = locate(item, rows, columns, batch, channels)
        group = tile.start // rows
        theta, strength, decay = reset_decay[cut], reset_strength[cut], membrane_decay[cut]
        grad_spike, derivative = work[0, tile.start, cut], work[1, tile.start, cut]
        local = slice(0, len(derivative))

        # The neuron runs once more, which is cheaper than to have kept V from the first time.
        for t in range(steps):
            for b in tile:
                prefetch(current, t + 1, b, cut)
                v, r = state[0, b, cut], state[1, b, cut]
                place = number, t, b - tile.start, local
                if len(resets):
                    assign(resets[place], r)
                advance(v, r, row(current, t, b, cut), decay, theta, strength)
                assign(potentials[place], v)

        # Then backwards. In ``potentials`` the gradient of V[t] takes the place of V[t].
        for t in range(steps - 1, -1, -1):
            for b in tile:
                prefetch(grad_spikes, t - 1, b, cut)
                prefetch(grad_current, t - 1, b, cut)
                prefetch(potentials[number], t - 1, b - tile.start, local)
                place = number, t, b - tile.start, local
                v = potentials[place]
                if len(grad_theta):
                    correlate(grad_theta[group, cut], grad_r[b, cut], resets[place])
                if len(grad_strength):
                    fire(derivative, v)
                    correlate(grad_strength[group, cut], grad_r[b, cut], derivative)
                assign(grad_spike, row(grad_spikes, t, b, cut))
                if dropping:
                    drop(grad_spike, (t * batch + b) * channels + cut.start, dropout)
                if len(slopes):
                    assign(derivative, row(slopes, t, b, cut))
                elif is_gaussian:
                    gaussian(derivative, v, width)
                else:
                    fast_sigmoid(derivative, v, width)
                retreat(
                    grad_v[b, cut],
                    grad_r[b, cut],
                    v,
                    derivative,
                    grad_spike,
                    decay,
                    theta,
                    strength,
                )
                if len(grad_lambda):
                    if t > 0:
                        v_past = potentials[number, t - 1, b - tile.start, local]
                    else:
                        v_past = membrane[min(b, len(membrane) - 1), cut]
                    correlate(grad_lambda[group, cut], v, v_past)
                write(grad_current[t, b, cut], v)


@jit
def _neuron_backward_parallel(threads, items, arguments):
    openmp.in_parallel(_neuron_backward, threads, items, arguments)


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
    """See ``eager.neuron_backward``."""
    coefficients = reset_decay, reset_strength, membrane_decay
    gradients = grad_spikes, grad_membrane, grad_reset
    slopes = reset_decay.new_empty(0, 0, 0) if slope is None else slope
    check_dtypes((current,), *gradients, *coefficients, membrane, reset, slopes)
    shape, dtype = current.shape, reset_decay.dtype
    # Every thread holds V, and where a gradient needs it R, for the tile that it works on.
    room = tiles_of_all_steps(shape)
    potentials = torch.empty(room, dtype=dtype)
    resets = torch.empty(room if needed[1] else (0, 0, 0, 0), dtype=dtype)
    grad_current = torch.empty(shape, dtype=current.dtype)
    grad_v, grad_r = contiguous_copy(grad_membrane), contiguous_copy(grad_reset)
    sums = [
        torch.zeros(groups(shape) if need else 0, shape[2], dtype=torch.float64)
        for need in needed[1:4]
    ]
    share_out(
        _neuron_backward,
        _neuron_backward_parallel,
        shape,
        (grad_spikes, current, membrane),
        coefficients,
        (surrogate == Gaussian.name, width, slopes),
        dropout_arguments(dropout, seed),
        (
            torch.stack([membrane, reset]),
            torch.empty(2, *shape[1:], dtype=dtype),
            potentials,
            resets,
        ),
        (grad_current, *sums, grad_v, grad_r),
    )
    gradients = (grad_current, *(total.sum(0).to(dtype) for total in sums), grad_v, grad_r)
    return only_needed(gradients, needed)
