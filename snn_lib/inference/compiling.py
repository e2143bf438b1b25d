"""How the functions of this folder are compiled, where that is kept, and how they call kernels.

:func:`run_step` runs a cell by its kernel of ``snn_lib.kernels.cpu``.
"""

import contextlib
import hashlib
from collections.abc import Callable
from importlib.resources import files

from numba import njit, types
from numba.core import event as events
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from snn_lib.kernels.cpu.library import announce
from snn_lib.kernels.cpu.source import call_for_one_step
from snn_lib.kernels.cpu.writer import I64

# Numba's memory manager is off. With it, every view of a row would count its references, and
# threads that count on the same array take longer over that than over the arithmetic.
#
# The wrappers by which Python and C call a function take time to compile. ``run`` alone needs one.
OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    "_nrt": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}

# Numba looks a function up in its cache by name and by the state of the function's own file. What
# the other files of this folder and ``source`` compile into it is not noticed, so their content is
# in the name.
_SOURCES = sorted(file for file in files(__package__).iterdir() if file.name.endswith(".py"))
_SOURCES += [files("snn_lib.kernels.cpu") / "source.py"]
VERSION = hashlib.sha256(b"".join(file.read_bytes() for file in _SOURCES)).hexdigest()[:8]


class _Cache(FunctionCache):
    """Numba's files on disk, without which a function is compiled anew."""

    def load_overload(self, *arguments: object) -> object:
        """Reads a compiled function; if a file is damaged, forgets all that are kept."""
        try:
            return super().load_overload(*arguments)
        except Exception:  # a file may hold anything
            with contextlib.suppress(OSError):
                self.flush()

    def save_overload(self, *arguments: object) -> None:
        """Writes a compiled function, unless the disk is full, for example."""
        with contextlib.suppress(OSError):
            super().save_overload(*arguments)


def jit(function: Callable, **options: object) -> Callable:
    """Compiles a function with Numba, without the GIL; on disk where a folder can be written.

    ``options`` are Numba's.
    """
    function.__qualname__ += f"_{VERSION}"
    compiled = njit(**OPTIONS | options)(function)
    with contextlib.suppress(RuntimeError):  # Numba finds no folder for its cache
        compiled._cache = _Cache(function)
    return compiled


@intrinsic
def run_step(typing_context, kernel, channels, coefficients, state, x, out):
    """Runs one step of one sample by a kernel of ``snn_lib.kernels.cpu``, given its address."""

    def generate(context, builder, signature, values):
        function, channels, *arrays = values
        kinds, names = signature.args[2:], ("coefficients", "state", "x", "output")
        addresses = {
            name: builder.ptrtoint(context.make_array(kind)(context, builder, value).data, I64)
            for name, kind, value in zip(names, kinds, arrays, strict=True)
        }
        call_for_one_step(builder, function, channels, **addresses)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, coefficients, state, x, out), generate


class _Announcement(events.Listener):
    """Says once that functions are being compiled and not read from the cache."""

    def on_start(self, event: events.Event) -> None:
        module = event.data["dispatcher"].py_func.__module__  # a function of exec has none
        if module is not None and module.startswith("snn_lib."):
            announce()

    def on_end(self, event: events.Event) -> None:
        pass


events.register("numba:compile", _Announcement())
