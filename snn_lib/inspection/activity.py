"""Counts what a network does while it runs: firing rates and synaptic operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from snn_lib.neurons import SpikingNeuron
from snn_lib.synapses import IIRSynapse
from snn_lib.training import distributed


class Activity:
    """Spike counts of a network's layers, summed over all sequences seen by :func:`count_activity`.

    Attributes:
        neurons: names of the neuron layers.
        sequences: number of input sequences.
        events: per layer, the non-zero elements that neurons sent or synapses received.
        elements: per layer, all elements.
        fan_out: per synapse layer, the neurons that each of its channels reaches through the
            ``nn.Linear`` that follows it.
        dense_operations: multiply-accumulates of one pass through those ``nn.Linear`` layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.neurons = [n for n, m in model.named_modules() if isinstance(m, SpikingNeuron)]
        self.sequences = 0
        self.events: dict[str, Tensor] = {}
        self.elements: dict[str, int] = {}
        self.fan_out: dict[str, int] = {}
        self.dense_operations = 0
        synapse = None
        for name, module in model.named_modules():
            if isinstance(module, IIRSynapse):
                synapse = name
            elif isinstance(module, nn.Linear) and synapse is not None:
                self.fan_out[synapse] = module.out_features
                self.dense_operations += module.in_features * module.out_features
                synapse = None

    def firing_rates(self) -> dict[str, float]:
        """Mean firing rate of every neuron layer, in spikes per neuron and time step."""
        return {
            name: float(self.events[name]) / self.elements[name]
            for name in self.neurons
            if self.elements.get(name)
        }

    def synaptic_operations(self) -> float:
        """Synaptic operations per sequence: every event times the neurons that it reaches.

        An input current that is not zero counts as an event at every step.
        """
        total = sum(float(self.events[name]) * fan for name, fan in self.fan_out.items())
        return total / self.sequences

    def sum_over_processes(self) -> None:
        """Makes the counts those of all processes."""
        self.events = distributed.total(self.events)
        self.elements = distributed.total(self.elements)
        self.sequences = distributed.total({"": self.sequences})[""]

    def count(self, name: str, sequence: Tensor) -> None:
        """Adds a layer's ``(T, B, *features)``."""
        self.events[name] = self.events.get(name, 0) + torch.count_nonzero(sequence)
        self.elements[name] = self.elements.get(name, 0) + sequence.numel()


@contextmanager
def count_activity(model: nn.Module) -> Iterator[Activity]:
    """Counts the activity of ``model`` while the context lasts, by forward hooks."""
    activity = Activity(model)
    modules = dict(model.named_modules())

    def hook(name: str, sent: bool):
        def count(module, inputs, output):
            activity.count(name, output[0] if sent else inputs[0])

        return count

    def sequences(module, inputs, output):
        activity.sequences += inputs[0].shape[1]

    handles = [model.register_forward_hook(sequences)]
    handles += [modules[n].register_forward_hook(hook(n, False)) for n in activity.fan_out]
    handles += [modules[n].register_forward_hook(hook(n, True)) for n in activity.neurons]
    try:
        yield activity
    finally:
        for handle in handles:
            handle.remove()
