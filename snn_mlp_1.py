"""A spiking multi-layer perceptron with dual exponential synapses classifies digits.

    python snn_mlp_1.py --train
    python snn_mlp_1.py --test

The settings are in snn_mlp_1.yaml; --help lists them all. The model follows Fang, Shrestha, Zhao,
Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from snn_lib import DualExponentialSynapse, Gaussian, Sequential, SpikingNeuron
from snn_lib.tasks.digits import CLASSES, PIXELS, DigitClassification, DigitConfig
from snn_lib.training import main


class SNN(nn.Module):
    """784-500-500-10: each layer filters its input, weighs it, and spikes.

    With the setting ``filter_position=behind`` it weighs them first and filters the currents.

    Args:
        config: the settings.
        synapse: makes the synapses for a number of channels, by default dual exponential ones.

    Shape:
        Input over time ``(T, B, 784)`` to output spikes ``(T, B, 10)`` and the state.
    """

    def __init__(
        self, config: DigitConfig, synapse: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        settings = config.hyperparameters
        synapse = synapse or partial(
            DualExponentialSynapse,
            tau_m=settings.tau_m,
            tau_s=settings.tau_s,
            train_coefficients=settings.train_coefficients,
            constraint=settings.constraint,
        )
        weights = partial(nn.Linear, bias=settings.train_bias)
        neuron = partial(
            SpikingNeuron,
            tau_m=settings.tau_m,
            membrane_filter=settings.membrane_filter,
            surrogate=Gaussian(settings.surrogate_width),
        )

        def filters(position: str, channels: int) -> list[nn.Module]:
            return [synapse(channels)] if settings.filter_position == position else []

        self.layers = Sequential(
            *filters("before", PIXELS),
            weights(PIXELS, 500),
            *filters("behind", 500),
            neuron(500, dropout=settings.dropout),
            *filters("before", 500),
            weights(500, 500),
            *filters("behind", 500),
            neuron(500, dropout=settings.dropout),
            *filters("before", 500),
            weights(500, CLASSES),
            *filters("behind", CLASSES),
            neuron(CLASSES),
        )

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """Runs all time steps; see the class for shapes."""
        return self.layers(x, state)


if __name__ == "__main__":
    main(__file__, SNN, DigitClassification())
