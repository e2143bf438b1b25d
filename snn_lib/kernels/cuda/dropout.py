"""Dropout of spikes, by the counter-based generator of ``eager.dropout_scale``."""

import triton
import triton.language as tl


@triton.jit
def number_elements(seed, index, DROPS: tl.constexpr):
    """The seed's key, and the numbers modulo 2^32 of the elements at ``index``."""
    if DROPS:
        return tl.load(seed), (tl.load(seed + 1) + index).to(tl.uint32)
    else:
        return 0, index.to(tl.uint32)


@triton.jit
def drop(value, index, key, dropout, DROPS: tl.constexpr):
    """``value`` times ``eager.dropout_scale``, whose constants are computed in double precision."""
    if DROPS:
        dropped_below = tl.full((), dropout * 2.0**32, tl.uint32)
        scale = tl.full((), 1.0 / (1.0 - dropout), value.dtype)
        mixed = _mix(_mix(index ^ key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32))
        return tl.where(mixed >= dropped_below, value * scale, 0.0)
    else:
        return value


@triton.jit
def _mix(h):
    """32-bit finaliser of MurmurHash3 (Appleby, public domain)."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)
