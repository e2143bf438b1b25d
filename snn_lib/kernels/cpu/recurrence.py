"""Recurrence on the CPU: a program whose output comes back through weights, over all steps.

A kernel adds to the current of each step the rows of the weights whose channels were not zero at
the step before, and calls the kernel of the program for this one step. What it computes for a batch
row depends on no other, nor on the number of threads.
"""

from functools import cache

from llvmlite import ir
from torch import Tensor

from snn_lib.kernels.cpu import openmp
from snn_lib.kernels.cpu.library import Kernel, kernel, vector_width
from snn_lib.kernels.cpu.running import NAMES, kernel_of_steps
from snn_lib.kernels.cpu.source import TYPES, call_for_one_step
from snn_lib.kernels.cpu.writer import I64, Frame
from snn_lib.kernels.inputs import Inputs

# States are (B, S, N); those that are kept, before each step, are (T, S, B, N).
ARGUMENTS = ["x", "weights", "fed", "currents", "outputs", "state", "ends", "kept", "coefficients"]
ARGUMENTS += ["lengths", "keeps", "function", "steps", "batch", "channels"]


def forward(
    inputs: Inputs, weight: Tensor, fed: Tensor, currents: Tensor, outputs: Tensor, kept: Tensor
) -> Tensor:
    """Writes the currents, the outputs and the states before each step, if they are to be kept.

    Returns:
        The states after the last step of each sequence, ``(S, B, N)``.
    """
    steps, batch, channels = inputs.x.shape
    state = inputs.first.transpose(0, 1).contiguous()
    if state.data_ptr() == inputs.first.data_ptr():  # which is not to change
        state = state.clone()
    ends = state if inputs.lengths is None else state.clone()
    dtype = NAMES[weight.dtype]
    given = inputs.x.contiguous(), weight.t().contiguous(), fed.contiguous(), currents, outputs
    lengths = 0 if inputs.lengths is None else inputs.lengths.clamp(max=steps)
    function = kernel_of_steps(inputs.key, dtype).address
    given += state, ends, kept, inputs.coefficients.contiguous(), lengths, int(inputs.keep)
    given += function, steps, batch, channels
    threads = openmp.threads_for(batch, currents.numel())
    made = _forward(dtype, len(inputs.program.states), inputs.lengths is not None)
    openmp.run(made, threads, batch, given)
    return ends.transpose(0, 1).contiguous()


@cache
def _forward(dtype: str, states: int, ends: bool) -> Kernel:
    return kernel(forward_source(dtype, states, ends))


def forward_source(dtype: str, states: int, ends: bool) -> str:
    """The kernel, see :data:`ARGUMENTS`. Threads share the batch rows."""
    frame, type_, words = Frame("recur", ARGUMENTS, TYPES[dtype]), TYPES[dtype], I64.as_pointer()
    w, channels = frame.writer, frame["channels"]

    def row(name: str, *place: ir.Value) -> ir.Value:
        """The row at this place, of a tensor whose sizes before the channels are the batch's."""
        return frame.row(name, type_, w.mul(place[0], channels))

    def at(t: ir.Value, b: ir.Value) -> ir.Value:
        return w.add(w.mul(t, frame["batch"]), b)

    with (
        w.counting(I64(0), frame["steps"]) as (t, _),
        w.counting(frame.first, frame.last) as (b, _),
    ):
        begins = w.icmp_signed("==", t, I64(0))
        fed = w.select(begins, row("fed", b), row("outputs", at(w.sub(t, I64(1)), b)))
        current, output = row("currents", at(t, b)), row("outputs", at(t, b))
        w.copy(row("x", at(t, b)), current, I64(0), channels)
        with w.counting(I64(0), channels) as (k, _):
            value = w.read(fed, k)
            with w.if_then(w.fcmp_unordered("!=", value, w.number(0.0))):
                weights = row("weights", k)

                def add(n: ir.Value) -> None:
                    product = w.spread(value), w.read(weights, n), w.read(current, n)
                    w.write(w.intrinsic("llvm.fmuladd", *product), current, n)

                w.each_channel(I64(0), channels, vector_width(), add)
        first = w.mul(b, I64(states))
        own = [row("state", w.add(first, I64(s))) for s in range(states)]
        with w.if_then(w.icmp_signed("!=", frame["keeps"], I64(0))):
            for s, state in enumerate(own):
                place = at(w.add(w.mul(t, I64(states)), I64(s)), b)
                w.copy(state, row("kept", place), I64(0), channels)
        rows = {"state": row("state", first), "x": current, "output": output}
        addresses = {name: w.ptrtoint(one, I64) for name, one in rows.items()}
        addresses["coefficients"] = frame["coefficients"]
        call_for_one_step(w, frame["function"], channels, **addresses)
        if ends:
            length = w.load(w.gep(w.inttoptr(frame["lengths"], words), [b]))
            with w.if_then(w.icmp_signed("==", w.add(t, I64(1)), length)):
                for s, state in enumerate(own):
                    w.copy(state, row("ends", w.add(first, I64(s))), I64(0), channels)
    return frame.text()
