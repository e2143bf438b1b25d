"""Counts what a network does while it runs: firing rates and operations.

The counts are those of NeuroBench (Yik et al., 2025, doi 10.1038/s41467-025-56739-4), taken where a
spike arrives: at the synapse, whose filter is counted by itself. Through a convolution it reaches
as many sums as read its position: fewer at borders and between strides. Those that pooling then
leaves out count too.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_lib.chunks import is_recomputing
from snn_lib.containers import bind_call
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
        leakage are left out, and a machine is assumed that skips zeros and filters behind the
        weights: before them, a filtered spike is a potential for steps.
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
        self._first: str | None = None
        # Steps of each layer's sequences so far, and those that have arrived behind its weights.
        self._steps: dict[str, int] = defaultdict(int)
        self._arrived: dict[str, int] = defaultdict(int)
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
        if is_recomputing():
            return
        given = bind_call(layer, args, kwargs)
        received = next(iter(given.values()))  # (T, B, *features)
        if self._first is None:
            self._first = name
        if name == self._first and given.get("state") is None:
            self.sequences += received.shape[1]
        counted = result[0] if isinstance(layer, SpikingNeuron) else received
        elements = counted.numel()
        if (own := self._own(self._steps, name, given, counted)) is not None:
            counted = counted * own
            elements = own.sum() * math.prod(counted.shape[2:])
        self.events[name] = self.events.get(name, 0) + torch.count_nonzero(counted)
        self.elements[name] = self.elements.get(name, 0) + elements

    def _own(
        self, steps: dict[str, int], name: str, given: dict[str, Any], counted: Tensor
    ) -> Tensor | None:
        """Where the sequences of a call are their own and not padding, if they are padded."""
        begin = 0 if given.get("state") is None else steps[name]
        steps[name] = begin + len(counted)
        return None if self.lengths is None else within(counted, self.lengths - begin)

    def count_arrivals(self, name: str, given: dict[str, Any], reach: "Reach") -> None:
        """Adds the synaptic operations of a call of the synapse layer ``name``."""
        counted = next(iter(given.values()))  # (T, B, *features)
        if (own := self._own(self._arrived, name, given, counted)) is not None:
            counted = counted * own
        self.fan_out[name], self.dense[name] = reach
        arrivals = (counted.ne(0).sum((0, 1)) * reach.fan_out.to(counted.device)).sum()
        spikes = ((counted == 0) | (counted == 1) | (counted == -1)).all()
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
        with _watch_arrivals(model, activity.count_arrivals):
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

    def count(name: str, given: dict[str, Any], reach: Reach) -> None:
        received = next(iter(given.values()))
        steps = (received.ne(0) * reach.fan_out.to(received.device)).flatten(2).sum(2)
        goes_on = given.get("state") is not None and name in operations
        operations[name] = torch.cat([operations[name], steps]) if goes_on else steps

    with _watch_arrivals(model, count):
        yield operations


class Reach(NamedTuple):
    """How far a synapse layer reaches.

    Attributes:
        fan_out: how many neurons each of its channels reaches through weights that are not zero,
            int64, of the shape of what it filters at a step, on the CPU.
        dense: multiply-accumulates of one pass through the weights, zeros too.
    """

    fan_out: Tensor
    dense: int


@contextmanager
def _watch_arrivals(
    model: nn.Module, count: Callable[[str, dict[str, Any], Reach], None]
) -> Iterator[None]:
    """Calls ``count(name, arguments, reach)`` for every call of a synapse before weights.

    That is when the weights are called: only then it is known which shape they see, and whether
    they are given all that the synapse handed on or, after pooling say, something else.
    """
    calls: dict[str, list[dict[str, Any]]] = {}  # of synapses whose weights have not run since
    known: dict[tuple[str, torch.Size, torch.Size], Reach | None] = {}

    def remember(
        name: str, synapse: nn.Module, args: tuple, kwargs: dict[str, Any], result: tuple
    ) -> None:
        if is_recomputing():
            return
        given = bind_call(synapse, args, kwargs)
        if given.get("state") is None:  # a sequence begins
            calls[name] = []
        calls.setdefault(name, []).append(given)

    def arrive(name: str, weights: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not (waiting := calls.pop(name, [])):
            return
        given = next(iter(bind_call(weights, args, kwargs).values()))
        received = [next(iter(call.values())) for call in waiting]
        whole, step = sum(x.numel() for x in received), received[0].shape[1:]
        if given.numel() not in (whole, step.numel()):  # all steps, or each
            return
        features = step[1:]
        key = name, features, given.shape
        if key not in known:
            known[key] = reach_of(weights, features, given.shape)
        if (reach := known[key]) is not None:
            for call in waiting:
                count(name, call, reach)

    handles = []
    for name, weights in _weights_after(model).items():
        synapse = model.get_submodule(name)
        handles += [
            synapse.register_forward_hook(partial(remember, name), with_kwargs=True),
            weights.register_forward_pre_hook(partial(arrive, name), with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights_after(model: nn.Module) -> dict[str, nn.Module]:
    """For each synapse layer the weights that follow it."""
    found: dict[str, nn.Module] = {}
    synapse = None
    for name, module in model.named_modules():
        if isinstance(module, IIRSynapse):
            synapse = name
        elif synapse is not None and _acts(module):
            if isinstance(module, WEIGHTED):
                found[synapse] = module
            synapse = None
    return found


def _acts(module: nn.Module) -> bool:
    """Whether the module is a layer itself: weights, neurons, pooling, numbers of its own."""
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    layers = *WEIGHTED, SpikingNeuron, *POOLING
    return isinstance(module, layers) or next(own, None) is not None


def reach_of(weights: nn.Module, features: Sequence[int], given: Sequence[int]) -> Reach | None:
    """How far a synapse layer reaches through the weights behind it.

    A weight counts for every time it reads a position: where padding repeats a position
    (``reflect``, ``replicate``), it may do so more than once.

    Args:
        weights: an ``nn.Linear`` or a convolution.
        features: the shape of what the synapse hands on at a step of a sequence.
        given: the shape of what the weights are given, whatever lies before its own dimensions.

    Returns:
        The reach, or ``None`` where the weights do not fit what the synapse hands on.
    """
    present = (weights.weight != 0).detach().to("cpu", torch.float64)
    both = present, torch.ones_like(present)
    if isinstance(weights, nn.Linear):
        # Flattened before, or a matrix for every position.
        if weights.in_features not in (math.prod(features), features[-1]):
            return None
        whole = weights.in_features == math.prod(features)
        reached, dense = (
            counts.view(features) if whole else counts.expand(features)
            for counts in (numbers.sum(0).long() for numbers in both)
        )
    else:
        own = given[-1 - len(weights.kernel_size) :]  # channels and positions
        if math.prod(own) != math.prod(features):
            return None
        reached, dense = (_readers(weights, numbers, own).reshape(features) for numbers in both)
    return Reach(reached, int(dense.sum()))


def _readers(weights: nn.Module, present: Tensor, maps: Sequence[int]) -> Tensor:
    """How many weights of a convolution read each position of its ``maps``, int64.

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
        x = torch.ones(1, *maps, requires_grad=True, **exact)
        (readers,) = torch.autograd.grad(ones(x).sum(), x)
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
