"""An ``nn.LSTM`` or ``nn.GRU`` of as many parameters in the place of sequential_mnist.py's network.

    python benchmarks/recurrent.py gru --train
    python benchmarks/recurrent.py lstm --train mnist_config.permuted=false

Task, loop and settings are those of sequential_mnist.py, but for the learning rate of 1e-3; what
follows the kind is its command line. To go on with a run that was stopped, give this script
``--train --resume``; the command that is printed names the other one. To test, add
``test_checkpoint_path=''``.
"""

import sys

from measuring import ROOT
from torch import Tensor, nn

from snn_lib.tasks.digits import CLASSES, PIXELS
from snn_lib.tasks.sequential_digits import SequentialConfig, SequentialDigits
from snn_lib.training import main

KINDS = {"lstm": (nn.LSTM, 144), "gru": (nn.GRU, 167)}  # units: 86,122 and 86,850 parameters
RATE = "scheduler.OneCycleLR.max_lr=0.001"


class Recurrent(nn.Module):
    """One recurrent layer and a linear one that says at every step which digit it may be.

    Shape:
        Pixels over time ``(T, B, 784 / T)`` to logits ``(T, B, 10)`` and the state.
    """

    def __init__(self, kind: str, config: SequentialConfig) -> None:
        super().__init__()
        layer, units = KINDS[kind]
        self.recurrent = layer(PIXELS // config.hyperparameters.length, units)
        self.read = nn.Linear(units, CLASSES)

    def forward(self, x: Tensor, state: tuple | Tensor | None = None) -> tuple[Tensor, tuple]:
        """Runs all time steps; see the class for shapes."""
        sequence, state = self.recurrent(x, state)
        return self.read(sequence), state


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
        raise SystemExit(__doc__)
    _, kind, *arguments = sys.argv
    main(
        str(ROOT / "sequential_mnist.py"),
        lambda config: Recurrent(kind, config),
        SequentialDigits(),
        arguments=[*arguments[:1], f"name=sequential_mnist_{kind}", RATE, *arguments[1:]],
    )
