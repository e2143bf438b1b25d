"""A spiking network with resonant synapses classifies time series: archive sets, or files of yours.

    python time_series.py --train
    python time_series.py --test
    python time_series.py --train dataset=GunPoint name=gun_point   # any UCR or UEA set
    python time_series.py --train dataset=mine.npz name=mine        # np.savez("mine.npz", x=x, y=y)

The settings are in time_series.yaml; --help lists them all. Archive sets and .ts files are read by
aeon (pip install aeon). The model follows Fang, Shrestha, Zhao, Qiu, IJCAI 2020, doi
10.24963/ijcai.2020/388, with filters of many time scales.
"""

from torch import Tensor, nn

from snn_lib import (
    Gaussian,
    LowPassSynapse,
    ResonantSynapse,
    Sequential,
    SpikingNeuron,
    fire_from_the_start,
    log_spaced,
)
from snn_lib.tasks.time_series import TimeSeries, TimeSeriesConfig
from snn_lib.training import main


class SNN(nn.Module):
    """32-128-128-classes: filtered inputs drive neurons, whose filtered spikes drive others.

    Every input has several filters of its own, which tell the first neurons what has just been and
    what was long ago. The last layer does not spike: what it says is averaged over time.

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

        def synapse(channels: int) -> ResonantSynapse | LowPassSynapse:
            shortest, longest = options.shortest_memory, options.longest_memory * steps
            memory = log_spaced(shortest, max(longest, 2 * shortest))
            settings = {
                "train_coefficients": options.train_coefficients,
                "constraint": options.constraint,
                "margin": 1e-5,  # the slowest filters are near the edge of the stable set
            }
            if options.synapse == "low_pass":
                return LowPassSynapse(channels, memory, unit_energy=True, **settings)
            cycles = log_spaced(min(0.5 / steps, 0.25), 0.25)  # a step: from half a cycle in all
            return ResonantSynapse(channels, memory, cycles, **settings)

        def neuron(count: int) -> SpikingNeuron:
            return SpikingNeuron(
                count,
                options.tau_m,
                membrane_filter=options.membrane_filter,
                surrogate=Gaussian(options.surrogate_width),
                dropout=options.dropout,
            )

        self.copies = max(-(-options.filters // inputs), 1)
        filtered, neurons, bias = self.copies * inputs, options.neurons, options.train_bias
        self.layers = Sequential(
            synapse(filtered) if options.filters else nn.Identity(),
            nn.Linear(filtered, neurons, bias=bias),
            neuron(neurons),
            synapse(neurons),
            nn.Linear(neurons, neurons, bias=bias),
            neuron(neurons),
            synapse(neurons),
            nn.Linear(neurons, classes),
        )

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """Runs all time steps; see the class for shapes."""
        return self.layers(x.repeat(1, 1, self.copies), state)


task = TimeSeries()


def build_model(config: TimeSeriesConfig) -> SNN:
    """The network for the data that the task has read, with first weights with which it fires."""
    model = SNN(config, task.inputs, len(task.classes), task.steps)
    fire_from_the_start(model, task.sample(), config.hyperparameters.first_rate)
    return model


if __name__ == "__main__":
    main(__file__, build_model, task)
