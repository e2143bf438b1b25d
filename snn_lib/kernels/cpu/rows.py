"""Arithmetic on one row of a tile: the channels at one time step and one batch row.

Channels lie side by side in memory, so these loops are the innermost ones and LLVM vectorises them.

What a recurrence carries on is set to zero below ``TINY``. A decaying trace would otherwise end in
denormal numbers, with which a CPU computes ten times slower.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload

from snn_lib.kernels.cpu.compiling import jit
from snn_lib.kernels.cpu.llvm import prefetch_line

TINY = 1e-30


@njit(inline="always")
def row(sequence, t, b, channels):
    """Row (t, b) of a sequence; a sequence of length 1 in time or batch is the same throughout."""
    return sequence[min(t, sequence.shape[0] - 1), min(b, sequence.shape[1] - 1), channels]


@njit(inline="always")
def row_or_past(sequence, past, order, t, b, channels):
    """Row (t, b) of a sequence that ``past`` precedes, from t = -order on."""
    # A single return: Numba inlines no function with two.
    found = row(sequence, t, b, channels) if t >= 0 else row(past, order + t, b, channels)
    return found


@jit
def prefetch(sequence, t, b, channels):
    """Loads a row ahead, for the next time step: the CPU does not guess jumps of this size."""
    if 0 <= t < sequence.shape[0]:
        ahead = row(sequence, t, b, channels)
        for n in range(0, len(ahead), 64 // ahead.itemsize):
            prefetch_line(ahead, n)


def read(value):
    """An element of a sequence as a number: bfloat16 is the upper half of a float32's bits."""


@overload(read)
def _(value):
    if value == types.uint16:

        def read_bfloat16(value):
            bits = np.uint32(np.uint32(value) << np.uint32(16))
            return bits.view(np.float32)

        return read_bfloat16
    return lambda value: value


def write(out, x):
    """Stores numbers in a row, rounded to its dtype: to the nearest, on a tie to the even one."""


@overload(write)
def _(out, x):
    if out.dtype != types.uint16:
        return lambda out, x: assign(out, x)

    def write_bfloat16(out, x):
        half, one, nan = np.uint32(0x7FFF), np.uint32(1), np.uint16(0x7FC0)
        for n in range(len(out)):
            value = np.float32(x[n])
            bits = value.view(np.uint32)
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & one)
            rounded = np.uint16(np.uint32(bits + half + odd) >> np.uint32(16))
            out[n] = rounded if value == value else nan

    return write_bfloat16


@jit
def assign(out, x):
    """out = x."""
    for n in range(len(out)):
        out[n] = read(x[n])


@jit
def add(out, x):
    """out += x."""
    for n in range(len(out)):
        out[n] += x[n]


@jit
def multiply(out, a, x):
    """out = a x."""
    for n in range(len(out)):
        out[n] = a[n] * x[n]


@jit
def multiply_add(out, a, x):
    """out += a x."""
    for n in range(len(out)):
        out[n] += a[n] * x[n]


@jit
def correlate(total, a, x):
    """total += a x, in double precision: it sums over many steps, and products may be small."""
    for n in range(len(total)):
        total[n] += np.float64(a[n]) * np.float64(read(x[n]))


@jit
def flush(out):
    """Sets to zero what is smaller than ``TINY``."""
    tiny, zero = out.dtype.type(TINY), out.dtype.type(0)
    for n in range(len(out)):
        out[n] = zero if abs(out[n]) < tiny else out[n]
