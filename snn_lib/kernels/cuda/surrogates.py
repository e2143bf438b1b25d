"""The surrogate gradients of ``snn_lib.surrogate``, compiled."""

import math

import triton
import triton.language as tl

from snn_lib import surrogate

THRESHOLD = tl.constexpr(surrogate.THRESHOLD)
SQRT_2_PI = tl.constexpr(math.sqrt(2.0 * math.pi))


@triton.jit
def derivative_at(membrane, width, SURROGATE: tl.constexpr):
    """The derivative of the surrogate with this name and width.

    Its constants are computed in double precision and then rounded, as PyTorch does.
    """
    distance = membrane - THRESHOLD
    if SURROGATE == "gaussian":
        height = tl.full((), 1.0 / (SQRT_2_PI * width), membrane.dtype)
        steepness = tl.full((), -0.5 / (width * width), membrane.dtype)
        return height * tl.exp(distance * distance * steepness)
    else:
        tl.static_assert(SURROGATE == "fast_sigmoid")
        reach = 1.0 + tl.abs(distance) * tl.full((), 1.0 / width, membrane.dtype)
        return 1.0 / (reach * reach)
