"""A spiking multi-layer perceptron with first-order low-pass synapses classifies digits.

    python snn_mlp_2.py --train
    python snn_mlp_2.py --test

The settings are in snn_mlp_2.yaml; --help lists them all. The model follows Fang, Shrestha, Zhao,
Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from torch import Tensor, nn

from snn_lib import Gaussian, LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.tasks.digits import CLASSES, PIXELS, DigitClassification, DigitConfig
from snn_lib.training import main


class SNN(nn.Module):
    """784-500-500-10: each layer filters its input spikes, weighs them, and spikes.

    Shape:
        Input over time ``(T, B, 784)`` to output spikes ``(T, B, 10)`` and the state.
    """

    def __init__(self, config: DigitConfig) -> None:
        super().__init__()
        options = config.hyperparameters

        def synapse(channels: int) -> LowPassSynapse:
            return LowPassSynapse(
                channels,
                options.tau_m,
                train_coefficients=options.train_coefficients,
                constraint=options.constraint,
            )

        def neuron(count: int, dropout: float = 0.0) -> SpikingNeuron:
            return SpikingNeuron(
                count,
                options.tau_m,
                membrane_filter=options.membrane_filter,
                surrogate=Gaussian(options.surrogate_width),
                dropout=dropout,
            )

        self.layers = Sequential(
            synapse(PIXELS),
            nn.Linear(PIXELS, 500, bias=options.train_bias),
            neuron(500, options.dropout),
            synapse(500),
            nn.Linear(500, 500, bias=options.train_bias),
            neuron(500, options.dropout),
            synapse(500),
            nn.Linear(500, CLASSES, bias=options.train_bias),
            neuron(CLASSES),
        )

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """Runs all time steps; see the class for shapes."""
        return self.layers(x, state)


if __name__ == "__main__":
    main(__file__, SNN, DigitClassification())
