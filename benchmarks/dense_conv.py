"""The dense network beside snn_conv.py: the same convolutions, data, augmentation and training.

    python benchmarks/dense_conv.py --train --config_file snn_conv.yaml name=dense_conv \
        hyperparameters.logit_per_spike=1

It sees each image once, without a time axis, has a ReLU where the other spikes, one output for each
class and PyTorch's first weights. Settings of time, neurons and filters have no effect; the weights
that --test evaluates are named by test_checkpoint_path=runs/dense_conv/TIME/best.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # snn_lib and the script
from snn_conv import ConvConfig
from snn_lib.tasks.digits import CLASSES, DigitClassification
from snn_lib.training import main


@dataclass
class DenseConfig(ConvConfig):
    """The settings of snn_conv, under a name by which a checkpoint finds them in this script."""


class Dense(nn.Module):
    """16C3-P2-64C3-P2-128C3-P2-256-10 with ReLU.

    Shape:
        An image that is constant over time ``(T, B, 784)`` to logits ``(1, B, 10)``.
    """

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        options = config.hyperparameters
        first, second, third = options.channels
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            *(nn.Conv2d(1, first, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(first, second, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(second, third, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
            nn.Flatten(),
            *(nn.Linear(9 * third, options.hidden), nn.ReLU(), nn.Dropout(options.dropout)),
            nn.Linear(options.hidden, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Looks at the first step; see the class for shapes."""
        return self.layers(x[0])[None]


if __name__ == "__main__":
    main(__file__, Dense, DigitClassification(DenseConfig))
