"""Recurrence: the spikes of the step before come back through weights of their own.

    current[t] = x[t] + W F[t - 1]
    S[t], state = neuron(current[t], state)
    F[t] = S[t], or synapse(S[t]) if there is one

The steps wait for each other: what the weights of a feed-forward layer do in one product for all
steps, these do in a product for each step.
"""

import torch
from torch import Tensor, nn

from snn_lib.cells.cell import Cell
from snn_lib.containers import (
    Output,
    StatefulModule,
    check_module,
    last_steps,
    part_with_memory,
    runs_forward_of,
)
from snn_lib.functional import check_entries, run_recurrent
from snn_lib.pytorch_private import compute_pruned


class Recurrent(StatefulModule):
    """Neurons that are also given their own spikes of the step before, through weights.

        Sequential(nn.Linear(40, 128), Recurrent(nn.Linear(128, 128), SpikingNeuron(128, tau_m=8)))

    With ``nn.Linear``, a layer of neurons runs over a sequence as one operator, whose products on
    the CPU read only the rows of the neurons that fired. Other weights, such as
    ``PerStep(nn.Conv2d(8, 8, 3, padding=1))``, and weights with hooks run step by step in plain
    PyTorch, as all do under the transforms of ``torch.func``.

    The weights receive all spikes. Dropout of the neurons takes spikes from the next layer alone.

    Args:
        weights: from what comes back to the neurons' current, ``(1, B, *shape)`` to the same shape.
        neuron: a :class:`Cell` that spikes. Its hooks see the current of all steps; what they
            change does not come back.
        synapse: a :class:`Cell` that filters the spikes before the weights, if there is one. Hooks
            do not see it.

    Shape:
        - x: the current from outside, ``(T, B, *shape)``.
        - state: ``(F, state of the neurons, state of the synapse or None)``, with F
          ``(B, *shape)``.
        - lengths: int64 ``(B,)``, the number of steps of each sequence, if they are padded to T.
        - returns the spikes ``(T, B, *shape)`` and the new state.

    Raises:
        TypeError: ``weights`` is no module, ``neuron`` no cell that spikes, ``synapse`` none that
            does not, one of them has a ``forward`` of its own, or a part of the weights has a
            state.
        ValueError: a shape is wrong.
    """

    takes_expanded = True
    spikes = True

    def __init__(self, weights: nn.Module, neuron: Cell, synapse: Cell | None = None) -> None:
        super().__init__()
        check_module("weights", weights)
        if not (isinstance(neuron, Cell) and neuron.spikes):
            raise TypeError(f"neuron is {neuron!r}, expected a cell that spikes")
        if synapse is not None and not (isinstance(synapse, Cell) and not synapse.spikes):
            raise TypeError(f"synapse is {synapse!r}, expected a cell that does not spike")
        if (part := part_with_memory(weights)) is not None:
            raise TypeError(
                f"weights hold a {type(part).__name__}, expected a module without state"
            )
        for name, part in (("neuron", neuron), ("synapse", synapse)):
            if part is not None and not runs_forward_of(part, Cell):
                raise TypeError(f"{name} has a forward of its own, which would not be called")
        self.weights, self.neuron, self.synapse = weights, neuron, synapse

    def forward(
        self, x: Tensor, state: tuple | None = None, lengths: Tensor | None = None
    ) -> Output:
        """Runs all time steps; see the class for shapes.

        The loop finds the current of all steps. The neurons then run on it as a layer of their own,
        with their dropout, their hooks and their state.
        """
        if state is not None:
            check_entries(state, ("fed", "neuron", "synapse"))
        fed, before, filtered = state or (None, None, None)
        if filtered is not None and self.synapse is None:
            raise ValueError("a state of the synapse is given, and there is no synapse")
        compute_pruned(self.neuron)  # as the loop reads coefficients before any hook runs
        calls = [self.neuron.call(x, before, drops=False)]
        if self.synapse is not None:
            compute_pruned(self.synapse)
            calls.append(self.synapse.call(x, filtered))
        current, output, states = run_recurrent(calls, x, self.weights, fed, lengths)
        spikes, after = self.neuron(current, before, lengths)
        fed = current.new_zeros(1, *x.shape[1:]) if fed is None else fed[None]
        steps = torch.cat([fed, output[-1:] if lengths is None else output])
        (fed,) = last_steps(steps, 1, lengths)
        return Output(spikes, (fed, after, states[1] if self.synapse is not None else None))
