"""The surrogate gradients of ``snn_lib.surrogate``, compiled."""

import math

import numpy as np
from numba import types
from numba.extending import overload

from snn_lib.kernels.cpu.compiling import jit
from snn_lib.kernels.cpu.rows import TINY


@jit
def gaussian(derivative, v, width):
    """``surrogate.Gaussian`` at the membrane potentials ``v``, zero where it is below ``TINY``."""
    one, zero, lowest = v.dtype.type(1), v.dtype.type(0), v.dtype.type(math.log2(TINY))
    scale = v.dtype.type(1.0 / (math.sqrt(2.0 * math.pi) * width))
    steepness = v.dtype.type(-0.5 / (width * width * math.log(2.0)))
    for n in range(len(derivative)):
        distance = v[n] - one
        y = distance * distance * steepness
        derivative[n] = zero if y < lowest else scale * _exp2(y)  # nan stays nan


@jit
def fast_sigmoid(derivative, v, width):
    """``surrogate.FastSigmoid`` at the membrane potentials ``v``."""
    one, steepness = v.dtype.type(1), v.dtype.type(1.0 / width)
    for n in range(len(derivative)):
        reach = one + abs(v[n] - one) * steepness
        derivative[n] = one / (reach * reach)


def _exp2(y):
    """2^y for -126 < y <= 0."""


@overload(_exp2, jit_options={"fastmath": {"contract"}})
def _(y):
    if y != types.float32:
        return lambda y: math.exp(y * math.log(2.0))

    def exp2(y):
        # Split y = k + r with an integer k and |r| <= 1/2. A Taylor series gives 2^r, and k is
        # added to its exponent. Adding 1.5 * 2^23 rounds y to k and leaves k in the last bits of
        # the sum. LLVM vectorises this, but not a call of the C library's function.
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
