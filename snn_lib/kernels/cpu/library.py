"""Compiles kernels that were written in LLVM's language, and keeps them on disk.

A second process compiles nothing.
"""

import ctypes
import hashlib
import sys
from functools import cache
from typing import NamedTuple

import llvmlite
import llvmlite.binding as llvm
from tqdm import tqdm

from snn_lib.kernels.disk import read, write

SUFFIX = ".kernel"
OPTIONS = {"speed_level": 3}  # of LLVM's passes
TARGET = {"opt": 3, "jit": True}


class Kernel(NamedTuple):
    """A compiled kernel.

    Attributes:
        address: of the function, which takes (thread, first, last, address of the arguments).
        run: the same function for Python, without the GIL.
        share: the address of the function that a thread of OpenMP's runs; it is given the number of
            items, followed by the arguments.
    """

    address: int
    run: ctypes._CFuncPtr
    share: int


_kept: list[llvm.ExecutionEngine] = []  # the engines own the code that runs


def _target() -> llvm.TargetMachine:
    """This machine; each engine owns one, which ends with it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        **TARGET,
    )


@cache
def has(feature: str) -> bool:
    """Whether this CPU has a feature, by LLVM's name for it."""
    return llvm.get_host_cpu_features().get(feature, False)


@cache
def vector_width() -> int:
    """How many channels a value has: vectors of 512 bits slow the clock of many of Intel's CPUs."""
    wide = llvm.get_host_cpu_name().startswith("znver")
    return 16 if wide and has("avx512f") else 8


def kernel(source: str) -> Kernel:
    """The kernel of a module with the functions ``kernel`` and ``share``."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
    engine.add_object_file(llvm.ObjectFileRef.from_data(_object(source)))
    engine.finalize_object()
    _kept.append(engine)
    index = ctypes.c_int64
    run = ctypes.CFUNCTYPE(None, index, index, index, ctypes.c_void_p)
    address = engine.get_function_address("kernel")
    return Kernel(address, run(address), engine.get_function_address("share"))


def _object(source: str) -> bytes:
    """The compiled module, from disk if some process has compiled it before."""
    on = llvmlite.__version__, llvm.get_default_triple(), llvm.get_host_cpu_name()
    features = llvm.get_host_cpu_features().flatten()
    made_from = "\n".join([*on, features, repr((OPTIONS, TARGET)), source])
    name = hashlib.sha256(made_from.encode()).hexdigest()[:32] + SUFFIX
    for _, content in read(name):
        digest, compiled = content[:32], content[32:]
        if hashlib.sha256(compiled).digest() == digest:
            return compiled
    compiled = _compile(source)
    write(name, hashlib.sha256(compiled).digest() + compiled)
    return compiled


def _compile(source: str) -> bytes:
    announce()
    machine = _target()
    module = llvm.parse_assembly(source)
    module.verify()
    options = llvm.create_pipeline_tuning_options(**OPTIONS)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


@cache
def announce() -> None:
    """Says once that kernels are compiled and not read from disk.

    It says so at a terminal and in a notebook. Before a log file nobody waits and wonders.
    """
    if "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty()):
        tqdm.write("first use: compiling for this CPU (some seconds)", file=sys.stderr)
