"""Time series classification: a set of the UCR and UEA archives, or a user's own data.

Every channel is standardised by its mean and deviation in the training sequences, and long
sequences are averaged over blocks of steps. The network sees an encoding of the result. Its answer
is the mean of its output over the steps of the sequence.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from snn_lib.data.augmentation import AugmentationSettings
from snn_lib.data.batches import Batch
from snn_lib.data.preparation import NetworkInput, SeriesPreparation
from snn_lib.data.sequences import collate
from snn_lib.data.series import divisors, load_series
from snn_lib.errors import InputError, require
from snn_lib.seeds import DATA
from snn_lib.settings import (
    FIRST_VALUE,
    TRAINING,
    ExperimentConfig,
    Hyperparameters,
    Needs,
    OneTimeConstant,
    section,
    setting,
)
from snn_lib.tasks.classification import LabelSmoothing
from snn_lib.tasks.sequences import SequenceClassification

SAMPLE = 64  # sequences on which the first layers' weights are found
FAR_MORE = 5  # times as many channels as steps are probably steps
STEADY = 3e4  # changes are all the same if their mean is so many times their deviation


@dataclass
class TimeSeriesHyperparameters(OneTimeConstant, LabelSmoothing, Hyperparameters):
    """The network for time series. Without epochs the last layer alone learns, in closed form."""

    epoch: int = setting(0, "epochs of gradients through all layers, after that", at_least=0)
    batch_size: int = setting(16, "sequences in a batch, over all processes", at_least=1)
    constraint: Literal["none", "stable"] = setting(
        "stable", "keep trained filters stable", TRAINING
    )
    length: int = setting(
        2048, "most time steps; longer sequences are averaged over blocks of steps", at_least=1
    )
    encoding: Literal["current", "population", "delta"] = setting(
        "current", "how values become input (see docs/time_series.md)"
    )
    fields: int = setting(
        8,
        "for population: Gaussian receptive fields of each channel",
        Needs("hyperparameters.encoding", ("population",)),
        at_least=2,
    )
    threshold: float = setting(
        0.25,
        "for delta: change that is an event, in standard deviations",
        Needs("hyperparameters.encoding", ("delta",)),
        above=0,
    )
    neurons: int = setting(2048, "neurons in the hidden layer", at_least=1)
    filters: int = setting(
        128, "filters in all; each input has the same number, rounded up", at_least=1
    )
    heard: int = setting(
        4, "filters that each neuron hears, if there are so many", FIRST_VALUE, at_least=1
    )
    shortest_memory: float = setting(
        1.0, "steps in which the fastest filter decays", FIRST_VALUE, above=0
    )
    longest_memory: float = setting(
        0.25,
        "time in which the slowest filter decays, as a share of the longest sequence; at least "
        "twice that of the fastest",
        FIRST_VALUE,
        above=0,
    )
    fewest_cycles: float = setting(
        1.0,
        "cycles of the slowest filter's oscillation in the longest sequence; at most one in four "
        "steps",
        FIRST_VALUE,
        above=0,
    )
    lowest_rate: float = setting(
        0.1,
        "share of the steps in which the quietest neuron's current is high",
        FIRST_VALUE,
        above=0,
        below=1,
    )
    highest_rate: float = setting(
        0.9,
        "share of the steps in which the loudest neuron's current is high",
        FIRST_VALUE,
        above=0,
        below=1,
    )
    reset_strength: float = setting(
        0.03,
        "amount by which a spike lowers the next potential, 0: no reset",
        FIRST_VALUE,
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.train_bias, "train_bias is False, but the neurons' thresholds are their biases"
        )
        self.require_order("lowest_rate", "highest_rate")


@dataclass
class TimeSeriesConfig(ExperimentConfig):
    """The configuration of time_series."""

    dataset: str = setting(
        "JapaneseVowels", "name of an archive set, or path of NAME_TRAIN.ts or of an .npz"
    )
    missing: Literal["refuse", "interpolate"] = setting("refuse", "what to do with missing values")
    hyperparameters: TimeSeriesHyperparameters = section(TimeSeriesHyperparameters)
    augmentation: AugmentationSettings = section(AugmentationSettings, TRAINING)


class TimeSeries(SequenceClassification):
    """The task of time_series.

    Attributes:
        classes: the names of the classes, by number.
        preparation: what the network sees: ``inputs`` channels, and ``steps`` of the longest
            training sequence.
        contents: a line that says what was read.
    """

    config_class = TimeSeriesConfig
    preparation: SeriesPreparation

    def __init__(self) -> None:
        super().__init__({}, readout="mean")

    def read(self, config: TimeSeriesConfig) -> dict[str, tuple[list[Tensor], Tensor]]:
        """Reads the parts, standardises them and shortens long sequences."""
        settings = config.hyperparameters
        parts, self.classes = load_series(config.dataset, Path(config.dataset_path), config.missing)
        train = parts["train"][0]
        counts = ", ".join(f"{len(x)} to {part}" for part, (x, _) in parts.items())
        self.contents = (
            f"{config.dataset}: sequences {counts}; steps {min(map(len, train))} to "
            f"{max(map(len, train))}; channels {train[0].shape[1]}; classes {len(self.classes)}"
        )
        try:
            self.preparation = prepare_series(train, settings)
        except InputError as error:
            raise InputError(f"{config.dataset}: {error}") from None
        if settings.epoch == 0:  # the fit leaves each sequence out once, so none is held out
            parts["validation"] = parts["train"]
        shorten = self.preparation.shorten
        return {
            part: ([shorten(one, f"sample {k} of the {part} data") for k, one in enumerate(x)], y)
            for part, (x, y) in parts.items()
        }

    def check_data(self, checkpoint: Mapping[str, Any]) -> None:
        """See :class:`snn_lib.tasks.base.Task`."""
        super().check_data(checkpoint)
        preparation = checkpoint.get("preparation")
        if not isinstance(preparation, dict):
            return
        require(
            self.preparation.agrees_with(preparation),
            f"{self.config.dataset} has another mean and deviation than the data that the network "
            "has learned from: give it that, or run the network on this by snn_lib.load",
        )
        change = preparation.get("change")
        require(
            self.preparation.encoding != "current"  # which alone sees changes
            or not isinstance(change, Tensor)
            or torch.equal(change.isinf(), self.preparation.change.isinf()),
            f"a channel rises or falls evenly in {self.config.dataset} or in the data that the "
            "network has learned from, but not in both, or an earlier version has trained it: "
            "train it again, or run it by snn_lib.load",
        )

    def sample(self) -> NetworkInput:
        """Training sequences from all over the set, as they are."""
        count = len(self.parts["train"])
        x, _, lengths = next(self._as_they_are(range(0, count, -(-count // SAMPLE)), SAMPLE))
        return NetworkInput(x, lengths)

    def training_sequences(self) -> Iterator[Batch]:
        """The training sequences as they are, once each."""
        size = self.config.hyperparameters.batch_size
        return self._as_they_are(range(len(self.parts["train"])), size)

    def training_labels(self) -> Tensor:
        """The classes of the training sequences, int64 ``(samples,)``."""
        data = self.parts["train"]
        return torch.stack([data[number][1] for number in range(len(data))])

    def _as_they_are(self, numbers: range, size: int) -> Iterator[Batch]:
        """Batches of training sequences by number, without augmentation."""
        for begin in range(0, len(numbers), size):
            samples = [self.fetch("train", index) for index in numbers[begin : begin + size]]
            yield self._encoded(collate(samples), DATA, begin // size)


def prepare_series(
    sequences: list[Tensor], settings: TimeSeriesHyperparameters
) -> SeriesPreparation:
    """Finds on the training sequences how series are standardised, shortened and encoded.

    A channel that never changes is only centred. The changes of one that rises or falls evenly, as
    a clock, become 0.

    Args:
        sequences: ``(T_i, channels)`` each, float64.
        settings: the most steps, and the encoding. If a sequence has more steps, all are averaged
            over blocks of steps.

    Raises:
        InputError: no sequence ever changes, or numbers are too large to be squared.

    Warns:
        UserWarning: there are far more channels than steps, as in the wrong order.
    """
    longest, channels = max(map(len, sequences)), sequences[0].shape[1]
    if channels > FAR_MORE * longest:
        warnings.warn(
            f"the series have {channels} channels and at most {longest} steps: are time and "
            "channels exchanged? An .npz file has (samples, T, channels), an estimator is given "
            "(samples, channels, T)",
            stacklevel=2,
        )
    # PyTorch sums differences, so a channel that never changes has a deviation of exactly 0.
    deviation, mean = torch.std_mean(torch.cat(sequences), 0, correction=0)
    require(
        bool(deviation.isfinite().all()), "the numbers of a channel are too large to be squared"
    )
    require(bool((deviation > 0).any()), "no training sequence ever changes")
    block = -(-longest // settings.length)
    preparation = SeriesPreparation(
        mean,
        divisors(deviation),
        torch.ones(channels),  # of the changes, until they are known
        block,
        -(-longest // block),
        settings.encoding,
        settings.fields,
        settings.threshold,
    )
    changes = torch.cat([preparation.shorten(sequence).diff(dim=0) for sequence in sequences])
    change = changes.std(0, correction=0) if len(changes) else torch.zeros(channels)
    # A clock's changes differ by rounding alone, and must not be divided by that.
    steady = changes.mean(0).abs() > STEADY * change
    return replace(preparation, change=divisors(change).masked_fill(steady, math.inf))
