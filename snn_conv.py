"""A spiking convolutional network with dual exponential synapses classifies digits.

    python snn_conv.py --train
    python snn_conv.py --test
    python snn_conv.py --train hyperparameters.filters=pixel   # coefficients of every pixel's own

The settings are in snn_conv.yaml; --help lists them all. The model follows Fang, Shrestha, Zhao,
Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from snn_lib import (
    ChannelsFirst,
    DualExponentialSynapse,
    Gaussian,
    PerStep,
    Sequential,
    SpikingNeuron,
    Votes,
)
from snn_lib.settings import ConvolutionSizes, section, setting
from snn_lib.tasks.digits import CLASSES, DigitClassification, DigitConfig, DigitHyperparameters
from snn_lib.training import main

SIDE = 28  # pixels
GAIN = 2.5  # of the first weights, with which all layers fire


@dataclass
class ConvHyperparameters(ConvolutionSizes, DigitHyperparameters):
    """Hyperparameters of the convolutional network."""

    filters: Literal["map", "pixel"] = setting(
        "map", "whether each feature map has one filter, or each of its pixels"
    )
    voters: int = setting(10, "output neurons of each class, whose spikes are added up", at_least=1)


@dataclass
class ConvConfig(DigitConfig):
    """The configuration of snn_conv."""

    hyperparameters: ConvHyperparameters = section(ConvHyperparameters)


class SNN(Sequential):
    """16C3-P2-64C3-P2-128C3-P2-256-100: layers that filter spikes, weigh and pool them, and spike.

    With the setting ``filter_position=behind`` they weigh and pool first, and filter the currents.
    Ten neurons vote for each class, because the spikes of a single neuron in a few steps often end
    in a tie.

    Shape:
        Input over time ``(T, B, 784)`` to the spikes of each class ``(T, B, 10)`` and the state.
    """

    def __init__(self, config: ConvConfig) -> None:
        settings = config.hyperparameters

        synapse = partial(
            DualExponentialSynapse,
            tau_m=settings.tau_m,
            tau_s=settings.tau_s,
            train_coefficients=settings.train_coefficients,
            constraint=settings.constraint,
        )
        neuron = partial(
            SpikingNeuron,
            tau_m=settings.tau_m,
            membrane_filter=settings.membrane_filter,
            surrogate=Gaussian(settings.surrogate_width),
        )

        def filters(position: str, channels: int, *sides: int) -> list[nn.Module]:
            if settings.filters == "map":  # all pixels of a map share a filter
                sides = (1,) * len(sides)
            return [synapse((channels, *sides))] if settings.filter_position == position else []

        def weights(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
            nn.init.normal_(layer.weight, std=GAIN / math.sqrt(layer.weight[0].numel()))
            if settings.train_bias:
                nn.init.zeros_(layer.bias)
            return layer

        def convolution(inputs: int, outputs: int) -> PerStep:
            layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=settings.train_bias)
            return PerStep(weights(layer))

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return weights(nn.Linear(inputs, outputs, bias=settings.train_bias))

        first, second, third = settings.channels
        hidden, voters = settings.hidden, CLASSES * settings.voters
        layers = Sequential(
            *filters("before", 1, 28, 28),
            convolution(1, first),
            PerStep(nn.MaxPool2d(2)),
            *filters("behind", first, 14, 14),
            neuron((first, 1, 1)),
            *filters("before", first, 14, 14),
            convolution(first, second),
            PerStep(nn.MaxPool2d(2)),
            *filters("behind", second, 7, 7),
            neuron((second, 1, 1)),
            *filters("before", second, 7, 7),
            convolution(second, third),
            PerStep(nn.MaxPool2d(2)),
            *filters("behind", third, 3, 3),
            neuron((third, 1, 1)),
            *filters("before", third, 3, 3),
            nn.Flatten(2),
            linear(9 * third, hidden),
            *filters("behind", hidden),
            neuron(hidden, dropout=settings.dropout),
            *filters("before", hidden),
            linear(hidden, voters),
            *filters("behind", voters),
            neuron(voters),
        )
        super().__init__(
            OrderedDict(
                pixels=nn.Unflatten(2, (SIDE, SIDE, 1)),
                maps=ChannelsFirst(),  # (T, B, 1, 28, 28), channels last in memory
                layers=layers,
                votes=Votes(CLASSES),
            )
        )


if __name__ == "__main__":
    main(__file__, SNN, DigitClassification(ConvConfig))
