"""Sequences are cut into tiles, and threads share the tiles.

A tile is a few batch rows by some channels. A kernel runs all time steps of one tile before it
turns to the next: what the recurrence carries on stays in the cache, and every sequence is read or
written once. The cut depends on the shape alone, so results do not depend on the number of threads.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from snn_lib.kernels import COMPUTE_DTYPES
from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.compiling import jit

# The number that tells compiled code a tensor's dtype. NumPy has no bfloat16, so compiled code sees
# its bits as uint16, which ``rows.read`` and ``rows.write`` convert.
NUMBERS = {
    torch.float32: np.float32(0),
    torch.float64: np.float64(0),
    torch.bfloat16: np.uint16(0),
}
TILE = 512  # elements of a tile at one time step, whose state stays in the innermost cache
TILE_CHANNELS = 1024
GROUPS = 16  # a batch with this many rows is cut into at least as many groups of rows
SMALL = 16384  # a sequence of at most so many elements is computed by the calling thread alone


def tile_shape(shape: torch.Size) -> tuple[int, int]:
    """Batch rows and channels of a tile of sequences ``(T, B, N)``."""
    columns = max(1, min(shape[2], TILE_CHANNELS))
    return max(1, min(shape[1] // GROUPS, TILE // columns)), columns


def groups(shape: torch.Size) -> int:
    """The number of groups of batch rows that tiles cut a batch into."""
    rows, _ = tile_shape(shape)
    return -(-shape[1] // rows)


@jit
def locate(item, rows, columns, batch, channels):
    """Batch rows and channels of tile number ``item``."""
    across = (channels + columns - 1) // columns
    b, c = item // across * rows, item % across * columns
    return range(b, min(b + rows, batch)), slice(c, min(c + columns, channels))


def check_dtypes(sequences: tuple[Tensor, ...], *others: Tensor) -> None:
    """Raises a TypeError for dtypes that a kernel would misread.

    Coefficients and states are in the dtype that computes, float32 or float64; ``sequences`` may
    also be in bfloat16.
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


def share_out(kernel: Callable, parallel: Callable, shape: torch.Size, *given: tuple) -> None:
    """Runs ``kernel`` on all tiles of sequences of this shape, see ``openmp.run``.

    The kernel gets the rows and columns of a tile, then the groups of arguments that are given. A
    tensor that repeats itself in time or batch is handed over once, with a length of 1 there, see
    :func:`dense`. Coefficients must be contiguous, since their length tells the order.
    """
    items, threads = _share(shape)
    kept = [[dense(one) if isinstance(one, Tensor) else one for one in group] for group in given]
    arguments = [tuple(map(_argument, group)) for group in kept]
    openmp.run(kernel, parallel, threads, items, (tile_shape(shape), *arguments))


def tiles_of_all_steps(shape: torch.Size) -> tuple[int, int, int, int]:
    """The size of memory in which every thread holds a value for all steps of a tile."""
    return _share(shape)[1], shape[0], *tile_shape(shape)


def _share(shape: torch.Size) -> tuple[int, int]:
    """The number of tiles of sequences of this shape, and of the threads that share them."""
    items = groups(shape) * -(-shape[2] // tile_shape(shape)[1])
    return items, 1 if shape.numel() <= SMALL else max(1, min(torch.get_num_threads(), items))


def _argument(one: object) -> object:
    """A tensor as ``llvm.arrays`` takes it, and anything else as it is."""
    if isinstance(one, Tensor):
        return NUMBERS[one.dtype], one.data_ptr(), *one.shape
    return one


def dense(tensor: Tensor) -> Tensor:
    """A contiguous tensor with the same elements; a dimension that repeats has length 1.

    That is every expanded dimension but the last.
    """
    if not tensor.is_cpu:
        raise TypeError(f"the CPU kernels got a tensor on {tensor.device}")
    if not tensor.is_contiguous():
        for dim in range(tensor.dim() - 1):
            if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
        tensor = tensor.contiguous()
    return tensor
