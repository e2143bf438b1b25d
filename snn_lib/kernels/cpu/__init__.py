"""The CPU backend: a program's kernels, written from its trace in LLVM's language.

``source`` writes them, with ``writer`` for single instructions. ``library`` compiles them and keeps
them on disk. ``running`` cuts sequences into tiles and hands kernels their tensors, ``openmp`` runs
threads that share the tiles, and ``allocator`` sets the C library's allocator.

Every element of a result is computed by the operations of the step, in their order, so spikes are
those of plain PyTorch bit for bit; after elementary functions, such as exp, the last bits may
differ. Results do not depend on the number of threads.

``products`` and ``convolutions`` are those of spikes with weights, and ``delays`` and
``recurrence`` are no steps of one channel either. Where a backend has no kernels for them,
PyTorch's operations serve.
"""

from snn_lib.kernels.cpu import convolutions, delays, products, recurrence
from snn_lib.kernels.cpu.allocator import keep_freed_memory
from snn_lib.kernels.cpu.running import backward, forward

__all__ = ["backward", "convolutions", "delays", "forward", "products", "recurrence"]

keep_freed_memory()
