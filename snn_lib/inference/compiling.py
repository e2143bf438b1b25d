"""How the functions of this folder are compiled, and where the result is kept."""

import hashlib
import sys
from collections.abc import Callable
from importlib.resources import files

from llvmlite import ir
from numba import njit, types
from numba.core import event as events
from numba.extending import intrinsic
from tqdm import tqdm

# Numba's memory manager is off. With it, every view of a row would count its references, and
# threads that count on the same array take longer over that than over the arithmetic.
OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}

# Numba looks a function up in its cache by name and by the state of the function's own file. What
# the other files of this folder compile into it is not noticed, so their content is in the name.
_SOURCES = sorted(file for file in files(__package__).iterdir() if file.name.endswith(".py"))
VERSION = hashlib.sha256(b"".join(file.read_bytes() for file in _SOURCES)).hexdigest()[:8]


def jit(function: Callable, **options: object) -> Callable:
    """Compiles a function with Numba, without the GIL; on disk where a folder can be written.

    ``options`` are Numba's.
    """
    function.__qualname__ += f"_{VERSION}"
    try:
        return njit(cache=True, **OPTIONS, **options)(function)
    except RuntimeError:  # Numba found no folder for its cache
        return njit(**OPTIONS, **options)(function)


@intrinsic
def call_kernel(typing_context, kernel, words):
    """Calls a kernel of ``snn_lib.kernels.cpu`` on one tile, by its address and its arguments'."""

    def generate(context, builder, signature, values):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word, word.as_pointer()])
        function = builder.inttoptr(values[0], kind.as_pointer())
        arguments = builder.inttoptr(values[1], word.as_pointer())
        builder.call(function, [word(0), word(0), word(1), arguments])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


class _Announcement(events.Listener):
    """Says once, at a terminal, that functions are being compiled and not read from the cache.

    A notebook or a log file gets no such line: nobody waits there and wonders.
    """

    made = False

    def on_start(self, event: events.Event) -> None:
        module = event.data["dispatcher"].py_func.__module__  # a function of exec has none
        ours = module is not None and module.startswith("snn_lib.")
        if ours and not self.made and sys.stderr is not None and sys.stderr.isatty():
            self.made = True
            tqdm.write("first use: compiling for this CPU (about 8 s)", file=sys.stderr)

    def on_end(self, event: events.Event) -> None:
        pass


events.register("numba:compile", _Announcement())
