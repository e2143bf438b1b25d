"""Single images of MNIST, under the names of the authors' 2020 release."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from snn_lib import encoding

__all__ = ["MNISTDataset", "MNISTDataset_Poisson_Spike", "get_rand_transform"]


class MNISTDataset(Dataset):
    """The images of MNIST for a ``DataLoader``, as in the authors' 2020 release.

    Args:
        torchvision_mnist: a data set of ``(image, label)``. The images are PIL images, numbers from
            0 to 255, true and false, or floats in [0, 1] as torchvision's ``ToTensor`` makes them.
            Floats of which one is negative, as ``Normalize`` makes them, count as they are.
        length: the number of time steps, which is only kept as an attribute.
        max_rate: the value of a white pixel.
        flatten: whether images are ``(784,)`` instead of ``(28, 28)``.
        transform: called with each image before it is scaled, such as :func:`get_rand_transform`.
            It returns such an image.

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
        values = values.float() * (self.max_rate / _white_of(values))
        return values.flatten() if self.flatten else values, label


def _white_of(image: Tensor) -> float:
    """The value of a white pixel in an image of this type."""
    if image.is_floating_point():  # transforms of SciPy's and NumPy's return pixels up to 255
        return 255.0 if image.min() >= 0 and image.max() > 2 else 1.0  # brighter ones reach 2
    return 1.0 if image.dtype == torch.bool else 255.0


class MNISTDataset_Poisson_Spike(MNISTDataset):
    """As :class:`MNISTDataset`, but each image becomes spike trains ``(*image, length)``.

    A pixel's value is the probability of its spike at each step.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        rates, label = super().__getitem__(index)
        return encoding.poisson(rates, self.length).movedim(0, -1), label


def get_rand_transform(transform_config: Any) -> transforms.RandomApply:
    """Random crops and rotations of PIL images by torchvision, from the YAML's ``transform``.

    With the probability ``RandomApply.probability``, or ``probability``, an image is cropped,
    turned, cropped again and turned again.

    Args:
        transform_config: a mapping with the sections ``RandomResizedCrop`` (``scale``, ``ratio``,
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
