"""Counts what a network does while it runs: firing rates and operations.

The counts are those of NeuroBench (Yik et al., 2025, doi 10.1038/s41467-025-56739-4), taken where a
spike arrives: at the synapse, whose filter is counted by itself.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_lib.containers import recomputing
from snn_lib.neurons import SpikingNeuron
from snn_lib.readout import within
from snn_lib.synapses import IIRSynapse

# Of 32-bit floating point in 45 nm: Horowitz, ISSCC 2014, doi 10.1109/ISSCC.2014.6757323.
PICOJOULES_ADDITION, PICOJOULES_MULTIPLICATION = 0.9, 3.7


class Operations(NamedTuple):
    """What a network computes for a sequence, if whatever is zero is left out.

    Attributes:
        additions: a weight added for every spike that reaches a neuron.
        multiply_accumulates: a weight times a current, where the input of a synapse is no spike.
        filters: multiply-accumulates of the synapses' filters, which never rest.
        neurons: those of membrane and reset.
    """

    additions: float
    multiply_accumulates: float
    filters: float
    neurons: float

    def energy(self) -> float:
        """An estimate in joules: arithmetic alone, 32-bit floating point, 45 nm.

        It is no measurement. Memory, which costs more than arithmetic on most machines, control and
        leakage are left out, and a machine that skips zeros is assumed.
        """
        product = PICOJOULES_ADDITION + PICOJOULES_MULTIPLICATION
        products = self.multiply_accumulates + self.filters + self.neurons
        return 1e-12 * (PICOJOULES_ADDITION * self.additions + product * products)


class Activity:
    """Spike counts of a network's layers, summed over all sequences seen by :func:`count_activity`.

    A sequence begins where a layer is called without a state, and goes on where it is called with
    one, so that a sequence in chunks counts once, whoever cuts it. They are counted at the layer
    that runs first, as the batch of its ``(T, B, *features)``, whatever the model's own input is.

    Attributes:
        neurons: names of the neuron layers.
        sequences: number of input sequences.
        events: per layer, the non-zero elements that neurons sent or synapses received.
        elements: per layer, all elements.
        currents: per synapse layer, those of its events that came among others than 0, 1 and -1.
        lengths: steps of each sequence of the batch at work, int64 ``(B,)``, if they are padded:
            what lies behind them is not counted. Whoever runs the model sets it.
        fan_out: per synapse layer, the neurons that each of its channels reaches through the
            ``nn.Linear`` that follows it. A synapse layer before anything else, such as a
            convolution, has no entry, and no operations.
        dense_operations: multiply-accumulates of one pass through those ``nn.Linear`` layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.neurons = [n for n, m in model.named_modules() if isinstance(m, SpikingNeuron)]
        self.sequences = 0
        self.lengths: Tensor | None = None
        self.events: dict[str, Tensor] = {}
        self.elements: dict[str, int] = {}
        self.currents: dict[str, Tensor] = {}
        self.work: dict[str, int] = {}  # multiply-accumulates of a layer's own for an element
        self.fan_out: dict[str, int] = {}
        self.dense_operations = 0
        self._first: str | None = None
        self._steps: dict[str, int] = defaultdict(int)  # of each layer's sequences so far
        synapse = None
        for name, module in model.named_modules():
            if isinstance(module, SpikingNeuron):  # reset, and what it takes off the potential
                self.work[name] = 2 + bool(module.membrane_decay.any())
            if isinstance(module, IIRSynapse):
                self.work[name] = len(module.alpha) + len(module.beta)
                synapse, channels = name, math.prod(module.shape)
                fitting = (channels, module.shape[-1])  # flattened before the nn.Linear, or not
            elif synapse is not None and _acts(module):
                if isinstance(module, nn.Linear) and module.in_features in fitting:
                    self.fan_out[synapse] = module.out_features
                    self.dense_operations += channels * module.out_features
                synapse = None

    def firing_rates(self) -> dict[str, float]:
        """Mean firing rate of every neuron layer, in spikes per neuron and time step."""
        return {
            name: float(self.events[name]) / float(self.elements[name])
            for name in self.neurons
            if self.elements.get(name)
        }

    def activity_sparsity(self) -> float:
        """The share of neurons and steps without a spike."""
        spikes, elements = (
            sum(float(counts[name]) for name in self.neurons if name in counts)
            for counts in (self.events, self.elements)
        )
        return 1.0 - spikes / elements

    def synaptic_operations(self) -> float:
        """Synaptic operations per sequence: every event times the neurons that it reaches.

        An input current that is not zero counts as an event at every step.

        Raises:
            ValueError: no sequence has begun.
        """
        return self._per_sequence(self.events)

    def operations(self) -> Operations:
        """What was computed per sequence, by kind.

        Raises:
            ValueError: no sequence has begun.
        """
        total, currents = self.synaptic_operations(), self._per_sequence(self.currents)
        filters, neurons = (
            sum(self.work[name] * float(self.elements[name]) for name in layers) / self.sequences
            for layers in (self.elements.keys() - self.neurons, self.neurons)
        )
        return Operations(total - currents, currents, filters, neurons)

    def _per_sequence(self, events: dict[str, Tensor]) -> float:
        """Events times the neurons that they reach."""
        if not self.sequences:
            raise ValueError("no sequence has begun: no layer was called without a state")
        total = sum(float(events.get(name, 0)) * fan for name, fan in self.fan_out.items())
        return total / self.sequences

    def sum_by(self, total: Callable[[dict[str, Any]], dict[str, float]]) -> None:
        """Makes the counts those of all processes, by a function that sums over them."""
        self.events, self.elements = total(self.events), total(self.elements)
        self.currents = total(self.currents)
        self.sequences = total({"": self.sequences})[""]

    def count(
        self, name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any], result: tuple
    ) -> None:
        """Adds what the layer ``name`` did in a call; a forward hook but for the name."""
        if recomputing():
            return
        given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        received = next(iter(given.values()))  # (T, B, *features)
        if self._first is None:
            self._first = name
        if name == self._first and given.get("state") is None:
            self.sequences += received.shape[1]
        counted = result[0] if isinstance(layer, SpikingNeuron) else received
        begin = 0 if given.get("state") is None else self._steps[name]
        self._steps[name] = begin + len(counted)
        elements = counted.numel()
        if self.lengths is not None:  # what follows a sequence's own end is padding
            own = within(counted, self.lengths - begin)
            counted = counted * own
            elements = own.sum() * math.prod(counted.shape[2:])
        events = torch.count_nonzero(counted)
        self.events[name] = self.events.get(name, 0) + events
        if isinstance(layer, IIRSynapse):
            spikes = ((counted == 0) | (counted.abs() == 1)).all()
            self.currents[name] = self.currents.get(name, 0) + events * ~spikes
        self.elements[name] = self.elements.get(name, 0) + elements


@contextmanager
def count_activity(model: nn.Module) -> Iterator[Activity]:
    """Counts the activity of ``model`` while the context lasts, by forward hooks."""
    activity = Activity(model)
    handles = [
        module.register_forward_hook(partial(activity.count, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, (IIRSynapse, SpikingNeuron))
    ]
    try:
        yield activity
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def operations_per_step(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The synaptic operations of each step and sequence, ``(T, B)``, per synapse layer.

    Filled while ``model`` runs in the context: what a sequence that is stopped early has cost.
    """
    operations: dict[str, Tensor] = {}

    def count(name: str, fan_out: int, module: nn.Module, args: tuple) -> None:
        operations[name] = fan_out * args[0].flatten(2).count_nonzero(2)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(count, name, fan_out))
        for name, fan_out in Activity(model).fan_out.items()
    ]
    try:
        yield operations
    finally:
        for handle in handles:
            handle.remove()


def _acts(module: nn.Module) -> bool:
    """Whether the module is a layer itself: weights, neurons, or parameters of its own."""
    own = module.parameters(recurse=False)
    return isinstance(module, (nn.Linear, SpikingNeuron)) or next(own, None) is not None


def footprint(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def connection_sparsity(model: nn.Module) -> float:
    """The share of the weights, of linear layers and convolutions, that are zero."""
    weighted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = [module.weight for module in model.modules() if isinstance(module, weighted)]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)
