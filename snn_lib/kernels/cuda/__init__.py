"""The GPU backend: a program's kernels, written from its trace in Triton's language.

``source`` writes them and ``running`` hands them their tensors. ``launching`` says how many
programs of Triton's run, and ``lanes`` what each of them computes on.

Such a program is one warp. It owns a tile of (batch, channel) lanes, one or two to a thread, and
walks through time with the states in registers. Neighbouring lanes are neighbouring channels, so
loads and stores coalesce. Sequences come with their strides, so an input that is expanded over
time or not contiguous is read in place.

The backward pass needs the states before each step. The forward pass keeps those at the beginning
of every block of steps, and the backward kernel computes a block's states again into memory that it
uses for every block, which therefore stays in the cache.

A coefficient's gradient is summed in each lane over time, then in each program over its batch rows,
then by PyTorch over the programs. There are no atomics, so the bits are the same every time. The
sums are in double precision, in which a product of two floats is exact; a fused multiply-add may
therefore compute them, which makes up for the conversions. It costs two registers a coefficient.

All other operations keep the order of the step and are not fused into multiply-adds, which round
differently: spikes must be those of plain PyTorch. Divisions and elementary functions may differ
in the last bits.
"""

from snn_lib.kernels.cuda.running import backward, forward

__all__ = ["backward", "forward"]
