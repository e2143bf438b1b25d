"""Distillation: a network learns the answers of trained networks instead of the labels.

An answer says more than a label: a four that looks a little like a nine is a little of both. The
idea is that of Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv
1503.02531. They divide the logits of both sides by the temperature. Here only those of the teachers
are divided: how large the logits of the network become is its own affair.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from snn_lib.data.mnist import CLASSES
from snn_lib.errors import InputError, require


class Teachers:
    """Trained networks of digits, whose mean answer takes the place of the label.

    They run on the CPU.

    Args:
        paths: their checkpoints.
        temperature: the mean of their logits is divided by it. The higher it is, the more the
            answers say of the classes that are not the most probable one.

    Raises:
        InputError: a checkpoint cannot be loaded, or its network does not name classes of images.
    """

    def __init__(self, paths: Sequence[str], temperature: float) -> None:
        from snn_lib.training.loading import load  # not above, since it imports tasks

        self.temperature, self.networks = temperature, []
        blank = torch.zeros(1, 28, 28)
        for path in paths:
            try:
                network = load(path)
                with torch.random.fork_rng(devices=[]):  # some draw spikes
                    shape = tuple(network.answer(blank).shape)
            except (InputError, ValueError) as error:
                raise InputError(f"teacher {path}: {error}") from None
            require(
                shape == (1, CLASSES),
                f"teacher {path}: the answer to an image has the shape {shape}, expected (1, "
                f"{CLASSES})",
            )
            require(
                network.logit_scale is not None,
                f"teacher {path}: it predicts numbers, expected one that names classes",
            )
            self.networks.append(network)

    def __call__(self, images: Tensor) -> Tensor:
        """The probabilities of all classes, ``(B, classes)``, for images ``(B, 28, 28)``.

        White is 1. Pixels a little beyond it, as interpolation rounds them, count as white.
        """
        images = images.clamp(0, 1)
        logits = torch.stack([network.answer(images) for network in self.networks]).mean(0)
        return (logits / self.temperature).softmax(1)
