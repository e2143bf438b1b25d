"""MNIST in memory: loading, splitting, augmenting and batching, all of it vectorised and seeded.

Every random draw of a batch comes from a generator seeded by (seed, epoch, batch), so a run that
resumes in the middle of an epoch sees the batches that an undisturbed one would, and every process
of several draws the same batch and takes its own share.
"""

import gzip
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

from snn_lib import encoding
from snn_lib.checkpoints import write_atomically
from snn_lib.config import one_line, require, setting
from snn_lib.errors import InputError

CLASSES = 10
PIXELS = 28 * 28


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


def load_mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST's images ``(N, 28, 28)``, uint8, and labels ``(N,)``.

    The archives under ``root/MNIST/raw`` are verified and unpacked; where they are missing,
    torchvision downloads them.

    Raises:
        InputError: a file is corrupt, or there is neither data nor a network.
    """
    raw = root / "MNIST" / "raw"
    for name, md5 in MNIST.resources:
        archive = raw / name
        if archive.exists() and not check_integrity(str(archive), md5):
            raise InputError(
                f"{archive} is corrupt: restore it with 'git checkout {archive}', or delete it to "
                "have it downloaded"
            )
        unpacked = archive.with_suffix("")
        if archive.exists() and not unpacked.exists():
            # torchvision would do it, but not so that another process or a crash may come between
            write_atomically(unpacked, gzip.decompress(archive.read_bytes()))
    try:
        digits = MNIST(str(root), train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        if raw.exists() and any(raw.glob("*-ubyte")):
            raise InputError(
                f"MNIST under {raw} cannot be read ({one_line(error)}): delete the *-ubyte files "
                "there to have them unpacked again"
            ) from None
        raise InputError(
            f"there is no MNIST under {raw} and it cannot be downloaded "
            f"({one_line(error).rstrip(':')}): put the four .gz files there or set dataset_path"
        ) from None
    return digits.data, digits.targets


def split_indices(count: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation images, drawn by ``seed``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[validation:], order[:validation]


class DigitBatches:
    """Batches of images, shuffled and augmented if asked.

    Args:
        images: ``(N, 28, 28)``, uint8.
        labels: ``(N,)``.
        batch_size: images a batch, over all processes; the last batch takes what is left.
        max_rate: the value of a white pixel.
        seed: of the shuffling and the augmentation.
        shuffle: whether each epoch has an order of its own.
        transform: the augmentation, none if ``None``.
        rank, world: this process takes every ``world``-th image of a batch, from ``rank`` on.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        max_rate: float = 1.0,
        seed: int = 0,
        shuffle: bool = False,
        transform: TransformConfig | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.max_rate, self.seed, self.shuffle, self.transform = max_rate, seed, shuffle, transform
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images ``(B, 784)`` in [0, max_rate] and labels ``(B,)``, from batch ``start``."""
        count = len(self.labels)
        order = (
            torch.randperm(count, generator=batch_generator(self.seed, epoch, 0))
            if self.shuffle
            else torch.arange(count)
        )
        for batch in range(start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            mine = chosen[self.rank :: self.world]
            images = self.images[mine].float() / 255.0
            if self.transform is not None:
                generator = batch_generator(self.seed, epoch, batch + 1)
                grid = random_grids(len(chosen), self.transform, generator)
                images = warp(images, grid[self.rank :: self.world])
            yield images.flatten(1) * self.max_rate, self.labels[mine]


def batch_generator(seed: int, epoch: int, batch: int) -> torch.Generator:
    """A generator of its own for every batch of every epoch."""
    mixed = (seed * 1_000_003 + epoch) * 1_000_003 + batch
    return torch.Generator().manual_seed(mixed % 2**63)


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


class MNISTDataset(Dataset):
    """Digits one by one, for a ``DataLoader``, as in the authors' 2020 release.

    Args:
        torchvision_mnist: gives ``(image, label)``, the image a PIL image or integers of 0 to 255,
            or floats in [0, 1] as torchvision's ``ToTensor`` makes them.
        length: number of time steps, kept as an attribute.
        max_rate: the value of a white pixel.
        flatten: whether images are ``(784,)`` instead of ``(28, 28)``.
        transform: called with each image as it comes, such as :func:`get_rand_transform`.

    Returns (by index):
        The image in [0, max_rate], float32, and its label.
    """

    def __init__(
        self,
        torchvision_mnist: Any,
        length: int,
        max_rate: float = 1,
        flatten: bool = False,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.dataset, self.length, self.max_rate = torchvision_mnist, length, max_rate
        self.flatten, self.transform = flatten, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.dataset[index]
        if self.transform is not None:
            image = self.transform(image)
        values = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
        white = 1.0 if values.is_floating_point() else 255.0
        values = values.float() * (self.max_rate / white)
        return values.flatten() if self.flatten else values, label


class MNISTDataset_Poisson_Spike(MNISTDataset):
    """As :class:`MNISTDataset`, each image as spike trains ``(*image, length)``.

    A pixel's value is its probability of a spike at every step, independently.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        rates, label = super().__getitem__(index)
        return encoding.poisson(rates, self.length).movedim(0, -1), label


def get_rand_transform(transform_config: Any) -> transforms.RandomApply:
    """torchvision's random crops and rotations of PIL images, from the ``transform`` of the YAML.

    With ``RandomApply.probability``, or ``probability``, an image is cropped, turned, and both
    again.

    Args:
        transform_config: mapping with the sections ``RandomResizedCrop`` (``scale``, ``ratio``,
            and ``size``, by default 28) and ``RandomRotation`` (``degrees`` or ``angle``).
    """
    crop, turn = transform_config["RandomResizedCrop"], transform_config["RandomRotation"]
    apply = transform_config.get("RandomApply", transform_config)
    steps = [
        transforms.RandomResizedCrop(
            crop.get("size", 28), scale=tuple(crop["scale"]), ratio=tuple(crop["ratio"])
        ),
        transforms.RandomRotation(turn["degrees"] if "degrees" in turn else turn["angle"]),
    ]
    return transforms.RandomApply(steps * 2, p=apply["probability"])
