"""Convolutions of spikes on the CPU: each spike adds its patch of the weights.

A spike of channel k at (y, x) adds its patch to a grid, a little larger than the maps, of which the
output is a part. For the gradient of the weights, grad_output is laid onto the same part of a grid:

    grid[y + dy, x + dx, n] += spikes[y, x, k] weights[k, dy, dx, n]
    gradient[k, dy, dx, n]  += spikes[y, x, k] grid[y + dy, x + dx, n]

Channels lie last in memory. So for one dy all that a spike adds is a row of numbers, and kernels
list what fired and add up rows as in ``products``: the convolution lists the channels that fired at
a position, the gradient the positions at which a channel fired. The gradient of the spikes is a
convolution of grad_output.

Each thread has a grid, on which it lays one image after the other. All sums have one order, so what
comes out for an image depends on no other image. The gradient is summed in a fixed number of parts,
whatever the number of threads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.library import Kernel, kernel
from snn_lib.kernels.cpu.products import (
    LISTS,
    WORD,
    Product,
    Variant,
    lists,
    variant_of,
)
from snn_lib.kernels.cpu.writer import FLOAT, I64

CHANNELS = 16  # at least, of the input and of the output: PyTorch is as fast for fewer
PANEL = 3 * CHANNELS  # numbers that are added at once: most patches are 3 wide
PARTS = 8  # of the images, whose gradients are added up at last

# The arguments of the kernels. ``top`` and ``left`` say where on the grid the output begins.
SIZES = ["height", "width", "inputs", "outputs", "patch_height", "patch_width"]
PLACE = ["top", "left", "output_height", "output_width"]
CONVOLVE = ["spikes", "weights", "bias", "output", "grids", *SIZES, *PLACE, *LISTS]
GRADIENT = ["spikes", "grad_output", "gradient", "grids", "images", "parts", *SIZES, *PLACE, *LISTS]


def serves(maps: torch.Size, weight: torch.Size, padding: Sequence[int]) -> bool:
    """Whether there are kernels for these shapes, ``(B, K, H, W)`` and ``(N, K, *patch)``."""
    return (
        len(maps) == len(weight) == 4
        and maps[1] == weight[1]
        and (channels := min(weight[:2])) >= CHANNELS
        and channels * weight[3] >= PANEL
        and all(
            0 <= pad < length <= side + 2 * pad
            for side, length, pad in zip(maps[2:], weight[2:], padding, strict=True)
        )
    )


def convolve(spikes: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """The convolution ``(B, N, *)`` of spikes ``(B, K, H, W)``, channels last in memory."""
    (images, inputs, *maps), (outputs, _, *patch) = spikes.shape, weight.shape
    # The patch of a spike is the weights as the output sees them, turned by half a turn.
    weights = weight.flip(2, 3).permute(1, 2, 3, 0).contiguous()
    size = [m + 2 * pad - length + 1 for m, pad, length in zip(maps, padding, patch, strict=True)]
    place = [length - 1 - pad for length, pad in zip(patch, padding, strict=True)]
    output = spikes.new_empty(images, *size, outputs)
    bias = spikes.new_zeros(outputs) if bias is None else bias.contiguous()
    threads = openmp.threads_for(images, output.numel())
    sizes = *maps, inputs, outputs, *patch, *place, *size
    given = _last(spikes), weights, bias, output, _grids(threads, maps, patch, outputs), *sizes
    made = _convolve(_variant(spikes))
    openmp.run(made, threads, images, [*given, *lists(threads, 1, inputs)])
    return output.movedim(-1, 1)


def gradient(
    grad_output: Tensor, spikes: Tensor, shape: torch.Size, padding: Sequence[int]
) -> Tensor:
    """The gradient of weights of a shape, of the output's and the spikes."""
    (images, inputs, *maps), (outputs, _, *patch) = spikes.shape, shape
    place = [length - 1 - pad for length, pad in zip(patch, padding, strict=True)]
    parts = min(PARTS, images)
    found = spikes.new_zeros(parts, inputs, *patch, outputs)
    threads = openmp.threads_for(parts, grad_output.numel())
    sizes = images, parts, *maps, inputs, outputs, *patch, *place, *grad_output.shape[2:]
    given = _last(spikes), _last(grad_output), found, _grids(threads, maps, patch, outputs), *sizes
    made = _gradient(_variant(spikes))
    openmp.run(made, threads, parts, [*given, *lists(threads, inputs, maps[0] * maps[1])])
    return found.sum(0).permute(3, 0, 1, 2).flip(2, 3)


def _last(maps: Tensor) -> Tensor:
    """Maps ``(B, C, H, W)`` with their channels last: ``(B, H, W, C)``."""
    return maps.movedim(1, -1).contiguous()


def _grids(threads: int, maps: Sequence[int], patch: Sequence[int], outputs: int) -> Tensor:
    """A grid for each thread."""
    size = [m + length - 1 for m, length in zip(maps, patch, strict=True)]
    return torch.empty(threads, *size, outputs, device="cpu")


@cache
def _convolve(variant: Variant) -> Kernel:
    return kernel(convolve_source(variant))


@cache
def _gradient(variant: Variant) -> Kernel:
    return kernel(gradient_source(variant))


def _variant(spikes: Tensor) -> Variant:
    """The variant, whose words are no longer than the channels of a position."""
    variant = variant_of(spikes.dtype, torch.float32)
    word = WORD if spikes.shape[1] >= WORD else CHANNELS
    return replace(variant, registers=PANEL // variant.lanes, word=word)


def convolve_source(variant: Variant) -> str:
    """The kernel of the convolution, see :data:`CONVOLVE`. Threads share the images."""
    maps = _Maps("convolve", CONVOLVE, variant)
    w, bias = maps.writer, maps.row("bias", FLOAT, I64(0))
    with w.counting(maps.first, maps.last) as (image, _):
        with w.counting(I64(0), maps.cells) as (cell, _):
            row = maps.cell(cell)
            maps.each(lambda n, row=row: w.write(w.read(bias, n), row, n), maps["outputs"])
        with maps.positions(image) as (row, cell):
            maps.begin_list(I64(0))
            with maps.each_spike(row, I64(0), maps.words()) as k:
                maps.append(I64(0), k, w.read(row, k))
            with (
                w.if_then(w.icmp_signed(">", maps.length(I64(0)), I64(0))),
                w.counting(I64(0), maps["patch_height"]) as (dy, _),
                maps.panels(maps.span) as column,
            ):
                sums = maps.sums(column, lambda n: w.number(0.0))
                with maps.each_entry(I64(0)) as (k, value):
                    maps.add(column, [sums], [value], maps.patch_row("weights", I64(0), k, dy))
                maps.add_to(maps.cell(w.add(cell, w.mul(dy, maps.pitch))), column, sums)
        with maps.output_rows("output", image) as (row, grid, length):
            w.copy(grid, row, I64(0), length)
    return maps.text()


def gradient_source(variant: Variant) -> str:
    """The kernel of the weights' gradient, see :data:`GRADIENT`. Threads share the parts."""
    maps = _Maps("gradient", GRADIENT, variant)
    w = maps.writer
    maps.each(
        lambda n: w.write(w.number(0.0), maps.cell(I64(0)), n), w.mul(maps.cells, maps["outputs"])
    )
    with w.counting(maps.first, maps.last) as (part, _):
        first, last = (
            w.sdiv(w.mul(maps["images"], n), maps["parts"]) for n in (part, w.add(part, I64(1)))
        )
        with w.counting(first, last) as (image, _):
            with maps.output_rows("grad_output", image) as (row, grid, length):
                w.copy(row, grid, I64(0), length)
            with w.counting(I64(0), maps["inputs"]) as (k, _):
                maps.begin_list(k)
            with (
                maps.positions(image) as (row, cell),
                maps.each_spike(row, I64(0), maps.words()) as k,
            ):
                maps.append(k, cell, w.read(row, k))
            with (
                w.counting(I64(0), maps["patch_height"]) as (dy, _),
                maps.panels(maps.span) as column,
                w.counting(I64(0), maps["inputs"]) as (k, _),
            ):
                sums = maps.sums(column, lambda n: w.number(0.0))
                with maps.each_entry(k) as (cell, value):
                    row = maps.cell(w.add(cell, w.mul(dy, maps.pitch)))
                    maps.add(column, [sums], [value], row)
                maps.add_to(maps.patch_row("gradient", part, k, dy), column, sums)
    return maps.text()


class _Maps(Product):
    """A kernel that is being written: its grid, and what lies on it.

    Attributes:
        pitch, cells: the cells in a row of the grid, and in all of it.
        span: the numbers that a spike adds for one dy, side by side.
    """

    def __init__(self, name: str, arguments: Sequence[str], variant: Variant) -> None:
        super().__init__(name, arguments, variant)
        w, more = self.writer, I64(-1)
        self.pitch = w.add(self["width"], w.add(self["patch_width"], more))
        rows = w.add(self["height"], w.add(self["patch_height"], more))
        self.cells = w.mul(rows, self.pitch)
        self.span = w.mul(self["patch_width"], self["outputs"])
        self._grid = self.row("grids", FLOAT, self._numbers(w.mul(self.thread, self.cells)))

    def _numbers(self, cells: ir.Value) -> ir.Value:
        return self.writer.mul(cells, self["outputs"])

    def cell(self, cell: ir.Value) -> ir.Value:
        """Where a cell begins."""
        return self.writer.gep(self._grid, [self._numbers(cell)])

    def each(self, body: Callable[[ir.Value], None], last: ir.Value) -> None:
        """Writes ``body(n)`` for all n before ``last``."""
        self.writer.each_channel(I64(0), last, self.variant.lanes, body)

    @contextmanager
    def positions(self, image: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """The loop over an image's positions: the spikes of each, and its cell."""
        w = self.writer
        with w.counting(I64(0), self["height"]) as (y, _):
            first = w.mul(w.add(w.mul(image, self["height"]), y), self["width"])
            with w.counting(I64(0), self["width"]) as (x, _):
                yield self.spikes(w.add(first, x)), w.add(w.mul(y, self.pitch), x)

    @contextmanager
    def output_rows(
        self, name: str, image: ir.Value
    ) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
        """The loop over an image's rows of the output: each, its part of the grid, its length."""
        w, length = self.writer, self._numbers(self["output_width"])
        with w.counting(I64(0), self["output_height"]) as (y, _):
            row = w.mul(w.add(w.mul(image, self["output_height"]), y), length)
            cell = w.add(w.mul(w.add(y, self["top"]), self.pitch), self["left"])
            yield self.row(name, FLOAT, row), self.cell(cell), length

    def patch_row(self, name: str, part: ir.Value, k: ir.Value, dy: ir.Value) -> ir.Value:
        """A row of channel k's patch, of the weights or of a part of their gradient."""
        w = self.writer
        patch = w.add(w.mul(part, self["inputs"]), k)
        row = w.add(w.mul(patch, self["patch_height"]), dy)
        return self.row(name, FLOAT, w.mul(row, self.span))
