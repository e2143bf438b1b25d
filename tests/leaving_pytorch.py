"""Networks of every kind of layer that can leave PyTorch, in float64, and inputs for them.

All cells are one kind; ``cells/test_cell.py`` lets one of its own leave. In float64 sums in another
order differ in the sixteenth digit, so that all spikes are the same.
"""

import torch
from torch import nn

from snn_lib import (
    ChannelsFirst,
    Delay,
    IIRSynapse,
    LowPassSynapse,
    PerStep,
    Recurrent,
    Repeat,
    ResonantSynapse,
    Sequential,
    SpikingNeuron,
    Votes,
)
from snn_lib.readout import READOUTS, Snapshots

SIDE = 7


def maps(*layers):
    """A network of maps (2, 7, 7) around these layers, which PerStep holds."""
    return Sequential(LowPassSynapse((2, 1, 1), 3.0), *map(PerStep, layers)), (2, SIDE, SIDE)


def convolution(**options):
    return maps(nn.Conv2d(2, 6, 3, **options))


def orders(order_p, order_q):
    alpha = [0.4 / (p + 1) for p in range(order_p)]
    beta = [0.5 / (q + 1) for q in range(order_q + 1)]
    return Sequential(IIRSynapse(5, alpha, beta)), (5,)


def spiking(**options):
    """Two layers of neurons, the first of which drives the second without a synapse."""
    return Sequential(
        nn.Linear(6, 20), SpikingNeuron(20, 4.0, **options), nn.Linear(20, 7), SpikingNeuron(7, 4.0)
    ), (6,)


def voting():
    """Maps out of a row of pixels, two of each, and three neurons that vote for each class."""
    return Sequential(
        nn.Unflatten(2, (4, 4)),
        ChannelsFirst(),
        nn.Unflatten(2, (1, 4)),
        Repeat(2),
        ResonantSynapse((2, 1, 1), 5.0, 0.1),
        PerStep(nn.Conv2d(2, 3, 2, stride=2)),
        SpikingNeuron((3, 1, 1), 4.0),
        nn.Flatten(2),
        Sequential(nn.Linear(12, 12), SpikingNeuron(12, 4.0, dropout=0.5)),
        Votes(4),
    ), (16,)


def normalised():
    """Neurons whose current is normalised, and normalised outputs."""
    return Sequential(
        nn.Linear(6, 20, bias=False),
        PerStep(nn.BatchNorm1d(20)),
        SpikingNeuron(20, 4.0),
        nn.Linear(20, 3),
        PerStep(nn.BatchNorm1d(3, affine=False)),
    ), (6,)


def several_filters(*positions):
    """Each of two inputs has three low passes of its own."""
    taus = torch.arange(1.0, 7.0).view(6, *positions and (1, 1))
    return Sequential(Repeat(3), LowPassSynapse(tuple(taus.shape), taus)), (2, *positions)


def shared():
    synapse = LowPassSynapse(4, 3.0)
    return Sequential(synapse, nn.Linear(4, 4), synapse), (4,)


def coming_back(synapse=None):
    """Neurons that receive their own spikes, between others."""
    recurrent = Recurrent(nn.Linear(20, 20), SpikingNeuron(20, 4.0), synapse)
    return Sequential(nn.Linear(6, 20), recurrent, nn.Linear(20, 7), SpikingNeuron(7, 4.0)), (6,)


def moved_delays():
    """As an optimiser leaves delays out of their range."""
    delay = Delay(3, 0.0, 2)
    delay.steps.data = torch.tensor([-0.5, 1.3, 2.6])
    return Sequential(delay), (3,)


def oblong(layer):
    """Pooling of maps, all of whose heights differ from their widths."""
    return Sequential(LowPassSynapse((2, 1, 1), 3.0), PerStep(layer)), (2, 5, 8)


def flattened(*layers):
    """Layers behind maps of several positions, whose channels lie last in memory."""
    return Sequential(PerStep(nn.Conv2d(2, 3, 2)), nn.Flatten(2), *layers), (2, 3, 3)


def snapshots_of_maps():
    """Four maps become two, each of which is a sum of two snapshots, before weights."""
    network, features = maps(nn.Conv2d(2, 4, 3))
    return Sequential(*network, Snapshots([4, 2]), PerStep(nn.Conv2d(2, 3, 2))), features


NETWORKS = {
    "linear": (lambda: (Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2)), (3,))),
    "order 0": lambda: orders(0, 0),
    "order 1": lambda: orders(1, 0),
    "order 2": lambda: orders(2, 0),
    "order 3, 2": lambda: orders(3, 2),
    "order 0, 3": lambda: orders(0, 3),
    "resonant": lambda: (Sequential(ResonantSynapse(8, 50.0, 0.2), nn.Linear(8, 3)), (8,)),
    "several filters for each input": several_filters,
    "repeated twice": lambda: (Sequential(LowPassSynapse(2, 3.0), Repeat(2), Repeat(2)), (2,)),
    "several filters for each map": lambda: several_filters(SIDE, SIDE),
    "held stable": lambda: (
        Sequential(IIRSynapse(5, (1.5, 0.4), (1.0,), constraint="stable")),
        (5,),
    ),
    "neurons": spiking,
    "neurons with a membrane": lambda: spiking(membrane_filter=True, reset_strength=0.7),
    "normalised": normalised,
    "normalised maps": lambda: maps(
        nn.Sequential(nn.Conv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6)), nn.MaxPool2d(2)
    ),
    "convolution": convolution,
    "padded": lambda: convolution(padding=1, bias=False),
    "same": lambda: convolution(padding="same", dilation=2),
    "same around an even kernel": lambda: maps(nn.Conv2d(2, 4, (2, 4), padding="same", dilation=3)),
    "stride": lambda: convolution(stride=(2, 3), padding=(0, 2)),
    "one position of a map": lambda: maps(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 6, 1, stride=SIDE)),
    "dilation": lambda: convolution(dilation=(1, 2), padding=2),
    "groups": lambda: convolution(groups=2),
    "depthwise with a stride": lambda: convolution(groups=2, stride=2, dilation=2),
    "pooling": lambda: maps(nn.MaxPool2d(2)),
    "pooling up to the edge": lambda: maps(nn.MaxPool2d(2, ceil_mode=True)),
    "pooling with gaps": lambda: maps(nn.MaxPool2d(3, stride=2, padding=1, dilation=2)),
    "pooling far beyond the edge": lambda: maps(
        nn.MaxPool2d(2, stride=3, padding=1, dilation=3, ceil_mode=True)
    ),
    "average": lambda: maps(nn.AvgPool2d(3, stride=2, padding=1)),
    "oblong pooling": lambda: oblong(
        nn.MaxPool2d((2, 3), (3, 2), (0, 1), dilation=(1, 2), ceil_mode=True)
    ),
    "oblong average": lambda: oblong(nn.AvgPool2d((2, 3), (1, 2), (1, 0))),
    "several in a PerStep": lambda: maps(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Dropout2d(), nn.Identity())
    ),
    "flattened": lambda: (
        Sequential(PerStep(nn.Conv2d(2, 3, 3)), nn.Flatten(2), LowPassSynapse(75, 3.0)),
        (2, SIDE, SIDE),
    ),
    "flattened and repeated": lambda: flattened(nn.Dropout(), Repeat(2), LowPassSynapse(24, 3.0)),
    "flattened before filters of their own": lambda: flattened(
        LowPassSynapse(12, torch.arange(1.0, 13.0)), nn.Linear(12, 3)
    ),
    "maps at the end": lambda: maps(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)),
    "rearranged and voting": voting,
    "used twice": shared,
    "delays": lambda: (
        Sequential(Repeat(2), Delay(6, torch.tensor([0, 0.3, 1, 2.5, 3.9, 4]), 4), nn.Linear(6, 2)),
        (3,),
    ),
    "a delay of whole steps": lambda: (
        Sequential(LowPassSynapse(3, 3.0), Delay(3, 2.0, 3)),
        (3,),
    ),
    "delays out of their range": moved_delays,
    "delays of maps": lambda: (
        Sequential(Delay((2, 1, 1), torch.tensor([0.4, 2.0]).view(2, 1, 1), 3)),
        (2, SIDE, SIDE),
    ),
    "a snapshot behind a gain": lambda: (
        Sequential(LowPassSynapse(6, 3.0), IIRSynapse(6, (), (0.25,)), Snapshots([4])),
        (6,),
    ),
    "snapshots": lambda: (Sequential(nn.Linear(6, 12), Snapshots([2, 5, 5, 90])), (6,)),
    "snapshots of maps": snapshots_of_maps,
    "snapshots of a row of maps": lambda: (
        Sequential(PerStep(nn.Conv2d(2, 3, 4)), nn.Flatten(2), Snapshots([1, 3, 4])),
        (2, SIDE, SIDE),
    ),
}

# What neither C nor integers can.
COMING_BACK = {
    "coming back": coming_back,
    "coming back through a synapse": lambda: coming_back(ResonantSynapse(20, 5.0, 0.1)),
    "coming back behind maps": lambda: flattened(
        Recurrent(nn.Linear(12, 12), SpikingNeuron(12, torch.arange(1.0, 13.0)))
    ),
}


def network(name):
    """The network of a name, with weights large enough to fire, and its input's features."""
    model, features = (NETWORKS | COMING_BACK)[name]()
    return loud(model), features


def loud(model):
    """The network in float64, with weights large enough to fire."""
    for part in model.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(part.weight, 0.1, 0.7)
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.1, 1.0)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return model.double().eval()


def spikes(steps, *features):
    """A random spike train ``(T, 1, *features)``, silent in the middle."""
    train = (torch.rand(steps, 1, *features) > 0.5).double()
    train[steps // 3 : steps // 2] = 0
    return train


def pooled_spikes(size):
    """Neurons that are driven by the mean of spikes, and spikes of which all or some are there."""
    network = Sequential(
        SpikingNeuron((2, 1, 1), 4.0, reset_strength=0.0),
        PerStep(nn.AvgPool2d(size)),
        SpikingNeuron((2, 1, 1), 4.0),
    ).eval()
    current = torch.full((30, 1, 2, 2 * size, size), 2.0)
    current[10:] *= torch.rand(20, 1, 2, 2 * size, size) > 0.3
    return network, current


def with_readout(kind):
    """A network that ends in a readout, and the same without."""
    layers = loud(Sequential(nn.Linear(4, 20), SpikingNeuron(20, 4.0), nn.Linear(20, 3)))
    return Sequential(layers, READOUTS[kind]()), layers


def passed_on(readout):
    """A network in float32 that reads out its input."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    return Sequential(layer, readout)
