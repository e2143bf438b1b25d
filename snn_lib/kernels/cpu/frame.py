"""A kernel that is being written in LLVM's language: how it gets its arguments and its threads."""

from collections.abc import Sequence

from llvmlite import ir

from snn_lib.kernels.cpu.writer import I32, I64, VOID, Writer


class Frame:
    """A kernel that is being written, and its arguments of 64 bits each.

    Attributes:
        writer: writes its instructions.
        thread, first, last: the thread that runs it, and which items are this thread's.
    """

    def __init__(self, name: str, arguments: Sequence[str], kind: ir.Type) -> None:
        words = I64.as_pointer()
        kernel = ir.FunctionType(VOID, [I64, I64, I64, words])
        function = ir.Function(ir.Module(name), kernel, "kernel")
        self.thread, self.first, self.last, memory = function.args
        self.writer = w = Writer(function.append_basic_block(), kind)
        self._arguments = {
            name: w.load(w.gep(memory, [I64(place)])) for place, name in enumerate(arguments)
        }

    def __getitem__(self, name: str) -> ir.Value:
        return self._arguments[name]

    def row(self, name: str, kind: ir.Type, offset: ir.Value) -> ir.Value:
        """The address of an element of a tensor."""
        return self.writer.gep(self.writer.inttoptr(self[name], kind.as_pointer()), [offset])

    def text(self) -> str:
        """The module with the kernel, and with its share for a thread of OpenMP's."""
        self.writer.ret_void()
        module = self.writer.module
        words = I64.as_pointer()
        share = ir.Function(module, ir.FunctionType(VOID, [words]), "share")
        w = Writer(share.append_basic_block(), self.writer.kind)
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
