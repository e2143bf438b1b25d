"""Sequential digits: a network sees a few pixels of an image per step, and has to remember them.

With one step for each of the 784 pixels this is the sequential MNIST of Le, Jaitly, Hinton, "A
Simple Way to Initialize Recurrent Networks of Rectified Linear Units", arXiv 1504.00941. In its
permuted form, neighbours in the image are far apart in time.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snn_lib.data.augmentation import TransformConfig
from snn_lib.data.batches import Batch
from snn_lib.data.mnist import PIXELS
from snn_lib.errors import require
from snn_lib.readout import Last
from snn_lib.settings import ExperimentConfig, ResonantHyperparameters, setting
from snn_lib.tasks.base import output_of
from snn_lib.tasks.classification import ClassificationHyperparameters
from snn_lib.tasks.digits import Digits, MNISTOptions

MEAN = 0.1307  # of all pixels of the training images; white is 1
ORDER_SEED = 0  # of the permutation, which is the same in every run


@dataclass
class SequentialHyperparameters(ResonantHyperparameters, ClassificationHyperparameters):
    """Hyperparameters of sequential digits: the model and its training."""

    length: int = setting(
        PIXELS, "time steps: 784 of one pixel each, 28 of one row each, ...", at_least=1
    )
    reset_strength: float = setting(
        1.0, "amount by which a spike lowers the membrane potential, 0: no reset"
    )
    weight_gain: float = setting(
        4.0, "standard deviation of the first weights, times sqrt(fan-in)", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            PIXELS % self.length == 0,
            f"length is {self.length}, expected a divisor of the {PIXELS} pixels",
        )


@dataclass
class SequentialOptions(MNISTOptions):
    """How MNIST is used."""

    use_transform: bool = setting(False, "augment the training images")
    permuted: bool = setting(True, "show the pixels in a fixed random order, not row by row")


@dataclass
class SequentialConfig(ExperimentConfig):
    """The configuration of sequential_mnist."""

    hyperparameters: SequentialHyperparameters = field(default_factory=SequentialHyperparameters)
    mnist_config: SequentialOptions = field(default_factory=SequentialOptions)
    transform: TransformConfig = field(default_factory=TransformConfig)


class SequentialDigits(Digits):
    """The task of sequential_mnist.

    Attributes:
        order: int64 ``(784,)``, the pixel that each place of the sequence shows, on the device.
    """

    config_class = SequentialConfig

    def prepare(self, config: Any, device: torch.device) -> None:
        """Reads the training images; see :class:`Task`."""
        super().prepare(config, device)
        order = torch.arange(PIXELS)
        if config.mnist_config.permuted:
            order = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(ORDER_SEED))
        self.order = order.to(device)

    def encode(self, batch: Batch) -> Batch:
        """Images as a sequence of pixels around their mean, ``(T, B, 784 / T)``."""
        x = batch.x[:, self.order] - MEAN * self.config.mnist_config.max_rate
        x = x.unflatten(1, (self.config.hyperparameters.length, -1))
        return batch._replace(x=x.transpose(0, 1).contiguous())

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The network's output at the last step, when it has seen every pixel, ``(B, 10)``."""
        return Last()(output_of(model, batch.x)).float()
