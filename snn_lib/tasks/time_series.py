"""Time series classification: a set of the UCR and UEA archives, or a user's own data.

Every channel is standardised by its mean and deviation in the training sequences, and long
sequences are averaged over blocks of steps. The network sees an encoding of the result. Its answer
is the mean of its output over the steps of the sequence.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from snn_lib.data.augmentation import AugmentationConfig, augment_sequences
from snn_lib.data.batches import Batch, Batches, batch_generator
from snn_lib.data.preparation import SeriesPreparation
from snn_lib.data.sequences import collate
from snn_lib.data.series import load_series, mean_and_deviation
from snn_lib.errors import require
from snn_lib.settings import ExperimentConfig, Settings, setting
from snn_lib.tasks.classification import ClassificationHyperparameters
from snn_lib.tasks.sequences import SequenceClassification

EVALUATION_BATCH = 16  # sequences are long and neurons many: a batch of 64 takes gigabytes


@dataclass
class TimeSeriesHyperparameters(ClassificationHyperparameters):
    """Hyperparameters of time series classification: the model and its training."""

    length: int = setting(
        512, "most time steps; longer sequences are averaged over blocks of steps", at_least=1
    )
    encoding: Literal["current", "population", "latency", "delta"] = setting(
        "current", "how values become input (see docs/time_series.md)"
    )
    fields: int = setting(
        8, "for population: Gaussian receptive fields of each channel", at_least=2
    )
    window: int = setting(8, "for latency: time steps that each step becomes", at_least=2)
    threshold: float = setting(
        0.25, "for delta: change that is an event, in standard deviations", above=0
    )
    neurons: int = setting(1024, "neurons in the hidden layer", at_least=1)
    filters: int = setting(64, "filters of all inputs; each input has at least one", at_least=1)
    shortest_memory: float = setting(1.0, "steps in which the fastest filter decays", above=0)
    longest_memory: float = setting(
        0.25, "time in which the slowest filter decays, as a share of the longest sequence", above=0
    )
    first_rate: float = setting(
        0.3, "firing rate (spikes per step) that the first weights give", above=0, below=1
    )


@dataclass
class SeriesOptions(Settings):
    """How the data is used."""

    missing: Literal["refuse", "interpolate"] = setting("refuse", "what to do with missing values")
    validation_share: float = setting(
        0.1, "share of each class's training sequences that is held out", above=0, below=1
    )
    validation_from: int = setting(
        1000,
        "training sequences from which on some are held out; fewer all train and choose the epoch",
        at_least=1,
    )
    smallest_epoch: int = setting(
        256, "fewest sequences of an epoch; a smaller set is repeated", at_least=1
    )
    use_augmentation: bool = setting(True, "augment the training sequences")


@dataclass
class TimeSeriesConfig(ExperimentConfig):
    """The configuration of time_series."""

    dataset: str = setting(
        "JapaneseVowels", "name of an archive set, or path of NAME_TRAIN.ts or of an .npz"
    )
    hyperparameters: TimeSeriesHyperparameters = field(default_factory=TimeSeriesHyperparameters)
    series: SeriesOptions = field(default_factory=SeriesOptions)
    augmentation: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(scale=0.1, stretch=1.1)
    )


class TimeSeries(SequenceClassification):
    """The task of time_series.

    Attributes:
        classes: the names of the classes, by number.
        preparation: what the network sees: ``inputs`` channels, and ``steps`` of the longest
            training sequence.
    """

    config_class = TimeSeriesConfig

    def __init__(self) -> None:
        super().__init__(self.read, readout="mean")

    def read(self, config: TimeSeriesConfig) -> dict[str, tuple[list[Tensor], Tensor]]:
        """Reads the parts, standardises them and shortens long sequences."""
        options, series = config.hyperparameters, config.series
        parts, self.classes = load_series(config.dataset, Path(config.dataset_path), series.missing)
        x, y = parts.pop("train")
        training, held_out = split_by_class(y, series.validation_share, config.seed)
        if len(y) < series.validation_from or len(held_out) == 0:
            training = held_out = torch.arange(len(y))
        parts["train"] = [x[index] for index in training], y[training]
        parts["validation"] = [x[index] for index in held_out], y[held_out]

        mean, deviation = mean_and_deviation(parts["train"][0])
        require(
            bool(deviation.isfinite().all()),
            f"{config.dataset}: the numbers of a channel are too large to be squared",
        )
        require(bool((deviation > 0).any()), f"{config.dataset}: no training sequence ever changes")
        deviation = torch.where(deviation > 0, deviation, 1.0)  # of a channel that never changes
        longest = max(map(len, parts["train"][0]))
        block = -(-longest // options.length)

        window = options.window if options.encoding == "latency" else 1
        self.preparation = SeriesPreparation(
            mean,
            deviation,
            torch.ones(len(mean)),  # of the changes, until they are known
            block,
            -(-longest // block) * window,
            options.encoding,
            options.fields,
            options.window,
            options.threshold,
        )

        def shorten(part: str) -> Iterator[Tensor]:
            for index, sequence in enumerate(parts[part][0]):
                sequence = self.preparation.shorten(sequence)
                require(
                    bool(sequence.isfinite().all()),
                    f"{config.dataset}, {part}: sequence {index} is too far from the training part",
                )
                yield sequence

        parts = {part: (list(shorten(part)), y) for part, (_, y) in parts.items()}
        changes = torch.cat([one.diff(dim=0) for one in parts["train"][0]])
        change = changes.std(0, correction=0) if len(changes) else torch.zeros(len(mean))
        change = torch.where(change > 0, change, 1.0)
        self.preparation = dataclasses.replace(self.preparation, change=change)
        return parts

    def make_batches(self, split: str) -> Batches:
        """See :class:`Task`; training sequences are augmented, and small sets are repeated."""
        require(split in self.parts, f"the data has no part {split!r}")
        return self._batches_of(split, training=split == "train")

    def _batches_of(self, split: str, training: bool) -> Batches:
        samples, config = self.parts[split], self.config
        count = len(samples)

        def take(numbers: Tensor, share: slice, epoch: int, number: int) -> Batch:
            x, y, lengths = collate([samples[index] for index in (numbers % count).tolist()])
            if training and config.series.use_augmentation:
                generator = batch_generator(config.seed, epoch, number + 1)
                x, lengths = augment_sequences(x, lengths, config.augmentation, generator)
            return Batch(x[:, share], y[share], None if lengths is None else lengths[share])

        size = config.hyperparameters.batch_size if training else EVALUATION_BATCH
        shown = max(count, config.series.smallest_epoch) if training else count
        return Batches(shown, size, take, shuffle=training)

    def encode(self, batch: Batch) -> Batch:
        """Encodes the sequences. The encoding ``latency`` makes them longer."""
        x, lengths = self.preparation.encode(batch.x, batch.lengths)
        return batch._replace(x=x, lengths=lengths)

    def sample(self) -> Tensor:
        """Encodes training sequences from all over the set, ``(T, B, inputs)``."""
        samples = self.parts["train"]
        spread = range(0, len(samples), -(-len(samples) // EVALUATION_BATCH))
        batch = collate([samples[index] for index in spread])
        return self.encode(batch.to(self.device)).x

    def training_sequences(self) -> Iterator[Batch]:
        """The training sequences without augmentation, once each."""
        return self._on_device(self._batches_of("train", training=False).epoch())


def split_by_class(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draws a share of each class to be held out; returns training and held-out indices.

    Args:
        y: class numbers, ``(samples,)``.
        share: the share of each class that is held out, rounded to whole samples. Each class keeps
            at least one sample for training.
        seed: the seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    training, held_out = [], []
    for label in y.unique():
        mine = (y == label).nonzero()[:, 0]
        mine = mine[torch.randperm(len(mine), generator=generator)]
        count = min(round(share * len(mine)), len(mine) - 1)
        held_out.append(mine[:count])
        training.append(mine[count:])
    return torch.cat(training), torch.cat(held_out)
