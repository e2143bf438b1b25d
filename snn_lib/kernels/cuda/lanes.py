"""What a program computes on: its lanes, where they lie in memory, functions of their values."""

import triton
import triton.language as tl

# Sizes become 64 bits wide, since a sequence may have more than 2^31 elements. To divide a size by
# NEIGHBOURS and multiply it again tells the compiler that it is a multiple.


@triton.jit
def locate_lanes(
    batch, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NEIGHBOURS: tl.constexpr
):
    """This program's batch rows and channels, and which of them exist.

    Then the number of elements of a step and of a row.
    """
    channels = channels.to(tl.int64) // NEIGHBOURS * NEIGHBOURS
    program, across = tl.program_id(0), tl.cdiv(channels, COLUMNS)
    b = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    n = program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return b, n, (b < batch) & (n < channels), batch * channels, channels


@triton.jit
def address_of(sequence, t, b, n, NEIGHBOURS: tl.constexpr):
    """The addresses of the lanes at step ``t``, and the distance to those of the next step."""
    address, stride = sequence
    step = tl.cast(stride[0], tl.int64) // NEIGHBOURS * NEIGHBOURS
    row = tl.cast(stride[1], tl.int64) // NEIGHBOURS * NEIGHBOURS
    return address + t * step + b * row + n * stride[2], step


@triton.jit
def load_row(state, row: tl.constexpr, b, n, lane):
    """One row of a state."""
    address, _ = address_of(state, row, b, n, 1)
    return tl.load(address, lane, 0.0)


@triton.jit
def load_first(
    state, checkpoints, block, row: tl.constexpr, COUNT: tl.constexpr, b, n, lane, place, step
):
    """One of ``COUNT`` rows of the state before the first step of a block."""
    if block == 0:
        value = load_row(state, row, b, n, lane)
    else:
        value = tl.load(checkpoints + ((block - 1) * COUNT + row) * step + place, lane, 0.0)
    return value


@triton.jit
def load_coefficient(coefficients, row: tl.constexpr, n, channels, ROWS: tl.constexpr):
    """One row of coefficients, the same for all batch rows."""
    value = tl.load(coefficients + row * channels + n, n < channels, 0.0)
    return tl.broadcast_to(value, (ROWS, n.shape[1]))


@triton.jit
def store_partial_sums(partial, sums, number: tl.constexpr, batch, channels, n):
    """Sums over the program's batch rows and stores the sums in their place of (..., blocks, N)."""
    block = tl.program_id(0) // tl.cdiv(channels, sums.shape[1])
    row = number * tl.cdiv(batch, sums.shape[0]) + block
    total = tl.sum(sums, 0, keep_dims=True)
    tl.store(partial + row.to(tl.int64) * channels + n, total, n < channels)


# --------------------------------------------------------------------------------------------------
# Dropout, by the counter-based generator of ``eager.dropout_scale``


@triton.jit
def number_elements(seed, index):
    """The seed's key, and the numbers modulo 2^32 of the elements at ``index``."""
    if seed is None:
        return 0, index.to(tl.uint32)
    else:
        return tl.load(seed), (tl.load(seed + 1) + index).to(tl.uint32)


@triton.jit
def factor_of(seed, key, index, dropout, lane, dtype: tl.constexpr):
    """``eager.dropout_scale``, whose constants are computed in double precision."""
    if seed is None:
        return tl.full(lane.shape, 1.0, dtype)
    else:
        dropped_below = tl.full((), dropout * 2.0**32, tl.uint32)
        scale = tl.full((), 1.0 / (1.0 - dropout), dtype)
        mixed = _mix(_mix(index ^ key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32))
        return tl.where(mixed >= dropped_below, scale, 0.0)


@triton.jit
def _mix(h):
    """32-bit finaliser of MurmurHash3 (Appleby, public domain)."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


# --------------------------------------------------------------------------------------------------
# Functions that Triton does not have, or that its interpreter does not have


@triton.jit
def rounded(a):
    """A number rounded to bfloat16, as a float to its upper 16 bits, on a tie to the even one.

    Triton's interpreter cuts the lower ones off where it converts.
    """
    bits = a.to(tl.float32).to(tl.uint32, bitcast=True)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(a == a, upper.to(tl.float32, bitcast=True).to(a.dtype), a)


@triton.jit
def tanh(a):
    """Hyperbolic tangent: Lambert's continued fraction near zero, by the exponential elsewhere."""
    square, below = a * a, tl.full(a.shape, 19.0, a.dtype)
    for k in tl.static_range(9):
        below = (17.0 - 2.0 * k) + square / below
    e = tl.exp(-2.0 * tl.abs(a))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(a) < 0.5, a / below, tl.where(a < 0.0, -far, far))
