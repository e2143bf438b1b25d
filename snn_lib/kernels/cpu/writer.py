"""Writes LLVM instructions: loops, and elementary operations on several numbers at once.

:class:`Writer` writes them, and :class:`Frame` puts a kernel around them.

A value is a vector of ``width`` neighbouring channels, or a single number if the width is 1.
Multiplications and additions of a step are not fused, except within :meth:`Writer.exp`: fused, they
round differently from plain PyTorch, and neurons would fire at other times.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

from snn_lib.kernels.trace import Line, UnknownOperationError

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT, DOUBLE, VOID = ir.FloatType(), ir.DoubleType(), ir.VoidType()
WORDS = I64.as_pointer()
KERNEL = ir.FunctionType(VOID, [I64, I64, I64, WORDS])  # its thread, first, last, and arguments
# What a recurrence carries on is set to zero below it, in float and in double. A decaying trace
# would otherwise end in denormal numbers, with which a CPU computes ten times slower.
TINY, TINY_DOUBLE = 1e-30, 1e-300
ORDERED = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "=="}
# The operations of a trace that are instructions of LLVM's.
INSTRUCTIONS = {
    **{"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv", "neg": "fneg"},
    **{"where": "select", "logical_and": "and_", "logical_or": "or_", "logical_not": "not_"},
}
BYTES = {I16: 2, FLOAT: 4, DOUBLE: 8}
FUSED = ("contract",)


class Writer(ir.IRBuilder):
    """Writes instructions for one width at a time.

    Attributes:
        type_: the type that computes, ``FLOAT`` or ``DOUBLE``.
        width: the number of channels in a value.
    """

    def __init__(self, block: ir.Block, type_: ir.Type) -> None:
        super().__init__(block)
        self.type, self.width = type_, 1

    # ---------------------------------------------------------------------------------------------
    # Numbers and loops

    def number(self, value: float, type_: ir.Type | None = None) -> ir.Constant:
        """A constant in every place of a value."""
        type_ = type_ or self.type
        if self.width == 1:
            return ir.Constant(type_, value)
        return ir.Constant(ir.VectorType(type_, self.width), [value] * self.width)

    def vector(self, type_: ir.Type) -> ir.Type:
        """The type of a value, or of the values of all lanes, of this type."""
        return type_ if self.width == 1 else ir.VectorType(type_, self.width)

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller of two indices."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    @contextmanager
    def counting(
        self, first: ir.Value, last: ir.Value, by: int = 1
    ) -> Iterator[tuple[ir.Value, ir.Value]]:
        """A loop over ``range(first, last, by)``; counts down from ``first`` if ``by`` is negative.

        Yields the index, and an address that holds it after the loop.
        """
        place = self.in_entry(I64)
        self.store(first, place)
        head, body, after = (self.append_basic_block(name) for name in ("head", "body", "after"))
        self.branch(head)
        self.position_at_end(head)
        index = self.load(place)
        self.cbranch(self.icmp_signed("<" if by > 0 else ">=", index, last), body, after)
        self.position_at_end(body)
        yield index, place
        self.store(self.add(index, I64(by)), place)
        self.branch(head)
        self.position_at_end(after)

    def in_entry(self, type_: ir.Type) -> ir.Value:
        """Room for a variable, which the optimiser turns into a register."""
        with self.goto_entry_block():
            return self.alloca(type_)

    def each_channel(
        self, first: ir.Value, last: ir.Value, width: int, body: Callable[[ir.Value], None]
    ) -> None:
        """Writes ``body(n)`` for ``width`` channels at once, and then for those that are left."""
        whole = self.sub(last, I64(width - 1))
        self.width = width
        with self.counting(first, whole, width) as (n, place):
            body(n)
        self.width = 1
        with self.counting(self.load(place), last) as (n, _):
            body(n)

    # ---------------------------------------------------------------------------------------------
    # Memory

    def read(self, row: ir.Value, n: ir.Value) -> ir.Value:
        """The value at channel ``n``; bfloat16, of 16 bits, is the upper half of a float."""
        pointer, element = self.gep(row, [n]), row.type.pointee
        pointer = self.bitcast(pointer, self.vector(element).as_pointer())
        loaded = self.load(pointer, align=BYTES[element])
        if element != I16:
            return loaded
        wide = self.shl(self.zext(loaded, self.vector(I32)), self.number(16, I32))
        return self.bitcast(wide, self.vector(FLOAT))

    def write(self, value: ir.Value, row: ir.Value, n: ir.Value) -> None:
        """Stores a value at channel ``n``; to bfloat16 it is rounded, on a tie to the even one."""
        element = row.type.pointee
        if element == I16:
            value = self.trunc(self.upper_half(value), self.vector(I16))
        pointer = self.bitcast(self.gep(row, [n]), self.vector(element).as_pointer())
        self.store(value, pointer, align=BYTES[element])

    def upper_half(self, value: ir.Value) -> ir.Value:
        """The bits of a float that bfloat16 has, rounded; 32 bits, of which the upper are zero."""
        bits = self.bitcast(value, self.vector(I32))
        odd = self.and_(self.lshr(bits, self.number(16, I32)), self.number(1, I32))
        bits = self.add(self.add(bits, self.number(0x7FFF, I32)), odd)
        rounded = self.lshr(bits, self.number(16, I32))
        nan = self.fcmp_unordered("uno", value, value)
        return self.select(nan, self.number(0x7FC0, I32), rounded)

    def copy(self, source: ir.Value, target: ir.Value, first: ir.Value, last: ir.Value) -> None:
        """Copies the channels from ``first`` to ``last`` of a row."""
        type_, move = source.type.pointee, [I8.as_pointer(), I8.as_pointer(), I64]
        function = self.module.declare_intrinsic("llvm.memcpy", move)
        rows = (self.bitcast(self.gep(row, [first]), move[0]) for row in (target, source))
        count = self.mul(self.sub(last, first), I64(BYTES[type_]))
        self.call(function, [*rows, count, I1(0)])

    def prefetch(self, row: ir.Value, n: ir.Value) -> None:
        """Asks the CPU to load channel ``n`` ahead of its use, since it does not guess such jumps.

        An address that does not exist does no harm.
        """
        if self.width == 1:
            return
        kinds = [I8.as_pointer(), I32, I32, I32]
        type_ = ir.FunctionType(VOID, kinds)
        function = self.module.declare_intrinsic("llvm.prefetch", kinds[:1], type_)
        read, keep, data = I32(0), I32(3), I32(1)
        self.call(function, [self.bitcast(self.gep(row, [n]), kinds[0]), read, keep, data])

    # ---------------------------------------------------------------------------------------------
    # Arithmetic

    def line(self, line: Line, values: list[ir.Value]) -> ir.Value:
        """The value of a trace's line."""
        match line.operation, values:
            case name, _ if name in INSTRUCTIONS:
                return getattr(self, INSTRUCTIONS[name])(*values)
            case ("maximum" | "minimum") as name, [a, b]:
                chosen = self.fcmp_ordered(">" if name == "maximum" else "<", a, b)
                chosen = self.or_(chosen, self.fcmp_unordered("uno", a, a))  # nan is passed on
                return self.select(chosen, a, b)
            case "ne", [a, b]:
                return self.fcmp_unordered("!=", a, b)
            case name, [a, b] if name in ORDERED:
                return self.fcmp_ordered(ORDERED[name], a, b)
            case "abs", [a]:
                return self.intrinsic("llvm.fabs", a)
            case "sqrt", [a]:
                return self.intrinsic("llvm.sqrt", a)
            case "round", [a]:  # to bfloat16; a double becomes a float first, as in PyTorch
                single = a if self.type == FLOAT else self.fptrunc(a, self.vector(FLOAT))
                bits = self.shl(self.upper_half(single), self.number(16, I32))
                rounded = self.bitcast(bits, self.vector(FLOAT))
                return rounded if self.type == FLOAT else self.fpext(rounded, self.vector(DOUBLE))
            case "exp", [a] if self.type == FLOAT:
                return self.exp(a)
            case ("exp" | "log" | "tanh" | "sin" | "cos") as name, [a]:
                return self.each_alone(name, a)
        raise UnknownOperationError(f"the CPU's kernels have no {line.operation}")

    def intrinsic(self, name: str, *values: ir.Value) -> ir.Value:
        """A function that LLVM has for vectors too."""
        lanes = f"v{self.width}" if self.width > 1 else ""
        type_ = ir.FunctionType(values[0].type, [value.type for value in values])
        function = self.function_named(f"{name}.{lanes}f{8 * BYTES[self.type]}", type_)
        return self.call(function, values)

    def function_named(self, name: str, type_: ir.FunctionType) -> ir.Function:
        """A function from outside the module."""
        return self.module.globals.get(name) or ir.Function(self.module, type_, name)

    def each_alone(self, name: str, a: ir.Value) -> ir.Value:
        """A function of the C library, in double precision, for one number after the other."""
        function = self.function_named(name, ir.FunctionType(DOUBLE, [DOUBLE]))

        def of(number: ir.Value) -> ir.Value:
            if self.type == DOUBLE:
                return self.call(function, [number])
            return self.fptrunc(self.call(function, [self.fpext(number, DOUBLE)]), FLOAT)

        if self.width == 1:
            return of(a)
        for lane in map(I32, range(self.width)):
            a = self.insert_element(a, of(self.extract_element(a, lane)), lane)
        return a

    def exp(self, a: ir.Value) -> ir.Value:
        """e^a in float; zero below ``TINY``.

        It is 2^y. Split y = k + r with an integer k and |r| <= 1/2. A Taylor series gives 2^r, and
        k is added to its exponent. Adding 1.5 * 2^23 rounds y to k and leaves k in the last bits of
        the sum.
        """
        y = self.fmul(a, self.number(1 / math.log(2)))
        low, high, magic = map(self.number, (-126.0, 127.0, 12582912.0))
        inside = self.select(self.fcmp_ordered("<", y, low), low, y)
        inside = self.select(self.fcmp_ordered(">", y, high), high, inside)
        shifted = self.fadd(inside, magic)
        r = self.fsub(inside, self.fsub(shifted, magic))
        e = self.number(1.5403530e-4)
        for term in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0):
            e = self.fadd(self.fmul(e, r, flags=FUSED), self.number(term), flags=FUSED)
        exponent = self.shl(self.bitcast(shifted, self.vector(I32)), self.number(23, I32))
        power = self.add(self.bitcast(e, self.vector(I32)), exponent)
        power = self.bitcast(power, self.vector(FLOAT))
        lowest = self.number(math.log2(TINY))
        power = self.select(self.fcmp_ordered("<", y, lowest), self.number(0.0), power)
        power = self.select(self.fcmp_ordered(">", y, high), self.number(math.inf), power)
        return self.select(self.fcmp_unordered("uno", a, a), a, power)

    def flush(self, a: ir.Value) -> ir.Value:
        """Zero where a value is smaller than ``TINY``, or in double than ``TINY_DOUBLE``."""
        tiny = self.number(TINY_DOUBLE if self.type == DOUBLE else TINY)
        small = self.fcmp_ordered("<", self.intrinsic("llvm.fabs", a), tiny)
        return self.select(small, self.number(0.0), a)

    def dropout_scale(
        self, index: ir.Value, key: list[ir.Value], below: ir.Value, scale: ir.Value
    ) -> ir.Value:
        """Dropout's factors of spikes, from element number ``index`` on: zero, or the scale.

        See ``eager.dropout_scale``. Elements are counted in 32 bits, as the hash is.
        """
        h = self.spread(self.trunc(index, I32))
        if self.width > 1:
            lanes = ir.Constant(ir.VectorType(I32, self.width), list(range(self.width)))
            h = self.add(h, lanes)
        for half in key:
            h = self.xor(h, self.spread(half))
            for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
                h = self.xor(h, self.lshr(h, self.number(shift, I32)))
                h = h if factor is None else self.mul(h, self.number(factor, I32))
        kept = self.icmp_unsigned(">=", h, self.spread(below))
        return self.select(kept, self.spread(scale), self.number(0.0))

    def spread(self, a: ir.Value) -> ir.Value:
        """One number in every place of a value."""
        if self.width == 1:
            return a
        nothing = ir.Constant(ir.VectorType(a.type, self.width), ir.Undefined)
        return self.shuffle(self.insert_element(nothing, a, I32(0)), nothing, [0] * self.width)

    def shuffle(self, a: ir.Value, b: ir.Value, places: Sequence[int]) -> ir.Value:
        """The numbers at these places of two values, which are counted through."""
        return self.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(places)), places))


class Frame:
    """A kernel that is being written: its arguments, of 64 bits each, and its threads' shares.

    Attributes:
        writer: writes its instructions.
        thread, first, last: the thread that runs it, and which items are this thread's.
    """

    def __init__(self, name: str, arguments: Sequence[str], type_: ir.Type) -> None:
        function = ir.Function(ir.Module(name), KERNEL, "kernel")
        self.thread, self.first, self.last, memory = function.args
        self.writer = w = Writer(function.append_basic_block(), type_)
        self._arguments = {
            name: w.load(w.gep(memory, [I64(place)])) for place, name in enumerate(arguments)
        }

    def __getitem__(self, name: str) -> ir.Value:
        return self._arguments[name]

    def row(self, name: str, type_: ir.Type, offset: ir.Value) -> ir.Value:
        """The address of an element of a tensor."""
        return self.writer.gep(self.writer.inttoptr(self[name], type_.as_pointer()), [offset])

    def text(self) -> str:
        """The module with the kernel, and with its share for a thread of OpenMP's."""
        self.writer.ret_void()
        module = self.writer.module
        share = ir.Function(module, ir.FunctionType(VOID, [WORDS]), "share")
        w = Writer(share.append_basic_block(), self.writer.type)
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
