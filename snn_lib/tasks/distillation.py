"""Distillation: a network learns the answers of trained networks instead of the labels.

An answer says more than a label: a four that looks a little like a nine is a little of both. The
method is that of Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv
1503.02531.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from snn_lib.data.preparation import ImagePreparation
from snn_lib.errors import require


class Teachers:
    """Trained networks of digits, whose mean answer takes the place of the label.

    Args:
        paths: their checkpoints.
        temperature: the mean of their logits is divided by it. The higher it is, the more the
            answers say of the classes that are not the most probable one.

    Raises:
        InputError: a checkpoint cannot be loaded, or its network does not answer images.
    """

    def __init__(self, paths: Sequence[str], temperature: float) -> None:
        from snn_lib.training.loading import load  # from a higher floor: a task may be loaded, too

        self.networks = [load(path) for path in paths]
        self.temperature = temperature
        for path, network in zip(paths, self.networks, strict=True):
            require(
                isinstance(network.preparation, ImagePreparation),
                f"{path} is not a network of digits, so it cannot be a teacher",
            )

    def __call__(self, images: Tensor) -> Tensor:
        """The probabilities of all classes, ``(B, classes)``, for images ``(B, 28, 28)``.

        White is 1. Pixels a little beyond it, as interpolation rounds them, count as white.
        """
        images = images.clamp(0, 1)
        logits = torch.stack([network.answer(images) for network in self.networks]).mean(0)
        return (logits / self.temperature).softmax(1)
