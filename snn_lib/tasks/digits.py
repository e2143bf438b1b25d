"""Digit classification: MNIST as input over time; the output neuron that spikes most answers.

:class:`Digits` is the part that all tasks on MNIST share.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from snn_lib.data.augmentation import TransformSettings, draw_grids, warp
from snn_lib.data.batches import Batch, Split, split_indices
from snn_lib.data.mnist import CLASSES, IMAGES, load_mnist
from snn_lib.data.preparation import PIXELS, DigitPreparation, ImagePreparation
from snn_lib.encoding import LatencyLaw
from snn_lib.errors import require
from snn_lib.seeds import batch_generator
from snn_lib.settings import (
    TRAINING,
    ExperimentConfig,
    FilterPosition,
    Hyperparameters,
    Needs,
    Settings,
    section,
    setting,
)
from snn_lib.tasks.classification import (
    Classification,
    CountClassification,
    LabelSmoothing,
    SpikeCounting,
)
from snn_lib.tasks.distillation import Teachers

__all__ = ["CLASSES", "PIXELS", "DigitClassification", "DigitConfig"]

EVALUATION_BATCH = 250


@dataclass
class DigitHyperparameters(SpikeCounting, LabelSmoothing, FilterPosition, Hyperparameters):
    """Hyperparameters of digit classification: the model and its training."""

    batch_size: int = setting(
        64, "images in a training batch, over all processes", TRAINING, at_least=1
    )
    encoding: Literal["constant", "poisson", "latency"] = setting(
        "constant", "a pixel enters as a current, as random spikes, or as the time of one spike"
    )


@dataclass
class LatencySettings(Settings):
    """Encoding by latency: each pixel spikes once, and brighter pixels spike earlier."""

    span: int = setting(10, "first steps of the sequence, in which the spikes come", at_least=1)
    threshold: float = setting(
        0.2, "pixels up to this grey level stay silent; white is 1", above=0, below=1
    )
    law: LatencyLaw = setting("linear", "function from grey level to spike time")
    tau: float = setting(
        5.0,
        "time constant of the logarithmic law, in steps",
        Needs("latency.law", ("logarithmic",)),
        above=0,
    )
    jitter: float = setting(0.0, "standard deviation of noise on the times, in steps", at_least=0)


@dataclass
class MNISTSettings(Settings):
    """How MNIST is used."""

    max_rate: float = setting(1.0, "current or firing rate of a white pixel", above=0)
    use_transform: bool = setting(True, "augment the training images", TRAINING)
    teachers: list[str] = setting(
        [], "checkpoints of networks whose mean answer is learned instead of the label", TRAINING
    )
    teacher_temperature: float = setting(
        3.0,
        "what the teachers' logits are divided by: higher is softer",
        Needs("mnist_config.teachers"),
        TRAINING,
        above=0,
    )
    validation_size: int = setting(
        5_000, "held-out images, which choose the best epoch", TRAINING, at_least=1
    )
    training_size: int = setting(
        55_000, "number of the other images trained on", TRAINING, at_least=1
    )
    test_size: int = setting(10_000, "how many test images are used", at_least=1, at_most=10_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.validation_size + self.training_size
        require(
            both <= IMAGES[True],
            f"validation_size + training_size is {both}, MNIST has {IMAGES[True]} training images",
        )


@dataclass
class DigitConfig(ExperimentConfig):
    """The configuration of snn_mlp_1, from which those of snn_mlp_2 and snn_conv are derived."""

    hyperparameters: DigitHyperparameters = section(DigitHyperparameters)
    mnist_config: MNISTSettings = section(MNISTSettings)
    transform: TransformSettings = section(
        TransformSettings, Needs("mnist_config.use_transform"), TRAINING
    )
    latency: LatencySettings = section(
        LatencySettings, Needs("hyperparameters.encoding", ("latency",))
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        encoding, length = self.hyperparameters.encoding, self.hyperparameters.length
        span, threshold = self.latency.span, self.latency.threshold
        brightest = self.mnist_config.max_rate
        require(
            encoding != "latency" or span <= length,
            f"latency.span is {span}, expected at most hyperparameters.length, {length}",
        )
        require(
            encoding != "latency" or threshold < brightest,
            f"latency.threshold is {threshold}, expected below mnist_config.max_rate, {brightest}, "
            "which is the brightest pixel",
        )
        require(
            encoding != "poisson" or brightest <= 1,
            f"mnist_config.max_rate is {brightest}, expected at most 1: with "
            "hyperparameters.encoding=poisson it is a probability",
        )


class Digits(Classification):
    """MNIST in splits and batches; a subclass sets an :class:`ImagePreparation`."""

    unit = "images"
    preparation: ImagePreparation

    def setup(self, config: Any, device: torch.device) -> None:
        """Reads the training images; see :class:`Task`."""
        super().setup(config, device)
        settings = config.mnist_config
        self.classes = [str(digit) for digit in range(CLASSES)]
        images, labels = load_mnist(Path(config.dataset_path), train=True)
        training, validation = split_indices(len(labels), settings.validation_size, config.seed)
        training = training[: settings.training_size]
        self.images = {
            "train": (images[training], labels[training]),
            "validation": (images[validation], labels[validation]),
        }
        self._teachers: Teachers | None = None

    def teachers(self) -> Teachers:
        """The teachers, which are loaded once, when they are first asked for."""
        if self._teachers is None:
            settings = self.config.mnist_config
            self._teachers = Teachers(settings.teachers, settings.teacher_temperature)
        return self._teachers

    def make_split(self, split: str) -> Split:
        """The digits of a split. Test images are read only when they are needed."""
        config, settings = self.config, self.config.mnist_config
        if split == "test":
            images, labels = load_mnist(Path(config.dataset_path), train=False)
            size = settings.test_size
            images, labels = images[:size], labels[:size]
        else:
            images, labels = self.images[split]
        training = split == "train"
        augment = training and settings.use_transform
        teachers = self.teachers() if training and settings.teachers else None

        def make_batch(numbers: Tensor, share: slice, epoch: int, number: int) -> Batch:
            mine = numbers[share]
            x = images[mine].float() / 255.0
            if augment:
                generator = batch_generator(config.seed, epoch, number + 1)
                x = warp(x, draw_grids(len(numbers), config.transform, generator)[share])
            y = labels[mine]
            if teachers is not None and len(mine):  # a process's share may be empty
                y = teachers(x)
            # Each process draws different spikes for its share of a batch. Validation and test
            # images draw from the same numbers.
            generator = batch_generator(config.seed + self.rank + 1, max(epoch, -1), number)
            return Batch(self.preparation.draw(x, generator), y)

        size = config.hyperparameters.batch_size if training else EVALUATION_BATCH
        return Split(len(labels), size, make_batch, shuffle=training)


class DigitClassification(Digits, CountClassification):
    """The task of snn_mlp_1, snn_mlp_2 and snn_conv."""

    config_class = DigitConfig

    def setup(self, config: Any, device: torch.device) -> None:
        """See :class:`Digits`."""
        super().setup(config, device)
        settings, rate = config.hyperparameters, config.mnist_config.max_rate
        latency = dataclasses.asdict(config.latency)
        self.preparation = DigitPreparation(settings.length, settings.encoding, rate, **latency)
