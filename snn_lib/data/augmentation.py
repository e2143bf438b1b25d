"""Augmentation of images: each of a batch is cropped, turned and bent by values of its own."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from snn_lib.errors import require
from snn_lib.settings import Settings, setting


@dataclass
class RandomResizedCropConfig(Settings):
    """Crop of a random share of the area and a random aspect ratio, resized to the full image."""

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
class RandomRotationConfig(Settings):
    """Rotation about the centre by up to so many degrees either way."""

    degrees: float = setting(15.0, "largest angle", at_least=0)


@dataclass
class ElasticConfig(Settings):
    """Smooth random displacement: noise blurred over sigma pixels, of alpha pixels' strength."""

    alpha: float = setting(
        0.0, "root mean square in each direction, in pixels, 0: none", at_least=0
    )
    sigma: float = setting(4.0, "width of the Gaussian that smooths it, in pixels", above=0)


@dataclass
class TransformConfig(Settings):
    """Augmentation of the training images: with ``probability``, ``repeat`` times crop and turn."""

    probability: float = setting(
        0.5, "probability that an image is augmented at all", at_least=0, at_most=1
    )
    repeat: int = setting(
        2, "number of times that it is cropped and turned", at_least=0, at_most=100
    )
    RandomResizedCrop: RandomResizedCropConfig = field(default_factory=RandomResizedCropConfig)
    RandomRotation: RandomRotationConfig = field(default_factory=RandomRotationConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)


def random_grids(count: int, transform: TransformConfig, generator: torch.Generator) -> Tensor:
    """Sampling grids ``(count, 28, 28, 2)`` that augment images, each with its own random values.

    The crops and rotations of an image are affine maps; their product is one map, so the image is
    interpolated once however many there are. Coordinates are those of ``F.grid_sample``.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

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
        shift = elastic_shift(count, transform.elastic, generator)
        grids = grids + torch.where(augmented[:, None, None, None], shift, 0.0)
    return grids


def elastic_shift(count: int, elastic: ElasticConfig, generator: torch.Generator) -> Tensor:
    """Smooth random displacements ``(count, 28, 28, 2)`` in the coordinates of ``F.grid_sample``.

    White noise blurred by a Gaussian in both directions and scaled to the asked root mean square.

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
    return F.grid_sample(images[:, None], grids, align_corners=False)[:, 0]
