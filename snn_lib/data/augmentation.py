"""Augmentation: the images, recordings and sequences of a batch, each changed by values of its own.

All random numbers come from the generator of the batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from snn_lib.data.batches import Batch
from snn_lib.errors import require
from snn_lib.readout import within
from snn_lib.settings import Needs, Settings, section, setting


def draw_uniform(low: float, high: float, generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers that are uniformly distributed between ``low`` and ``high``."""
    return torch.rand(shape, generator=generator) * (high - low) + low


# Images


@dataclass
class RandomResizedCropSettings(Settings):
    """Crop of a random share of the area and a random aspect ratio, resized to the full image.

    What is longer than a side of the image is cut, so crops may be smaller than the share, and
    nearer to a square than the ratio.
    """

    scale: list[float] = setting(
        [0.85, 1.0], "lowest and highest share of the area", above=0, at_most=1, length=2
    )
    ratio: list[float] = setting(
        [0.75, 1.3333], "lowest and highest width over height", above=0, length=2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, values in vars(self).items():
            require(values[0] <= values[1], f"{key} is {values}, expected the lowest first")


@dataclass
class RandomRotationSettings(Settings):
    """Rotation about the centre by up to so many degrees either way."""

    degrees: float = setting(15.0, "largest angle", at_least=0)


@dataclass
class ElasticSettings(Settings):
    """Smooth random displacement: noise blurred over sigma pixels, of alpha pixels' strength."""

    alpha: float = setting(
        0.0, "root mean square in each direction, in pixels, 0: none", at_least=0
    )
    sigma: float = setting(
        4.0,
        "width of the Gaussian that smooths it, in pixels",
        Needs("transform.elastic.alpha"),
        above=0,
    )


SOME_IMAGES = Needs("transform.probability")


@dataclass
class TransformSettings(Settings):
    """Augmentation of the training images: with ``probability``, ``repeat`` times crop and turn."""

    probability: float = setting(
        0.5, "probability that an image is augmented at all", at_least=0, at_most=1
    )
    repeat: int = setting(
        2, "number of times that it is cropped and turned", SOME_IMAGES, at_least=0, at_most=100
    )
    RandomResizedCrop: RandomResizedCropSettings = section(
        RandomResizedCropSettings, SOME_IMAGES, Needs("transform.repeat")
    )
    RandomRotation: RandomRotationSettings = section(
        RandomRotationSettings, SOME_IMAGES, Needs("transform.repeat")
    )
    elastic: ElasticSettings = section(ElasticSettings, SOME_IMAGES)


def draw_grids(count: int, transform: TransformSettings, generator: torch.Generator) -> Tensor:
    """Draws sampling grids ``(count, 28, 28, 2)``, through which :func:`warp` augments images.

    The crops and rotations of an image are affine maps. Their product is one map, so the image is
    interpolated once however many there are. Coordinates are those of ``F.grid_sample``.
    """

    def uniform(low: float, high: float) -> Tensor:
        return draw_uniform(low, high, generator, count)

    identity = torch.eye(3).repeat(count, 1, 1)
    total = identity.clone()
    for _ in range(transform.repeat):
        crop, turn = identity.clone(), identity.clone()
        area = uniform(*transform.RandomResizedCrop.scale)
        low, high = transform.RandomResizedCrop.ratio
        ratio = uniform(math.log(low), math.log(high)).exp()
        for axis, side in enumerate((area * ratio, area / ratio)):
            size = side.sqrt().clamp(max=1.0)
            crop[:, axis, axis] = size
            crop[:, axis, 2] = uniform(-1.0, 1.0) * (1.0 - size)
        degrees = transform.RandomRotation.degrees
        angle = torch.deg2rad(uniform(-degrees, degrees))
        turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
        turn[:, 0, 1], turn[:, 1, 0] = -angle.sin(), angle.sin()
        total = total @ crop @ turn
    augmented = torch.rand(count, generator=generator) < transform.probability
    total = torch.where(augmented[:, None, None], total, identity)
    grids = F.affine_grid(total[:, :2], [count, 1, 28, 28], align_corners=False)
    if transform.elastic.alpha:
        shift = draw_elastic_shift(count, transform.elastic, generator)
        grids = grids + torch.where(augmented[:, None, None, None], shift, 0.0)
    return grids


def draw_elastic_shift(count: int, elastic: ElasticSettings, generator: torch.Generator) -> Tensor:
    """Draws smooth displacements ``(count, 28, 28, 2)`` in the coordinates of ``F.grid_sample``.

    They are white noise, blurred by a Gaussian in both directions and scaled to the root mean
    square ``elastic.alpha``.

    Source: Simard, Steinkraus, Platt, ICDAR 2003, doi 10.1109/ICDAR.2003.1227801.
    """
    position = torch.arange(28.0)
    blur = torch.exp(-0.5 * ((position[:, None] - position) / elastic.sigma) ** 2)
    blur = blur / blur.square().sum(1, keepdim=True).sqrt()  # keeps the variance at 1
    noise = torch.randn(count, 2, 28, 28, generator=generator)
    shift = blur @ noise @ blur.T * (elastic.alpha * 2.0 / 28.0)
    return shift.permute(0, 2, 3, 1)


def warp(images: Tensor, grids: Tensor) -> Tensor:
    """Images ``(B, 28, 28)`` resampled bilinearly at the grids, zero outside."""
    return F.grid_sample(images[:, None], grids.to(images.dtype), align_corners=False)[:, 0]


# Recordings of event cameras


@dataclass
class EventAugmentationSettings(Settings):
    """Augmentation of the training recordings."""

    shift: float = setting(2.0, "largest shift in each direction, in pixels", at_least=0)
    rotation: float = setting(10.0, "largest rotation either way, in degrees", at_least=0)
    drop: float = setting(0.2, "largest share of the events that is lost", at_least=0, below=1)


def augment_events(
    frames: Tensor, settings: EventAugmentationSettings, generator: torch.Generator
) -> Tensor:
    """Moves and turns each recording, and loses some of its events.

    A pixel takes the events of the pixel that lies nearest to the place it comes from. Then every
    event is lost with the same probability, which is drawn for each recording.

    Args:
        frames: counted events, uint8 ``(B, T, side, side, 2)``.
        settings: the largest changes.
        generator: the source of randomness.
    """
    count, steps, side = frames.shape[:3]
    turn = math.radians(settings.rotation)
    shift = draw_uniform(-settings.shift, settings.shift, generator, count, 2)
    angle = draw_uniform(-turn, turn, generator, count)
    if settings.shift or settings.rotation:
        pairs = frames.flatten(2).view(torch.int16)  # of both polarities of a pixel
        source = find_origins(side, shift, angle)[:, None].expand(-1, steps, -1)
        # Nothing comes from outside of the frame: a pixel without events is put behind the last.
        frames = F.pad(pairs, (0, 1)).gather(2, source).view(torch.uint8).view(frames.shape)
    if settings.drop:
        kept = 1.0 - draw_uniform(0.0, settings.drop, generator, count).float()
        counts = frames.flatten().clone()
        some = counts.nonzero()[:, 0]
        shares = kept[some // (counts.numel() // count)]
        counts[some] = torch.binomial(counts[some].float(), shares, generator).to(torch.uint8)
        frames = counts.view(frames.shape)
    return frames


def find_origins(side: int, shift: Tensor, angle: Tensor) -> Tensor:
    """Finds the pixel that each pixel comes from when a frame is turned about its middle and moved.

    Args:
        side: pixels of the frame in each direction.
        shift: how far the frame is moved to the right and down, in pixels, ``(B, 2)``.
        angle: the angle by which it is turned clockwise, in radians, ``(B,)``.

    Returns:
        Numbers of pixels, row by row, int64 ``(B, side * side)``. A pixel that comes from outside
        has the number ``side * side``, which follows that of the last pixel.
    """
    middle = (side - 1) / 2
    place = torch.arange(side) - middle
    x, y = (place - shift[:, :1])[:, None], (place - shift[:, 1:])[:, :, None]
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    column = (cosine * x + sine * y + middle).round().long()
    row = (cosine * y - sine * x + middle).round().long()
    inside = (torch.minimum(row, column) >= 0) & (torch.maximum(row, column) < side)
    return torch.where(inside, row * side + column, side * side).flatten(1)


# Sequences


@dataclass
class AugmentationSettings(Settings):
    """Augmentation of the training sequences."""

    noise: float = setting(
        0.0, "standard deviation of white noise, in the unit of the input, 0: none", at_least=0
    )
    scale: float = setting(
        0.0, "standard deviation of the logarithm of each channel's factor, 0: none", at_least=0
    )
    stretch: float = setting(1.0, "most times that time is slowed or sped up, 1: none", at_least=1)
    crop: float = setting(
        1.0, "shortest share of a sequence that is shown, 1: all", above=0, at_most=1
    )
    channel_dropout: float = setting(
        0.0, "probability that a channel is silenced", at_least=0, below=1
    )


def augment_sequences(
    given: Batch,
    settings: AugmentationSettings,
    generator: torch.Generator,
    targets_are_sequences: bool,
) -> Batch:
    """Cuts a window out of each sequence, stretches and scales it, and adds noise.

    Stretching interpolates between neighbours in time. Then each channel is scaled or silenced, and
    gets noise. All positions of a feature map share their channel's factor.

    Args:
        given: the batch; x is ``(T, B, channels)``, or feature maps ``(T, B, channels, H, W)``, and
            y the targets of the sequences ``(B, *)``, which stay, or of their steps ``(T, B, *)``,
            of which a new step takes that of the nearest one.
        settings: the strength of each change.
        generator: the source of randomness.
        targets_are_sequences: whether y has a target for each step.

    Returns:
        The sequences ``(T', B, *features)``, zero behind their ends, with targets and lengths.
    """
    x, y, lengths = given
    steps, batch, *features = x.shape
    channels = (batch, features[0], *[1] * (len(features) - 1))
    if lengths is None:
        lengths = torch.full((batch,), steps)

    def uniform(low: float, high: float) -> Tensor:
        return draw_uniform(low, high, generator, batch)

    # Whole steps, so that a window that is not stretched is what it was.
    window = (lengths * uniform(settings.crop, 1.0)).ceil()
    start = (uniform(0.0, 1.0) * (lengths - window + 1)).floor()
    factor = uniform(-math.log(settings.stretch), math.log(settings.stretch)).exp()
    new_lengths = (window * factor).round().long().clamp(min=1)
    where = lengths, start, window, new_lengths
    x = resample(x.flatten(2), *where).unflatten(2, features)
    if targets_are_sequences:
        moved = resample(y.reshape(steps, batch, -1), *where, nearest=True)
        y = moved.unflatten(2, y.shape[2:]) if y.dim() > 2 else moved[..., 0]
    factors = (torch.randn(channels, generator=generator) * settings.scale).exp()
    kept = torch.rand(channels, generator=generator) >= settings.channel_dropout
    noise = torch.randn(x.shape, generator=generator) * settings.noise
    return Batch((x * factors * kept + noise) * within(x, new_lengths), y, new_lengths)


def resample(
    x: Tensor,
    lengths: Tensor,
    start: Tensor,
    window: Tensor,
    new_lengths: Tensor,
    nearest: bool = False,
) -> Tensor:
    """Reads a window of each sequence at as many evenly spaced times as its new length has steps.

    Each step stands for the middle of an interval of length 1. So step t of the new sequence is
    read at ``start + (t + 1/2) window / new_length - 1/2``, by linear interpolation. Outside of the
    sequence its nearest step is read. The whole sequence at its own length stays as it is.

    Args:
        x: ``(T, B, channels)``.
        lengths: steps of each sequence, int64 ``(B,)``.
        start, window: beginning and length of each window, in steps, ``(B,)``.
        new_lengths: steps of each new sequence, int64 ``(B,)``.
        nearest: whether the nearest step is read instead, of values of any type.

    Returns:
        ``(max(new_lengths), B, channels)``, zero behind the end of each sequence.
    """
    steps = torch.arange(int(new_lengths.max()))[:, None]
    place = start + (steps + 0.5) * (window / new_lengths) - 0.5
    place = torch.minimum(place.clamp(min=0), (lengths - 1).to(place.dtype))
    before = place.floor().long()
    share = (place - before)[..., None]

    def at(step: Tensor) -> Tensor:
        return x.gather(0, step[..., None].expand(-1, -1, x.shape[2]))

    after = torch.minimum(before + 1, lengths - 1)
    if nearest:
        read = at(torch.where(share[..., 0] > 0.5, after, before))
    else:
        # Not as a sum of two products, which would round a sequence that is read where it stands.
        read = torch.lerp(at(before), at(after), share)
    return read * within(read, new_lengths)
