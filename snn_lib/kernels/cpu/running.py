"""Runs a program's kernels on the CPU, on tiles that threads share.

A tile is a few batch rows by some channels. A kernel runs all time steps of one tile before it
turns to the next: what the recurrence carries on stays in the cache, and every sequence is read or
written once. The cut depends on the shape alone, so results do not depend on the number of threads.
"""

from collections.abc import Sequence
from functools import cache
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.library import Kernel, kernel
from snn_lib.kernels.cpu.source import (
    BACKWARD_ARGUMENTS,
    FORWARD_ARGUMENTS,
    Variant,
    backward_source,
    forward_source,
)
from snn_lib.kernels.inputs import BLOCK, Inputs
from snn_lib.kernels.program import Adjoint

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
TILE = 512  # elements of a tile at one time step, whose state stays in the innermost cache
TILE_CHANNELS = 1024  # of a tile that is a single row
GROUPS = 16  # a batch with this many rows is cut into at least as many groups of rows
NO_DROPOUT = {"key_low": 0, "key_high": 0, "first": 0, "below": 0, "scale": 1.0}


class Tiles(NamedTuple):
    """The tiles of sequences of one shape.

    Attributes:
        rows, columns: the batch rows and the channels of a tile.
        groups: the number of groups of batch rows.
        items: the number of tiles.
        threads: the number of threads that share them.
    """

    rows: int
    columns: int
    groups: int
    items: int
    threads: int


def tiles_of(shape: torch.Size) -> Tiles:
    """The tiles of sequences ``(T, B, N)``."""
    _, batch, channels = shape
    columns = max(1, min(channels, TILE_CHANNELS))
    rows = max(1, min(batch // GROUPS, TILE // columns))
    groups = -(-batch // rows)
    items = groups * -(-channels // columns)
    return Tiles(rows, columns, groups, items, openmp.threads_for(items, shape.numel()))


@cache
def _forward(variant: Variant) -> Kernel:
    return kernel(forward_source(variant))


@cache
def _backward(variant: Variant, adjoint: Adjoint) -> Kernel:
    return kernel(backward_source(variant, adjoint))


def kernel_of_steps(key: str, dtype: str) -> Kernel:
    """The kernel of a program for streams, in which everything has one dtype."""
    return _forward(Variant(key, dtype, dtype, dtype, drops=False, ends=False))


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the last state, and the first states of all blocks but the first."""
    output, state, checkpoints = inputs.new_results()
    state.copy_(inputs.first)
    ends = state if inputs.lengths is None else state.clone()
    results = {"state": state, "ends": ends, "checkpoints": checkpoints, "output": output}
    made = _forward(_variant(inputs, output))
    _run(made, FORWARD_ARGUMENTS, inputs, {**results, "blocks": inputs.blocks})
    return output, ends, checkpoints


def backward(
    inputs: Inputs, grad_output: Tensor, grad_last: Tensor, checkpoints: Tensor, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the coefficients and of the state."""
    adjoint, tiles = inputs.adjoint(need_x), tiles_of(inputs.x.shape)
    grad_x, grad_coefficients, grad_state = inputs.new_gradients(need_x)
    grad_last = grad_last.contiguous()
    # Without lengths, the gradient of the last state is where the backward pass begins.
    grad_state.copy_(grad_last) if inputs.lengths is None else grad_state.zero_()
    count, _, channels = grad_last.shape
    sums = torch.zeros(tiles.groups, len(adjoint.sums), channels, dtype=torch.float64)
    room = tiles.threads, BLOCK + 1, count + 1, tiles.rows, tiles.columns
    given = {
        "state": inputs.first.contiguous(),
        "checkpoints": checkpoints,
        **_sequence("grad_output", grad_output),
        "grad_last": grad_last,
        "grad_x": grad_x,
        "adjoint": grad_state,
        "sums": sums,
        "again": inputs.coefficients.new_empty(room),
    }
    made = _backward(_variant(inputs, grad_output), adjoint)
    _run(made, BACKWARD_ARGUMENTS, inputs, given, list(map(float, inputs.numbers)))
    rows = compress(grad_coefficients, inputs.needed)
    for row, total in zip(rows, sums.sum(0), strict=True):
        row.copy_(total)
    return grad_x, grad_coefficients, grad_state


def _variant(inputs: Inputs, output: Tensor) -> Variant:
    dtypes = (NAMES[tensor.dtype] for tensor in (inputs.x, output, inputs.coefficients))
    return Variant(inputs.key, *dtypes, inputs.dropout > 0, inputs.lengths is not None)


def _sequence(name: str, sequence: Tensor) -> dict[str, object]:
    """A sequence and its strides. The channels of a row have to lie side by side."""
    side_by_side = sequence.stride(2) == 1 or sequence.shape[2] == 1
    sequence = sequence if side_by_side else sequence.contiguous()
    step, row, _ = sequence.stride()
    return {name: sequence, f"{name}_step": step, f"{name}_batch": row}


def _run(
    made: Kernel, names: list[str], inputs: Inputs, given: dict, numbers: Sequence[float] = ()
) -> None:
    """Hands a kernel its arguments in their order."""
    x, lengths, tiles = inputs.x, inputs.lengths, tiles_of(inputs.x.shape)
    given |= {
        **dict(zip(("steps", "batch", "channels"), x.shape, strict=True)),
        **{"rows": tiles.rows, "columns": tiles.columns},
        **_sequence("x", x),
        "coefficients": inputs.coefficients.contiguous(),
        "lengths": 0 if lengths is None else lengths.clamp(0, len(x)),
        **NO_DROPOUT,
    }
    if inputs.dropout:
        key, first = inputs.seed.tolist()
        given |= {"key_low": key & 0xFFFFFFFF, "key_high": (key >> 32) & 0xFFFFFFFF}
        given |= {"first": first, "below": int(inputs.dropout * 2**32)}
        given["scale"] = 1.0 / (1.0 - inputs.dropout)
    arguments = [*(given[name] for name in names), *numbers]
    openmp.run(made, tiles.threads, tiles.items, arguments)
