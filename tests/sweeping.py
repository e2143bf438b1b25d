"""An experiment whose score is known beforehand, and sweeps in this process and in another."""

import sys

import torch
from running import forkserver, run_script

SCRIPT = """
import torch
from torch import nn

from snn_lib import LowPassSynapse, Sequential
from snn_lib.tasks import SequenceClassification
from snn_lib.training import main


class Known(SequenceClassification):
    def score(self, metrics):
        return -abs(self.config.hyperparameters.tau_m - 5)


def build_model(config):
    return Sequential(LowPassSynapse(2, config.hyperparameters.tau_m), nn.Linear(2, 2))


x, y = torch.rand(100, 5, 2), torch.arange(100) % 2
if __name__ == "__main__":
    main(__file__, build_model, Known({"train": (x, y), "test": (x, y)}, "mean"))
"""


def sweep(*arguments):
    """Runs ``python -m snn_lib.sweep`` in this process."""
    return run_script("snn_lib/sweep.py", *arguments)


def start_sweep(*arguments):
    """Starts it in a process of its own."""
    process = forkserver().Process(target=_sweep, args=arguments, daemon=True)
    process.start()
    return process


def _sweep(*arguments):
    torch.set_num_threads(1)
    sys.exit(sweep(*arguments).code)
