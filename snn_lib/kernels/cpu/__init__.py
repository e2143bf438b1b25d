"""The CPU backend: the four functions of ``eager``, compiled by Numba.

Read ``iir_filter`` and ``spiking_neuron`` first; the other files hold what they use. ``tiles``
cuts sequences up, and ``openmp`` runs threads that share the tiles. ``rows``, ``dropout`` and
``surrogates`` compute on the channels of one row. ``compiling`` sets the compiler up, ``llvm`` adds
instructions that Numba lacks, and ``allocator`` sets the C library's allocator.

Every element of a result is computed by the operations of ``eager``, in the order of ``eager``, so
spikes are the same bit for bit. Results do not depend on the number of threads.
"""

from snn_lib.kernels.cpu.allocator import keep_freed_memory
from snn_lib.kernels.cpu.iir_filter import filter_backward, filter_forward
from snn_lib.kernels.cpu.spiking_neuron import neuron_backward, neuron_forward

__all__ = ["filter_backward", "filter_forward", "neuron_backward", "neuron_forward"]

keep_freed_memory()
