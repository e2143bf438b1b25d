"""Runs kernels on the OpenMP threads that PyTorch itself computes on.

PyTorch's OpenMP threads spin for a while after every matrix product, so other threads would compete
with them for the cores. Kernels therefore call PyTorch's OpenMP library directly. They use the
functions of GNU's library, which LLVM's and Intel's offer too. A thread pool takes their place
where a library has no such functions, and after a fork.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding
import torch
from torch import Tensor

from snn_lib.kernels.cpu.library import Kernel
from snn_lib.pytorch_private import EXTENSION_PATH

SMALL = 16384  # so many elements at most are computed by the calling thread alone


def _link() -> Callable | None:
    """Makes PyTorch's OpenMP library callable from kernels; returns what starts its threads."""
    asked = ("omp_get_thread_num", "omp_get_num_threads")
    # Linux binds PyTorch's own calls in this order: a library that the whole process sees, such as
    # a preloaded one, comes before the one that PyTorch brings along.
    paths = [None] if sys.platform == "linux" else []
    for path in [*paths, EXTENSION_PATH]:
        library = ctypes.CDLL(path)
        if all(hasattr(library, name) for name in ("GOMP_parallel", *asked)):
            for name in asked:
                _name(f"snn_{name}", getattr(library, name))
            start = library.GOMP_parallel
            start.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
            start.restype = None
            return start
    for name in asked:  # so that kernels can be linked; nobody calls it
        _name(f"snn_{name}", _nobody)
    return None


def _name(name: str, function: Callable) -> None:
    """Makes a function of C known to kernels by a name."""
    llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


_nobody = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
_start = _link()


def _after_fork() -> None:
    """Switches to the thread pool, since a forked process that calls GNU's OpenMP hangs.

    LLVM's and Intel's libraries would survive a fork, but the thread pool costs them little.
    """
    global _start
    _start = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def threads_for(items: int, elements: int) -> int:
    """How many threads share the items, of which so many elements are made."""
    return 1 if elements <= SMALL else min(torch.get_num_threads(), items)


def run(kernel: Kernel, threads: int, items: int, given: Sequence[Tensor | int | float]) -> None:
    """Runs a kernel on threads that share ``range(items)``.

    Args:
        kernel: it releases the GIL.
        threads: at least 1, numbered from 0 on; a single one is the calling thread.
        items: the number of items, which the threads share in equal parts.
        given: its arguments, tensors and numbers; each becomes 64 bits.
    """
    arguments = [one.data_ptr() if isinstance(one, Tensor) else one for one in given]
    kinds = "".join("d" if isinstance(one, float) else "q" for one in arguments)
    words = ctypes.create_string_buffer(struct.pack(f"=q{kinds}", items, *arguments))
    address = ctypes.addressof(words)
    if threads == 1:
        kernel.run(0, 0, items, address + 8)
    elif _start:
        _start(kernel.share, address, threads, 0)
    else:
        bounds = [items * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            shares = range(threads), bounds[:-1], bounds[1:]
            list(pool.map(lambda *share: kernel.run(*share, address + 8), *shares))
