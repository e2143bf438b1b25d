"""Counts what a network does while it runs: firing rates and operations.

The counts are those of NeuroBench (Yik et al., 2025, doi 10.1038/s41467-025-56739-4), taken where a
spike arrives: at the synapse, whose filter is counted by itself. Through a convolution it reaches
as many neurons as read its position: fewer at borders without padding and between strides.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_lib.containers import call_of, recomputing
from snn_lib.initialisation import WEIGHTED
from snn_lib.neurons import SpikingNeuron
from snn_lib.readout import within
from snn_lib.synapses import IIRSynapse

CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
POOLING = tuple(getattr(nn, name) for name in nn.modules.pooling.__all__)
# Of 32-bit floating point in 45 nm: Horowitz, ISSCC 2014, doi 10.1109/ISSCC.2014.6757323.
PICOJOULES_ADDITION, PICOJOULES_MULTIPLICATION = 0.9, 3.7


class Operations(NamedTuple):
    """What a network computes for a sequence, if whatever is zero is left out, weights too.

    Attributes:
        additions: a weight added for every spike that reaches a neuron.
        multiply_accumulates: a weight times a current, where the input of a synapse is no spike:
            in a call in which any element of it is neither 0 nor 1 nor -1.
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
        arrivals: per synapse layer, its synaptic operations: events times the neurons they reach.
        currents: per synapse layer, those of its arrivals among others than 0, 1 and -1.
        lengths: steps of each sequence of the batch at work, int64 ``(B,)``, if they are padded:
            what lies behind them is not counted. Whoever runs the model sets it.
        fan_out: per synapse layer, the neurons that each of its channels reaches through the
            weights, those that are not zero, of the ``nn.Linear`` or convolution that follows it,
            int64, of the shape of what it filtered last. A synapse layer before anything else, such
            as pooling, has no entry, and no operations.
        dense: per synapse layer, multiply-accumulates of one pass through those weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.neurons = [n for n, m in model.named_modules() if isinstance(m, SpikingNeuron)]
        self.sequences = 0
        self.lengths: Tensor | None = None
        self.events: dict[str, Tensor] = {}
        self.elements: dict[str, int] = {}
        self.arrivals: dict[str, Tensor] = {}
        self.currents: dict[str, Tensor] = {}
        self.work: dict[str, int] = {}  # multiply-accumulates of a layer's own for an element
        self.fan_out: dict[str, Tensor] = {}
        self.dense: dict[str, int] = {}
        self._layers_after = _layers_after(model)
        self._first: str | None = None
        self._steps: dict[str, int] = defaultdict(int)  # of each layer's sequences so far
        for name, module in model.named_modules():
            if isinstance(module, SpikingNeuron):  # reset, and what it takes off the potential
                self.work[name] = 2 + bool(module.membrane_decay.any())
            if isinstance(module, IIRSynapse):
                self.work[name] = len(module.alpha) + len(module.beta)

    @property
    def dense_operations(self) -> int:
        """Multiply-accumulates of one pass through all layers of weights, which skips no zeros."""
        return sum(self.dense[name] for name in self.fan_out)

    def firing_rates(self) -> dict[str, float]:
        """Mean firing rate of every neuron layer, in spikes per neuron and time step."""
        return {
            name: float(self.events[name]) / float(self.elements[name])
            for name in self.neurons
            if self.elements.get(name)
        }

    def spikes(self) -> float:
        """Spikes of all neurons per sequence.

        Raises:
            ValueError: no sequence has begun.
        """
        return self._per_sequence({name: self.events.get(name, 0) for name in self.neurons})

    def activity_sparsity(self) -> float:
        """The share of neurons and steps without a spike; 1 where there are no neurons."""
        spikes, elements = (
            sum(float(counts[name]) for name in self.neurons if name in counts)
            for counts in (self.events, self.elements)
        )
        return 1.0 - spikes / max(elements, 1.0)

    def synaptic_operations(self) -> float:
        """Synaptic operations per sequence: every event times the neurons that it reaches.

        An input current that is not zero counts as an event at every step.

        Raises:
            ValueError: no sequence has begun.
        """
        return self._per_sequence(self.arrivals)

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

    def _per_sequence(self, operations: dict[str, Tensor]) -> float:
        if not self.sequences:
            raise ValueError("no sequence has begun: no layer was called without a state")
        return sum(map(float, operations.values())) / self.sequences

    def sum_by(self, total: Callable[[dict[str, Any]], dict[str, float]]) -> None:
        """Makes the counts those of all processes, by a function that sums over them."""
        self.events, self.elements = total(self.events), total(self.elements)
        self.arrivals, self.currents = total(self.arrivals), total(self.currents)
        self.sequences = total({"": self.sequences})[""]

    def count(
        self, name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any], result: tuple
    ) -> None:
        """Adds what the layer ``name`` did in a call; a forward hook but for the name."""
        if recomputing():
            return
        given = call_of(layer, args, kwargs)
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
        self.events[name] = self.events.get(name, 0) + torch.count_nonzero(counted)
        if isinstance(layer, IIRSynapse):
            self._count_arrivals(name, counted)
        self.elements[name] = self.elements.get(name, 0) + elements

    def _count_arrivals(self, name: str, received: Tensor) -> None:
        layers, features = self._layers_after.get(name, ()), received.shape[2:]
        if name not in self.fan_out or self.fan_out[name].shape != features:
            found = fan_out_of(layers, features)
            if found is None:
                self.fan_out.pop(name, None)
                return
            self.fan_out[name] = found.to(received.device)
            self.dense[name] = int(fan_out_of(layers, features, dense=True).sum())
        arrivals = (received.ne(0).sum((0, 1)) * self.fan_out[name]).sum()
        spikes = ((received == 0) | (received.abs() == 1)).all()
        self.arrivals[name] = self.arrivals.get(name, 0) + arrivals
        self.currents[name] = self.currents.get(name, 0) + arrivals * ~spikes


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
    Where a layer goes on from a state, its steps follow those before.
    """
    operations: dict[str, Tensor] = {}
    known: dict[tuple[str, torch.Size], Tensor | None] = {}  # fan-outs

    def count(
        name: str, layers: list[nn.Module], module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        given = call_of(module, args, kwargs)
        received = next(iter(given.values()))
        key = name, received.shape[2:]
        if key not in known:
            known[key] = fan_out_of(layers, received.shape[2:])
        fan_out = known[key]
        if fan_out is not None:
            steps = (received.ne(0) * fan_out.to(received.device)).flatten(2).sum(2)
            goes_on = given.get("state") is not None and name in operations
            operations[name] = torch.cat([operations[name], steps]) if goes_on else steps

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            partial(count, name, layers), with_kwargs=True
        )
        for name, layers in _layers_after(model).items()
    ]
    try:
        yield operations
    finally:
        for handle in handles:
            handle.remove()


def _layers_after(model: nn.Module) -> dict[str, list[nn.Module]]:
    """For each synapse layer the weights that follow it, after what makes maps of their input."""
    found: dict[str, list[nn.Module]] = {}
    synapse, between = None, []
    for name, module in model.named_modules():
        if isinstance(module, IIRSynapse):
            synapse, between = name, []
        elif isinstance(module, nn.Unflatten):
            between.append(module)
        elif synapse is not None and _acts(module):
            if isinstance(module, WEIGHTED):
                found[synapse] = [*between, module]
            synapse = None
    return found


def _acts(module: nn.Module) -> bool:
    """Whether the module is a layer itself: weights, neurons, pooling, parameters of its own."""
    own = module.parameters(recurse=False)
    layers = nn.Linear, SpikingNeuron, *POOLING
    return isinstance(module, layers) or next(own, None) is not None


def fan_out_of(
    layers: Sequence[nn.Module], features: Sequence[int], dense: bool = False
) -> Tensor | None:
    """How many neurons each channel of a synapse reaches through weights that are not zero.

    Args:
        layers: the weights after the synapse, last, and what makes maps of their input.
        features: the shape of what the synapse hands on at a step of a sequence.
        dense: whether weights that are zero count as well.

    Returns:
        int64, ``features``, on the CPU, or ``None`` where the layers do not fit what the synapse
        hands on.
    """
    if not layers:
        return None
    *reshaping, weights = layers
    channels, *positions = reshaping[-1].unflattened_size if reshaping else features
    present = torch.ones_like(weights.weight) if dense else weights.weight != 0
    present = present.detach().to("cpu", torch.float64)
    if isinstance(weights, nn.Linear):
        # Flattened before, by a module or otherwise, or not at all.
        if weights.in_features not in (math.prod(features), features[-1]):
            return None
        reached = present.sum(0).long()
        whole = len(reached) == math.prod(features)
        return reached.view(features) if whole else reached.expand(features)
    if (
        weights.in_channels != channels
        or len(weights.kernel_size) != len(positions)
        or channels * math.prod(positions) != math.prod(features)
    ):
        return None
    return _readers(weights, present, positions).reshape(features)


def _readers(weights: nn.Module, present: Tensor, positions: Sequence[int]) -> Tensor:
    """How many weights of a convolution read each position of each channel, int64.

    It is the gradient of all its outputs if the weights ``present`` are ones, the others zero.
    """
    convolution = next(kind for kind in CONVOLUTIONS if isinstance(weights, kind))
    with torch.inference_mode(False), torch.enable_grad():
        exact = {"dtype": torch.float64, "device": "cpu"}
        ones = convolution(
            weights.in_channels,
            weights.out_channels,
            weights.kernel_size,
            weights.stride,
            weights.padding,
            weights.dilation,
            weights.groups,
            bias=False,
            padding_mode=weights.padding_mode,
            **exact,
        ).requires_grad_(False)
        ones.weight.copy_(present)
        maps = torch.ones(1, weights.in_channels, *positions, requires_grad=True, **exact)
        (readers,) = torch.autograd.grad(ones(maps).sum(), maps)
    return readers[0].round().long()


def footprint(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def connection_sparsity(model: nn.Module) -> float:
    """The share of the weights, of linear layers and convolutions, that are zero; 0 of none."""
    weights = [module.weight for module in model.modules() if isinstance(module, WEIGHTED)]
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
    return zeros / max(sum(weight.numel() for weight in weights), 1)
