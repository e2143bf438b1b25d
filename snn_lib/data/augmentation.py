"""Augmentation of images: each of a batch is cropped, turned and bent by values of its own."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from snn_lib.errors import require
from snn_lib.settings import setting


@dataclass
class RandomResizedCropConfig:
    """Crop of a random share of the area and a random aspect ratio, resized to the full image."""

    scale: list[float] = setting([0.85, 1.0], "share of the area, lowest and highest")
    ratio: list[float] = setting([0.75, 1.3333], "width over height, lowest and highest")


@dataclass
class RandomRotationConfig:
    """Rotation about the centre by up to so many degrees either way."""

    degrees: float = setting(15.0, "largest angle")


@dataclass
class ElasticConfig:
    """Smooth random displacement: noise blurred over sigma pixels, of alpha pixels' strength."""

    alpha: float = setting(0.0, "root mean square in each direction, in pixels, 0: off")
    sigma: float = setting(4.0, "how smooth it is, in pixels")


@dataclass
class TransformConfig:
    """Augmentation of the training images: with ``probability``, ``repeat`` times crop and turn."""

    probability: float = setting(0.5, "that an image is augmented at all")
    repeat: int = setting(2, "how often it is cropped and turned")
    RandomResizedCrop: RandomResizedCropConfig = field(default_factory=RandomResizedCropConfig)
    RandomRotation: RandomRotationConfig = field(default_factory=RandomRotationConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)

    def __post_init__(self) -> None:
        require(
            0 <= self.probability <= 1,
            f"transform.probability is {self.probability}, expected a probability in [0, 1]",
        )
        require(0 <= self.repeat <= 100, f"transform.repeat is {self.repeat}, expected 0 to 100")
        for key, highest in (("scale", 1.0), ("ratio", math.inf)):
            values = getattr(self.RandomResizedCrop, key)
            require(
                len(values) == 2 and 0 < values[0] <= values[1] <= highest,
                f"transform.RandomResizedCrop.{key} is {values}, expected [low, high] with "
                f"0 < low <= high" + (" <= 1" if highest == 1.0 else ""),
            )
        require(
            self.RandomRotation.degrees >= 0,
            f"transform.RandomRotation.degrees is {self.RandomRotation.degrees}, expected >= 0",
        )
        require(
            self.elastic.alpha >= 0 and self.elastic.sigma > 0,
            f"transform.elastic has alpha {self.elastic.alpha} and sigma {self.elastic.sigma}, "
            "expected alpha >= 0 and sigma > 0",
        )


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
