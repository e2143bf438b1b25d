"""What is minimised: the loss of the task, and the penalty on the hidden layers' firing."""

import pytest
import torch
from torch import nn

from snn_lib import LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.data.batches import Batch
from snn_lib.tasks import SequenceClassification
from snn_lib.training.objective import task_loss, training_loss

WEIGHT, TARGET, LIMIT = 0.5, 0.1, 0.3


@pytest.fixture
def model():
    network = Sequential(
        LowPassSynapse(3, 3.0),
        nn.Linear(3, 7),
        SpikingNeuron(7, 3.0),
        nn.Linear(7, 5),
        SpikingNeuron(5, 3.0),
        nn.Linear(5, 2),
        SpikingNeuron(2, 3.0),
    )
    for index in (1, 3, 5):
        nn.init.normal_(network[index].weight, 0.3, 0.5)
    return network


@pytest.fixture
def task():
    x, y = torch.rand(20, 6, 3), torch.arange(20) % 2
    task = SequenceClassification({"train": (x, y)}, "count")
    config = task.config_class(name="mine")
    settings = config.hyperparameters
    settings.rate_penalty, settings.target_rate, settings.rate_limit = WEIGHT, TARGET, LIMIT
    task.setup(config, torch.device("cpu"))
    return task


def penalties(spikes, lengths, share):
    """The penalty of a layer, neuron by neuron and step by step; that off its target is a share."""
    counts = torch.zeros(spikes.shape[2])
    for number, length in enumerate(lengths):
        for step in range(length):
            counts += spikes[step, number]
    rates = counts / sum(lengths)
    above = [max(rate / LIMIT - 1, 0) ** 2 for rate in rates.tolist()]
    return share * (rates.mean().item() / TARGET - 1) ** 2 + sum(above) / len(above)


@pytest.mark.parametrize("lengths", [None, [2, 6, 4]])
@pytest.mark.parametrize(("by_cost", "shares"), [(False, [1, 1]), (True, [1, 5 * 2 / (7 * 5)])])
def test_the_penalty_is_of_hidden_layers_and_leaves_the_padding_out(
    model, task, lengths, by_cost, shares
):
    task.config.hyperparameters.penalty_by_cost = by_cost
    x, y = 3 * torch.rand(6, 3, 3), torch.tensor([0, 1, 1])
    batch = Batch(x, y, None if lengths is None else torch.tensor(lengths))
    found, sums = training_loss(task, model, model, batch)
    plain, same = task_loss(task, model, batch)
    outputs, _ = model.layerwise(x)
    layers = zip((2, 4), shares, strict=True)
    hidden = [penalties(outputs[i].detach(), lengths or [6] * 3, share) for i, share in layers]
    assert min(hidden) > 0.1
    assert found.item() == pytest.approx(plain.item() + WEIGHT * sum(hidden), rel=1e-5)
    assert sums == same  # metrics are those of the task
