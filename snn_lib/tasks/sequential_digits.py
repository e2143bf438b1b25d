"""Sequential digits: a network sees a few pixels of an image per step, and has to remember them.

The answer is the output of the last step. With one step for each of the 784 pixels this is the
sequential MNIST of Le, Jaitly, Hinton, "A Simple Way to Initialize Recurrent Networks of Rectified
Linear Units", arXiv 1504.00941. If the pixels are permuted, neighbours in the image are far apart
in time.
"""

from dataclasses import dataclass
from typing import Any

import torch

from snn_lib.data.augmentation import TransformSettings
from snn_lib.data.preparation import PIXELS, PixelPreparation
from snn_lib.errors import require
from snn_lib.settings import (
    FIRST_VALUE,
    TRAINING,
    ExperimentConfig,
    Hyperparameters,
    Needs,
    OneTimeConstant,
    ResonantFilters,
    section,
    setting,
)
from snn_lib.tasks.classification import LabelSmoothing
from snn_lib.tasks.digits import Digits, MNISTSettings

ORDER_SEED = 0  # seed of the permutation, which is the same in every run


@dataclass
class SequentialHyperparameters(OneTimeConstant, ResonantFilters, LabelSmoothing, Hyperparameters):
    """Hyperparameters of sequential digits: the model and its training."""

    batch_size: int = setting(
        64, "images in a training batch, over all processes", TRAINING, at_least=1
    )
    length: int = setting(PIXELS, "time steps, of 784 / length pixels each", at_least=1)
    neurons: int = setting(256, "neurons of each hidden layer", at_least=1)
    moments: int = setting(1, "how often the last layer reads, evenly spread", at_least=1)
    reset_strength: float = setting(
        1.0, "how much a spike lowers the potential, 0: none", FIRST_VALUE, at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            PIXELS % self.length == 0,
            f"length is {self.length}, expected a divisor of the {PIXELS} pixels",
        )
        require(
            self.length % self.moments == 0,
            f"moments is {self.moments}, expected a divisor of the length, {self.length}",
        )


@dataclass
class SequentialSettings(MNISTSettings):
    """How MNIST is used."""

    use_transform: bool = setting(False, "augment the training images", TRAINING)
    permuted: bool = setting(True, "show the pixels in a fixed random order, not row by row")


@dataclass
class SequentialConfig(ExperimentConfig):
    """The configuration of sequential_mnist."""

    hyperparameters: SequentialHyperparameters = section(SequentialHyperparameters)
    mnist_config: SequentialSettings = section(SequentialSettings)
    transform: TransformSettings = section(
        TransformSettings, Needs("mnist_config.use_transform"), TRAINING
    )


class SequentialDigits(Digits):
    """The task of sequential_mnist."""

    config_class = SequentialConfig
    readout_name = "last"

    def setup(self, config: Any, device: torch.device) -> None:
        """Reads the training images; see :class:`Task`."""
        super().setup(config, device)
        order = torch.arange(PIXELS)
        if config.mnist_config.permuted:
            order = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(ORDER_SEED))
        length, rate = config.hyperparameters.length, config.mnist_config.max_rate
        self.preparation = PixelPreparation(length, rate, order)
