"""An associative memory: reconstructs whole spatio-temporal spike patterns from damaged ones.

    python associative_memory.py --train
    python associative_memory.py --test

The settings are in associative_memory.yaml; --help lists them all, and associative_memory.ipynb
shows what the trained network does. The model follows the first experiment of Fang, Shrestha,
Zhao, Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

import math
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from snn_lib import (
    DualExponentialSynapse,
    Gaussian,
    ResonantSynapse,
    Sequential,
    SpikingNeuron,
    log_spaced,
)
from snn_lib.tasks.association import Association, AssociationConfig
from snn_lib.training import main

SIZES = (300, 500, 200, 500, 300)


class SNN(nn.Module):
    """300-500-200-500-300: four layers that filter their input spikes, weigh them, and spike.

    Shape:
        Damaged patterns ``(T, B, 300)`` to output spikes ``(T, B, 300)`` and the state.
    """

    def __init__(self, config: AssociationConfig) -> None:
        super().__init__()
        settings = config.hyperparameters
        kinds = {
            "dual_exponential": partial(
                DualExponentialSynapse, tau_m=settings.tau_m, tau_s=settings.tau_s
            ),
            "resonant": partial(
                ResonantSynapse,
                tau=log_spaced(settings.shortest_memory, settings.longest_memory),
                frequency=log_spaced(settings.lowest_frequency, settings.highest_frequency),
                margin=1e-5,  # the slowest filters are near the edge of the stable set
            ),
        }
        synapse = partial(
            kinds[settings.synapse],
            train_coefficients=settings.train_coefficients,
            constraint=settings.constraint,
        )
        neuron = partial(
            SpikingNeuron,
            tau_m=settings.tau_m,
            membrane_filter=settings.membrane_filter,
            surrogate=Gaussian(settings.surrogate_width),
        )
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(SIZES):
            weights = nn.Linear(inputs, outputs, bias=settings.train_bias)
            nn.init.normal_(weights.weight, std=settings.weight_gain / math.sqrt(inputs))
            dropout = 0.0 if outputs == SIZES[-1] else settings.dropout
            layers += [synapse(inputs), weights, neuron(outputs, dropout=dropout)]
        self.layers = Sequential(*layers)

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """Runs all time steps; see the class for shapes."""
        return self.layers(x, state)


if __name__ == "__main__":
    main(__file__, SNN, Association())
