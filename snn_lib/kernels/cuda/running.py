"""Runs a program's kernels on a GPU."""

import hashlib
from collections.abc import Callable
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from snn_lib.kernels.cuda.launching import launch, tile_shape, with_strides
from snn_lib.kernels.cuda.source import backward_source, forward_source
from snn_lib.kernels.disk import read, write
from snn_lib.kernels.inputs import BLOCK, Inputs
from snn_lib.kernels.program import Adjoint, program


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the last state, and the first states of all blocks but the first."""
    results = inputs.new_results()
    tile, settings = tile_shape(inputs.x, results[0]), (inputs.blocks > 0, inputs.dropout)
    launch(_forward(inputs.key), tile, inputs.x.shape, *_given(inputs), *results, *settings)
    return results


def backward(
    inputs: Inputs, grad_output: Tensor, grad_last: Tensor, checkpoints: Tensor, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the coefficients and of the state."""
    adjoint, tile = inputs.adjoint(need_x), tile_shape(grad_output, inputs.x)
    grad_x, grad_coefficients, grad_state = inputs.new_gradients(need_x)
    steps, batch, channels = inputs.x.shape
    groups, own = triton.cdiv(batch, tile["ROWS"]), inputs.coefficients
    sums = own.new_empty(len(adjoint.sums), groups, channels, dtype=torch.float64)
    launch(
        _backward(adjoint),
        tile,
        inputs.x.shape,
        *_given(inputs),
        with_strides(grad_output),
        with_strides(grad_last),
        checkpoints,
        own.new_empty(min(steps, BLOCK), len(adjoint.states), batch, channels),
        grad_x,
        sums,
        grad_state,
        *map(float, inputs.numbers),
        inputs.dropout,
    )
    for row, total in zip(compress(grad_coefficients, inputs.needed), sums.sum(1), strict=True):
        row.copy_(total)
    return grad_x, grad_coefficients, grad_state


def _given(inputs: Inputs) -> tuple:
    """What both kernels are told first."""
    return (
        with_strides(inputs.x),
        inputs.coefficients.contiguous(),
        with_strides(inputs.first),
        None if inputs.lengths is None else inputs.lengths.contiguous(),
        inputs.seed.contiguous() if inputs.dropout else None,
    )


@cache
def _forward(key: str) -> Callable:
    return _kernel(forward_source(program(key)))


@cache
def _backward(adjoint: Adjoint) -> Callable:
    return _kernel(backward_source(adjoint))


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
