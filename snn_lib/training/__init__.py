"""Running an experiment: the loop, what a user types, and the files that a run leaves."""

from snn_lib.training.command_line import main
from snn_lib.training.experiment import Experiment

__all__ = ["Experiment", "main"]
