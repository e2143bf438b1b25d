"""The network of snn_mlp_1.py with first-order low-pass synapses classifies digits.

    python snn_mlp_2.py --train
    python snn_mlp_2.py --test

The settings are in snn_mlp_2.yaml; --help lists them all. The model follows Fang, Shrestha, Zhao,
Qiu, IJCAI 2020, doi 10.24963/ijcai.2020/388.
"""

from dataclasses import dataclass
from functools import partial

import snn_mlp_1
from snn_lib import LowPassSynapse
from snn_lib.settings import OneTimeConstant, section
from snn_lib.tasks.digits import DigitClassification, DigitConfig, DigitHyperparameters
from snn_lib.training import main


@dataclass
class LowPassHyperparameters(OneTimeConstant, DigitHyperparameters):
    """Hyperparameters of digit classification by low-pass synapses."""


@dataclass
class LowPassConfig(DigitConfig):
    """The configuration of snn_mlp_2."""

    hyperparameters: LowPassHyperparameters = section(LowPassHyperparameters)


class SNN(snn_mlp_1.SNN):
    """784-500-500-10, as in snn_mlp_1.py, but with low-pass synapses of time constant tau_m."""

    def __init__(self, config: LowPassConfig) -> None:
        settings = config.hyperparameters
        synapse = partial(
            LowPassSynapse,
            tau=settings.tau_m,
            train_coefficients=settings.train_coefficients,
            constraint=settings.constraint,
        )
        super().__init__(config, synapse)


if __name__ == "__main__":
    main(__file__, SNN, DigitClassification(LowPassConfig))
