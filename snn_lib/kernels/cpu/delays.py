"""Delays on the CPU: two neighbouring steps of each channel, which begins at a step of its own.

A sequence lies in memory step by step, and channels that begin at other steps are read far apart.
So a kernel copies some steps of a few channels to a room that stays in the innermost caches, with
zeros for the steps that the sequence does not have. From there it reads each channel where it
begins. What it computes for a batch row depends on no other, nor on the number of threads.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from llvmlite import ir
from torch import Tensor

from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.library import Kernel, kernel, vector_width
from snn_lib.kernels.cpu.running import NAMES
from snn_lib.kernels.cpu.source import TYPES
from snn_lib.kernels.cpu.writer import DOUBLE, I32, I64, Frame

COLUMNS = 64  # channels that are copied at once
BLOCK = 64  # steps that are copied at once; more where the delays differ by more

SHARED = ["sequence", "starts", "room", "steps", "batch", "channels"]
# The output has so many steps, in so many blocks of steps. The room for a block is longer, and
# begins so many steps later.
SHARED += ["outputs", "blocks", "block", "length", "lowest"]
INTERPOLATE = [*SHARED, "parts", "output"]
CORRELATE = [*SHARED, "gradient", "sums"]


def interpolate(sequence: Tensor, start: Tensor, parts: Tensor, steps: int) -> Tensor:
    """As :func:`snn_lib.kernels.delays.interpolate`."""
    output = sequence.new_empty(steps, *sequence.shape[1:])
    _run(_interpolate(NAMES[sequence.dtype]), sequence, start, steps, [parts.contiguous(), output])
    return output


def correlate(gradient: Tensor, sequence: Tensor, start: Tensor) -> Tensor:
    """The gradient of ``parts``, of a gradient of the output; it adds up in double precision."""
    steps, batch, channels = gradient.shape
    sums = gradient.new_zeros(batch, 2, channels, dtype=torch.float64)
    made = _correlate(NAMES[sequence.dtype])
    _run(made, sequence, start, steps, [gradient.contiguous(), sums])
    return sums.sum(0).to(gradient.dtype)


@cache
def _interpolate(dtype: str) -> Kernel:
    return kernel(interpolate_source(dtype))


@cache
def _correlate(dtype: str) -> Kernel:
    return kernel(correlate_source(dtype))


def _run(made: Kernel, sequence: Tensor, start: Tensor, outputs: int, given: list[Tensor]) -> None:
    steps, batch, channels = sequence.shape
    if outputs * batch * channels == 0:
        return
    threads = openmp.threads_for(batch, outputs * batch * channels)
    lowest, highest = int(start.min()), int(start.max())
    span = highest - lowest + 2
    block = min(outputs, max(BLOCK, span))
    room = sequence.new_empty(threads, block + span, COLUMNS)
    starts = ((start - lowest) * COLUMNS).contiguous()
    sizes = steps, batch, channels, outputs, -(-outputs // block), block, block + span, lowest
    openmp.run(made, threads, batch, [sequence.contiguous(), starts, room, *sizes, *given])


def interpolate_source(dtype: str) -> str:
    """The kernel of the delayed channels, see :data:`INTERPOLATE`. Threads share the batch rows."""
    frame = _Frame("interpolate", INTERPOLATE, dtype)
    w = frame.writer

    def run(b: ir.Value, first: ir.Value, last: ir.Value, n: ir.Value) -> None:
        rows = (frame.row("parts", frame.type, w.mul(I64(k), frame["channels"])) for k in (0, 1))
        parts = [w.read(row, n) for row in rows]
        with frame.reading(first, last, n) as (t, values):
            w.write(w.fadd(*map(w.fmul, parts, values)), frame.step("output", t, b), n)

    frame.each_run(run)
    return frame.text()


def correlate_source(dtype: str) -> str:
    """The kernel of the gradient of the parts, see :data:`CORRELATE`. Threads share the rows."""
    frame = _Frame("correlate", CORRELATE, dtype)
    w = frame.writer

    def run(b: ir.Value, first: ir.Value, last: ir.Value, n: ir.Value) -> None:
        offsets = (w.mul(w.add(w.mul(b, I64(2)), I64(k)), frame["channels"]) for k in (0, 1))
        rows = [frame.row("sums", DOUBLE, offset) for offset in offsets]
        totals = [w.in_entry(w.vector(DOUBLE)) for _ in rows]
        for row, total in zip(rows, totals, strict=True):
            w.store(w.read(row, n), total)
        with frame.reading(first, last, n) as (t, values):
            gradient = frame.doubled(w.read(frame.step("gradient", t, b), n))
            for value, total in zip(values, totals, strict=True):
                product = w.fmul(gradient, frame.doubled(value))
                w.store(w.fadd(w.load(total), product), total)
        for row, total in zip(rows, totals, strict=True):
            w.write(w.load(total), row, n)

    frame.each_run(run)
    return frame.text()


class _Frame(Frame):
    """A kernel that is being written: its loops, and the room of its thread."""

    def __init__(self, name: str, arguments: list[str], dtype: str) -> None:
        self.type = TYPES[dtype]
        super().__init__(name, arguments, self.type)

    def step(self, name: str, t: ir.Value, b: ir.Value) -> ir.Value:
        """The row of a contiguous sequence."""
        w = self.writer
        offset = w.mul(w.add(w.mul(t, self["batch"]), b), self["channels"])
        return self.row(name, self.type, offset)

    def doubled(self, value: ir.Value) -> ir.Value:
        """A value in double precision."""
        w = self.writer
        return value if self.type == DOUBLE else w.fpext(value, w.vector(DOUBLE))

    def each_run(self, run: Callable[[ir.Value, ir.Value, ir.Value, ir.Value], None]) -> None:
        """Writes ``run(b, first, last, n)`` for all batch rows, blocks of steps and channels."""
        w = self.writer
        with (
            w.counting(self.first, self.last) as (b, _),
            w.counting(I64(0), self["channels"], COLUMNS) as (begin, _),
            w.counting(I64(0), self["blocks"]) as (block, _),
        ):
            end = w.smaller(w.add(begin, I64(COLUMNS)), self["channels"])
            first = w.mul(block, self["block"])
            last = w.smaller(w.add(first, self["block"]), self["outputs"])
            self._begin = begin
            self._fill(b, end, w.add(first, self["lowest"]))
            w.each_channel(begin, end, vector_width(), lambda n: run(b, first, last, n))

    def _fill(self, b: ir.Value, end: ir.Value, lowest: ir.Value) -> None:
        """Copies the channels of this run, of as many steps as fit into the room."""
        w = self.writer
        with w.counting(I64(0), self["length"]) as (place, _):
            t = w.add(lowest, place)
            inside = w.icmp_unsigned("<", t, self["steps"])
            with w.if_else(inside) as (there, beyond):
                with there:
                    w.copy(self.step("sequence", t, b), self._room(place), self._begin, end)
                with beyond, w.counting(self._begin, end) as (n, _):
                    w.write(w.number(0.0), self._room(place), n)

    def _room(self, place: ir.Value) -> ir.Value:
        """A row of the room, which has the channels of this run."""
        w = self.writer
        row = w.add(w.mul(self.thread, self["length"]), place)
        return self.row("room", self.type, w.sub(w.mul(row, I64(COLUMNS)), self._begin))

    @contextmanager
    def reading(
        self, first: ir.Value, last: ir.Value, n: ir.Value
    ) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
        """The loop over steps, and the two values that the channels from n on read at each."""
        w, starts = self.writer, self.row("starts", I64, I64(0))
        channels = [w.add(n, I64(lane)) for lane in range(w.width)]
        places = [w.add(w.load(w.gep(starts, [channel])), channel) for channel in channels]

        def gather(place: ir.Value) -> ir.Value:
            row = self._room(place)
            values = [w.load(w.gep(row, [one])) for one in places]
            gathered = ir.Constant(w.vector(self.type), ir.Undefined)
            for lane, value in enumerate(values if w.width > 1 else []):
                gathered = w.insert_element(gathered, value, I32(lane))
            return gathered if w.width > 1 else values[0]

        held = w.in_entry(w.vector(self.type))
        w.store(gather(I64(0)), held)
        with w.counting(first, last) as (t, _):
            values = [w.load(held), gather(w.add(w.sub(t, first), I64(1)))]
            yield t, values
            w.store(values[1], held)
