"""Networks with each preparation, as ``snn_lib.load`` returns them, and samples for them."""

import numpy as np
import torch
from recorded import some_events
from torch import nn

from snn_lib import LowPassSynapse, Sequential
from snn_lib.data.events import Frames
from snn_lib.data.preparation import (
    DigitPreparation,
    PixelPreparation,
    RecordingPreparation,
    SequencePreparation,
    SeriesPreparation,
)

NAMES = "no", "yes", "perhaps"


class Prepared(nn.Module):
    """A network with its preparation, as ``snn_lib.load`` returns it."""

    def __init__(self, preparation):
        super().__init__()
        self.preparation, self.classes, self.readout = preparation, list(NAMES), "last"
        inputs = int(np.prod(preparation.features))
        self.layers = Sequential(nn.Flatten(2), nn.Linear(inputs, 3), LowPassSynapse(3, tau=4))

    def forward(self, x, state=None):
        return self.layers(x, state)


LATENCY = {"span": 3, "threshold": 0.2, "law": "linear", "tau": 5.0, "jitter": 0.0}
SERIES = {
    "mean": torch.tensor([3.0, -1.0], dtype=torch.float64),
    "deviation": torch.tensor([2.0, 0.5], dtype=torch.float64),
    "change": torch.tensor([0.7, 0.9]),
    "steps": 6,
    **{"fields": 8, "threshold": 0.25},
}


LATENCIES = DigitPreparation(4, "latency", 0.5, **LATENCY)


def frames(recordings):
    """The numbers of events of each step, ``(T, B, side, side, 2)``."""
    counted = [Frames(5, 30.0).count_events(one, 34) for one in recordings]
    return torch.stack([torch.from_numpy(one) for one in counted], 1)


# A preparation, samples, and their values step by step as they were measured, ``(T, B, ...)``.
PREPARED = [
    (SequencePreparation([5]), torch.rand(3, 6, 5), lambda raw: raw.transpose(0, 1)),
    (
        SeriesPreparation(block=1, encoding="current", **SERIES),
        torch.rand(3, 6, 2) * 4,
        lambda raw: raw.transpose(0, 1),
    ),
    (
        DigitPreparation(4, "constant", 0.5, **LATENCY),
        torch.rand(3, 28, 28),
        lambda raw: raw.flatten(1).expand(4, 3, 784),
    ),
    (
        PixelPreparation(28, 0.5, torch.arange(784)),
        torch.rand(3, 28, 28),
        lambda raw: raw.transpose(0, 1),
    ),
    (LATENCIES, torch.rand(3, 28, 28), lambda raw: LATENCIES(raw).x),  # spikes are not prepared
    *(
        (
            RecordingPreparation(5, 30.0, sensor=34, values=values, order="forward"),
            [some_events(seed, count=9000) for seed in range(3)],
            frames,
        )
        for values in ("clipped", "counted")
    ),
]
