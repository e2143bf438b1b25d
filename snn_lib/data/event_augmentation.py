"""Augmentation of frames of events: each recording is moved, turned, and loses some events."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from snn_lib.settings import Settings, setting


@dataclass
class EventAugmentationConfig(Settings):
    """Augmentation of the training recordings."""

    shift: float = setting(2.0, "largest shift in each direction, in pixels", at_least=0)
    rotation: float = setting(10.0, "largest rotation either way, in degrees", at_least=0)
    drop: float = setting(0.2, "largest share of the events that is lost", at_least=0, below=1)


def augmented_events(
    frames: Tensor, options: EventAugmentationConfig, generator: torch.Generator
) -> Tensor:
    """Recordings as they might have been, each with random values of its own.

    A pixel takes the events of the one that lies nearest to where it comes from; then every event
    is lost with a probability of its recording.

    Args:
        frames: uint8 ``(B, T, side, side, 2)``.
        options: how strongly.
        generator: source of randomness. What it draws depends on the frames.
    """
    count, steps, side = frames.shape[:3]

    def uniform(highest: float, *shape: int) -> Tensor:
        return (2.0 * torch.rand(count, *shape, generator=generator) - 1.0) * highest

    shift, angle = uniform(options.shift, 2), uniform(math.radians(options.rotation))
    if options.shift or options.rotation:
        pairs = frames.flatten(2).view(torch.int16)  # of both polarities of a pixel
        source = origins(side, shift, angle)[:, None].expand(-1, steps, -1)
        # Of an event from outside there is none.
        frames = F.pad(pairs, (0, 1)).gather(2, source).view(torch.uint8).view(frames.shape)
    if options.drop:
        kept = 1.0 - torch.rand(count, generator=generator) * options.drop
        counts = frames.flatten().clone()
        some = counts.nonzero()[:, 0]
        shares = kept[some // (counts.numel() // count)]
        counts[some] = torch.binomial(counts[some].float(), shares, generator).to(torch.uint8)
        frames = counts.view(frames.shape)
    return frames


def origins(side: int, shift: Tensor, angle: Tensor) -> Tensor:
    """Where each pixel of a picture that is turned about its middle and moved comes from.

    Args:
        side: pixels in each direction.
        shift: how far it is moved, to the right and down, ``(B, 2)``.
        angle: by how much it is turned, clockwise, in radians, ``(B,)``.

    Returns:
        Numbers of pixels, row by row, int64 ``(B, side * side)``, that behind the last one for what
        comes from outside.
    """
    middle = (side - 1) / 2
    place = torch.arange(side) - middle
    x, y = (place - shift[:, :1])[:, None], (place - shift[:, 1:])[:, :, None]
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None]
    column = (cosine * x + sine * y + middle).round().long()
    row = (cosine * y - sine * x + middle).round().long()
    inside = (torch.minimum(row, column) >= 0) & (torch.maximum(row, column) < side)
    return torch.where(inside, row * side + column, side * side).flatten(1)
