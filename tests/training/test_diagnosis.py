"""Finding out what broke: the first batch that is not finite, and memory before it is taken."""

import math

import pytest
import torch
from torch import nn

from snn_lib import LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.errors import RunError
from snn_lib.training.diagnosis import Numbers, memory_of, training_memory, troubled_layers

CPU = torch.device("cpu")


def network(inputs=20, neurons=30):
    return Sequential(
        LowPassSynapse(inputs, 4.0), nn.Linear(inputs, neurons), SpikingNeuron(neurons, 4.0)
    )


def number(value):
    return torch.tensor(value)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 2.0)])
def test_a_batch_that_is_not_finite_is_told_at_once_on_a_cpu(loss, norm):
    model = network()
    model(torch.rand(5, 2, 20))[0].sum().backward()
    numbers = Numbers(model, CPU)
    numbers.watch(1, 1, number(0.5), number(1.0))
    with pytest.raises(RunError, match=f"epoch 2, batch 3: the loss is {loss:g} .* norm {norm:g}"):
        numbers.watch(2, 3, number(loss), number(norm))


def test_elsewhere_the_first_one_is_remembered_and_told_later():
    numbers = Numbers(network(), CPU)
    numbers.patience = Numbers(network(), torch.device("meta")).patience  # a device to wait for
    assert numbers.patience > 7
    for batch in range(1, numbers.patience):
        numbers.watch(1, batch, number(math.nan if batch >= 7 else 0.1), number(2.0))
    message = "epoch 1, batch 7: the loss is nan and the gradient's norm 2"
    with pytest.raises(RunError, match=message):
        numbers.watch(1, numbers.patience, number(0.1), number(2.0))
    with pytest.raises(RunError, match=message):
        numbers.check()


def test_weights_are_looked_at_by_name():
    model = network()
    numbers = Numbers(model, CPU)
    numbers.check_weights(1)
    model[1].bias.data[3] = math.inf
    with pytest.raises(RunError, match=r"epoch 4: 1\.bias not finite"):
        numbers.check_weights(4)


def test_silent_saturated_and_unstable_layers():
    found = dict(troubled_layers({"a": 0.0, "b": 0.5, "c": 0.99}, {"d": 0.9, "e": 1.2}))
    assert list(found) == [
        "layer a is silent",
        "layer c fires at almost every step",
        "layer e is unstable",
    ]
    assert "a 0.0000, b 0.5000, c 0.9900" in found["layer a is silent"]
    assert "its pole radius is 1.2000" in found["layer e is unstable"]


def test_memory_is_what_the_backward_pass_keeps_and_the_weights():
    model, (steps, batch) = network(), (40, 500)
    weights = 4 * sum(p.nbytes for p in model.parameters())
    found = training_memory(model, torch.zeros(steps, 2, 20), batch)
    # The filter keeps its output, which is the product's input too, and the neurons their current.
    kept = 4 * steps * batch * (20 + 30)
    assert kept <= found - weights <= 1.2 * kept
    assert training_memory(model, torch.zeros(steps, 2, 20), 2 * batch) > 1.9 * kept
    assert not any(p.is_meta for p in model.parameters())


def test_a_model_that_needs_values_is_not_estimated():
    class Picky(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    assert training_memory(Picky(), torch.ones(3, 2, 4), 5) is None


def test_a_cpu_has_memory():
    assert 2**28 < memory_of(CPU) < 2**50
    assert memory_of(torch.device("meta")) is None
