"""Writes a program's kernels in LLVM's language, forward and backward over time.

A kernel runs on the tiles of :mod:`snn_lib.kernels.cpu.tiles`: all steps of one tile, then of the
next. A row is the channels of a tile at one time step and one batch row. The innermost loop runs
over the channels of a row and has the lines of the step's trace in it, on ``WIDTH`` channels at
once. The states of a tile lie in rows, which stay in the cache.

``python -m snn_lib.kernels --show CELL`` prints the lines of a step and of its adjoint.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

from llvmlite import ir

from snn_lib.kernels.adjoint import Adjoint, Product, Way
from snn_lib.kernels.cpu.writer import DOUBLE, FLOAT, I16, I32, I64, VOID, Writer
from snn_lib.kernels.program import parameters, program
from snn_lib.kernels.trace import Trace, Value

BLOCK = 32  # steps whose states a backward pass computes again at once, so that they stay in cache
WIDTH = 8  # channels of a value: wider vectors slow the clock of many CPUs down
KINDS = {"bfloat16": I16, "float32": FLOAT, "float64": DOUBLE}


@dataclass(frozen=True)
class Task:
    """What a kernel has to do, beside its program; each one is a kernel of its own.

    Attributes:
        key: the program's key.
        x, output, state: the names of the dtypes of x, of the output, and of all else.
        drops: whether there is dropout.
        ends: whether each sequence has a length of its own.
    """

    key: str
    x: str
    output: str
    state: str
    drops: bool
    ends: bool


# The arguments of a kernel, 64 bits each. Sequences have their strides behind them, in elements.
TILES = ["steps", "batch", "channels", "rows", "columns"]
INPUTS = ["x", "x_step", "x_batch", "coefficients", "lengths"]
DROPOUT = ["key_low", "key_high", "first", "below", "scale"]
FORWARD = [*TILES, *INPUTS, *DROPOUT, "state", "ends", "checkpoints", "blocks", "output"]
BACKWARD = [
    *(*TILES, *INPUTS, *DROPOUT, "state", "checkpoints"),
    *("grad_output", "grad_output_step", "grad_output_batch", "grad_last", "grad_x"),
    *("adjoint", "sums", "again"),
]


def forward_source(task: Task) -> str:
    """The kernel that runs a program over time, see :data:`FORWARD`."""
    made, kernel = program(task.key), _Kernel("forward", FORWARD, task)
    trace, w, count = made.forward, kernel.writer, len(made.states)
    reads_x = trace.reads("x")
    with kernel.tiles(), w.counting(I64(0), kernel["steps"]) as (t, _):
        block = w.sdiv(t, I64(BLOCK))
        whole = w.icmp_signed("==", w.mul(block, I64(BLOCK)), t)
        kept = w.icmp_signed("<=", block, kernel["blocks"])
        keeps = w.and_(w.and_(whole, kept), w.icmp_signed(">", t, I64(0)))
        with kernel.each_row() as b:
            states = [kernel.state("state", s, b) for s in range(count)]
            with w.if_then(keeps):
                before = w.mul(w.sub(block, I64(1)), I64(count))
                for s, row in enumerate(states):
                    place = kernel.state("checkpoints", w.add(before, I64(s)), b)
                    kernel.copy(row, place)
            x, output = kernel.sequence("x", t, b), kernel.whole("output", task.output, t, b)

            def step(n: ir.Value) -> None:
                values = kernel.coefficients(n)
                values |= dict(zip(made.states, [w.read(row, n) for row in states], strict=True))
                if reads_x:
                    w.prefetch(kernel.sequence("x", w.add(t, I64(1)), b), n)
                    values["x"] = w.read(x, n)
                values |= kernel.kept(t, b, n) if trace.reads("kept") else {}
                kernel.lines(trace, values, flushed=trace.results[1:])
                results = [kernel.value(result, values) for result in trace.results]
                for result, row in zip(results, [output, *states], strict=True):
                    w.write(result, row, n)

            kernel.each_channel(step)
            if task.ends:
                with w.if_then(kernel.is_end(b, t)):
                    for s, row in enumerate(states):
                        kernel.copy(row, kernel.state("ends", s, b))
    return kernel.text()


def backward_source(task: Task, way: Way) -> str:
    """The kernel of a program's gradients, backward over time, see :data:`BACKWARD`."""
    made, kernel = program(task.key), _Kernel("backward", BACKWARD, task, parameters(way.surrogate))
    w, count, names = kernel.writer, len(made.states), made.states
    adjoint = Adjoint(made, way)
    again, states, trained = adjoint.again, adjoint.states, [*adjoint.sums]
    # The factors of spikes cost more to draw than to keep from one way to the other.
    keeps_factors = task.drops and bool(states) and again.reads("kept")

    def replay(t: ir.Value, begin: ir.Value, b: ir.Value) -> None:
        """The states before step t + 1, from those before step t."""
        before = [kernel.again(w.sub(t, begin), s, b) for s in range(count)]
        after = [kernel.again(w.add(w.sub(t, begin), I64(1)), s, b) for s in range(count)]
        x = kernel.sequence("x", t, b)

        def step(n: ir.Value) -> None:
            values = kernel.coefficients(n)
            values |= dict(
                zip(names, [w.read(row, kernel.local(n)) for row in before], strict=True)
            )
            if again.reads("x"):
                w.prefetch(kernel.sequence("x", w.add(t, I64(1)), b), n)
                values["x"] = w.read(x, n)
            values |= kernel.kept(t, b, n) if again.reads("kept") else {}
            if keeps_factors:
                factors = kernel.again(w.sub(t, begin), count, b)
                w.write(values["kept"], factors, kernel.local(n))
            kernel.lines(again, values, flushed=again.results)
            for result, row in zip(again.results, after, strict=True):
                w.write(kernel.value(result, values), row, kernel.local(n))

        kernel.each_channel(step)

    def retreat(t: ir.Value, begin: ir.Value, b: ir.Value) -> None:
        """The gradients that reach the states before step t, from those after it."""
        adjoints = [kernel.state("adjoint", s, b) for s in range(count)]
        if task.ends:
            with w.if_then(kernel.is_end(b, t)):
                _add_last(kernel, adjoints, b)
        before = {
            n: kernel.again(w.sub(t, begin), s, b) for s, n in enumerate(names) if n in states
        }
        sums = [kernel.sum(number, len(trained)) for number in range(len(trained))]
        x, grad_output = (kernel.sequence(name, t, b) for name in ("x", "grad_output"))
        grad_x = kernel.whole("grad_x", task.x, t, b) if way.need_x else None

        def step(n: ir.Value) -> None:
            values = kernel.coefficients(n) | kernel.numbers()
            values |= {name: w.read(row, kernel.local(n)) for name, row in before.items()}
            arriving = zip(adjoint.arriving, adjoints, strict=True)
            values |= {name: w.read(row, n) for name, row in arriving}
            w.prefetch(kernel.sequence("grad_output", w.sub(t, I64(1)), b), n)
            values["_g0"] = w.read(grad_output, n)
            values |= {"x": w.read(x, n)} if adjoint.step.reads("x") else {}
            if keeps_factors:
                factors = kernel.again(w.sub(t, begin), count, b)
                values["kept"] = w.read(factors, kernel.local(n))
            elif adjoint.step.reads("kept"):
                values |= kernel.kept(t, b, n)
            flushed = [*adjoint.carried, *[adjoint.x] * way.need_x]  # x's for the product after it
            kernel.lines(adjoint.step, values, flushed=flushed)
            for result, row in zip(adjoint.carried, adjoints, strict=True):
                w.write(kernel.value(result, values), row, n)
            if way.need_x:
                w.write(kernel.value(adjoint.x, values), grad_x, n)
            for total, products in zip(sums, adjoint.sums.values(), strict=True):
                kernel.add_to(total, n, products, values)

        kernel.each_channel(step)

    with kernel.tiles():
        blocks = w.sdiv(w.sub(kernel["steps"], I64(1)), I64(BLOCK))
        blocks = w.select(w.icmp_signed(">", kernel["steps"], I64(0)), blocks, I64(-1))
        with w.counting(blocks, I64(0), -1) as (block, _):
            begin = w.mul(block, I64(BLOCK))
            end = w.smaller(kernel["steps"], w.add(begin, I64(BLOCK)))
            if states:
                from_start = w.icmp_signed("==", block, I64(0))
                before = w.mul(w.sub(block, I64(1)), I64(count))
                with kernel.each_row() as b:
                    for s in range(count):
                        start = kernel.state("state", s, b)
                        kept = kernel.state("checkpoints", w.add(before, I64(s)), b)
                        kernel.copy_again(w.select(from_start, start, kept), s, b)
                last = end if keeps_factors else w.sub(end, I64(1))
                with w.counting(begin, last) as (t, _), kernel.each_row() as b:
                    replay(t, begin, b)
            with w.counting(w.sub(end, I64(1)), begin, -1) as (t, _), kernel.each_row() as b:
                retreat(t, begin, b)
        if task.ends:  # sequences without steps return the state that they were given
            with kernel.each_row() as b, w.if_then(kernel.is_end(b, I64(-1))):
                _add_last(kernel, [kernel.state("adjoint", s, b) for s in range(count)], b)
    return kernel.text()


def _add_last(kernel: "_Kernel", adjoints: list[ir.Value], b: ir.Value) -> None:
    """Adds the gradient of a sequence's last state."""
    w = kernel.writer
    for s, row in enumerate(adjoints):
        last = kernel.state("grad_last", s, b)
        kernel.each_channel(
            lambda n, row=row, last=last: w.write(w.fadd(w.read(row, n), w.read(last, n)), row, n)
        )


class _Kernel:
    """A kernel that is being written: its arguments, its tiles and its rows."""

    def __init__(self, name: str, arguments: list[str], task: Task, numbers: Sequence[str] = ()):
        self.task, self._number_names = task, list(numbers)
        self._program = program(task.key)
        module = ir.Module(name)
        words = I64.as_pointer()
        function = ir.Function(module, ir.FunctionType(VOID, [I64, I64, I64, words]), "kernel")
        self._thread, self._first_item, self._last_item, memory = function.args
        self.kind = KINDS[task.state]
        self.writer = w = Writer(function.append_basic_block(), self.kind)
        names = [*arguments, *numbers]
        self._arguments = {
            name: w.load(w.gep(memory, [I64(place)])) for place, name in enumerate(names)
        }

    def __getitem__(self, name: str) -> ir.Value:
        return self._arguments[name]

    def text(self) -> str:
        """The module with the kernel, and with its share for a thread of OpenMP's."""
        self.writer.ret_void()
        module = self.writer.module
        words = I64.as_pointer()
        share = ir.Function(module, ir.FunctionType(VOID, [words]), "share")
        w = Writer(share.append_basic_block(), self.kind)
        ask = [
            ir.Function(module, ir.FunctionType(I32, []), f"snn_{name}")
            for name in ("omp_get_thread_num", "omp_get_num_threads")
        ]
        number, team = (w.zext(w.call(function, []), I64) for function in ask)
        items = w.load(share.args[0])  # in front of the kernel's arguments
        first, last = (w.sdiv(w.mul(items, n), team) for n in (number, w.add(number, I64(1))))
        arguments = w.gep(share.args[0], [I64(1)])
        w.call(module.globals["kernel"], [number, first, last, arguments])
        w.ret_void()
        return str(module)

    # ---------------------------------------------------------------------------------------------
    # Loops

    @contextmanager
    def tiles(self) -> Iterator[None]:
        """The loop over this thread's tiles, see ``tiles.locate``."""
        w = self.writer
        with w.counting(self._first_item, self._last_item) as (item, _):
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
        self.writer.each_channel(self.first_channel, self.last_channel, WIDTH, body)

    def is_end(self, b: ir.Value, t: ir.Value) -> ir.Value:
        """Whether step t is the last one of sequence b."""
        w = self.writer
        lengths = w.inttoptr(self["lengths"], I64.as_pointer())
        length = w.load(w.gep(lengths, [b]))
        return w.icmp_signed("==", w.add(t, I64(1)), length)

    # ---------------------------------------------------------------------------------------------
    # Rows

    def _row(self, name: str, kind: ir.Type, offset: ir.Value) -> ir.Value:
        return self.writer.gep(self.writer.inttoptr(self[name], kind.as_pointer()), [offset])

    def sequence(self, name: str, t: ir.Value, b: ir.Value) -> ir.Value:
        """The row of x, or of the output's gradient, which have strides of their own."""
        w, kind = self.writer, KINDS[self.task.x if name == "x" else self.task.output]
        offset = w.add(w.mul(t, self[f"{name}_step"]), w.mul(b, self[f"{name}_batch"]))
        return self._row(name, kind, offset)

    def whole(self, name: str, dtype: str, t: ir.Value, b: ir.Value) -> ir.Value:
        """The row of a contiguous sequence."""
        w = self.writer
        offset = w.mul(w.add(w.mul(t, self["batch"]), b), self["channels"])
        return self._row(name, KINDS[dtype], offset)

    def state(self, name: str, s: int | ir.Value, b: ir.Value) -> ir.Value:
        """Row s of a state of sequence b."""
        return self.whole(name, self.task.state, I64(s) if isinstance(s, int) else s, b)

    def again(self, step: ir.Value, s: int, b: ir.Value) -> ir.Value:
        """The row of this thread's states that were computed again, see :meth:`local`."""
        w, count = self.writer, len(self._program.states) + 1  # one for the factors of spikes
        steps = w.add(w.mul(self._thread, I64(BLOCK + 1)), step)
        offset = w.add(w.mul(steps, I64(count)), I64(s))
        offset = w.add(w.mul(offset, self["rows"]), w.sub(b, self.first_row))
        return self._row("again", self.kind, w.mul(offset, self["columns"]))

    def local(self, n: ir.Value) -> ir.Value:
        """A channel's place in a row of a tile."""
        return self.writer.sub(n, self.first_channel)

    def sum(self, number: int, count: int) -> ir.Value:
        """The sums of a coefficient's gradient, of all batch rows of the tile."""
        w = self.writer
        offset = w.add(w.mul(self._group, I64(count)), I64(number))
        return self._row("sums", DOUBLE, w.mul(offset, self["channels"]))

    def copy(self, source: ir.Value, target: ir.Value) -> None:
        """Copies a row of the tile."""
        self.writer.copy(source, target, self.first_channel, self.last_channel)

    def copy_again(self, source: ir.Value, s: int, b: ir.Value) -> None:
        """Copies a row to where a block's states are computed again."""
        w = self.writer
        source = w.gep(source, [self.first_channel])
        size = w.sub(self.last_channel, self.first_channel)
        w.copy(source, self.again(I64(0), s, b), I64(0), size)

    # ---------------------------------------------------------------------------------------------
    # Values

    def coefficients(self, n: ir.Value) -> dict[str, ir.Value]:
        """The coefficients at channel n, by name."""
        w = self.writer
        rows = [
            self._row("coefficients", self.kind, w.mul(I64(row), self["channels"]))
            for row in range(len(self._program.coefficients))
        ]
        return dict(zip(self._program.coefficients, [w.read(row, n) for row in rows], strict=True))

    def numbers(self) -> dict[str, ir.Value]:
        """The surrogate's numbers, which come as doubles."""
        w, found = self.writer, {}
        for name in self._number_names:
            number = w.bitcast(self[name], DOUBLE)
            number = number if self.kind == DOUBLE else w.fptrunc(number, FLOAT)
            found[name] = w.spread(number)
        return found

    def kept(self, t: ir.Value, b: ir.Value, n: ir.Value) -> dict[str, ir.Value]:
        """The factors of the spikes that are passed on."""
        w = self.writer
        if not self.task.drops:
            return {"kept": w.number(1.0)}
        before = w.mul(w.add(w.mul(t, self["batch"]), b), self["channels"])
        index = w.add(w.add(before, n), self["first"])
        low, high, below = (w.trunc(self[name], I32) for name in ("key_low", "key_high", "below"))
        scale = w.bitcast(self["scale"], DOUBLE)
        scale = scale if self.kind == DOUBLE else w.fptrunc(scale, FLOAT)
        return {"kept": w.kept(index, [low, high], below, scale)}

    def lines(self, trace: Trace, values: dict, flushed: Sequence[Value]) -> None:
        """Writes the lines of a trace, and adds their values."""
        for line in trace.lines:
            arguments = [self.value(argument, values) for argument in line.arguments]
            value = self.writer.line(line, arguments)
            values[line.name] = self.writer.flush(value) if line.name in flushed else value

    def value(self, value: Value, values: dict[str, ir.Value]) -> ir.Value:
        """A number, or the value of a name."""
        return values[value] if isinstance(value, str) else self.writer.number(value)

    def add_to(
        self, total: ir.Value, n: ir.Value, products: Sequence[Product], values: dict
    ) -> None:
        """Adds a coefficient's gradient to its sums."""
        w, parts = self.writer, []
        for negative, factors in products:
            doubles = [self.value(factor, values) for factor in factors]
            if self.kind != DOUBLE:
                doubles = [w.fpext(factor, w.vector(DOUBLE)) for factor in doubles]
            part = reduce(w.fmul, doubles)
            parts.append(w.fneg(part) if negative else part)
        w.write(w.fadd(w.read(total, n), reduce(w.fadd, parts)), total, n)
