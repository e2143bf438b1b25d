"""The CPU backend: the four functions of ``eager``, compiled by Numba.

Every kernel works through tiles, a few batch rows by some channels, and runs all time steps of one
tile before the next, so that what the recurrence carries along stays in the cache and every
sequence is read or written once. The innermost loops run over channels, which lie side by side in
memory, and are vectorised by LLVM. Threads share the tiles out; the tiles depend on the shape
alone, so results do not depend on the number of threads.

Whatever a recurrence carries on is set to zero below ``TINY``: a decaying trace would otherwise end
in denormal numbers, which a CPU computes ten times slower.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from snn_lib.surrogate import Gaussian

TINY = 1e-30
TILE = 4096  # elements of a tile at one time step
TILE_CHANNELS = 1024
SMALL = (
    32768  # elements of a sequence below which handing work to a thread costs more than it saves
)


def _compile(function: Callable) -> Callable:
    """Numba's ``njit``, without the GIL, with its cache on disk where a folder can be written."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder for the cache
        return njit(nogil=True, error_model="numpy")(function)


# ---------------------------------------------------------------------------------------------
# Rows: the loops over channels that LLVM vectorises. Operations and their order are eager's.


@_compile
def _multiply(out, a, x):
    for n in range(len(out)):
        out[n] = a[n] * x[n]


@_compile
def _multiply_add(out, a, x):
    for n in range(len(out)):
        out[n] += a[n] * x[n]


@_compile
def _multiply_add_double(total, a, x):
    for n in range(len(total)):
        total[n] += np.float64(a[n]) * np.float64(x[n])


@_compile
def _flush(out):
    tiny, zero = out.dtype.type(TINY), out.dtype.type(0)
    for n in range(len(out)):
        out[n] = zero if abs(out[n]) < tiny else out[n]


@_compile
def _row(sequence, t, b, channels):
    """Row (t, b) of a sequence; one of length 1 in time or batch holds the same for all."""
    return sequence[min(t, sequence.shape[0] - 1), min(b, sequence.shape[1] - 1), channels]


@_compile
def _tile(item, rows, columns, batch, channels):
    """Batch rows and channels of tile number ``item``."""
    across = (channels + columns - 1) // columns
    b, c = item // across * rows, item % across * columns
    return range(b, min(b + rows, batch)), slice(c, min(c + columns, channels))


# ---------------------------------------------------------------------------------------------
# The filter


@_compile
def _filter_forward(first, last, rows, columns, x, alpha, beta, past_output, past_input, output):
    steps, batch, channels = output.shape
    order_p, order_q = len(alpha), len(beta) - 1
    for item in range(first, last):
        tile, cut = _tile(item, rows, columns, batch, channels)
        for t in range(steps):
            for b in tile:
                f = output[t, b, cut]
                _multiply(f, beta[0, cut], _row(x, t, b, cut))
                for q in range(1, order_q + 1):
                    if t >= q:
                        _multiply_add(f, beta[q, cut], _row(x, t - q, b, cut))
                    else:
                        _multiply_add(f, beta[q, cut], _row(past_input, order_q + t - q, b, cut))
                for p in range(1, order_p + 1):
                    if t >= p:
                        _multiply_add(f, alpha[p - 1, cut], output[t - p, b, cut])
                    else:
                        _multiply_add(
                            f, alpha[p - 1, cut], _row(past_output, order_p + t - p, b, cut)
                        )
                _flush(f)


def filter_forward(
    x: Tensor, alpha: Tensor, beta: Tensor, past_output: Tensor, past_input: Tensor
) -> Tensor:
    """See ``eager.filter_forward``."""
    output = torch.empty(x.shape, dtype=x.dtype)
    _share_out(_filter_forward, output.shape, x, alpha, beta, past_output, past_input, output)
    return output


@_compile
def _filter_backward(
    first,
    last,
    rows,
    columns,
    grad_output,
    x,
    alpha,
    beta,
    output,
    past_output,
    past_input,
    grad_x,
    grad_alpha,
    grad_beta,
    grad_past_output,
    grad_past_input,
    shape,
):
    steps, batch, channels = shape
    order_p, order_q = len(alpha), len(beta) - 1
    kept = max(order_p, order_q) + 1
    adjoint = np.empty((kept, rows, columns), alpha.dtype)  # A[t] is at t % kept
    for item in range(first, last):
        tile, cut = _tile(item, rows, columns, batch, channels)
        width, group = slice(0, cut.stop - cut.start), tile.start // rows
        for t in range(steps - 1, -1, -1):
            for b in tile:
                row = b - tile.start
                a = adjoint[t % kept, row, width]
                a[:] = _row(grad_output, t, b, cut)
                for p in range(1, min(order_p, steps - 1 - t) + 1):
                    _multiply_add(a, alpha[p - 1, cut], adjoint[(t + p) % kept, row, width])
                _flush(a)
                if grad_x.shape[0]:
                    _multiply(grad_x[t, b, cut], beta[0, cut], a)
                    for q in range(1, min(order_q, steps - 1 - t) + 1):
                        _multiply_add(
                            grad_x[t, b, cut], beta[q, cut], adjoint[(t + q) % kept, row, width]
                        )
                for p in range(1, grad_alpha.shape[1] + 1):
                    if t >= p:
                        f = _row(output, t - p, b, cut)
                    else:
                        f = _row(past_output, order_p + t - p, b, cut)
                    _multiply_add_double(grad_alpha[group, p - 1, cut], a, f)
                for q in range(grad_beta.shape[1]):
                    if t >= q:
                        i = _row(x, t - q, b, cut)
                    else:
                        i = _row(past_input, order_q + t - q, b, cut)
                    _multiply_add_double(grad_beta[group, q, cut], a, i)
        # The value at time past - order is carried t + order - past steps on, to time t.
        for b in tile:
            row = b - tile.start
            for past in range(grad_past_output.shape[0]):
                for t in range(min(past + 1, steps)):
                    _multiply_add(
                        grad_past_output[past, b, cut],
                        alpha[t + order_p - past - 1, cut],
                        adjoint[t % kept, row, width],
                    )
            for past in range(grad_past_input.shape[0]):
                for t in range(min(past + 1, steps)):
                    _multiply_add(
                        grad_past_input[past, b, cut],
                        beta[t + order_q - past, cut],
                        adjoint[t % kept, row, width],
                    )


def filter_backward(
    grad_output: Tensor,
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    output: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``eager.filter_backward``."""
    need_x, need_alpha, need_beta, need_past_output, need_past_input = needed
    shape = grad_output.shape
    groups = -(-shape[1] // _tile_shape(shape)[0])

    def empty(need: bool, *sizes: int, dtype: torch.dtype = alpha.dtype) -> Tensor:
        return torch.zeros(sizes if need else [0] * len(sizes), dtype=dtype)

    grad_x = torch.empty(shape if need_x else (0, 0, 0), dtype=alpha.dtype)
    # sums over the batch rows of every tile
    grad_alpha = empty(need_alpha, groups, *alpha.shape, dtype=torch.float64)
    grad_beta = empty(need_beta, groups, *beta.shape, dtype=torch.float64)
    grad_past_output = empty(need_past_output, *past_output.shape)
    grad_past_input = empty(need_past_input, *past_input.shape)
    x = x if need_beta else grad_x[:0]
    output = output if need_alpha else grad_x[:0]
    _share_out(
        _filter_backward,
        shape,
        grad_output,
        x,
        alpha,
        beta,
        output,
        past_output,
        past_input,
        grad_x,
        grad_alpha,
        grad_beta,
        grad_past_output,
        grad_past_input,
        tuple(shape),
    )
    return (
        grad_x if need_x else grad_x.view(0),
        grad_alpha.sum(0).to(alpha.dtype) if need_alpha else alpha.new_empty(0),
        grad_beta.sum(0).to(alpha.dtype) if need_beta else alpha.new_empty(0),
        grad_past_output if need_past_output else alpha.new_empty(0),
        grad_past_input if need_past_input else alpha.new_empty(0),
    )


# ---------------------------------------------------------------------------------------------
# The neuron


@_compile
def _advance(membrane, reset, current, membrane_decay, reset_decay, reset_strength):
    """One step: ``membrane`` goes from V[t-1] to V[t], ``reset`` from R[t] to R[t+1]."""
    one, zero, tiny = current.dtype.type(1), current.dtype.type(0), current.dtype.type(TINY)
    for n in range(len(membrane)):
        v = membrane_decay[n] * membrane[n] + current[n] - reset[n]
        membrane[n] = zero if abs(v) < tiny else v
        spike = one if v > one else zero
        r = reset_decay[n] * reset[n] + reset_strength[n] * spike
        reset[n] = zero if abs(r) < tiny else r


@_compile
def _fire(spikes, potential):
    one, zero = spikes.dtype.type(1), spikes.dtype.type(0)
    for n in range(len(spikes)):
        spikes[n] = one if potential[n] > one else zero


@_compile
def _mix(h):
    """``eager._mix`` in 32 bits."""
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


@_compile
def _drop(values, start, low, high, threshold, scale):
    """Drops and scales ``values``, of which the first is element ``start`` of the sequence."""
    zero, scale = values.dtype.type(0), values.dtype.type(scale)
    for n in range(len(values)):
        index = np.uint32(np.uint32(start) + np.uint32(n))
        h = _mix(np.uint32(_mix(np.uint32(index ^ low)) ^ high))
        values[n] = values[n] * scale if h >= threshold else values[n] * zero


@_compile
def _neuron_forward(
    first,
    last,
    rows,
    columns,
    current,
    reset_decay,
    reset_strength,
    membrane_decay,
    membrane,
    reset,
    spikes,
    dropping,
    low,
    high,
    threshold,
    scale,
):
    steps, batch, channels = spikes.shape
    for item in range(first, last):
        tile, cut = _tile(item, rows, columns, batch, channels)
        theta, strength, decay = reset_decay[cut], reset_strength[cut], membrane_decay[cut]
        for t in range(steps):
            for b in tile:
                v = membrane[b, cut]
                _advance(v, reset[b, cut], _row(current, t, b, cut), decay, theta, strength)
                _fire(spikes[t, b, cut], v)
                if dropping:
                    start = (t * batch + b) * channels + cut.start
                    _drop(spikes[t, b, cut], start, low, high, threshold, scale)


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
    """See ``eager.neuron_forward``."""
    spikes = torch.empty(current.shape, dtype=current.dtype)
    membrane, reset = (t.clone(memory_format=torch.contiguous_format) for t in (membrane, reset))
    _share_out(
        _neuron_forward,
        spikes.shape,
        current,
        reset_decay,
        reset_strength,
        membrane_decay,
        membrane,
        reset,
        spikes,
        *_dropout_arguments(dropout, seed),
    )
    return spikes, membrane, reset


def _exp(y):
    """exp(y) for y <= 0."""


@overload(_exp)
def _(y):
    if y != types.float32:
        return lambda y: math.exp(y)

    def exp32(y):
        # y = k ln 2 + r with |r| <= ln 2 / 2, k and the power of two by way of the bits of a float:
        # LLVM vectorises this, and not the call of the C library's exp.
        y = max(y, np.float32(-87.0))
        shifted = y * np.float32(1.4426950408889634) + np.float32(12582912.0)
        k = shifted - np.float32(12582912.0)
        r = y - k * np.float32(0.693359375) - k * np.float32(-2.12194440e-4)
        e = np.float32(1.0 / 720)
        e = e * r + np.float32(1.0 / 120)
        e = e * r + np.float32(1.0 / 24)
        e = e * r + np.float32(1.0 / 6)
        e = e * r + np.float32(0.5)
        e = e * r + np.float32(1.0)
        e = e * r + np.float32(1.0)
        power = np.int32(np.int32(k) + np.int32(127)) << np.int32(23)
        return e * np.int32(power).view(np.float32)

    return exp32


@_compile
def _gaussian(derivative, potential, width):
    one = potential.dtype.type(1)
    scale = potential.dtype.type(1.0 / (math.sqrt(2.0 * math.pi) * width))
    steepness = potential.dtype.type(-0.5 / (width * width))
    for n in range(len(derivative)):
        distance = potential[n] - one
        derivative[n] = scale * _exp(distance * distance * steepness)


@_compile
def _fast_sigmoid(derivative, potential, width):
    one, steepness = potential.dtype.type(1), potential.dtype.type(1.0 / width)
    for n in range(len(derivative)):
        reach = one + abs(potential[n] - one) * steepness
        derivative[n] = one / (reach * reach)


@_compile
def _retreat(v, r, through, derivative, grad_spike, membrane_decay, reset_decay, reset_strength):
    """One step back; ``v`` and ``r`` are what flows into V[t] and R[t+1] from the steps after t."""
    tiny, zero = v.dtype.type(TINY), v.dtype.type(0)
    for n in range(len(v)):
        g = (grad_spike[n] + reset_strength[n] * r[n]) * derivative[n] + v[n]
        g = zero if abs(g) < tiny else g
        through[n] = g
        r_next = reset_decay[n] * r[n] - g
        r[n] = zero if abs(r_next) < tiny else r_next
        v_next = membrane_decay[n] * g
        v[n] = zero if abs(v_next) < tiny else v_next


@_compile
def _neuron_backward(
    first,
    last,
    rows,
    columns,
    grad_spikes,
    current,
    reset_decay,
    reset_strength,
    membrane_decay,
    membrane,
    reset,
    gaussian,
    width,
    grad_current,
    grad_theta,
    grad_strength,
    grad_lambda,
    v,
    r,
    resets,
    dropping,
    low,
    high,
    threshold,
    scale,
):
    steps, batch, channels = grad_current.shape
    running = np.empty((2, rows, columns), v.dtype)
    work = np.empty((2, columns), v.dtype)
    for item in range(first, last):
        tile, cut = _tile(item, rows, columns, batch, channels)
        span, group = slice(0, cut.stop - cut.start), tile.start // rows
        theta, strength, decay = reset_decay[cut], reset_strength[cut], membrane_decay[cut]
        grad_spike, derivative = work[0, span], work[1, span]

        # Forwards again: grad_current holds V until the way back replaces it.
        for t in range(steps):
            for b in tile:
                v_now, r_now = running[0, b - tile.start, span], running[1, b - tile.start, span]
                if t == 0:
                    v_now[:] = membrane[min(b, len(membrane) - 1), cut]
                    r_now[:] = reset[min(b, len(reset) - 1), cut]
                if resets.shape[0]:
                    resets[t, b, cut] = r_now
                _advance(v_now, r_now, _row(current, t, b, cut), decay, theta, strength)
                grad_current[t, b, cut] = v_now

        for t in range(steps - 1, -1, -1):
            for b in tile:
                through = grad_current[t, b, cut]
                if grad_theta.shape[0]:
                    _multiply_add_double(grad_theta[group, cut], r[b, cut], resets[t, b, cut])
                if grad_strength.shape[0]:
                    _fire(grad_spike, through)
                    _multiply_add_double(grad_strength[group, cut], r[b, cut], grad_spike)
                grad_spike[:] = _row(grad_spikes, t, b, cut)
                if dropping:
                    start = (t * batch + b) * channels + cut.start
                    _drop(grad_spike, start, low, high, threshold, scale)
                if gaussian:
                    _gaussian(derivative, through, width)
                else:
                    _fast_sigmoid(derivative, through, width)
                _retreat(
                    v[b, cut], r[b, cut], through, derivative, grad_spike, decay, theta, strength
                )
                if grad_lambda.shape[0]:
                    if t > 0:
                        before = grad_current[t - 1, b, cut]
                    else:
                        before = membrane[min(b, len(membrane) - 1), cut]
                    _multiply_add_double(grad_lambda[group, cut], through, before)


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
    dropout: float,
    seed: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``eager.neuron_backward``."""
    shape = current.shape
    groups = -(-shape[1] // _tile_shape(shape)[0])
    grad_current = torch.empty(shape, dtype=current.dtype)
    sums = [
        torch.zeros(groups if need else 0, shape[2], dtype=torch.float64) for need in needed[1:4]
    ]
    v, r = (t.clone(memory_format=torch.contiguous_format) for t in (grad_membrane, grad_reset))
    resets = torch.empty(shape if needed[1] else (0, 0, 0), dtype=current.dtype)
    _share_out(
        _neuron_backward,
        shape,
        grad_spikes,
        current,
        reset_decay,
        reset_strength,
        membrane_decay,
        membrane,
        reset,
        surrogate == Gaussian.name,
        width,
        grad_current,
        *sums,
        v,
        r,
        resets,
        *_dropout_arguments(dropout, seed),
    )
    gradients = (grad_current, *(total.sum(0).to(current.dtype) for total in sums), v, r)
    return tuple(
        gradient if need else current.new_empty(0)
        for gradient, need in zip(gradients, needed, strict=True)
    )


def _dropout_arguments(dropout: float, seed: Tensor) -> tuple:
    """Whether to drop, the halves of the seed, the threshold and the survivors' scale."""
    seed = int(seed)
    return (
        dropout > 0.0,
        np.uint32(seed & 0xFFFFFFFF),
        np.uint32((seed >> 32) & 0xFFFFFFFF),
        np.uint32(int(dropout * 2**32)),
        1.0 / (1.0 - dropout),
    )


# ---------------------------------------------------------------------------------------------
# Threads


def _tile_shape(shape: torch.Size) -> tuple[int, int]:
    """Batch rows and channels of a tile."""
    columns = max(1, min(shape[2], TILE_CHANNELS))
    return max(1, min(shape[1], TILE // columns)), columns


def _array(value):
    """A tensor as a C-contiguous array; a leading dimension that repeats itself has length 1."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    for dim in range(value.dim() - 1):
        if value.stride(dim) == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value.contiguous().numpy()


def _share_out(kernel: Callable, shape: torch.Size, *arguments) -> None:
    """Runs ``kernel`` on all tiles of sequences of this shape."""
    rows, columns = _tile_shape(shape)
    items = -(-shape[1] // rows) * -(-shape[2] // columns)
    arguments = (rows, columns, *map(_array, arguments))
    threads = 1 if shape.numel() < SMALL else max(1, min(torch.get_num_threads(), items))
    bounds = [items * i // threads for i in range(threads + 1)]
    others = [
        _pool(threads - 1).submit(kernel, bounds[i], bounds[i + 1], *arguments)
        for i in range(1, threads)
    ]
    kernel(0, bounds[1], *arguments)
    for other in others:
        other.result()


_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(workers: int) -> ThreadPoolExecutor:
    return _pools.setdefault(workers, ThreadPoolExecutor(workers, thread_name_prefix="snn"))


# A fork copies the pools but not their threads.
os.register_at_fork(after_in_child=_pools.clear)
