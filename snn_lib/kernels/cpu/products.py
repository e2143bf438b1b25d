"""Products of spikes with weights on the CPU, which read nothing for what did not fire.

    output[r, n]   = bias[n] + sum over k of spikes[r, k] weight[n, k]
    gradient[k, n] = sum over r of spikes[r, k] grad_output[r, n]

Both are sums of rows of a matrix. A kernel lists which rows belong to a sum, and then adds them up,
a panel of columns n at a time, whose sums lie in registers. Every sum has one order, that of k or
r, so results depend neither on the number of threads nor on the other rows. Where most inputs of a
few rows fired, the forward pass takes all k without a list. This changes no bit, because what it
adds is zero. The gradient of the spikes is the first product again, of grad_output with the weights
transposed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce

import torch
from llvmlite import ir
from torch import Tensor

from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.library import Kernel, has, kernel, vector_width
from snn_lib.kernels.cpu.source import TYPES
from snn_lib.kernels.cpu.writer import FLOAT, I1, I32, I64, Frame

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
WORD = 64  # inputs that are looked at together, as many as an integer has bits
ROWS = 192  # of spikes that are listed at once: so many sums read a panel while it is in the cache
BLOCK = 512  # rows, and inputs, that are listed at once for the gradient
TOGETHER = 3  # rows whose sums are taken together without lists, if half of their inputs fired

# The arguments of the kernels. Each thread has a number of lists, with room for some entries each.
LISTS = ["lengths", "lists", "number", "length"]
WEIGH = ["spikes", "weights", "bias", "output", "inputs", "outputs", "fired", *LISTS]
GRADIENT = ["spikes", "grad_output", "gradient", "rows", "inputs", "outputs", *LISTS]
TRANSPOSE = ["source", "target", "rows", "columns"]


@dataclass(frozen=True)
class Variant:
    """The dtypes and sizes for which a kernel is compiled.

    Attributes:
        spikes: the name of the dtype of the spikes.
        dtype: that of the weights, and so of the output and its gradient.
        lanes: the numbers in a register of the CPU.
        registers: those that hold the sums of a panel.
        word: the inputs that are looked at together.
    """

    spikes: str
    dtype: str
    lanes: int
    registers: int
    word: int = WORD


@cache
def variant_of(spikes: torch.dtype, weights: torch.dtype) -> Variant:
    """The variant for this CPU."""
    registers = 8 if has("avx512f") else 4  # of 32 or of 16; those of a group must fit
    return Variant(NAMES[spikes], NAMES[weights], vector_width(), registers)


def serves(spikes: torch.dtype, weights: torch.dtype, shape: torch.Size) -> bool:
    """Whether there are kernels for weights ``(N, K)``, which fill a panel and a word.

    A CPU that multiplies tiles of bfloat16 is left to do so.
    """
    if spikes not in NAMES or weights not in NAMES or len(shape) != 2:
        return False
    variant = variant_of(spikes, weights)
    tiles = weights == torch.bfloat16 and has("amx-bf16")
    return not tiles and shape[0] >= variant.lanes * variant.registers and shape[1] >= WORD


@cache
def _weigh(variant: Variant) -> Kernel:
    return kernel(weigh_source(variant))


@cache
def _gradient(variant: Variant) -> Kernel:
    return kernel(gradient_source(variant))


@cache
def _transpose(source: str, target: str, lanes: int) -> Kernel:
    return kernel(transpose_source(source, target, lanes))


def transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The transposed matrix in memory, several times as fast as by PyTorch."""
    rows, columns = matrix.shape
    matrix, result = matrix.contiguous(), matrix.new_empty(columns, rows, dtype=dtype)
    lanes = variant_of(matrix.dtype, dtype).lanes
    items = -(-rows // lanes)
    made = _transpose(NAMES[matrix.dtype], NAMES[dtype], lanes)
    threads = openmp.threads_for(items, result.numel())
    openmp.run(made, threads, items, [matrix, result, rows, columns])
    return result


def weigh(spikes: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weighted spikes ``(R, N)``, and how many of the spikes ``(R, K)`` are not zero."""
    (rows, inputs), outputs = spikes.shape, len(weight)
    spikes, weights = spikes.contiguous(), weight.t()
    if not weights.is_contiguous():  # as they are where spikes get their gradient
        weights = transposed(weight, weight.dtype)
    bias = spikes.new_zeros(outputs, dtype=torch.float32) if bias is None else bias.float()
    output = weight.new_empty(rows, outputs)
    threads = openmp.threads_for(rows, output.numel())
    fired = spikes.new_zeros(threads, dtype=torch.int64)
    given = spikes, weights, bias.contiguous(), output, inputs, outputs, fired
    made = _weigh(variant_of(spikes.dtype, weight.dtype))
    openmp.run(made, threads, rows, [*given, *lists(threads, min(rows, ROWS), inputs)])
    return output, fired.sum()


def gradient(grad_output: Tensor, spikes: Tensor) -> Tensor:
    """The gradient of the weights ``(N, K)``, of its output's ``(R, N)`` and spikes ``(R, K)``."""
    (rows, inputs), outputs = spikes.shape, grad_output.shape[1]
    spikes, grad_output = spikes.contiguous(), grad_output.contiguous()
    found = spikes.new_zeros(inputs, outputs, dtype=torch.float32)
    words = -(-inputs // WORD)
    threads = openmp.threads_for(words, grad_output.numel())
    made = _gradient(variant_of(spikes.dtype, grad_output.dtype))
    given = spikes, grad_output, found, rows, inputs, outputs
    openmp.run(made, threads, words, [*given, *lists(threads, BLOCK, min(rows, BLOCK))])
    return transposed(found, grad_output.dtype)


def lists(threads: int, number: int, length: int) -> tuple[Tensor, Tensor, int, int]:
    """Room for the lists and for their lengths."""
    number += TOGETHER  # so that a group of rows may be looked at beyond the last
    lengths = torch.zeros(threads, number, dtype=torch.int64, device="cpu")
    lists = torch.empty(threads, number, length, dtype=torch.int64, device="cpu")
    return lengths, lists, number, length


def weigh_source(variant: Variant) -> str:
    """The kernel of the weighted spikes, see :data:`WEIGH`. Threads share the rows."""
    product = Product("weigh", WEIGH, variant)
    w, inputs = product.writer, product["inputs"]
    words = product.words()
    fired, bias = product.row("fired", I64, product.thread), product.row("bias", FLOAT, I64(0))
    with w.counting(product.first, product.last, ROWS) as (begin, _):
        count = w.smaller(w.sub(product.last, begin), I64(ROWS))
        with w.counting(I64(0), count) as (i, _):
            row = product.spikes(w.add(begin, i))
            product.begin_list(i)
            with product.each_spike(row, I64(0), words) as k:
                product.append(i, k, w.read(row, k))
            w.store(w.add(w.load(fired), product.length(i)), fired)

        def start(column: ir.Value) -> list[ir.Value]:
            return product.sums(column, lambda n: w.read(bias, n))

        def finish(i: ir.Value, column: ir.Value, sums: list[ir.Value]) -> None:
            output = product.dense("output", w.add(begin, i))
            product.each_place(column, sums, lambda n, total: w.write(w.load(total), output, n))

        columns = product.panels(product["outputs"])
        with columns as column, w.counting(I64(0), count, TOGETHER) as (first, _):
            group = [w.add(first, I64(n)) for n in range(TOGETHER)]
            listed = reduce(w.add, [product.length(i) for i in group])
            many = w.icmp_signed(">=", w.mul(listed, I64(2)), w.mul(inputs, I64(TOGETHER)))
            whole = w.icmp_signed("<", group[-1], count)
            with w.if_else(w.and_(many, whole)) as (together, alone):
                with together:
                    rows = [product.spikes(w.add(begin, i)) for i in group]
                    totals = [start(column) for _ in group]
                    with w.counting(I64(0), inputs) as (k, _):
                        values = [w.read(row, k) for row in rows]
                        product.add(column, totals, values, product.dense("weights", k))
                    for i, sums in zip(group, totals, strict=True):
                        finish(i, column, sums)
                with alone:
                    last = w.smaller(count, w.add(first, I64(TOGETHER)))
                    with w.counting(first, last) as (i, _):
                        sums = start(column)
                        with product.each_entry(i) as (k, value):
                            product.add(column, [sums], [value], product.dense("weights", k))
                        finish(i, column, sums)
    return product.text()


def gradient_source(variant: Variant) -> str:
    """The kernel of the weights' gradient, see :data:`GRADIENT`. Threads share words of inputs."""
    product = Product("gradient", GRADIENT, variant)
    w, rows = product.writer, product["rows"]
    with (
        w.counting(product.first, product.last, BLOCK // WORD) as (first, _),
        w.counting(I64(0), rows, BLOCK) as (begin, _),
    ):
        last = w.smaller(product.last, w.add(first, I64(BLOCK // WORD)))
        before = w.mul(first, I64(WORD))
        count = w.sub(w.smaller(w.mul(last, I64(WORD)), product["inputs"]), before)
        length = w.smaller(w.sub(rows, begin), I64(BLOCK))
        with w.counting(I64(0), count) as (i, _):
            product.begin_list(i)
        with w.counting(I64(0), length) as (r, _):
            row = product.spikes(w.add(begin, r))
            with product.each_spike(row, first, last) as k:
                product.append(w.sub(k, before), r, w.read(row, k))
        columns = product.panels(product["outputs"])
        with columns as column, w.counting(I64(0), count) as (i, _):
            sums = product.sums(column, lambda n: w.number(0.0))
            with product.each_entry(i) as (r, value):
                product.add(column, [sums], [value], product.dense("grad_output", w.add(begin, r)))
            product.add_to(product.dense("gradient", w.add(before, i)), column, sums)
    return product.text()


def transpose_source(source: str, target: str, lanes: int) -> str:
    """The kernel that transposes a matrix, see :data:`TRANSPOSE`. Threads share its rows of tiles.

    In a tile, a register for each row, lanes and registers change places bit by bit of their
    numbers. The last tiles begin earlier, so that they end with the matrix.
    """
    frame = Frame("transpose", TRANSPOSE, FLOAT)
    w, rows, columns = frame.writer, frame["rows"], frame["columns"]

    def row_of(name: str, dtype: str, i: ir.Value, length: ir.Value) -> ir.Value:
        return frame.row(name, TYPES[dtype], w.mul(i, length))

    with w.counting(frame.first, frame.last) as (item, _):
        r = w.smaller(w.mul(item, I64(lanes)), w.sub(rows, I64(lanes)))
        with w.counting(I64(0), columns, lanes) as (c, _):
            c, w.width = w.smaller(c, w.sub(columns, I64(lanes))), lanes
            numbers = range(lanes)
            tile = [w.read(row_of("source", source, w.add(r, I64(n)), columns), c) for n in numbers]
            for bit in (1 << n for n in range(lanes.bit_length() - 1)):
                low = [n if not n & bit else lanes + n - bit for n in numbers]
                high = [n + bit if not n & bit else lanes + n for n in numbers]
                for n in (n for n in numbers if not n & bit):
                    pair = tile[n], tile[n + bit]
                    tile[n], tile[n + bit] = (w.shuffle(*pair, places) for places in (low, high))
            for n, column in zip(numbers, tile, strict=True):
                w.write(column, row_of("target", target, w.add(c, I64(n)), rows), r)
            w.width = 1
    return frame.text()


class Product(Frame):
    """A kernel that is being written: its lists and its panels."""

    def __init__(self, name: str, arguments: Sequence[str], variant: Variant) -> None:
        super().__init__(name, arguments, FLOAT)
        self.variant = variant

    def spikes(self, r: ir.Value) -> ir.Value:
        """A row of spikes."""
        return self.row("spikes", TYPES[self.variant.spikes], self.writer.mul(r, self["inputs"]))

    def dense(self, name: str, i: ir.Value) -> ir.Value:
        """A row of another matrix."""
        type_ = FLOAT if name == "gradient" else TYPES[self.variant.dtype]
        return self.row(name, type_, self.writer.mul(i, self["outputs"]))

    # ---------------------------------------------------------------------------------------------
    # Lists

    def words(self) -> ir.Value:
        """How many words a row of spikes has."""
        w, length = self.writer, self.variant.word
        return w.sdiv(w.add(self["inputs"], I64(length - 1)), I64(length))

    @contextmanager
    def each_spike(self, row: ir.Value, first: ir.Value, last: ir.Value) -> Iterator[ir.Value]:
        """The loop over what is not zero in the words of a row from ``first`` to ``last``."""
        w, length = self.writer, self.variant.word
        left = w.in_entry(I64)
        with w.counting(first, last) as (word, _):
            place = w.mul(word, I64(length))
            begin = w.smaller(place, w.sub(self["inputs"], I64(length)))  # the last ends the row
            w.width = length
            fired = w.fcmp_unordered("!=", w.read(row, begin), w.number(0.0))
            w.width = 1
            bits = w.bitcast(fired, ir.IntType(length))
            bits = bits if length == WORD else w.zext(bits, I64)
            bits = w.and_(bits, w.shl(I64(-1), w.sub(place, begin)))
            w.store(bits, left)
            with w.counting(I64(0), w.ctpop(bits)):
                bits = w.load(left)
                w.store(w.and_(bits, w.sub(bits, I64(1))), left)
                yield w.add(begin, w.cttz(bits, I1(1)))

    def begin_list(self, i: ir.Value) -> None:
        """Empties a list."""
        self.writer.store(I64(0), self._length(i))

    def length(self, i: ir.Value) -> ir.Value:
        """The length of a list."""
        return self.writer.load(self._length(i))

    def append(self, i: ir.Value, index: ir.Value, value: ir.Value) -> None:
        """Adds an entry to a list."""
        w, end = self.writer, self.length(i)
        for part, place in zip((w.trunc(index, I32), value), self._entry(i, end), strict=True):
            w.store(part, place)
        w.store(w.add(end, I64(1)), self._length(i))

    @contextmanager
    def each_entry(self, i: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """The loop over a list: indices and values."""
        w = self.writer
        with w.counting(I64(0), self.length(i)) as (place, _):
            index, value = map(w.load, self._entry(i, place))
            yield w.zext(index, I64), value

    def _list(self, i: ir.Value) -> ir.Value:
        return self.writer.add(self.writer.mul(self.thread, self["number"]), i)

    def _length(self, i: ir.Value) -> ir.Value:
        return self.row("lengths", I64, self._list(i))

    def _entry(self, i: ir.Value, place: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Where an index and its value are."""
        w = self.writer
        entry = self.row("lists", I64, w.add(w.mul(self._list(i), self["length"]), place))
        value = w.gep(w.bitcast(entry, FLOAT.as_pointer()), [I64(1)])
        return w.bitcast(entry, I32.as_pointer()), value

    # ---------------------------------------------------------------------------------------------
    # Panels

    @contextmanager
    def panels(self, length: ir.Value) -> Iterator[ir.Value]:
        """The loop over panels. The last one ends with the row, and may overlap with another."""
        w, width = self.writer, self.variant.lanes * self.variant.registers
        with w.counting(I64(0), length, width) as (begin, _):
            self._begin = begin
            yield w.smaller(begin, w.sub(length, I64(width)))

    def add_to(self, row: ir.Value, column: ir.Value, sums: list[ir.Value]) -> None:
        """Adds a panel to a row in memory."""
        w = self.writer

        def add(n: ir.Value, total: ir.Value) -> None:
            earlier = w.read(row, n)
            later = w.fadd(earlier, w.load(total))
            w.write(w.select(self._is_new(n), later, earlier), row, n)

        self.each_place(column, sums, add)

    def _is_new(self, n: ir.Value) -> ir.Value:
        """Which of the columns from n on were in no panel before."""
        w = self.writer
        lanes = ir.Constant(ir.VectorType(I32, w.width), list(range(w.width)))
        return w.icmp_signed(">=", lanes, w.spread(w.trunc(w.sub(self._begin, n), I32)))

    def sums(self, column: ir.Value, first: Callable[[ir.Value], ir.Value]) -> list[ir.Value]:
        """The registers of a panel, with their first values."""
        w = self.writer
        type_ = ir.VectorType(FLOAT, self.variant.lanes)
        sums = [w.in_entry(type_) for _ in range(self.variant.registers)]
        self.each_place(column, sums, lambda n, total: w.store(first(n), total))
        return sums

    def add(
        self,
        column: ir.Value,
        totals: Sequence[list[ir.Value]],
        values: Sequence[ir.Value],
        row: ir.Value,
    ) -> None:
        """Adds a row, times a value, to each of some panels."""
        w = self.writer

        def add_to_all(n: ir.Value, place: tuple[ir.Value, ...]) -> None:
            read = w.read(row, n)
            for total, value in zip(place, values, strict=True):
                w.store(w.intrinsic("llvm.fmuladd", w.spread(value), read, w.load(total)), total)

        self.each_place(column, [*zip(*totals, strict=True)], add_to_all)

    def each_place(self, column: ir.Value, registers: Sequence, body: Callable) -> None:
        """Writes ``body(n, register)`` for the column n at which each register begins."""
        w = self.writer
        w.width = self.variant.lanes
        for number, register in enumerate(registers):
            body(w.add(column, I64(number * self.variant.lanes)), register)
        w.width = 1
