"""The spiking neuron's two functions on a GPU; equations and arguments are in ``eager``."""

import triton.language as tl
from torch import Tensor

from snn_lib.kernels.cuda.dropout import drop, number_elements
from snn_lib.kernels.cuda.lanes import address_of, load_state, locate_lanes, store_partial_sums
from snn_lib.kernels.cuda.launching import (
    STAGES,
    UNROLL,
    jit,
    launch,
    partial_sums,
    tile_shape,
    with_strides,
)
from snn_lib.kernels.cuda.surrogates import THRESHOLD, derivative_at


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
    """Spikes, last membrane potential and next reset; see ``eager.neuron_forward``."""
    spikes = reset_decay.new_empty(current.shape)
    last_membrane, next_reset = (reset_decay.new_empty(current.shape[1:]) for _ in range(2))
    launch(
        _neuron_forward,
        tile_shape(current),
        current.shape,
        with_strides(current),
        reset_decay.contiguous(),
        reset_strength.contiguous(),
        membrane_decay.contiguous(),
        with_strides(membrane),
        with_strides(reset),
        seed,
        spikes,
        last_membrane,
        next_reset,
        dropout,
        DROPS=dropout > 0.0,
    )
    return spikes, last_membrane, next_reset


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
    """Gradients for the six tensors of ``neuron_forward``; see ``eager.neuron_backward``."""
    need_current, need_theta, need_strength, need_lambda, need_membrane, need_reset = needed
    shape = current.shape
    slope = grad_spikes if slope is None else slope  # read for "given" only
    tile = tile_shape(grad_spikes, current, slope)
    grad_current = current.new_empty(shape if need_current else 0)
    grad_theta = partial_sums(tile, shape, reset_decay, need_theta)
    grad_strength = partial_sums(tile, shape, reset_strength, need_strength)
    grad_lambda = partial_sums(tile, shape, membrane_decay, need_lambda)
    grad_first_membrane = membrane.new_empty(membrane.shape if need_membrane else 0)
    grad_first_reset = reset.new_empty(reset.shape if need_reset else 0)
    # Scratch memory for V[t-1] and R[t], which the neuron's second run leaves for the way back.
    membranes = membrane.new_empty(shape)
    resets = reset.new_empty(shape if need_theta else 0)
    launch(
        _neuron_backward,
        tile,
        shape,
        with_strides(grad_spikes),
        with_strides(grad_membrane),
        with_strides(grad_reset),
        with_strides(current),
        reset_decay.contiguous(),
        reset_strength.contiguous(),
        membrane_decay.contiguous(),
        with_strides(membrane),
        with_strides(reset),
        with_strides(slope),
        seed,
        membranes,
        resets,
        grad_current,
        grad_theta,
        grad_strength,
        grad_lambda,
        grad_first_membrane,
        grad_first_reset,
        width,
        dropout,
        SURROGATE=surrogate,
        DROPS=dropout > 0.0,
        NEED_CURRENT=need_current,
        NEED_THETA=need_theta,
        NEED_STRENGTH=need_strength,
        NEED_LAMBDA=need_lambda,
        NEED_MEMBRANE=need_membrane,
        NEED_RESET=need_reset,
    )
    partials = grad_theta, grad_strength, grad_lambda
    sums = (partial.sum(-2).to(reset_decay.dtype) for partial in partials)
    return grad_current, *sums, grad_first_membrane, grad_first_reset


@jit
def _neuron_forward(
    current,
    reset_decay,
    reset_strength,
    membrane_decay,
    membrane,
    reset,
    seed,
    spikes,
    last_membrane,
    next_reset,
    dropout: tl.float64,
    steps,
    batch,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    DROPS: tl.constexpr,
):
    b, n, lane, step, channels = locate_lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    theta = tl.load(reset_decay + n, n < channels, 0.0)
    strength = tl.load(reset_strength + n, n < channels, 0.0)
    decay = tl.load(membrane_decay + n, n < channels, 0.0)
    v = load_state(membrane, b, n, lane)
    r = load_state(reset, b, n, lane)
    lane_index = b * channels + n
    key, index = number_elements(seed, lane_index, DROPS)

    current, current_step = address_of(current, 0, b, n, NEIGHBOURS)
    spikes += lane_index
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        v = decay * v + tl.load(current, lane, 0.0).to(v.dtype) - r
        spike = (v > THRESHOLD).to(v.dtype)
        r = theta * r + strength * spike
        tl.store(spikes, drop(spike, index, key, dropout, DROPS), lane)
        current += current_step
        spikes += step
        index += step.to(tl.uint32)
    tl.store(last_membrane + lane_index, v, lane)
    tl.store(next_reset + lane_index, r, lane)


@jit
def _neuron_backward(
    grad_spikes,
    grad_membrane,
    grad_reset,
    current,
    reset_decay,
    reset_strength,
    membrane_decay,
    membrane,
    reset,
    slope,
    seed,
    membranes,
    resets,
    grad_current,
    grad_theta,
    grad_strength,
    grad_lambda,
    grad_first_membrane,
    grad_first_reset,
    width: tl.float64,
    dropout: tl.float64,
    steps,
    batch,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    SURROGATE: tl.constexpr,
    DROPS: tl.constexpr,
    NEED_CURRENT: tl.constexpr,
    NEED_THETA: tl.constexpr,
    NEED_STRENGTH: tl.constexpr,
    NEED_LAMBDA: tl.constexpr,
    NEED_MEMBRANE: tl.constexpr,
    NEED_RESET: tl.constexpr,
):
    b, n, lane, step, channels = locate_lanes(batch, channels, ROWS, COLUMNS, NEIGHBOURS)
    theta = tl.load(reset_decay + n, n < channels, 0.0)
    strength = tl.load(reset_strength + n, n < channels, 0.0)
    decay = tl.load(membrane_decay + n, n < channels, 0.0)
    lane_index = b * channels + n

    # The neuron runs once more and leaves V[t-1] and R[t], of which step t is made.
    potential = load_state(membrane, b, n, lane)
    trace = load_state(reset, b, n, lane)
    current, current_step = address_of(current, 0, b, n, NEIGHBOURS)
    membranes += lane_index
    resets += lane_index
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        tl.store(membranes, potential, lane)
        if NEED_THETA:
            tl.store(resets, trace, lane)
        potential = decay * potential + tl.load(current, lane, 0.0).to(decay.dtype) - trace
        spike = (potential > THRESHOLD).to(potential.dtype)
        trace = theta * trace + strength * spike
        current += current_step
        membranes += step
        resets += step
    tl.debug_barrier()  # from here on all threads of the program see the scratch memory

    # Then back through time: v and r are the gradients of V[t] and R[t+1] from the steps after t.
    v = load_state(grad_membrane, b, n, lane)
    r = load_state(grad_reset, b, n, lane)
    theta_sum = tl.zeros((ROWS, COLUMNS), tl.float64)
    strength_sum = tl.zeros((ROWS, COLUMNS), tl.float64)
    lambda_sum = tl.zeros((ROWS, COLUMNS), tl.float64)
    last = steps.to(tl.int64) - 1
    key, index = number_elements(seed, last * step + lane_index, DROPS)
    grad_spikes, grad_spikes_step = address_of(grad_spikes, last, b, n, NEIGHBOURS)
    slope, slope_step = address_of(slope, last, b, n, NEIGHBOURS)
    grad_current += last * step + lane_index
    for _ in tl.range(steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        membranes -= step
        resets -= step
        spike = (potential > THRESHOLD).to(v.dtype)
        grad_spike = drop(tl.load(grad_spikes, lane, 0.0), index, key, dropout, DROPS)
        if SURROGATE == "given":
            derivative = tl.load(slope, lane, 0.0)
        else:
            derivative = derivative_at(potential, width, SURROGATE)
        wide_r = r.to(tl.float64)
        if NEED_THETA:
            theta_sum = tl.fma(wide_r, tl.load(resets, lane, 0.0).to(tl.float64), theta_sum)
        if NEED_STRENGTH:
            strength_sum = tl.fma(wide_r, spike.to(tl.float64), strength_sum)
        v = (grad_spike + strength * r) * derivative + v
        potential = tl.load(membranes, lane, 0.0)
        if NEED_LAMBDA:
            lambda_sum = tl.fma(v.to(tl.float64), potential.to(tl.float64), lambda_sum)
        if NEED_CURRENT:
            tl.store(grad_current, v, lane)
        r = theta * r - v
        v = decay * v
        grad_spikes -= grad_spikes_step
        slope -= slope_step
        grad_current -= step
        index -= step.to(tl.uint32)

    if NEED_THETA:
        store_partial_sums(grad_theta, (theta_sum,), batch, channels, n, 1)
    if NEED_STRENGTH:
        store_partial_sums(grad_strength, (strength_sum,), batch, channels, n, 1)
    if NEED_LAMBDA:
        store_partial_sums(grad_lambda, (lambda_sum,), batch, channels, n, 1)
    if NEED_MEMBRANE:
        tl.store(grad_first_membrane + lane_index, v, lane)
    if NEED_RESET:
        tl.store(grad_first_reset + lane_index, r, lane)
