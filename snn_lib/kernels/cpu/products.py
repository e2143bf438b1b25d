"""Products of a matrix of spikes on the CPU, which read nothing for what did not fire.

Both products of a layer of weights have the form ``y[i, n] = sum over j of a[i, j] b[j, n]``:

    output[row, n]        = bias[n] + sum over inputs of spikes[row, input] weight[n, input]
    gradient[input, n]    = sum over rows of spikes[row, input] grad_output[row, n]

For each i, the kernel lists the j that are not zero. It then reads the list once for each panel of
columns n, whose sums lie in registers. Where most are not zero, it takes a few i together with all
their j, as a product of dense matrices does. Both ways add the same numbers in the same order, so
the choice changes no bit, and neither do the number of threads and the rows beside a row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.frame import Frame
from snn_lib.kernels.cpu.library import Kernel, kernel
from snn_lib.kernels.cpu.source import KINDS
from snn_lib.kernels.cpu.tiles import SMALL
from snn_lib.kernels.cpu.writer import FLOAT, I1, I32, I64
from snn_lib.kernels.program import remember

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
WORD = 64  # spikes that are looked at together
MOST = 1, 2  # the part of all j
TOGETHER = 3  # the i that are taken together where most j are not zero
ROWS = 192  # rows of spikes whose lists are kept, so that a panel of the weights stays in the cache
BLOCK = 512  # rows that a gradient adds up at once, so that a panel of them stays in the cache

# The arguments of the kernels. ``lists`` has room for so many lists of each thread, of a length.
ROOM = ["counts", "lists", "count", "length"]
WEIGH = ["spikes", "weights", "bias", "output", "inputs", "outputs", *ROOM]
GRADIENT = ["spikes", "grad_output", "gradient", "rows", "inputs", "outputs", *ROOM]


@cache
def registers() -> tuple[int, int]:
    """Numbers in a register of this CPU, and the registers that hold the sums of a panel."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 8
    return (8, 4) if features.get("avx2") else (4, 4)


@dataclass(frozen=True)
class Task:
    """The dtypes of a product: of the spikes, and of all else."""

    spikes: str
    dtype: str


@remember
def _weigh(task: Task) -> Kernel:
    return kernel(weigh_source(task))


@remember
def _gradient(task: Task) -> Kernel:
    return kernel(gradient_source(task))


def weigh(spikes: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weighted spikes ``(R, N)``, of spikes ``(R, K)`` and weights ``(N, K)``."""
    (rows, inputs), outputs = spikes.shape, len(weight)
    spikes, across = spikes.contiguous(), weight.t().contiguous()
    bias = torch.zeros(outputs) if bias is None else bias.float().contiguous()
    output = torch.empty(rows, outputs, dtype=weight.dtype)
    threads = _threads(rows, output)
    room = _room(threads, min(rows, ROWS), inputs)
    given = spikes, across, bias, output, inputs, outputs, *room
    _run(_weigh(Task(NAMES[spikes.dtype], NAMES[weight.dtype])), threads, rows, given)
    return output


def gradient(spikes: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of the weights ``(N, K)``, of spikes ``(R, K)`` and gradients ``(R, N)``."""
    (rows, inputs), outputs = spikes.shape, grad_output.shape[1]
    spikes, grad_output = spikes.contiguous(), grad_output.contiguous()
    found, words = torch.zeros(inputs, outputs), -(-inputs // WORD)
    threads = _threads(words, grad_output)
    room = _room(threads, -(-words // threads) * WORD, min(rows, BLOCK))
    given = spikes, grad_output, found, rows, inputs, outputs, *room
    _run(_gradient(Task(NAMES[spikes.dtype], NAMES[grad_output.dtype])), threads, words, given)
    return found.t().to(grad_output.dtype, memory_format=torch.contiguous_format)


def _threads(items: int, result: Tensor) -> int:
    alone = result.numel() <= SMALL
    return 1 if alone else max(1, min(torch.get_num_threads(), items))


def _room(threads: int, count: int, length: int) -> tuple[Tensor, Tensor, int, int]:
    """Room for so many lists of each thread, for how long each is, and both sizes."""
    count += TOGETHER
    counts = torch.zeros(threads, count, dtype=torch.int64)
    return counts, torch.empty(threads, count, length, dtype=torch.int64), count, length


def _run(made: Kernel, threads: int, items: int, given: Sequence[Tensor | int]) -> None:
    words = [value.data_ptr() if isinstance(value, Tensor) else value for value in given]
    openmp.run(made, threads, items, words)


def weigh_source(task: Task) -> str:
    """The kernel of the weighted spikes, see :data:`WEIGH`; threads share the rows."""
    product = _Product("weigh", WEIGH, task)
    w, inputs, outputs = product.writer, product["inputs"], product["outputs"]
    words = w.sdiv(w.add(inputs, I64(WORD - 1)), I64(WORD))
    with w.counting(product.first, product.last, ROWS) as (begin, _):
        count = w.smaller(w.sub(product.last, begin), I64(ROWS))
        spikes = product.row("spikes", KINDS[task.spikes], w.mul(begin, inputs))
        with w.counting(I64(0), count) as (i, _):
            row = w.gep(spikes, [w.mul(i, inputs)])
            product.clear(i)
            with product.each_spike(row, I64(0), words) as j:
                product.note(i, j, w.read(row, j))

        def finish(i: ir.Value, column: ir.Value, sums: list[ir.Value]) -> None:
            row = product.row("output", KINDS[task.dtype], w.mul(w.add(begin, i), outputs))
            for place, total in product.places(column):
                w.write(w.load(sums[total]), row, place)

        product.multiply(
            count,
            inputs,
            start=lambda place: w.read(product.row("bias", FLOAT, I64(0)), place),
            a=lambda i, j: w.read(w.gep(spikes, [w.mul(i, inputs)]), j),
            b=lambda j: product.row("weights", KINDS[task.dtype], w.mul(j, outputs)),
            finish=finish,
        )
    return product.text()


def gradient_source(task: Task) -> str:
    """The kernel of the weights' gradient, see :data:`GRADIENT`; threads share words of inputs."""
    product = _Product("gradient", GRADIENT, task)
    w, inputs, outputs = product.writer, product["inputs"], product["outputs"]
    first_input = w.mul(product.first, I64(WORD))
    count = w.sub(w.smaller(w.mul(product.last, I64(WORD)), inputs), first_input)
    with w.counting(I64(0), product["rows"], BLOCK) as (begin, _):
        length = w.smaller(w.sub(product["rows"], begin), I64(BLOCK))
        spikes = product.row("spikes", KINDS[task.spikes], w.mul(begin, inputs))
        with w.counting(I64(0), count) as (i, _):
            product.clear(i)
        with w.counting(I64(0), length) as (j, _):
            row = w.gep(spikes, [w.mul(j, inputs)])
            with product.each_spike(row, product.first, product.last) as n:
                product.note(w.sub(n, first_input), j, w.read(row, n))

        def finish(i: ir.Value, column: ir.Value, sums: list[ir.Value]) -> None:
            row = product.row("gradient", FLOAT, w.mul(w.add(first_input, i), outputs))
            for place, total in product.places(column):
                before = w.read(row, place)
                added = w.fadd(before, w.load(sums[total]))
                # where this panel overlaps with the one before it, that one has added already
                w.write(w.select(product.is_new(place), added, before), row, place)

        product.multiply(
            count,
            length,
            start=lambda place: w.number(0.0),
            a=lambda i, j: w.read(w.gep(spikes, [w.mul(j, inputs)]), w.add(first_input, i)),
            b=lambda j: product.row(
                "grad_output", KINDS[task.dtype], w.mul(w.add(begin, j), outputs)
            ),
            finish=finish,
        )
    return product.text()


class _Product(Frame):
    """A kernel that is being written: its lists and its panels."""

    def __init__(self, name: str, arguments: Sequence[str], task: Task) -> None:
        super().__init__(name, arguments, FLOAT)
        self.lanes, self.vectors = registers()

    # ---------------------------------------------------------------------------------------------
    # Lists

    @contextmanager
    def each_spike(
        self, row: ir.Value, first: ir.Value, last: ir.Value
    ) -> Iterator[ir.Value]:
        """The loop over the spikes of a row, within words ``first`` to ``last``."""
        w = self.writer
        left = w.in_entry(I64)
        with w.counting(first, last) as (word, _):
            # The last word begins earlier, so that it ends with the row.
            place = w.mul(word, I64(WORD))
            begin = w.smaller(place, w.sub(self["inputs"], I64(WORD)))
            w.width = WORD
            fired = w.fcmp_unordered("!=", w.read(row, begin), w.number(0.0))
            w.width = 1
            bits = w.and_(w.bitcast(fired, I64), w.shl(I64(-1), w.sub(place, begin)))
            w.store(bits, left)
            with w.counting(I64(0), w.ctpop(bits)):
                bits = w.load(left)
                w.store(w.and_(bits, w.sub(bits, I64(1))), left)
                yield w.add(begin, w.cttz(bits, I1(1)))

    def clear(self, i: ir.Value) -> None:
        """Begins the list of i anew."""
        self.writer.store(I64(0), self._count(i))

    def note(self, i: ir.Value, j: ir.Value, value: ir.Value) -> None:
        """Adds j to the list of i, with its value."""
        w, place = self.writer, self._count(i)
        count = w.load(place)
        index, number = self._entry(i, count)
        w.store(w.trunc(j, I32), index)
        w.store(value, number)
        w.store(w.add(count, I64(1)), place)

    def _count(self, i: ir.Value) -> ir.Value:
        """The address of the length of a list."""
        w = self.writer
        return self.row("counts", I64, w.add(w.mul(self.thread, self["count"]), i))

    def _entry(self, i: ir.Value, place: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The addresses of an index and of its value, in the list of i."""
        w = self.writer
        number = w.add(w.mul(self.thread, self["count"]), i)
        entry = self.row("lists", I64, w.add(w.mul(number, self["length"]), place))
        value = w.gep(w.bitcast(entry, FLOAT.as_pointer()), [I64(1)])
        return w.bitcast(entry, I32.as_pointer()), value

    # ---------------------------------------------------------------------------------------------
    # Panels

    def multiply(
        self,
        count: ir.Value,
        length: ir.Value,
        start: Callable,
        a: Callable,
        b: Callable,
        finish: Callable,
    ) -> None:
        """Writes the product of ``count`` rows i and ``length`` rows j."""
        w, panel = self.writer, self.lanes * self.vectors
        full = w.mul(length, I64(TOGETHER * MOST[0]))
        with w.counting(I64(0), self["outputs"], panel) as (begin, _):
            self.begin = begin
            column = w.smaller(begin, w.sub(self["outputs"], I64(panel)))
            with w.counting(I64(0), count, TOGETHER) as (i, _):
                end = w.smaller(count, w.add(i, I64(TOGETHER)))
                together = [w.add(i, I64(n)) for n in range(TOGETHER)]
                fired = reduce(w.add, [w.load(self._count(n)) for n in together])
                many = w.icmp_signed(">=", w.mul(fired, I64(MOST[1])), full)
                many = w.and_(many, w.icmp_signed("==", end, w.add(i, I64(TOGETHER))))
                with w.if_else(many) as (dense, sparse):
                    with dense:
                        self._take(column, together, length, start, a, b, finish)
                    with sparse, w.counting(i, end) as (n, _):
                        self._skip(column, n, start, b, finish)

    def _skip(self, column, i, start, b, finish):
        w = self.writer
        sums = self._start(column, start)
        with w.counting(I64(0), w.load(self._count(i))) as (place, _):
            index, number = self._entry(i, place)
            self._add(column, [sums], [w.load(number)], b(w.sext(w.load(index), I64)))
        w.width = self.lanes
        finish(i, column, sums)
        w.width = 1

    def _take(self, column, together, length, start, a, b, finish):
        w = self.writer
        sums = [self._start(column, start) for _ in together]
        with w.counting(I64(0), length) as (j, _):
            self._add(column, sums, [a(i, j) for i in together], b(j))
        w.width = self.lanes
        for i, one in zip(together, sums, strict=True):
            finish(i, column, one)
        w.width = 1

    def _start(self, column, start):
        w = self.writer
        w.width = self.lanes
        sums = [w.in_entry(w.vector(FLOAT)) for _ in range(self.vectors)]
        for place, total in self.places(column):
            w.store(start(place), sums[total])
        w.width = 1
        return sums

    def _add(self, column, sums, values, row):
        w = self.writer
        w.width = self.lanes
        values = [w.spread(value) for value in values]
        for place, total in self.places(column):
            factor = w.read(row, place)
            for one, value in zip(sums, values, strict=True):
                sum_ = w.intrinsic("llvm.fmuladd", value, factor, w.load(one[total]))
                w.store(sum_, one[total])
        w.width = 1

    def places(self, column):
        """The columns at which the registers of a panel begin, and their numbers."""
        w = self.writer
        return [(w.add(column, I64(n * self.lanes)), n) for n in range(self.vectors)]

    def is_new(self, place: ir.Value) -> ir.Value:
        """Whether columns from ``place`` on belong to this panel alone."""
        w = self.writer
        missing = w.spread(w.trunc(w.sub(self.begin, place), I32))
        lanes = ir.Constant(ir.VectorType(I32, w.width), list(range(w.width)))
        return w.icmp_signed(">=", lanes, missing)
