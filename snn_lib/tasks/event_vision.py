"""Classification of what event cameras record: simulated digits, N-MNIST, DVS128 Gesture.

A recording becomes one frame of event counts for each time step, stored as bytes. The network sees
whether a pixel had any events in a step, or how many.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from snn_lib.data.augmentation import EventAugmentationSettings, augment_events
from snn_lib.data.batches import Batch, Split, split_indices
from snn_lib.data.events import NMNIST_SIDE
from snn_lib.data.preparation import RecordingPreparation
from snn_lib.data.recordings import SETS, download_recordings, load_recordings, recording_files
from snn_lib.data.simulated_events import CameraSettings, simulated_recordings
from snn_lib.errors import SettingsError, require
from snn_lib.seeds import DATA, batch_generator
from snn_lib.settings import (
    TRAINING,
    ExperimentConfig,
    Hyperparameters,
    Needs,
    Settings,
    section,
    setting,
)
from snn_lib.tasks.classification import CountClassification, LabelSmoothing, SpikeCounting

EVALUATION_BATCH = 100
SAMPLE = 100  # recordings on which first weights are found


@dataclass
class EventHyperparameters(SpikeCounting, LabelSmoothing, Hyperparameters):
    """Hyperparameters of event vision: the model and its training."""

    batch_size: int = setting(
        64, "recordings in a training batch, over all processes", TRAINING, at_least=1
    )
    length: int = setting(12, "time steps that the events are sorted into", at_least=1)


@dataclass
class EventSettings(Settings):
    """How the recordings are used."""

    path: str = setting(
        "",
        "folder of your own files; empty: Tonic's download",
        Needs("dataset", ("nmnist", "dvs_gesture")),
    )
    bins: Literal["time", "count"] = setting("time", "equal times or equal numbers of events")
    duration: float = setting(
        300.0, "milliseconds used, from the first event", at_least=0.001, at_most=1e9
    )
    merge: int = setting(1, "sensor pixels in each direction that are merged into one", at_least=1)
    side: int = setting(NMNIST_SIDE, "pixels of the input in each direction", at_least=1)
    values: Literal["clipped", "counted"] = setting(
        "clipped", "whether the input is 1 for any events in a pixel and step, or their number"
    )
    order: Literal["forward", "reversed", "summed"] = setting(
        "forward", "order of the steps; summed: every step is the mean of all of them"
    )
    use_augmentation: bool = setting(True, "augment the training recordings", TRAINING)
    validation_size: int = setting(
        1_000, "held-out recordings, which choose the best epoch", TRAINING, at_least=1
    )
    training_size: int = setting(
        10_000,
        "most other recordings that are trained on; a run says how many",
        TRAINING,
        at_least=1,
    )
    test_size: int = setting(
        10_000,
        "most test recordings that are evaluated: of real ones evenly, of simulated the first",
        at_least=1,
    )


@dataclass
class EventConfig(ExperimentConfig):
    """The configuration of event_vision."""

    dataset: Literal["simulated", "nmnist", "dvs_gesture"] = setting(
        "simulated", "MNIST in front of a simulated camera, or real recordings"
    )
    hyperparameters: EventHyperparameters = section(EventHyperparameters)
    events: EventSettings = section(EventSettings)
    camera: CameraSettings = section(CameraSettings, Needs("dataset", ("simulated",)))
    augmentation: EventAugmentationSettings = section(
        EventAugmentationSettings, Needs("events.use_augmentation"), TRAINING
    )

    def preparation(self) -> RecordingPreparation:
        """How recordings become input."""
        shared = "duration", "bins", "merge", "side", "values", "order"
        frames = {name: getattr(self.events, name) for name in shared}
        sensor = SETS[self.dataset].sensor
        return RecordingPreparation(self.hyperparameters.length, sensor=sensor, **frames)


class EventVision(CountClassification):
    """The task of event_vision, which reads the recordings of a split when they are needed."""

    config_class = EventConfig
    unit = "recordings"
    preparation: RecordingPreparation

    def setup(self, config: Any, device: torch.device) -> None:
        """See :class:`Task`."""
        super().setup(config, device)
        self.preparation = config.preparation()
        self.classes = [str(number) for number in range(SETS[config.dataset].classes)]
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        # of real recordings of one's own, whose path simulated ones do not read
        own = "" if config.dataset == "simulated" else config.events.path
        self.folder = Path(own) if own else None

    def has(self, split: str) -> bool:
        """See :class:`Task`; a folder of one's own need not have a test part."""
        if split != "test" or not self.folder or not self.folder.is_dir():
            return True  # a folder that is missing is refused by its name, where it is read
        return any(self.folder.glob(SETS[self.config.dataset].files.format("Test")))

    def make_split(self, split: str) -> Split:
        """The recordings of a split; those of the training split are augmented."""
        config = self.config
        if split not in self.parts:
            self.parts.update(self._read(split))
        frames, labels, chosen = self.parts[split]
        training = split == "train"

        def make_batch(numbers: Tensor, share: slice, epoch: int, number: int) -> Batch:
            mine = chosen[numbers[share]]
            if training and config.events.use_augmentation:
                generator = batch_generator(config.seed, epoch, number + 1)
                x = augment_events(frames[chosen[numbers]], config.augmentation, generator)[share]
            else:
                x = frames[mine]
            return Batch(x, labels[mine])

        size = config.hyperparameters.batch_size if training else EVALUATION_BATCH
        return Split(len(chosen), size, make_batch, shuffle=training)

    def divided(self) -> int:
        """See :class:`Task`; all recordings of the folder, however many are trained on."""
        self.split("train")  # which reads them
        return len(self.parts["train"][1])

    def sample(self) -> Tensor:
        """The network's input from a few training recordings, ``(T, B, side, side, 2)``."""
        self.split("train")  # which reads it
        frames, labels, chosen = self.parts["train"]
        first = chosen[:SAMPLE]
        return self._encoded(Batch(frames[first], labels[first]), DATA, 0).x

    def _read(self, split: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Reads a split: frames, labels, and the numbers of the recordings that belong to it.

        Training and validation recordings are read together, and real ones are divided at random.
        """
        settings = self.config.events
        if split == "test":
            frames, labels = self._recordings("test", settings.test_size)
            return {"test": (frames, labels, torch.arange(len(labels)))}
        if self.folder and self.has("test"):  # so that what is missing is told before training
            recording_files(SETS[self.config.dataset], self.folder, "test")
        held_out = settings.validation_size
        # All files of a real set are read, because they are not in random order.
        simulated = self.config.dataset == "simulated"
        frames, labels = self._recordings(
            "train", held_out + settings.training_size if simulated else None
        )
        require(
            held_out < len(labels),
            f"events.validation_size is {held_out}, but there are {len(labels)} recordings to "
            f"train on and to hold out: set it to {max(len(labels) // 10, 1)}, say",
            SettingsError,
        )
        if simulated:  # real recordings of the first images then show digits that are new
            validation, training = torch.arange(len(labels)).tensor_split([held_out])
        else:
            training, validation = split_indices(len(labels), held_out, self.config.seed)
        training = training[: settings.training_size]
        return {"train": (frames, labels, training), "validation": (frames, labels, validation)}

    def _recordings(self, part: str, count: int | None) -> tuple[Tensor, Tensor]:
        """Frames and labels of ``count`` recordings of a part; ``None``: of all."""
        config = self.config
        kind, root = SETS[config.dataset], Path(config.dataset_path)
        if config.dataset == "simulated" and count is not None:
            paths = simulated_recordings(config.camera, root, part == "train", count)
        else:
            folder = self.folder or download_recordings(kind, root)
            paths = recording_files(kind, folder, part)
            if count is not None and count < len(paths):  # evenly: they may be in order of classes
                paths = [paths[number * len(paths) // count] for number in range(count)]
        return load_recordings(kind, paths, self.preparation)
