"""Which epoch is the best one."""

import csv

import torch
from running import load
from torch import nn

from snn_lib import LowPassSynapse, Sequential
from snn_lib.tasks import SequenceClassification
from snn_lib.training import Experiment


def build_model(config):
    return Sequential(LowPassSynapse(2, tau=3), nn.Linear(2, 2))


def test_the_best_epoch_is_that_of_the_validation_and_not_of_the_training(tmp_path):
    y = torch.arange(64) % 2
    x = torch.rand(64, 5, 2) + nn.functional.one_hot(y)[:, None]
    opposite = x, 1 - y  # what is learned is wrong here
    task = SequenceClassification({"train": (x, y), "validation": opposite}, "mean")
    config = task.config_class(name="mine", device="cpu", runs_path=str(tmp_path))
    config.hyperparameters.epoch = 4
    config.optimizer.Adam.lr = 0.05
    experiment = Experiment(build_model, task, config)
    finished = experiment.train()
    with open(experiment.run.best.parent / "metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def best_of(split):
        scores = [(row[f"{split}_accuracy"], -row[f"{split}_loss"]) for row in rows]
        return 1 + scores.index(max(scores))

    assert best_of("train") == 4
    assert best_of("validation") == 1
    assert load(experiment.run.best)["epoch"] == finished["best"]["epoch"] == 1
