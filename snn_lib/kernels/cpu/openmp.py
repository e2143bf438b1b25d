"""Runs kernels on the OpenMP threads that PyTorch itself computes on.

PyTorch's OpenMP threads spin for a while after every matrix product, so other threads would compete
with them for the cores. Numba can use OpenMP as well, but not after a fork. Kernels therefore call
PyTorch's OpenMP library directly. They use the functions of GNU's library, which LLVM's and Intel's
offer too. A thread pool takes their place where a library has no such functions, and after a fork.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from snn_lib.pytorch_private import EXTENSION_PATH


def _link() -> bool:
    """Makes PyTorch's OpenMP library callable from compiled code; returns whether that worked."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    # Linux binds PyTorch's own calls in this order: a library that the whole process sees, such as
    # a preloaded one, comes before the one that PyTorch brings along.
    paths = [None] if sys.platform == "linux" else []
    for path in [*paths, EXTENSION_PATH]:
        library = ctypes.CDLL(path)
        if all(hasattr(library, name) for name in names):
            for name in names:
                address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
                llvmlite.binding.add_symbol(f"snn_{name}", address)
            return True
    return False


_usable = _link()


def _after_fork() -> None:
    """Switches to the thread pool, since a forked process that calls GNU's OpenMP hangs.

    LLVM's and Intel's libraries would survive a fork, but the thread pool costs them little.
    """
    global _usable
    _usable = False


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


@intrinsic
def in_parallel(typing_context, kernel, threads, items, arguments):
    """Calls ``kernel(number, first, last, arguments)`` on every thread.

    These are the thread's number and its share of range(items).
    """
    kernel_signature = kernel.get_call_type(typing_context, (*[types.intp] * 3, arguments), {})

    def generate(context, builder, signature, values):
        _, threads, items, arguments = values
        compiled = kernel.dispatcher.get_compile_result(kernel_signature)
        context.active_code_library.add_linking_library(compiled.library)
        void, pointer, i32 = ir.VoidType(), cgutils.voidptr_t, ir.IntType(32)

        def external(name, result, *parameters):
            return cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(result, parameters), f"snn_{name}"
            )

        # A function for the threads to run, which takes a pointer to a struct of what it needs.
        packed = cgutils.alloca_once_value(
            builder, cgutils.pack_struct(builder, [items, arguments])
        )
        share = ir.Function(
            builder.module,
            ir.FunctionType(void, [pointer]),
            builder.module.get_unique_name("snn_share"),
        )
        share.linkage = "internal"
        inside = ir.IRBuilder(share.append_basic_block())
        items, arguments = cgutils.unpack_tuple(
            inside, inside.load(inside.bitcast(share.args[0], packed.type)), 2
        )
        number, team = (
            inside.zext(inside.call(external(name, i32), []), items.type)
            for name in ("omp_get_thread_num", "omp_get_num_threads")
        )
        first, last = (
            inside.udiv(inside.mul(items, n), team)
            for n in (number, inside.add(number, number.type(1)))
        )
        context.call_conv.call_function(
            inside,
            context.declare_function(builder.module, compiled.fndesc),
            types.none,
            kernel_signature.args,
            (number, first, last, arguments),
        )
        inside.ret_void()

        builder.call(
            external("GOMP_parallel", void, share.type, pointer, i32, i32),
            [share, builder.bitcast(packed, pointer), builder.trunc(threads, i32), i32(0)],
        )
        return context.get_dummy_value()

    return types.void(kernel, threads, items, arguments), generate


def run(kernel: Callable, parallel: Callable, threads: int, items: int, arguments: tuple) -> None:
    """Runs ``kernel(number, first, last, arguments)`` on threads that share ``range(items)``.

    Args:
        kernel: a compiled function that releases the GIL.
        parallel: a compiled function of (threads, items, arguments) that calls
            :func:`in_parallel` with ``kernel``.
        threads: at least 1, numbered from 0 on; a single one is the calling thread.
        items: the number of items, which the threads share in equal parts.
        arguments: a tuple, handed to ``kernel`` as it is.
    """
    if threads == 1:
        kernel(0, 0, items, arguments)
    elif _usable:
        parallel(threads, items, arguments)
    else:
        bounds = [items * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            shares = range(threads), bounds[:-1], bounds[1:]
            list(pool.map(lambda *share: kernel(*share, arguments), *shares))
