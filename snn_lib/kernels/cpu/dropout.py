"""Dropout of spikes, by the counter-based generator of ``eager.dropout_scale``."""

import numpy as np
from torch import Tensor

from snn_lib.kernels.cpu.compiling import jit

NO_DROPOUT = False, 0, np.uint32(0), np.uint32(0), np.uint32(0), 1.0


def dropout_arguments(dropout: float, seed: Tensor | None) -> tuple:
    """Whether to drop at all, and what :func:`drop` needs.

    That is the number of the first element, the two halves of the key, the threshold of the hash,
    and the scale of what is kept.
    """
    if not dropout:
        return NO_DROPOUT
    key, number = seed.tolist()
    return (
        True,
        number,
        np.uint32(key & 0xFFFFFFFF),
        np.uint32((key >> 32) & 0xFFFFFFFF),
        np.uint32(int(dropout * 2**32)),
        1.0 / (1.0 - dropout),
    )


@jit
def drop(values, start, dropout):
    """Drops or scales each of ``values``; ``start`` elements come before."""
    _, number, low, high, threshold, scale = dropout
    zero, kept_scale = values.dtype.type(0), values.dtype.type(scale)
    index = np.uint32(number + start)  # counted in 32 bits: half as wide, twice as fast
    for n in range(len(values)):
        kept = _mix(np.uint32(_mix(np.uint32(index ^ low)) ^ high)) >= threshold
        values[n] *= kept_scale if kept else zero
        index = np.uint32(index + np.uint32(1))


@jit
def _mix(h):
    """``eager._mix`` in 32 bits."""
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))
