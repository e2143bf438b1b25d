"""Augmentation of sequences: each of a batch is cut, stretched, scaled and made noisy."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from snn_lib.readout import within
from snn_lib.settings import Settings, setting


@dataclass
class AugmentationConfig(Settings):
    """Augmentation of the training sequences."""

    noise: float = setting(
        0.0, "standard deviation of white noise, in those of the channel, 0: none", at_least=0
    )
    scale: float = setting(
        0.1, "standard deviation of the logarithm of each channel's factor, 0: none", at_least=0
    )
    stretch: float = setting(1.1, "most times that time is slowed or sped up, 1: none", at_least=1)
    crop: float = setting(
        1.0, "shortest share of a sequence that is shown, 1: all", above=0, at_most=1
    )
    channel_dropout: float = setting(
        0.0, "probability that a channel is silenced", at_least=0, below=1
    )


def augmented(
    x: Tensor, lengths: Tensor, options: AugmentationConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sequences as they might have been, each with random values of its own.

    A window of each is cut out and stretched, which is one interpolation between the neighbours in
    time; then each channel is scaled, perhaps silenced, and made noisy.

    Args:
        x: ``(T, B, channels)``.
        lengths: steps of each sequence, int64 ``(B,)``.
        options: how strongly.
        generator: source of randomness. What it draws for a sequence depends on T and B.

    Returns:
        The sequences ``(T', B, channels)``, zero behind their ends, and their new lengths.
    """
    _, batch, channels = x.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=generator) * (high - low) + low

    window = lengths * uniform(options.crop, 1.0)
    start = uniform(0.0, 1.0) * (lengths - window)
    factor = uniform(-math.log(options.stretch), math.log(options.stretch)).exp()
    new_lengths = (window * factor).round().long().clamp(min=1)
    x = resampled(x, lengths, start, window, new_lengths)
    factors = (torch.randn(batch, channels, generator=generator) * options.scale).exp()
    heard = torch.rand(batch, channels, generator=generator) >= options.channel_dropout
    noise = torch.randn(x.shape, generator=generator) * options.noise
    return (x * factors * heard + noise) * within(x, new_lengths), new_lengths


def resampled(
    x: Tensor, lengths: Tensor, start: Tensor, window: Tensor, new_lengths: Tensor
) -> Tensor:
    """A window of each sequence, read at as many even places as its new length has steps.

    A step is the middle of its share of time, 1 long: step t of the new sequence reads at
    ``start + (t + 1/2) window / new_length - 1/2``, linearly between steps, and at the nearest step
    outside the sequence. The whole window at its own length gives the sequence itself.

    Args:
        x: ``(T, B, channels)``.
        lengths, new_lengths: steps of each sequence, int64 ``(B,)``.
        start, window: where its window begins and how long it is, in steps, ``(B,)``.

    Returns:
        ``(max(new_lengths), B, channels)``, zero behind their ends.
    """
    steps = torch.arange(int(new_lengths.max()))[:, None]
    place = start + (steps + 0.5) * (window / new_lengths) - 0.5
    place = torch.minimum(place.clamp(min=0), (lengths - 1).to(place.dtype))
    before = place.floor().long()
    share = (place - before)[..., None]

    def at(step: Tensor) -> Tensor:
        return x.gather(0, step[..., None].expand(-1, -1, x.shape[2]))

    # Not as a sum of two products, which would round a sequence that is read where it stands.
    read = torch.lerp(at(before), at(torch.minimum(before + 1, lengths - 1)), share)
    return read * within(read, new_lengths)
