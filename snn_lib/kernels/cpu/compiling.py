"""How the functions of this folder are compiled, and where the result is kept."""

import hashlib
import sys
from collections.abc import Callable
from importlib.resources import files

from numba import njit
from numba.core import event as events
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

    Multiplications and additions are not fused, unless a function asks for it: fused, they round
    differently from ``eager``, and neurons would fire at other times. ``options`` are Numba's.
    """
    function.__qualname__ += f"_{VERSION}"
    try:
        return njit(cache=True, **OPTIONS, **options)(function)
    except RuntimeError:  # Numba found no folder for its cache
        return njit(**OPTIONS, **options)(function)


class _Announcement(events.Listener):
    """Says once that functions are being compiled and not read from the cache.

    It says so at a terminal and in a notebook. Before a log file nobody waits and wonders.
    """

    made = False

    def on_start(self, event: events.Event) -> None:
        module = event.data["dispatcher"].py_func.__module__  # a function of exec has none
        ours = module is not None and module.startswith("snn_lib.")
        is_seen = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
        if ours and not self.made and is_seen:
            self.made = True
            tqdm.write("first use: compiling for this CPU (some seconds)", file=sys.stderr)

    def on_end(self, event: events.Event) -> None:
        pass


events.register("numba:compile", _Announcement())
