"""The GPU backend: the four functions of ``eager`` in Triton, each one kernel over all time steps.

Read ``iir_filter`` and ``spiking_neuron`` first; the other files hold what they use. ``launching``
says how many programs run, ``lanes`` what each of them computes on.

A program is one warp. It owns a tile of (batch, channel) lanes, one or two to a thread, and walks
through time with the recurrence's state in registers. Neighbouring lanes are neighbouring channels,
so loads and stores coalesce. Sequences come with their strides, so an input that is expanded over
time or not contiguous is read in place.

A coefficient's gradient is summed in each lane over time, then in each program over its batch rows,
then by PyTorch over the programs. There are no atomics, so the bits are the same every time. The
sums are in double precision, in which a product of two floats is exact; a fused multiply-add may
therefore compute them, which makes up for the conversions. It costs up to 16 registers a thread.

All other operations keep the order of ``eager`` and are not fused into multiply-adds, which round
differently: spikes must be those of ``eager``.
"""

from snn_lib.kernels.cuda.iir_filter import filter_backward, filter_forward
from snn_lib.kernels.cuda.spiking_neuron import neuron_backward, neuron_forward

__all__ = ["filter_backward", "filter_forward", "neuron_backward", "neuron_forward"]
