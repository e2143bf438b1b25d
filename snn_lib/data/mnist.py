"""MNIST in memory: loading, splitting, augmenting and batching, all of it vectorised and seeded."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.datasets.utils import check_integrity

from snn_lib.data.augmentation import TransformConfig, random_grids, warp
from snn_lib.data.batches import batch_generator
from snn_lib.errors import InputError, one_line
from snn_lib.files import write_atomically

CLASSES = 10
PIXELS = 28 * 28


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
