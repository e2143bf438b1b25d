"""The pretrained models, ready to be evaluated."""

import argparse
from collections.abc import Callable
from typing import Any

from measuring import ROOT
from torch import nn

from snn_lib.tasks.base import Task
from snn_lib.training.checkpoints import load_checkpoint, load_weights
from snn_lib.training.config import config_from_dict
from snn_lib.training.experiment import Experiment


def exists(name: str) -> bool:
    """Whether there is a pretrained model of this name."""
    return (ROOT / "checkpoint" / f"pretrained_{name}").exists()


def load(
    name: str, build_model: Callable[[Any], nn.Module], task: Task, chosen: argparse.Namespace
) -> Experiment:
    """A pretrained model in its experiment; with ``--smoke`` there are ten test images."""
    path = ROOT / "checkpoint" / f"pretrained_{name}"
    checkpoint = load_checkpoint(path)
    config = config_from_dict(task.config_class, checkpoint["config"], [])
    config.dataset_path, config.device = str(ROOT / "dataset"), chosen.device
    if chosen.smoke:
        config.mnist_config.test_size = 10
    experiment = Experiment(build_model, task, config)
    load_weights(experiment.model, checkpoint, path)
    return experiment
