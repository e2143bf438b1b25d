"""A spiking convolutional network classifies what an event camera records.

    python event_vision.py --train                             # a simulated camera sees MNIST
    python event_vision.py --test
    python event_vision.py --train dataset=nmnist name=nmnist  # real recordings, by Tonic
    python event_vision.py --train --config_file event_vision_gesture.yaml

The settings are in event_vision.yaml; --help lists them all. The model follows Fang, Shrestha,
Zhao, Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

from torch import nn

from snn_lib import (
    ChannelsFirst,
    DualExponentialSynapse,
    Gaussian,
    PerStep,
    Sequential,
    SpikingNeuron,
    fire_from_the_start,
)
from snn_lib.data.recordings import SETS
from snn_lib.settings import FIRST_VALUE, ConvolutionSizes, FilterPosition, section, setting
from snn_lib.tasks.event_vision import EventConfig, EventHyperparameters, EventVision
from snn_lib.training import main


@dataclass
class EventConvHyperparameters(ConvolutionSizes, FilterPosition, EventHyperparameters):
    """Hyperparameters of the convolutional network."""

    first_rate: float = setting(
        0.05,
        "firing rate (spikes per step) that the first weights give",
        FIRST_VALUE,
        above=0,
        below=1,
    )


@dataclass
class EventConvConfig(EventConfig):
    """The configuration of event_vision, its network's sizes included."""

    hyperparameters: EventConvHyperparameters = section(EventConvHyperparameters)


class SNN(Sequential):
    """8C3-P2-16C3-P2-32C3-P2-128-classes: each layer filters spikes, weighs them, spikes and pools.

    With the setting ``filter_position=behind`` it weighs them first and filters the currents. All
    pixels of a feature map share a filter. Pooling keeps what an odd side leaves over: 34 x 34
    pixels become 17 x 17, 9 x 9 and 5 x 5.

    Shape:
        Darker and brighter events over time ``(T, B, side, side, 2)`` to output spikes ``(T, B,
        classes)`` and the state.
    """

    def __init__(self, config: EventConvConfig) -> None:
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

        def filters(position: str, *shape: int) -> list[nn.Module]:
            return [synapse(shape)] if settings.filter_position == position else []

        def convolution(inputs: int, outputs: int) -> PerStep:
            return PerStep(nn.Conv2d(inputs, outputs, 3, padding=1, bias=settings.train_bias))

        def pooling() -> PerStep:
            return PerStep(nn.MaxPool2d(2, ceil_mode=True))

        first, second, third = settings.channels
        positions = (-(-config.events.side // 8)) ** 2  # of a map, pooled three times
        classes = SETS[config.dataset].classes
        layers = Sequential(
            *filters("before", 2, 1, 1),
            convolution(2, first),
            *filters("behind", first, 1, 1),
            neuron((first, 1, 1)),
            pooling(),
            *filters("before", first, 1, 1),
            convolution(first, second),
            *filters("behind", second, 1, 1),
            neuron((second, 1, 1)),
            pooling(),
            *filters("before", second, 1, 1),
            convolution(second, third),
            *filters("behind", third, 1, 1),
            neuron((third, 1, 1)),
            pooling(),
            *filters("before", third, 1, 1),
            nn.Flatten(2),
            nn.Linear(third * positions, settings.hidden, bias=settings.train_bias),
            *filters("behind", settings.hidden),
            neuron(settings.hidden, dropout=settings.dropout),
            *filters("before", settings.hidden),
            nn.Linear(settings.hidden, classes, bias=settings.train_bias),
            *filters("behind", classes),
            neuron(classes),
        )
        super().__init__(OrderedDict(maps=ChannelsFirst(), layers=layers))


def initialise(model: SNN, task: EventVision) -> None:
    """Scales the first weights so that every layer fires on the training recordings."""
    fire_from_the_start(model, task.sample(), task.config.hyperparameters.first_rate)


if __name__ == "__main__":
    main(__file__, SNN, EventVision(EventConvConfig), initialise)
