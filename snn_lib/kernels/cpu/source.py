"""Writes a program's kernels in LLVM's language, forward and backward over time.

A kernel runs on the tiles of :mod:`snn_lib.kernels.cpu.running`: all steps of one tile, then of the
next. A row is the channels of a tile at one time step and one batch row. States lie in rows, which
stay in the cache. A vector of channels is taken through a few steps at once: it reads its states,
keeps them in registers over these steps, and writes them back. The innermost loop runs over the
steps and has the lines of the step's trace in it.
``python -m snn_lib.kernels --show CELL`` prints the lines of a step and of its adjoint.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce

from llvmlite import ir

from snn_lib.kernels.cpu.library import vector_width
from snn_lib.kernels.cpu.writer import DOUBLE, FLOAT, I16, I32, I64, KERNEL, Frame
from snn_lib.kernels.inputs import BLOCK
from snn_lib.kernels.program import Adjoint, Product, program
from snn_lib.kernels.trace import Trace, Value

GROUP = 4  # steps that a vector of channels runs at once, with its states in registers
TYPES = {"bfloat16": I16, "float32": FLOAT, "float64": DOUBLE}


@dataclass(frozen=True)
class Variant:
    """The dtypes and options for which a program's kernel is compiled; each has its own kernel.

    Attributes:
        key: the program's key.
        x_dtype, output_dtype, state_dtype: the dtypes of x, of the output and of all else, by name.
        drops: whether there is dropout.
        ends: whether each sequence has a length of its own.
    """

    key: str
    x_dtype: str
    output_dtype: str
    state_dtype: str
    drops: bool
    ends: bool


# The arguments of a kernel, 64 bits each. Sequences have their strides behind them, in elements.
TILES = ["steps", "batch", "channels", "rows", "columns"]
INPUTS = ["x", "x_step", "x_batch", "coefficients", "lengths"]
DROPOUT = ["key_low", "key_high", "first", "below", "scale"]
FORWARD_ARGUMENTS = [*TILES, *INPUTS, *DROPOUT, "state", "ends", "checkpoints", "blocks", "output"]
BACKWARD_ARGUMENTS = [
    *(*TILES, *INPUTS, *DROPOUT, "state", "checkpoints"),
    *("grad_output", "grad_output_step", "grad_output_batch", "grad_last", "grad_x"),
    *("adjoint", "sums", "again"),
]


def call_for_one_step(
    w: ir.IRBuilder, function: ir.Value, channels: ir.Value, **addresses: ir.Value
) -> None:
    """Writes the call of a program's kernel, given its address, for one step of one batch row.

    ``addresses`` are those of the coefficients, of the state, of x and of the output.
    """
    given = {"channels": channels, "columns": channels, **addresses}
    given |= dict.fromkeys(("steps", "batch", "rows"), I64(1))
    with w.goto_entry_block():
        room = w.alloca(I64, I64(len(FORWARD_ARGUMENTS)))
    for place, name in enumerate(FORWARD_ARGUMENTS):
        w.store(given.get(name, I64(0)), w.gep(room, [I64(place)]))
    kernel = w.inttoptr(function, KERNEL.as_pointer())
    with w.if_then(w.icmp_signed("!=", channels, I64(0))):  # else there is no tile
        w.call(kernel, [I64(0), I64(0), I64(1), room])


def forward_source(variant: Variant) -> str:
    """The kernel that runs a program over time, see :data:`FORWARD_ARGUMENTS`."""
    made, kernel = program(variant.key), _Kernel("forward", FORWARD_ARGUMENTS, variant)
    trace, w = made.forward, kernel.writer

    def keep(begin: ir.Value, b: ir.Value) -> None:
        """Keeps the states before a block, but the first, for a backward pass."""
        block = w.sdiv(begin, I64(BLOCK))
        whole = w.icmp_signed("==", w.mul(block, I64(BLOCK)), begin)
        kept = w.icmp_signed("<=", block, kernel["blocks"])
        with w.if_then(w.and_(w.and_(whole, kept), w.icmp_signed(">", begin, I64(0)))):
            kernel.copy(kernel.states("state", b), kernel.checkpoints(block, b))

    def run(begin: ir.Value, end: ir.Value, b: ir.Value, n: ir.Value) -> None:
        rows, fixed = kernel.states("state", b), kernel.coefficients(n)
        with kernel.carrying(rows, n) as states, w.counting(begin, end) as (t, _):
            values = fixed | kernel.read_states(made.states, states)
            values |= kernel.inputs(trace, t, b, n)
            kernel.lines(trace, values, flushed=trace.results[1:])
            output, *after = (kernel.value(result, values) for result in trace.results)
            w.write(output, kernel.whole("output", variant.output_dtype, t, b), n)
            for value, place in zip(after, states, strict=True):
                w.store(value, place)
            if variant.ends:
                with w.if_then(kernel.is_end(b, t)):
                    for value, row in zip(after, kernel.states("ends", b), strict=True):
                        w.write(value, row, n)

    with kernel.tiles(), w.counting(I64(0), kernel["steps"], GROUP) as (begin, _):
        end = w.smaller(kernel["steps"], w.add(begin, I64(GROUP)))
        with kernel.each_row() as b:
            keep(begin, b)
            kernel.each_channel(partial(run, begin, end, b))
    return kernel.text()


def backward_source(variant: Variant, adjoint: Adjoint) -> str:
    """The kernel of a program's gradients, backward over time, see :data:`BACKWARD_ARGUMENTS`."""
    kernel = _Kernel("backward", BACKWARD_ARGUMENTS, variant, adjoint.numbers)
    w, names, again, states = kernel.writer, adjoint.program.states, adjoint.again, adjoint.states
    count, trained = len(names), len(adjoint.sums)
    # Dropout's factors cost more to draw than to keep from one loop to the other.
    keeps_scales = variant.drops and bool(states) and again.reads("dropout_scale")

    def replay(first: ir.Value, begin: ir.Value, end: ir.Value, b: ir.Value, n: ir.Value) -> None:
        """The states before the steps after ``begin``, in a block that begins at ``first``."""
        *rows, _ = kernel.again(w.sub(begin, first), b)
        fixed = kernel.coefficients(n)
        with kernel.carrying(rows, n, write=False) as held, w.counting(begin, end) as (t, _):
            values = fixed | kernel.read_states(names, held)
            values |= kernel.inputs(again, t, b, n)
            here = w.sub(t, first)
            if keeps_scales:
                w.write(values["dropout_scale"], kernel.again(here, b)[-1], n)
            kernel.lines(again, values, flushed=again.results)
            *after, _ = kernel.again(w.add(here, I64(1)), b)
            for result, row, place in zip(again.results, after, held, strict=True):
                value = kernel.value(result, values)
                w.write(value, row, n)
                w.store(value, place)

    def retreat(first: ir.Value, begin: ir.Value, end: ir.Value, b: ir.Value, n: ir.Value) -> None:
        """The gradients that reach the states before step ``begin``, from those at ``end``."""
        rows = kernel.states("adjoint", b)
        totals = [kernel.sum(number, trained) for number in range(trained)]
        fixed = kernel.coefficients(n) | kernel.numbers()
        back = w.counting(w.sub(end, I64(1)), begin, -1)
        with kernel.carrying([*rows, *totals], n) as held, back as (t, _):
            adjoints, sums = held[:count], held[count:]
            if variant.ends:
                with w.if_then(kernel.is_end(b, t)):
                    add_last(adjoints, b, n)
            *before, scales = kernel.again(w.sub(t, first), b)
            values = fixed | kernel.read_states(adjoint.arriving, adjoints)
            for name, row in zip(names, before, strict=True):
                if name in states:
                    values[name] = w.read(row, n)
            w.prefetch(kernel.sequence("grad_output", w.sub(t, I64(GROUP)), b), n)
            values["_g0"] = w.read(kernel.sequence("grad_output", t, b), n)
            if adjoint.step.reads("x"):
                values["x"] = w.read(kernel.sequence("x", t, b), n)
            if adjoint.step.reads("dropout_scale"):
                values["dropout_scale"] = (
                    w.read(scales, n) if keeps_scales else kernel.dropout_scale(t, b, n)
                )
            # x's for the product after it
            flushed = [*adjoint.carried, *[adjoint.x] * adjoint.need_x]
            kernel.lines(adjoint.step, values, flushed=flushed)
            for result, carried in zip(adjoint.carried, adjoints, strict=True):
                w.store(kernel.value(result, values), carried)
            if adjoint.need_x:
                grad_x = kernel.whole("grad_x", variant.x_dtype, t, b)
                w.write(kernel.value(adjoint.x, values), grad_x, n)
            for total, products in zip(sums, adjoint.sums.values(), strict=True):
                w.store(w.fadd(w.load(total), kernel.sum_of(products, values)), total)

    def add_last(adjoints: list[ir.Value], b: ir.Value, n: ir.Value) -> None:
        """Adds the gradient of a sequence's last state."""
        for place, row in zip(adjoints, kernel.states("grad_last", b), strict=True):
            w.store(w.fadd(w.load(place), w.read(row, n)), place)

    def finish(b: ir.Value, n: ir.Value) -> None:
        """The same for a sequence without steps, which returns the state that it was given."""
        with kernel.carrying(kernel.states("adjoint", b), n) as adjoints:
            add_last(adjoints, b, n)

    with kernel.tiles():
        blocks = w.sdiv(w.sub(kernel["steps"], I64(1)), I64(BLOCK))
        blocks = w.select(w.icmp_signed(">", kernel["steps"], I64(0)), blocks, I64(-1))
        with w.counting(blocks, I64(0), -1) as (block, _):
            first = w.mul(block, I64(BLOCK))
            last = w.smaller(kernel["steps"], w.add(first, I64(BLOCK)))
            if states:
                from_start = w.icmp_signed("==", block, I64(0))
                with kernel.each_row() as b:
                    pairs = zip(
                        kernel.states("state", b), kernel.checkpoints(block, b), strict=True
                    )
                    rows = [w.select(from_start, start, kept) for start, kept in pairs]
                    kernel.copy(rows, kernel.again(I64(0), b)[:-1])
                enough = last if keeps_scales else w.sub(last, I64(1))
                with w.counting(first, enough, GROUP) as (begin, _), kernel.each_row() as b:
                    end = w.smaller(enough, w.add(begin, I64(GROUP)))
                    kernel.each_channel(partial(replay, first, begin, end, b))
            groups = w.sdiv(w.sub(w.sub(last, I64(1)), first), I64(GROUP))
            with w.counting(groups, I64(0), -1) as (group, _), kernel.each_row() as b:
                begin = w.add(first, w.mul(group, I64(GROUP)))
                end = w.smaller(last, w.add(begin, I64(GROUP)))
                kernel.each_channel(partial(retreat, first, begin, end, b))
        if variant.ends:
            with kernel.each_row() as b, w.if_then(kernel.is_end(b, I64(-1))):
                kernel.each_channel(partial(finish, b))
    return kernel.text()


class _Kernel(Frame):
    """A kernel that is being written: its arguments, its tiles and its rows."""

    def __init__(
        self, name: str, arguments: list[str], variant: Variant, numbers: Sequence[str] = ()
    ) -> None:
        self.variant, self._number_names = variant, list(numbers)
        self._program, self.type = program(variant.key), TYPES[variant.state_dtype]
        super().__init__(name, [*arguments, *numbers], self.type)

    # ---------------------------------------------------------------------------------------------
    # Loops

    @contextmanager
    def tiles(self) -> Iterator[None]:
        """The loop over this thread's tiles, see ``running.tiles_of``."""
        w = self.writer
        with w.counting(self.first, self.last) as (item, _):
            channels, columns, rows = self["channels"], self["columns"], self["rows"]
            across = w.sdiv(w.sub(w.add(channels, columns), I64(1)), columns)
            self.first_row = w.mul(w.sdiv(item, across), rows)
            self.last_row = w.smaller(w.add(self.first_row, rows), self["batch"])
            self._group = w.sdiv(item, across)
            self.first_channel = w.mul(w.srem(item, across), columns)
            self.last_channel = w.smaller(w.add(self.first_channel, columns), channels)
            yield

    @contextmanager
    def each_row(self) -> Iterator[ir.Value]:
        """The loop over the batch rows of the tile."""
        with self.writer.counting(self.first_row, self.last_row) as (b, _):
            yield b

    def each_channel(self, body: Callable[[ir.Value], None]) -> None:
        """Writes ``body(n)`` for all channels of the tile."""
        width = vector_width()
        self.writer.each_channel(self.first_channel, self.last_channel, width, body)

    def is_end(self, b: ir.Value, t: ir.Value) -> ir.Value:
        """Whether step t is the last one of sequence b."""
        w = self.writer
        lengths = w.inttoptr(self["lengths"], I64.as_pointer())
        length = w.load(w.gep(lengths, [b]))
        return w.icmp_signed("==", w.add(t, I64(1)), length)

    # ---------------------------------------------------------------------------------------------
    # Rows

    def sequence(self, name: str, t: ir.Value, b: ir.Value) -> ir.Value:
        """The row of x, or of the output's gradient, which have strides of their own."""
        w, type_ = (
            self.writer,
            TYPES[self.variant.x_dtype if name == "x" else self.variant.output_dtype],
        )
        offset = w.add(w.mul(t, self[f"{name}_step"]), w.mul(b, self[f"{name}_batch"]))
        return self.row(name, type_, offset)

    def whole(self, name: str, dtype: str, t: ir.Value, b: ir.Value) -> ir.Value:
        """The row of a contiguous sequence."""
        w = self.writer
        offset = w.mul(w.add(w.mul(t, self["batch"]), b), self["channels"])
        return self.row(name, TYPES[dtype], offset)

    def states(self, name: str, b: ir.Value, before: ir.Value | None = None) -> list[ir.Value]:
        """The rows of a state of sequence b, which lie behind so many others."""
        w, names = self.writer, self._program.states
        places = (I64(s) if before is None else w.add(before, I64(s)) for s in range(len(names)))
        return [self.whole(name, self.variant.state_dtype, place, b) for place in places]

    def checkpoints(self, block: ir.Value, b: ir.Value) -> list[ir.Value]:
        """The rows of the state before the first step of a block, which is not the first block."""
        w, count = self.writer, I64(len(self._program.states))
        return self.states("checkpoints", b, w.mul(w.sub(block, I64(1)), count))

    def again(self, step: ir.Value, b: ir.Value) -> list[ir.Value]:
        """The rows of a state that this thread computes again, and that of dropout's factors.

        They have the channels of the tile alone, and begin where channel 0 would lie.
        """
        w, count, rows = self.writer, len(self._program.states) + 1, []
        steps = w.mul(w.add(w.mul(self.thread, I64(BLOCK + 1)), step), I64(count))
        for s in range(count):
            offset = w.mul(w.add(steps, I64(s)), self["rows"])
            offset = w.mul(w.add(offset, w.sub(b, self.first_row)), self["columns"])
            rows.append(self.row("again", self.type, w.sub(offset, self.first_channel)))
        return rows

    def sum(self, number: int, count: int) -> ir.Value:
        """The sums of a coefficient's gradient, of all batch rows of the tile."""
        w = self.writer
        offset = w.add(w.mul(self._group, I64(count)), I64(number))
        return self.row("sums", DOUBLE, w.mul(offset, self["channels"]))

    def copy(self, sources: Sequence[ir.Value], targets: Sequence[ir.Value]) -> None:
        """Copies rows of the tile."""
        for source, target in zip(sources, targets, strict=True):
            self.writer.copy(source, target, self.first_channel, self.last_channel)

    # ---------------------------------------------------------------------------------------------
    # Values

    @contextmanager
    def carrying(
        self, rows: Sequence[ir.Value], n: ir.Value, write: bool = True
    ) -> Iterator[list[ir.Value]]:
        """Holds rows at channel n in registers for some steps, and writes them back after those."""
        w, held = self.writer, []
        for row in rows:
            held.append(w.in_entry(w.vector(row.type.pointee)))
            w.store(w.read(row, n), held[-1])
        yield held
        for row, place in zip(rows, held, strict=True):
            if write:
                w.write(w.load(place), row, n)

    def read_states(self, names: Sequence[str], held: Sequence[ir.Value]) -> dict[str, ir.Value]:
        """What is held in registers, by name."""
        return dict(zip(names, map(self.writer.load, held), strict=True))

    def inputs(self, trace: Trace, t: ir.Value, b: ir.Value, n: ir.Value) -> dict[str, ir.Value]:
        """What a trace reads at a step, but for states; x of the next group is asked for."""
        w, values = self.writer, {}
        if trace.reads("x"):
            w.prefetch(self.sequence("x", w.add(t, I64(GROUP)), b), n)
            values["x"] = w.read(self.sequence("x", t, b), n)
        if trace.reads("dropout_scale"):
            values["dropout_scale"] = self.dropout_scale(t, b, n)
        return values

    def coefficients(self, n: ir.Value) -> dict[str, ir.Value]:
        """The coefficients at channel n, by name."""
        w = self.writer
        rows = [
            self.row("coefficients", self.type, w.mul(I64(row), self["channels"]))
            for row in range(len(self._program.coefficients))
        ]
        return dict(zip(self._program.coefficients, [w.read(row, n) for row in rows], strict=True))

    def numbers(self) -> dict[str, ir.Value]:
        """The surrogate's numbers."""
        return {name: self.writer.spread(self._number(name)) for name in self._number_names}

    def _number(self, name: str) -> ir.Value:
        """An argument that comes as a double."""
        number = self.writer.bitcast(self[name], DOUBLE)
        return number if self.type == DOUBLE else self.writer.fptrunc(number, FLOAT)

    def dropout_scale(self, t: ir.Value, b: ir.Value, n: ir.Value) -> ir.Value:
        """Dropout's factors of the spikes."""
        w = self.writer
        if not self.variant.drops:
            return w.number(1.0)
        before = w.mul(w.add(w.mul(t, self["batch"]), b), self["channels"])
        index = w.add(w.add(before, n), self["first"])
        low, high, below = (w.trunc(self[name], I32) for name in ("key_low", "key_high", "below"))
        return w.dropout_scale(index, [low, high], below, self._number("scale"))

    def lines(self, trace: Trace, values: dict, flushed: Sequence[Value]) -> None:
        """Writes the lines of a trace, and adds their values."""
        for line in trace.lines:
            arguments = [self.value(argument, values) for argument in line.arguments]
            value = self.writer.line(line, arguments)
            values[line.name] = self.writer.flush(value) if line.name in flushed else value

    def value(self, value: Value, values: dict[str, ir.Value]) -> ir.Value:
        """A number, or the value of a name."""
        return values[value] if isinstance(value, str) else self.writer.number(value)

    def sum_of(self, products: Sequence[Product], values: dict) -> ir.Value:
        """What a step adds to the gradient of a coefficient."""
        w, parts = self.writer, []
        for negative, factors in products:
            doubles = [self.value(factor, values) for factor in factors]
            if self.type != DOUBLE:
                doubles = [w.fpext(factor, w.vector(DOUBLE)) for factor in doubles]
            part = reduce(w.fmul, doubles)
            parts.append(w.fneg(part) if negative else part)
        return reduce(w.fadd, parts)
