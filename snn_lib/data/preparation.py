"""Makes a network's input of a user's values, in training and in use alike.

Each kind of data has its preparation. It holds everything on which the input depends, such as the
mean of the training sequences. A task prepares its batches with it, and a checkpoint contains it,
so that :func:`snn_lib.load` needs no training data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snn_lib.data.events import Events, Frames
from snn_lib.data.sequences import as_numbers, as_sequences, listed, pad
from snn_lib.encoding import LatencyLaw, constant, delta, latency, poisson, population
from snn_lib.errors import require

PIXELS = 28 * 28  # of an image of MNIST
MEAN_PIXEL = 0.1307  # of MNIST's training images, whose white is 1
REACH = 2.0  # deviations either way that receptive fields resolve


class NetworkInput(NamedTuple):
    """A network's input.

    Attributes:
        x: ``(T, B, *features)``.
        lengths: steps of each sequence, int64 ``(B,)``; ``None`` if every sequence has T.
    """

    x: Tensor
    lengths: Tensor | None = None


class Preparation:
    """Makes a network's input of samples; a subclass is a dataclass of plain values and tensors.

    Attributes:
        features: the shape of a step of the network's input.
        step: how long a step lasts, such as ``"25 ms"``, if it is known.
    """

    features: Sequence[int]
    step = ""

    def __call__(self, samples: Any) -> NetworkInput:
        """Prepares samples, on the CPU.

        Raises:
            InputError: a sample is not what the network was trained on.
        """
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor:
        """The network's input ``(T, B, *features)`` from what a batch holds, on its device."""
        return x

    def example(self) -> Any:
        """A single sample, of zeros or the like."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The preparation as a checkpoint holds it."""
        return {"kind": type(self).__name__, **vars(self)}


@dataclass(frozen=True)
class SequencePreparation(Preparation):
    """Sequences enter as they are: samples ``(samples, T, *features)``, or a list of sequences.

    Attributes:
        features: the shape of a step.
    """

    features: Sequence[int]

    def __call__(self, samples: Any) -> NetworkInput:
        """Checks the sequences and pads them to the longest."""
        return NetworkInput(*pad(as_sequences(samples, "sample", self.features)))

    def example(self) -> Tensor:
        """See :class:`Preparation`."""
        return torch.zeros(1, 1, *self.features)


@dataclass(frozen=True)
class SeriesPreparation(Preparation):
    """Time series are standardised, shortened and encoded: a list of ``(T, channels)``.

    Attributes:
        mean, deviation: of each channel in the training sequences, float64 ``(channels,)``.
        change: deviation of the standardised channels' changes from step to step, ``(channels,)``;
            infinite where a channel rises or falls evenly, so that its changes become 0.
        block: steps that are averaged into one.
        steps: of the longest training sequence, shortened.
        encoding: how values become input.
        fields: of a population, receptive fields of each channel.
        threshold: of events, the change that is one, in deviations.
    """

    mean: Tensor
    deviation: Tensor
    change: Tensor
    block: int
    steps: int
    encoding: Literal["current", "population", "delta"]
    fields: int
    threshold: float

    def __call__(self, samples: Any) -> NetworkInput:
        """Standardises, shortens, pads and encodes the sequences."""
        sequences = as_sequences(samples, "sample", self.mean.shape, torch.float64)
        x, lengths = pad([self.shorten(sequence) for sequence in sequences])
        return NetworkInput(self.encode(x), lengths)

    def example(self) -> Tensor:
        """See :class:`Preparation`."""
        return torch.zeros(1, 1, *self.mean.shape)

    def agrees_with(self, saved: Mapping[str, Any]) -> bool:
        """Whether a saved preparation has the same mean and deviation, but for rounding.

        Args:
            saved: as :meth:`to_dict` makes it.
        """
        mean, deviation = saved.get("mean"), saved.get("deviation")
        if not isinstance(mean, Tensor) or not isinstance(deviation, Tensor):
            return False
        if not mean.shape == deviation.shape == self.mean.shape:
            return False
        apart = torch.maximum((mean - self.mean).abs(), (deviation - self.deviation).abs())
        return bool((apart <= 1e-6 * self.deviation + 1e-12 * self.mean.abs()).all())

    @property
    def inputs(self) -> int:
        """The number of channels that the network sees."""
        return (self.fields if self.encoding == "population" else 2) * len(self.mean)

    @property
    def features(self) -> tuple[int, ...]:
        """See :class:`Preparation`."""
        return (self.inputs,)

    def shorten(self, sequence: Tensor, name: str = "a sample") -> Tensor:
        """Standardises a sequence and averages it over blocks of steps, in float32.

        Raises:
            InputError: float32 does not hold a number, or a change, of the result; the message
                calls the sequence ``name``.
        """
        blocks = ((sequence - self.mean) / self.deviation).split(self.block)
        x = torch.stack([steps.mean(0) for steps in blocks]).float()
        changes = x.diff(dim=0) / self.change
        require(
            bool(x.isfinite().all() and changes.isfinite().all()),
            f"{name} has a number of the size {sequence.abs().max():g}: once it is "
            "standardised, float32 does not hold it or its change",
        )
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Encodes shortened sequences ``(T, B, channels)``."""
        if self.encoding == "population":
            return population(x, torch.linspace(-REACH, REACH, self.fields, device=x.device))
        if self.encoding == "delta":
            return delta(x, self.threshold)
        change = torch.diff(x, dim=0, prepend=x[:1]) / self.change.to(x.device)
        return torch.cat([x, change], 2)


class ImagePreparation(Preparation):
    """Images become input: ``(samples, 28, 28)``, uint8 or from 0 to 1.

    Attributes:
        max_rate: the value of a white pixel.
    """

    max_rate: float

    def __call__(self, samples: Any) -> NetworkInput:
        """Encodes images; random spikes come from PyTorch's generator."""
        if isinstance(samples, (list, tuple)):
            samples = [as_numbers(one, f"image {number}") for number, one in enumerate(samples)]
            same = len({one.shape for one in samples}) == 1
            require(same, "the images differ in their shape, or there are none")
            samples = torch.stack(samples)
        images = as_numbers(samples, "the array of images")
        require(
            images.shape[1:] == (28, 28) and len(images) > 0,
            f"the images have the shape {tuple(images.shape)}, expected (samples, 28, 28)",
        )
        images = images.float() / (255.0 if images.dtype == torch.uint8 else 1.0)
        require(
            bool(((images >= 0) & (images <= 1)).all()),
            "a pixel is not a number from 0 to 1: expected those, or uint8 from 0 to 255",
        )
        return NetworkInput(self.encode(self.draw(images)))

    def example(self) -> Tensor:
        """See :class:`Preparation`."""
        return torch.zeros(1, 28, 28)

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What :meth:`encode` takes, from images whose white is 1: pixels ``(B, 784)``.

        Encodings with random numbers draw them here, on the CPU.
        """
        return images.flatten(1) * self.max_rate


@dataclass(frozen=True)
class DigitPreparation(ImagePreparation):
    """Images become currents or spikes, ``(T, B, 784)``.

    Attributes:
        length: time steps.
        encoding: whether a pixel enters as a current, as random spikes or as the time of one.
        max_rate: the current of a white pixel, or the probability of its spike.
        span, threshold, law, tau, jitter: of latencies, see :func:`snn_lib.encoding.latency`.
    """

    length: int
    encoding: Literal["constant", "poisson", "latency"]
    max_rate: float
    span: int
    threshold: float
    law: LatencyLaw
    tau: float
    jitter: float
    features = (PIXELS,)

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels ``(B, 784)`` as currents, or their spikes ``(T, B, 784)``."""
        pixels = super().draw(images)
        if self.encoding == "constant":
            return pixels
        if self.encoding == "poisson":
            return poisson(pixels, self.length, generator)
        options = self.threshold, self.law, self.tau, self.jitter
        spikes = latency(pixels, self.span, *options, generator)
        return F.pad(spikes, (0, 0, 0, 0, 0, self.length - self.span))

    def encode(self, x: Tensor) -> Tensor:
        """Repeats currents at every step; spikes stay as they are."""
        return constant(x, self.length) if self.encoding == "constant" else x


@dataclass(frozen=True)
class PixelPreparation(ImagePreparation):
    """Images become sequences of pixels, ``(T, B, 784 / T)``.

    Attributes:
        length: time steps, each of 784 / T pixels.
        max_rate: the value of a white pixel.
        order: int64 ``(784,)``, the pixel that each place of the sequence shows.
    """

    length: int
    max_rate: float
    order: Tensor

    @property
    def features(self) -> tuple[int, ...]:
        """See :class:`Preparation`."""
        return (PIXELS // self.length,)

    def encode(self, x: Tensor) -> Tensor:
        """Puts pixels ``(B, 784)`` in order, around their mean."""
        x = x[:, self.order.to(x.device)] - MEAN_PIXEL * self.max_rate
        return x.unflatten(1, (self.length, -1)).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class RecordingPreparation(Frames, Preparation):
    """Recordings of an event camera become frames: a list of :class:`snn_lib.data.events.Events`.

    Attributes:
        length, duration, bins, merge, side: as in :class:`snn_lib.data.events.Frames`.
        sensor: pixels of the camera in each direction.
        values: whether the input is 1 for any events in a pixel and step, or their number.
        order: order of the steps; summed: every step is the mean of all of them.
    """

    _: KW_ONLY
    sensor: int
    values: Literal["clipped", "counted"]
    order: Literal["forward", "reversed", "summed"]

    def __call__(self, samples: Sequence[Events]) -> NetworkInput:
        """Sorts events into frames."""
        samples = listed(samples)
        require(
            all(isinstance(sample, Events) for sample in samples),
            "expected a list of recordings, each a snn_lib.data.events.Events",
        )
        require(len(samples) > 0, "there are no recordings")
        counts = [
            torch.from_numpy(self.count_events(events, self.sensor, f"recording {number}"))
            for number, events in enumerate(samples)
        ]
        return NetworkInput(self.encode(torch.stack(counts)))

    def example(self) -> list[Events]:
        """See :class:`Preparation`."""
        return [Events(*np.zeros((4, 1), np.int64))]

    @property
    def features(self) -> tuple[int, ...]:
        """See :class:`Preparation`."""
        return self.side, self.side, 2

    @property
    def step(self) -> str:
        """See :class:`Preparation`."""
        return f"{self.duration / self.length:g} ms" if self.bins == "time" else ""

    def encode(self, x: Tensor) -> Tensor:
        """Input ``(T, B, side, side, 2)`` from counts of events ``(B, T, side, side, 2)``."""
        x = x.transpose(0, 1)
        if self.values == "clipped":
            x = x.clamp(max=1)
        x = x.to(torch.get_default_dtype())
        if self.order == "reversed":
            return x.flip(0)
        return x.mean(0).expand(x.shape) if self.order == "summed" else x


KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        SequencePreparation,
        SeriesPreparation,
        DigitPreparation,
        PixelPreparation,
        RecordingPreparation,
    )
}


def preparation_from(values: Any) -> Preparation:
    """The preparation that a checkpoint holds, see :meth:`Preparation.to_dict`.

    It prepares an example here, because a file may hold anything.

    Raises:
        InputError: this version does not know it, or it does not prepare the example.
    """
    try:
        values = dict(values)
        made = KINDS[values.pop("kind")](**values)
        known = all(
            getattr(made, entry.name) in get_args(entry.type)
            for entry in fields(made)
            if get_origin(entry.type) is Literal
        )
        with torch.random.fork_rng(devices=[]):  # some draw spikes
            x, _ = made(made.example())
        fits = len(x) > 0 and x.shape[2:] == tuple(made.features)
        sound = known and fits and bool(x[0].isfinite().all())
    except Exception:  # what a file holds can fail in any way
        sound = False
    require(sound, "its preparation makes no input")
    return made
