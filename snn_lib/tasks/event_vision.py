"""Classification of what event cameras record: simulated digits, N-MNIST, DVS128 Gesture.

A recording becomes frames of counted events, kept as bytes, one for each time step; what the
network sees of them is whether there were any, or how many.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from snn_lib.data.batches import Batch, Batches, batch_generator, split_indices
from snn_lib.data.event_augmentation import EventAugmentationConfig, augmented_events
from snn_lib.data.events import NMNIST_SIDE, Frames
from snn_lib.data.recordings import SETS, downloaded, load_recordings
from snn_lib.data.simulated_events import CameraConfig, simulated_recordings
from snn_lib.settings import LARGEST, ExperimentConfig, require, setting
from snn_lib.tasks.classification import CountClassification, CountHyperparameters

__all__ = ["EventConfig", "EventHyperparameters", "EventVision"]

EVALUATION_BATCH = 100


@dataclass
class EventHyperparameters(CountHyperparameters):
    """Hyperparameters of event vision: the model and its training."""

    length: int = setting(12, "time steps, which the events are sorted into")
    dropout: float = setting(0.3, "probability that a hidden spike is not passed on")


@dataclass
class EventOptions:
    """How the recordings are used."""

    path: str = setting("", "folder of files that you have; empty: what Tonic downloads")
    bins: Literal["time", "count"] = setting("time", "what all time steps have the same of")
    duration: float = setting(300.0, "ms of a recording that are seen, from its first event")
    merge: int = setting(1, "pixels of the sensor, in each direction, that become one")
    side: int = setting(NMNIST_SIDE, "pixels that the network sees in each direction")
    values: Literal["clipped", "counted"] = setting(
        "clipped", "whether there were events in a pixel and step, or how many"
    )
    order: Literal["forward", "reversed", "summed"] = setting(
        "forward", "of the steps; summed: each is the mean of all, nothing is left of time"
    )
    use_augmentation: bool = setting(True, "augment the training recordings")
    validation_size: int = setting(1_000, "training recordings held out for the best epoch")
    training_size: int = setting(10_000, "of the others at most so many are trained on")
    test_size: int = setting(10_000, "of the test recordings at most so many, the first")

    def __post_init__(self) -> None:
        for key in ("merge", "side", "validation_size", "training_size", "test_size"):
            value = getattr(self, key)
            require(1 <= value <= LARGEST, f"events.{key} is {value}, expected at least 1")
        require(
            0.001 <= self.duration <= LARGEST,
            f"events.duration is {self.duration}, expected milliseconds",
        )


@dataclass
class EventConfig(ExperimentConfig):
    """The configuration of event_vision."""

    dataset: Literal["simulated", "nmnist", "dvs_gesture"] = setting(
        "simulated", "MNIST as a simulated camera records it, or real recordings"
    )
    hyperparameters: EventHyperparameters = field(default_factory=EventHyperparameters)
    events: EventOptions = field(default_factory=EventOptions)
    camera: CameraConfig = field(default_factory=CameraConfig)
    augmentation: EventAugmentationConfig = field(default_factory=EventAugmentationConfig)


class EventVision(CountClassification):
    """The task of event_vision."""

    config_class = EventConfig
    unit = "recordings"

    def prepare(self, config: Any, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """Reads the training recordings; see :class:`Task`."""
        super().prepare(config, device, rank, world)
        options = config.events
        frames, labels = self._recordings("train", options.validation_size + options.training_size)
        require(
            options.validation_size < len(labels),
            f"events.validation_size is {options.validation_size}, there are {len(labels)} "
            "recordings to train on and to hold out",
        )
        training, validation = split_indices(len(labels), options.validation_size, config.seed)
        training = training[: options.training_size]
        self.parts = {
            "train": (frames, labels, training),
            "validation": (frames, labels, validation),
        }

    def _recordings(self, part: str, count: int) -> tuple[Tensor, Tensor]:
        """Frames and labels of a part; simulated ones are made for so many images."""
        config, options = self.config, self.config.events
        kind, root = SETS[config.dataset], Path(config.dataset_path)
        if config.dataset == "simulated":
            folder = simulated_recordings(config.camera, root, part == "train", count)
        elif options.path:
            folder = Path(options.path)
        else:
            folder = downloaded(kind, root)
        frames = Frames(
            config.hyperparameters.length,
            options.duration,
            options.bins,
            options.merge,
            options.side,
        )
        # The files of real sets are not in an order of which the first stand for all.
        first = count if config.dataset == "simulated" or part == "test" else None
        return load_recordings(kind, folder, part, frames, first)

    def make_batches(self, split: str) -> Batches:
        """The recordings of a split; those of the test are read when they are asked for."""
        config, options = self.config, self.config.events
        if split == "test" and "test" not in self.parts:
            frames, labels = self._recordings("test", options.test_size)
            self.parts["test"] = frames, labels, torch.arange(len(labels))
        frames, labels, chosen = self.parts[split]
        training = split == "train"

        def take(numbers: Tensor, share: slice, epoch: int, number: int) -> Batch:
            if training and options.use_augmentation:
                x = frames[chosen[numbers]]  # (B, T, side, side, 2)
                generator = batch_generator(config.seed, epoch, number + 1)
                x = augmented_events(x, config.augmentation, generator)[share]
            else:
                x = frames[chosen[numbers[share]]]
            return Batch(self.seen(x), labels[chosen[numbers[share]]])

        size = config.hyperparameters.batch_size if training else EVALUATION_BATCH
        return self.shared(len(chosen), size, take, shuffle=training)

    def seen(self, frames: Tensor) -> Tensor:
        """What the network sees of frames ``(B, T, side, side, 2)``, time first."""
        options, x = self.config.events, frames.transpose(0, 1)
        if options.values == "clipped":
            x = x.clamp(max=1)
        if options.order == "reversed":
            x = x.flip(0)
        elif options.order == "summed":
            x = x.float().mean(0).expand(x.shape)
        return x

    def sample(self) -> Tensor:
        """A batch of what the network sees, for its first weights."""
        return next(iter(self.evaluation_batches("validation"))).x
