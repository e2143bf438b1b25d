"""The CPU backend: the four functions of ``eager``, compiled by Numba.

Every kernel works through tiles, a few batch rows by some channels, and runs all time steps of one
tile before the next, so that what the recurrence carries along stays in the cache and every
sequence is read or written once. The innermost loops run over channels, which lie side by side in
memory, and are vectorised by LLVM; their operations and order are those of ``eager``. Threads share
the tiles out. Tiles depend on the shape alone, so results do not depend on the number of threads.

Whatever a recurrence carries on is set to zero below ``TINY``: a decaying trace would otherwise end
in denormal numbers, which a CPU computes ten times slower.
"""

import ctypes
import hashlib
import math
import os
import sys
from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core import event as events
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array
from torch import Tensor
from tqdm import tqdm

from snn_lib.kernels import COMPUTE_DTYPES, openmp
from snn_lib.surrogate import Gaussian

# By which compiled code knows a tensor's dtype. NumPy has no bfloat16: its bits are uint16 there,
# to be read by ``_read`` and written by ``_write``.
NUMBERS = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.bfloat16: np.uint16(0),
}
TINY = 1e-30
TILE = 2048  # elements of a tile at one time step
TILE_CHANNELS = 1024
GROUPS = 16  # the least number of groups a batch is cut into where it has the rows
SMALL = 16384  # elements of a sequence up to which the calling thread does the work alone
# Without Numba's memory manager: every view of a row would count its references, and threads that
# count on the same array take longer over it than over the arithmetic.
OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}


# Numba's cache knows a function by its name and by this file, not by what openmp.py puts into it.
VERSION = hashlib.sha256(openmp.__loader__.get_data(openmp.__file__)).hexdigest()[:8]


def _compile(function: Callable) -> Callable:
    """Numba's ``njit`` without the GIL, and with its cache on disk where a folder can be written.

    Products and sums may be contracted only where a function says so: spikes are those of
    ``eager`` bit for bit.
    """
    function.__qualname__ += f"_{VERSION}"
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no such folder
        return njit(**OPTIONS)(function)


class _Announcement(events.Listener):
    """Tells who waits at a terminal, once, that kernels are compiled and not read from the cache.

    Elsewhere, in a notebook or a log file, nobody asks why nothing moves.
    """

    made = False

    def on_start(self, event: events.Event) -> None:
        ours = event.data["dispatcher"].py_func.__module__ == __name__
        if ours and not self.made and sys.stderr is not None and sys.stderr.isatty():
            self.made = True
            tqdm.write("first use: compiling the CPU kernels (about 8 s)", file=sys.stderr)

    def on_end(self, event: events.Event) -> None:
        pass


events.register("numba:compile", _Announcement())


def _keep_freed_memory() -> None:
    """Lets the C library's allocator reuse large buffers instead of returning them to the system.

    By default glibc maps every buffer over 32 MB anew and unmaps it when it is freed, and clearing
    the fresh pages costs as much as filling them: a third of a training step over 300 time steps.
    This holds for the whole process, whose memory then stays at its peak. ``SNN_KEEP_MEMORY=0``
    switches it off, and whoever has tuned the allocator otherwise is left alone.
    """
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if tuned or os.environ.get("SNN_KEEP_MEMORY") == "0":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # glibc
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**31 - 1)


_keep_freed_memory()


# --------------------------------------------------------------------------------------------------
# Tiles and rows


def _tile_shape(shape: torch.Size) -> tuple[int, int]:
    """Batch rows and channels of a tile."""
    columns = max(1, min(shape[2], TILE_CHANNELS))
    return max(1, min(shape[1] // GROUPS, TILE // columns)), columns


def _check_dtypes(sequences: tuple[Tensor, ...], *others: Tensor) -> None:
    """Refuses what the kernels would misread: they take the bits of bfloat16 for integers.

    Coefficients, states and what they are computed with are in one dtype, float32 or float64;
    ``sequences`` may also be in bfloat16.
    """
    dtype = others[0].dtype
    fits = dtype in COMPUTE_DTYPES
    for tensor in others:
        fits = fits and tensor.dtype == dtype
    for tensor in sequences:
        fits = fits and tensor.dtype in (dtype, torch.bfloat16)
    if not fits:
        given = ", ".join(sorted({str(tensor.dtype) for tensor in (*sequences, *others)}))
        raise TypeError(
            f"the CPU kernels got {given}, expected torch.float32 or torch.float64 throughout, "
            "or torch.bfloat16 in the sequences between matrix products"
        )


def _share_out(kernel: Callable, parallel: Callable, shape: torch.Size, *arguments) -> None:
    """Runs ``kernel`` on all tiles of sequences of this shape.

    What repeats itself in time or batch arrives there once, see ``_dense``: coefficients, whose
    length tells the order, are to be contiguous.
    """
    rows, columns = _tile_shape(shape)
    _, batch, channels = shape
    items = -(-batch // rows) * -(-channels // columns)
    dense = [_dense(value) if isinstance(value, Tensor) else value for value in arguments]
    arguments = [
        (NUMBERS[value.dtype], value.data_ptr(), *value.shape)
        if isinstance(value, Tensor)
        else value
        for value in dense  # which keeps copies alive
    ]
    threads = 1 if shape.numel() <= SMALL else max(1, min(torch.get_num_threads(), items))
    openmp.run(kernel, parallel, threads, items, (rows, columns, *arguments))


def _dense(tensor: Tensor) -> Tensor:
    """A contiguous tensor; a leading dimension that repeats itself has length 1."""
    if not tensor.is_cpu:
        raise TypeError(f"the CPU kernels got a tensor on {tensor.device}")
    if not tensor.is_contiguous():
        for dim in range(tensor.dim() - 1):
            if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
        tensor = tensor.contiguous()
    return tensor


@intrinsic
def _arrays(typing_context, arguments):
    """The arguments of a kernel, with an array for each tensor, ``(number, address, *shape)``."""
    kinds = [
        types.Array(kind[0], len(kind) - 2, "C") if isinstance(kind, types.BaseTuple) else kind
        for kind in arguments
    ]

    def generate(context, builder, signature, values):
        made = []
        for number, kind in enumerate(kinds):
            value = builder.extract_value(values[0], number)
            if isinstance(kind, types.Array):
                _, address, *shape = cgutils.unpack_tuple(builder, value)
                array = context.make_array(kind)(context, builder)
                itemsize = context.get_constant(
                    types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype))
                )
                strides = [itemsize]
                for size in shape[:0:-1]:
                    strides.insert(0, builder.mul(strides[0], size))
                populate_array(
                    array,
                    data=builder.inttoptr(address, array.data.type),
                    shape=shape,
                    strides=strides,
                    itemsize=itemsize,
                    meminfo=None,
                )
                value = array._getvalue()
            made.append(value)
        return context.make_tuple(builder, signature.return_type, made)

    return types.Tuple(kinds)(arguments), generate


@_compile
def _tile(item, rows, columns, batch, channels):
    """Batch rows and channels of tile number ``item``."""
    across = (channels + columns - 1) // columns
    b, c = item // across * rows, item % across * columns
    return range(b, min(b + rows, batch)), slice(c, min(c + columns, channels))


@njit(inline="always")
def _row(sequence, t, b, channels):
    """Row (t, b) of a sequence; one of length 1 in time or batch holds the same for all."""
    return sequence[min(t, sequence.shape[0] - 1), min(b, sequence.shape[1] - 1), channels]


@intrinsic
def _prefetch_line(typing_context, row, n):
    """Asks for the cache line of row[n]."""

    def generate(context, builder, signature, values):
        view, i32 = context.make_array(row)(context, builder, values[0]), ir.IntType(32)
        pointer = builder.bitcast(builder.gep(view.data, [values[1]]), cgutils.voidptr_t)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [cgutils.voidptr_t],
            ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32]),
        )
        read, keep, data = i32(0), i32(3), i32(1)
        builder.call(prefetch, [pointer, read, keep, data])
        return context.get_dummy_value()

    return types.void(row, types.intp), generate


@_compile
def _prefetch(sequence, t, b, channels):
    """Asks for a row that the next time step needs: the CPU does not guess jumps of this size."""
    if 0 <= t < sequence.shape[0]:
        row = _row(sequence, t, b, channels)
        for n in range(0, len(row), 64 // row.itemsize):
            _prefetch_line(row, n)


@njit(inline="always")
def _past(sequence, before, order, t, b, channels):
    """Row (t, b) of a sequence that goes back to t = -order."""
    # One exit: Numba inlines no function with two.
    row = _row(sequence, t, b, channels) if t >= 0 else _row(before, order + t, b, channels)
    return row


def _read(value):
    """An element of a sequence as a number: bfloat16 is the upper half of a float32's bits."""


@overload(_read)
def _(value):
    if value == types.uint16:

        def read_bfloat16(value):
            bits = np.uint32(np.uint32(value) << np.uint32(16))
            return bits.view(np.float32)

        return read_bfloat16
    return lambda value: value


def _write(out, x):
    """Stores numbers in a row of a sequence, rounded to the nearest, even one on a tie."""


@overload(_write)
def _(out, x):
    if out.dtype != types.uint16:
        return lambda out, x: _assign(out, x)

    def write_bfloat16(out, x):
        half, one, nan = np.uint32(0x7FFF), np.uint32(1), np.uint16(0x7FC0)
        for n in range(len(out)):
            value = np.float32(x[n])
            bits = value.view(np.uint32)
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & one)
            rounded = np.uint16(np.uint32(bits + half + odd) >> np.uint32(16))
            out[n] = rounded if value == value else nan

    return write_bfloat16


@_compile
def _assign(out, x):
    for n in range(len(out)):
        out[n] = _read(x[n])


@_compile
def _add(out, x):
    for n in range(len(out)):
        out[n] += x[n]


@_compile
def _multiply(out, a, x):
    for n in range(len(out)):
        out[n] = a[n] * x[n]


@_compile
def _multiply_add(out, a, x):
    for n in range(len(out)):
        out[n] += a[n] * x[n]


@_compile
def _correlate(total, a, x):
    """In double precision, for sums over many steps and for products of small numbers."""
    for n in range(len(total)):
        total[n] += np.float64(a[n]) * np.float64(_read(x[n]))


@_compile
def _flush(out):
    tiny, zero = out.dtype.type(TINY), out.dtype.type(0)
    for n in range(len(out)):
        out[n] = zero if abs(out[n]) < tiny else out[n]


# --------------------------------------------------------------------------------------------------
# The filter


@_compile
def _second_order(f, beta_0, x, alpha_1, f_1, alpha_2, f_2):
    """One step of a filter of order 2 without past inputs, the usual one, in a single pass."""
    tiny, zero = f.dtype.type(TINY), f.dtype.type(0)
    for n in range(len(f)):
        value = beta_0[n] * _read(x[n]) + alpha_1[n] * f_1[n] + alpha_2[n] * f_2[n]
        f[n] = zero if abs(value) < tiny else value


@_compile
def _filter_forward(first, last, arguments):
    (
        rows,
        columns,
        x,
        alpha,
        beta,
        past_output,
        past_input,
        output,
        rounds,
        last_output,
        recent,
    ) = _arrays(arguments)
    steps, batch, channels = output.shape
    order_p, order_q, kept = len(alpha), len(beta) - 1, len(recent)
    for item in range(first, last):
        tile, cut = _tile(item, rows, columns, batch, channels)
        for p in range(order_p):
            for b in tile:
                _assign(recent[(p - order_p) % kept, b, cut], _row(past_output, p, b, cut))
        for t in range(steps):
            for b in tile:
                _prefetch(x, t + 1, b, cut)
                f, x_now = recent[t % kept, b, cut], _row(x, t, b, cut)
                if order_p == 2 and order_q == 0:
                    f_1, f_2 = recent[(t - 1) % kept, b, cut], recent[(t - 2) % kept, b, cut]
                    _second_order(f, beta[0, cut], x_now, alpha[0, cut], f_1, alpha[1, cut], f_2)
                else:
                    _multiply(f, beta[0, cut], x_now)
                    for q in range(1, order_q + 1):
                        x_past = _past(x, past_input, order_q, t - q, b, cut)
                        _multiply_add(f, beta[q, cut], x_past)
                    for p in range(1, order_p + 1):
                        _multiply_add(f, alpha[p - 1, cut], recent[(t - p) % kept, b, cut])
                    _flush(f)
                if rounds:
                    _write(output[t, b, cut], f)
        for p in range(order_p):
            for b in tile:
                _assign(last_output[p, b, cut], recent[(steps + p - order_p) % kept, b, cut])


@_compile
def _filter_forward_parallel(threads, items, arguments):
    openmp.in_parallel(_filter_forward, threads, items, arguments)


def filter_forward(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor,
    past_output: Tensor,
    past_input: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See ``eager.filter_forward``."""
    shape, (order_p, _) = x.shape, alpha.shape
    steps, batch, channels = shape
    output = torch.empty(steps, batch, channels, dtype=dtype)
    _check_dtypes((output,), x, alpha, beta, past_output, past_input)
    last_output = torch.empty(order_p, batch, channels, dtype=x.dtype)
    # The outputs that are still needed unrounded, F[t] at t % len(recent).
    rounds = dtype != x.dtype or steps <= order_p
    recent = torch.empty(order_p + 1, batch, channels, dtype=x.dtype) if rounds else output
    _share_out(
        _filter_forward,
        _filter_forward_parallel,
        shape,
        x,
        alpha.contiguous(),
        beta.contiguous(),
        past_output,
        past_input,
        output,
        rounds,
        last_output,
        recent,
    )
    return output, last_output


@_compile
def _filter_backward(first, last, arguments):
    """Gradients that are not needed have length 0 and cost nothing."""
    (
        rows,
        columns,
        steps,
        batch,
        grad_output,
        grad_last,
        x,
        alpha,
        beta,
        output,
        past_output,
        past_input,
        ones,
        adjoint,
        grad_x,
        grad_alpha,
        grad_beta,
        grad_past_output,
        grad_past_input,
    ) = _arrays(arguments)
    order_p, order_q, channels = len(alpha), len(beta) - 1, alpha.shape[1]
    kept = len(adjoint)
    for item in range(first, last):
        tile, cut = _tile(item, rows, columns, batch, channels)
        group = tile.start // rows
        for t in range(steps - 1, -1, -1):
            for b in tile:
                _prefetch(grad_output, t - 1, b, cut)
                _prefetch(grad_x, t - 1, b, cut)
                a, grad = adjoint[t % kept, b, cut], _row(grad_output, t, b, cut)
                if order_p == 2 and t < steps - 2:
                    a_1, a_2 = adjoint[(t + 1) % kept, b, cut], adjoint[(t + 2) % kept, b, cut]
                    _second_order(a, ones[cut], grad, alpha[0, cut], a_1, alpha[1, cut], a_2)
                else:
                    _assign(a, grad)
                    if t >= steps - order_p:
                        _add(a, _row(grad_last, t - (steps - order_p), b, cut))
                    for p in range(1, min(order_p, steps - 1 - t) + 1):
                        _multiply_add(a, alpha[p - 1, cut], adjoint[(t + p) % kept, b, cut])
                    _flush(a)
                if len(grad_x):
                    g = grad_x[t, b, cut]
                    _multiply(g, beta[0, cut], a)
                    for q in range(1, min(order_q, steps - 1 - t) + 1):
                        _multiply_add(g, beta[q, cut], adjoint[(t + q) % kept, b, cut])
                if len(grad_alpha):
                    _prefetch(output, t - order_p - 1, b, cut)
                    for p in range(1, order_p + 1):
                        total = grad_alpha[group, p - 1, cut]
                        if t >= p:  # two calls, since the rows may differ in dtype
                            _correlate(total, a, _row(output, t - p, b, cut))
                        else:
                            _correlate(total, a, _row(past_output, order_p + t - p, b, cut))
                if len(grad_beta):
                    _prefetch(x, t - order_q - 1, b, cut)
                    for q in range(order_q + 1):
                        x_past = _past(x, past_input, order_q, t - q, b, cut)
                        _correlate(grad_beta[group, q, cut], a, x_past)
        # Step 0 <= t <= past hears of the value at time past - order through the coefficient of
        # lag t + order - past.
        for b in tile:
            for past in range(len(grad_past_output)):
                for t in range(min(past + 1, steps)):
                    a = adjoint[t % kept, b, cut]
                    weight = alpha[t + order_p - past - 1, cut]
                    _multiply_add(grad_past_output[past, b, cut], weight, a)
            for past in range(len(grad_past_input)):
                for t in range(min(past + 1, steps)):
                    a = adjoint[t % kept, b, cut]
                    weight = beta[t + order_q - past, cut]
                    _multiply_add(grad_past_input[past, b, cut], weight, a)


@_compile
def _filter_backward_parallel(threads, items, arguments):
    openmp.in_parallel(_filter_backward, threads, items, arguments)


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
    """See ``eager.filter_backward``."""
    _check_dtypes((grad_output, output), grad_last, x, alpha, beta, past_output, past_input)
    need_x, need_alpha, need_beta, need_past_output, need_past_input = needed
    shape, dtype = grad_output.shape, alpha.dtype
    groups = -(-shape[1] // _tile_shape(shape)[0])
    none = torch.empty(0, 0, 0, dtype=dtype)
    # The steps of the adjoint that are still needed, A[t] at t % len(adjoint).
    order_p, steps = len(alpha), len(grad_output)
    adjoint = torch.empty(max(order_p, len(beta) - 1) + 1, *shape[1:], dtype=dtype)
    grad_x = torch.empty(shape, dtype=dtype) if need_x else none
    # One sum for every group of batch rows, so that no two threads write to the same.
    grad_alpha, grad_beta = (
        torch.zeros(groups if need else 0, *coefficients.shape, dtype=torch.float64)
        for coefficients, need in ((alpha, need_alpha), (beta, need_beta))
    )
    grad_past_output, grad_past_input = (
        torch.zeros(past.shape, dtype=dtype) if need else none
        for past, need in ((past_output, need_past_output), (past_input, need_past_input))
    )
    if need_past_output:  # those that are among the last P because there are fewer steps than that
        grad_past_output[steps:] = grad_last[: order_p - steps] if steps < order_p else 0.0
    _share_out(
        _filter_backward,
        _filter_backward_parallel,
        shape,
        *shape[:2],
        grad_output,
        grad_last,
        x if need_beta else none,
        alpha.contiguous(),
        beta.contiguous(),
        output if need_alpha else none,
        past_output,
        past_input,
        torch.ones(shape[2], dtype=dtype),
        adjoint,
        grad_x,
        grad_alpha,
        grad_beta,
        grad_past_output,
        grad_past_input,
    )
    gradients = (
        grad_x,
        grad_alpha.sum(0).to(dtype),
        grad_beta.sum(0).to(dtype),
        grad_past_output,
        grad_past_input,
    )
    return _needed(gradients, needed)


# --------------------------------------------------------------------------------------------------
# The neuron


@_compile
def _advance(v, r, current, membrane_decay, reset_decay, reset_strength):
    """One step: ``v`` goes from V[t-1] to V[t], ``r`` from R[t] to R[t+1]."""
    one, zero, tiny = v.dtype.type(1), v.dtype.type(0), v.dtype.type(TINY)
    for n in range(len(v)):
        v_next = membrane_decay[n] * v[n] + _read(current[n]) - r[n]
        spike = one if v_next > one else zero
        r_next = reset_decay[n] * r[n] + reset_strength[n] * spike
        v[n] = zero if abs(v_next) < tiny else v_next
        r[n] = zero if abs(r_next) < tiny else r_next


@_compile
def _fire(spikes, v):
    one, zero = v.dtype.type(1), v.dtype.type(0)
    for n in range(len(spikes)):
        spikes[n] = one if v[n] > one else zero


@_compile
def _mix(h):
    """``eager._mix`` in 32 bits."""
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


@_compile
def _drop(values, start, low, high, threshold, scale):
    """Scales ``values`` as ``eager.dropout_scale``; the first is element ``start`` of them all."""
    zero, scale = values.dtype.type(0), values.dtype.type(scale)
    index = np.uint32(start)  # counted by hand in 32 bits: half as wide, twice as fast
    for n in range(len(values)):
        kept = _mix(np.uint32(_mix(np.uint32(index ^ low)) ^ high)) >= threshold
        values[n] *= scale if kept else zero
        index = np.uint32(index + np.uint32(1))


@_compile
def _neuron_forward(first, last, arguments):
    (
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
        number,
        low,
        high,
        threshold,
        scale,
    ) = _arrays(arguments)
    steps, batch, channels = spikes.shape
    for item in range(first, last):
        tile, cut = _tile(item, rows, columns, batch, channels)
        theta, strength, decay = reset_decay[cut], reset_strength[cut], membrane_decay[cut]
        for t in range(steps):
            for b in tile:
                _prefetch(current, t + 1, b, cut)
                v, spike = membrane[b, cut], spikes[t, b, cut]
                _advance(v, reset[b, cut], _row(current, t, b, cut), decay, theta, strength)
                _fire(spike, v)
                if dropping:
                    start = number + (t * batch + b) * channels + cut.start
                    _drop(spike, start, low, high, threshold, scale)


@_compile
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
    _check_dtypes((current,), *coefficients, membrane, reset)
    shape = current.shape
    spikes = torch.empty(*shape, dtype=reset_decay.dtype)
    membrane, reset = _copy(membrane), _copy(reset)
    _share_out(
        _neuron_forward,
        _neuron_forward_parallel,
        shape,
        current,
        *coefficients,
        membrane,
        reset,
        spikes,
        *_dropout_arguments(dropout, seed),
    )
    return spikes, membrane, reset


def _exp2(y):
    """2^y for -126 < y <= 0."""


@overload(_exp2, jit_options={"fastmath": {"contract"}})
def _(y):
    if y != types.float32:
        return lambda y: math.exp(y * math.log(2.0))

    def exp2(y):
        # y = k + r with integer k and |r| <= 1/2: the Taylor series for 2^r, and k added to the
        # exponent. Adding 1.5 * 2^23 rounds y to k and leaves k in the last bits of the sum.
        # Unlike a call of the C library's function, LLVM vectorises this.
        magic = np.float32(12582912.0)
        shifted = np.float32(y + magic)
        r = y - (shifted - magic)
        e = np.float32(1.5403530e-4)
        e = e * r + np.float32(1.3333558e-3)
        e = e * r + np.float32(9.6181291e-3)
        e = e * r + np.float32(5.5504109e-2)
        e = e * r + np.float32(2.4022651e-1)
        e = e * r + np.float32(6.9314718e-1)
        e = np.float32(e * r + np.float32(1.0))
        exponent = shifted.view(np.int32) << np.int32(23)
        return np.int32(e.view(np.int32) + exponent).view(np.float32)

    return exp2


@_compile
def _gaussian(derivative, v, width):
    """``surrogate.Gaussian``, with its tails cut at about ``TINY``."""
    one, zero, lowest = v.dtype.type(1), v.dtype.type(0), v.dtype.type(math.log2(TINY))
    scale = v.dtype.type(1.0 / (math.sqrt(2.0 * math.pi) * width))
    steepness = v.dtype.type(-0.5 / (width * width * math.log(2.0)))
    for n in range(len(derivative)):
        distance = v[n] - one
        y = distance * distance * steepness
        derivative[n] = zero if y < lowest else scale * _exp2(y)  # nan stays nan


@_compile
def _fast_sigmoid(derivative, v, width):
    """``surrogate.FastSigmoid``."""
    one, steepness = v.dtype.type(1), v.dtype.type(1.0 / width)
    for n in range(len(derivative)):
        reach = one + abs(v[n] - one) * steepness
        derivative[n] = one / (reach * reach)


@_compile
def _retreat(
    grad_v,
    grad_r,
    grad_current,
    derivative,
    grad_spike,
    membrane_decay,
    reset_decay,
    reset_strength,
):
    """One step back: ``grad_v`` and ``grad_r`` are what reaches V[t] and R[t+1] from later on."""
    zero, tiny = grad_v.dtype.type(0), grad_v.dtype.type(TINY)
    for n in range(len(grad_v)):
        g = (grad_spike[n] + reset_strength[n] * grad_r[n]) * derivative[n] + grad_v[n]
        g = zero if abs(g) < tiny else g
        r = reset_decay[n] * grad_r[n] - g
        v = membrane_decay[n] * g
        grad_current[n] = g
        grad_r[n] = zero if abs(r) < tiny else r
        grad_v[n] = zero if abs(v) < tiny else v


@_compile
def _neuron_backward(first, last, arguments):
    """Gradients of coefficients that are not needed have length 0 and cost nothing."""
    (
        rows,
        columns,
        grad_spikes,
        current,
        reset_decay,
        reset_strength,
        membrane_decay,
        membrane,
        state,
        work,
        gaussian,
        surrogate_width,
        slopes,
        potentials,
        grad_current,
        rounds,
        grad_theta,
        grad_strength,
        grad_lambda,
        grad_v,
        grad_r,
        resets,
        dropping,
        number,
        low,
        high,
        threshold,
        scale,
    ) = _arrays(arguments)
    steps, batch, channels = grad_current.shape
    for item in range(first, last):
        tile, cut = _tile(item, rows, columns, batch, channels)
        group = tile.start // rows
        theta, strength, decay = reset_decay[cut], reset_strength[cut], membrane_decay[cut]
        grad_spike, derivative = work[0, tile.start, cut], work[1, tile.start, cut]

        # Forwards again, for V, which the way back overwrites with its gradient.
        for t in range(steps):
            for b in tile:
                _prefetch(current, t + 1, b, cut)
                v, r = state[0, b, cut], state[1, b, cut]
                if len(resets):
                    _assign(resets[t, b, cut], r)
                _advance(v, r, _row(current, t, b, cut), decay, theta, strength)
                _assign(potentials[t, b, cut], v)

        for t in range(steps - 1, -1, -1):
            for b in tile:
                _prefetch(grad_spikes, t - 1, b, cut)
                _prefetch(potentials, t - 1, b, cut)
                v = potentials[t, b, cut]
                if len(grad_theta):
                    _correlate(grad_theta[group, cut], grad_r[b, cut], resets[t, b, cut])
                if len(grad_strength):
                    _fire(derivative, v)
                    _correlate(grad_strength[group, cut], grad_r[b, cut], derivative)
                _assign(grad_spike, _row(grad_spikes, t, b, cut))
                if dropping:
                    start = number + (t * batch + b) * channels + cut.start
                    _drop(grad_spike, start, low, high, threshold, scale)
                if len(slopes):
                    _assign(derivative, _row(slopes, t, b, cut))
                elif gaussian:
                    _gaussian(derivative, v, surrogate_width)
                else:
                    _fast_sigmoid(derivative, v, surrogate_width)
                _retreat(
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
                        v_past = potentials[t - 1, b, cut]
                    else:
                        v_past = membrane[min(b, len(membrane) - 1), cut]
                    _correlate(grad_lambda[group, cut], v, v_past)
                if rounds:
                    _write(grad_current[t, b, cut], v)


@_compile
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
    _check_dtypes((current,), *gradients, *coefficients, membrane, reset, slopes)
    shape, dtype = current.shape, reset_decay.dtype
    groups = -(-shape[1] // _tile_shape(shape)[0])
    potentials = torch.empty(shape, dtype=dtype)
    rounds = current.dtype != dtype
    grad_current = torch.empty(shape, dtype=current.dtype) if rounds else potentials
    grad_v, grad_r = _copy(grad_membrane), _copy(grad_reset)
    sums = [
        torch.zeros(groups if need else 0, shape[2], dtype=torch.float64) for need in needed[1:4]
    ]
    resets = torch.empty(shape if needed[1] else (0, 0, 0), dtype=dtype)
    _share_out(
        _neuron_backward,
        _neuron_backward_parallel,
        shape,
        grad_spikes,
        current,
        *coefficients,
        membrane,
        torch.stack([membrane, reset]),
        torch.empty(2, *shape[1:], dtype=dtype),
        surrogate == Gaussian.name,
        width,
        slopes,
        potentials,
        grad_current,
        rounds,
        *sums,
        grad_v,
        grad_r,
        resets,
        *_dropout_arguments(dropout, seed),
    )
    gradients = (grad_current, *(total.sum(0).to(dtype) for total in sums), grad_v, grad_r)
    return _needed(gradients, needed)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _needed(gradients: tuple[Tensor, ...], needed: list[bool]) -> tuple[Tensor, ...]:
    """The gradients, those that are not needed empty."""
    return tuple(
        gradient if need else gradient.new_empty(0)
        for gradient, need in zip(gradients, needed, strict=True)
    )


def _dropout_arguments(dropout: float, seed: Tensor | None) -> tuple:
    """Whether to drop, the first element's number, the halves of the key, the threshold of the

    hash, the survivors' scale.
    """
    key, number = seed.tolist() if dropout else (0, 0)
    return (
        dropout > 0.0,
        number,
        np.uint32(key & 0xFFFFFFFF),
        np.uint32((key >> 32) & 0xFFFFFFFF),
        np.uint32(int(dropout * 2**32)),
        1.0 / (1.0 - dropout),
    )
