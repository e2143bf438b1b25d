"""A spiking network with resonant synapses classifies time series: archive sets, or files of yours.

    python time_series.py --train
    python time_series.py --test
    python time_series.py --train dataset=GunPoint name=gun_point   # any UCR or UEA set
    python time_series.py --train dataset=mine.npz name=mine        # np.savez("mine.npz", x=x, y=y)

The settings are in time_series.yaml; --help lists them all. Archive sets and .ts files are read by
aeon (pip install aeon). The model follows Fang, Shrestha, Zhao, Qiu, IJCAI 2020, doi
10.24963/ijcai.2020/388, with filters of many time scales.
"""

import math

import torch
from torch import Tensor, nn

from snn_lib import (
    Gaussian,
    LowPassSynapse,
    ResonantSynapse,
    Sequential,
    SpikingNeuron,
    answer_from_the_start,
    fire_from_the_start,
    log_spaced,
)
from snn_lib.tasks.time_series import TimeSeries, TimeSeriesConfig
from snn_lib.training import main


class SNN(nn.Module):
    """64-1024-classes: many filters of the inputs, and many neurons that each hear all of them.

    Every input has several resonant filters of its own, which tell the neurons what has just been
    and what was long ago. How often a neuron fires says how often in the sequence something was as
    its random weights have it: the last layer weighs that, averaged over time.

    Args:
        config: the settings.
        inputs: channels of the input.
        classes: how many there are.
        steps: of the longest sequence; memories and periods are spread up to there.

    Shape:
        Input over time ``(T, B, inputs)`` to logits ``(T, B, classes)`` and the state.
    """

    def __init__(self, config: TimeSeriesConfig, inputs: int, classes: int, steps: int) -> None:
        super().__init__()
        options = config.hyperparameters
        shortest, longest = options.shortest_memory, options.longest_memory * steps
        self.copies = -(-options.filters // inputs)
        filters, neurons = self.copies * inputs, options.neurons
        weights = nn.Linear(filters, neurons, bias=options.train_bias)
        nn.init.normal_(weights.weight, std=1 / math.sqrt(filters))
        if options.train_bias:
            nn.init.normal_(weights.bias)
        self.layers = Sequential(
            ResonantSynapse(
                filters,
                log_spaced(shortest, max(longest, 2 * shortest)),
                log_spaced(min(0.5 / steps, 0.25), 0.25),  # a step: from half a cycle in all
                train_coefficients=options.train_coefficients,
                constraint=options.constraint,
                margin=1e-5,  # the slowest filters are near the edge of the stable set
            ),
            weights,
            SpikingNeuron(
                neurons,
                options.tau_m,
                membrane_filter=options.membrane_filter,
                surrogate=Gaussian(options.surrogate_width),
                dropout=options.dropout,
            ),
            LowPassSynapse(neurons, options.tau_s, train_coefficients=False),
            nn.Linear(neurons, classes),
        )

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """Runs all time steps; see the class for shapes."""
        return self.layers(x.repeat(1, 1, self.copies), state)


def initialise(model: SNN, task: TimeSeries) -> None:
    """Finds first weights on the training sequences.

    The filters become equally loud, the neurons fire at a given rate, and the last layer already
    tells the classes apart.
    """
    x = task.sample()
    filters, readout = model.layers[0], model.layers[-1]
    loudness = filters(x.repeat(1, 1, model.copies))[0].std((0, 1))
    filters.beta /= torch.where(loudness > 0, loudness, 1.0)
    fire_from_the_start(model, x, task.config.hyperparameters.first_rate)
    answer_from_the_start(model, readout, task.training_sequences(), scale=4.0)


task = TimeSeries()


def build_model(config: TimeSeriesConfig) -> SNN:
    """The network for the data that the task has read."""
    return SNN(config, task.preparation.inputs, len(task.classes), task.preparation.steps)


if __name__ == "__main__":
    main(__file__, build_model, task, initialise)
