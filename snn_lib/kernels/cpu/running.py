"""Runs a program's kernels on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from snn_lib.kernels.adjoint import Way
from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.library import Kernel, kernel
from snn_lib.kernels.cpu.source import (
    BACKWARD,
    BLOCK,
    FORWARD,
    Task,
    backward_source,
    forward_source,
)
from snn_lib.kernels.cpu.tiles import tiles_of
from snn_lib.kernels.program import program, remember

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
NO_DROPOUT = {"key_low": 0, "key_high": 0, "first": 0, "below": 0, "scale": 1.0}


@remember
def _forward(task: Task) -> Kernel:
    return kernel(forward_source(task))


@remember
def _backward(task: Task, way: Way) -> Kernel:
    return kernel(backward_source(task, way))


def kernel_of_steps(key: str, dtype: str) -> Kernel:
    """The kernel of a program for streams, in which everything has one dtype."""
    return _forward(Task(key, dtype, dtype, dtype, drops=False, ends=False))


def forward(
    key: str,
    x: Tensor,
    coefficients: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the last state, and the states at the beginning of all blocks but the first.

    See ``plain.run``; ``keep`` says whether a backward pass will follow, which needs the last.
    """
    steps, batch, channels = shape = x.shape
    x, coefficients = _in_rows(x), coefficients.contiguous()
    count, own = len(program(key).states), coefficients.dtype
    if state is None:
        state = coefficients.new_zeros(count, batch, channels)
    else:
        state = state.clone(memory_format=torch.contiguous_format)
    ends = state if lengths is None else state.clone()
    blocks = blocks_of(steps) if keep else 0
    # two more, since PyTorch asks of a size that it does not know whether it is below 2
    checkpoints = coefficients.new_empty(blocks * count * batch * channels + 2)
    output = torch.empty(shape, dtype=dtype)
    given = {
        **_inputs(x, coefficients, lengths, dropout, seed),
        "state": state,
        "ends": ends,
        "checkpoints": checkpoints,
        "blocks": blocks,
        "output": output,
    }
    task = Task(key, NAMES[x.dtype], NAMES[dtype], NAMES[own], dropout > 0, lengths is not None)
    _run(_forward(task), FORWARD, given, shape)
    return output, ends, checkpoints


def backward(
    key: str,
    grad_output: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    coefficients: Tensor,
    state: Tensor | None,
    checkpoints: Tensor,
    lengths: Tensor | None,
    surrogate: str,
    numbers: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    need_x: bool,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the coefficients and of the state; x's is empty if not needed.

    Those of coefficients that are not ``needed`` are zero.
    """
    _, batch, channels = shape = x.shape
    x, coefficients, grad_output = _in_rows(x), coefficients.contiguous(), _in_rows(grad_output)
    count, own = len(program(key).states), coefficients.dtype
    rows = count, batch, channels
    state = coefficients.new_zeros(rows) if state is None else state.contiguous()
    if grad_last is None:
        grad_last = coefficients.new_zeros(rows)
    else:
        grad_last = grad_last.clone(memory_format=torch.contiguous_format)
    # Without lengths, the gradient of the last state is where the way back begins.
    adjoint = grad_last if lengths is None else torch.zeros_like(grad_last)
    tiles = tiles_of(shape)
    grad_x = torch.empty(shape if need_x else 0, dtype=x.dtype)
    sums = torch.zeros(tiles.groups, sum(needed), channels, dtype=torch.float64)
    room = tiles.threads, BLOCK + 1, count + 1, tiles.rows, tiles.columns
    given = {
        **_inputs(x, coefficients, lengths, dropout, seed),
        "state": state,
        "checkpoints": checkpoints,
        **_sequence("grad_output", grad_output),
        "grad_last": grad_last,
        "grad_x": grad_x,
        "adjoint": adjoint,
        "sums": sums,
        "again": coefficients.new_empty(room),
    }
    dtypes = NAMES[x.dtype], NAMES[grad_output.dtype], NAMES[own]
    task = Task(key, *dtypes, dropout > 0, lengths is not None)
    made = _backward(task, Way(surrogate, need_x, tuple(needed)))
    _run(made, BACKWARD, given, shape, list(map(float, numbers)))
    grad_coefficients = torch.zeros_like(coefficients)
    grad_coefficients[list(needed)] = sums.sum(0).to(own)
    return grad_x, grad_coefficients, adjoint


def blocks_of(steps: int) -> int:
    """Room for the first states of all blocks of steps but the first, for a backward pass."""
    return steps // BLOCK


def _inputs(
    x: Tensor, coefficients: Tensor, lengths: Tensor | None, dropout: float, seed: Tensor | None
) -> dict[str, object]:
    """What both kernels read."""
    found = {
        **_sequence("x", x),
        "coefficients": coefficients,
        "lengths": 0 if lengths is None else lengths.clamp(0, len(x)),
        **NO_DROPOUT,
    }
    if dropout:
        key, first = seed.tolist()
        halves = {"key_low": key & 0xFFFFFFFF, "key_high": (key >> 32) & 0xFFFFFFFF}
        found |= {**halves, "first": first, "below": int(dropout * 2**32)}
        found["scale"] = 1.0 / (1.0 - dropout)
    return found


def _sequence(name: str, sequence: Tensor) -> dict[str, object]:
    """A sequence and its strides."""
    step, row, _ = sequence.stride()
    return {name: sequence, f"{name}_step": step, f"{name}_batch": row}


def _in_rows(sequence: Tensor) -> Tensor:
    """The sequence with the channels of a row side by side; it may repeat itself in time."""
    side_by_side = sequence.stride(2) == 1 or sequence.shape[2] == 1
    return sequence if side_by_side else sequence.contiguous()


def _run(
    made: Kernel, names: list[str], given: dict, shape: torch.Size, numbers: Sequence[float] = ()
) -> None:
    """Hands a kernel its arguments in their order."""
    tiles = tiles_of(shape)
    sizes = dict(zip(("steps", "batch", "channels"), shape, strict=True))
    given = {**given, **sizes, "rows": tiles.rows, "columns": tiles.columns}
    values = [given[name] for name in names]
    words = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
    openmp.run(made, tiles.threads, tiles.items, [*words, *numbers])
