"""A spiking network names the wave of an electrocardiogram at every step, as it comes.

    python ecg.py --train dataset_path=FOLDER   # of QTDB_train.mat and QTDB_test.mat
    python ecg.py --train dataset_path=FOLDER --config_file ecg_small.yaml   # 36 hidden neurons

Both files are in the folder data of https://github.com/byin-cwi/Efficient-spiking-networks. The
settings are in ecg.yaml; --help lists them all. Synapses and neurons are those of Fang, Shrestha,
Zhao, Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388, with several resonant filters for each input.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from snn_lib import (
    Gaussian,
    LowPassSynapse,
    Repeat,
    ResonantSynapse,
    Sequential,
    SpikingNeuron,
    fire_from_the_start,
    log_spaced,
)
from snn_lib.data.ecg import WAVES, hold_out, load_ecg
from snn_lib.settings import (
    FIRST_VALUE,
    NEVER,
    TRAINING,
    Hyperparameters,
    OneTimeConstant,
    ResonantFilters,
    section,
    setting,
)
from snn_lib.tasks import SequenceClassification, SequenceConfig
from snn_lib.tasks.classification import LabelSmoothing
from snn_lib.training import main

CHANNELS = 4  # rising and falling events of two leads
EXCHANGED = [2, 3, 0, 1]  # the channels with the other lead first
VALIDATION_SHARE = 0.1  # of the training recordings


@dataclass
class ECGHyperparameters(OneTimeConstant, ResonantFilters, LabelSmoothing, Hyperparameters):
    """Hyperparameters of the network and its training."""

    length: int = setting(1301, "the sequences have their own", NEVER, at_least=1)
    filters: int = setting(16, "filters of each channel", at_least=1)
    neurons: list[int] = setting([64, 64], "neurons of each hidden layer", at_least=1)
    shortest_trace: float = setting(
        2.0, "steps in which the fastest trace of spikes decays", FIRST_VALUE, above=0
    )
    longest_trace: float = setting(
        50.0, "steps in which the slowest trace of spikes decays", FIRST_VALUE, above=0
    )
    first_rate: float = setting(
        0.1, "spikes per step that the first weights give", FIRST_VALUE, above=0, below=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_order("shortest_trace", "longest_trace")


@dataclass
class ECGConfig(SequenceConfig):
    """The configuration of ecg."""

    hyperparameters: ECGHyperparameters = section(ECGHyperparameters)
    unlabelled: Literal["ignored", "first"] = setting(
        "ignored", "what a step without a label counts as: nothing, or the first class"
    )
    exchange_leads: bool = setting(
        False, "also train on every sequence with its two leads exchanged", TRAINING
    )


class SNN(Sequential):
    """Filters of every channel, layers of neurons with a trace of their spikes, and 6 outputs.

    Shape:
        Events over time ``(T, B, 4)`` to logits at every step ``(T, B, 6)`` and the state.
    """

    def __init__(self, config: ECGConfig) -> None:
        settings = config.hyperparameters
        shared = {
            "train_coefficients": settings.train_coefficients,
            "constraint": settings.constraint,
            "margin": 1e-5,  # the slowest filters are near the edge of the stable set
        }
        inputs = CHANNELS * settings.filters
        layers = [
            Repeat(settings.filters),
            ResonantSynapse(
                inputs,
                log_spaced(settings.shortest_memory, settings.longest_memory),
                log_spaced(settings.lowest_frequency, settings.highest_frequency),
                **shared,
            ),
        ]
        for neurons in settings.neurons:
            layers += [
                nn.Linear(inputs, neurons, settings.train_bias),
                SpikingNeuron(
                    neurons,
                    settings.tau_m,
                    settings.membrane_filter,
                    surrogate=Gaussian(settings.surrogate_width),
                    dropout=settings.dropout,
                ),
                LowPassSynapse(
                    neurons,
                    log_spaced(settings.shortest_trace, settings.longest_trace),
                    unit_energy=True,
                    **shared,
                ),
            ]
            inputs = neurons
        super().__init__(*layers, nn.Linear(inputs, len(WAVES), settings.train_bias))


def data(config: ECGConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """The parts of the data; whole recordings are held out for validation."""
    folder = Path(config.dataset_path)
    (x, y), test = (load_ecg(folder, part) for part in ("train", "test"))
    held_out = hold_out(y, VALIDATION_SHARE, config.seed)
    parts = {"train": (x[~held_out], y[~held_out]), "validation": (x[held_out], y[held_out])}
    parts["test"] = test
    if config.exchange_leads:
        x, y = parts["train"]
        parts["train"] = torch.cat([x, x[..., EXCHANGED]]), y.repeat(2, 1)
    if config.unlabelled == "first":
        return {part: (x, y.clamp(min=0)) for part, (x, y) in parts.items()}
    return parts


def initialise(model: SNN, task: SequenceClassification) -> None:
    """Scales the weights so that all layers fire."""
    batch, rate = next(task.batches("train")), task.config.hyperparameters.first_rate
    fire_from_the_start(model, batch.x, rate, batch.lengths)


if __name__ == "__main__":
    task = SequenceClassification(data, None, classes=WAVES, config_class=ECGConfig)
    main(__file__, SNN, task, initialise)
