"""Runs a program's kernels on a GPU."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from snn_lib.kernels.adjoint import Adjoint, Way
from snn_lib.kernels.cuda.launching import BLOCK, launch, tile_shape, with_strides
from snn_lib.kernels.cuda.source import backward_source, forward_source
from snn_lib.kernels.disk import read, write
from snn_lib.kernels.program import program, remember


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
    steps, batch, channels = x.shape
    blocks = blocks_of(steps) if keep else 0
    output = torch.empty(x.shape, dtype=dtype, device=x.device)
    last = coefficients.new_empty(len(program(key).states), batch, channels)
    # Two more, as the operator promises.
    checkpoints = coefficients.new_empty(blocks * last.numel() + 2)
    launch(
        _forward(key),
        tile_shape(x, output),
        x.shape,
        with_strides(x),
        coefficients.contiguous(),
        _or_zeros(state, last),
        None if lengths is None else lengths.contiguous(),
        seed.contiguous() if dropout else None,
        output,
        last,
        checkpoints,
        blocks > 0,
        dropout,
    )
    return output, last, checkpoints


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
    kernel, rows = _backward(key, Way(surrogate, need_x, tuple(needed)))
    steps, batch, channels = x.shape
    tile = tile_shape(grad_output, x)
    grad_x = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    grad_state = coefficients.new_empty(len(program(key).states), batch, channels)
    groups = triton.cdiv(batch, tile["ROWS"])
    sums = coefficients.new_empty(sum(needed), groups, channels, dtype=torch.float64)
    room = min(steps, BLOCK), rows, batch, channels
    launch(
        kernel,
        tile,
        x.shape,
        with_strides(x),
        with_strides(grad_output),
        _or_zeros(grad_last, grad_state),
        coefficients.contiguous(),
        _or_zeros(state, grad_state),
        checkpoints,
        None if lengths is None else lengths.contiguous(),
        seed.contiguous() if dropout else None,
        coefficients.new_empty(room),  # for the states that are computed again
        grad_x,
        sums,
        grad_state,
        *map(float, numbers),
        dropout,
    )
    totals, zero = iter(sums.sum(1).to(coefficients.dtype)), coefficients.new_zeros(channels)
    grad_coefficients = [next(totals) if need else zero for need in needed]
    return grad_x, torch.stack(grad_coefficients), grad_state


def blocks_of(steps: int) -> int:
    """Room for the first states of all blocks of steps but the first, for a backward pass."""
    return steps // BLOCK


def _or_zeros(rows: Tensor | None, like: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Rows of states, with their strides; zeros if there are none."""
    return with_strides(like.new_zeros(()).expand(like.shape) if rows is None else rows)


@remember
def _forward(key: str) -> Callable:
    return _kernel(forward_source(program(key)))


@remember
def _backward(key: str, way: Way) -> tuple[Callable, int]:
    """The kernel, and how many rows of states it computes again."""
    made = program(key)
    return _kernel(backward_source(made, way)), len(Adjoint(made, way).states)


def _kernel(source: str) -> Callable:
    """The function of a source, which has to lie in a file for Triton to find its lines."""
    content = source.encode()
    name = hashlib.sha256(content).hexdigest()[:32] + ".py"
    path: Path | None = next((path for path, found in read(name) if found == content), None)
    path = path or write(name, content)
    if path is None:
        raise OSError("no folder for kernels can be written: set XDG_CACHE_HOME to one that can")
    names: dict[str, Any] = {"__name__": f"{__package__}.{path.stem}"}
    exec(compile(source, path, "exec"), names)  # not imported: only what was written here may run
    return names["kernel"]
