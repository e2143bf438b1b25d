"""Digit classification: MNIST as input over time, read out by counting the output spikes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snn_lib import encoding
from snn_lib.data.augmentation import TransformConfig
from snn_lib.data.batches import ahead, batch_generator
from snn_lib.data.mnist import CLASSES, PIXELS, DigitBatches, load_mnist, split_indices
from snn_lib.inspection.activity import Activity
from snn_lib.settings import ExperimentConfig, Hyperparameters, require, setting

__all__ = ["CLASSES", "PIXELS", "DigitClassification", "DigitConfig"]

TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000
EVALUATION_BATCH = 250


@dataclass
class DigitHyperparameters(Hyperparameters):
    """Hyperparameters of digit classification: the model and its training."""

    dropout: float = setting(0.3, "probability that a hidden spike is not passed on")
    encoding: Literal["constant", "poisson"] = setting("constant", "a pixel as current or spikes")
    logit_per_spike: float = setting(1.0, "what an output spike adds to its class's logit")
    label_smoothing: float = setting(0.0, "share of the target that all classes have alike")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.label_smoothing < 1,
            f"hyperparameters.label_smoothing is {self.label_smoothing}, expected in [0, 1)",
        )
        require(
            self.logit_per_spike > 0,
            f"hyperparameters.logit_per_spike is {self.logit_per_spike}, expected > 0",
        )


@dataclass
class MNISTOptions:
    """How MNIST is used."""

    max_rate: float = setting(1.0, "a white pixel's current, or spike probability a step")
    use_transform: bool = setting(True, "augment the training images")
    validation_size: int = setting(5_000, "training images held out to choose the best epoch")
    training_size: int = setting(55_000, "of the others, the first so many are trained on")
    test_size: int = setting(10_000, "the first so many of the test images")

    def __post_init__(self) -> None:
        require(self.max_rate > 0, f"mnist_config.max_rate is {self.max_rate}, expected > 0")
        require(
            min(self.validation_size, self.training_size, self.test_size) >= 1,
            "mnist_config: validation_size, training_size and test_size must be at least 1",
        )
        require(
            self.validation_size + self.training_size <= TRAIN_IMAGES,
            f"mnist_config: validation_size + training_size is "
            f"{self.validation_size + self.training_size}, MNIST has {TRAIN_IMAGES}",
        )
        require(
            self.test_size <= TEST_IMAGES,
            f"mnist_config.test_size is {self.test_size}, MNIST has {TEST_IMAGES}",
        )


@dataclass
class DigitConfig(ExperimentConfig):
    """The configuration of snn_mlp_1 and snn_mlp_2."""

    hyperparameters: DigitHyperparameters = field(default_factory=DigitHyperparameters)
    mnist_config: MNISTOptions = field(default_factory=MNISTOptions)
    transform: TransformConfig = field(default_factory=TransformConfig)


class DigitClassification:
    """The task of snn_mlp_1 and snn_mlp_2, see :class:`snn_lib.training.experiment.Task`."""

    config_class = DigitConfig
    unit = "images"

    def __init__(self, config: DigitConfig, device: torch.device, rank: int, world: int) -> None:
        self.config, self.device = config, device
        self.rank, self.world = rank, world
        options = config.mnist_config
        images, labels = load_mnist(Path(config.dataset_path), train=True)
        training, validation = split_indices(len(labels), options.validation_size, config.seed)
        training = training[: options.training_size]
        self.training = DigitBatches(
            images[training],
            labels[training],
            config.hyperparameters.batch_size,
            options.max_rate,
            config.seed,
            shuffle=True,
            transform=config.transform if options.use_transform else None,
            rank=rank,
            world=world,
        )
        self.batches_per_epoch = len(self.training)
        self.validation = self._evaluation(images[validation], labels[validation])

    def _evaluation(self, images: Tensor, labels: Tensor) -> DigitBatches:
        return DigitBatches(
            images,
            labels,
            EVALUATION_BATCH,
            self.config.mnist_config.max_rate,
            rank=self.rank,
            world=self.world,
        )

    def train_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Encoded images ``(T, B, 784)`` and labels, from batch ``start`` of an epoch."""
        return self._encoded(self.training, epoch, start)

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The same for the ``validation`` or the ``test`` images, with the same spikes every time.

        Of several processes, each draws Poisson spikes of its own for its share.
        """
        batches = self.validation
        if split == "test":  # read when asked for and not before
            images, labels = load_mnist(Path(self.config.dataset_path), train=False)
            size = self.config.mnist_config.test_size
            batches = self._evaluation(images[:size], labels[:size])
        return self._encoded(batches, -1, 0)

    def _encoded(
        self, batches: DigitBatches, epoch: int, start: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        length = self.config.hyperparameters.length
        images = batches.epoch(epoch, start)
        if self.config.hyperparameters.encoding == "poisson":
            return ahead(self._poisson(images, epoch, start), self.device)
        # Repeated on the device: an image travels there once, not at every step.
        return ((encoding.constant(x, length), labels) for x, labels in ahead(images, self.device))

    def _poisson(
        self, batches: Iterator[tuple[Tensor, Tensor]], epoch: int, start: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, (images, labels) in enumerate(batches, start):
            generator = batch_generator(self.config.seed + self.rank + 1, epoch, batch)
            yield encoding.poisson(images, self.config.hyperparameters.length, generator), labels

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict]:
        """Cross-entropy of the output spike counts, and the sums that metrics are made of."""
        x, labels = batch
        options = self.config.hyperparameters
        spikes, _ = model(x)
        counts = spikes.sum(0)  # (B, 10)
        smoothing = options.label_smoothing if model.training else 0.0
        loss = F.cross_entropy(counts * options.logit_per_spike, labels, label_smoothing=smoothing)
        sums = {
            "samples": len(labels),
            "loss": loss.detach() * len(labels),
            "correct": (counts.detach().argmax(1) == labels).sum(),
        }
        return loss, sums

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean loss and accuracy."""
        return {
            "loss": sums["loss"] / sums["samples"],
            "accuracy": sums["correct"] / sums["samples"],
        }

    def score(self, metrics: dict[str, float]) -> tuple[float, float]:
        """What the best epoch is chosen by, higher is better: accuracy, then a lower loss."""
        return metrics["accuracy"], -metrics["loss"]

    def report(self, model: nn.Module, activity: Activity) -> Iterator[str]:
        """Synaptic operations beside those of a dense network, and accuracy against steps."""
        yield (
            f"{activity.synaptic_operations():,.0f} synaptic operations per image; a dense "
            f"network of this size takes {activity.dense_operations:,} multiply-accumulates"
        )
        accuracy = self.accuracy_over_time(model).tolist()
        early = ", ".join(
            f"{step}: {100 * accuracy[step - 1]:.2f} %" for step in range(5, len(accuracy) + 1, 5)
        )
        if early:
            yield f"accuracy if the output is read after so many steps: {early}"

    @torch.inference_mode()
    def accuracy_over_time(self, model: nn.Module) -> Tensor:
        """Accuracy on the test images if the spikes are counted up to each step, ``(T,)``."""
        model.eval()
        correct, images = torch.zeros((), device=self.device), 0
        for x, labels in self.evaluation_batches("test"):
            decisions = model(x)[0].cumsum(0).argmax(2)  # (T, B)
            correct = correct + (decisions == labels).sum(1)
            images += len(labels)
        return correct / images
