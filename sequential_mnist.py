"""A spiking network with resonant synapses reads a digit pixel by pixel, and says at the end which.

    python sequential_mnist.py --train   # pixels in a permuted order
    python sequential_mnist.py --train --config_file sequential_mnist_in_order.yaml
    python sequential_mnist.py --train hyperparameters.length=28   # 28 pixels a step, quick

The settings are in sequential_mnist.yaml; --help lists them all. Synapses and neurons are those of
Fang, Shrestha, Zhao, Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388, with filters of their own for
every channel. Batch normalisation, a last layer that reads several times, and teachers are ours.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from snn_lib import Gaussian, PerStep, ResonantSynapse, Sequential, SpikingNeuron, log_spaced
from snn_lib.readout import Snapshots
from snn_lib.tasks.digits import CLASSES, PIXELS
from snn_lib.tasks.sequential_digits import SequentialConfig, SequentialDigits
from snn_lib.training import main


def current(inputs: int, outputs: int, bias: bool) -> tuple[nn.Module, nn.Module]:
    """Weights, and a normalisation over batch and time, which holds the bias.

    Thanks to it, neurons fire even if the first weights are small, and small weights learn faster.
    """
    weights = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(weights.weight, std=0.4 / math.sqrt(inputs))
    normalisation = nn.BatchNorm1d(outputs)
    normalisation.bias.requires_grad_(bias)  # else it stays 0
    return weights, PerStep(normalisation)


class SNN(nn.Module):
    """64 filters of the pixels, two layers of neurons, each with its filters, and 10 outputs.

    The last layer does not spike. It reads the last filters at several moments, evenly spread, with
    other weights for each, and its output is the sum of what it has read so far.

    Shape:
        Pixels over time ``(T, B, 784 / T)`` to logits ``(T, B, 10)`` and the state.
    """

    def __init__(self, config: SequentialConfig) -> None:
        super().__init__()
        settings = config.hyperparameters
        neurons, moments, bias = settings.neurons, settings.moments, settings.train_bias
        neuron = partial(
            SpikingNeuron,
            tau_m=settings.tau_m,
            membrane_filter=settings.membrane_filter,
            reset_strength=settings.reset_strength,
            surrogate=Gaussian(settings.surrogate_width),
            dropout=settings.dropout,
        )
        synapse = partial(
            ResonantSynapse,
            tau=log_spaced(settings.shortest_memory, settings.longest_memory),
            frequency=log_spaced(settings.lowest_frequency, settings.highest_frequency),
            train_coefficients=settings.train_coefficients,
            constraint=settings.constraint,
            margin=1e-5,  # the slowest filters are near the edge of the stable set
        )
        pixels = nn.Linear(PIXELS // settings.length, 64, bias)
        with torch.no_grad():  # every filter starts with a full share of the pixels
            pixels.weight.normal_().sign_().div_(math.sqrt(pixels.in_features))
        if bias:
            nn.init.zeros_(pixels.bias)
        between = settings.length // moments
        self.layers = Sequential(
            pixels,
            # Permuted pixels are almost white noise, in which no frequency counts more than others.
            synapse(64, frequency=torch.linspace(settings.lowest_frequency, 0.5, 64)),
            *current(64, neurons, bias),
            neuron(neurons),
            synapse(neurons),
            *current(neurons, neurons, bias),
            neuron(neurons),
            synapse(neurons),
            nn.Linear(neurons, moments * CLASSES, bias),
            Snapshots(range(between, settings.length + 1, between)),
        )

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """Runs all time steps; see the class for shapes."""
        return self.layers(x, state)


if __name__ == "__main__":
    main(__file__, SNN, SequentialDigits())
