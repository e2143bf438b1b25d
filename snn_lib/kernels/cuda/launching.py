"""How kernels are launched: how many programs there are, and what each of them is told."""

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP = 32  # threads, and one warp is a program
# Loading ahead of the recurrence hides the latency of memory: UNROLL steps are loaded at once while
# the UNROLL steps before them are computed. No loop may therefore read what it writes itself.
# Cells that hand inputs on for more than UNROLL steps do without, since Triton does not load ahead
# where a value is handed on over several passes of the loop.
UNROLL, STAGES = tl.constexpr(4), tl.constexpr(2)

# Without specialisation: a kernel compiled anew for sizes of 1 or of multiples of 16 gains nothing.
jit = triton.jit(do_not_specialize=["steps", "batch", "channels"])


def tile_shape(*sequences: Tensor) -> dict[str, int]:
    """Batch rows and channels of a program, and how many neighbouring channels a thread has.

    A warp reads 32 floats of a row at once. These are 128 bytes, which is all that coalescing
    gives. Programs of more warps would only be harder to share out: 64 x 300 lanes are 640 programs
    of one warp, at most 5 of them on each of 132 multiprocessors (4.8 on average), but 160 programs
    of four warps, at most 2 (1.2).

    To load ahead is to copy at least 4 bytes, which are two neighbours in 16 bits. A thread reads
    the two as one if the number of channels and all strides are even, so that no row begins between
    two neighbours; otherwise a sequence in 16 bits is read step by step. (It must also begin on a
    multiple of 16 bytes, which Triton looks at itself.)
    """
    _, _, channels = sequences[0].shape
    sizes = [channels, *(size for sequence in sequences for size in sequence.stride()[:2])]
    halves = any(sequence.itemsize == 2 for sequence in sequences)
    neighbours = 2 if halves and all(size % 2 == 0 for size in sizes) else 1
    columns = min(triton.next_power_of_2(max(channels, 1)), WARP * neighbours)
    return {"ROWS": WARP * neighbours // columns, "COLUMNS": columns, "NEIGHBOURS": neighbours}


def launch(kernel, tile: dict[str, int], shape: torch.Size, *arguments) -> None:
    """Runs a kernel, with enough programs to cover all lanes of sequences of this shape."""
    steps, batch, channels = shape
    programs = triton.cdiv(batch, tile["ROWS"]) * triton.cdiv(channels, tile["COLUMNS"])
    (tensor, _), *_ = arguments
    with torch.cuda.device_of(tensor):
        kernel[(programs,)](
            *arguments, steps, batch, channels, **tile, num_warps=1, enable_fp_fusion=False
        )


def with_strides(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor as a kernel takes it if it need not be contiguous."""
    return tensor, tensor.stride()
