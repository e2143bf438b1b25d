"""What a program computes on: its lanes, where they lie in memory, and the values they carry."""

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
def load_state(state, b, n, lane):
    """What the lanes have of a neuron's state, which has no time."""
    address, stride = state
    return tl.load(address + b * stride[0] + n * stride[1], lane, 0.0)


@triton.jit
def store_partial_sums(partial, sums, batch, channels, n, COUNT: tl.constexpr):
    """Sums over the program's batch rows and stores the sums in its place of (COUNT, blocks, N)."""
    for k in tl.static_range(COUNT):
        block = tl.program_id(0) // tl.cdiv(channels, sums[k].shape[1])
        row = k * tl.cdiv(batch, sums[k].shape[0]) + block
        total = tl.sum(sums[k], 0, keep_dims=True)
        tl.store(partial + row.to(tl.int64) * channels + n, total, n < channels)


# Triton indexes tuples while it compiles, so the values that they hold live in registers.


@triton.jit
def load_each(pointer, stride, mask, COUNT: tl.constexpr):
    """COUNT values, each ``stride`` elements from the one before."""
    values = ()
    for k in tl.static_range(COUNT):
        values += (tl.load(pointer + k * stride, mask, 0.0),)
    return values


@triton.jit
def repeat(value, COUNT: tl.constexpr):
    """``value`` COUNT times."""
    values = ()
    for _ in tl.static_range(COUNT):
        values += (value,)
    return values


@triton.jit
def push(newest, values, COUNT: tl.constexpr):
    """``newest`` followed by the first of ``values``, COUNT in all."""
    pushed = ()
    for k in tl.static_range(COUNT):
        pushed += (newest if k == 0 else values[k - 1],)
    return pushed


@triton.jit
def pop(values, fill, COUNT: tl.constexpr):
    """``values`` without the first, followed by ``fill``, COUNT in all."""
    rest = ()
    for k in tl.static_range(1, COUNT + 1):
        rest += (values[k] if k < COUNT else fill,)
    return rest


@triton.jit
def add_products(total, weights, i: tl.constexpr, values, j: tl.constexpr, COUNT: tl.constexpr):
    """``total`` plus weights[i] values[j] plus weights[i+1] values[j+1] ..., COUNT products."""
    for k in tl.static_range(COUNT):
        total = total + weights[i + k] * values[j + k]
    return total


@triton.jit
def add_scaled(sums, values, j: tl.constexpr, scale, COUNT: tl.constexpr):
    """Adds ``scale`` times values[j] to the first sum, times values[j+1] to the second ..."""
    added = ()
    for k in tl.static_range(COUNT):
        added += (tl.fma(values[j + k].to(tl.float64), scale.to(tl.float64), sums[k]),)
    return added
