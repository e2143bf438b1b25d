"""Time series classification: a set of the UCR and UEA archives, or a user's own data.

Every channel is standardised by its mean and deviation in the training sequences, and long
sequences are averaged over blocks of steps. The network sees an encoding of the result. Its answer
is the mean of its output over the steps of the sequence.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from snn_lib.data.batches import Batch
from snn_lib.data.preparation import Prepared
from snn_lib.data.sequences import collate
from snn_lib.data.series import load_series, prepare_series
from snn_lib.errors import InputError, require
from snn_lib.settings import setting
from snn_lib.tasks.classification import ClassificationHyperparameters
from snn_lib.tasks.sequences import SequenceClassification, SequenceConfig

SAMPLE = 64  # sequences on which the first layers' weights are found


@dataclass
class TimeSeriesHyperparameters(ClassificationHyperparameters):
    """The network for time series. Without epochs the last layer alone learns, in closed form."""

    epoch: int = setting(0, "epochs of gradients through all layers, after that", at_least=0)
    batch_size: int = setting(16, "sequences in a batch, over all processes", at_least=1)
    constraint: Literal["none", "stable"] = setting("stable", "keep trained filters stable")
    length: int = setting(
        2048, "most time steps; longer sequences are averaged over blocks of steps", at_least=1
    )
    encoding: Literal["current", "population", "delta"] = setting(
        "current", "how values become input (see docs/time_series.md)"
    )
    fields: int = setting(
        8, "for population: Gaussian receptive fields of each channel", at_least=2
    )
    threshold: float = setting(
        0.25, "for delta: change that is an event, in standard deviations", above=0
    )
    neurons: int = setting(2048, "neurons in the hidden layer", at_least=1)
    filters: int = setting(128, "filters of all inputs; each input has at least one", at_least=1)
    heard: int = setting(4, "filters that each neuron hears", at_least=1)
    shortest_memory: float = setting(1.0, "steps in which the fastest filter decays", above=0)
    longest_memory: float = setting(
        0.25, "time in which the slowest filter decays, as a share of the longest sequence", above=0
    )
    fewest_cycles: float = setting(
        1.0, "cycles of the slowest filter's oscillation in the longest sequence", above=0
    )
    lowest_rate: float = setting(
        0.1, "share of the steps in which the quietest neuron's current is high", above=0, below=1
    )
    highest_rate: float = setting(
        0.9, "share of the steps in which the loudest neuron's current is high", above=0, below=1
    )
    reset_strength: float = setting(
        0.03, "amount by which a spike lowers the next potential, 0: no reset", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.lowest_rate <= self.highest_rate,
            f"lowest_rate is {self.lowest_rate} and highest_rate {self.highest_rate}, expected the "
            "lowest first",
        )


@dataclass
class TimeSeriesConfig(SequenceConfig):
    """The configuration of time_series."""

    name: str = setting(
        "time_series", "name of the run, and of the folder of all runs of this name"
    )
    dataset: str = setting(
        "JapaneseVowels", "name of an archive set, or path of NAME_TRAIN.ts or of an .npz"
    )
    missing: Literal["refuse", "interpolate"] = setting("refuse", "what to do with missing values")
    hyperparameters: TimeSeriesHyperparameters = field(default_factory=TimeSeriesHyperparameters)


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
        options = config.hyperparameters
        parts, self.classes = load_series(config.dataset, Path(config.dataset_path), config.missing)
        encoding = options.encoding, options.fields, options.threshold
        try:
            self.preparation = prepare_series(parts["train"][0], options.length, *encoding)
        except InputError as error:
            raise InputError(f"{config.dataset}: {error}") from None
        if options.epoch == 0:  # nothing is chosen that sequences would have to be held out for
            parts["validation"] = parts["train"]
        return {
            part: ([self.preparation.shorten(sequence) for sequence in x], y)
            for part, (x, y) in parts.items()
        }

    def encode(self, batch: Batch) -> Batch:
        """Encodes the sequences."""
        x, lengths = self.preparation.encode(batch.x, batch.lengths)
        return batch._replace(x=x, lengths=lengths)

    def sample(self) -> Prepared:
        """Training sequences from all over the set, as they are."""
        count = len(self.parts["train"])
        x, _, lengths = next(self._as_they_are(range(0, count, -(-count // SAMPLE)), SAMPLE))
        return Prepared(x, lengths)

    def training_sequences(self) -> Iterator[Batch]:
        """The training sequences as they are, once each."""
        size = self.config.hyperparameters.batch_size
        return self._as_they_are(range(len(self.parts["train"])), size)

    def _as_they_are(self, numbers: range, size: int) -> Iterator[Batch]:
        """Batches of training sequences by number, without augmentation."""
        for begin in range(0, len(numbers), size):
            samples = [self.fetch("train", index) for index in numbers[begin : begin + size]]
            yield self.encode(collate(samples).to(self.device))
