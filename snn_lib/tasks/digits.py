"""Digit classification: MNIST as input over time, read out by counting the output spikes.

:class:`Digits` is what this shares with other tasks on MNIST.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snn_lib import encoding
from snn_lib.data.augmentation import TransformConfig, random_grids, warp
from snn_lib.data.batches import Batch, Batches, batch_generator, split_indices
from snn_lib.data.mnist import CLASSES, PIXELS, load_mnist
from snn_lib.inspection.activity import Activity, Operations, operations_per_step
from snn_lib.readout import first_lead
from snn_lib.settings import ExperimentConfig, require, setting
from snn_lib.tasks.base import output_of
from snn_lib.tasks.classification import Classification, ClassificationHyperparameters

__all__ = ["CLASSES", "PIXELS", "DigitClassification", "DigitConfig"]

TRAIN_IMAGES, TEST_IMAGES = 60_000, 10_000
EVALUATION_BATCH = 250


@dataclass
class DigitHyperparameters(ClassificationHyperparameters):
    """Hyperparameters of digit classification: the model and its training."""

    dropout: float = setting(0.3, "probability that a hidden spike is not passed on")
    encoding: Literal["constant", "poisson", "latency"] = setting(
        "constant", "a pixel as a current, as random spikes, or as the time of one"
    )
    logit_per_spike: float = setting(1.0, "what an output spike adds to its class's logit")
    early_answers: float = setting(0.0, "weight of the loss after every step, 0: off")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.logit_per_spike > 0,
            f"hyperparameters.logit_per_spike is {self.logit_per_spike}, expected > 0",
        )
        require(
            self.early_answers >= 0,
            f"hyperparameters.early_answers is {self.early_answers}, expected >= 0",
        )


@dataclass
class LatencyOptions:
    """The encoding ``latency``: a pixel spikes once, the brighter the earlier."""

    span: int = setting(10, "steps over which the spikes are spread, the first of the sequence")
    threshold: float = setting(0.2, "grey level, of 1, up to which a pixel stays silent")
    law: encoding.LatencyLaw = setting("linear", "how grey becomes a time")
    tau: float = setting(5.0, "time constant of the logarithmic law, in steps")
    jitter: float = setting(0.0, "deviation of the times, in steps")

    def __post_init__(self) -> None:
        require(self.span >= 1, f"latency.span is {self.span}, expected at least 1")
        require(
            0 < self.threshold < 1,
            f"latency.threshold is {self.threshold}, expected a grey level in (0, 1)",
        )
        require(self.tau > 0, f"latency.tau is {self.tau}, expected > 0")
        require(self.jitter >= 0, f"latency.jitter is {self.jitter}, expected >= 0")


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
    latency: LatencyOptions = field(default_factory=LatencyOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.hyperparameters.encoding != "latency"
            or self.latency.span <= self.hyperparameters.length,
            f"latency.span is {self.latency.span}, expected at most hyperparameters.length, "
            f"{self.hyperparameters.length}",
        )


class Digits(Classification):
    """MNIST in its parts and batches; a subclass says how a network sees an image."""

    unit = "images"

    def prepare(self, config: Any, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """Reads the training images; see :class:`Task`."""
        super().prepare(config, device, rank, world)
        options = config.mnist_config
        images, labels = load_mnist(Path(config.dataset_path), train=True)
        training, validation = split_indices(len(labels), options.validation_size, config.seed)
        training = training[: options.training_size]
        self.images = {
            "train": (images[training], labels[training]),
            "validation": (images[validation], labels[validation]),
        }

    def make_batches(self, split: str) -> Batches:
        """The digits of a split; the test images are read when they are asked for, not before."""
        config = self.config
        if split == "test":
            images, labels = load_mnist(Path(config.dataset_path), train=False)
            size = config.mnist_config.test_size
            images, labels = images[:size], labels[:size]
        else:
            images, labels = self.images[split]
        training = split == "train"
        augment = training and config.mnist_config.use_transform

        def take(numbers: Tensor, share: slice, epoch: int, number: int) -> Batch:
            mine = numbers[share]
            x = images[mine].float() / 255.0
            if augment:
                generator = batch_generator(config.seed, epoch, number + 1)
                x = warp(x, random_grids(len(numbers), config.transform, generator)[share])
            x = x.flatten(1) * config.mnist_config.max_rate  # (B, 784)
            return Batch(self.drawn(x, epoch, number), labels[mine])

        size = config.hyperparameters.batch_size if training else EVALUATION_BATCH
        return self.shared(len(labels), size, take, shuffle=training)

    def drawn(self, x: Tensor, epoch: int, number: int) -> Tensor:
        """What is drawn at random from the images ``(B, 784)`` of a batch: here nothing is."""
        return x


class DigitClassification(Digits):
    """The task of snn_mlp_1 and snn_mlp_2."""

    config_class = DigitConfig

    def drawn(self, x: Tensor, epoch: int, number: int) -> Tensor:
        """Spikes with the pixels as probabilities or as times, if that is the encoding."""
        settings, latency = self.config.hyperparameters, self.config.latency
        if settings.encoding == "constant":
            return x
        # Of several processes, each draws spikes of its own for its share.
        generator = batch_generator(self.config.seed + self.rank + 1, max(epoch, -1), number)
        if settings.encoding == "poisson":
            return encoding.poisson(x, settings.length, generator)
        options = latency.threshold, latency.law, latency.tau, latency.jitter
        spikes = encoding.latency(x, latency.span, *options, generator)
        return F.pad(spikes, (0, 0, 0, 0, 0, settings.length - latency.span))

    def encode(self, batch: Batch) -> Batch:
        """Images as input over time ``(T, B, 784)``."""
        if self.config.hyperparameters.encoding == "constant":
            return batch._replace(x=encoding.constant(batch.x, self.config.hyperparameters.length))
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Cross-entropy of the output neurons' spike counts; see :class:`Classification`.

        ``early_answers`` adds the mean of that of the counts after each step.
        """
        settings = self.config.hyperparameters
        output = output_of(model, batch.x)  # (T, B, 10)
        loss, sums = self.judged(model, output.sum(0) * settings.logit_per_spike, batch.y)
        if model.training and settings.early_answers:
            logits = output.cumsum(0) * settings.logit_per_spike
            labels = batch.y.long().expand(len(logits), -1)
            early = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss = loss + settings.early_answers * early
        return loss, sums

    def report(self, model: nn.Module, activity: Activity) -> Iterator[str]:
        """Synaptic operations beside those of a dense network, and accuracy against steps."""
        work = activity.operations()
        dense = Operations(0, activity.dense_operations, 0, 0)
        yield (
            f"{activity.synaptic_operations():,.0f} synaptic operations per image "
            f"({work.additions:,.0f} additions for spikes, {work.multiply_accumulates:,.0f} "
            f"multiply-accumulates for currents); a dense network of this size takes "
            f"{activity.dense_operations:,} multiply-accumulates"
        )
        yield (
            f"filters and neurons: {work.filters:,.0f} and {work.neurons:,.0f} "
            f"multiply-accumulates per image; all arithmetic by estimate {1e6 * work.energy():.2f} "
            f"uJ (45 nm), the dense network's {1e6 * dense.energy():.2f} uJ"
        )
        accuracy = self.accuracy_over_time(model).tolist()
        early = ", ".join(
            f"{step}: {100 * accuracy[step - 1]:.2f} %" for step in range(5, len(accuracy) + 1, 5)
        )
        if early:
            yield f"accuracy if the output is read after so many steps: {early}"
        for row in self.early_stopping(model, (1, 2, 3)):
            yield (
                f"stopped when the first is {row['lead']} spikes ahead: "
                f"{100 * row['accuracy']:.2f} % after {row['steps']:.1f} steps and "
                f"{row['operations']:,.0f} synaptic operations"
            )

    @torch.inference_mode()
    def early_stopping(self, model: nn.Module, leads: Sequence[float]) -> list[dict[str, float]]:
        """What stopping each test image at a lead gives: accuracy, mean steps and operations."""
        model.eval()
        rows = [{"lead": lead, "accuracy": 0.0, "steps": 0.0, "operations": 0.0} for lead in leads]
        images = 0
        for batch in self.evaluation_batches("test"):
            with operations_per_step(model) as operations:
                output = output_of(model, batch.x)
            cost = sum(operations.values()).cumsum(0)  # (T, B)
            images += len(batch.y)
            for row in rows:
                answers, steps = first_lead(output, row["lead"])
                row["accuracy"] += (answers == batch.y).sum().item()
                row["steps"] += steps.sum().item()
                row["operations"] += cost.gather(0, steps[None] - 1).sum().item()
        means = ("accuracy", "steps", "operations")
        return [{**row, **{key: row[key] / images for key in means}} for row in rows]

    @torch.inference_mode()
    def accuracy_over_time(self, model: nn.Module) -> Tensor:
        """Accuracy on the test images if the spikes are counted up to each step, ``(T,)``."""
        model.eval()
        correct, images = torch.zeros((), device=self.device), 0
        for batch in self.evaluation_batches("test"):
            decisions = output_of(model, batch.x).cumsum(0).argmax(2)  # (T, B)
            correct = correct + (decisions == batch.y).sum(1)
            images += len(batch.y)
        return correct / images
