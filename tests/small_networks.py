"""Small networks for the tests of containers and chunks, and what such tests need beside them."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snn_lib.cells import Cell, DualExponentialSynapse, IIRSynapse, LowPassSynapse, SpikingNeuron
from snn_lib.chunks import Chunked
from snn_lib.containers import Sequential

TAU_M, TAU_S = 4.0, 1.0


class Integrator(Cell):
    """Neither coefficients nor spikes: it hands on a membrane that its threshold resets."""

    states = ("membrane",)

    @staticmethod
    def step(x, state, coefficients, fire):
        membrane = 0.75 * state[0] + x
        return membrane, (membrane - fire(membrane),)


class Threshold(Cell):
    """A neuron without coefficients and without a memory of its own."""

    @staticmethod
    def step(x, state, coefficients, fire):
        return fire(x), ()


class Held(Cell):
    """A potential that is a coefficient, as is a state after the first step."""

    states = ("reset", "level")
    coefficients = ("jump", "decay")

    @staticmethod
    def step(x, state, coefficients, fire):
        (reset, level), (jump, decay) = state, coefficients
        level = decay * level + x
        return fire(jump), (jump * 1.0, level - reset)


class RenamedInput(SpikingNeuron):
    """A neuron of a user's own, whose input has another name."""

    def forward(self, current, state=None, lengths=None):
        return super().forward(current, state, lengths)


def dual_exponential(channels):
    return DualExponentialSynapse(channels, TAU_M, TAU_S)


def low_pass(channels):
    return LowPassSynapse(channels, TAU_M)


def two_layers(synapse=dual_exponential, membrane_filter=False, dropout=0.0):
    """12-10-5, with weights large enough for both layers to fire."""

    def layer(inputs, outputs):
        neurons = SpikingNeuron(outputs, TAU_M, membrane_filter, dropout=dropout)
        return synapse(inputs), nn.Linear(inputs, outputs), neurons

    network = Sequential(*layer(12, 10), *layer(10, 5))
    for index in (1, 4):
        nn.init.normal_(network[index].weight, 0.1, 0.5)
    return network


def spike_trains(steps=25, batch=8, channels=12):
    return (torch.rand(steps, batch, channels) > 0.6).float()


def ragged_network():
    return Sequential(
        IIRSynapse(6, (0.5, -0.25, 0.125), (0.5, 0.25)),
        nn.Linear(6, 5),
        SpikingNeuron(5, TAU_M),
        Sequential(LowPassSynapse(5, 4.0), nn.Linear(5, 4)),
        SpikingNeuron(4, TAU_M, membrane_filter=True),
    ).double()


def in_parts(model, x, sizes, state=None):
    """The output and the last state of parts of a sequence, each from the state of the one before.

    ``sizes`` are as those of ``torch.split``: the size of all parts, or a list.
    """
    outputs = []
    for part in x.split(sizes):
        output, state = model(part, state)
        outputs.append(output)
    return torch.cat(outputs), state


def parts(state):
    """The tensors of a state, in order."""
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def assert_chunks_and_lengths_change_nothing(layer, x, chunk, lengths):
    """Chunks give the whole run, and lengths the state of each sequence alone at its own end."""
    whole, last = layer(x)
    torch.testing.assert_close(Chunked(layer, chunk)(x), (whole, last), rtol=0, atol=0)
    padded, ends = layer(x, lengths=lengths)
    assert torch.equal(padded, whole)
    _, in_chunks = Chunked(layer, chunk)(x, lengths=lengths)
    torch.testing.assert_close(parts(in_chunks), parts(ends), rtol=0, atol=0)
    for row, length in enumerate(lengths):
        _, alone = layer(x[:length, row : row + 1])
        for end, expected in zip(parts(ends), parts(alone), strict=True):
            torch.testing.assert_close(end.select(-2, row), expected.select(-2, 0))


class Operators(TorchDispatchMode):
    """The names of all operators that run, and the elements of what each returns."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.calls.append((str(function), sum(t.numel() for t in tensors)))
        return result

    @property
    def elements(self):
        return sum(count for _, count in self.calls)
